"""Solvers: how a row advances along the flow. One file per kind; Runge-Kutta methods are data.

A solver is a frozen record of its settings with two functions:

    begin(flow, batch, rows)   evaluate the start of newly admitted rows
    step(flow, batch, rows)    advance each running row by at most one step, and set its status

A runtime's own way to run a solver may take more steps a call, unless ``batch.is_watched``.

Rows share calls of the field and nothing else: each has its own time, step size, error and status.
"""

from dataclasses import fields, replace

from engine.errors import SolveError
from engine.flow import Solver
from engine.solvers.gauss_newton import GaussNewton
from engine.solvers.posterior import Posterior
from engine.solvers.runge_kutta import RungeKutta
from engine.solvers.stochastic import Langevin, PredictorCorrector
from engine.solvers.tableaus import TABLEAUS

SOLVERS = {
    "gauss-newton": (GaussNewton, {}),
    "posterior": (Posterior, {}),
    **{name: (RungeKutta, {"tableau": tableau}) for name, tableau in TABLEAUS.items()},
    "langevin": (Langevin, {}),
    "predictor-corrector": (PredictorCorrector, {}),
}


def make_solver(name: str | Solver, **settings) -> Solver:
    """The solver ``name`` with the settings that are not None, or a solver as it is.

    Raises SolveError for a name or a setting that does not exist.
    """
    if not isinstance(name, str):
        if any(value is not None for value in settings.values()):
            raise SolveError("settings go into the solver record itself, or beside a solver's name")
        return name
    if name not in SOLVERS:
        raise SolveError(f"there is no solver {name!r}; known are: {', '.join(SOLVERS)}")
    kind, fixed = SOLVERS[name]
    given = {key: value for key, value in settings.items() if value is not None}
    allowed = [f.name for f in fields(kind) if f.name not in fixed]
    for key in given:
        if key not in allowed:
            raise SolveError(f"solver {name!r} has no setting {key!r}; it has: {', '.join(allowed)}")
    return kind(**fixed, **given)


def with_steps(solver: Solver, steps: int) -> Solver:
    """The solver with so many fixed steps."""
    if "steps" not in solver.__dataclass_fields__:
        raise SolveError(f"solver {describe(solver)} takes no number of steps: leave steps out")
    return replace(solver, steps=steps)


def name_and_settings(solver: Solver) -> tuple[str, dict]:
    """What ``make_solver`` makes an equal solver of; of a record of another kind, its class's name.

    The solvers that the posterior falls back on are left out: they are the flow's own.
    """
    values = {name: getattr(solver, name) for name in solver.__dataclass_fields__ if name not in ("flow", "nearer")}
    tableau = values.pop("tableau", None)
    kinds = {kind: name for name, (kind, fixed) in SOLVERS.items() if not fixed}
    return kinds.get(type(solver), type(solver).__name__) if tableau is None else tableau.name, values


def describe(solver: Solver) -> str:
    """A solver's name and its settings."""
    name, values = name_and_settings(solver)
    return f"{name}({', '.join(f'{key}={value}' for key, value in values.items())})"
