"""Latent spaces of a generator: where a flow runs, and how one gets from there to what the synthesis takes.

The mapping leads from ``z`` to ``w``; the synthesis takes one w for each of its style layers, ``ws``. A plain generator
has a w that is its z, and behind it the embedding of its label if it is conditional: no layers, nothing is normalised.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy import ndarray as Array

if TYPE_CHECKING:
    from engine.bundle import GeneratorFacts


@dataclass(frozen=True, slots=True)
class Space:
    """A latent space.

    name        "z" or "w"
    width       numbers of a latent
    is_mapped   whether the mapping lies between it and w
    """

    name: str
    width: int
    is_mapped: bool = False


def spaces_of(generator: "GeneratorFacts") -> Mapping[str, Space]:
    """The spaces in which a flow may run, by name. Not in a w that holds a label: it would move."""
    spaces = {"z": Space("z", generator.z_dim, is_mapped=True), "w": Space("w", generator.w_dim)}
    if generator.is_plain and generator.labels:
        del spaces["w"]
    return spaces


def spread(w: Array, num_ws: int) -> Array:
    """w (w_dim,), or (num_ws, w_dim) as it is -> (num_ws, w_dim): one w for each style layer."""
    return np.broadcast_to(w, (num_ws, w.shape[-1]))
