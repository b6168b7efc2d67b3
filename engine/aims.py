"""What an edit asks and holds, for many rows: residuals of what heads read, each zero where it is fulfilled.

A term of the condition   how far its log-odds stay behind MARGIN; a value's, how far it is from what was asked
A class that is held      how far its log-odds stay behind those of the anchor, or behind HELD_MARGIN if that is less
A value that is held      how far it is from the anchor's

Log-odds and values are of the mean of a head's two stacks: see engine.ladder.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy import ndarray as Array

from engine.bundle import Attribute
from engine.condition import Condition
from engine.reference.tape import evaluate, log_ndtr
from engine.reference.terms import Term, terms
from engine.tape import Column, Tape, lower

# Log-odds. Measured on the demo (14 edits, 96 faces, a judge that took no part): docs/editing.md.
MARGIN, HELD_MARGIN, LEAST_MARGIN = 4.0, 3.0, 0.5
# What a residual of 1 stands for: of log-odds, and of values in units of their tolerance.
ASKED_ODDS, HELD_ODDS = 0.16, 0.3
ASKED_VALUE, HELD_VALUE = 0.2, 0.4
TOLERANCE = 0.05  # of values whose tolerance was not measured
# A value has moved if it has changed by more than this, a class if it is another one.
NOTICED = 0.1
TINY = np.finfo(float).tiny


def tolerance(attribute: Attribute) -> float:
    return attribute.tolerance or TOLERANCE


def columns_of(attribute: Attribute) -> list[Column]:
    """What of an attribute is read: the logit difference of two classes, else all logits."""
    if attribute.kind == "class" and len(attribute.classes) == 2:
        return [Column(attribute.name, None)]
    return [Column(attribute.name, i) for i in range(attribute.width)]


def wish(condition: Condition, attributes: Mapping[str, Attribute]) -> Tape:
    """The condition's tape, with the sigmas that an edit has for values."""
    tight = {name: replace(a, sigma=ASKED_VALUE * tolerance(a)) if a.kind == "value" else a
             for name, a in attributes.items()}
    return lower(condition, tight)


@dataclass(frozen=True, slots=True, eq=False)
class Held:
    """An attribute that is held at an anchor's logits.

    sharp (n, C)  raw logits of its sharp stack
    goal (n,)     the class by the sharp stack, or the value that is read
    margin (n,)   log-odds of the class to keep; of a value, unused
    counts (n,)   whether it is held, of each row
    """

    attribute: Attribute
    sharp: Array
    goal: Array
    margin: Array
    counts: Array

    @classmethod
    def at(cls, attribute: Attribute, sharp: Array, own: Array, counts: Array) -> "Held":
        """Where rows are; ``own`` (n, columns): what is read of it."""
        if attribute.kind == "value":
            return cls(attribute, sharp, own[:, 0], own[:, 0], counts)
        goal = sharp.argmax(axis=1)
        odds, _ = log_odds(own, goal)
        return cls(attribute, sharp, goal, np.clip(odds, LEAST_MARGIN, HELD_MARGIN), counts)

    def residual(self, rows: Array, own: Array) -> tuple[Array, Array]:
        """Of these rows (n,), and its derivatives (n, columns)."""
        counts, goal = self.counts[rows], self.goal[rows]
        if self.attribute.kind == "value":
            scale = counts / (HELD_VALUE * tolerance(self.attribute))
            return (own[:, 0] - goal) * scale, scale[:, None]
        odds, slopes = log_odds(own, goal)
        behind = np.maximum(self.margin[rows] - odds, 0.0) * (counts / HELD_ODDS)
        return behind, np.where(behind > 0, -1.0 / HELD_ODDS, 0.0)[:, None] * slopes

    def log_p(self, rows: Array, own: Array) -> Array:
        """log P (n,) that it has not moved; 0 where it is not held."""
        if self.attribute.kind == "class":
            odds, _ = log_odds(own, self.goal[rows])
            found = -np.logaddexp(0.0, -odds)
        else:
            found = within(own[:, 0] - self.goal[rows], NOTICED, 0.5 * tolerance(self.attribute))
        return np.where(self.counts[rows], found, 0.0)

    def has_moved(self, sharp: Array) -> Array:
        """Whether these logits (n, C) of the sharp stack say another class, or a value that is NOTICED."""
        if self.attribute.kind == "class":
            return self.counts & (self.sharp.argmax(axis=1) != sharp.argmax(axis=1))
        return self.counts & ~(np.abs(sharp[:, 0] - self.sharp[:, 0]) <= NOTICED)


class Aims:
    """Of n rows that share the structure of their condition and the names of what they hold.

    wish       the condition: see ``wish``
    layout     of each attribute, its part of the R columns
    """

    def __init__(self, wish: Tape, layout: Mapping[str, slice], held: Sequence[Held]):
        self.wish, self.layout, self.held = wish, layout, held
        self.terms = [Asked.of(term, wish, layout) for term in terms(wish.program)]

    def residuals(self, rows: Array, u: Array) -> tuple[Array, Array]:
        """u (n, R) -> residuals (n, K) and their derivatives (n, K, R)."""
        n, count = u.shape
        found, slopes = np.zeros((n, self.count)), np.zeros((n, self.count, count))
        for k, term in enumerate(self.terms):
            found[:, k], slopes[:, k, term.columns] = term.residual(u)
        for k, held in enumerate(self.held, len(self.terms)):
            part = self.layout[held.attribute.name]
            found[:, k], slopes[:, k, part] = held.residual(rows, u[:, part])
        return found, slopes

    @property
    def count(self) -> int:
        return len(self.terms) + len(self.held)

    def log_asked(self, u: Array) -> Array:
        """log P (n,) that the condition holds; values within their tolerance."""
        return sum((term.log_p(u) for term in self.terms), np.zeros(len(u)))

    def log_kept(self, u: Array, rows: Array) -> Array:
        """log P (n,) of these rows that nothing that is held has moved."""
        return sum((held.log_p(rows, u[:, self.layout[held.attribute.name]]) for held in self.held), np.zeros(len(u)))


@dataclass(frozen=True, slots=True, eq=False)
class Asked:
    """A term of the condition.

    columns    which of the R it reads;  weight: its importance
    is_value   whether it is a value that is asked for; ``slack`` is then how far it may be off
    """

    term: Term
    parameters: Array
    columns: Array
    weight: float
    is_value: bool
    slack: float

    @classmethod
    def of(cls, term: Term, wish: Tape, layout: Mapping[str, slice]) -> "Asked":
        program, parameters, weight = term.program, wish.parameters[term.parameters], 1.0
        while program[-1][0] == "weight":
            weight *= float(parameters[program[-1][1]])
            program = program[:-1]
        read = [wish.columns[i] for i in term.columns]
        columns = np.array([layout[c.attribute].start + (c.index or 0) for c in read], np.intp)
        is_value = program[0][0] == "value" and len(program) == 1
        slack = 1 / (float(parameters[program[0][2] + 1]) * ASKED_VALUE) if is_value else 0.0
        return cls(term._replace(program=program), parameters, columns, weight, is_value, slack)

    def residual(self, u: Array) -> tuple[Array, Array]:
        """(n,) and its derivatives (n, columns)."""
        own = u[:, self.columns]
        if self.is_value:
            target, scale = self.parameters[:2]
            scale *= np.sqrt(self.weight)
            return (own[:, 0] - target) * scale, np.full_like(own, scale)
        value, slopes = self.log_odds(own)
        scale = np.sqrt(self.weight) / ASKED_ODDS
        behind = np.maximum(MARGIN - value, 0.0) * scale
        return behind, -scale * np.where(behind > 0, 1.0, 0.0)[:, None] * slopes

    def log_odds(self, own: Array) -> tuple[Array, Array]:
        """Of its truth (n,), and their derivatives (n, columns)."""
        v, slopes = self.value(own)[:2]
        untrue = np.maximum(-np.expm1(v), TINY)
        return v - np.log(untrue), slopes / untrue[:, None]

    def value(self, own: Array) -> tuple[Array, Array, Array]:
        return evaluate(self.term.program, np.broadcast_to(self.parameters, (len(own), len(self.parameters))), own)

    def log_p(self, u: Array) -> Array:
        own = u[:, self.columns]
        if self.is_value:
            return within(own[:, 0] - self.parameters[0], self.slack, 0.5 * self.slack)
        return self.value(own)[0]


def log_odds(own: Array, goal: Array) -> tuple[Array, Array]:
    """Log-odds (n,) of the classes ``goal`` (n,), and their derivatives, from what is read of an attribute."""
    if own.shape[1] == 1:
        sign = 2.0 * goal - 1.0
        return sign * own[:, 0], sign[:, None]
    chosen = goal[:, None] == np.arange(own.shape[1])
    others = np.where(chosen, -np.inf, own)
    top = others.max(axis=1, keepdims=True)
    shares = np.exp(others - top)
    whole = shares.sum(axis=1, keepdims=True)
    return own[chosen] - (top + np.log(whole))[:, 0], chosen - shares / whole


def within(error: Array, limit: float, spread: float) -> Array:
    """log P (n,) that a value is at most ``limit`` off where its reading is off by ``error``, by normal errors."""
    return log_ndtr((limit - np.abs(error)) / spread)[0]
