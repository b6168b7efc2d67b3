"""What a bundle's heads say of samples, and how well a condition is met by them."""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy import ndarray as Array
from rich.table import Table
from rich.text import Text

from engine.batch import Status
from engine.bundle import Attribute
from engine.cli.console import Terminal, new_table
from engine.condition import And, Condition, Is, Not, Or, Weighted, Within
from engine.requests import Sample
from engine.tape import class_index, satisfied


def softmax(logits: Array) -> Array:
    exponents = np.exp(logits - np.max(logits))
    return exponents / exponents.sum()


def reading(attribute: Attribute, logits: Array) -> float | dict[str, float]:
    """What a head says of one picture: a value, or the probability of each class."""
    if attribute.kind == "value":
        return round(float(logits[0]), 4)
    return {name: round(float(p), 4) for name, p in zip(attribute.classes, softmax(logits), strict=True)}


def readings(attributes: Mapping[str, Attribute], logits: Mapping[str, Array]) -> dict:
    return {name: reading(attributes[name], values) for name, values in logits.items()}

def notes(condition: Condition | None, attributes: Mapping[str, Attribute]) -> list[str]:
    """One sentence for each value that is asked for outside of what the training data covered."""
    found = []
    for leaf in leaves(condition):
        inner = leaf.part if isinstance(leaf, Not) else leaf
        attribute = attributes.get(inner.name) if isinstance(inner, Is | Within) else None
        if attribute is not None and attribute.kind == "value" and is_unknown(inner, *attribute.range):
            low, high = attribute.range
            found.append(f"{inner} lies outside the range that the bundle knows, {attribute.name} from {low:g} to "
                         f"{high:g}: the pictures may not show it")
    return list(dict.fromkeys(found))


def is_unknown(leaf: Condition, low: float, high: float) -> bool:
    """Whether no value from low to high fulfils the leaf."""
    match leaf:
        case Is(_, int() | float() as value):
            return not low <= value <= high
        case Within(_, above, below):
            return (above is not None and above >= high) or (below is not None and below <= low)
    return False


def leaves(condition: Condition | None, negated: bool = False) -> list[Condition]:
    """The single statements of a condition, negations kept."""
    match condition:
        case Is() | Within():
            return [Not(condition) if negated else condition]
        case Not(part):
            return leaves(part, not negated)
        case Weighted(_, part):
            return leaves(part, negated)
        case And(parts) | Or(parts):
            return [leaf for part in parts for leaf in leaves(part, negated)]
    return []


class Tally:
    """How well each statement of a condition is met, what the samples cost, and which did not arrive; as sums, so that
    memory does not grow with the number of samples.
    """

    SHOWN = 8  # seeds of rows that did not arrive

    def __init__(self, condition: Condition | None, attributes: Mapping[str, Attribute]):
        self.attributes = attributes
        statements = list(dict.fromkeys(leaves(condition)))
        self.statements = [*statements, *([condition] if len(statements) > 1 and condition is not None else [])]
        # met, and the sums of what ``worth`` says and of its square
        self.sums = np.zeros((len(self.statements), 3))
        self.count = self.evaluations = self.most = self.drawn = self.exact = self.decodes = 0
        self.stopped: dict[Status, list[int]] = {}
        self.stopped_count: dict[Status, int] = {}

    def add(self, samples: Sequence[Sample], logits: Sequence[Mapping[str, Array]]) -> None:
        stacked = {name: np.stack([values[name] for values in logits]) for name in logits[0]}
        for i, statement in enumerate(self.statements):
            worth = self.worth(statement, stacked)
            self.sums[i] += np.sum(satisfied(statement, self.attributes, stacked)), np.sum(worth), np.sum(worth**2)
        self.count += len(samples)
        self.evaluations += sum(sample.evaluations for sample in samples)
        self.most = max(self.most, *(sample.evaluations for sample in samples))
        self.drawn += sum(sample.candidates > 0 for sample in samples)
        self.exact += sum(sample.exact for sample in samples)
        self.decodes += sum(sample.decodes for sample in samples)
        for sample in samples:
            if sample.status != Status.DONE:
                self.stopped_count[sample.status] = self.stopped_count.get(sample.status, 0) + 1
                seeds = self.stopped.setdefault(sample.status, [])
                self.stopped[sample.status] = sorted([*seeds, sample.seed])[: self.SHOWN]

    def worth(self, statement: Condition, stacked: Mapping[str, Array]) -> Array:
        """Of each row: the value that the statement is about, or the probability of the class that it asks for."""
        inner = statement.part if isinstance(statement, Not) else statement
        if not isinstance(inner, Is | Within):
            return np.zeros(1)
        attribute, values = self.attributes[inner.name], stacked[inner.name].astype(np.float64)
        if attribute.kind == "value":
            return values[:, 0]
        choice = inner.choice if isinstance(inner, Is) else None
        p = np.array([softmax(row)[class_index(attribute, choice)] for row in values])
        return 1 - p if isinstance(statement, Not) else p

    def table(self) -> Table:
        """How well each statement was met, by the latent heads that steered the sampling."""
        table = new_table("met, according to the bundle's heads", "statement", "met>", "on average>")
        for statement, (met, total, squares) in zip(self.statements, self.sums, strict=True):
            share = met / self.count
            colour = "green" if share >= 0.95 else "yellow" if share >= 0.5 else "red"
            table.add_row(str(statement), Text(f"{share:.0%}", colour), self.average(statement, total, squares))
        return table

    def average(self, statement: Condition, total: float, squares: float) -> str:
        """The mean value with its spread, or the mean probability of the class that was asked for."""
        inner = statement.part if isinstance(statement, Not) else statement
        if not isinstance(inner, Is | Within):
            return ""
        mean = total / self.count
        if self.attributes[inner.name].kind == "class":
            return f"p = {mean:.3f}"
        return f"{mean:.3f} ± {np.sqrt(max(squares / self.count - mean**2, 0.0)):.3f}"

    def cost(self) -> str:
        exact = f"; {self.exact} of {self.drawn} drawn exactly" if self.drawn else ""
        looks = f"; the check looked at {self.decodes / self.count:.2f} pictures for each" if self.decodes else ""
        return f"{self.evaluations / self.count:.1f} evaluations a picture, at most {self.most}{exact}{looks}"

    def report(self, console: Terminal) -> None:
        """Which rows did not arrive."""
        for fate in sorted(self.stopped):
            count, seeds = self.stopped_count[fate], self.stopped[fate]
            more = f" and {count - len(seeds)} more" if count > len(seeds) else ""
            console.say(f"{count} row{'s' if count > 1 else ''} {fate.sentence}: seeds {seeds}{more}", "yellow")
