"""What the posterior's definition evaluates of a bundle: noise -> z -> w -> logits -> log P, forwards, in float32."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy import ndarray as Array

from engine.prior import Prior, StandardNormal
from engine.reference import field
from engine.reference.probability import log_probabilities
from engine.tape import Column, Tape

Layers = Sequence[tuple[Array, Array]]


@dataclass(frozen=True, slots=True, eq=False)
class Stack:
    """Dense layers whose logits ``columns`` = (first, past-last) are an attribute's; they read ``space``, w or z."""

    layers: Layers
    columns: tuple[int, int]
    space: str = "w"


@dataclass(frozen=True, slots=True, eq=False)
class Wish:
    """What a row asks for, and where: truncation by the mapping (psi) and of the draw, the class of a conditional
    generator."""

    tape: Tape
    psi: float
    label: int = 0
    truncation: float = 1.0


class BundleWorld:
    """Rows with wishes in the world of a bundle.

    tensors    a bundle's field;  stacks: of each attribute;  normalise: whether the mapping scales z first
    towards    rows (n,) and their z (n, z_dim) -> nearer to where their conditions hold
    """

    def __init__(self, tensors: Mapping[str, Array], stacks: Mapping[str, Stack], wishes: Sequence[Wish], z_dim: int, *,
                 normalise: bool = True, prior: Prior | None = None,
                 towards: Callable[[Array, Array], Array] | None = None):
        self.tensors, self.stacks, self.wishes, self.normalise = tensors, stacks, list(wishes), normalise
        self.prior = prior or StandardNormal(z_dim)
        self.noise_dim, self.towards = self.prior.noise_dim, towards
        self.psi = np.array([[wish.psi] for wish in self.wishes], np.float32)
        self.truncation = np.array([[wish.truncation] for wish in self.wishes], np.float32)
        self.label = np.array([wish.label for wish in self.wishes], np.int64)
        kinds = list({id(wish.tape): wish.tape for wish in self.wishes}.values())
        self.tapes = kinds
        self.kind = np.array([next(i for i, tape in enumerate(kinds) if tape is wish.tape) for wish in self.wishes])

    def log_p(self, rows: Array, x: Array) -> tuple[Array, Array]:
        z = self.prior.push(x, self.truncation[rows])
        w = self.map(rows, z)
        relaxed, crisp = np.empty(len(rows)), np.empty(len(rows))
        for i, tape in enumerate(self.tapes):
            part = np.flatnonzero(self.kind[rows] == i)
            if len(part):
                u = self.columns(tape.columns, z[part], w[part])
                parameters = np.broadcast_to(tape.parameters, (len(part), len(tape.parameters)))
                relaxed[part], crisp[part] = log_probabilities(tape.program, parameters, u)
        return relaxed, crisp

    def map(self, rows: Array, z: Array) -> Array:
        return field.mapping(self.tensors, z, self.psi[rows], self.label[rows], normalise=self.normalise)[0]

    def columns(self, columns: Sequence[Column], z: Array, w: Array) -> Array:
        """What a tape reads (n, columns), from the heads that it mentions."""
        found: dict[str, Array] = {}
        for name in dict.fromkeys(column.attribute for column in columns):
            stack = self.stacks[name]
            found[name] = field.head(stack.layers, w if stack.space == "w" else z)[0][:, slice(*stack.columns)]
        parts = [column.read(found) for column in columns]
        return np.stack(parts, axis=1) if parts else np.empty((len(w), 0))

    def approach(self, rows: Array, x: Array) -> Array:
        if self.towards is None:
            return x
        psi = self.truncation[rows]
        return self.prior.pull(self.towards(rows, self.prior.push(x, psi)), psi)
