"""Solving one bundle on one device: plans by the shape of the work, made when it first comes and kept."""

import itertools
from collections import OrderedDict
from collections.abc import Callable, Sequence
from threading import RLock
from typing import Any

import numpy as np
from numpy import ndarray as Array

from engine.bundle import Bundle
from engine.cuda.driver import Device
from engine.cuda.evaluation import Kernels
from engine.cuda.memory import Region
from engine.cuda.network import Network
from engine.cuda.settings import Steps
from engine.cuda.solve import Ends, Plan, Tickets
from engine.cuda.tables import Reading, Shape
from engine.solvers.gauss_newton import GaussNewton
from engine.spaces import Space
from engine.tape import Column, Tape

CAPACITIES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
# Rows that one launch takes in; more of them wait on the device, so this bounds memory and not speed.
MOST_TICKETS = 1024
# Other counts grow in these steps, so that conditions of nearly the same size share a graph.
STEPS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
# Plans that are kept: each has the memory of its rows.
MOST_PLANS = 16


def at_least(need: int, steps: Sequence[int]) -> int:
    return next((step for step in steps if step >= need), need)


class Engine:
    """Its functions may be called by several threads; they use the device one after the other.

    capacity   rows on the device at a time
    loops      False: the loop over rounds is on the host, for devices whose driver has no conditional graph nodes
    """

    def __init__(self, device: Device, bundle: Bundle, precision: str, build: Callable[..., Any], *,
                 blocks: dict[str, int], loops: bool = True):
        self.device, self.bundle = device, bundle
        self.lock = RLock()
        self.network = Network(device, bundle, precision)
        self.kernels = Kernels(device, precision, build, blocks)
        self.loops = loops and self.kernels.has_loop
        self.plans: OrderedDict[tuple, Plan] = OrderedDict()

    def solve(self, tickets: Tickets, solver: Steps, *, space: Space, capacity: int,
              then: Callable[[Region], None] | None = None) -> Ends:
        """Run all tickets to their end; for ``then`` see Plan.run. Raises BackendError if the device fails."""
        with self.lock:
            self.device.activate()
            reading, places = self.read(tickets, linear=isinstance(solver, GaussNewton))
            plan = self.plan(self.shape(tickets, reading, capacity, space), solver)
            return plan.run(tickets, reading, places, then)

    def read(self, tickets: Tickets, *, linear: bool) -> tuple[Reading, dict[Column, int]]:
        """The heads that the tapes mention, their columns, and the place of each column in the table of all."""
        columns = dict.fromkeys(itertools.chain.from_iterable(tape.columns for tape in distinct(tickets.tapes)))
        by_head: dict[str, list[Column]] = {}
        for column in columns:
            by_head.setdefault(self.bundle.attributes[column.attribute].head, []).append(column)
        ordered = itertools.chain.from_iterable(by_head.values())
        near = bool(np.any(tickets.near > 0))
        slots = max(len(tape.columns) for tape in tickets.tapes) + near if linear else 1
        heads = {head: self.seeds(head, some) for head, some in by_head.items()}
        return Reading(heads, max(slots, 1)), {column: place for place, column in enumerate(ordered)}

    def seeds(self, head: str, columns: Sequence[Column]) -> Array:
        """Columns as combinations of the head's logits: (columns, logits)."""
        seeds = np.zeros((len(columns), self.network.heads[head].count), np.float32)
        for k, column in enumerate(columns):
            first = self.bundle.attributes[column.attribute].columns[0]
            if column.index is None:
                seeds[k, first : first + 2] = -1, 1
            else:
                seeds[k, first + column.index] = 1
        return seeds

    def shape(self, tickets: Tickets, reading: Reading, capacity: int, space: Space) -> Shape:
        rows = at_least(min(len(tickets), capacity, CAPACITIES[-1]), CAPACITIES)
        widest = max(1, *(len(tape.columns) for tape in tickets.tapes))
        columns = at_least(widest, STEPS)
        # The slot of near comes on top, so that its absence costs nothing.
        slots = 1 if reading.slots == 1 else columns + (reading.slots > widest)
        heads = at_least(max(1, len(reading.heads)), STEPS)
        each = at_least(max([1, *(len(seeds) for seeds in reading.heads.values())]), STEPS)
        return Shape(rows, columns, slots, min(heads, max(1, len(self.bundle.heads))), each, space)

    def plan(self, shape: Shape, solver: Steps) -> Plan:
        key = shape, solver
        if key not in self.plans:
            self.plans[key] = Plan(self.network, self.kernels, shape, solver, loops=self.loops)
        self.plans.move_to_end(key)
        if len(self.plans) > MOST_PLANS:
            self.plans.popitem(last=False)[1].close()
        return self.plans[key]

    def close_plans(self) -> None:
        """Free the graphs, which come again when they are needed."""
        with self.lock:
            self.device.activate()
            while self.plans:
                self.plans.popitem()[1].close()

    def close(self) -> None:
        with self.lock:
            self.close_plans()
            self.device.close()


def distinct(tapes: Sequence[Tape]) -> list[Tape]:
    """One tape for each set of columns. Most rows share a tape, which is quicker to see than equal columns."""
    several = {id(tape): tape for tape in tapes}.values()
    return list({tape.columns: tape for tape in several}.values())
