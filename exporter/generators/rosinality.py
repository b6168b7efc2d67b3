"""rosinality's stylegan2-pytorch: a dict of state_dicts, without any configuration -> Parts.

Its conventions look different and are equal in effect: the up-convolution's weight is stored unflipped, and the
factor 1/sqrt(fan_in) that it applies before the demodulation cancels there up to the epsilon.
"""

import re
from collections.abc import Mapping as Dict
from typing import Any

import numpy as np
import torch

from engine.errors import CheckpointError
from exporter.generators import Parts
from exporter.generators.state import stylegan2_parts

CENTRE_SAMPLES, CENTRE_SEED, CHUNK = 50_000, 0, 5_000
SUFFIXES = {
    "conv.weight": "weight",
    "conv.modulation.weight": "affine.weight",
    "conv.modulation.bias": "affine.bias",
    "noise.weight": "noise_strength",
    "activate.bias": "bias",
}
PICTURE_SUFFIXES = {key: SUFFIXES[key] for key in list(SUFFIXES)[:3]} | {"bias": "bias"}


def is_rosinality(content: object) -> bool:
    return isinstance(content, dict) and isinstance(content.get("g_ema"), dict)


def from_rosinality(content: Dict[str, Any]) -> Parts:
    """``content``: g_ema (state_dict), latent_avg (w,) or nothing; further entries are ignored."""
    state = content["g_ema"]
    if any(type(key) is not str for key in state):
        raise CheckpointError("g_ema has keys that are not text: it is no state_dict")
    if any({"iwt", "dwt"} & set(key.split(".")) for key in state):
        raise CheckpointError("this generator was trained with --arch swagan, which is not supported; use stylegan2")
    wrong = [key for key, value in state.items() if not isinstance(value, np.ndarray)]
    if wrong:
        raise CheckpointError(f"the entry {wrong[0]!r:.60} of g_ema is not a tensor")
    arrays: dict[str, np.ndarray] = {}
    unknown = []
    for key, value in state.items():
        renamed = rename(key)
        if renamed is None:
            unknown.append(key)
        elif renamed:
            arrays[renamed] = reshape(renamed, value)
    if unknown:
        raise CheckpointError(
            f"g_ema has the unknown tensor {unknown[0]!r:.80} (and {len(unknown) - 1} more): "
            f"expected the generator of rosinality/stylegan2-pytorch"
        )
    return finish(arrays, content.get("latent_avg"))


def finish(arrays: dict[str, np.ndarray], centre: Any) -> Parts:
    last = max((int(m[1]) for name in arrays if (m := re.fullmatch(r"mapping\.fc(\d+)\.bias", name))), default=-1)
    if last < 0:
        raise CheckpointError("g_ema has no mapping network (style.1.weight and so on)")
    if isinstance(centre, np.ndarray):
        return stylegan2_parts({**arrays, "mapping.w_avg": centre.reshape(-1)}, source="rosinality")
    if centre is not None:
        raise CheckpointError(f"latent_avg is a {type(centre).__name__}; expected a tensor of w_dim numbers")
    stand_in = np.zeros_like(arrays[f"mapping.fc{last}.bias"])
    parts = stylegan2_parts({**arrays, "mapping.w_avg": stand_in}, source="rosinality")
    centre = parts.mapping.get_buffer("w_avg")
    centre.copy_(sampled_centre(parts.mapping))
    return parts


def sampled_centre(mapping: Any) -> torch.Tensor:
    """The mean of w over many z, for files that do not store it."""
    rng = np.random.default_rng(CENTRE_SEED)
    total = torch.zeros(mapping.w_dim, dtype=torch.float64)
    with torch.no_grad():
        for _ in range(0, CENTRE_SAMPLES, CHUNK):
            z = torch.from_numpy(rng.standard_normal((CHUNK, mapping.z_dim), dtype=np.float32))
            total += mapping(z).sum(dim=0, dtype=torch.float64)
    return (total / CENTRE_SAMPLES).float()


def rename(key: str) -> str | None:
    """The NVIDIA-layout name, '' for what another entry says as well, None if the key is unknown."""
    if m := re.fullmatch(r"style\.([1-9]\d?)\.(weight|bias)", key):
        return f"mapping.fc{int(m[1]) - 1}.{m[2]}"
    if key == "input.input":
        return "synthesis.b4.const"
    if m := re.fullmatch(r"noises\.noise_(\d{1,2})", key):
        i = int(m[1])
        return f"synthesis.b{2 ** ((i + 5) // 2)}.conv{1 if i == 0 else (i + 1) % 2}.noise_const"
    if m := re.fullmatch(r"(?:conv1|convs\.(\d{1,2}))\.(.+)", key):
        j = -1 if m[1] is None else int(m[1])
        layer = "synthesis.b4.conv1" if j < 0 else f"synthesis.b{8 * 2 ** (j // 2)}.conv{j % 2}"
        return renamed_part(layer, m[2], SUFFIXES, "conv.blur.kernel")
    if m := re.fullmatch(r"(?:to_rgb1|to_rgbs\.(\d{1,2}))\.(.+)", key):
        block = "synthesis.b4" if m[1] is None else f"synthesis.b{8 * 2 ** int(m[1])}"
        if m[2] == "upsample.kernel":
            return f"{block}.resample_filter"
        return renamed_part(f"{block}.torgb", m[2], PICTURE_SUFFIXES, None)
    return None


def renamed_part(layer: str, part: str, suffixes: Dict[str, str], kernel: str | None) -> str | None:
    if kernel is not None and part == kernel:
        return f"{layer}.resample_filter"
    return f"{layer}.{suffixes[part]}" if part in suffixes else None


def reshape(name: str, value: np.ndarray) -> np.ndarray:
    """Drop the leading ones. The FIR kernels here carry the gain 4 of the upsampling."""
    if name.endswith("resample_filter"):
        return value / 4
    if name.endswith("noise_strength"):
        return value.reshape(()) if value.size == 1 else value
    if name.endswith("noise_const"):
        return value.reshape(value.shape[-2:]) if value.ndim == 4 and value.shape[:2] == (1, 1) else value
    if name.endswith("torgb.bias"):
        return value.reshape(-1)
    rank = {"const": 4, "weight": 5}.get(name.rpartition(".")[2])
    is_convolution = rank is not None and value.ndim == rank and value.shape[0] == 1
    return value[0] if is_convolution else value
