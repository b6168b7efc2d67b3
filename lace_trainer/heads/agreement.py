"""Does a labeller agree with itself? It is asked about pictures and about their mirror images.

A head cannot be more accurate than that: what a labeller says of one picture and denies of its mirror image is noise.
Attributes with a side (a head turned left, light from the right) change sides in the mirror; which classes do is read
off the answers.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy import ndarray as Array

from lace_trainer.attributes import Attribute


@dataclass(frozen=True, slots=True)
class Agreement:
    """Of a labeller with itself: a hit rate, or 1 - mean absolute error of a value.

    sides   classes that exchange places in the mirror, ("left", "right"); of a value ("low", "high")
    """

    rate: float
    sides: tuple[str, ...] = ()


def agreement(attribute: Attribute, plain: Array, mirrored: Array) -> Agreement:
    """plain, mirrored   probabilities (n, classes) or values (n, 1) of pictures and of their mirror images"""
    if attribute.kind == "value":
        return agreement_of_values(plain[:, 0], mirrored[:, 0])
    size = len(attribute.classes)
    counts = np.zeros((size, size))
    np.add.at(counts, (plain.argmax(axis=1), mirrored.argmax(axis=1)), 1)
    pairs = exchanged(counts)
    right = np.trace(counts) + sum(gain(counts, i, j) for i, j in pairs)
    return Agreement(float(right / counts.sum()), tuple(attribute.classes[k] for pair in pairs for k in pair))


def exchanged(counts: Array) -> Sequence[tuple[int, int]]:
    """Pairs of classes that agree better when they are exchanged, the best first, each class once."""
    pairs = [(i, j) for i in range(len(counts)) for j in range(i) if gain(counts, i, j) > 0]
    found: list[tuple[int, int]] = []
    for i, j in sorted(pairs, key=lambda pair: -gain(counts, *pair)):
        if not {i, j} & {k for pair in found for k in pair}:
            found.append((j, i))
    return found


def gain(counts: Array, i: int, j: int) -> float:
    return float(counts[i, j] + counts[j, i] - counts[i, i] - counts[j, j])


def agreement_of_values(plain: Array, mirrored: Array) -> Agreement:
    straight = np.abs(plain - mirrored).mean()
    turned = np.abs(plain - (plain.mean() + mirrored.mean() - mirrored)).mean()
    return Agreement(float(1 - turned), ("low", "high")) if turned < straight else Agreement(float(1 - straight))
