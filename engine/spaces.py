"""Latent spaces of a generator: where a flow runs, and how one gets from there to what the synthesis takes.

The mapping leads from ``z`` to ``w``; the synthesis takes one w for each of its style layers, ``ws``. A generator
without a mapping has a w that is its z: no layers, and nothing is normalised.
"""

from dataclasses import dataclass

import numpy as np
from numpy import ndarray as Array


@dataclass(frozen=True, slots=True)
class Space:
    """A latent space.

    name        "z", "w", or "w+", where style layers differ
    width       numbers of a latent, in one layer
    layers      style layers of a latent; 1 where all share it
    is_mapped   whether the mapping lies between it and w
    """

    name: str
    width: int
    layers: int = 1
    is_mapped: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one latent."""
        return (self.width,) if self.layers == 1 else (self.layers, self.width)


def spread(w: Array, num_ws: int) -> Array:
    """w (w_dim,), or (num_ws, w_dim) as it is -> (num_ws, w_dim): one w for each style layer."""
    return np.broadcast_to(w, (num_ws, w.shape[-1]))
