"""Who reads what: the columns of a bundle's heads, and which rows of a call read which of them.

A call of the field serves rows with different conditions. It runs a head for the rows that mention it, and pulls back
as many cotangents as they have columns; nothing is padded to the longest condition. What the conditions have in common
is interpreted together.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
from numpy import ndarray as Array

from engine.bundle import Bundle
from engine.reference.terms import Term, terms
from engine.tape import Column, Tape, by_tape


@dataclass(frozen=True, slots=True)
class Inputs:
    """What tapes may read: the columns of a bundle's heads, numbered.

    head (columns,)           the head of each column, by its position in the bundle; they are in that order
    first (heads + 1,)        the first column of each head
    plus, minus (columns,)    u = logits[plus] - logits[minus]; the last of the logits is a zero
    combinations              by head: its columns by its logits (k, C), in the order of their numbers
    spans, count              by head: its part of all logits; how many there are
    in_z                      the heads that read z
    """

    number: Mapping[Column, int]
    head: Array
    first: Array
    plus: Array
    minus: Array
    combinations: Mapping[str, Array]
    spans: Mapping[str, slice]
    count: int
    in_z: frozenset[str]

    @classmethod
    def of(cls, bundle: Bundle) -> "Inputs":
        names = list(bundle.heads)
        ends = np.cumsum([0, *(head.widths[-1] for head in bundle.heads.values())])
        spans = {name: slice(*ends) for name, ends in zip(names, pairwise(map(int, ends)), strict=True)}
        found: list[tuple[Column, int, int, int]] = []
        for attribute in bundle.attributes.values():
            head, first = names.index(attribute.head), spans[attribute.head].start + attribute.columns[0]
            found += [(Column(attribute.name, i), head, first + i, ends[-1]) for i in range(attribute.width)]
            if attribute.width == 2:
                found.append((Column(attribute.name, None), head, first + 1, first))
        found.sort(key=lambda entry: entry[1])
        rows = np.eye(ends[-1] + 1)
        head, plus, minus = (np.array([entry[i] for entry in found], np.intp) for i in (1, 2, 3))
        combined = np.where((minus < ends[-1])[:, None], rows[plus] - rows[minus], rows[plus])
        combinations = {name: combined[head == i][:, spans[name]] for i, name in enumerate(names)}
        in_z = frozenset(name for name in names if bundle.heads[name].space == "z")
        numbers = {entry[0]: i for i, entry in enumerate(found)}
        first = np.searchsorted(head, np.arange(len(names) + 1))
        return cls(numbers, head, first, plus, minus, combinations, spans, int(ends[-1]), in_z)

    def numbers(self, tape: Tape) -> Array:
        """Of the columns that a tape reads."""
        return np.array([self.number[column] for column in tape.columns], np.intp)


@dataclass(frozen=True, slots=True)
class Use:
    """A head and who reads it.

    rows          positions (m,) of the rows that read it; None: all
    wanted (k,)   the columns that they read, as positions among the head's
    pairs         the pairs that read it, and where they find it: ``local`` among the rows, ``k`` among the wanted
    """

    head: str
    rows: Array | None
    wanted: Array
    pairs: Array
    local: Array
    k: Array


@dataclass(frozen=True, slots=True)
class Shared:
    """A term of conditions that m places of the rows' tapes have.

    program, parameters (m, P)   see engine.reference.tape.evaluate
    part, shape   its columns among those of all terms one after the other, and (m, k)
    """

    program: tuple
    parameters: Array
    part: slice
    shape: tuple[int, int]


class Routing:
    """Who reads what, for n rows with given tapes.

    A pair is a row and one of its cotangents: its columns, and ``near`` as the last. Pairs are in the order of rows.

    row, slot, column (c,)   of each pair that is a column, and ``pair`` its number
    near (m,), near_pair     rows with ``near``, and its pair
    each                     pairs of every row, None if rows differ
    source                   of each pair, its place among the rows of Jacobian of all uses, (m, k) of one after the
                             other, and the rows of ``near`` after them
    reads_z                  whether some head reads z
    is_even                  whether pairs are columns, and every row has as many: (n, width) in one line
    heads                    what ``Field.linearise`` is told of the heads, once it has been
    shared                   what the tapes say, each term once
    plus, minus              of the terms' columns, in the order of ``shared``: u is the difference of these two among
                             all logits, (n, L + 1) in one line
    places                   where the terms' values, gradients and curvatures belong among those of all rows, (n,),
                             (n, width) and (n, width, width) in one line
    """

    def __init__(self, tapes: Sequence[Tape], inputs: Inputs):
        self.tapes, n = tapes, len(tapes)
        self.heads: dict[str, tuple[Array, Array]] | None = None
        columns = np.array([len(tape.columns) for tape in tapes], np.intp)
        is_near = np.array([tape.near > 0 for tape in tapes], bool)
        self.counts = counts = columns + is_near
        self.starts = starts = np.cumsum(counts) - counts
        self.width, self.count = int(columns.max(initial=0)), int(counts.sum())
        self.row, self.slot = enumerate_pairs(columns)
        self.pair = starts[self.row] + self.slot
        distinct = by_tape(tapes)
        numbers = {id(tape): inputs.numbers(tape) for tape, _ in distinct}
        self.column = np.concatenate([numbers[id(tape)] for tape in tapes]) if n else np.empty(0, np.intp)
        self.near = np.flatnonzero(is_near)
        self.near_pair = starts[self.near] + columns[self.near]
        self.each = int(counts[0]) if n and (counts == counts[0]).all() else None
        self.is_even = self.each is not None and not len(self.near)
        self.pair_row = np.repeat(np.arange(n), counts)
        self.shared, rows, slots = share(distinct)
        self.place(rows, slots, inputs)
        self.source = np.empty(self.count, np.int64)
        self.uses = self.find_uses(n, inputs)
        self.reads_z = any(use.head in inputs.in_z for use in self.uses)

    def place(self, rows: Sequence[Array], slots: Sequence[Array], inputs: Inputs) -> None:
        """``plus``, ``minus`` and ``places``, from each term's rows (m,) and its columns' slots (m, k) there."""
        width, number = self.width, np.zeros(len(self.tapes) * self.width, np.intp)
        number[self.row * width + self.slot] = self.column
        columns = [row[:, None] * width + slot for row, slot in zip(rows, slots, strict=True)]
        squares = [own[:, :, None] * width + slot[:, None, :] for own, slot in zip(columns, slots, strict=True)]
        self.places = [joined(parts) for parts in (rows, columns, squares)]
        read, row = number[self.places[1]], self.places[1] // max(width, 1) * (inputs.count + 1)
        self.plus, self.minus = row + inputs.plus[read], row + inputs.minus[read]

    def find_uses(self, n: int, inputs: Inputs) -> list[Use]:
        """The heads that are read, in the order of the bundle; and ``source``."""
        head, names = inputs.head[self.column], list(inputs.combinations)
        needs, is_read = np.zeros((n, len(names)), bool), np.zeros(len(inputs.head), bool)
        needs[self.row, head], is_read[self.column] = True, True
        local = (np.cumsum(needs, axis=0) - 1)[self.row, head]
        before = np.cumsum([False, *is_read])  # columns that are read, before each
        k, wanted = before[self.column] - before[inputs.first[head]], np.diff(before[inputs.first])
        size = needs.sum(axis=0) * wanted
        begin = np.cumsum(size) - size
        self.source[self.pair] = begin[head] + local * wanted[head] + k
        self.source[self.near_pair] = size.sum() + np.arange(len(self.near))
        uses = []
        for i in np.flatnonzero(size):
            rows, reads = np.flatnonzero(needs[:, i]), np.flatnonzero(head == i)
            columns = np.flatnonzero(is_read[inputs.first[i] : inputs.first[i + 1]])
            some = None if len(rows) == n else rows
            uses.append(Use(names[i], some, columns, self.pair[reads], local[reads], k[reads]))
        return uses

    @cached_property
    def slots(self) -> list[tuple[Array | slice, Array | slice]]:
        """For each slot: rows that have it, and their pairs."""
        if self.each is not None:
            return [(slice(None), slice(s, None, self.each)) for s in range(self.each)]
        having = (np.flatnonzero(self.counts > s) for s in range(int(self.counts.max(initial=0))))
        return [(rows, self.starts[rows] + s) for s, rows in enumerate(having)]

    def add_up(self, weights: Array, vectors: Array, n: int) -> Array:
        """weights (pairs,), vectors (pairs, d) -> each row's weighted sum (n, d), slot by slot: its own bits."""
        total = np.zeros((n, vectors.shape[1]), vectors.dtype)
        for rows, pairs in self.slots:
            total[rows] += weights[pairs, None] * vectors[pairs]
        return total


def enumerate_pairs(counts: Array) -> tuple[Array, Array]:
    """counts (n,) -> the row and the slot of each pair, in the order of rows."""
    row = np.repeat(np.arange(len(counts)), counts)
    return row, np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)


def share(distinct: Sequence[tuple[Tape, Sequence[int]]]) -> tuple[list[Shared], list[Array], list[Array]]:
    """What the tapes say, term by term, in an order of the terms: a row's sums must not depend on its neighbours.

    distinct   each different tape with the rows that have it
    returns    the terms; of each its m rows, and the slots (m, k) of its columns there
    """
    found: dict[tuple, list[tuple[Tape, Sequence[int], Term]]] = {}
    for tape, rows in distinct:
        for term in terms(tape.program):
            found.setdefault(term.program, []).append((tape, rows, term))
    shared, all_rows, all_slots, end = [], [], [], 0
    for program, places in sorted(found.items(), key=lambda entry: entry[0]):
        rows = np.array([row for _, some, _ in places for row in some], np.intp)
        again = np.repeat(np.arange(len(places)), [len(some) for _, some, _ in places])
        slots = np.array([term.columns for *_, term in places], np.intp)[again]
        parameters = np.array([tape.parameters[term.parameters] for tape, _, term in places])[again]
        shared.append(Shared(program, parameters, slice(end, end := end + slots.size), slots.shape))
        all_rows.append(rows)
        all_slots.append(slots)
    return shared, all_rows, all_slots


def joined(parts: Sequence[Array]) -> Array:
    """One after the other, in one line."""
    return np.concatenate([part.ravel() for part in parts]) if parts else np.empty(0, np.intp)
