"""The solvers that have a kernel, and how many rounds their rows take."""

from typing import TypeGuard

from engine.solvers import Solver
from engine.solvers.gauss_newton import GaussNewton
from engine.solvers.runge_kutta import RungeKutta

# The solvers that have a kernel.
Steps = GaussNewton | RungeKutta
# Rounds that are unrolled into a graph; more go through a loop on the device.
UNROLLED = 64


def has_kernel(solver: Solver) -> TypeGuard[Steps]:
    return type(solver) in (GaussNewton, RungeKutta)  # a class of one's own may step in another way


def kernel(solver: Steps) -> str:
    return "gauss_newton" if isinstance(solver, GaussNewton) else "runge_kutta"


def rounds(solver: Steps) -> int | None:
    """Evaluations that every row takes, where that is known and few enough to be unrolled."""
    if isinstance(solver, GaussNewton) and solver.steps is not None and solver.steps < UNROLLED:
        return solver.steps + 1
    return None


def most_evaluations(solver: Steps) -> int:
    """More than any row takes: beyond it a loop on the device has gone astray."""
    if isinstance(solver, GaussNewton):
        return 2 * (solver.max_evaluations if solver.steps is None else solver.steps) + 8
    return solver.max_evaluations + 2 * len(solver.tableau.b) + 8
