"""Suites of the solver: the machine, one evaluation, solves, hard targets."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from numpy import ndarray as Array

from engine.batch import Batch, Status
from engine.bench import timing
from engine.bench.contest import Answer, Bench, Openers, Run
from engine.bench.problem import CONVERGED_HARD, GUIDANCE, Judge, Problem, hard, ordinary
from engine.sampler import Sampler

# Rows for each number of attributes.
SOLVES = {3: (1, 4, 16, 64, 256), 1: (1, 16, 64), 12: (1, 16, 64)}
FIELDS = {3: (1, 16, 64, 256), 12: (1, 16, 64)}
SHORT = {3: (1, 4)}  # of a --quick run
HARD_ROWS = 16
# Steps of the solves without error control.
FIXED = (6, 8)
# An answer is wrong if its energy is above the converged flow's by more than this part of it and this much, or if its
# end is farther from the converged end than this many times the way. Loose on purpose: dopri5 at the paper's tolerance
# chatters around the end, and a peer's time shall count unless its answer is of no use.
ENERGY_SHARE, ENERGY_EXTRA, TRAJECTORY = 0.5, 0.05, 2.0
# Gradients in bfloat16 are right to about 1e-2; a wrong one is wrong by 1.
GRADIENT_ERROR = 0.05


def machine(bench: Bench) -> None:
    """Streaming rates at the size of a field's weights and beyond every cache, and the rates of products."""
    tests: dict[str, tuple[str, Callable[[], float]]] = {
        **{f"streaming {n} MB": ("GB/s", partial(timing.streaming, n)) for n in (12, 24, 512)},
        **{f"product of {n} rows": ("GFLOP/s", partial(timing.multiplying, n)) for n in (1, 16, 64, 1024)},
    }
    for name, (unit, test) in tests.items():
        line = {"suite": "machine", "contestant": name}
        if not bench.log.has(line):
            bench.say(f"machine: {name}")
            bench.log.write([{**line, "unit": unit, "median": test(), "repeats": 1, "check": "passed"}])


def problems(bench: Bench, grid: dict[int, tuple[int, ...]]) -> list[Problem]:
    """The problems of a grid that the bundle has enough attributes for."""
    bundle = bench.bundle
    return [Problem(bundle, ordinary(bundle, count), rows)
            for count, several in (SHORT if bench.quick else grid).items()
            for rows in several if count <= len(bundle.attributes)]


def setting(suite: str, problem: Problem) -> dict:
    return {"suite": suite, "world": problem.bundle.path.stem, "bundle": problem.bundle.hash[:12],
            "attributes": len(problem.targets), "rows": problem.rows, "condition": str(problem.condition)}


# --- one evaluation -----------------------------------------------------------------------------------------------


def field(bench: Bench) -> None:
    """One evaluation with the rows of the Jacobian, as a step of the default solver takes it; peers: the gradient."""
    for problem in problems(bench, FIELDS):
        openers: Openers = {name: partial(open_field, problem, threads=bench.threads, **settings)
                            for name, settings in bench.ours().items()}
        exact = open_field(problem, runtime="numpy")()
        bench.contest(setting("field", problem), {**openers, **bench.peers.fields(problem)},
                      partial(examine_field, problem, exact))


def open_field(problem: Problem, **settings) -> Run:
    """Evaluates at the start of every row; returns the gradient (rows, z_dim)."""
    sampler = Sampler(problem.bundle, capacity=problem.rows, guidance=GUIDANCE, **settings)
    g, rows = problem.bundle.generator, np.arange(problem.rows)
    batch = Batch(problem.rows, g.z_dim, g.w_dim, sampler.runtime.solving.dtype)
    for row, request in enumerate(problem.requests):
        batch.admit(row, sampler.starts.start(request))
    flow = sampler.flows.new_flow()
    return lambda: flow.evaluate(batch, rows, batch.z, linear=True).gradient


def examine_field(problem: Problem, exact: Array, gradient: Array) -> dict[str, Any]:
    error = np.linalg.norm(gradient - exact, axis=1) / np.maximum(np.linalg.norm(exact, axis=1), 1e-12)
    typical = float(np.median(error))
    return {"details": {"gradient_error": typical, **cost(problem)},
            "check": "passed" if typical <= GRADIENT_ERROR else "the gradient is wrong"}


def cost(problem: Problem) -> dict[str, float]:
    """Bytes and FLOPs of one linearised evaluation in float32: every weight is read forwards and backwards."""
    bundle = problem.bundle
    mapping = sum(tensor.size for name, tensor in bundle.field.items()
                  if name.startswith("mapping.") and name.endswith(".weight"))
    rows: dict[str, int] = {}  # of the Jacobian, by head: one for two classes and for a value
    for target in problem.targets:
        attribute = bundle.attributes[target.attribute]
        rows[attribute.head] = rows.get(attribute.head, 0) + (attribute.width if attribute.width > 2 else 1)
    heads = {name: sum(a * b for a, b in zip(bundle.heads[name].widths, bundle.heads[name].widths[1:], strict=False))
             for name in rows}
    forward, backward = mapping + sum(heads.values()), sum(r * (mapping + heads[name]) for name, r in rows.items())
    return {"bytes": 2 * 4 * forward, "flops": 2 * problem.rows * (forward + backward)}


# --- solves -------------------------------------------------------------------------------------------------------


def solve(bench: Bench) -> None:
    """One condition for many rows."""
    for problem in problems(bench, SOLVES):
        openers: Openers = {name: partial(open_solve, bench, problem, **settings)
                            for name, settings in bench.ours().items()}
        for name, settings in bench.ours().items():
            if "runtime" not in settings:
                openers |= {f"{name}, {steps} steps": partial(open_solve, bench, problem, steps=steps, **settings)
                            for steps in FIXED}
        bench.contest(setting("solve", problem), {**openers, **bench.peers.solvers(problem)},
                      partial(examine_solve, bench.judge, problem))


def hard_targets(bench: Bench) -> None:
    """Rare, contradicting and unreachable targets: what bounds the cost, and what the bound costs."""
    for kind, targets in hard(bench.bundle).items():
        problem = Problem(bench.bundle, targets, 2 if bench.quick else HARD_ROWS)
        openers: Openers = {
            "ours": partial(open_solve, bench, problem),
            "ours, 2000 evaluations": partial(open_solve, bench, problem, max_evaluations=2000),
            "our dopri5": partial(open_solve, bench, problem, solver="dopri5", clock="paper"),
        }
        judge = replace(bench.judge, tolerance=CONVERGED_HARD)
        bench.contest({**setting("hard", problem), "targets": kind}, openers, partial(examine_solve, judge, problem),
                      rounds=1)


def open_solve(bench: Bench, problem: Problem, **settings) -> Run:
    """All of ``Sampler.solve``: it draws the latents and lowers the condition too, which peers are given."""
    sampler = Sampler(problem.bundle, capacity=problem.rows, threads=bench.threads, guidance=GUIDANCE, **settings)

    def run() -> Answer:
        samples = sampler.solve(problem.requests)
        z = np.stack([sample.z for sample in samples if sample.z is not None])
        failed = sum(sample.status != Status.DONE for sample in samples)
        return Answer(z, np.array([sample.evaluations for sample in samples]), failed)

    return run


def examine_solve(judge: Judge, problem: Problem, answer: Answer) -> dict[str, Any]:
    verdict, counts = judge.judge(problem, answer.z), np.array(answer.evaluations)
    limit = verdict.floor * (1 + ENERGY_SHARE) + ENERGY_EXTRA
    wrong = [
        *(["not all rows arrived"] if answer.failed else []),
        *(["the energy is too high"] if not verdict.energy <= limit else []),
        *(["the end is too far from the flow's"] if not verdict.trajectory_error <= TRAJECTORY else []),
    ]
    return {"evaluations": {"mean": float(counts.mean()), "most": int(counts.max())}, "energy": verdict.energy,
            "floor_energy": verdict.floor, "trajectory_error": verdict.trajectory_error,
            "check": "; ".join(wrong) or "passed", **({"note": answer.note} if answer.note else {})}
