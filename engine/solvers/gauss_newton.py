"""The default solver: a Gauss-Newton exponential step, one evaluation each.

Near z the flow is ``dz/dtau = F + A (x - z)`` with A = -(J^T C J + lambda I): J the logits' Jacobian, C the
curvature of -log p in the logits, lambda for ``near``. A has the rank of the few logits that a condition
reads, and holds all the stiffness, so that the linear flow is solved with an r x r system where an explicit
method has to crawl. The exponential's phi function is replaced by the rational one of the two-stage L-stable
method with gamma = 1 - 1/sqrt(2):

    S = (I - gamma h A)^-1,   trial = z + h (gamma S + (1 - gamma) S^2) F,   d = trial - z

and F(trial), J(trial) become the next step's start. Two errors are controlled: that of the linearisation,
``h/2 S^2 (F(trial) - F - A d)``, and that of the rational function, by a polynomial in S of third order.

Hochbruck and Ostermann, "Exponential integrators", Acta Numerica 2010; Hairer and Wanner, "Solving Ordinary
Differential Equations II", IV.7 (the L-stable method).
"""

from dataclasses import dataclass

import numpy as np
from numpy import ndarray as Array

from engine.batch import Batch, Status
from engine.clock import CLOCKS
from engine.errors import SolveError
from engine.flow import Flow, Point
from engine.solvers.control import error_norm, first_step, remaining_budget_step

GAMMA = 1 - 1 / np.sqrt(2)
# c1 S + c2 S^2 + c3 S^3 agrees with phi up to h^3; minus gamma S + (1 - gamma) S^2 it estimates the latter's error.
POWERS = np.array([1.0, 2.0, 3.0])
THIRD_ORDER = np.linalg.solve([POWERS**0, GAMMA * POWERS, GAMMA**2 * POWERS * (POWERS + 1) / 2], [1, 1 / 2, 1 / 6])
PHI_ERROR = THIRD_ORDER - np.array([GAMMA, 1 - GAMMA, 0.0])
# Step factors per accepted or rejected step. The error estimate is of second order in h.
SAFETY, SHRINK, GROW, EXPONENT = 0.9, 0.2, 5.0, 0.5
# The last of the fixed steps is this many times the first: the flow is fast at the start only.
FIXED_SPREAD = 24.0
SMALLEST_STEP = 1e-10
# near's Hessian is 2k (I + M^T M), M = dw/dz, which has full rank. M^T M is taken as this multiple of I, less 1: too
# large a multiple damps the steps, one below half of the true stretch makes them unstable. Mean energy of 8
# edits on one random world, 32 evaluations, multiples 1, 5, 17, against dopri5 at 1e-3: near(0.04) 4.0, 4.0, 4.2 (3.9);
# near(1) 17, 10, 9.0 (8.7); near(10) 732, 11.7, 11.5 (11.6). Not measured on a trained mapping.
NEAR_STRETCH = 5.0


class Linear:
    """(I - c A) and A for a group of rows with r columns each, c = gamma h.

    jacobian (m, r, d), curvature (m, r, r), shift (m,) = lambda, c (m,)
    """

    def __init__(self, jacobian: Array, curvature: Array, shift: Array, c: Array):
        self.jacobian, self.curvature, self.shift = jacobian, curvature, shift
        self.scale = 1 / (1 + c * shift)
        c = (c * self.scale)[:, None, None]
        gram = np.matmul(jacobian, jacobian.swapaxes(1, 2)).astype(float)
        # Woodbury: (I + c J^T C J)^-1 = I - J^T (I + c C G)^-1 c C J; the system is singular by rounding only.
        system = np.eye(jacobian.shape[1]) + c * np.matmul(curvature, gram)
        self.core = solve_each(system, c * curvature)

    def project(self, x: Array) -> Array:
        """J x: (m, d) -> (m, r, 1) float64."""
        return np.matmul(self.jacobian, x[:, :, None]).astype(float)

    def expand(self, y: Array, dtype: np.dtype) -> Array:
        """J^T y: (m, r, 1) -> (m, d)."""
        return np.matmul(y.astype(dtype).swapaxes(1, 2), self.jacobian)[:, 0]

    def solve(self, x: Array) -> Array:
        """S x = (I - c A)^-1 x."""
        inner = self.expand(np.matmul(self.core, self.project(x)), x.dtype)
        return self.scale[:, None].astype(x.dtype) * (x - inner)

    def apply(self, x: Array) -> Array:
        """A x."""
        inner = self.expand(np.matmul(self.curvature, self.project(x)), x.dtype)
        return -(inner + self.shift[:, None].astype(x.dtype) * x)


def solve_each(systems: Array, right: Array) -> Array:
    """np.linalg.solve, but a system that is singular in double precision gives not-a-number for its own row."""
    try:
        return np.linalg.solve(systems, right)
    except np.linalg.LinAlgError:
        if len(systems) == 1:
            return np.full_like(right, np.nan)
        return np.concatenate([solve_each(systems[i : i + 1], right[i : i + 1]) for i in range(len(systems))])


@dataclass(frozen=True, slots=True)
class GaussNewton:
    """Adaptive per row, or ``steps`` fixed geometric steps without control flow.

    rtol, atol        tolerances of the per-row error norm
    max_evaluations   a row's budget: when its steps would not reach the end of the flow within it, they are
                      lengthened (the step is L-stable) and counted in ``forced``
    steps             None: adaptive; n: fixed, n + 1 evaluations with the one that measures the end
    """

    rtol: float = 1e-3
    atol: float = 1e-3
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
        point = flow.evaluate(batch, rows, batch.z[rows], linear=True)
        batch.evaluations[rows] += 1
        store(batch, rows, slice(None), point)
        if self.steps is None:
            batch.step[rows] = first_step(batch.z[rows], batch.gradient[rows], self.rtol, self.atol)
        bad = ~np.isfinite(point.logp) | ~np.isfinite(point.gradient).all(axis=1)
        batch.status[rows[bad]] = Status.NONFINITE

    def step(self, flow: Flow, batch: Batch, rows: Array) -> None:
        length = CLOCKS["flow"][0]
        h, forced = self.choose(batch, rows, length)
        z, gradient = batch.z[rows], batch.gradient[rows]
        trial, phi_error, linears = np.empty_like(z), np.empty_like(z), []
        for part, r in batch.by_columns(rows):
            some = rows[part]
            linear = Linear(batch.jacobian[some, :r], batch.curvature[some, :r, :r],
                            2 * NEAR_STRETCH * batch.near[some], GAMMA * h[part])  # fmt: skip
            powers = [linear.solve(gradient[part])]
            for _ in range(2):
                powers.append(linear.solve(powers[-1]))
            step = h[part][:, None]
            trial[part] = z[part] + step * (GAMMA * powers[0] + (1 - GAMMA) * powers[1])
            phi_error[part] = step * sum(c * x for c, x in zip(PHI_ERROR, powers, strict=True))
            linears.append((part, linear))
        point = flow.evaluate(batch, rows, trial, linear=True)
        error = np.empty_like(z)
        for part, linear in linears:
            defect = point.gradient[part] - gradient[part] - linear.apply(trial[part] - z[part])
            error[part] = 0.5 * h[part][:, None] * linear.solve(linear.solve(defect))
        norms = [error_norm(e, z, trial, self.rtol, self.atol) for e in (error, phi_error)]
        self.decide(batch, rows, trial, point, h, forced, np.maximum(*norms))

    def choose(self, batch: Batch, rows: Array, length: float) -> tuple[Array, Array]:
        """The step of each row, and which rows must take it whatever its error."""
        left = length - batch.clock[rows]
        if self.steps is not None:
            ratio = FIXED_SPREAD ** (1 / max(self.steps - 1, 1))
            first = length / np.sum(ratio ** np.arange(self.steps))
            h = np.where(batch.steps[rows] == self.steps - 1, left, first * ratio ** batch.steps[rows])
            return h, np.ones(len(rows), bool)
        evaluations = self.max_evaluations - batch.evaluations[rows]
        floor = remaining_budget_step(left, evaluations)
        wanted = batch.step[rows]
        # The last evaluation of the budget is taken as it comes: there is none left to try again with.
        return np.minimum(np.maximum(wanted, floor), left), (wanted < floor) | (evaluations <= 1)

    def decide(self, batch: Batch, rows: Array, trial: Array, point: Point, h: Array, forced: Array,
               error: Array) -> None:  # fmt: skip
        """Accept or reject each row's trial, set its next step and status."""
        batch.evaluations[rows] += 1
        finite = np.isfinite(error) & np.isfinite(point.logp)
        accepted = finite & (forced | (error <= 1))
        factor = SAFETY * np.maximum(np.where(finite, error, np.inf), 1e-10) ** -EXPONENT
        # After a rejection the step does not grow at once: the same kink is still ahead.
        batch.step[rows] = h * np.clip(factor, SHRINK, np.where(accepted, GROW, 1.0))
        done = rows[accepted]
        batch.z[done] = trial[accepted]
        batch.clock[done] += h[accepted]
        batch.steps[done] += 1
        batch.rejected[rows[~accepted]] += 1
        if self.steps is None:
            batch.forced[rows[accepted & forced]] += 1
        store(batch, done, accepted, point)
        length = CLOCKS["flow"][0]
        batch.status[done[batch.clock[done] >= length * (1 - 1e-12)]] = Status.DONE
        batch.status[rows[~finite & forced]] = Status.NONFINITE
        tiny = ~accepted & (batch.step[rows] < SMALLEST_STEP)
        batch.status[rows[tiny]] = Status.STEP_UNDERFLOW


def store(batch: Batch, rows: Array, part: Array | slice, point: Point) -> None:
    """Keep what the next step starts from."""
    r = point.curvature.shape[1]
    batch.gradient[rows], batch.logp[rows] = point.gradient[part], point.logp[part]
    batch.jacobian[rows, :r] = point.jacobian[part][:, :r]
    batch.curvature[rows, :r, :r] = point.curvature[part]
