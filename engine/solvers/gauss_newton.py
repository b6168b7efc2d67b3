"""The default solver: a Gauss-Newton exponential step, one evaluation each.

Near z the flow is ``dz/dtau = F + A (x - z)`` with A = -(J^T C J + lambda I): J the logits' Jacobian, C the
curvature of -log p in the logits, lambda for ``near``. A has the rank of the few logits that a condition
reads, and holds all the stiffness, so that the linear flow is solved with an r x r system where an explicit
method has to crawl. The exponential's phi function is replaced by the rational one of the two-stage L-stable
method with gamma = 1 - 1/sqrt(2):

    S = (I - gamma h A)^-1,   trial = z + h (gamma S + (1 - gamma) S^2) F,   d = trial - z

and F(trial), J(trial) become the next step's start. Two errors are controlled: that of the linearisation,
``h/2 S^2 (F(trial) - F - A d)``, and that of the rational function, by a polynomial in S of third order. They are
measured against the way that the row has come, because that is what an error at its end is worth: a face that has
moved far may be off by more than one that was nearly there at the start.

The budget. Where networks have many kinks, a row crawls along them with short steps to the end of the flow. So
``max_evaluations`` bounds its cost:

- The clock of a row whose steps are too short to arrive runs ahead of it ("forced"). Its steps are lengthened as far
  as log p does not fall, which it never does along the flow; where it would fall, time passes and the row stays.
- In the second half of the budget each step starts from the mean of the slopes here and those of the step before. A
  row that zigzags across a kink then slides along it, as the flow does.

Hochbruck and Ostermann, "Exponential integrators", Acta Numerica 2010; Hairer and Wanner, "Solving Ordinary
Differential Equations II", IV.7 (the L-stable method).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy import ndarray as Array

from engine.batch import Batch, Status
from engine.clock import CLOCKS
from engine.errors import SolveError
from engine.flow import Flow, Point
from engine.solvers.control import first_step, remaining_budget_step, root_mean_square

GAMMA = 1 - 1 / np.sqrt(2)
# c1 S + c2 S^2 + c3 S^3 agrees with phi up to h^3; minus gamma S + (1 - gamma) S^2 it estimates the latter's error.
POWERS = np.array([1.0, 2.0, 3.0])
THIRD_ORDER = np.linalg.solve([POWERS**0, GAMMA * POWERS, GAMMA**2 * POWERS * (POWERS + 1) / 2], [1, 1 / 2, 1 / 6])
PHI_ERROR = THIRD_ORDER - np.array([GAMMA, 1 - GAMMA, 0.0])
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


class Linear:
    """S = (I - c A)^-1 and A for m rows with r columns each.

    jacobian (m, r, d) = J, gradient (m, d) = F, curvature (m, r, r) = C, shift (m,) = lambda, c (m,) = gamma h

    A vector x = a F + J^T y is kept as (a, y, J x), one array (m, 1 + r + r, 1): only ``project`` and ``expand`` touch
    vectors of d numbers.
    """

    def __init__(self, jacobian: Array, gradient: Array, curvature: Array, shift: Array, c: Array):
        self.jacobian, self.gradient, self.curvature = jacobian, gradient, curvature
        self.y, self.seen = slice(1, 1 + jacobian.shape[1]), slice(1 + jacobian.shape[1], None)
        self.shift = shift[:, None, None]
        c = c[:, None, None]
        self.scale = 1 / (1 + c * self.shift)
        c = c * self.scale
        self.gram = np.matmul(jacobian, jacobian.swapaxes(1, 2)).astype(float)
        self.ahead = self.project(gradient)
        # Woodbury: (I + c J^T C J)^-1 = I - J^T (I + c C G)^-1 c C J; the system is singular by rounding only.
        system = np.eye(jacobian.shape[1]) + c * np.matmul(curvature, self.gram)
        core = solve_each(system, c * curvature)
        self.back = np.concatenate([np.zeros_like(self.ahead.swapaxes(1, 2)), core, np.matmul(self.gram, core)], axis=1)

    def project(self, x: Array) -> Array:
        """J x: (m, d) -> (m, r, 1) float64."""
        return np.matmul(self.jacobian, x[:, :, None]).astype(float)

    def along(self, length: Array) -> Array:
        """length F, for length (m,)."""
        length = length[:, None, None]
        return np.concatenate([length, np.zeros_like(self.ahead), length * self.ahead], axis=1)

    def solve(self, x: Array) -> Array:
        """S x."""
        return self.scale * (x - np.matmul(self.back, x[:, self.seen]))

    def powers(self, h: Array, count: int) -> list[Array]:
        """h S F, h S^2 F, and so on."""
        found = [self.along(h)]
        for _ in range(count):
            found.append(self.solve(found[-1]))
        return found[1:]

    @staticmethod
    def moved(powers: list[Array]) -> Array:
        """The step that they give."""
        return GAMMA * powers[0] + (1 - GAMMA) * powers[1]

    def defect(self, after: Array, move: Array) -> Array:
        """F(trial) - F - A (trial - z) for after (m, d) = F(trial), of which (a, y) tell all but F(trial) itself."""
        y = np.matmul(self.curvature, move[:, self.seen]) + self.shift * move[:, self.y]
        a = self.shift * move[:, :1] - 1
        return np.concatenate([a, y, self.project(after) + a * self.ahead + np.matmul(self.gram, y)], axis=1)

    def expand(self, *vectors: Array) -> list[Array]:
        """The vectors themselves, (m, d) each."""
        short = np.concatenate(vectors, axis=2).astype(self.gradient.dtype)
        full = np.matmul(short[:, self.y].swapaxes(1, 2), self.jacobian)
        return [short[:, 0, i, None] * self.gradient + full[:, i] for i in range(len(vectors))]


def solve_each(systems: Array, right: Array) -> Array:
    """np.linalg.solve, but a system that is singular in double precision gives not-a-number for its own row."""
    try:
        return np.linalg.solve(systems, right)
    except np.linalg.LinAlgError:
        if len(systems) == 1:
            return np.full_like(right, np.nan)
        return np.concatenate([solve_each(systems[i : i + 1], right[i : i + 1]) for i in range(len(systems))])


def is_finite(point: Point) -> Array:
    """Whether a row can go on from where it is (n,)."""
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
        """Nothing: ``step`` evaluates the start of new rows in the same call as the trials of the others."""

    def step(self, flow: Flow, batch: Batch, rows: Array) -> None:
        if self.steps is not None:
            return self.march(flow, batch, rows, self.steps)
        is_new = batch.evaluations[rows] == 0
        old, z = rows[~is_new], batch.z[rows]
        h, passes = self.choose(batch, old)
        trial, errors, moves = self.propose(batch, old, h)
        z[~is_new] = trial
        point = flow.evaluate(batch, rows, z, linear=True)
        batch.evaluations[rows] += 1
        if is_new.any():
            self.start(batch, rows[is_new], point.some(is_new))
            point = point.some(~is_new)
        for part, linear, move in moves:
            after = point.gradient[part]
            (known,) = linear.expand(linear.solve(linear.solve(linear.defect(after, move))))
            error = known + (linear.scale**2)[:, 0].astype(after.dtype) * after
            errors[part] = np.maximum(errors[part], 0.5 * h[part] * root_mean_square(error))
        errors /= self.atol + self.rtol * root_mean_square(trial - batch.origin[old])
        self.decide(batch, old, trial, point, h, passes, errors)

    def march(self, flow: Flow, batch: Batch, rows: Array, steps: int) -> None:
        """One of so many fixed steps, to where the linear flow leads. Nothing is judged there, or computed."""
        z = batch.z[rows]
        point = flow.evaluate(batch, rows, z, linear=True)
        self.store(batch, rows, slice(None), point)
        clock = fixed_clock(batch.steps[rows] + 1, steps)
        for part, linear in self.linearised(batch, rows, GAMMA * (h := clock - batch.clock[rows])):
            (moved,) = linear.expand(linear.moved(linear.powers(h[part], 2)))
            z[part] += moved
        finite = is_finite(point)
        going, failed = rows[finite], rows[~finite]
        batch.z[going], batch.clock[going] = z[finite], clock[finite]
        batch.steps[going] += 1
        batch.evaluations[rows] += 1
        batch.is_measured[going] = False
        batch.status[failed] = Status.NONFINITE
        # At the end only w, the logits and log p are wanted: who takes the row out measures it, its last evaluation.
        ended = going[batch.steps[going] == steps]
        batch.evaluations[ended] += 1
        batch.status[ended] = Status.DONE

    def start(self, batch: Batch, rows: Array, point: Point) -> None:
        self.store(batch, rows, slice(None), point)
        batch.step[rows] = first_step(batch.z[rows], batch.gradient[rows], rtol=0, atol=1, fraction=FIRST_STEP)
        batch.status[rows[~is_finite(point)]] = Status.NONFINITE

    def propose(self, batch: Batch, rows: Array, h: Array) -> tuple[Array, Array, list]:
        """Where steps of h lead (n, width), the errors of the rational function (n,), moves with their linear flows."""
        z = batch.z[rows]
        trial, errors, moves = np.empty_like(z), np.zeros(len(rows)), []
        for part, linear in self.linearised(batch, rows, GAMMA * h):
            powers = linear.powers(h[part], 3)
            move = linear.moved(powers)
            moved, phi_error = linear.expand(move, np.einsum("k,kmri->mri", PHI_ERROR, powers))
            trial[part], errors[part] = z[part] + moved, root_mean_square(phi_error)
            moves.append((part, linear, move))
        return trial, errors, moves

    def linearised(self, batch: Batch, rows: Array, c: Array) -> Iterator[tuple[Array | slice, Linear]]:
        """Of the rows, by width: their positions and their linear flows."""
        for part, r in batch.by_width(rows):
            some = rows[part]
            yield part, Linear(batch.jacobian[some, :r], batch.gradient[some], batch.curvature[some, :r, :r],
                               2 * NEAR_STRETCH * batch.near[some], c[part])  # fmt: skip

    def choose(self, batch: Batch, rows: Array) -> tuple[Array, Array]:
        """The step of each row, and how far its clock goes; further than the step where the budget forces it."""
        left = LENGTH - batch.clock[rows]
        floor = remaining_budget_step(left, self.max_evaluations - batch.evaluations[rows])
        wanted = np.minimum(batch.step[rows], left)
        return np.maximum(wanted, np.minimum(floor, batch.reach[rows])), np.maximum(wanted, floor)

    def decide(self, batch: Batch, rows: Array, trial: Array, point: Point, h: Array, passes: Array,
               error: Array) -> None:  # fmt: skip
        """Accept or reject each row's trial, set its next step and status."""
        finite = np.isfinite(error) & np.isfinite(point.logp)
        # The last evaluation of the budget is taken as it comes: there is none left to try again with.
        forced = (passes > batch.step[rows]) | (batch.evaluations[rows] >= self.max_evaluations)
        accepted = finite & ((error <= 1) | (forced & (point.logp >= batch.logp[rows])))
        factor = SAFETY * np.maximum(np.where(finite, error, np.inf), 1e-10) ** -EXPONENT
        # After a rejection the step does not grow at once: the same kink is still ahead.
        batch.step[rows] = h * np.clip(factor, SHRINK, np.where(accepted, GROW, 1.0))
        reach = np.where(accepted, batch.reach[rows] * REACH_GROW, h * REACH_SHRINK)
        batch.reach[rows] = np.where(forced, reach, batch.reach[rows])
        batch.forced[rows[forced]] += 1
        done, passed = rows[accepted], accepted | forced
        batch.z[done] = trial[accepted]
        batch.clock[rows[passed]] += passes[passed]
        batch.steps[done] += 1
        batch.rejected[rows[~accepted]] += 1
        self.store(batch, done, accepted, point)
        batch.status[rows[batch.clock[rows] >= LENGTH * (1 - 1e-12)]] = Status.DONE
        batch.status[rows[~finite & forced]] = Status.NONFINITE
        batch.status[rows[~passed & (batch.step[rows] < SMALLEST_STEP)]] = Status.STEP_UNDERFLOW

    def store(self, batch: Batch, rows: Array, part: Array | slice, point: Point) -> None:
        """Keep what the next step starts from."""
        r = point.curvature.shape[1]
        gradient, jacobian = point.gradient[part], point.jacobian[part][:, :r]
        late = batch.evaluations[rows] > self.max_evaluations / 2
        if self.steps is None and late.any():
            before = batch.jacobian[rows[late], :r]
            change = (before - jacobian[late]) / 2
            jacobian[late] += change
            for slot, weight in enumerate(point.cotangents[part][late].T.astype(gradient.dtype)):
                gradient[late] += weight[:, None] * change[:, slot]
        batch.keep(rows, point.logp[part], point.w[part], point.logits[part])
        batch.gradient[rows] = gradient
        batch.jacobian[rows, :r] = jacobian
        batch.curvature[rows, :r, :r] = point.curvature[part]
