"""Where rows begin: a prior of latents, as a function of normal noise.

Truncation is of two kinds. A generator with a mapping has a w that is drawn towards its mean, after the draw: psi of
the mapping. A plain one takes its latent as it is, and truncation narrows the draw itself.

Brock, Donahue, Simonyan, "Large scale GAN training for high fidelity natural image synthesis", ICLR 2019 (truncated
normal); its released models are sampled as here, from psi times a normal truncated to [-2, 2].
"""

from functools import cache
from statistics import NormalDist
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy import ndarray as Array

if TYPE_CHECKING:
    from engine.manifest import GeneratorFacts

# Where the normal of a truncated draw ends, for psi 1; and the table of the function that leads there: noise beyond
# its ends, of which there is one in 1e15, lies on the edge.
EDGE, REACH, NODES = 2.0, 8.0, 2049


class Prior(Protocol):
    """A distribution of latents: ``push`` of normal noise. What is random about a sample is in its noise.

    noise_dim   numbers of noise a latent takes
    """

    noise_dim: int

    def push(self, noise: Array, psi: Array | float) -> Array:
        """noise (rows, noise_dim), standard normal, and truncations (rows, 1) of the draw -> latents (rows, width)."""
        ...

    def pull(self, x: Array, psi: Array | float) -> Array:
        """A noise (rows, noise_dim) that gives latents x (rows, width), or nearly so where none does."""
        ...

    def score(self, x: Array, psi: Array | float) -> Array:
        """Gradient of log p at latents x (rows, width): (rows, width). Langevin dynamics needs it."""
        ...


class StandardNormal:
    """The prior of a z that a mapping takes. It has no truncation: that is the mapping's."""

    def __init__(self, width: int):
        self.noise_dim = width

    def push(self, noise: Array, psi: Array | float) -> Array:
        return noise

    def pull(self, x: Array, psi: Array | float) -> Array:
        return x

    def score(self, x: Array, psi: Array | float) -> Array:
        return -x


class TruncatedNormal:
    """The prior of a plain latent: N(0, I) at psi 1, below it psi times a normal truncated to [-2, 2]."""

    def __init__(self, width: int):
        self.noise_dim = width

    def push(self, noise: Array, psi: Array | float) -> Array:
        psi = column(psi, noise)
        return np.where(psi < 1, psi * truncate(noise), noise).astype(noise.dtype, copy=False)

    def pull(self, x: Array, psi: Array | float) -> Array:
        psi = column(psi, x)
        inside = x / np.where(psi > 0, psi, 1)
        return np.where(psi < 1, restore(inside), x).astype(x.dtype, copy=False)

    def score(self, x: Array, psi: Array | float) -> Array:
        """Inside the edges; what Langevin dynamics does outside them is its own."""
        psi = column(psi, x)
        return -x / np.maximum(psi, np.finfo(x.dtype).eps) ** 2


    def farthest(self, psi: Array) -> Array:
        """The length |z| (rows,) that hardly any latent exceeds, truncations (rows, 1): 4 standard deviations out."""
        normal = NormalDist()
        edge = 2 * EDGE * normal.pdf(EDGE) / (normal.cdf(EDGE) - normal.cdf(-EDGE))
        second = np.where(psi < 1, 1 - edge, 1)[:, 0]  # of one number: E x^2, and E x^4
        fourth = np.where(psi[:, 0] < 1, 3 * second - EDGE**2 * edge, 3)
        most = self.noise_dim * second + 4 * np.sqrt(self.noise_dim * (fourth - second**2))
        return psi[:, 0] * np.sqrt(most)


def column(psi: Array | float, like: Array) -> Array:
    return np.asarray(psi, like.dtype).reshape(-1, 1)


@cache
def table() -> tuple[Array, Array, Array]:
    """Nodes (NODES,) of noise, where truncation leads them, and its slope there."""
    normal = NormalDist()
    low, share = normal.cdf(-EDGE), normal.cdf(EDGE) - normal.cdf(-EDGE)
    noise = np.linspace(-REACH, REACH, NODES)
    # The function is odd; its negative half does not lose digits to 1 - p.
    half = [normal.inv_cdf(low + share * normal.cdf(x)) for x in noise[: NODES // 2]]
    found = np.array([*half, 0.0, *(-x for x in reversed(half))])
    slope = share * np.exp((found**2 - noise**2) / 2)
    return noise, found, slope


def truncate(noise: Array) -> Array:
    """A normal number as one of the normal truncated to [-2, 2], of the same rank. To 1e-10: a cubic between nodes."""
    nodes, values, slopes = table()
    step = nodes[1] - nodes[0]
    x = np.clip(noise.astype(float), -REACH, REACH)
    i = np.minimum(((x + REACH) / step).astype(np.intp), NODES - 2)
    t = (x - nodes[i]) / step
    left = values[i] + t * t * (3 - 2 * t) * (values[i + 1] - values[i])
    return left + step * t * (1 - t) * ((1 - t) * slopes[i] - t * slopes[i + 1])


def restore(x: Array) -> Array:
    """The noise that ``truncate`` leads to x; beyond the edges, the end of the table. To 1e-4."""
    nodes, values, _ = table()
    return np.interp(x, values, nodes)


def prior_of(generator: "GeneratorFacts") -> Prior:
    """The prior that a generator's latents z are drawn from."""
    return TruncatedNormal(generator.z_dim) if generator.is_plain else StandardNormal(generator.z_dim)


def split(generator: "GeneratorFacts", psi: float) -> tuple[float, float]:
    """A request's truncation as that of the draw and that of the mapping: one of them is 1."""
    return (psi, 1.0) if generator.is_plain else (1.0, psi)
