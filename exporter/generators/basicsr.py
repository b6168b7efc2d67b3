"""BasicSR's StyleGAN2Generator, and the one inside GFPGAN: rosinality's network under other names -> Parts.

The `clean` networks of GFPGAN 1.2 and later look alike and are another network: they resample without the FIR.
"""

import re
from collections.abc import Mapping as Dict
from typing import Any

import numpy as np

from engine.errors import CheckpointError
from exporter.generators import Parts, rosinality

INSIDE_GFPGAN = ("the file is a face restorer (GFPGAN); the StyleGAN2 inside it was taken, which makes faces of its "
                 "own and restores none")


def from_state(state: Dict[str, np.ndarray], centre: Any = None, remarks: tuple[str, ...] = ()) -> Parts:
    """``state``: ``style_mlp.1.weight``, ``constant_input.weight``, ``style_conv1.modulated_conv.weight``, ..."""
    if "style_conv1.bias" in state:
        raise CheckpointError(
            "this is a 'clean' StyleGAN2 of GFPGAN, which resamples in another way than StyleGAN2: it is not "
            "supported; use the weights of GFPGAN version 1, or the StyleGAN2 that it was trained from"
        )
    return rosinality.from_state({rename(key): value for key, value in state.items()}, centre, remarks,
                                 source="basicsr")


def rename(key: str) -> str:
    """The name that rosinality gives the tensor; a key that is unknown here stays, and is reported there."""
    if key == "constant_input.weight":
        return "input.input"
    if m := re.fullmatch(r"style_mlp\.(\d{1,2})\.(weight|bias)", key):
        return f"style.{m[1]}.{m[2]}"
    if m := re.fullmatch(r"noises\.noise(\d{1,2})", key):
        return f"noises.noise_{m[1]}"
    if m := re.fullmatch(r"style_(conv1|convs\.\d{1,2})\.(.+)", key):
        # The bare weight of a layer scales its noise.
        return f"{m[1]}.{'noise.weight' if m[2] == 'weight' else m[2].replace('modulated_conv.', 'conv.')}"
    if m := re.fullmatch(r"(to_rgb1|to_rgbs\.\d{1,2})\.(.+)", key):
        return f"{m[1]}.{m[2].replace('modulated_conv.', 'conv.')}"
    return key
