"""Legacy TensorFlow pickles of StyleGAN2 and StyleGAN2-ADA: the tuple (G, D, Gs) -> Parts.

Conversions: dense and modulation weights are transposed, convolutions go from HWIO to OIHW, the up-convolution is
flipped in space, and a modulation's bias lacks its one.
"""

import re
from collections.abc import Mapping as Dict
from typing import Any

import numpy as np

from engine.errors import CheckpointError
from exporter.generators import Parts
from exporter.generators.records import plain
from exporter.generators.state import named_list, stylegan2_parts
from exporter.passive import Network, is_a, shown

# Options that act in training only, or that the shapes of the variables say better.
NO_EFFECT = """
    func_name mapping_func synthesis_func truncation_psi truncation_cutoff truncation_psi_val truncation_cutoff_val
    dlatent_avg_beta style_mixing_prob is_training is_validation is_template_graph return_dlatents randomize_noise
    dtype structure impl gpu_impl fused_modconv latent_size label_size dlatent_size resolution num_channels
    mapping_layers mapping_fmaps label_fmaps fmap_base fmap_min fmap_max fmap_decay fmap_const use_noise
    force_clean_graph minibatch_size resolution_w resolution_h
""".split()  # noqa: SIM905
# Options with one supported value, and its default.
FIXED = {
    "mapping_nonlinearity": "lrelu", "nonlinearity": "lrelu", "normalize_latents": True, "dlatent_broadcast": None,
}
USED = ("mapping_lrmul", "conv_clamp", "num_fp16_res", "architecture", "resample_kernel")
# Options that only StyleGAN1 and the configurations A-D of StyleGAN2 have.
OLDER = """
    use_styles use_pixel_norm use_instance_norm const_input_layer fused_scale blur_filter use_wscale
    mapping_use_wscale
""".split()  # noqa: SIM905
MAX_NETWORKS, MAX_TAPS = 8, 16


def is_tensorflow(content: Any) -> bool:
    networks = content if is_a(content, tuple) else (content,)
    return bool(networks) and all(is_a(part, Network) for part in networks)


def from_tensorflow(content: Any) -> Parts:
    """``content``: (G, D, Gs), where Gs is the averaged generator, or Gs alone."""
    if isinstance(content, tuple) and len(content) not in (1, 3):
        raise CheckpointError(f"the file holds {len(content)} TensorFlow networks; expected (G, D, Gs), or Gs alone")
    network: Network = content[-1] if isinstance(content, tuple) else content
    state = network.state
    version = state.get("version")
    if not is_a(version, int) or version < 4:
        raise CheckpointError(
            f"the TensorFlow network has the format version {shown(version)}; expected 4 or more (StyleGAN2). "
            f"StyleGAN1 and ProGAN are not supported"
        )
    options = state.get("static_kwargs")
    if not isinstance(options, dict):
        raise CheckpointError("the TensorFlow network has no static_kwargs: the file is damaged")
    check_options(options)
    arrays = convert(collect(network))
    taps = options.get("resample_kernel")
    arrays.update(filters(arrays, [1, 3, 3, 1] if taps is None else taps))
    clamp = options.get("conv_clamp")
    parts = stylegan2_parts(
        arrays,
        source="tensorflow",
        lr_multiplier=number(options.get("mapping_lrmul", 0.01), "mapping_lrmul"),
        conv_clamp=None if clamp is None else number(clamp, "conv_clamp"),
        num_fp16_res=int(number(options.get("num_fp16_res") or 0, "num_fp16_res")),
    )
    stated = options.get("architecture", "skip")
    if not is_a(stated, str) or parts.facts.architecture != f"stylegan2-{stated}":
        raise CheckpointError(
            f"the file calls its architecture {shown(stated)}, its variables are {parts.facts.architecture}"
        )
    return parts


def number(value: Any, name: str) -> float:
    value = plain(value)
    if not is_a(value, int, float, bool) or not 0 <= value < np.inf:
        raise CheckpointError(f"the option {name} is {shown(value)}; expected a number of at least 0")
    return float(value)


def check_options(options: dict) -> None:
    names = [str(name) for name in options]
    older = [name for name in names if name in OLDER]
    if older:
        raise CheckpointError(
            f"the TensorFlow network has the options {named_list(older)} of StyleGAN1 or of a configuration A-D of "
            "StyleGAN2, which are not supported; use a network of configuration E or F, or of StyleGAN2-ADA"
        )
    unknown = [name for name in names if name not in NO_EFFECT and name not in FIXED and name not in USED]
    if unknown:
        raise CheckpointError(
            f"the TensorFlow network has options that are unknown here: {named_list(unknown)}. They may change its "
            "pictures, so the file was refused"
        )
    for name, value in FIXED.items():
        found = plain(options.get(name, value))
        if value is not None and (not is_a(found, str, bool, int) or found != value):
            raise CheckpointError(f"the option {name} is {shown(found)}; only {value!r} is supported")
    check_sides(options)


def check_sides(options: dict) -> None:
    """Some forks state width and height as well; pictures that are not square are another network."""
    sides = {name: plain(options[name]) for name in ("resolution", "resolution_h", "resolution_w")
             if options.get(name) is not None}
    if not all(is_a(side, int) for side in sides.values()):
        raise CheckpointError(f"the options {', '.join(sides)} are not all whole numbers: the file is damaged")
    if len(set(sides.values())) > 1:
        stated = ", ".join(f"{name} {side}" for name, side in sides.items())
        raise CheckpointError(f"the generator's pictures are not square ({stated}); only square ones are supported: "
                              "use a generator that was trained on square pictures")


def filters(arrays: Dict[str, np.ndarray], taps: object) -> dict[str, np.ndarray]:
    """The FIR of every block, conv0 and skip; checked when loaded."""
    if isinstance(taps, np.ndarray):
        taps = taps.reshape(-1)[:MAX_TAPS].tolist()
    if not is_a(taps, list, tuple) or not 0 < len(taps) <= MAX_TAPS:  # type: ignore[arg-type]
        raise CheckpointError(f"the option resample_kernel is {shown(taps)}; expected taps such as [1, 3, 3, 1]")
    f = np.array([number(tap, "resample_kernel") for tap in taps])  # type: ignore[union-attr]
    if not f.sum():
        raise CheckpointError("the option resample_kernel has the sum 0; expected taps such as [1, 3, 3, 1]")
    kernel = np.outer(f, f) / f.sum() ** 2
    owners = {m[1] for name in arrays if (m := re.match(r"(synthesis\.b\d+\.(?:conv[01]\.|skip\.)?)", name))}
    return {f"{owner}resample_filter": kernel for owner in owners}


def collect(network: Network) -> dict[str, np.ndarray]:
    """All variables, by name, with the names of the components in front."""
    found: dict[str, np.ndarray] = {}
    waiting, seen = [("", network)], {id(network)}
    while waiting:
        prefix, current = waiting.pop()
        variables, components = current.state.get("variables"), current.state.get("components")
        if not is_a(variables, list) or not is_a(components, dict):
            raise CheckpointError("the TensorFlow network has no variables or components: the file is damaged")
        for item in variables:
            is_pair = is_a(item, tuple) and len(item) == 2 and is_a(item[0], str)
            if not is_pair or not isinstance(item[1], (np.ndarray, np.generic)):
                raise CheckpointError("the TensorFlow network has a variable that is not a (name, array) pair")
            found[f"{prefix}{item[0][:200]}"] = np.asarray(item[1])
        for name, component in components.items():
            if not is_a(component, Network):
                raise CheckpointError(f"the component {shown(name)} is {shown(component)}, not a network")
            # A generator has two. One network in two places could be unfolded without end.
            if id(component) in seen or len(seen) >= MAX_NETWORKS:
                raise CheckpointError("the TensorFlow network is made of more components than a generator has; it was "
                                      "refused")
            seen.add(id(component))
            waiting.append((f"{prefix}{str(name)[:200]}/", component))
    return found


def convert(variables: Dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    if any(name.startswith("mapping/LabelConcat/") for name in variables):
        raise CheckpointError(
            "this conditional generator normalises z and the label's embedding together (the original StyleGAN2 in "
            "TensorFlow), which is not supported; StyleGAN2-ADA generators with labels are"
        )
    resolutions = [int(m[1]) for name in variables if (m := re.match(r"synthesis/(\d+)x\1/", name))]
    if not resolutions:
        raise CheckpointError(f"the TensorFlow network has no synthesis/4x4/...; it has: {named_list(list(variables))}")
    arrays, unknown = {}, []
    for name, value in variables.items():
        renamed = rename(name, max(resolutions))
        if renamed is None:
            unknown.append(name)
        elif renamed:
            arrays[renamed] = transform(name, renamed, value)
    if unknown:
        raise CheckpointError(f"the TensorFlow network has variables that are unknown here: {named_list(unknown)}")
    return arrays


LEAVES = {"weight": "weight", "bias": "bias", "mod_weight": "affine.weight", "mod_bias": "affine.bias",
          "noise_strength": "noise_strength"}


def rename(name: str, resolution: int) -> str | None:
    """The NVIDIA-layout name, '' for what is of no use, None if unknown."""
    if name == "dlatent_avg":
        return "mapping.w_avg"
    if name in ("lod", "synthesis/lod"):
        return ""
    if m := re.fullmatch(r"mapping/(?:Dense(\d{1,2})|LabelEmbed)/(weight|bias)", name):
        return f"mapping.{'embed' if m[1] is None else f'fc{int(m[1])}'}.{m[2]}"
    if m := re.fullmatch(r"synthesis/noise(\d{1,2})", name):
        k = int(m[1])
        return f"synthesis.b{2 ** ((k + 5) // 2)}.conv{1 if k == 0 else (k + 1) % 2}.noise_const"
    if name == "synthesis/4x4/Const/const":
        return "synthesis.b4.const"
    # The `orig` architecture may number its picture layers by level of detail; 0 is the full picture.
    if m := re.fullmatch(r"synthesis/ToRGB_lod(\d)/(\w+)", name):
        if m[1] != "0":
            return ""
        return f"synthesis.b{resolution}.torgb.{LEAVES[m[2]]}" if m[2] in LEAVES else None
    if m := re.fullmatch(r"synthesis/(\d{1,4})x\1/(Conv|Conv0_up|Conv1|Skip|ToRGB)/(\w+)", name):
        part = {"Conv": "conv1", "Conv0_up": "conv0"}.get(m[2], m[2].lower())
        return f"synthesis.b{int(m[1])}.{part}.{LEAVES[m[3]]}" if m[3] in LEAVES else None
    return None


def transform(name: str, renamed: str, value: np.ndarray) -> np.ndarray:
    leaf: Any = name.rpartition("/")[2]
    if leaf == "const" and value.ndim == 4:
        return value[0]
    if renamed.endswith("noise_const") and value.ndim == 4:
        return value[0, 0]
    if leaf == "mod_bias":
        return value + 1
    if leaf in ("weight", "mod_weight"):
        if value.ndim == 4:
            flipped = value[::-1, ::-1] if "/Conv0_up/" in name or "/Skip/" in name else value
            return flipped.transpose(3, 2, 0, 1)
        return value.T
    return value.reshape(()) if leaf == "noise_strength" and value.size == 1 else value
