"""Edits that change one thing: two ways, of which each row takes the one that is sure and changes least.

A way begins at a w and settles (engine/solvers/least_squares.py) what is asked against what is held, near the anchor:
the picture with which a chain of edits began. It moves along the leading components of W only. The first way begins
where the sample is. Rows that it leaves unsure, or changed, take the second as well, from where the flow leads: there
what the flow did besides is undone. A row that shows what is asked before any step stays as it is.

A head is read as the mean of its two stacks: where no plain sample is, the sharp one may be satisfied by what no
picture shows, and the smooth one reads what is merely correlated; what convinces both is more often in the picture.
What has changed is said by the sharp stack.

The same ways in z, from the sample and from the flow's end, were measured and left out: docs/editing.md.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy import ndarray as Array

from engine.aims import Aims, columns_of
from engine.bundle import Attribute, Bundle
from engine.flow import Flow
from engine.solvers.least_squares import settle
from engine.solving import Flows

# P of what is asked, and the share of the anchor's own P of nothing else moving, with which a row needs no other way.
SURE, CALM = 0.9, 0.9
STEPS = 16  # of each way, at most
# Of the distance to the anchor, in units in which W has variance 1 in the mean of all directions. With less, faces keep
# their labels and become other persons: of the demo's 14 edits (docs/editing.md) at 1, 5, 20 something else changed in
# .37, .40, .46, and the cosine of identity was .61, .66, .71.
PULL = 5.0


@dataclass(frozen=True, slots=True, eq=False)
class Reading:
    """What heads read at n latents.

    w (n, w_dim);  sharp: raw logits (n, C) of the sharp stacks, by attribute
    u (n, R), slopes (n, R, w_dim)   the columns of the mean of both stacks, and their derivatives by w
    """

    w: Array
    sharp: Mapping[str, Array]
    u: Array
    slopes: Array


class Reader:
    """Reads attributes by both stacks of their heads, which read w.

    layout   of each attribute, its part of the R columns
    """

    def __init__(self, bundle: Bundle, attributes: Iterable[Attribute]):
        order = list(bundle.heads)
        self.attributes = sorted(attributes, key=lambda a: (order.index(a.head), a.columns))
        self.layout: dict[str, slice] = {}
        self.seeds: dict[str, Array] = {}  # by head: the columns as combinations of its logits (k, C)
        count = 0
        for attribute in self.attributes:
            own = np.eye(bundle.heads[attribute.head].widths[-1])[slice(*attribute.columns)]
            own = own[1:] - own[:1] if columns_of(attribute)[0].index is None else own
            self.layout[attribute.name] = slice(count, count := count + len(own))
            before = self.seeds.get(attribute.head)
            self.seeds[attribute.head] = own if before is None else np.concatenate([before, own])

    def read(self, flow: Flow, latents: Array, psi: Array, label: Array, *, slopes: bool) -> Reading:
        """At latents (n, width) of the flow's space, in the precision of the runtime."""
        heads = {head: (own if slopes else own[:0]).astype(latents.dtype) for head, own in self.seeds.items()}
        stacks = {name: own for head, own in heads.items() for name in (head, f"{head}.sharp")}
        w, found = flow.field.forward(latents, psi, label if flow.labels else None, stacks)
        sharp = {a.name: found[f"{a.head}.sharp"][0][:, slice(*a.columns)].astype(float) for a in self.attributes}
        smooth = {a.name: found[a.head][0][:, slice(*a.columns)].astype(float) for a in self.attributes}
        means = {name: 0.5 * (sharp[name] + smooth[name]) for name in sharp}
        u = np.stack([column.read(means) for a in self.attributes for column in columns_of(a)], axis=1)
        derivatives = [0.5 * (found[head][1].astype(float) + found[f"{head}.sharp"][1]) for head in heads]
        return Reading(w, sharp, u, np.concatenate(derivatives, axis=1))


@dataclass(slots=True, eq=False)
class Ends:
    """Where n rows have come.

    w (n, w_dim);  u, sharp: see Reading
    asked, kept (n,)  log P of what is asked, and of nothing else having moved
    stayed (n,)       whether they are where they began
    spent (n, 3)      steps, evaluations, steps taken back, of all ways
    """

    w: Array
    u: Array
    sharp: dict[str, Array]
    asked: Array
    kept: Array
    stayed: Array
    spent: Array

    def worth(self) -> Array:
        """The greater, the better (n,): all that are sure of what is asked before all that are not."""
        asked, kept = np.exp(self.asked), np.exp(self.kept)
        worth = np.where(asked > SURE, 1.0 + kept, asked)
        return np.where(np.isfinite(worth) & np.isfinite(self.w).all(axis=1), worth, -1.0)

    def take(self, rows: Array, other: "Ends") -> None:
        """Of these rows, what the other (m,) has found, where that is worth more."""
        self.spent[rows] += other.spent
        better = other.worth() > self.worth()[rows]
        into = rows[better]
        for name in ("w", "u", "asked", "kept", "stayed"):
            getattr(self, name)[into] = getattr(other, name)[better]
        for name, logits in self.sharp.items():
            logits[into] = other.sharp[name][better]


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """Rows that ask and hold the same, at their own places.

    w, anchor_w (n, w_dim)   where they are, and what they hold on to
    psi (n, 1), label (n,)   of the field
    """

    w: Array
    anchor_w: Array
    psi: Array
    label: Array


class Ladder:
    """The ways of rows that share aims.

    follow   rows (m,) -> w (m, w_dim) where the flow leads them, and its evaluations (m,)
    """

    def __init__(self, bundle: Bundle, flows: Flows, reader: Reader, aims: Aims, rows: Rows,
                 follow: Callable[[Array], tuple[Array, Array]]):
        self.flows, self.reader, self.aims, self.rows, self.follow = flows, reader, aims, rows, follow
        self.space, self.components = bundle.spaces["w"], bundle.components

    def climb(self, first: Reading, here: Reading) -> Ends:
        """The best of all ways, of each row; ``first``: what is read at the anchors, ``here``: where the rows are."""
        every = np.arange(len(self.rows.w))
        best = self.ends_of(every, here)
        best.stayed[:] = True
        calm = self.aims.log_kept(first.u, every) + np.log(CALM)
        for way in (self.from_here, self.from_the_flow):
            is_finite = np.isfinite(best.w).all(axis=1)  # nothing leads away from infinity
            doubtful = np.flatnonzero(is_finite & ~((best.asked > np.log(SURE)) & (best.kept >= calm)))
            if not len(doubtful):
                break
            best.take(doubtful, way(doubtful))
        return best

    def from_here(self, rows: Array) -> Ends:
        return self.settle(rows, self.rows.w[rows])

    def from_the_flow(self, rows: Array) -> Ends:
        """What the flow did besides what was asked is undone."""
        w, evaluations = self.follow(rows)
        ends = self.settle(rows, w)
        ends.spent[:, 1] += evaluations
        return ends

    def settle(self, rows: Array, start: Array) -> Ends:
        """Along the components of W, from w (m, w_dim)."""
        start, basis = start.astype(float), self.components.basis
        way = each(start - self.rows.anchor_w[rows], basis)
        with self.flows.borrow(self.space) as flow:

            def evaluate(part: Array, x: Array) -> tuple[Array, Array]:
                reading = self.read(flow, rows[part], start[part] + each(x, basis.T), slopes=True)
                residuals, slopes = self.aims.residuals(rows[part], reading.u)
                return residuals, np.matmul(np.matmul(slopes, reading.slopes), basis)

            x, evaluations, rejected = settle(evaluate, way, PULL / self.components.variance, STEPS)
            reading = self.read(flow, rows, start + each(x, basis.T), slopes=False)
        ends = self.ends_of(rows, reading)
        ends.spent += np.stack([evaluations - 1 - rejected, evaluations, rejected], axis=1)
        return ends

    def ends_of(self, rows: Array, reading: Reading) -> Ends:
        """Of the rows (m,) where this is read, in one evaluation."""
        count = len(rows)
        return Ends(np.array(reading.w), reading.u.copy(), {name: x.copy() for name, x in reading.sharp.items()},
                    self.aims.log_asked(reading.u), self.aims.log_kept(reading.u, rows), np.zeros(count, bool),
                    np.tile(np.array([0, 1, 0]), (count, 1)))

    def read(self, flow: Flow, rows: Array, w: Array, *, slopes: bool) -> Reading:
        latents = np.ascontiguousarray(w, self.flows.solving.dtype)
        return self.reader.read(flow, latents, self.rows.psi[rows], self.rows.label[rows], slopes=slopes)


def each(x: Array, matrix: Array) -> Array:
    """x (n, d) @ matrix (d, k), row by row: a product of whole matrices may sum in an order that depends on n."""
    return np.matmul(x[:, None], matrix)[:, 0]
