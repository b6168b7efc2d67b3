"""Who reads what: the columns of a bundle's heads, and which rows of a call read which of them.

A call of the field serves rows with different conditions. It runs a head for the rows that mention it, and pulls back
as many cotangents as they have columns; nothing is padded to the longest condition.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy import ndarray as Array

from engine.bundle import Bundle
from engine.tape import Column, Tape


@dataclass(frozen=True, slots=True)
class Inputs:
    """What tapes may read: the columns of a bundle's heads, numbered.

    head (columns,)           the head of each column, by its position in the bundle
    plus, minus (columns,)    u = logits[plus] - logits[minus]; the last of the logits is a zero
    seeds                     by head: its columns as combinations of its logits (k, C), in the order of their numbers
    spans, count              by head: its part of all logits; how many there are
    in_z                      the heads that read z
    """

    number: Mapping[Column, int]
    head: Array
    plus: Array
    minus: Array
    seeds: Mapping[str, Array]
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
        seeds = {name: combined[head == i][:, spans[name]] for i, name in enumerate(names)}
        in_z = frozenset(name for name in names if bundle.heads[name].space == "z")
        numbers = {entry[0]: i for i, entry in enumerate(found)}
        return cls(numbers, head, plus, minus, seeds, spans, int(ends[-1]), in_z)


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


class Routing:
    """Who reads what, for n rows with given tapes.

    A pair is a row and one of its cotangents: its columns, and ``near`` as the last. Pairs are in the order of rows.

    row, slot, column (c,)   of each pair that is a column, and ``pair`` its number
    near (m,), near_pair     rows with ``near``, and its pair
    slots                    for each slot: rows that have it, and their pairs
    each                     pairs of every row, None if rows differ
    source                   of each pair, its place among all the slopes that its uses give, (m, k) of one after the
                             other, and the rows of ``near`` after them
    reads_z                  whether some head reads z
    programs                 rows that share a program
    """

    def __init__(self, tapes: Sequence[Tape], inputs: Inputs):
        self.tapes, n = tapes, len(tapes)
        columns = np.array([len(tape.columns) for tape in tapes])
        is_near = np.array([tape.near > 0 for tape in tapes])
        counts = columns + is_near
        starts = np.cumsum(counts) - counts
        self.width, self.count = int(columns.max(initial=0)), int(counts.sum())
        self.row, self.slot = enumerate_pairs(columns)
        self.pair = starts[self.row] + self.slot
        self.column = np.array([inputs.number[column] for tape in tapes for column in tape.columns], np.intp)
        self.near = np.flatnonzero(is_near)
        self.near_pair = starts[self.near] + columns[self.near]
        self.each = int(counts[0]) if n and (counts == counts[0]).all() else None
        self.pair_row = np.repeat(np.arange(n), counts)
        self.slots: list[tuple[Array | slice, Array | slice]] = []
        for s in range(int(counts.max(initial=0))):
            rows = np.flatnonzero(counts > s)
            uniform = (slice(None), slice(s, None, self.each))
            self.slots.append((rows, starts[rows] + s) if self.each is None else uniform)
        self.programs = list(grouped(tapes))
        self.uses = list(self.find_uses(n, inputs))
        self.reads_z = any(use.head in inputs.in_z for use in self.uses)
        self.source, first = np.empty(self.count, np.int64), 0
        for use in self.uses:
            self.source[use.pairs] = first + use.local * len(use.wanted) + use.k
            first += (n if use.rows is None else len(use.rows)) * len(use.wanted)
        self.source[self.near_pair] = first + np.arange(len(self.near))

    def find_uses(self, n: int, inputs: Inputs) -> Iterator[Use]:
        heads, names = inputs.head[self.column], list(inputs.seeds)
        for head in np.unique(heads):
            reads = np.flatnonzero(heads == head)
            rows, local = np.unique(self.row[reads], return_inverse=True)
            numbers, k = np.unique(self.column[reads], return_inverse=True)
            wanted = numbers - np.searchsorted(inputs.head, head)
            yield Use(names[head], None if len(rows) == n else rows, wanted, self.pair[reads], local, k)

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


def grouped(tapes: Sequence[Tape]) -> Iterator[tuple[tuple, int, Array | slice, Array]]:
    """Rows whose tapes differ in numbers only: program, columns, positions, and parameters (m, P)."""
    groups: dict[tuple[tuple, int], list[int]] = {}
    for i, tape in enumerate(tapes):
        groups.setdefault((tape.program, len(tape.columns)), []).append(i)
    for (program, columns), part in groups.items():
        parameters = np.stack([tapes[i].parameters for i in part])
        yield program, columns, slice(None) if len(groups) == 1 else np.array(part), parameters
