"""The batch: rows in flight, as arrays. A row has its own condition, clock, step, budget and fate."""

from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING

import numpy as np
from numpy import ndarray as Array

from engine.spaces import Space
from engine.tape import EMPTY, Tape

if TYPE_CHECKING:
    from engine.solvers import Solver


class Status(IntEnum):
    """The fate of a row."""

    RUNNING = 0
    DONE = 1
    STEP_LIMIT = 2
    NONFINITE = 3
    STEP_UNDERFLOW = 4
    NOT_ENTERED = 5
    DENIED = 6

    @property
    def sentence(self) -> str:
        return SENTENCES[self]


# numpy takes plain integers ten times as fast as members of an enumeration.
RUNNING, DONE, STEP_LIMIT, NONFINITE, STEP_UNDERFLOW, NOT_ENTERED, DENIED = map(int, Status)

SENTENCES = {
    Status.RUNNING: "still running",
    Status.DONE: "reached the end of the flow",
    Status.STEP_LIMIT: "ran out of steps before the end of the flow",
    Status.NONFINITE: "met a value that is not finite",
    Status.STEP_UNDERFLOW: "needed a step too small to make progress",
    Status.NOT_ENTERED: "found no latent of which the heads are sure enough, and follows the flow instead",
    Status.DENIED: "met the check's denial in every picture, as many as max_decodes allows",
}


@dataclass(frozen=True, slots=True, eq=False)
class Start:
    """Where and how a row begins.

    z          (width,) the state: a latent of ``space``
    psi        truncation by the mapping;  label: class of a conditional generator
    truncation   of the draw, for solvers that draw again (engine/prior.py)
    anchor_z, anchor_w   what ``near`` measures from
    solver     how the row advances, None: as its lane does
    wish       the condition for the posterior, whose statements on values are true or false
    candidate  of the posterior: the number of the seed's candidate that it begins with
    """

    z: Array
    space: Space
    tape: Tape
    psi: float
    label: int
    seed: int
    anchor_z: Array
    anchor_w: Array
    solver: "Solver | None" = None
    wish: Tape = EMPTY
    candidate: int = 0
    truncation: float = 1.0


class Batch:
    """``capacity`` rows. Slots whose status is not RUNNING are free.

    z, gradient   (capacity, width)        state and grad log p at it
    jacobian      (capacity, R, width)     du/dz, zeros beyond a tape's columns   } kept only by
    curvature     (capacity, R, R)         of -log p in u, likewise               } linearising solvers
    columns       (capacity,)              number of the tape's columns
    origin        (capacity, width)        where the row began
    w, logits     (capacity, w_dim), (capacity, L)   at z, where ``is_measured``
    clock, step   (capacity,) float64      position on the solver's clock, next step
    error         (capacity,) float64      last accepted error, for PI control
    reach         (capacity,) float64      longest step that the budget may force
    counters      (capacity, 4)            steps, evaluations, rejected, forced
    walks         (capacity, 4)            of the posterior: exact, candidates, corrections, accepted
    is_watched    whether rows may be dropped or admitted before one of them ends: a solver then takes one step a call
    """

    def __init__(self, capacity: int, width: int, w_dim: int, dtype: np.dtype):
        self.capacity, self.dtype = capacity, np.dtype(dtype)
        self.z = np.zeros((capacity, width), dtype)
        self.origin = np.zeros((capacity, width), dtype)
        self.gradient = np.zeros((capacity, width), dtype)
        self.psi = np.ones((capacity, 1), dtype)
        self.truncation = np.ones((capacity, 1), dtype)
        self.label = np.zeros(capacity, np.int64)
        self.anchor_z = np.zeros((capacity, width), dtype)
        self.anchor_w = np.zeros((capacity, w_dim), dtype)
        self.jacobian = np.zeros((capacity, 0, width), dtype)
        self.curvature = np.zeros((capacity, 0, 0))
        self.columns = np.zeros(capacity, np.int64)
        self.w = np.zeros((capacity, w_dim), dtype)
        self.logits = np.zeros((capacity, 0), dtype)
        self.is_measured = np.zeros(capacity, bool)
        self.near = np.zeros(capacity)
        self.logp = np.zeros(capacity)
        self.clock, self.step = np.zeros(capacity), np.zeros(capacity)
        self.error, self.reach = np.ones(capacity), np.full(capacity, np.inf)
        # Compiled solvers read and write these too: kernels/layout.cuh.
        self.status = np.full(capacity, Status.DONE, np.int32)
        self.counters = np.zeros((capacity, 4), np.int32)
        self.steps, self.evaluations, self.rejected, self.forced = self.counters.T
        self.walks = np.zeros((capacity, 4), np.int64)
        self.seeds = [0] * capacity
        self.candidates = [0] * capacity  # that the posterior begins with
        self.wishes: list[Tape] = [EMPTY] * capacity
        self.is_watched = False
        self.tapes: list[Tape] = [EMPTY] * capacity

    def admit(self, row: int, start: Start) -> None:
        """Put a request into a free slot; every trace of the slot's former row is overwritten."""
        self.z[row], self.origin[row] = start.z, start.z
        self.psi[row], self.truncation[row], self.label[row] = start.psi, start.truncation, start.label
        self.anchor_z[row], self.anchor_w[row] = start.anchor_z, start.anchor_w
        self.tapes[row], self.seeds[row], self.candidates[row] = start.tape, start.seed, start.candidate
        self.near[row] = start.tape.near
        self.columns[row] = len(start.tape.columns)
        self.clock[row], self.step[row], self.error[row], self.reach[row] = 0.0, 0.0, 1.0, np.inf
        self.counters[row], self.walks[row], self.wishes[row] = 0, 0, start.wish
        self.status[row], self.is_measured[row] = RUNNING, False

    def keep(self, rows: Array | slice, logp: Array, w: Array, logits: Array) -> None:
        """What was found at the rows' z: log p (n,), w (n, w_dim), all logits (n, L). Then nobody need measure it."""
        self.hold_logits(logits.shape[1])
        self.logp[rows], self.w[rows], self.logits[rows], self.is_measured[rows] = logp, w, logits, True

    def hold_logits(self, count: int) -> None:
        """Make room for so many a row."""
        if self.logits.shape[1] != count:
            self.logits = np.zeros((self.capacity, count), self.dtype)

    def hold_linear(self, rows: Array) -> None:
        """Make room for the linear flows of new rows; nothing of the slots' former rows is left there."""
        old, columns = self.jacobian.shape[1], int(self.columns[rows].max(initial=0))
        if columns > old:
            jacobian, curvature = self.jacobian, self.curvature
            self.jacobian = np.zeros((self.capacity, columns, jacobian.shape[2]), self.dtype)
            self.curvature = np.zeros((self.capacity, columns, columns))
            self.jacobian[:, :old], self.curvature[:, :old, :old] = jacobian, curvature
        self.jacobian[rows], self.curvature[rows] = 0.0, 0.0

    def running(self) -> Array:
        return (self.status == RUNNING).nonzero()[0]

    @staticmethod
    def part(rows: Array) -> Array | slice:
        """The same rows, which are in ascending order; as a slice where there is no gap: its views cost nothing."""
        n = len(rows)
        return slice(rows[0], rows[-1] + 1) if n and rows[-1] - rows[0] == n - 1 else rows
