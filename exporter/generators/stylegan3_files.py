"""StyleGAN3 checkpoints: records of pickled modules, or bare state_dicts -> Parts.

Channels come from the shapes of tensors, which the unpickler has checked against the bytes. A record states every
size, padding and factor, and each is checked before it is used. A state_dict has none of them: there the paper's rules
(``design``) give them, and the filters in the file must be the filters of those rules.
"""

import math
import re
from collections.abc import Mapping as Dict
from dataclasses import replace
from typing import cast

import numpy as np
from torch import nn

from engine.errors import CheckpointError
from exporter.generators import Facts, Parts
from exporter.generators.records import Record, attributes, child, children, class_of, named_arrays, plain
from exporter.generators.state import (
    MAX_RESOLUTION,
    axis,
    build_mapping,
    estimate_centre,
    load_strictly,
    named_list,
    with_centre,
)
from exporter.generators.stylegan2 import Mapping
from exporter.generators.stylegan3 import Synthesis3
from exporter.generators.stylegan3_design import InputSpec, LayerSpec, Plan, design
from exporter.passive import is_a, shown

MAX_SIZE, MAX_FACTOR = 16384, 16
ADVICE = "a bare state_dict does not say how it resamples: give the .pkl file that it was taken from"
LAYER = re.compile(r"synthesis\.L(\d{1,2})_(\d{1,5})_(\d{1,5})\.weight")


def from_nvidia(record: Record) -> Parts:
    """The generator of a StyleGAN3 pickle."""
    synthesis = child(record, "synthesis")
    # The learning-rate multiplier is stored as the gain of the bias.
    multiplier = number(child(child(record, "mapping"), "fc0"), "bias_gain")
    arrays = {**named_arrays(child(record, "mapping"), "mapping."), **named_arrays(synthesis, "synthesis.")}
    plan = read_plan(synthesis)
    layers = [child(synthesis, spec.name) for spec in plan.layers]
    low = [number(layer, "out_sampling_rate") for layer in layers if plain(attributes(layer).get("use_fp16"))]
    octaves = 1 + round(math.log2(plan.layers[-1].out_size / min(low))) if low else 0
    return assemble(arrays, plan, multiplier, octaves)


def from_state(arrays: Dict[str, np.ndarray], remarks: tuple[str, ...] = ()) -> Parts:
    """The generator of a state_dict with ``mapping.fc0.weight``, ``synthesis.L0_36_512.weight``, ..."""
    return assemble(arrays, designed_plan(arrays), 0.01, 4, remarks)


def assemble(arrays: Dict[str, np.ndarray], plan: Plan, multiplier: float, num_fp16_res: int,
             remarks: tuple[str, ...] = ()) -> Parts:
    arrays, is_open = with_centre(arrays)
    if "mapping.w_avg" in arrays and arrays["mapping.w_avg"].shape != (plan.w_dim,):
        raise CheckpointError("mapping and synthesis of this file disagree on w_dim: the file is damaged")
    built = load_strictly(lambda: nn.ModuleDict({"mapping": build_mapping(arrays, multiplier),
                                                 "synthesis": Synthesis3(plan)}), arrays, "StyleGAN3")
    mapping, synthesis = cast(Mapping, built["mapping"]), cast(Synthesis3, built["synthesis"])
    if is_open:
        remarks += estimate_centre(mapping)
    radial = any(spec.down_filter is not None and spec.down_filter.ndim == 2 for spec in plan.layers)
    facts = Facts(
        name=f"stylegan3-{synthesis.resolution}",
        architecture="stylegan3-r" if radial else "stylegan3-t",
        z_dim=mapping.z_dim,
        w_dim=mapping.w_dim,
        c_dim=mapping.c_dim,
        num_ws=synthesis.num_ws,
        resolution=synthesis.resolution,
        img_channels=synthesis.img_channels,
        source="nvidia",
        num_fp16_res=num_fp16_res,
        conv_clamp=synthesis.layers[0].conv_clamp,
    )
    return Parts(mapping, synthesis, facts, remarks)


# --- what a record states -----------------------------------------------------------------------------------------


def read_plan(record: Record) -> Plan:
    names = [name for name in children(record) if name != "input"]
    layers = [read_layer(name, child(record, name)) for name in names]
    rates = [number(child(record, name), "out_sampling_rate") for name in names]
    if not layers or not layers[-1].is_torgb or any(layer.is_torgb for layer in layers[:-1]):
        raise CheckpointError(f"expected layers that end with one that makes the picture; the file has: "
                              f"{named_list(names)}")
    if not any(layer.use_fp16 for layer in layers):
        # Trained in float32 throughout: the rule that the reference applies to its top four octaves.
        layers = [replace(spec, use_fp16=16 * rate > rates[-1]) for spec, rate in zip(layers, rates, strict=True)]
    source = child(record, "input")
    first = InputSpec(
        channels=weight_of(source, 2).shape[0],
        size=side(source, "size"),
        sampling_rate=number(source, "sampling_rate"),
        bandwidth=number(source, "bandwidth"),
    )
    sizes = [first.size] + [spec.out_size for spec in layers]
    for spec, size in zip(layers, sizes, strict=False):
        if spec.in_size != size or set(filtered_sizes(spec)) != {spec.out_size}:
            raise CheckpointError(f"layer {spec.name}: sizes, padding and filters do not fit: the file is damaged")
    w_dim = weight_of(child(source, "affine"), 2).shape[1]
    return Plan(w_dim, first, tuple(layers), number(record, "output_scale"))


def filtered_sizes(spec: LayerSpec) -> tuple[int, int]:
    """The width and height that a layer's padding, filters and factors lead to."""
    taps = sum(0 if f is None else f.shape[0] - 1 for f in (spec.up_filter, spec.down_filter))
    inserted = (spec.in_size + spec.kernel - 1) * spec.up - taps
    left, right, top, bottom = spec.padding
    return -(-(inserted + left + right) // spec.down), -(-(inserted + top + bottom) // spec.down)


def read_layer(name: str, record: Record) -> LayerSpec:
    n_out, n_in, kernel, _ = weight_of(record, 4).shape
    state = attributes(record)
    clamp, padding = state.get("conv_clamp"), state.get("padding")
    if not is_a(padding, list, tuple) or len(padding) != 4 or not all(is_a(p, int) for p in padding):
        raise CheckpointError(f"layer {name} has the padding {shown(padding)}; expected four integers")
    arrays = named_arrays(record)
    spec = LayerSpec(
        name=name,
        n_in=n_in,
        n_out=n_out,
        in_size=side(record, "in_size"),
        out_size=side(record, "out_size"),
        kernel=kernel,
        up=int(number(record, "up_factor")),
        down=int(number(record, "down_factor")),
        padding=(padding[0], padding[1], padding[2], padding[3]),
        up_filter=arrays.get("up_filter"),
        down_filter=arrays.get("down_filter"),
        is_torgb=plain(state.get("is_torgb")) is True,
        use_fp16=plain(state.get("use_fp16")) is True,
        conv_clamp=None if clamp is None else number(record, "conv_clamp"),
    )
    check_filters(spec)
    return spec


def check_filters(spec: LayerSpec) -> None:
    filters = spec.up_filter is not None or spec.down_filter is not None
    if spec.is_torgb and (filters or (spec.up, spec.down) != (1, 1)):
        raise CheckpointError(f"layer {spec.name} makes the picture and resamples; expected a plain convolution")
    if spec.up_filter is not None and spec.up_filter.ndim != 1:
        raise CheckpointError(f"layer {spec.name} has a {spec.up_filter.ndim}-D up filter; expected a separable one")
    down = spec.down_filter
    if down is not None and (down.ndim not in (1, 2) or len(set(down.shape)) != 1):
        raise CheckpointError(f"layer {spec.name} has a down filter of shape {down.shape}; expected (n,) or (n, n)")
    if max(spec.up, spec.down) > MAX_FACTOR:
        raise CheckpointError(f"layer {spec.name} resamples by {spec.up} and {spec.down}; at most {MAX_FACTOR} is sane")


def number(record: Record, name: str) -> float:
    """A positive attribute, whether a Python or a numpy number."""
    value = plain(attributes(record).get(name))
    if not is_a(value, int, float) or not 0 < value < math.inf:
        raise CheckpointError(f"{class_of(record)} states {name} = {shown(value)}; expected a positive number")
    return float(value)


def side(record: Record, name: str) -> int:
    """The side of a square size, stated as one integer or two equal ones."""
    stated = attributes(record).get(name)
    if isinstance(stated, np.ndarray) and stated.size <= 2:
        stated = stated.reshape(-1).tolist()
    sides = [plain(value) for value in stated] if is_a(stated, list, tuple) and len(stated) <= 2 else [plain(stated)]
    if not sides or not all(is_a(value, int) and 0 < value <= MAX_SIZE for value in sides):
        raise CheckpointError(f"{class_of(record)} states {name} = {shown(stated)}; expected the side of a square")
    if len(set(sides)) != 1:
        raise CheckpointError(f"the generator's pictures are not square ({name} is {sides[0]} x {sides[1]}); only "
                              "square ones are supported: use a generator that was trained on square pictures")
    return sides[0]


def weight_of(record: Record, rank: int) -> np.ndarray:
    weight = named_arrays(record).get("weight")
    if weight is None or weight.ndim != rank:
        raise CheckpointError(f"{class_of(record)} has no weight of {rank} dimensions: expected a StyleGAN3 layer")
    return weight


# --- what the paper's rules say -----------------------------------------------------------------------------------


def designed_plan(arrays: Dict[str, np.ndarray]) -> Plan:
    """The plan of NVIDIA's configuration T or R that the tensors' names, shapes and filters belong to."""
    found = sorted((int(m[1]), int(m[2]), int(m[3])) for name in arrays if (m := LAYER.fullmatch(name)))
    resolution, channels = found[-1][1:] if found else (0, 0)
    names = [f"L{i}_{size}_{width}" for i, size, width in found]
    weights = [arrays[f"synthesis.{name}.weight"] for name in names]
    if resolution < 16 or resolution > MAX_RESOLUTION or resolution & (resolution - 1):
        raise CheckpointError(f"the StyleGAN3 layers {named_list(names) or '(none)'} do not end with a picture of "
                              f"16, 32, ... or {MAX_RESOLUTION} px; {ADVICE}")
    if any(weight.ndim != 4 for weight in weights):
        raise CheckpointError("the weights of the StyleGAN3 layers are not all of four dimensions: the file is damaged")
    rules = design(resolution, config="R" if weights[0].shape[2] == 1 else "T", img_channels=channels,
                   w_dim=axis(arrays, "synthesis.input.affine.weight", 1, 2))
    layers = tuple(replace(spec, name=name, n_in=weight.shape[1], n_out=weight.shape[0])
                   for spec, name, weight in zip(rules.layers, names, weights, strict=False))
    for spec in layers:
        check_rules(spec, arrays)
    if [spec.out_size for spec in rules.layers] != [size for _, size, _ in found]:
        raise CheckpointError(f"the StyleGAN3 layers {named_list(names)} have other sizes than NVIDIA's configurations "
                              f"T and R at {resolution} px; {ADVICE}")
    first = replace(rules.input, channels=axis(arrays, "synthesis.input.weight", 0, 2))
    return replace(rules, input=first, layers=layers)


def check_rules(spec: LayerSpec, arrays: Dict[str, np.ndarray]) -> None:
    """The filters follow from cutoffs and margins: where they agree, so do sizes, paddings and factors."""
    for name in ("up_filter", "down_filter"):
        rule, found = getattr(spec, name), arrays.get(f"synthesis.{spec.name}.{name}")
        if rule is None or found is None:
            agree = rule is found
        else:
            agree = rule.shape == found.shape and np.allclose(rule, found, atol=1e-4)
        if not agree:
            raise CheckpointError(f"the {name} of layer {spec.name} is not that of NVIDIA's configurations T and R; "
                                  f"{ADVICE}")
