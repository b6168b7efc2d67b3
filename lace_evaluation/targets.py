"""Targets: what every row of a cell is asked for, drawn as the paper draws them.

    uniform    every class alike, values evenly over the middle 60 % of the head's range (the paper's grid is 0.2..0.8)
    training   label vectors of the renderer's faces, from which the training pictures were drawn; without a renderer,
               of plain samples, as the judge sees them

Nie, Vahdat, Anandkumar, NeurIPS 2021: ACC on uniform targets, FID on targets of the training data. There a batch shares
one target; here every row has its own.
"""

import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import reduce
from operator import and_

import numpy as np
from numpy import ndarray as Array

from engine.bundle import Attribute
from engine.condition import Condition, Is, attr
from engine.tape import class_index
from lace_evaluation.questions import TOLERANCE, statements
from lace_evaluation.world import Law, groups, is_rendered, rendered_law

SOURCES = ("uniform", "training")
MARGIN = 0.2  # of the range, at either end
SETS = {
    "two": (("smile", "glasses"), ("gender", "age"), ("haircolor", "yaw")),
    "three": (("gender", "smile", "age"), ("smile", "glasses", "haircolor"), ("hat", "yaw", "light")),
}


@dataclass(frozen=True, slots=True, eq=False)
class Targets:
    """What n rows are asked for.

    values (n, k): class index or value of each of the k ``names``;  first: number of the first row, which decides seeds
    """

    names: tuple[str, ...]
    values: Array
    first: int = 0

    def conditions(self, attributes: Mapping[str, Attribute]) -> list[Condition]:
        kinds = [attributes[name] for name in self.names]
        return [
            reduce(and_, (attr(a.name, a.classes[int(v)] if a.kind == "class" else float(v))
                          for a, v in zip(kinds, row, strict=True)))
            for row in self.values.tolist()
        ]


def sets(attributes: Mapping[str, Attribute]) -> dict[str, list[tuple[str, ...]]]:
    """Groups of attributes that are asked for together, by the size of the group; those that the bundle has."""
    found: dict[str, list[tuple[str, ...]]] = {"one": [(name,) for name in attributes]}
    for size, known in SETS.items():
        if served := [group for group in known if set(group) <= set(attributes)]:
            found[size] = served
    if not is_rendered(attributes):
        found |= {size: some for size, many in (("two", 2), ("three", 3)) if (some := groups(attributes, many))}
    if len(attributes) > 3:
        found["all"] = [tuple(attributes)]
    return found


def draw(source: str, names: tuple[str, ...], attributes: Mapping[str, Attribute], count: int, seed: int, *,
         first: int = 0, law: Law = rendered_law) -> Targets:
    """``count`` targets for ``names``; another group, source or seed draws other ones.

    law   of training targets
    """
    rng = generator(source, names, seed)
    columns = law(rng, count) if source == "training" else {}
    values = [clipped(columns[n], attributes[n]) if columns else uniform(rng, count, attributes[n]) for n in names]
    return Targets(names, np.stack(values, axis=1).round(4), first)


def generator(source: str, names: tuple[str, ...], seed: int) -> np.random.Generator:
    return np.random.default_rng([seed, zlib.crc32(f"{source} {names}".encode())])


def uniform(rng: np.random.Generator, count: int, attribute: Attribute) -> Array:
    if attribute.kind == "class":
        return rng.integers(len(attribute.classes), size=count).astype(float)
    low, high = attribute.range
    return low + (high - low) * rng.uniform(MARGIN, 1 - MARGIN, count)


def clipped(values: Array, attribute: Attribute) -> Array:
    """Values inside the range that the head knows."""
    return values if attribute.kind == "class" else values.clip(*attribute.range)


def fixed(condition: Condition, attributes: Mapping[str, Attribute], count: int) -> Targets:
    """A conjunction of classes and values as the target of ``count`` rows."""
    leaves: Iterable[Is] = [leaf for leaf in statements(condition) if isinstance(leaf, Is)]
    values = [
        float(leaf.choice) if attributes[leaf.name].kind == "value"
        else class_index(attributes[leaf.name], leaf.choice)
        for leaf in leaves
    ]
    return Targets(tuple(leaf.name for leaf in leaves), np.tile(values, (count, 1)))


def scores(targets: Targets, labels: Array, attributes: Mapping[str, Attribute]) -> Array:
    """ACC of every row and attribute, (n, k): 1 or 0 for a class, 1 - |error| for a value; not below 0.

    labels   (n, attributes of the bundle)
    """
    order = list(attributes)
    found = labels[:, [order.index(name) for name in targets.names]]
    is_class = [attributes[name].kind == "class" for name in targets.names]
    return np.where(is_class, found == targets.values, 1 - np.abs(found - targets.values)).clip(min=0)


def holds(targets: Targets, score: Array, attributes: Mapping[str, Attribute]) -> Array:
    """Rows (n,) of which every statement is true, a value to within TOLERANCE.  score (n, k) as above"""
    least = [1.0 if attributes[name].kind == "class" else 1 - TOLERANCE for name in targets.names]
    return (score >= least).all(axis=1)
