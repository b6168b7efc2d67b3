"""The vector field of the flow: grad log p(c | z) for every row, each with its own condition.

``log p`` factors into the network z -> w -> u and a small function of u, the tape. So the gradient is
``J^T g`` with J = du/dz of the few columns that the row's tape reads, and the Gauss-Newton curvature is
``J^T C J``. The mapping runs once per call whatever the number of attributes; a head runs for the rows that
mention it, and as many cotangents are pulled back as rows have columns.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Protocol

import numpy as np
from numpy import ndarray as Array

from engine.batch import Batch
from engine.bundle import Bundle
from engine.prior import Prior
from engine.reference.tape import evaluate as interpret
from engine.routing import Inputs, Routing, Use
from engine.runtimes import Field
from engine.spaces import Space
from engine.tape import Tape

# Routings that are kept. A batch whose rows share a condition needs one for each number of rows that are left; in a
# queue of mixed requests none comes again, and each takes 100 kB.
ROUTINGS = 16


@dataclass(slots=True)
class Point:
    """The field at one z per row.

    logp (n,), w (n, w_dim), logits (n, L) of all heads, not-a-number where a row's call did not need them,
    gradient (n, width) and cotangents (n, R), the gradient in the tape's columns; with ``linear`` also jacobian
    (n, R, width) and curvature (n, R, R). A row fills as many entries as its tape has columns.
    """

    logp: Array
    w: Array
    logits: Array
    gradient: Array
    cotangents: Array
    jacobian: Array
    curvature: Array

    def some(self, part: Array) -> "Point":
        """Of the rows at these positions."""
        return Point(self.logp[part], self.w[part], self.logits[part], self.gradient[part], self.cotangents[part],
                     self.jacobian[part], self.curvature[part])


class Flow:
    """A field in a space of latents, the attributes it serves, and the prior of the latents."""

    def __init__(self, field: Field, bundle: Bundle, space: Space, prior: Prior):
        self.bundle, self.space, self.prior = bundle, space, prior
        self.field, self.labels = field, bundle.generator.labels
        self.routings: dict[tuple[int, ...], Routing] = {}
        self.is_fused = False  # whether the last rows were linearised in one call

    @cached_property
    def inputs(self) -> Inputs:
        return Inputs.of(self.bundle)

    def route(self, batch: Batch, rows: Array) -> Routing:
        """The routing of these rows. It depends on their tapes alone, and these come again."""
        tapes = [batch.tapes[row] for row in rows.tolist()]
        key = tuple(map(id, tapes))  # a routing keeps its tapes alive, so that nothing else gets their identities
        found = self.routings.get(key)
        if found is None:
            if len(self.routings) >= ROUTINGS:
                del self.routings[next(iter(self.routings))]  # the oldest
            found = self.routings[key] = Routing(tapes, self.inputs)
        return found

    def evaluate(self, batch: Batch, rows: Array, z: Array, *, linear: bool) -> Point:
        """Evaluate at ``z`` (n, width), one latent for each of ``rows``."""
        n, width = z.shape
        routing = self.route(batch, rows)
        pulled = on_w = on_z = np.empty(0)
        if linear:
            w, logits, pulled = self.linearise(batch, rows, z, routing)
        else:
            w, logits, on_w, on_z = self.cotangents(batch, rows, z, routing)
        logp, cotangents, curvature = self.interpret(routing, logits)
        point = Point(logp, w, logits[:, :-1], np.zeros((n, width), z.dtype), cotangents, np.empty(0), curvature)
        on_near = self.add_near(batch, rows, z, point, routing)
        if linear:
            if routing.is_even:
                point.jacobian = pulled.reshape(n, routing.width, width)
            else:
                point.jacobian = np.zeros((n, routing.width, width), z.dtype)
                point.jacobian[routing.row, routing.slot] = pulled[routing.pair]
            # One slot after the other, unlike a product of matrices: zeros behind a row's slots leave its bits alone.
            point.gradient += np.einsum("nr,nrd->nd", cotangents.astype(z.dtype), point.jacobian)
            if len(on_near):
                point.gradient[routing.near] += on_near[:, None] * pulled[routing.near_pair]
        elif routing.count:
            weights = np.empty(routing.count, z.dtype)
            weights[routing.pair], weights[routing.near_pair] = cotangents[routing.row, routing.slot], on_near
            # The gradient alone needs one cotangent a row instead of one a column.
            point.gradient += self.field.pullback(routing.add_up(weights, on_w, n)[:, None])[:, 0]
            if routing.reads_z:
                point.gradient += routing.add_up(weights, on_z, n)
        return point

    def linearise(self, batch: Batch, rows: Array, z: Array, routing: Routing) -> tuple[Array, Array, Array]:
        """w, all logits (n, L + 1), and every pair's cotangent on z (pairs, width): in one call, if the field can."""
        self.is_fused = self.field.linearise is not None and not routing.reads_z
        if self.is_fused:
            return self.linearise_at_once(batch, rows, z, routing)
        w, logits, on_w, on_z = self.cotangents(batch, rows, z, routing)
        return w, logits, self.pull_back(routing, len(rows), on_w, on_z)

    def linearise_at_once(self, batch: Batch, rows: Array, z: Array, routing: Routing,
                          *, derivatives: bool = True) -> tuple[Array, Array, Array]:
        """The same by ``Field.linearise``; without derivatives nothing is pulled back."""
        assert self.field.linearise is not None
        label = batch.label[rows] if self.labels else None
        if routing.heads is None:
            everybody = np.arange(len(rows))
            routing.heads = {use.head: (everybody if use.rows is None else use.rows, self.combinations(use, z.dtype))
                             for use in routing.uses}
        heads, some = routing.heads, slice(None)
        if not derivatives:
            heads, some = {name: (who, wanted[:0]) for name, (who, wanted) in heads.items()}, slice(0)
        near = routing.near[some]
        w, found, pulled = self.field.linearise(z, batch.psi[rows], label, heads, routing.pair_row[some],
                                                routing.source[some], near, batch.anchor_w[rows[near]])
        return w, self.all_logits(len(rows), routing, found, z.dtype), pulled

    def cotangents(self, batch: Batch, rows: Array, z: Array,
                   routing: Routing) -> tuple[Array, Array, Array, Array]:
        """w, all logits (n, L + 1), and every pair's cotangent on w (pairs, w_dim) and on z (pairs, width)."""
        w, logits, jacobians = self.forward(batch, rows, z, routing)
        on_w = np.zeros((routing.count, w.shape[1]), z.dtype)
        on_z = np.zeros((routing.count, z.shape[1] if routing.reads_z else 0), z.dtype)
        for use, jacobian in zip(routing.uses, jacobians, strict=True):
            target = on_w if self.bundle.heads[use.head].space == "w" else on_z
            target[use.pairs] = jacobian[use.local, use.k]
        if self.space.is_mapped:  # where z is w, the distance counts once
            on_w[routing.near_pair] = w[routing.near] - batch.anchor_w[rows[routing.near]]
        return w, logits, on_w, on_z

    def forward(self, batch: Batch, rows: Array, z: Array, routing: Routing,
                *, derivatives: bool = True) -> tuple[Array, Array, list[Array]]:
        """w, all logits (n, L + 1), and for each use the Jacobian of its columns."""
        label = batch.label[rows] if self.labels else None
        heads = {use.head: self.combinations(use, z.dtype)[: None if derivatives else 0] for use in routing.uses}
        some = {use.head: use.rows for use in routing.uses if use.rows is not None}
        w, found = self.field.forward(z, batch.psi[rows], label, heads, some)
        logits = self.all_logits(len(rows), routing, {head: pair[0] for head, pair in found.items()}, z.dtype)
        return w, logits, [found[use.head][1] for use in routing.uses]

    def combinations(self, use: Use, dtype: np.dtype) -> Array:
        """The columns that are read, as combinations of the head's logits (k, C)."""
        return self.inputs.combinations[use.head][use.wanted].astype(dtype)

    def all_logits(self, n: int, routing: Routing, found: Mapping[str, Array], dtype: np.dtype) -> Array:
        """(n, L + 1) from those of each use's rows; the last one is the zero that columns may subtract."""
        logits = np.empty((n, self.inputs.count + 1), dtype)
        logits.fill(np.nan)
        logits[:, -1] = 0
        for use in routing.uses:
            logits[slice(None) if use.rows is None else use.rows, self.inputs.spans[use.head]] = found[use.head]
        return logits

    def interpret(self, routing: Routing, logits: Array) -> tuple[Array, Array, Array]:
        """logp (n,), cotangents (n, R) and curvature (n, R, R) of the tapes, float64."""
        n, r = len(logits), routing.width
        if not routing.shared:
            return np.zeros(n), np.zeros((n, r)), np.zeros((n, r, r))
        flat = logits.ravel()
        u = np.subtract(flat[routing.plus], flat[routing.minus], dtype=float)
        found = [interpret(s.program, s.parameters, u[s.part].reshape(s.shape)) for s in routing.shared]
        logp, g, c = (
            np.bincount(places, np.concatenate([value.ravel() for value in values]), size)
            for places, values, size in zip(
                routing.places, zip(*found, strict=True), (n, n * r, n * r * r), strict=True
            )
        )
        return logp, g.reshape(n, r), c.reshape(n, r, r)

    def pull_back(self, routing: Routing, n: int, on_w: Array, on_z: Array) -> Array:
        """Bring every pair's cotangent on w back to z: (pairs, width)."""
        if not routing.count:
            return np.zeros((0, 1), on_w.dtype)
        if routing.each is None:
            pulled = self.field.pullback(on_w[:, None], routing.pair_row)
        else:
            pulled = self.field.pullback(on_w.reshape(n, routing.each, -1))
        pulled = pulled.reshape(routing.count, -1)
        return pulled + on_z if routing.reads_z else pulled

    def add_near(self, batch: Batch, rows: Array, z: Array, point: Point, routing: Routing) -> Array:
        """near: -k (|w - w_a|^2 + |z - z_a|^2). Adds its z part; returns the weights of the cotangents w - w_a."""
        if not len(routing.near):
            return np.empty(0)
        some, here = rows[routing.near], routing.near
        near, dz, dw = batch.near[some], z[here] - batch.anchor_z[some], point.w[here] - batch.anchor_w[some]
        if not self.space.is_mapped:
            dw = np.zeros_like(dw)  # z is w, and the distance counts once
        point.logp[here] -= near * ((dz * dz).sum(axis=1, dtype=float) + (dw * dw).sum(axis=1, dtype=float))
        scale = (-2 * near).astype(z.dtype)
        if len(point.gradient):
            point.gradient[here] += scale[:, None] * dz
        return scale

    @np.errstate(over="ignore", invalid="ignore")  # failed rows are measured too
    def measure(self, batch: Batch, rows: Array) -> None:
        """Without derivatives: w, logits and log p of the rows where they are, into the batch."""
        routing, z = self.route(batch, rows), batch.z[rows]
        # Another session would have memory, and threads that spin, of its own.
        measured = self.linearise_at_once if self.is_fused and not routing.reads_z else self.forward
        w, logits, _ = measured(batch, rows, z, routing, derivatives=False)
        logp, *_ = self.interpret(routing, logits)
        point = Point(logp, w, logits[:, :-1], *[np.empty(0)] * 4)
        self.add_near(batch, rows, z, point, routing)
        batch.keep(rows, logp, w, point.logits)

    def named(self, logits: Array, tape: Tape) -> dict[str, Array]:
        """The logits of the attributes that a tape reads, (C,) each, from all logits (L,)."""
        return {column.attribute: logits[self.places[column.attribute]] for column in tape.columns}

    @cached_property
    def places(self) -> dict[str, slice]:
        """Of each attribute, its part of all logits."""
        firsts = {name: self.inputs.spans[a.head].start for name, a in self.bundle.attributes.items()}
        return {name: slice(firsts[name] + a.columns[0], firsts[name] + a.columns[1])
                for name, a in self.bundle.attributes.items()}


class Solver(Protocol):
    """How rows advance along a flow: see engine.solvers."""

    __dataclass_fields__: ClassVar[dict]

    def begin(self, flow: Flow, batch: Batch, rows: Array) -> None: ...
    def step(self, flow: Flow, batch: Batch, rows: Array) -> None: ...
