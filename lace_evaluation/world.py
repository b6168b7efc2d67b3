"""What a bundle's pictures are compared with, and what the suites ask of it.

A bundle of the demonstration world has a renderer: targets have the law of its faces, and Fréchet distances are taken
from fresh renders. Any other bundle has its own plain samples: targets are what the judge sees in them, and distances
are taken from others of them. What is asked follows from the bundle's attributes.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Protocol

import numpy as np
from numpy import ndarray as Array

from engine.bundle import Attribute
from engine.classifier import ImageClassifier
from engine.condition import RESERVED, WORD
from engine.errors import LaceError
from lace_trainer.faces import ATTRIBUTES, sample_factors
from lace_trainer.judges import metrics

RENDERS, PLAIN = "fresh renders", "fresh plain samples"
Law = Callable[[np.random.Generator, int], Mapping[str, Array]]
MOST_STEPS, GROUPS = 5, 3  # edits of a sequence; groups of two, and of three, attributes
FEW = 0.05  # share of plain samples below which a class is not where a sequence of edits begins
Choice = str | float


class Judge(Protocol):
    """A classifier of lace-train, or anybody's: uint8 pictures (n, R, R, 3) -> labels (n, attributes)."""

    @property
    def attributes(self) -> Sequence: ...

    def predict(self, pictures) -> Array: ...


def features(judge, pictures: Array) -> Array:
    """What stands for a picture where pictures are compared, (n, d)."""
    return judge.features(pictures) if isinstance(judge, ImageClassifier) else metrics.features(judge, pictures)


class JudgedIdentity:
    """In the place of an identity network, where none knows the bundle's pictures: the judge's features as unit rows,
    less their mean on plain samples."""

    def __init__(self, judge, plain: Array):
        self.judge, self.mean = judge, features(judge, plain).mean(axis=0)

    def embed(self, pictures: Array) -> Array:
        rows = features(self.judge, pictures) - self.mean
        return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


def is_rendered(attributes: Mapping[str, Attribute]) -> bool:
    """Whether a bundle is of the demonstration world: attributes of the renderer alone, and some."""
    known = {a.name: (a.kind, tuple(a.classes)) for a in ATTRIBUTES}
    return bool(attributes) and all(known.get(n) == (a.kind, tuple(a.classes)) for n, a in attributes.items())


def judged(attributes: Mapping[str, Attribute], judge: Judge) -> dict[str, Attribute]:
    """The attributes of a bundle that a judge can tell. Raises LaceError if there are none."""
    known = {a.name: (a.kind, tuple(a.classes)) for a in judge.attributes}
    found = {name: a for name, a in attributes.items() if known.get(name) == (a.kind, tuple(a.classes))}
    if not found:
        theirs = "; ".join(f"{name} ({', '.join(classes) or kind})" for name, (kind, classes) in known.items())
        ours = "; ".join(f"{name} ({', '.join(a.classes) or a.kind})" for name, a in attributes.items())
        raise LaceError(f"the judge can tell none of the bundle's attributes ({ours}); it knows: {theirs}. Give the "
                        "same names and classes, in the same order, in its spec")
    return found


def rendered_law(rng: np.random.Generator, count: int) -> dict[str, Array]:
    """Labels of the renderer's faces, by attribute."""
    labels = sample_factors(rng, count).labels
    return {attribute.name: labels[:, i].astype(float) for i, attribute in enumerate(ATTRIBUTES)}


def plain_law(names: Sequence[str], labels: Array) -> Law:
    """Labels of plain samples (n, attributes), drawn again."""

    def law(rng: np.random.Generator, count: int) -> dict[str, Array]:
        rows = rng.integers(len(labels), size=count)
        return {name: labels[rows, i].astype(float) for i, name in enumerate(names)}

    return law


# --- what is asked of a bundle that nobody knows ---------------------------------------------------------------------


def groups(attributes: Mapping[str, Attribute], size: int) -> list[tuple[str, ...]]:
    """Neighbours in the bundle's order, some groups of them."""
    names = list(attributes)
    return [tuple(names[i : i + size]) for i in range(0, len(names) - size + 1, size)][:GROUPS]


def edits(attributes: Mapping[str, Attribute], labels: Array) -> dict[str, tuple[Choice, Choice]]:
    """attribute: where a sequence of edits begins, and what is asked for, by what plain samples (n, attributes) show:
    the two most frequent classes, or the lower and the upper quarter of a value."""
    found: dict[str, tuple[Choice, Choice]] = {}
    for i, (name, attribute) in enumerate(attributes.items()):
        if attribute.kind == "value":
            low, high = np.quantile(labels[:, i], (0.25, 0.75)).clip(*attribute.range).round(2).tolist()
            if low < high:
                found[name] = (low, high)
        else:
            shares = np.bincount(labels[:, i].astype(int), minlength=len(attribute.classes)) / len(labels)
            first, second = np.argsort(-shares, kind="stable")[:2].tolist()
            if shares[first] >= FEW:
                found[name] = (attribute.classes[first], attribute.classes[second])
    return dict(list(found.items())[:MOST_STEPS])


def formulas(attributes: Mapping[str, Attribute], labels: Array) -> list[tuple[str, str]]:
    """(kind, formula) of bounds, NOT, AND, OR and nested ones on the first attributes."""
    atoms = [atom(attribute, labels[:, i]) for i, attribute in enumerate(attributes.values())]
    found = [("bound" if a.kind == "value" else "not", text if a.kind == "value" else f"~{text}")
             for a, text in zip(attributes.values(), atoms, strict=True)][:6]
    for a, b in list(pairwise(atoms))[:3]:
        found += [("and", f"{a} & {b}"), ("or", f"{a} | {b}"), ("nested", f"~({a} | {b})")]
    if len(atoms) > 2:
        a, b, c = atoms[:3]
        found += [("nested", f"{a} & ({b} | {c})"), ("nested", f"({a} | {b}) & ~({a} & {b})")]
    return found


def atom(attribute: Attribute, labels: Array) -> str:
    """A statement that some plain samples fulfil and others do not: the second most frequent class, or a value above
    its median."""
    name = quoted(attribute.name)
    if attribute.kind == "value":
        return f"{name}>{float(np.median(labels)):.2f}"
    counts = np.bincount(labels.astype(int), minlength=len(attribute.classes))
    return f"{name}={quoted(attribute.classes[int(np.argsort(-counts, kind='stable')[1])])}"


def quoted(text: str) -> str:
    return text if WORD.fullmatch(text) and text not in RESERVED else f'"{text}"'


def singles(attributes: Mapping[str, Attribute]) -> list[str]:
    """Every class, and three values within the range of the head."""
    found = []
    for name, attribute in attributes.items():
        low, high = attribute.range
        choices = [quoted(text) for text in attribute.classes] or [
            f"{low + part * (high - low):.3g}" for part in (0.25, 0.5, 0.75)]
        found += [f"{quoted(name)}={choice}" for choice in choices]
    return found
