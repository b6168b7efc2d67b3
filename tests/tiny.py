"""Tiny generators and heads as torch modules, for the tests of the exporter."""

import itertools

import numpy as np
import torch

from exporter.generators import Facts, Parts
from exporter.generators.stylegan2 import Mapping, Synthesis
from exporter.heads import HeadAttribute, HeadStack


def parts(*, dim: int = 16, resolution: int = 8, labels: int = 0, layers: int = 3, noise: float = 0.2, width: int = 8,
          architecture: str = "skip", seed: int = 0) -> Parts:
    """A StyleGAN2 with random weights, biases and, except in its first layer, noise."""
    torch.manual_seed(seed)
    mapping = Mapping(dim, dim, c_dim=labels, num_layers=layers).eval().requires_grad_(False)
    mapping.w_avg.normal_(0, 0.1)
    for layer in mapping.layers:
        layer.bias.normal_(0, 10)
    channels = {2**k: width for k in range(2, resolution.bit_length())}
    synthesis = Synthesis(dim, channels, architecture=architecture).eval().requires_grad_(False)
    for i, layer in enumerate(synthesis.layers):
        layer.noise_strength.fill_(noise if i else 0.0)
        layer.bias.normal_(0, 0.1)
    facts = Facts("tiny", f"stylegan2-{architecture}", dim, dim, labels, synthesis.num_ws, resolution, 3, "lace-train")
    return Parts(mapping, synthesis, facts)


def stack(name: str, kinds: dict[str, int], *, dim: int = 16, hidden: tuple[int, ...] = (12, 10), space: str = "w",
          seed: int = 0) -> HeadStack:
    """A random stack; ``kinds`` says the number of logits of each attribute, 1 for a value."""
    rng = np.random.default_rng(seed + len(name))
    sizes = [dim, *hidden, sum(kinds.values())]
    layers = tuple(
        (rng.standard_normal((n_out, n_in)).astype(np.float32) * np.sqrt(2 / n_in).astype(np.float32),
         rng.standard_normal(n_out).astype(np.float32) * np.float32(0.3))
        for n_in, n_out in itertools.pairwise(sizes)
    )
    attributes, first = [], 0
    for attribute, logits in kinds.items():
        classes = tuple(f"c{i}" for i in range(logits)) if logits > 1 else ()
        kind = "class" if classes else "value"
        attributes.append(HeadAttribute(attribute, kind, classes, (first, first + logits)))
        first += logits
    return HeadStack(name, space, layers, tuple(attributes))


def heads(dim: int = 16) -> list[HeadStack]:
    """One head of every sort: two classes, several attributes on one trunk, on z, and linear."""
    return [
        stack("smile", {"smile": 2}, dim=dim),
        stack("trunk", {"age": 1, "hair": 4, "hat": 2}, dim=dim, seed=1),
        stack("shape", {"shape": 2}, dim=dim, space="z", seed=2),
        stack("plane", {"plane": 2, "tilt": 1}, dim=dim, hidden=(), seed=3),
    ]
