"""The vector field of the flow: grad log p(c | z) for every row, each with its own condition.

``log p`` factors into the network z -> w -> u and a small function of u, the tape. So the gradient is
``J^T g`` with J = du/dz of the few columns that the row's tape reads, and the Gauss-Newton curvature is
``J^T C J``. The mapping runs once per call whatever the number of attributes; only heads that some row
mentions run at all.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy import ndarray as Array

from engine.batch import Batch
from engine.bundle import Bundle
from engine.runtimes import Field
from engine.tape import Column, Tape
from kernels.tape import evaluate as interpret


@dataclass(slots=True)
class Point:
    """The field at one z per row.

    logp (n,), w (n, w_dim), gradient (n, width) and cotangents (n, R), the gradient in the tape's columns; with
    ``linear`` also jacobian (n, R, width) and curvature (n, R, R). A row fills as many entries as its tape has columns.
    """

    logp: Array
    w: Array
    gradient: Array
    cotangents: Array
    jacobian: Array
    curvature: Array


class Flow:
    """A field and the attributes it serves."""

    def __init__(self, field: Field, bundle: Bundle, *, in_w: bool = False):
        self.in_w = in_w
        self.field, self.labels = field, bundle.generator.labels
        self.attributes, self.heads = bundle.attributes, bundle.heads

    def evaluate(self, batch: Batch, rows: Array, z: Array, *, linear: bool) -> Point:
        """Evaluate at ``z`` (n, width), one latent for each of ``rows``."""
        n, width = z.shape
        groups = group_by_tape(batch, rows)
        wanted = self.wanted([tape for tape, _ in groups])
        w, found = self.forward(batch, rows, z, wanted, slopes=True)
        r = max((len(tape.columns) for tape, _ in groups), default=0)
        # One more slot than columns: the cotangent of ``near``, which reads w itself.
        weights = np.zeros((n, r + 1), z.dtype)
        point = Point(np.zeros(n), w, np.zeros((n, width), z.dtype), weights[:, :r], np.empty(0), np.zeros((n, r, r)))
        on_w = np.zeros((n, r + 1, w.shape[1]), z.dtype)
        reads_z = any(self.heads[head].space == "z" for head in wanted)
        on_z = np.zeros((n, r + 1, width if reads_z else 0), z.dtype)
        for tape, part in groups:
            k = len(tape.columns)
            u = self.columns(found, tape, part)
            v, g, c = interpret(tape.program, parameters(batch, rows[part]), u)
            point.logp[part], weights[part, :k], point.curvature[part, :k, :k] = v, g, c
            for slot, column in enumerate(tape.columns):
                head = self.attributes[column.attribute].head
                target = on_z if self.heads[head].space == "z" else on_w
                target[part, slot] = found[head][1][part, wanted[head].index(column)]
        near = self.add_near(batch, rows, z, point, on_w[:, r], weights[:, r])
        slots = r + near
        on_z = on_z[:, :slots] if reads_z else None
        return self.pull_back(point, weights[:, :slots], on_w[:, :slots], on_z, linear)

    def pull_back(self, point: Point, weights: Array, on_w: Array, on_z: Array | None, linear: bool) -> Point:
        """Bring the cotangents on w back to z, and sum the gradient."""
        if not linear and on_w.shape[1]:
            # The gradient alone needs one cotangent instead of one per column.
            on_w = weighted_sum(weights, on_w)[:, None]
            on_z = None if on_z is None else weighted_sum(weights, on_z)[:, None]
            weights = np.ones((len(weights), 1), on_w.dtype)
        if not on_w.shape[1]:
            point.jacobian = np.zeros((*point.gradient.shape[:1], 0, point.gradient.shape[1]), point.gradient.dtype)
            return point
        jacobian = self.field.pullback(np.ascontiguousarray(on_w))
        if on_z is not None:
            jacobian = jacobian + on_z
        point.gradient += weighted_sum(weights, jacobian)
        point.jacobian = jacobian[:, : point.curvature.shape[1]]
        return point

    def add_near(self, batch: Batch, rows: Array, z: Array, point: Point, on_w: Array, weight: Array) -> bool:
        """near: -k (|w - w_a|^2 + |z - z_a|^2). Adds its z part, leaves its w part as a cotangent."""
        near = batch.near[rows]
        if not near.any():
            return False
        dz, dw = z - batch.anchor_z[rows], point.w - batch.anchor_w[rows]
        if self.in_w:
            dw = np.zeros_like(dw)  # there z is w, and the distance counts once
        point.logp -= near * ((dz * dz).sum(axis=1, dtype=float) + (dw * dw).sum(axis=1, dtype=float))
        scale = (-2 * near[:, None]).astype(z.dtype)
        point.gradient += scale * dz
        on_w[:] = scale * dw
        weight[:] = 1
        return True

    @np.errstate(over="ignore", invalid="ignore")  # failed rows are measured too
    def measure(self, batch: Batch, rows: Array, z: Array) -> tuple[Array, Array, list[dict[str, Array]]]:
        """Without derivatives: log p (n,), w (n, w_dim), and each row's logits by attribute."""
        groups = group_by_tape(batch, rows)
        w, found = self.forward(batch, rows, z, self.wanted([tape for tape, _ in groups]), slopes=False)
        point = Point(np.zeros(len(rows)), w, np.zeros_like(z), *[np.empty(0)] * 3)
        logits: list[dict[str, Array]] = [{} for _ in rows]
        for tape, part in groups:
            u = self.columns(found, tape, part)
            point.logp[part], _, _ = interpret(tape.program, parameters(batch, rows[part]), u)
            for name in dict.fromkeys(column.attribute for column in tape.columns):
                values = self.logits(found, name)
                for i in part:
                    logits[i][name] = values[i]
        self.add_near(batch, rows, z, point, np.zeros_like(w), np.zeros(len(rows), z.dtype))
        return point.logp, w, logits

    def wanted(self, tapes: Sequence[Tape]) -> dict[str, list[Column]]:
        """The columns that some tape reads, by head."""
        wanted: dict[str, list[Column]] = {}
        for column in dict.fromkeys(column for tape in tapes for column in tape.columns):
            wanted.setdefault(self.attributes[column.attribute].head, []).append(column)
        return wanted

    def forward(self, batch: Batch, rows: Array, z: Array, wanted: Mapping[str, list[Column]], *,
                slopes: bool) -> tuple[Array, dict]:  # fmt: skip
        """w, and for each wanted head its logits and the slopes of the wanted columns."""
        label = batch.label[rows] if self.labels else None
        seeds = {head: self.seeds(head, columns if slopes else [], z.dtype) for head, columns in wanted.items()}
        return self.field.forward(z, batch.psi[rows], label, seeds)

    def seeds(self, head: str, columns: Sequence[Column], dtype: np.dtype) -> Array:
        """Columns as combinations of the head's logits: (k, C)."""
        seeds = np.zeros((len(columns), self.heads[head].widths[-1]), dtype)
        for k, column in enumerate(columns):
            first = self.attributes[column.attribute].columns[0]
            if column.index is None:
                seeds[k, first : first + 2] = -1, 1
            else:
                seeds[k, first + column.index] = 1
        return seeds

    def logits(self, found: Mapping[str, tuple], name: str) -> Array:
        """All logits of an attribute (n, C)."""
        attribute = self.attributes[name]
        return found[attribute.head][0][:, slice(*attribute.columns)]

    def columns(self, found: Mapping[str, tuple], tape: Tape, part: Array) -> Array:
        """The columns u (m, r) that the tape reads, float64."""
        u = np.empty((len(part), len(tape.columns)))
        for slot, column in enumerate(tape.columns):
            logits = self.logits(found, column.attribute)[part]
            if column.index is None:
                np.subtract(logits[:, 1], logits[:, 0], out=u[:, slot], dtype=float)
            else:
                u[:, slot] = logits[:, column.index]
        return u


def parameters(batch: Batch, rows: Array) -> Array:
    """The tapes' numbers (n, P); the tapes of ``rows`` share a program."""
    return np.stack([batch.tapes[row].parameters for row in rows])


def weighted_sum(weights: Array, rows: Array) -> Array:
    """weights (n, k), rows (n, k, d) -> (n, d), slot by slot: the order of the sum does not depend on k."""
    total = weights[:, 0, None] * rows[:, 0]
    for slot in range(1, rows.shape[1]):
        total += weights[:, slot, None] * rows[:, slot]
    return total


def group_by_tape(batch: Batch, rows: Array) -> list[tuple[Tape, Array]]:
    """Rows whose tapes differ in numbers only, as (one of the tapes, positions within ``rows``)."""
    groups: dict[tuple, list[int]] = {}
    for i, row in enumerate(rows):
        tape = batch.tapes[row]
        groups.setdefault((tape.program, tape.columns), []).append(i)
    return [(batch.tapes[rows[part[0]]], np.array(part)) for part in groups.values()]
