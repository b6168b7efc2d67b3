"""Exact samples of the posterior: candidates of the prior, accepted or refused by the sharp heads.

engine/reference/posterior.py defines what decides; here a batch's field evaluates, many candidates a call, and the flow
serves the rows that never enter their set.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy import ndarray as Array

from engine.batch import RUNNING, Batch, Start, Status
from engine.bundle import Bundle
from engine.errors import SolveError
from engine.flow import Flow, Solver
from engine.reference.posterior import Ends, Settings, sample
from engine.reference.probability import log_probabilities
from engine.solvers.gauss_newton import GaussNewton
from engine.tape import Tape, by_tape

# Candidates of a row that are evaluated together: few at first, because most wishes are common. They decide the cost
# and nothing else.
WAVES = (2, 6, 24, 32)
# Rows of one call of the field.
CALL = 2048
CONFIDENCE, FLOW, NEARER = 0.9, GaussNewton(), GaussNewton(steps=6)


@dataclass(frozen=True, slots=True)
class Posterior:
    """The prior where P(condition) > ``confidence``, or times P(condition)^``guidance``: see Settings, and its default.

    flow     for rows that do not enter their set; they end as NOT_ENTERED
    nearer   what brings far rows nearer before they walk
    """

    confidence: float | None = None
    guidance: float | None = None
    fresh: int = 64
    steps: int = 32
    flow: Solver = FLOW
    nearer: Solver = NEARER

    def __post_init__(self):
        if self.confidence is None and self.guidance is None:
            object.__setattr__(self, "confidence", CONFIDENCE)
        if self.steps is None or self.fresh is None:
            raise SolveError("posterior needs numbers for fresh and steps")
        _ = self.settings  # refuse what does not fit

    def asked(self, confidence: float | None, guidance: float | None, steps: int | None) -> "Posterior":
        """As a request wants it; None: as it is."""
        changes = {} if steps is None else {"steps": int(steps)}
        if confidence is not None or guidance is not None:
            changes |= {"confidence": confidence, "guidance": guidance}
        return replace(self, **changes) if changes else self

    @property
    def settings(self) -> Settings:
        return Settings(self.confidence, self.guidance, self.fresh, self.steps)

    def begin(self, flow: Flow, batch: Batch, rows: Array) -> None:
        """Nothing: a row is drawn in the step that ends it."""

    def step(self, flow: Flow, batch: Batch, rows: Array) -> None:
        """Take all rows to their end."""
        world = FieldWorld(flow, batch, rows, self.nearer)
        seeds, first = ([table[row] for row in rows.tolist()] for table in (batch.seeds, batch.candidates))
        ends = sample(world, seeds, self.settings, first=first, waves=WAVES)
        self.end(flow, batch, rows, ends, *world.read(ends.x))

    def end(self, flow: Flow, batch: Batch, rows: Array, ends: Ends, w: Array, logits: Array) -> None:
        """Into the batch, what its rows have become; w (n, w_dim) and all logits (n, L) are those at ``ends.x``."""
        some = ends.entered
        inside = rows[some]
        if len(inside):
            batch.keep(inside, ends.log_p[some], w[some], logits[some])
            batch.z[inside] = flow.prior.push(ends.x[some], batch.truncation[inside])
            batch.steps[inside] = ends.corrections[some]
            batch.status[inside] = Status.DONE
        if len(inside) < len(rows):
            self.follow_flow(flow, batch, rows[~some])
        batch.walks[rows] = np.stack([ends.exact, ends.candidates, ends.corrections, ends.accepted], axis=1)
        batch.evaluations[rows] += ends.candidates + ends.corrections

    def follow_flow(self, flow: Flow, batch: Batch, rows: Array) -> None:
        """From where the rows began, to the flow's end."""
        ends = run_alone(self.flow, flow, batch, rows, batch.origin[rows])
        batch.z[rows] = ends.z
        batch.counters[rows] += ends.counters
        batch.status[rows] = RUNNING
        flow.measure(batch, rows)
        batch.status[rows] = np.where(ends.status == Status.DONE, Status.NOT_ENTERED, ends.status)


def run_alone(solver: Solver, flow: Flow, batch: Batch, rows: Array, z: Array) -> Batch:
    """A batch of its own with what these rows ask of the flow, from z (n, width) to the solver's end."""
    alone = Batch(len(rows), z.shape[1], batch.w.shape[1], batch.dtype)
    for i, row in enumerate(rows.tolist()):
        alone.admit(i, Start(z=z[i], space=flow.space, tape=batch.tapes[row], psi=float(batch.psi[row, 0]),
                             truncation=float(batch.truncation[row, 0]), label=int(batch.label[row]),
                             seed=batch.seeds[row], anchor_z=z[i],
                             anchor_w=batch.anchor_w[row]))
    every = np.arange(len(rows))
    asks = alone.columns > 0
    alone.status[~asks] = Status.DONE
    if asks.any():
        solver.begin(flow, alone, every[asks])
    while len(running := alone.running()):
        solver.step(flow, alone, running)
    return alone


def stack_names(bundle: Bundle) -> Mapping[str, str]:
    """Of each head, the stack that gives probabilities: the sharp one, where it has one."""
    return {name: f"{name}.sharp" if head.sharp else name for name, head in bundle.heads.items()}


class FieldWorld:
    """Rows of a batch as engine.reference.posterior sees them."""

    def __init__(self, flow: Flow, batch: Batch, rows: Array, nearer: Solver = NEARER):
        self.flow, self.batch, self.rows, self.nearer = flow, batch, rows, nearer
        self.noise_dim = flow.prior.noise_dim
        stacks = stack_names(flow.bundle)
        self.stacks = {name: stacks[a.head] for name, a in flow.bundle.attributes.items()}
        self.kinds = by_tape([batch.wishes[row] for row in rows.tolist()])
        self.kind = np.empty(len(rows), np.intp)
        for i, (_, some) in enumerate(self.kinds):
            self.kind[some] = i

    def log_p(self, rows: Array, x: Array) -> tuple[Array, Array]:
        parts = [self.evaluate(rows[i : i + CALL], x[i : i + CALL])[:2] for i in range(0, len(rows), CALL)]
        return np.concatenate([part[0] for part in parts]), np.concatenate([part[1] for part in parts])

    def evaluate(self, rows: Array, x: Array) -> tuple[Array, Array, Array, dict[str, tuple[Array, Array]]]:
        """log P (n,) relaxed and crisp, w (n, w_dim), and of each stack that is read: positions (m,), logits (m, C)."""
        flow, own = self.flow, self.rows[rows]
        kinds = [(tape, np.flatnonzero(self.kind[rows] == i)) for i, (tape, _) in enumerate(self.kinds)]
        kinds = [(tape, part) for tape, part in kinds if len(part)]
        readers: dict[str, list[Array]] = {}
        for tape, part in kinds:
            for name in {self.stacks[column.attribute] for column in tape.columns}:
                readers.setdefault(name, []).append(part)
        some = {name: np.sort(np.concatenate(parts)) for name, parts in readers.items()}
        z = np.ascontiguousarray(flow.prior.push(x, self.batch.truncation[own]), self.batch.dtype)
        nothing = {name: np.zeros((0, flow.bundle.stacks[name].widths[-1]), z.dtype) for name in some}
        label = self.batch.label[own] if flow.labels else None
        w, found = flow.field.forward(z, self.batch.psi[own], label, nothing,
                                      {name: part for name, part in some.items() if len(part) < len(rows)})
        relaxed, crisp = np.empty(len(rows)), np.empty(len(rows))
        for tape, part in kinds:
            u = self.columns(tape, part, some, found)
            parameters = np.broadcast_to(tape.parameters, (len(part), len(tape.parameters)))
            found_p = log_probabilities(tape.program, parameters, u)
            relaxed[part], crisp[part] = (np.where(np.isfinite(u).all(axis=1), p, np.nan) for p in found_p)
        # What overflowed is nowhere, and no sample.
        lost = ~np.isfinite(w).all(axis=1) | np.isnan(crisp)
        relaxed[lost], crisp[lost] = -np.inf, -np.inf
        return relaxed, crisp, w, {name: (some[name], found[name][0]) for name in some}

    def columns(self, tape: Tape, part: Array, some: Mapping[str, Array], found: Mapping) -> Array:
        """What a tape reads at these positions (n, columns), float64."""
        logits: dict[str, Array] = {}
        for name in dict.fromkeys(column.attribute for column in tape.columns):
            attribute, stack = self.flow.bundle.attributes[name], self.stacks[name]
            at = np.searchsorted(some[stack], part)
            logits[name] = found[stack][0][at, slice(*attribute.columns)].astype(float)
        parts = [column.read(logits) for column in tape.columns]
        return np.stack(parts, axis=1) if parts else np.empty((len(part), 0))

    def approach(self, rows: Array, x: Array) -> Array:
        """By the flow of the smooth heads, and back to a noise that leads where it ended."""
        own, prior = self.rows[rows], self.flow.prior
        psi = self.batch.truncation[own]
        near = run_alone(self.nearer, self.flow, self.batch, own, prior.push(x, psi)).z
        return prior.pull(near, psi).astype(x.dtype)

    def read(self, x: Array) -> tuple[Array, Array]:
        """w (n, w_dim) and all logits (n, L), not a number where a row does not read them, of all rows at x."""
        n, flow = len(x), self.flow
        all_w, logits = np.empty((n, self.batch.w.shape[1]), x.dtype), np.full((n, flow.inputs.count), np.nan, x.dtype)
        for first in range(0, n, CALL):
            part = np.arange(first, min(first + CALL, n))
            _, _, all_w[part], found = self.evaluate(part, x[part])
            for name, (at, values) in found.items():
                logits[part[at], flow.inputs.spans[name.removesuffix(".sharp")]] = values
        return all_w, logits
