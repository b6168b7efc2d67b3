"""Evaluation, solve, decode, end to end: ours by precision, and peers on the same weights and the same GPU."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from numpy import ndarray as Array

from benchmarks.gpu import layers, machine, peers
from engine.bench.contest import Answer, Bench, Openers, Run
from engine.bench.drawing import PSNR, examine_picture, golden_ws, of_pictures
from engine.bench.problem import GUIDANCE, Problem, ordinary
from engine.bench.solving import cost, examine_solve, setting
from engine.bundle import Bundle
from engine.constants import Queue
from engine.cuda.engine import Engine
from engine.cuda.solve import Plan, Tickets
from engine.runtimes import MissingRuntime, Runtime, UnfitDevice, open_runtime
from engine.sampler import Sampler
from engine.solvers import make_solver

ROWS = (1, 16, 64, 256)
ATTRIBUTES = (3, 12)
PRECISIONS = ("fp32", "tf32", "fp16")
PICTURES = (1, 8, 64)
# Evaluations in one graph, so that its launch is a small part of what is measured.
CHAIN = 20
# Decoders may compute in half precision; the golden pictures are float32.
PSNR_HALF = 35.0


@dataclass(frozen=True, slots=True)
class Measured(Answer):
    """An answer, and what else was found on the way."""

    details: Mapping[str, Any] = field(default_factory=dict)


def problems(bench: Bench, rows: tuple[int, ...]) -> list[Problem]:
    counts = [count for count in ATTRIBUTES if count <= len(bench.bundle.attributes)] or [len(bench.bundle.attributes)]
    return [Problem(bench.bundle, ordinary(bench.bundle, count), n) for count in counts for n in rows]


def runtime_for(bundle: Bundle, precision: str | None = None, name: str = "cuda") -> Runtime:
    found = open_runtime(bundle, name, device="cuda", precision=precision)
    assert found.device == "cuda"
    return found


def sampler_for(problem: Problem, precision: str, **settings) -> Sampler:
    return Sampler(problem.bundle, runtime="cuda", device="cuda", precision=precision, capacity=min(problem.rows, 256),
                   guidance=GUIDANCE, **settings)


# --- one evaluation -----------------------------------------------------------------------------------------------


def evaluation(bench: Bench, rows: tuple[int, ...]) -> None:
    """One linearised evaluation on the device, without its decision: time by the device's own clock."""
    for problem in problems(bench, rows):
        line = setting("gpu evaluation", problem)
        for precision in PRECISIONS:
            name = f"ours {precision}"
            if bench.only in name and not bench.log.has({**line, "contestant": name}):
                bench.say(f"evaluation: {name}, {len(problem.targets)} attributes, {problem.rows} rows")
                bench.log.write([{**line, "contestant": name, **evaluated(problem, precision)}])


def evaluated(problem: Problem, precision: str) -> dict[str, Any]:
    runtime = runtime_for(problem.bundle, precision)
    plan = admitted(runtime.solving.engine, problem)
    device, solve = runtime.solving.engine.device, plan.control["solve"]
    e = plan.evaluation
    launches = [*e.forward(solve), *e.head_jacobians(), *e.backward(solve)]
    graph = device.capture(lambda: plan.launch(launches * CHAIN))
    times = [device.elapsed(graph.launch) / CHAIN for _ in range(12)][2:]
    clock, work = machine.clock(), cost(problem)
    median, least = float(np.median(times)), machine.floor(device, work, precision)
    size = 0.5 if precision == "fp16" else 1.0
    graph.close()
    runtime.close()
    return {
        "unit": "ms", "median": median, "q1": float(np.quantile(times, 0.25)), "q3": float(np.quantile(times, 0.75)),
        "repeats": len(times), "check": "passed",
        "details": {"launches": len(launches), "gigabytes_per_second": work["bytes"] * size / median / 1e6,
                    "floor_ms": least, "times_floor": least and median / least, **clock},
    }


def admitted(engine: Engine, problem: Problem, **settings) -> Plan:
    """A plan with the problem's rows on the device."""
    sampler = Sampler(problem.bundle, runtime="numpy", guidance=GUIDANCE)
    starts = [sampler.starts.start(request) for request in problem.requests]
    zero, tapes = np.zeros(len(starts)), [start.tape for start in starts]
    tickets = Tickets(problem.z0, np.array([s.psi for s in starts]), np.array([s.label for s in starts]), zero,
                      problem.z0, problem.z0, tapes)
    reading, places = engine.read(tickets, linear=True)
    shape = engine.shape(tickets, reading, problem.rows, problem.bundle.spaces["z"])
    plan = engine.plan(shape, make_solver("gauss-newton", **settings))
    plan.admit(tickets, reading, places)
    return plan


# --- solves -------------------------------------------------------------------------------------------------------


def solve(bench: Bench, rows: tuple[int, ...]) -> None:
    """From requests on the host to samples on the host."""
    for problem in problems(bench, rows):
        openers: Openers = {f"ours {p}": partial(open_solve, problem, p) for p in PRECISIONS}
        openers |= {"ours fp16, 8 steps": partial(open_solve, problem, "fp16", steps=8), **peers.solvers(problem)}
        bench.contest(setting("gpu solve", problem), openers, partial(examine, bench, problem))


def open_solve(problem: Problem, precision: str, **settings) -> Run:
    sampler = sampler_for(problem, precision, **settings)
    engine = sampler.runtime.solving.engine  # type: ignore[attr-defined]  # a CudaSolving

    def run() -> Answer:
        samples = sampler.solve(problem.requests)
        z = np.stack([sample.z for sample in samples if sample.z is not None])
        failed = sum(sample.status.name != "DONE" for sample in samples)
        plan: Plan = next(reversed(engine.plans.values()))
        kernels = len(plan.round(on_device=False))
        waves = -(-problem.rows // plan.shape.capacity) if settings.get("steps") else 1
        details = {
            "launches": waves,
            "rounds": int(plan.progress[Queue.ITERATIONS]),
            "kernels_a_round": kernels,
            **machine.clock(),
        }
        return Measured(z, np.array([sample.evaluations for sample in samples]), failed, details=details)

    run()
    return timed_without(run, lambda: sampler.solve(problem.requests))


def timed_without(first: Callable[[], Answer], then: Callable[[], Any]) -> Run:
    """The first run tells the details, which takes time; the others, which are timed, only solve."""
    told = False

    def run() -> Any:
        nonlocal told
        if told:
            return then()
        told = True
        return first()

    return run


def examine(bench: Bench, problem: Problem, answer: Answer) -> dict[str, Any]:
    details = {"details": dict(answer.details)} if isinstance(answer, Measured) else {}
    return {**examine_solve(bench.judge, problem, answer), **details}


# --- pictures -----------------------------------------------------------------------------------------------------


def decode(bench: Bench, rows: tuple[int, ...]) -> None:
    """w on the host to pictures on the host."""
    for bundle in bench.pictured:
        for n in rows:
            ws = golden_ws(bundle, n)
            openers: Openers = {f"ours by {name}": partial(open_decode, bundle, ws, name) for name in decoders()}
            line = {"suite": "gpu decode", **of_pictures(bundle), "rows": n}
            bench.contest(line, {**openers, **peers.drawers(bundle, ws)}, partial(examine_half, bundle))


def decoders() -> tuple[str, ...]:
    return ("tensorrt", "tensorrt_rtx", "cuda")


def open_decode(bundle: Bundle, ws: Array, name: str) -> Run:
    try:
        runtime = runtime_for(bundle, name=name)
    except (MissingRuntime, UnfitDevice) as error:
        raise peers.Unavailable(str(error)) from error
    runtime.drawing.synthesize(ws)
    return lambda: runtime.drawing.synthesize(ws)


def examine_half(bundle: Bundle, images: Array) -> dict[str, Any]:
    found = examine_picture(bundle, images)
    limit = PSNR if bundle.manifest.graphs["synthesis"].get("precision") == "fp32" else PSNR_HALF
    return {**found, "check": "passed" if found["psnr"] >= limit else f"PSNR below {limit:g} dB"}


def end_to_end(bench: Bench, rows: tuple[int, ...]) -> None:
    """Requests to 8-bit pictures on the host."""
    for bundle in bench.pictured:
        for n in rows:
            problem = Problem(bundle, ordinary(bundle, min(3, len(bundle.attributes))), n)
            openers: Openers = {f"ours by {name}": partial(open_picture, problem, name) for name in decoders()}
            line = {**setting("gpu end-to-end", problem), "resolution": bundle.generator.resolution}
            bench.contest(line, openers, partial(examine_solve, bench.judge, problem))


def open_picture(problem: Problem, name: str) -> Run:
    try:
        sampler = Sampler(problem.bundle, runtime=name, device="cuda", capacity=problem.rows, guidance=GUIDANCE)
    except (MissingRuntime, UnfitDevice) as error:
        raise peers.Unavailable(str(error)) from error

    def run() -> Answer:
        samples = sampler.sample(problem.requests)
        z = np.stack([sample.z for sample in samples if sample.z is not None])
        return Answer(z, np.array([sample.evaluations for sample in samples]))

    run()
    return run


# name: what it measures, with which numbers of rows
SUITES: dict[str, tuple[Callable[[Bench, tuple[int, ...]], None], tuple[int, ...]]] = {
    "layers": (layers.layers, layers.ROWS),
    "evaluation": (evaluation, ROWS),
    "solve": (solve, ROWS),
    "decode": (decode, PICTURES),
    "end-to-end": (end_to_end, PICTURES),
}
