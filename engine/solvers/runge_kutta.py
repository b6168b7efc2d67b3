"""Explicit Runge-Kutta methods, each row with its own time, step and error.

A tableau with embedded weights runs adaptively unless ``steps`` is given; one without always runs fixed steps.
"""

from dataclasses import dataclass

import numpy as np
from numpy import ndarray as Array

from engine.batch import Batch, Status
from engine.clock import CLOCKS
from engine.errors import SolveError
from engine.flow import Flow
from engine.solvers.control import error_norm, first_step
from engine.solvers.tableaus import Tableau

# PI control: h *= 0.9 e_n^(-0.7/k) e_(n-1)^(0.4/k), within [0.2, 10], k the order. torchdiffeq and scipy
# use the purely integral form; the proportional part removes most rejections (Hairer and Wanner II, IV.2).
SAFETY, SHRINK, GROW = 0.9, 0.2, 10.0
PROPORTIONAL, INTEGRAL = 0.7, 0.4
FIXED_STEPS = 100
FIRST_STEP = 0.01  # moves by this part of |z|
SMALLEST_STEP = 1e-10


@dataclass(frozen=True, slots=True)
class RungeKutta:
    """rtol, atol: per-row tolerances; ``steps``: that many equal steps instead; ``clock``: 'flow' or 'paper'."""

    tableau: Tableau
    rtol: float = 1e-3
    atol: float = 1e-3
    max_evaluations: int = 10_000
    steps: int | None = None
    clock: str = "flow"

    def __post_init__(self):
        if self.clock not in CLOCKS:
            raise SolveError(f"there is no clock {self.clock!r}; known are: {', '.join(CLOCKS)}")
        if self.rtol <= 0 or self.atol <= 0:
            raise SolveError(f"tolerances must be positive: rtol={self.rtol}, atol={self.atol}")
        if self.steps is not None and self.steps < 1:
            raise SolveError(f"steps must be at least 1, not {self.steps}")

    @property
    def fixed_steps(self) -> int | None:
        return FIXED_STEPS if self.steps is None and self.tableau.error is None else self.steps

    def begin(self, flow: Flow, batch: Batch, rows: Array) -> None:
        length, rate = CLOCKS[self.clock]
        point = flow.evaluate(batch, rows, batch.z[rows], linear=False)
        batch.evaluations[rows] += 1
        batch.gradient[rows], batch.logp[rows] = point.gradient, point.logp
        if self.fixed_steps is not None:
            batch.step[rows] = length / self.fixed_steps
        else:
            speed = point.gradient * rate(batch.clock[rows])[:, None].astype(batch.dtype)
            batch.step[rows] = first_step(batch.z[rows], speed, self.rtol, self.atol, fraction=FIRST_STEP)
        bad = ~np.isfinite(point.logp) | ~np.isfinite(point.gradient).all(axis=1)
        batch.status[rows[bad]] = Status.NONFINITE

    def step(self, flow: Flow, batch: Batch, rows: Array) -> None:
        # End point: the last step is shortened so that it lands on the end exactly. torchdiffeq steps past it
        # and interpolates back; clipping costs at most one step, and no tableau needs an interpolant.
        left = CLOCKS[self.clock][0] - batch.clock[rows]
        h = np.minimum(batch.step[rows], left)
        derivatives, end = self.stages(flow, batch, rows, h)
        z = batch.z[rows]
        step = h[:, None].astype(batch.dtype)
        trial = z + step * combine(self.tableau.b, derivatives)
        error = np.zeros(len(rows))
        if self.fixed_steps is None and self.tableau.error is not None:
            error = error_norm(step * combine(self.tableau.error, derivatives), z, trial, self.rtol, self.atol)
        self.decide(flow, batch, rows, trial, h, error, end)

    def stages(self, flow: Flow, batch: Batch, rows: Array, h: Array) -> tuple[list[Array], Array | None]:
        """The derivative at every stage; and, for first-same-as-last methods, grad log p at the step's end."""
        rate, tableau = CLOCKS[self.clock][1], self.tableau
        z, clock, step = batch.z[rows], batch.clock[rows], h[:, None].astype(batch.dtype)
        gradient = batch.gradient[rows]
        derivatives = [gradient * rate(clock)[:, None].astype(batch.dtype)]
        for a, c in zip(tableau.a, tableau.c[1:], strict=True):
            point = flow.evaluate(batch, rows, z + step * combine(a, derivatives), linear=False)
            batch.evaluations[rows] += 1
            gradient = point.gradient
            derivatives.append(gradient * rate(clock + c * h)[:, None].astype(batch.dtype))
        return derivatives, gradient if tableau.is_fsal else None

    def decide(self, flow: Flow, batch: Batch, rows: Array, trial: Array, h: Array, error: Array,
               end: Array | None) -> None:
        """Accept or reject each row's trial, set its next step and status."""
        finite = np.isfinite(error) & np.isfinite(trial).all(axis=1)
        accepted = finite & (error <= 1)
        done = rows[accepted]
        batch.z[done] = trial[accepted]
        batch.clock[done] += h[accepted]
        batch.steps[done] += 1
        batch.rejected[rows[~accepted]] += 1
        if self.fixed_steps is None:
            k = self.tableau.order
            now = np.maximum(np.where(finite, error, np.inf), 1e-10)
            factor = SAFETY * now ** (-PROPORTIONAL / k) * batch.error[rows] ** (INTEGRAL / k)
            batch.step[rows] = h * np.clip(factor, SHRINK, np.where(accepted, GROW, 1.0))
            batch.error[done] = now[accepted]
            batch.status[rows[~accepted & (batch.step[rows] < SMALLEST_STEP)]] = Status.STEP_UNDERFLOW
        else:
            batch.status[rows[~finite]] = Status.NONFINITE
        batch.status[rows[batch.evaluations[rows] >= self.max_evaluations]] = Status.STEP_LIMIT
        batch.status[done[batch.clock[done] >= CLOCKS[self.clock][0] * (1 - 1e-12)]] = Status.DONE
        if end is not None:
            batch.gradient[done] = end[accepted]
            return
        going = done[batch.status[done] == Status.RUNNING]
        if len(going):
            point = flow.evaluate(batch, going, batch.z[going], linear=False)
            batch.evaluations[going] += 1
            batch.gradient[going], batch.logp[going] = point.gradient, point.logp


def combine(weights: tuple[float, ...], derivatives: list[Array]) -> Array:
    """Sum of weight_j slope_j over the stages, (n, d)."""
    total = np.zeros_like(derivatives[0])
    for weight, derivative in zip(weights, derivatives, strict=True):
        if weight:
            total += derivative.dtype.type(weight) * derivative
    return total
