"""From named arrays in NVIDIA's layout to the StyleGAN2 modules: every width is read from a shape."""

import re
from collections.abc import Mapping as Dict

import numpy as np
import torch
from torch import nn

from engine.errors import CheckpointError
from exporter.generators import Facts, Parts
from exporter.generators.stylegan2 import Mapping, Synthesis, fir

SHOWN = 6  # names listed in an error


def named_list(names: list[str]) -> str:
    shown = ", ".join(sorted(names)[:SHOWN])
    return shown + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


def stylegan2_from_state(
    arrays: Dict[str, np.ndarray], *, lr_multiplier: float = 0.01, conv_clamp: float | None = None
) -> tuple[Mapping, Synthesis]:
    """``arrays``: ``mapping.fc0.weight``, ``synthesis.b8.conv0.affine.bias``, ... Resample filters may be absent."""
    mapping = build_mapping(arrays, lr_multiplier)
    synthesis = build_synthesis(arrays, mapping.w_dim, conv_clamp)
    load_strictly(nn.ModuleDict({"mapping": mapping, "synthesis": synthesis}), arrays)
    return mapping, synthesis


def axis(arrays: Dict[str, np.ndarray], name: str, dimension: int, rank: int) -> int:
    """The length of one dimension of a tensor that must be there."""
    if name not in arrays:
        raise CheckpointError(f"the generator lacks the tensor {name}; it has: {named_list(list(arrays)) or 'nothing'}")
    if arrays[name].ndim != rank or 0 in arrays[name].shape:
        raise CheckpointError(f"the tensor {name} has the shape {arrays[name].shape}; expected {rank} dimensions")
    return arrays[name].shape[dimension]


def build_mapping(arrays: Dict[str, np.ndarray], lr_multiplier: float) -> Mapping:
    w_dim = axis(arrays, "mapping.w_avg", 0, 1)
    c_dim = axis(arrays, "mapping.embed.weight", 1, 2) if "mapping.embed.weight" in arrays else 0
    z_dim = axis(arrays, "mapping.fc0.weight", 1, 2) - (w_dim if c_dim else 0)
    if z_dim <= 0:
        raise CheckpointError(f"the mapping has z_dim {z_dim}: a generator without a latent z is not supported")
    layers = 0
    while f"mapping.fc{layers}.weight" in arrays:
        layers += 1
    return Mapping(z_dim, w_dim, c_dim=c_dim, num_layers=layers, lr_multiplier=lr_multiplier)


def build_synthesis(arrays: Dict[str, np.ndarray], w_dim: int, conv_clamp: float | None) -> Synthesis:
    found = {int(m[1]) for name in arrays if (m := re.match(r"synthesis\.b(\d{1,5})\.", name))}
    resolutions = [4 * 2**i for i in range(len(found))]
    if len(found) < 2 or sorted(found) != resolutions:
        raise CheckpointError(f"the synthesis has the resolutions {sorted(found)}; expected 4, 8, 16 and so on")
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


def check_filter(name: str, kernel: np.ndarray) -> None:
    """The convolutions here pad for four taps and do not flip: other filters would give shifted pictures."""
    symmetric = kernel.shape == (4, 4) and all(np.allclose(kernel, np.flip(kernel, i), atol=1e-6) for i in (0, 1))
    if not symmetric or abs(float(kernel.sum()) - 1) > 1e-4:
        raise CheckpointError(
            f"the resampling filter {name} of shape {kernel.shape} is not supported; expected four symmetric taps "
            f"such as [1, 3, 3, 1], with sum one"
        )


def load_strictly(module: nn.Module, arrays: Dict[str, np.ndarray]) -> None:
    """Fill ``module``; every tensor must be there with its shape, and no other."""
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
        raise CheckpointError(f"the tensors of this file do not form a StyleGAN2 generator ({text})")
    broken = [name for name, array in arrays.items() if not np.isfinite(array).all()]
    if broken:
        raise CheckpointError(f"the generator holds NaN or infinite numbers in {named_list(broken)}")
    with torch.no_grad():
        for name, tensor in target.items():
            source = torch.from_numpy(np.array(arrays[name], dtype=np.float32)) if name in arrays else fir()
            tensor.copy_(source)


def stylegan2_parts(
    arrays: Dict[str, np.ndarray], *, source: str, lr_multiplier: float = 0.01, conv_clamp: float | None = None,
    num_fp16_res: int = 0,
) -> Parts:
    """Modules and facts in one go, ready for use."""
    mapping, synthesis = stylegan2_from_state(arrays, lr_multiplier=lr_multiplier, conv_clamp=conv_clamp)
    for module in (mapping, synthesis):
        module.eval().requires_grad_(False)
    facts = Facts(
        name=f"stylegan2-{synthesis.resolution}", architecture=f"stylegan2-{synthesis.architecture}",
        z_dim=mapping.z_dim, w_dim=mapping.w_dim, c_dim=mapping.c_dim, num_ws=synthesis.num_ws,
        resolution=synthesis.resolution, img_channels=synthesis.img_channels, source=source,
        num_fp16_res=num_fp16_res, conv_clamp=conv_clamp,
    )
    return Parts(mapping, synthesis, facts)
