"""The suite of mixed requests: each has its own condition, easy or hard, and its own number of attributes.

Two kinds of static batches take part. In one each call of the field is for all rows of the batch until its last row has
arrived, as in batched solvers and in servers without continuous batching. In the other a row costs nothing from its
arrival on, as in our own ``solve`` of one batch; its free slot is all that is lost.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import numpy as np
from numpy import ndarray as Array

from engine.batch import Batch
from engine.bench.contest import Bench, Openers, Run
from engine.bench.problem import Problem, Target, hard
from engine.bundle import Bundle
from engine.flow import Flow, Point
from engine.requests import Request, Sample
from engine.sampler import Sampler
from engine.solvers import Solver

# Batch after batch: every row computed until the last has arrived; and rows that have arrived left out of the calls.
STATIC, LEAVING = "static batches, all rows to the last", "static batches, arrived rows left out"
STREAM_ERROR = 1e-5  # of w, against the same request solved alone
# Rows in flight, as many as a Sampler has without being asked, and requests: a dozen batches.
FULL, QUICK = (64, 768), (8, 24)
# Requests in, samples in the same order out.
Way = Callable[[list[Request]], list[Sample]]


@dataclass(frozen=True, slots=True)
class WholeBatch:
    """A flow whose calls are for all rows of the batch, those that have arrived too."""

    flow: Flow

    def evaluate(self, batch: Batch, rows: Array, z: Array, *, linear: bool) -> Point:
        whole = batch.z.copy()
        whole[rows] = z
        return self.flow.evaluate(batch, np.arange(batch.capacity), whole, linear=linear).some(rows)


@dataclass(frozen=True, slots=True)
class ToTheLast:
    """Another solver, on whole batches: the field is evaluated for every row until the last row has arrived.

    The rest of a step, a few small linear systems, is left out for rows that have arrived, which flatters it.
    """

    inner: Solver

    def begin(self, flow: Flow, batch: Batch, rows: Array) -> None:
        self.inner.begin(cast(Flow, WholeBatch(flow)), batch, rows)

    def step(self, flow: Flow, batch: Batch, rows: Array) -> None:
        self.inner.step(cast(Flow, WholeBatch(flow)), batch, rows)


@dataclass(frozen=True, slots=True)
class CompiledToTheLast:
    """The same for a solver whose steps are compiled: it is given all rows, and moves those that have not arrived."""

    inner: Solver

    def begin(self, flow: Flow, batch: Batch, rows: Array) -> None:
        batch.is_watched = True  # a step a call: the inner solver would stop at rows that have arrived
        self.inner.begin(flow, batch, rows)

    def step(self, flow: Flow, batch: Batch, rows: Array) -> None:
        self.inner.step(flow, batch, np.flatnonzero((batch.columns > 0) | (batch.near > 0)))  # all that have begun


def stream(bench: Bench) -> None:
    """Mixed requests, batch after batch and in one queue; with pictures too, where the bundle can draw."""
    bundle, (capacity, count) = bench.bundle, QUICK if bench.quick else FULL
    requests = mixed(bundle, count)
    line = {"suite": "stream", "world": bundle.path.stem, "bundle": bundle.hash[:12], "rows": count,
            "capacity": capacity}
    batches = partial(in_batches, capacity)
    with Sampler(bundle, capacity=capacity, threads=bench.threads) as sampler:
        stepper = sampler.flows.stepper()
        kind = ToTheLast if stepper is sampler.flows.solver else CompiledToTheLast
        whole = Sampler(bundle, capacity=capacity, threads=bench.threads, solver=kind(stepper))
        alone = np.stack([sampler.solve([request])[0].w for request in requests])
        ways: dict[str, Way] = {STATIC: partial(batches, whole.solve), LEAVING: partial(batches, sampler.solve),
                                "one queue": sampler.solve}
        bench.contest({**line, "pictures": False}, openers(requests, ways), partial(examine, alone))
        if "synthesis" in bundle.manifest.graphs:
            ways = {STATIC: partial(batches, whole.sample), LEAVING: partial(batches, sampler.sample),
                    "stream": partial(streamed, sampler), "submit": partial(submitted, sampler)}
            bench.contest({**line, "pictures": True}, openers(requests, ways), partial(examine, alone))


def openers(requests: list[Request], ways: dict[str, Way]) -> Openers:
    def opened(way: Way) -> Run:
        return lambda: np.stack([sample.w for sample in way(requests)])

    return {name: partial(opened, way) for name, way in ways.items()}


def in_batches(capacity: int, batch: Way, requests: list[Request]) -> list[Sample]:
    parts = (requests[first : first + capacity] for first in range(0, len(requests), capacity))
    return [sample for part in parts for sample in batch(part)]


def streamed(sampler: Sampler, requests: list[Request]) -> list[Sample]:
    """In the order of the requests."""
    found = {id(sample.request): sample for sample in sampler.stream(requests)}
    return [found[id(request)] for request in requests]


def submitted(sampler: Sampler, requests: list[Request]) -> list[Sample]:
    return [future.result() for future in [sampler.submit(request) for request in requests]]


def examine(alone: Array, w: Array) -> dict[str, Any]:
    error = float(np.abs(w - alone).max())
    check = "passed" if error <= STREAM_ERROR else "w is not that of the request alone"
    return {"check": check, "details": {"error": error}}


def mixed(bundle: Bundle, count: int) -> list[Request]:
    """Requests of one to twelve attributes; one in five asks for what is rare or cannot be had at all."""
    rng, label = np.random.default_rng(0), 0 if bundle.generator.labels else None
    extremes = list(hard(bundle).values())
    requests = []
    for seed in range(count):
        if rng.random() < 0.2:
            targets = extremes[rng.integers(len(extremes))]
        else:
            names = rng.permutation(list(bundle.attributes))[: rng.integers(1, min(12, len(bundle.attributes)) + 1)]
            targets = tuple(any_target(rng, bundle, str(name)) for name in names)
        requests.append(Request(Problem(bundle, targets, 1).condition, seed=seed, label=label))
    return requests


def any_target(rng: np.random.Generator, bundle: Bundle, name: str) -> Target:
    attribute = bundle.attributes[name]
    if attribute.kind == "class":
        return Target(name, int(rng.integers(len(attribute.classes))))
    low, high = attribute.range
    return Target(name, round(float(low + rng.uniform(0.2, 0.8) * (high - low)), 4))
