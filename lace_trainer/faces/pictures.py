"""Rendered faces for training and judging, and what a judge sees in them; kept on the disk, made once."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy import ndarray as Array
from torch import Tensor

from engine.folders import write_atomically
from lace_trainer.data import pictures_file
from lace_trainer.faces.factors import Factors, sample_factors
from lace_trainer.faces.render import render
from lace_trainer.judges.classifier import Classifier
from lace_trainer.judges.metrics import REFERENCE_SEED, digest, features

CHUNK = 1000  # faces rendered at once


def rendered(count: int, size: int, seed: int, directory: Path) -> tuple[Tensor, Array]:
    """Pictures of the procedural renderer, kept in ``directory``, and their exact labels.

    returns   pictures (count, size, size, 3) uint8, labels (count, 12) float32 in the order of ATTRIBUTES
    """
    factors = sample_factors(np.random.default_rng(seed), count)
    path = Path(directory) / f"faces-{size}-{count}-{seed}.npy"
    return pictures_file(path, count, size, lambda rows: render(factors[rows], size=size)), factors.labels


def portraits(people: int, views: int, size: int, seed: int, directory: Path) -> Tensor:
    """``views`` pictures of each person, alike in the identity factors only: (people, views, size, size, 3) uint8."""
    drawn = sample_factors(np.random.default_rng(seed), people * views)
    factors = Factors(drawn.labels, drawn.identity[::views].repeat(views, axis=0), drawn.scene)
    path = Path(directory) / f"people-{size}-{people}-{views}-{seed}.npy"
    pictures = pictures_file(path, len(factors), size, lambda rows: render(factors[rows], size=size))
    return pictures.reshape(people, views, size, size, 3)


def renders(count: int, size: int, seed: int = REFERENCE_SEED) -> Iterator[Array]:
    """Fresh faces of the renderer, at most CHUNK at once: (n, size, size, 3) uint8."""
    factors = sample_factors(np.random.default_rng(seed), count)
    for first in range(0, count, CHUNK):
        yield render(factors[first : first + CHUNK], size=size)


def reference_features(
    judge: Classifier, count: int = 10_000, seed: int = REFERENCE_SEED, cache: Path | None = None
) -> Array:
    """Features (count, d) of fresh faces of the renderer, at the size that the judge reads.

    cache   a folder that keeps them, under a name made of the judge's weights, the size, count and seed
    """
    size = judge.shape.size
    path = None if cache is None else Path(cache) / f"features-{digest(judge)}-{size}-{count}-{seed}.npy"
    if path is not None and path.exists():
        return np.load(path)
    found = np.concatenate([features(judge, part) for part in renders(count, size, seed)])
    if path is not None:
        write_atomically(path, lambda file: np.save(file, found))
    return found
