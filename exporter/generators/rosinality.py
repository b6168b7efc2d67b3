"""rosinality's stylegan2-pytorch: a state_dict, without any configuration -> Parts.

Its conventions look different and are equal in effect: the up-convolution's weight is stored unflipped, and the
factor 1/sqrt(fan_in) that it applies before the demodulation cancels there up to the epsilon.
"""

import re
from collections.abc import Mapping as Dict
from typing import Any

import numpy as np

from engine.errors import CheckpointError
from exporter.generators import Parts
from exporter.generators.state import named_list, stylegan2_parts
from exporter.passive import is_a, shown

SUFFIXES = {
    "conv.weight": "weight",
    "conv.modulation.weight": "affine.weight",
    "conv.modulation.bias": "affine.bias",
    "noise.weight": "noise_strength",
    "activate.bias": "bias",
}
PICTURE_SUFFIXES = {key: SUFFIXES[key] for key in list(SUFFIXES)[:3]} | {"bias": "bias"}


def from_state(
    state: Dict[str, np.ndarray], centre: Any = None, remarks: tuple[str, ...] = (), *, source: str = "rosinality"
) -> Parts:
    """``state``: ``style.1.weight``, ``input.input``, ...;  ``centre``: latent_avg (w,) or (n, w), None without."""
    if any({"iwt", "dwt"} & set(key.split(".")) for key in state):
        raise CheckpointError("this generator was trained with --arch swagan, which is not supported; use stylegan2")
    renamed = {key: rename(key) for key in state}
    unknown = [key for key, name in renamed.items() if name is None]
    if unknown:
        raise CheckpointError(
            f"the generator has tensors that are unknown here: {named_list(unknown)}; expected those of "
            f"rosinality/stylegan2-pytorch"
        )
    arrays = {name: reshape(name, state[key]) for key, name in renamed.items() if name}
    if centre is not None:
        arrays["mapping.w_avg"], remark = read_centre(centre)
        remarks += remark
    return stylegan2_parts(arrays, source=source, remarks=remarks)


def read_centre(centre: Any) -> tuple[np.ndarray, tuple[str, ...]]:
    """latent_avg as (w,). Encoders store it once for each style layer; a remark where these differ."""
    if not is_a(centre, np.ndarray):
        raise CheckpointError(f"latent_avg is {shown(centre)}; expected a tensor of w_dim numbers")
    if not (centre.ndim in (1, 2) and centre.size):
        raise CheckpointError(f"latent_avg has the shape {centre.shape}; expected (w_dim,), or a row for each layer")
    rows = centre.reshape(-1, centre.shape[-1]).astype(np.float64)
    if np.ptp(rows, axis=0).max() <= 1e-5 * np.abs(rows).max():
        return rows[0], ()
    return rows.mean(axis=0), ("latent_avg differs from layer to layer: the centre of truncation is its mean",)


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
