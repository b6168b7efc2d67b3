"""Generators as torch modules, and the converters that read them from checkpoints."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known of a generator without its weights.

    architecture   'stylegan2-skip', 'stylegan2-resnet', 'stylegan2-orig', 'stylegan3-t', 'stylegan3-r', or 'plain'
    source         the kind of file: 'nvidia', 'tensorflow', 'rosinality', 'basicsr', 'lace-train', 'onnx' or 'torch'
    num_fp16_res   how many of the highest resolutions were trained in float16
    conv_clamp     the bound on activations that the network was trained with, None without
    normalise      whether the mapping scales z to unit mean square first
    truncation     the default psi
    """

    name: str
    architecture: str
    z_dim: int
    w_dim: int
    c_dim: int
    num_ws: int
    resolution: int
    img_channels: int
    source: str
    num_fp16_res: int = 0
    conv_clamp: float | None = None
    normalise: bool = True
    truncation: float = 0.7


@dataclass(frozen=True, slots=True)
class Parts:
    """A generator taken apart: mapping (z -> w) and synthesis (ws -> picture), in evaluation mode.

    ``remarks``: sentences for the user on what the file did not say and what was left out.
    """

    mapping: "nn.Module"
    synthesis: "nn.Module"
    facts: Facts
    remarks: tuple[str, ...] = ()
