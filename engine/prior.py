"""Where rows begin: a prior of latents, as a function of normal noise."""

from typing import Protocol

from numpy import ndarray as Array


class Prior(Protocol):
    """A distribution of latents: ``push`` of normal noise. What is random about a sample is in its noise.

    noise_dim   numbers of noise a latent takes
    """

    noise_dim: int

    def push(self, noise: Array) -> Array:
        """noise (rows, noise_dim), standard normal -> latents (rows, width)."""
        ...

    def score(self, x: Array) -> Array:
        """Gradient of log p at latents x (rows, width): (rows, width). Langevin dynamics needs it."""
        ...


class StandardNormal:
    """The prior of z."""

    def __init__(self, width: int):
        self.noise_dim = width

    def push(self, noise: Array) -> Array:
        return noise

    def score(self, x: Array) -> Array:
        return -x
