"""Solvers and tapes as compiled code reads them: the fields of the structs of kernels/layout.cuh."""

from collections.abc import Mapping
from functools import lru_cache

import numpy as np
from numpy import ndarray as Array

from engine.clock import BETA, CLOCKS, T_START
from engine.layout import pack
from engine.solvers import control, gauss_newton, runge_kutta
from engine.solvers.gauss_newton import GaussNewton
from engine.solvers.runge_kutta import RungeKutta

# A tape's program as integers. A larger cache gains nothing in a service whose conditions are always new.
packed = lru_cache(maxsize=64)(pack)


def numbers(solver: GaussNewton | RungeKutta) -> Mapping[str, float]:
    """The fields of Solve (kernels/layout.cuh) that belong to the solver."""
    length = CLOCKS[solver.clock][0]
    most = min(solver.max_evaluations, 2**31 - 1)
    common = {"max_evaluations": most, "rtol": solver.rtol, "atol": solver.atol, "length": length}
    if isinstance(solver, GaussNewton):
        return common | gauss_newton_numbers(solver)
    return common | runge_kutta_numbers(solver, length)


def gauss_newton_numbers(solver: GaussNewton) -> dict[str, float]:
    first, second, third = gauss_newton.PHI_ERROR
    return {
        "linear": 1, "steps": solver.steps or 0, "safety": gauss_newton.SAFETY, "shrink": gauss_newton.SHRINK,
        "grow": gauss_newton.GROW, "smallest_step": gauss_newton.SMALLEST_STEP,
        "first_fraction": gauss_newton.FIRST_STEP,
        "budget_growth": control.BUDGET_GROWTH, "gamma": gauss_newton.GAMMA, "phi_error1": first,
        "phi_error2": second, "phi_error3": third, "exponent": gauss_newton.EXPONENT,
        "reach_shrink": gauss_newton.REACH_SHRINK, "reach_grow": gauss_newton.REACH_GROW,
        "near_stretch": gauss_newton.NEAR_STRETCH,
        "fixed_power": gauss_newton.FIXED_POWER, "rate": 1.0,
    }


def runge_kutta_numbers(solver: RungeKutta, length: float) -> dict[str, float]:
    order, steps = solver.tableau.order, solver.fixed_steps or 0
    slow, fast = BETA
    # d tau / d clock: 1, or half of beta at t = T_START - clock.
    rate = {"flow": (1.0, 0.0), "paper": (0.5 * (slow + (fast - slow) * T_START), -0.5 * (fast - slow))}[solver.clock]
    return {
        "linear": 0, "steps": steps, "safety": runge_kutta.SAFETY, "shrink": runge_kutta.SHRINK,
        "grow": runge_kutta.GROW, "smallest_step": runge_kutta.SMALLEST_STEP,
        "first_fraction": runge_kutta.FIRST_STEP,
        "stages": len(solver.tableau.b), "fsal": solver.tableau.is_fsal,
        "proportional": runge_kutta.PROPORTIONAL / order,
        "integral": runge_kutta.INTEGRAL / order, "rate": rate[0], "rate_slope": rate[1],
    }


def tableau(solver: GaussNewton | RungeKutta) -> Array:
    """(stages + 2, stages): the weights of each stage, of the step and of its error; zeros where a method has none."""
    if not isinstance(solver, RungeKutta):
        return np.zeros((2, 1))
    t = solver.tableau
    return np.vstack([t.matrix, np.array(t.b, float), np.array(t.error or [0.0] * len(t.b), float)])
