"""Edits that change one thing: several ways, of which each row takes the one that is sure and changes least.

Every way begins at a latent and settles (engine/solvers/least_squares.py) what is asked against what is held, near the
anchor: the picture with which a chain of edits began. The first way begins where the sample is, in w along the leading
components of W. Rows that it leaves unsure, or changed, go on: from where the flow leads, in w and in z, and from where
they are in z. A row that shows what is asked before any step stays as it is.

A head is read as the mean of its two stacks: where no plain sample is, the sharp one may be satisfied by what no
picture shows, and the smooth one reads what is merely correlated; what convinces both is more often in the picture.
What has changed is said by the sharp stack.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
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
# Of the distance to the anchor, in units in which z, and W in the mean of all directions, have variance 1.
PULL = 1.0


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

    z (n, z_dim)      where ``has_z``, else the z that the way began with
    w (n, w_dim);  u, sharp: see Reading
    asked, kept (n,)  log P of what is asked, and of nothing else having moved
    spent (n, 3)      steps, evaluations, steps taken back, of all ways
    """

    z: Array
    has_z: Array
    w: Array
    u: Array
    sharp: dict[str, Array]
    asked: Array
    kept: Array
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
        for name in ("z", "has_z", "w", "u", "asked", "kept"):
            getattr(self, name)[into] = getattr(other, name)[better]
        for name, logits in self.sharp.items():
            logits[into] = other.sharp[name][better]


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """n rows that ask and hold the same, at their own places.

    z (n, z_dim)   where they are, None if they have no z;  w (n, w_dim)
    has_z (n,)     whether ``w`` came of ``z``; else z is the anchor's
    anchor_z, anchor_w   what they hold on to
    psi (n, 1), label (n,)
    """

    z: Array | None
    has_z: Array
    w: Array
    anchor_z: Array | None
    anchor_w: Array
    psi: Array
    label: Array


class Ladder:
    """The ways of rows that share aims.

    follow   rows -> (latents, w) where the flow leads them: in z, or in w for rows without z; and evaluations (m,)
    """

    def __init__(self, bundle: Bundle, flows: Flows, reader: Reader, aims: Aims, rows: Rows,
                 follow: Callable[[Array], tuple[Array, Array, Array]]):
        self.bundle, self.flows, self.reader, self.aims, self.rows, self.follow = (
            bundle, flows, reader, aims, rows, follow)
        self.spaces, self.dtype = bundle.spaces, flows.solving.dtype

    def climb(self, anchors: Array) -> Ends:
        """The best of all ways, of each row. anchors (n, R): what is read there."""
        rows = self.rows
        every = np.arange(len(rows.w))
        best = self.ends(every, rows.w, rows.z, rows.has_z, np.zeros((len(every), 3), int))
        calm = self.aims.log_kept(anchors, every) + np.log(CALM)
        for way in self.ways():
            doubtful = np.flatnonzero(~((best.asked > np.log(SURE)) & (best.kept >= calm)))
            if not len(doubtful):
                break
            for ends in way(doubtful):
                best.take(doubtful, ends)
        return best

    def ways(self) -> Sequence[Callable[[Array], Iterable[Ends]]]:
        return [self.from_here_in_w, self.from_the_flow, *([] if self.rows.z is None else [self.from_here_in_z])]

    def from_here_in_w(self, rows: Array) -> Iterable[Ends]:
        yield self.in_w(rows, self.rows.w[rows])

    def from_here_in_z(self, rows: Array) -> Iterable[Ends]:
        assert self.rows.z is not None
        yield self.in_z(rows, self.rows.z[rows])

    def from_the_flow(self, rows: Array) -> Iterable[Ends]:
        latents, w, evaluations = self.follow(rows)
        undone = self.in_w(rows, w)
        undone.spent[:, 1] += evaluations
        yield undone
        if self.rows.z is not None:
            yield self.in_z(rows, latents)

    def in_w(self, rows: Array, start: Array) -> Ends:
        """Settle along the components of W, from w (m, w_dim)."""
        components = self.bundle.components
        start, basis = start.astype(float), components.basis
        way = each(start - self.rows.anchor_w[rows], basis)
        with self.flows.borrow(self.spaces["w"]) as flow:

            def evaluate(part: Array, x: Array) -> tuple[Array, Array]:
                reading = self.read(flow, rows[part], start[part] + each(x, basis.T), slopes=True)
                residuals, slopes = self.aims.residuals(rows[part], reading.u)
                return residuals, np.matmul(np.matmul(slopes, reading.slopes), basis)

            x, *spent = settle(evaluate, way, PULL / components.variance, STEPS)
        return self.ends(rows, start + each(x, basis.T), None, np.zeros(len(rows), bool), counts(*spent))

    def in_z(self, rows: Array, start: Array) -> Ends:
        """Settle in z, from z (m, z_dim)."""
        start = start.astype(float)
        assert self.rows.anchor_z is not None
        way = start - self.rows.anchor_z[rows]
        with self.flows.borrow(self.spaces["z"]) as flow:

            def evaluate(part: Array, x: Array) -> tuple[Array, Array]:
                reading = self.read(flow, rows[part], start[part] + x, slopes=True)
                residuals, slopes = self.aims.residuals(rows[part], reading.u)
                on_w = np.matmul(slopes, reading.slopes).astype(self.dtype)
                return residuals, flow.field.pullback(on_w).astype(float)

            x, *spent = settle(evaluate, way, PULL, STEPS)
        return self.ends(rows, None, start + x, np.ones(len(rows), bool), counts(*spent))

    def ends(self, rows: Array, w: Array | None, z: Array | None, has_z: Array, spent: Array) -> Ends:
        """What is read where rows have come: w (m, w_dim), or without it z (m, z_dim)."""
        space = self.spaces["z" if w is None else "w"]
        latents = z if w is None else w
        assert latents is not None
        with self.flows.borrow(space) as flow:
            reading = self.read(flow, rows, latents, slopes=False)
        if z is None:
            z = np.zeros((len(rows), 0)) if self.rows.z is None else self.rows.z[rows]
        return Ends(z.astype(self.dtype), has_z.copy(), np.array(reading.w, self.dtype), reading.u, dict(reading.sharp),
                    self.aims.log_asked(reading.u), self.aims.log_kept(reading.u, rows), spent)

    def read(self, flow: Flow, rows: Array, latents: Array, *, slopes: bool) -> Reading:
        latents = np.ascontiguousarray(latents, self.dtype)
        return self.reader.read(flow, latents, self.rows.psi[rows], self.rows.label[rows], slopes=slopes)


def counts(evaluations: Array, rejected: Array) -> Array:
    """Steps, evaluations and steps taken back (n, 3)."""
    return np.stack([evaluations - 1 - rejected, evaluations, rejected], axis=1)


def each(x: Array, matrix: Array) -> Array:
    """x (n, d) @ matrix (d, k), row by row: a product of whole matrices may sum in an order that depends on n."""
    return np.matmul(x[:, None], matrix)[:, 0]
