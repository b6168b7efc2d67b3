"""The loop: step until no row runs and none waits. Finished rows leave, waiting rows take their slots."""

from collections import deque
from collections.abc import Iterator, Sequence

import numpy as np
from numpy import ndarray as Array

from engine.batch import Batch, Start, Status
from engine.flow import Flow
from engine.solvers import Solver


def drive(solver: Solver, flow: Flow, batch: Batch, starts: Sequence[Start]) -> Iterator[tuple[Array, Array]]:
    """Solve all ``starts`` in the slots of ``batch``.

    Yields (indices into starts, rows of the batch) of what has just finished; the rows are reused as soon as
    the next is asked for.
    """
    waiting = deque(range(len(starts)))
    owner = np.full(batch.capacity, -1)
    while waiting or (owner >= 0).any():
        free = np.flatnonzero(owner < 0)[: len(waiting)]
        for row in free:
            owner[row] = waiting.popleft()
            batch.admit(row, starts[int(owner[row])])
        # A row that overflows gets a status; numpy need not warn about it too.
        with np.errstate(over="ignore", invalid="ignore"):
            begin(solver, flow, batch, free)
            rows = batch.running()
            if len(rows):
                solver.step(flow, batch, rows)
        finished = np.flatnonzero((owner >= 0) & (batch.status != Status.RUNNING))
        if len(finished):
            yield owner[finished], finished
            owner[finished] = -1


def begin(solver: Solver, flow: Flow, batch: Batch, rows: Array) -> None:
    """Start new rows. A row whose condition asks for nothing has arrived already."""
    asks = np.array([bool(batch.tapes[row].columns) or batch.near[row] > 0 for row in rows], bool)
    batch.status[rows[~asks]] = Status.DONE
    if asks.any():
        solver.begin(flow, batch, rows[asks])
