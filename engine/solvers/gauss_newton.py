"""The default solver: a Gauss-Newton exponential step, one evaluation each.

Near z the flow is ``dz/dtau = F + A (x - z)`` with A = -(J^T C J + lambda I): J the logits' Jacobian, C the
curvature of -log p in the logits, lambda for ``near``. A has the rank of the few logits that a condition
reads, and holds all the stiffness, so that the linear flow is solved with an r x r system where an explicit
method needs many small steps. The exponential's phi function is replaced by the rational one of the two-stage L-stable
method with gamma = 1 - 1/sqrt(2):

    S = (I - gamma h A)^-1,   trial = z + h (gamma S + (1 - gamma) S^2) F,   d = trial - z

and F(trial), J(trial) become the next step's start. Two errors are controlled: that of the linearisation,
``h/2 S^2 (F(trial) - F - A d)``, and that of the rational function, by a polynomial in S of third order. They are
measured against the distance that the row has moved from its start: a face that has moved far may be off by more than
one that was nearly there.

The budget. Where networks have many kinks, a row takes short steps along them until the end of the flow. So
``max_evaluations`` bounds its cost:

- A row whose steps are too short to reach the end is forced: its clock runs ahead of its state, and its steps are
  lengthened as far as log p does not fall (along the exact flow it never falls). Where it would fall, the clock
  advances and the row stays where it is.
- In the second half of the budget each step uses the mean of the Jacobian here and that of the step before. A row that
  zigzags across a kink then slides along it, as the flow does.

Hochbruck and Ostermann, "Exponential integrators", Acta Numerica 2010; Hairer and Wanner, "Solving Ordinary
Differential Equations II", IV.7 (the L-stable method).
"""

from dataclasses import dataclass

import numpy as np
from numpy import ndarray as Array

from engine.batch import DONE, NONFINITE, STEP_UNDERFLOW, Batch
from engine.clock import CLOCKS
from engine.errors import SolveError
from engine.flow import Flow, Point
from engine.solvers.control import first_step, remaining_budget_step, root_mean_square
from engine.solvers.linear import Linear

GAMMA = 1 - 1 / np.sqrt(2)
# c1 S + c2 S^2 + c3 S^3 agrees with phi up to h^3; minus gamma S + (1 - gamma) S^2 it estimates the latter's error.
POWERS = np.array([1.0, 2.0, 3.0])
THIRD_ORDER = np.linalg.solve([POWERS**0, GAMMA * POWERS, GAMMA**2 * POWERS * (POWERS + 1) / 2], [1, 1 / 2, 1 / 6])
PHI_ERROR = THIRD_ORDER - np.array([GAMMA, 1 - GAMMA, 0.0])
# Weights of h S F, h S^2 F, ...: the step; the error of the rational function; and h S^2 (F + A d), which is
# h S^3 F (2 - 1 / gamma) + h S^4 F (1 / gamma - 1), because gamma h A S = S - I.
STEP = np.array([[GAMMA, 1 - GAMMA, 0.0, 0.0]])
JUDGED = np.vstack([STEP, [*PHI_ERROR, 0.0], [0.0, 0.0, 2 - 1 / GAMMA, 1 / GAMMA - 1]])
# Step factors per accepted or rejected step. The error estimate is of second order in h; kinks make it jump, and a
# safety of 0.7 instead of 0.9 trades shorter steps for fewer rejections (trained faces: equal errors, 7 % cheaper).
SAFETY, SHRINK, GROW, EXPONENT = 0.7, 0.2, 5.0, 0.5
# A forced step that would let log p fall is tried again this much shorter; the next ones may be longer again.
REACH_SHRINK, REACH_GROW = 0.25, 2.0
# After k of n fixed steps the clock is at (k/n)^p of the flow, which is fast at its start only. A small p has shorter
# last steps, in which trained heads settle; a large one follows the start. Six steps, p = 2, 2.5, 3 and geometric ones,
# the last 24 times the first: on random networks of FFHQ's size (3 attributes, 64 rows) mean energy 0.0129, 0.0129,
# 0.0137, 0.0135, parts of the way off 0.31, 0.26, 0.24, 0.26 (seed 0, where dopri5 at 1e-3 is 0.30 off: 0.42, 0.26,
# 0.29, 0.37); on the demo (8 conditions, 64 rows each, over geometric ones) energy 0.76, 0.92, 0.98, way 1.12, 1.08,
# 1.07, and with twelve steps energy 0.74, 0.84, 0.93, way 1.01, 0.97, 1.01.
FIXED_POWER = 2.5
SMALLEST_STEP = 1e-10
FIRST_STEP = 0.03  # moves by this part of |z|
# near's Hessian is 2k (I + M^T M), M = dw/dz, which has full rank. M^T M is taken as this multiple of I, less 1: too
# large a multiple damps the steps, one below half of the true stretch makes them unstable. Mean energy of 8
# edits on one random world, 32 evaluations, multiples 1, 5, 17, against dopri5 at 1e-3: near(0.04) 4.0, 4.0, 4.2 (3.9);
# near(1) 17, 10, 9.0 (8.7); near(10) 732, 11.7, 11.5 (11.6). Not measured on a trained mapping.
NEAR_STRETCH = 5.0

LENGTH = CLOCKS["flow"][0]


def fixed_clock(done: Array, count: int) -> Array:
    """Where a row's clock is after so many of ``count`` fixed steps: (n,) -> (n,)."""
    return LENGTH * (done / count) ** FIXED_POWER


@dataclass(slots=True)
class Trial:
    """Proposed steps of n rows, before they are accepted or rejected.

    z (n, width)           where they lead
    h, passes (n,)         how long they are, and how far the clock goes with them
    linear, expected       the linear flow, and h S^2 times the gradient that it has there, as (a, y), (n, 1 + r)
    doubt (n,)             the error of the rational function, a root mean square
    """

    rows: Array
    z: Array
    h: Array
    passes: Array
    linear: Linear
    expected: Array
    doubt: Array


def is_finite(point: Point) -> Array:
    """Whether a row can continue from here (n,)."""
    return np.isfinite(point.logp) & np.isfinite(point.gradient).all(axis=1)


@dataclass(frozen=True, slots=True)
class GaussNewton:
    """Adaptive per row, or ``steps`` fixed steps without control flow.

    rtol, atol        an error of a step, as a root mean square, may be atol + rtol times the way from the start
    max_evaluations   a row's budget: when its steps would not reach the end of the flow within it, they are
                      lengthened as far as log p does not fall, and counted in ``forced``
    steps             None: adaptive; n: fixed, n + 1 evaluations, of which the last, at the end, has no derivatives
    """

    rtol: float = 0.15
    atol: float = 2e-3
    max_evaluations: int = 32
    steps: int | None = None
    clock: str = "flow"

    def __post_init__(self):
        if self.clock != "flow":
            raise SolveError("gauss-newton integrates the autonomous flow: its clock is 'flow'")
        if self.rtol <= 0 or self.atol <= 0:
            raise SolveError(f"tolerances must be positive: rtol={self.rtol}, atol={self.atol}")
        if self.max_evaluations < 3 or (self.steps is not None and self.steps < 1):
            raise SolveError("gauss-newton needs max_evaluations >= 3 and steps >= 1")

    def begin(self, flow: Flow, batch: Batch, rows: Array) -> None:
        """Only allocates: ``step`` evaluates the start of new rows in the same call as the trials of the others."""
        batch.hold_linear(rows)

    def step(self, flow: Flow, batch: Batch, rows: Array) -> None:
        if self.steps is not None:
            return self.march(flow, batch, rows, self.steps)
        is_new = batch.evaluations[rows] == 0
        new = np.count_nonzero(is_new)  # several times faster than any()
        if not new:
            trial = self.propose(batch, rows)
            point = flow.evaluate(batch, rows, trial.z, linear=True)
            return self.decide(batch, trial, point, self.error(batch, trial, point))
        z = batch.z[rows]
        trial = self.propose(batch, rows[~is_new]) if new < len(rows) else None
        if trial is not None:
            z[~is_new] = trial.z
        point = flow.evaluate(batch, rows, z, linear=True)
        self.start(batch, rows[is_new], point.some(is_new))
        if trial is not None:
            point = point.some(~is_new)
            self.decide(batch, trial, point, self.error(batch, trial, point))

    def march(self, flow: Flow, batch: Batch, rows: Array, steps: int) -> None:
        """Take one of ``steps`` fixed steps, without error estimate and without an evaluation at its end."""
        part = batch.part(rows)
        z, clock = batch.z[part], fixed_clock(batch.steps[part] + 1, steps)
        point, h = flow.evaluate(batch, rows, z, linear=True), clock - batch.clock[part]
        linear = Linear(point.jacobian, point.gradient, point.curvature, *self.rates(batch, part, h))
        (moved,) = linear.expand(linear.powers(h[:, None, None] * STEP[:, :2]))
        batch.evaluations[part] += 1
        finite = is_finite(point)
        if np.count_nonzero(finite) < len(rows):
            batch.status[rows[~finite]] = NONFINITE
            rows, z, moved, clock = rows[finite], z[finite], moved[finite], clock[finite]
            part = batch.part(rows)
        batch.z[part], batch.clock[part], batch.is_measured[part] = z + moved, clock, False
        batch.steps[part] += 1
        # At the end only w, the logits and log p are needed. The caller measures them: the row's last evaluation.
        ended = rows[batch.steps[part] == steps]
        batch.evaluations[ended] += 1
        batch.status[ended] = DONE

    def start(self, batch: Batch, rows: Array, point: Point) -> None:
        batch.evaluations[rows] = 1
        self.store(batch, rows, point)
        batch.step[rows] = first_step(batch.z[rows], batch.gradient[rows], rtol=0, atol=1, fraction=FIRST_STEP)
        batch.status[rows[~is_finite(point)]] = NONFINITE

    def propose(self, batch: Batch, rows: Array) -> Trial:
        """Propose a step for each row, with the error of the rational function only."""
        part = batch.part(rows)
        columns = batch.columns[part]
        r = columns.max()
        h, passes = self.choose(batch, part)
        linear = Linear(batch.jacobian[part, :r], batch.gradient[part], batch.curvature[part, :r, :r],
                        *self.rates(batch, part, h))
        short = linear.powers(h[:, None, None] * JUDGED)
        moved, doubt = linear.expand(short[:, :2])
        return Trial(rows, batch.z[part] + moved, h, passes, linear, short[:, 2], root_mean_square(doubt))

    def rates(self, batch: Batch, part: Array | slice, h: Array) -> tuple[Array, Array, Array]:
        """lambda and c of the linear flow for steps h (n,), and how many columns the rows have."""
        return 2 * NEAR_STRETCH * batch.near[part], GAMMA * h, batch.columns[part]

    def choose(self, batch: Batch, part: Array | slice) -> tuple[Array, Array]:
        """The step of each row, and how far its clock goes; further than the step where the budget forces it."""
        left = LENGTH - batch.clock[part]
        floor = remaining_budget_step(left, self.max_evaluations - batch.evaluations[part])
        wanted = np.minimum(batch.step[part], left)
        return np.maximum(wanted, np.minimum(floor, batch.reach[part])), np.maximum(wanted, floor)

    def error(self, batch: Batch, trial: Trial, point: Point) -> Array:
        """Error of each trial, in units of the tolerance at its distance from the start (n,)."""
        bend = trial.linear.twice(trial.h[:, None].astype(trial.z.dtype) * point.gradient, trial.expected)
        way = root_mean_square(trial.z - batch.origin[batch.part(trial.rows)])
        scale = self.atol + self.rtol * way
        # An infinite scale would make any error zero.
        return np.where(scale < np.inf, np.maximum(trial.doubt, 0.5 * root_mean_square(bend)) / scale, np.inf)

    def decide(self, batch: Batch, trial: Trial, point: Point, error: Array) -> None:
        """Accept or reject each row's trial, set its next step and status."""
        rows, part, h = trial.rows, batch.part(trial.rows), trial.h
        finite = np.isfinite(error + point.logp)
        batch.evaluations[part] += 1
        # The last evaluation of the budget is accepted without a retry: no evaluation is left for one.
        forced = (trial.passes > batch.step[part]) | (batch.evaluations[part] >= self.max_evaluations)
        accepted = finite & ((error <= 1) | (forced & (point.logp >= batch.logp[part])))
        factor = SAFETY * np.maximum(np.where(finite, error, np.inf), 1e-10) ** -EXPONENT
        # After a rejection the step does not grow at once: the same kink is still ahead.
        batch.step[part] = h * np.minimum(np.maximum(factor, SHRINK), np.where(accepted, GROW, 1.0))
        if np.count_nonzero(forced):
            reach = np.where(accepted, batch.reach[part] * REACH_GROW, h * REACH_SHRINK)
            batch.reach[part] = np.where(forced, reach, batch.reach[part])
            batch.forced[part] += forced
        batch.clock[part] += np.where(accepted | forced, trial.passes, 0.0)
        batch.steps[part] += accepted
        all_well = np.count_nonzero(accepted) == len(rows)
        if all_well:
            batch.z[part] = trial.z
            self.store(batch, rows, point)
        else:
            batch.rejected[part] += ~accepted
            batch.z[rows[accepted]] = trial.z[accepted]
            self.store(batch, rows[accepted], point.some(accepted))
        batch.status[rows[batch.clock[part] >= LENGTH * (1 - 1e-12)]] = DONE
        if not all_well:
            batch.status[rows[~finite & forced]] = NONFINITE
            stuck = ~accepted & ~forced & (batch.step[part] < SMALLEST_STEP)
            batch.status[rows[stuck]] = STEP_UNDERFLOW

    def store(self, batch: Batch, rows: Array, point: Point) -> None:
        """Keep what the next step starts from."""
        part, r = batch.part(rows), point.curvature.shape[1]
        is_late = batch.evaluations[part] > self.max_evaluations / 2
        late = rows[is_late]
        before = batch.jacobian[late, :r]
        batch.keep(part, point.logp, point.w, point.logits)
        batch.gradient[part] = point.gradient
        batch.jacobian[part, :r] = point.jacobian
        batch.curvature[part, :r, :r] = point.curvature
        if len(late):
            change = (before - point.jacobian[is_late]) / 2
            batch.jacobian[late, :r] += change
            batch.gradient[late] += np.einsum("nr,nrd->nd", point.cotangents[is_late].astype(change.dtype), change)
