"""The synthesis in torch: eager, with grouped convolutions, and compiled."""

import copy
import io

import torch
from numpy import ndarray as Array
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.peers.torch_field import LogP, check_compiler
from benchmarks.worlds import parts, random_mapping
from engine.bench.contest import Unavailable
from engine.bench.problem import Problem
from engine.bundle import Bundle
from engine.pictures import to_image
from exporter.generators.stylegan2 import SQRT2, Synthesis, SynthesisLayer, blur


class Grouped(nn.Module):
    """A synthesis layer as it is usually written: one weight for each row, in one convolution with groups.

    Karras et al., CVPR 2020, section 2.2 and appendix B: modulate, demodulate, convolve.
    """

    def __init__(self, layer: SynthesisLayer):
        super().__init__()
        self.layer, self.use_noise, self.noise_const = layer, layer.use_noise, layer.noise_const

    def forward(self, x: Tensor, w: Tensor, noise: Tensor | None = None) -> Tensor:
        layer, rows = self.layer, len(w)
        weight = layer.weight[None] * layer.affine(w)[:, None, :, None, None]
        weight = weight * (weight.square().sum(dim=(2, 3, 4), keepdim=True) + 1e-8).rsqrt()
        out, inp = weight.shape[1:3]
        x = x.expand(rows, -1, -1, -1).reshape(1, rows * inp, *x.shape[2:])
        if layer.up:
            weight = weight.transpose(1, 2).reshape(rows * inp, out, 3, 3)
            x = F.conv_transpose2d(x, weight, stride=2, groups=rows)
            x = blur(x.reshape(rows, out, *x.shape[2:]), 4 * layer.resample_filter, padding=1)
        else:
            x = F.conv2d(x, weight.reshape(rows * out, inp, 3, 3), padding=1, groups=rows)
            x = x.reshape(rows, out, *x.shape[2:])
        if noise is not None:
            x = x + noise * layer.noise_strength
        return F.leaky_relu(x + layer.bias[:, None, None], 0.2) * SQRT2


def grouped(synthesis: Synthesis) -> Synthesis:
    synthesis = copy.deepcopy(synthesis)
    for block in synthesis.blocks:
        for name in ("conv0", "conv1"):
            if hasattr(block, name):
                setattr(block, name, Grouped(getattr(block, name)))
    return synthesis


def random_synthesis(bundle: Bundle) -> Synthesis:
    """The network that a bundle of benchmarks/worlds.py was exported from."""
    if not bundle.path.stem.startswith("ffhq-"):
        raise Unavailable(f"the checkpoint of {bundle.path.stem} is not at hand, only its bundle")
    return parts(random_mapping(bundle.generator.z_dim)[0], bundle.generator.resolution).synthesis


def open_decoder(bundle: Bundle, name: str):
    """ws (rows, num_ws, w_dim) -> images (rows, 3, R, R)."""
    synthesis = random_synthesis(bundle)
    forward = grouped(synthesis) if name.endswith("grouped convolutions") else synthesis
    if name == "torch.compile":
        check_compiler()
        forward = torch.compile(synthesis, dynamic=False)

    def draw(ws: Array) -> Array:
        with torch.inference_mode():
            return forward(torch.from_numpy(ws)).numpy()

    return draw


def open_png(problem: Problem):
    """z (1, z_dim) -> the bytes of a PNG, all in eager torch."""
    synthesis, logp, num_ws = random_synthesis(problem.bundle), LogP(problem), problem.bundle.generator.num_ws

    def draw(z: Array) -> bytes:
        with torch.inference_mode():
            image = synthesis(logp.w(torch.from_numpy(z))[:, None].repeat(1, num_ws, 1))[0]
            pixels = (image * 127.5 + 128).clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy()
        file = io.BytesIO()
        to_image(pixels).save(file, "PNG")
        return file.getvalue()

    return draw
