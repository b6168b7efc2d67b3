"""Solvers against evaluations: accuracy, energy, and the distance from a converged solution.

The reference of a set of rows is a third-order method at a tight tolerance. How far it can be trusted is measured, not
assumed: the Gauss-Newton step, another method altogether, solves the same rows at the same tolerance without a budget,
and the distance between the two is reported beside every solver's distance from the reference. A row on which the two
part (the flow may split at a kink) has no known end, and counts for no solver's distance. Distances are in z and
relative: root mean square over the rows, over that of the way from the start to the reference's end.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy import ndarray as Array

from engine.batch import Status
from engine.grammar import parse
from engine.reference.noise import normals_many
from engine.requests import Sample
from engine.solvers import TABLEAUS, GaussNewton, Langevin, PredictorCorrector, RungeKutta, Solver
from lace_evaluation import zero_shot
from lace_evaluation.conditional import plain_w
from lace_evaluation.methods import REFERENCE, TIGHT, tight
from lace_evaluation.paper import BATCH, SharedDopri5
from lace_evaluation.statistics import bootstrap_rms
from lace_evaluation.store import Cell
from lace_evaluation.study import Study
from lace_evaluation.targets import Targets, draw, fixed, holds, scores

UNLIMITED = 20_000  # evaluations
DEFAULT, PAPER = "gauss-newton, default", "dopri5, shared step, 1e-3"
EASY, HARD = 1e-5, TIGHT  # tolerances of the reference
ATOL_SHARE = GaussNewton().atol / GaussNewton().rtol
MOST = 128  # rows of a set
TENTH = 0.1  # of the paper's evaluations, for the goal
DETERMINED = 0.05  # of the mean way: what two references may differ by in a row that has a known end


@dataclass(frozen=True, slots=True)
class Entry:
    """One point of the plots: a solver with its settings. ``family`` gives it its colour."""

    family: str
    solver: Solver | None  # None: that of the sampler's flow
    shared: bool = False


def entries() -> dict[str, Entry]:
    """Name -> entry: every solver at several tolerances, budgets or numbers of steps."""
    found = {DEFAULT: Entry("gauss-newton", None)}
    for budget in (8, 16, 64, 128, 256):
        found[f"gauss-newton, {budget} evaluations"] = Entry("gauss-newton", GaussNewton(max_evaluations=budget))
    for rtol in (0.5, 0.15, 0.05, 0.015):
        solver = GaussNewton(rtol=rtol, atol=rtol * ATOL_SHARE, max_evaluations=UNLIMITED)
        found[f"gauss-newton, {rtol:g}, no budget"] = Entry("gauss-newton, no budget", solver)
    for steps in (8, 16, 32):
        found[f"gauss-newton, {steps} fixed steps"] = Entry("gauss-newton, fixed steps", GaussNewton(steps=steps))
    for name, tableau in TABLEAUS.items():
        if tableau.error is None:
            runs = {f"{name}, {n} steps": RungeKutta(tableau, steps=n) for n in (25, 100)}
        else:
            runs = {f"{name}, {tol:.0e}": RungeKutta(tableau, rtol=tol, atol=tol) for tol in (1e-1, 1e-2, 1e-3)}
        found |= {label: Entry(name, solver) for label, solver in runs.items()}
    for steps in (25, 100, 400):
        found[f"langevin, {steps} steps"] = Entry("langevin", Langevin(steps=steps, rate=1.0 / steps))
    for steps in (20, 100):
        found[f"predictor-corrector, {steps} levels"] = Entry("predictor-corrector", PredictorCorrector(steps=steps))
    found["dopri5, shared step, 1e-2"] = Entry("dopri5 (paper)", SharedDopri5(1e-2, 1e-2), shared=True)
    found[PAPER] = Entry("dopri5 (paper)", SharedDopri5(), shared=True)
    return found


def problems(study: Study) -> dict[str, tuple[Targets, float]]:
    """The sets of rows with the tolerance of their reference, from easy to hard.

    A few rows that end far off, where the flow splits, make most of an error: 16 rows do not tell two solvers apart,
    and of 64 one such row may still decide.
    """
    count = max(4, min(MOST, study.count))
    wanted = {
        "one": ("uniform", ("glasses",), EASY),
        "three": ("uniform", ("gender", "smile", "age"), EASY),
        "all": ("training", tuple(study.attributes), HARD),
    }
    found = {
        name: (draw(source, names, study.attributes, count, study.seed), tolerance)
        for name, (source, names, tolerance) in wanted.items() if set(names) <= set(study.attributes)
    }
    if texts := zero_shot.rare(study):
        found["rare"] = (fixed(parse(texts[0]), study.attributes, count), HARD)
    return found


def cells(study: Study) -> dict[str, Callable[[], Cell]]:
    made: dict[str, Callable[[], Cell]] = {}
    for name, (targets, tolerance) in problems(study).items():
        make_reference = partial(reference, study, targets, tolerance)
        made[f"solvers/{name}/reference"] = make_reference
        for label, entry in entries().items():
            made[f"solvers/{name}/{label}"] = partial(cell, study, name, targets, entry, make_reference)
    return made


def solve(study: Study, targets: Targets, solver: Solver | None, *, shared: bool = False) -> list[Sample]:
    changes = {} if solver is None else {"solver": solver, **({"capacity": BATCH} if shared else {})}
    requests = study.requests(targets.conditions(study.attributes))
    return (study.open_sampler(**changes) if changes else study.flow).solve(requests)


def reference(study: Study, targets: Targets, tolerance: float) -> Cell:
    """The converged solution, and how far another method at the same tolerance ends from it."""
    check = GaussNewton(rtol=tolerance, atol=tolerance, max_evaluations=UNLIMITED)
    samples, others = solve(study, targets, tight(tolerance)), solve(study, targets, check)
    (z, w), start = latents(samples), starts(study, len(samples))
    doubt = distances(latents(others)[0], z, start)
    known = determined(doubt)
    facts = {
        "tolerance": tolerance, "rows": len(samples), "method": REFERENCE, "determined": int(known.sum()),
        "evaluations": float(np.mean([s.evaluations for s in samples])),
        "energy": float(np.mean([s.energy for s in samples])), "arrived": arrived(samples),
        "acc": float(scores(targets, study.look(samples).labels, study.attributes).mean()),
        "doubt": summary(doubt[known]),
    }
    return Cell(facts, {"doubt": doubt.astype(np.float32)}, {"z": z, "w": w})


def determined(doubt: Array) -> Array:
    """Rows (n,) of which the end is known; all if there are none, where the doubt then tells how little that is."""
    known = doubt <= DETERMINED
    return known if known.any() else np.ones(len(doubt), bool)


def arrived(samples: list[Sample]) -> float:
    return float(np.mean([sample.status == Status.DONE for sample in samples]))


def latents(samples: list[Sample]) -> tuple[Array, Array]:
    return np.stack([s.z for s in samples if s.z is not None]), np.stack([s.w for s in samples])


def starts(study: Study, count: int) -> Array:
    seeds = range(study.seed, study.seed + count)
    return normals_many(seeds, [0] * count, study.sampler.bundle.generator.z_dim)


def distances(end: Array, exact: Array, start: Array) -> Array:
    """Distance of each row's end (n, d) from the exact one, over the root mean square way of all rows."""
    way = np.sqrt(np.mean(np.square(start - exact).sum(axis=1)))
    return np.linalg.norm(end - exact, axis=1) / way


def summary(distance: Array) -> dict[str, float]:
    return {"rms": float(np.sqrt(np.mean(distance**2))), "median": float(np.median(distance))}


def cell(study: Study, name: str, targets: Targets, entry: Entry, make_reference: Callable[[], Cell]) -> Cell:
    samples = solve(study, targets, entry.solver, shared=entry.shared)
    score = scores(targets, study.look(samples).labels, study.attributes)
    exact = study.store.cell(f"solvers/{name}/reference", make_reference)
    known, (z, w) = determined(exact.rows["doubt"]), latents(samples)
    distance = distances(z, exact.other["z"], starts(study, len(samples)))
    in_w = distances(w, exact.other["w"], plain_w(study, len(samples)))
    rows = {
        "acc": score.mean(axis=1), "holds": holds(targets, score, study.attributes),
        "energy": np.array([s.energy for s in samples]), "evaluations": np.array([s.evaluations for s in samples]),
        "distance": np.where(known, distance, 0.0),
    }
    facts = {
        "family": entry.family, **{name: float(values.mean()) for name, values in rows.items()},
        "most_evaluations": int(rows["evaluations"].max()), "error": summary(distance[known]),
        "error_w": summary(in_w[known]), "arrived": arrived(samples),
    }
    return Cell(facts, {key: np.asarray(values, np.float32) for key, values in rows.items()})


def facts(study: Study, found: Mapping[str, Cell]) -> dict:
    """JSON: {sets: {set: {reference, solvers, verdict}}}."""
    result = {}
    for name, (targets, _) in problems(study).items():
        own = {key.split("/", 2)[2]: made.facts for key, made in found.items() if key.startswith(f"solvers/{name}/")}
        exact = own.pop("reference")
        result[name] = {
            "asked": list(targets.names),
            "reference": exact,
            "solvers": own,
            "verdict": verdict(own, exact, paired(found, name)),
        }
    return {"sets": result}


def paired(found: Mapping[str, Cell], name: str) -> dict[str, float]:
    """The default beside the paper's solver, on the rows that have a known end.

    low, high   95 % interval of the default's error minus the paper's, by the bootstrap with the same rows for both.
                Rows are drawn one by one, although BATCH of the paper's share their steps: there are few batches.
    nearer      share of the rows in which the default ends nearer
    """
    known = determined(found[f"solvers/{name}/reference"].rows["doubt"])
    ours, paper = (found[f"solvers/{name}/{label}"].rows["distance"][known] for label in (DEFAULT, PAPER))
    low, high = bootstrap_rms(paper, ours)
    return {"low": low, "high": high, "nearer": float((ours < paper).mean())}


def verdict(own: Mapping[str, dict], exact: dict, difference: Mapping[str, float]) -> dict:
    """Is the default as near to the reference as the paper's solver, at a tenth of its evaluations?

    difference   of the two errors, as ``paired`` gives it
    near         None where nobody can tell: the difference may be chance, or the reference's own doubt (not
                 ``telling``) is greater than the paper's error
    """
    ours, paper = own[DEFAULT], own[PAPER]
    telling = exact["doubt"]["rms"] < paper["error"]["rms"]
    certain = difference["high"] <= 0 or difference["low"] > 0
    return {
        "near": difference["high"] <= 0 if telling and certain else None, "telling": telling, **difference,
        "cheap": ours["evaluations"] <= TENTH * paper["evaluations"],
        "ours": ours["error"], "paper": paper["error"], "ours_evaluations": ours["evaluations"],
        "paper_evaluations": paper["evaluations"],
    }
