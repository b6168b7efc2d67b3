"""Where a generator's w may go: the principal components of W, measured by sending normals through its mapping.

Along a direction in which the w of plain samples hardly varies, heads read what no picture shows: an edit that is free
to move there satisfies the heads and not the picture. So edits in w move along the leading components only.

Härkönen, Hertzmann, Lehtinen, Paris, "GANSpace", NeurIPS 2020 (principal components of W).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy import ndarray as Array

from engine.reference.field import mapping
from engine.reference.noise import normals_many

if TYPE_CHECKING:
    from engine.manifest import GeneratorFacts

COUNT, CALL = 4096, 512  # normals; rows of one call of the mapping
# Of the variance of W that the components hold: 48 of the demo's 128. On the demo 32 to 64 components edit alike.
SHARE = 0.975


@dataclass(frozen=True, slots=True, eq=False)
class Components:
    """basis (w_dim, k), orthonormal, the leading component first;  variance: the mean over all directions of W."""

    basis: Array
    variance: float


def measure_components(tensors: Mapping[str, Array], generator: "GeneratorFacts") -> Components:
    """Of a bundle's field, for all its labels together. The same on every runtime."""
    w = np.concatenate([draw(tensors, generator, np.arange(first, first + CALL)) for first in range(0, COUNT, CALL)])
    w = w.astype(float)
    w -= w.mean(axis=0)
    variances, directions = np.linalg.eigh(w.T @ w / COUNT)
    variances = np.maximum(variances[::-1], 0.0)
    held = np.cumsum(variances) / max(variances.sum(), np.finfo(float).tiny)
    count = min(int(np.searchsorted(held, SHARE)) + 1, len(held))
    return Components(np.ascontiguousarray(directions[:, ::-1][:, :count]), float(variances.mean()))


def draw(tensors: Mapping[str, Array], generator: "GeneratorFacts", numbers: Array) -> Array:
    """w (n, w_dim) of these normals, without truncation; labels take turns."""
    z = normals_many([0] * len(numbers), numbers.tolist(), generator.z_dim)
    label = numbers % generator.labels if generator.labels else None
    return mapping(tensors, z, np.ones((len(z), 1), z.dtype), label, normalise=generator.normalise)[0]
