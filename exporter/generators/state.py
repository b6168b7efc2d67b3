"""From named arrays in NVIDIA's layout to the StyleGAN2 modules: every width is read from a shape.

Modules are built without memory first and compared with the arrays: names and shapes of a file may announce a network
of any size, and only what the file holds may cost anything.
"""

import re
from collections.abc import Callable
from collections.abc import Mapping as Dict
from typing import TypeVar

import numpy as np
import torch
from torch import nn

from engine.errors import CheckpointError
from exporter.generators import Facts, Parts
from exporter.generators.stylegan2 import Mapping, Synthesis, fir

M = TypeVar("M", bound=nn.Module)
SHOWN, SHOWN_LETTERS = 6, 80  # names listed in an error, and how much of each
MAX_RESOLUTION = 4096
# The centre of truncation of files that do not store it: the mean of w over so many z.
CENTRE_SAMPLES, CENTRE_SEED, CENTRE_WORK = 50_000, 0, 2 * 10**11
ESTIMATED = ("the file does not say where the centre of truncation is: it was estimated as the mean of w over "
             "{samples:,} samples, and truncated pictures agree with the original's as well as that does")


def named_list(names: list[str]) -> str:
    shown = ", ".join(name if len(name) <= SHOWN_LETTERS else f"{name[:SHOWN_LETTERS]}..."
                      for name in sorted(names)[:SHOWN])
    return shown + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


def stylegan2_from_state(
    arrays: Dict[str, np.ndarray], *, lr_multiplier: float = 0.01, conv_clamp: float | None = None
) -> tuple[Mapping, Synthesis]:
    """``arrays``: ``mapping.fc0.weight``, ``synthesis.b8.conv0.affine.bias``, ... Resample filters may be absent."""
    def build() -> nn.ModuleDict:
        mapping = build_mapping(arrays, lr_multiplier)
        return nn.ModuleDict({"mapping": mapping, "synthesis": build_synthesis(arrays, mapping.w_dim, conv_clamp)})

    found = load_strictly(build, arrays, "StyleGAN2")
    return found["mapping"], found["synthesis"]  # type: ignore[return-value]


def axis(arrays: Dict[str, np.ndarray], name: str, dimension: int, rank: int) -> int:
    """The length of one dimension of a tensor that must be there."""
    if name not in arrays:
        raise CheckpointError(f"the generator lacks the tensor {name}; it has: {named_list(list(arrays)) or 'nothing'}")
    if arrays[name].ndim != rank or 0 in arrays[name].shape:
        raise CheckpointError(f"the tensor {name} has the shape {arrays[name].shape}; expected {rank} dimensions")
    return arrays[name].shape[dimension]


def build_mapping(arrays: Dict[str, np.ndarray], lr_multiplier: float) -> Mapping:
    layers = 0
    while f"mapping.fc{layers}.weight" in arrays:
        layers += 1
    if not layers:
        raise CheckpointError(
            f"the generator has no mapping network (mapping.fc0.weight); it has: "
            f"{named_list(list(arrays)) or 'nothing'}"
        )
    w_dim = axis(arrays, "mapping.w_avg", 0, 1)
    c_dim, embedded = 0, 0
    if "mapping.embed.weight" in arrays:
        embedded, c_dim = (axis(arrays, "mapping.embed.weight", i, 2) for i in (0, 1))
    z_dim = axis(arrays, "mapping.fc0.weight", 1, 2) - embedded
    if z_dim <= 0:
        raise CheckpointError(f"the mapping has z_dim {z_dim}: a generator without a latent z is not supported")
    hidden = axis(arrays, "mapping.fc0.weight", 0, 2) if layers > 1 else w_dim
    if max(hidden, embedded) > w_dim:
        raise CheckpointError(
            f"the mapping has layers of {hidden} numbers and embeddings of {embedded}, wider than w with its {w_dim} "
            f"(layer_features, embed_features): that is not supported; narrower ones are"
        )
    return Mapping(z_dim, w_dim, c_dim=c_dim, num_layers=layers, lr_multiplier=lr_multiplier, hidden=hidden,
                   embedded=embedded)


def build_synthesis(arrays: Dict[str, np.ndarray], w_dim: int, conv_clamp: float | None) -> Synthesis:
    check_square(arrays)
    found = {int(m[1]) for name in arrays if (m := re.match(r"synthesis\.b(\d{1,5})\.", name))}
    resolutions = [4 * 2**i for i in range(len(found))]
    if len(found) < 2 or sorted(found) != resolutions:
        raise CheckpointError(f"the synthesis has the resolutions {sorted(found)[:20]}; expected 4, 8, 16 and so on")
    if resolutions[-1] > MAX_RESOLUTION:
        raise CheckpointError(f"the synthesis makes {resolutions[-1]} px; at most {MAX_RESOLUTION} are supported")
    channels = {r: axis(arrays, f"synthesis.b{r}.conv1.weight", 0, 4) for r in resolutions}
    if "synthesis.b8.skip.weight" in arrays:
        architecture = "resnet"
    else:
        architecture = "skip" if "synthesis.b4.torgb.weight" in arrays else "orig"
    return Synthesis(
        w_dim, channels, img_channels=axis(arrays, f"synthesis.b{resolutions[-1]}.torgb.weight", 0, 4),
        architecture=architecture, use_noise=any(name.endswith(".noise_const") for name in arrays),
        conv_clamp=conv_clamp,
    )


def check_square(arrays: Dict[str, np.ndarray]) -> None:
    """StyleGAN-Human's pictures, for one, are 1024 x 512: their constant is 8 x 4 or 4 x 2."""
    const = arrays.get("synthesis.b4.const")
    if const is not None and const.ndim == 3 and const.shape[1] != const.shape[2]:
        _, height, width = const.shape
        raise CheckpointError(
            f"the generator's pictures are not square (it starts from {height} x {width}); only square ones are "
            f"supported: use a generator that was trained on square pictures"
        )


def check_filter(name: str, kernel: np.ndarray) -> None:
    """The convolutions here pad for four taps and do not flip: other filters would give shifted pictures."""
    symmetric = kernel.shape == (4, 4) and all(np.allclose(kernel, np.flip(kernel, i), atol=1e-6) for i in (0, 1))
    if not symmetric or abs(float(kernel.sum()) - 1) > 1e-4:
        raise CheckpointError(
            f"the resampling filter {name} of shape {kernel.shape} is not supported; expected four symmetric taps "
            f"such as [1, 3, 3, 1], with sum one"
        )


def load_strictly(build: Callable[[], M], arrays: Dict[str, np.ndarray], family: str) -> M:
    """The module that ``build`` makes, filled; every tensor must be there with its shape, and no other."""
    with torch.device("meta"):
        module = build()
    target = module.state_dict()
    filters = {name for name in target if name.endswith("resample_filter")}
    missing = [name for name in target if name not in arrays and name not in filters]
    unexpected = [name for name in arrays if name not in target]
    for name in filters & set(arrays):
        check_filter(name, arrays[name])
    misshapen = [f"{n} {arrays[n].shape} instead of {tuple(t.shape)}" for n, t in target.items()
                 if n in arrays and arrays[n].shape != tuple(t.shape)]
    problems = {"missing": missing, "unexpected": unexpected, "of another shape": misshapen}
    if any(problems.values()):
        text = "; ".join(f"{kind}: {named_list(names)}" for kind, names in problems.items() if names)
        raise CheckpointError(f"the tensors of this file do not form a {family} generator ({text})")
    check_finite(arrays)
    tensors = {name: torch.from_numpy(np.array(arrays[name], dtype=np.float32, order="C")) if name in arrays else fir()
               for name in target}
    module.load_state_dict(tensors, assign=True)
    return module.eval().requires_grad_(False)


def check_finite(arrays: Dict[str, np.ndarray]) -> None:
    broken = [name for name, array in arrays.items() if not np.isfinite(array).all()]
    if broken:
        raise CheckpointError(f"the generator holds NaN or infinite numbers in {named_list(broken)}")


def with_centre(arrays: Dict[str, np.ndarray]) -> tuple[Dict[str, np.ndarray], bool]:
    """The arrays with a stand-in for ``mapping.w_avg`` where the file lacks it, and whether it does."""
    numbers = [int(m[1]) for name in arrays if (m := re.fullmatch(r"mapping\.fc(\d{1,3})\.bias", name))]
    if "mapping.w_avg" in arrays or not numbers:
        return arrays, False
    stand_in = np.zeros_like(arrays[f"mapping.fc{max(numbers)}.bias"], dtype=np.float32)
    return {**arrays, "mapping.w_avg": stand_in}, True


@torch.no_grad()
def estimate_centre(mapping: Mapping) -> tuple[str, ...]:
    """Put the mean of many w into ``w_avg``; returns the remark that says so."""
    centre, samples = sampled_centre(mapping)
    mapping.w_avg.copy_(centre)
    return (ESTIMATED.format(samples=samples),)


@torch.no_grad()
def sampled_centre(mapping: Mapping) -> tuple[torch.Tensor, int]:
    """The mean of w (w_dim,) over many z, all labels alike, and of how many. Huge networks get fewer samples."""
    rng = np.random.default_rng(CENTRE_SEED)
    weights = sum(layer.weight.numel() for layer in mapping.layers)
    widest = max(max(layer.weight.shape) for layer in mapping.layers)
    samples = max(1, min(CENTRE_SAMPLES, CENTRE_WORK // weights))
    chunk = max(1, min(5_000, 2**24 // widest))
    total = torch.zeros(mapping.w_dim, dtype=torch.float64)
    for start in range(0, samples, chunk):
        rows = min(chunk, samples - start)
        z = torch.from_numpy(rng.standard_normal((rows, mapping.z_dim), dtype=np.float32))
        label = torch.arange(start, start + rows) % mapping.c_dim if mapping.c_dim else None
        total += mapping(z, label).sum(dim=0, dtype=torch.float64)
    return (total / samples).float(), samples


def stylegan2_parts(
    arrays: Dict[str, np.ndarray], *, source: str, lr_multiplier: float = 0.01, conv_clamp: float | None = None,
    num_fp16_res: int = 0, remarks: tuple[str, ...] = (),
) -> Parts:
    """Modules and facts in one go, ready for use. A centre of truncation that is missing is estimated."""
    arrays, is_open = with_centre(arrays)
    mapping, synthesis = stylegan2_from_state(arrays, lr_multiplier=lr_multiplier, conv_clamp=conv_clamp)
    estimated = estimate_centre(mapping) if is_open else ()
    facts = Facts(
        name=f"stylegan2-{synthesis.resolution}", architecture=f"stylegan2-{synthesis.architecture}",
        z_dim=mapping.z_dim, w_dim=mapping.w_dim, c_dim=mapping.c_dim, num_ws=synthesis.num_ws,
        resolution=synthesis.resolution, img_channels=synthesis.img_channels, source=source,
        num_fp16_res=num_fp16_res, conv_clamp=conv_clamp,
    )
    return Parts(mapping, synthesis, facts, (*remarks, *estimated))
