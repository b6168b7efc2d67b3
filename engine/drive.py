"""The loop: step until no row runs and none waits. Finished rows leave, waiting requests take their slots.

``Sampler.solve`` runs it on a list, ``engine.service`` on a queue that other threads fill.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy import ndarray as Array

from engine.batch import DONE, RUNNING, Batch, Start
from engine.flow import Flow
from engine.requests import Request, Sample
from engine.solvers import Solver
from engine.spaces import Space

if TYPE_CHECKING:
    from engine.check import Check


@dataclass(slots=True, eq=False)
class Ticket:
    """A request on its way through the loop.

    future     of somebody in another thread, who may cancel it at any moment before its end; or nobody waits there
    deadline   on the clock of time.monotonic
    sample     the result, without its picture; None while the row runs, and for ever if it was dropped
    check      looks at the picture before it is the result;  past: the sample that it denied last
    """

    request: Request
    start: Start
    deadline: float = math.inf
    future: Future[Sample] | None = None
    sample: Sample | None = None
    check: "Check | None" = None
    past: Sample | None = None

    def is_gone(self) -> bool:
        """Nobody wants it any more."""
        return (self.future is not None and self.future.cancelled()) or (
            self.deadline < math.inf and time.monotonic() > self.deadline
        )


class Lane:
    """A batch, the flow that its rows run on, and whose the rows are.

    tickets   by row, for the rows that are taken
    fresh     rows whose start has not been evaluated yet
    """

    def __init__(self, solver: Solver, flow: Flow, batch: Batch):
        self.solver, self.flow, self.batch = solver, flow, batch
        self.tickets: dict[int, Ticket] = {}
        self.free = list(range(batch.capacity))[::-1]
        self.fresh: list[int] = []
        self.is_taken = np.zeros(batch.capacity, bool)

    def admit(self, ticket: Ticket) -> None:
        row = self.free.pop()
        self.tickets[row], self.is_taken[row] = ticket, True
        self.batch.is_watched |= ticket.future is not None or ticket.deadline < math.inf
        self.fresh.append(row)
        with np.errstate(over="ignore"):  # what the runtime's precision does not hold ends as NONFINITE
            self.batch.admit(row, ticket.start)

    def release(self, rows: Array) -> None:
        self.is_taken[rows] = False
        for row in rows.tolist():
            del self.tickets[row]
            self.free.append(row)

    def step(self) -> Array:
        """Start the fresh rows and advance the running ones; returns the rows (n,) that ended or that nobody wants."""
        status = self.batch.status
        if gone := [row for row, ticket in self.tickets.items() if ticket.is_gone()]:
            status[gone] = DONE
        fresh = [row for row in self.fresh if status[row] == RUNNING]
        self.fresh.clear()
        # A row that overflows gets a status; numpy need not warn about it too.
        with np.errstate(over="ignore", invalid="ignore"):
            if fresh:
                begin(self.solver, self.flow, self.batch, np.array(fresh))
            running = self.batch.running()
            if len(running):
                self.solver.step(self.flow, self.batch, running)
        return (self.is_taken & (status != RUNNING)).nonzero()[0]


def drive(open_lane: Callable[[Start], Lane], take: Callable[[int], Iterable[Ticket]]) -> Iterator[tuple[Lane, Array]]:
    """Solve the tickets that ``take`` gives, until it gives none while no row runs.

    open_lane   a lane for rows with the space and the solver of a start, with room for all that ``take`` gives
    take        called before each step with the number of rows that are running; it may wait when that is none

    Yields a lane and its rows that have come to their end; the rows are free as soon as the next is asked for.
    """
    lanes: dict[tuple[Space, Solver | None], Lane] = {}
    while True:
        for ticket in take(sum(len(lane.tickets) for lane in lanes.values())):
            kind = ticket.start.space, ticket.start.solver
            if kind not in lanes:
                lanes[kind] = open_lane(ticket.start)
            lanes[kind].admit(ticket)
        busy = [lane for lane in lanes.values() if lane.tickets]
        if not busy:
            return
        for lane in busy:
            ended = lane.step()
            if len(ended):
                yield lane, ended
                lane.release(ended)


def begin(solver: Solver, flow: Flow, batch: Batch, rows: Array) -> None:
    """Start new rows. A row whose condition asks for nothing has arrived already."""
    asks = np.array([bool(batch.tapes[row].columns) or batch.near[row] > 0 for row in rows], bool)
    batch.status[rows[~asks]] = DONE
    if asks.any():
        solver.begin(flow, batch, rows[asks])
