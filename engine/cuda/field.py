"""Solvers and fields on the device: whole solves for the solvers that have a kernel, evaluations for the others."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy import ndarray as Array

from engine.batch import Batch
from engine.cuda.engine import MOST_TICKETS, STEPS, Engine, at_least
from engine.cuda.evaluation import INT, REAL
from engine.cuda.memory import Region
from engine.cuda.settings import Steps
from engine.cuda.solve import Plan, Tickets
from engine.cuda.tables import Reading, Shape, put
from engine.flow import Flow
from engine.layout import DTYPES
from engine.routing import enumerate_pairs
from engine.runtimes import ALL, Linearise
from engine.solvers.gauss_newton import GaussNewton
from engine.spaces import Space
from engine.tape import EMPTY


@dataclass(frozen=True, slots=True, eq=False)
class OnDevice:
    """``solver`` on the device: it takes every row of a batch to its end in one call, ``capacity`` rows at a time."""

    engine: Engine
    solver: Steps
    capacity: int
    # Rows that a batch may have: those beyond the capacity wait on the device.
    room = MOST_TICKETS

    def begin(self, flow: Flow, batch: Batch, rows: Array) -> None:
        """Nothing: the first evaluation of a row is the first of its solve."""

    def step(self, flow: Flow, batch: Batch, rows: Array) -> None:
        tickets = Tickets(batch.z[rows], batch.psi[rows, 0], batch.label[rows], batch.near[rows], batch.anchor_z[rows],
                          batch.anchor_w[rows], [batch.tapes[row] for row in rows])
        ends = self.engine.solve(tickets, self.solver, space=flow.space, capacity=self.capacity)
        batch.z[rows], batch.status[rows] = ends.z, ends.status
        batch.keep(rows, ends.logp, ends.w, ends.logits)
        counters = batch.steps, batch.evaluations, batch.rejected, batch.forced
        for counter, found in zip(counters, ends.counters.T, strict=True):
            counter[rows] = found


class CudaField:
    """See engine.runtimes.Field: the kernels of one evaluation, launched from the host."""

    linearise: Linearise | None = None

    def __init__(self, engine: Engine, space: Space):
        self.engine, self.space = engine, space
        # Of the last shape: the launches' memory, and that of the cotangents that are pulled back.
        self.plan: Plan | None = None
        self.given: Region | None = None
        self.rows = 0

    def forward(self, z: Array, psi: Array, label: Array | None, heads: Mapping[str, Array],
                some: Mapping[str, Array] = ALL):
        n, engine, zero = len(z), self.engine, np.zeros(len(z))
        tickets = Tickets(z, psi[:, 0], zero if label is None else label, zero, z, z, [EMPTY] * n)
        with engine.lock:
            engine.device.activate()
            plan, self.rows = self.prepare(n, heads), n
            plan.admit(tickets, Reading(heads, 1), {})
            plan.launch([*plan.evaluation.forward(plan.control["solve"]), *plan.evaluation.head_jacobians()])
            e, network = plan.evaluation, engine.network
            w = self.fetch(e.buffers["trial_w"], (n, e.w_stride)) if self.space.is_mapped else z
            logits = self.fetch(e.buffers["trial_logits"], (n, network.outputs))
            found = {}
            for place, (name, seeds) in enumerate(heads.items()):
                stack, width = network.heads[name], engine.bundle.heads[name].widths[0]
                jacobian = self.fetch(e.tables.part("head_jacobian", place), (n, len(seeds), stack.into))
                if not stack.hidden:  # a linear head has the same Jacobian everywhere
                    jacobian = np.broadcast_to((seeds @ stack.final)[None], (n, *seeds.shape[:1], width))
                found[name] = logits[:, stack.first : stack.first + stack.count], jacobian[:, :, :width]
            engine.device.synchronize()
        # Every head has run for all rows: on a device fewer are no faster.
        found |= {name: (found[name][0][rows], found[name][1][rows]) for name, rows in some.items()}
        return w[:, : engine.bundle.generator.w_dim], found

    def pullback(self, cotangent: Array, rows: Array | None = None) -> Array:
        if not self.space.is_mapped:
            return cotangent
        if rows is None:
            return self.pull_in_parts(cotangent)
        # Every row gets as many slots as the one with the most pairs.
        pairs, each, _ = cotangent.shape
        order = np.argsort(rows, kind="stable")
        place = np.empty(pairs, np.intp)
        place[order] = enumerate_pairs(np.bincount(rows, minlength=self.rows))[1]
        slots = place[:, None] * each + np.arange(each)
        whole = np.zeros((self.rows, int(slots.max(initial=0)) + 1, cotangent.shape[2]), REAL)
        whole[rows[:, None], slots] = cotangent
        return self.pull_in_parts(whole)[rows[:, None], slots]

    def pull_in_parts(self, cotangent: Array) -> Array:
        """(rows, r, w_dim) -> (rows, r, z_dim), as many cotangents a call as there is memory for."""
        assert self.plan is not None
        most = self.plan.shape.slots
        with self.engine.lock:
            self.engine.device.activate()
            parts = [self.pull(cotangent[:, i : i + most]) for i in range(0, cotangent.shape[1], most)]
        return np.concatenate(parts, axis=1)

    def prepare(self, n: int, heads: Mapping[str, Array]) -> Plan:
        """Memory for one evaluation of n rows, and for a cotangent a column and one more."""
        each = [len(seeds) for seeds in heads.values()]
        count = min(at_least(max(1, len(heads)), STEPS), max(1, len(self.engine.bundle.heads)))
        shape = Shape(1 << (n - 1).bit_length(), 1, at_least(sum(each) + 1, STEPS), count,
                      at_least(max([1, *each]), STEPS), self.space)
        if self.plan is None or self.plan.shape != shape:
            engine, w_dim = self.engine, self.engine.bundle.generator.w_dim
            self.plan = Plan(engine.network, engine.kernels, shape, GaussNewton(), loops=False)
            self.given = Region(engine.device, {
                "cotangents": ((shape.capacity, shape.slots, w_dim), REAL),
                "columns": ((shape.slots,), DTYPES["Column"]), "places": ((shape.capacity, shape.slots), INT),
            }, mirrored=True)
        return self.plan

    def pull(self, cotangent: Array) -> Array:
        """Pull cotangents back as if they were the Jacobian of columns that every row reads."""
        plan, given, (n, r, w_dim) = self.plan, self.given, cotangent.shape
        assert plan is not None and given is not None  # noqa: PT018
        given.host["cotangents"].reshape(-1)[: cotangent.size] = cotangent.reshape(-1)
        for j in range(r):
            put(given.host["columns"][j], slopes=given["cotangents"] + j * w_dim * REAL.itemsize, row_stride=r * w_dim,
                minus=-1)
        given.host["places"].reshape(-1)[: n * r].reshape(n, r)[:] = np.arange(r)
        plan.tickets.host["column_count"][:n] = r
        own = {name: int(plan.solve[name]) for name in ("column", "ticket_columns", "columns", "slots")}
        put(plan.solve, column=given["columns"], ticket_columns=given["places"], columns=r, slots=r)
        plan.evaluation.tables.set_slots(r)
        for region in (given, plan.tickets, plan.control, plan.evaluation.tables.region):
            region.upload()
        plan.launch(plan.evaluation.backward(plan.control["solve"]))
        found = self.fetch(plan.evaluation.buffers["trial_jacobian"], (n, r, plan.evaluation.width))
        self.engine.device.synchronize()
        put(plan.solve, **own)
        return found

    def fetch(self, address: int, shape: tuple[int, ...]) -> Array:
        """An array of the device, which is there after ``synchronize``."""
        array = np.empty(shape, REAL)
        self.engine.device.download(array, address)
        return array
