"""Samples to pictures."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy import ndarray as Array

from engine.bundle import GeneratorFacts
from engine.reference.noise import normals_many
from engine.requests import Sample, checked_latent
from engine.runtimes import Drawing
from engine.spaces import spread

# Streams of a seed from here on are the noise inputs of the synthesis; see also engine.starts.
NOISE_STREAM = 2**63


def render(drawing: Drawing, generator: GeneratorFacts, samples: Sequence[Sample]) -> list[Sample]:
    """The same samples with their ``image``. Raises RequestError for latents of another generator."""
    if not samples:
        return []
    num_ws, w_dim = generator.num_ws, generator.w_dim
    ws = np.stack([spread(checked_latent(s.w, w_dim, "w", finite=False), num_ws) if s.ws is None else
                   checked_latent(s.ws, (num_ws, w_dim), "ws", finite=False) for s in samples])
    images = drawing.pixels(np.ascontiguousarray(ws, np.float32), draw_noises(drawing, samples))
    # A copy each: whoever keeps one picture must not keep those that were decoded with it.
    return [replace(sample, image=image.copy()) for sample, image in zip(samples, images, strict=True)]


def draw_noises(drawing: Drawing, samples: Sequence[Sample]) -> dict[str, Array]:
    """Noise inputs (rows, 1, r, r), where the bundle has them: a function of each sample's seed."""
    seeds = [sample.seed for sample in samples]
    return {
        name: normals_many(seeds, [NOISE_STREAM + i] * len(seeds), side**2).reshape(-1, 1, side, side)
        for i, (name, side) in enumerate(drawing.noise_inputs().items())
    }
