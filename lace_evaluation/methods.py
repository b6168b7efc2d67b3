"""The methods that are compared: same weights, same heads, same seeds, same targets.

plain                 no condition at all
rejection             plain samples until the heads accept one
arithmetic            steps in w along the normals of linear classifiers (InterFaceGAN)
langevin              the paper's Langevin dynamics, its scripts' settings
predictor-corrector   the paper's SDE sampler;  sde: the same without the corrector
dopri5 (paper)        the paper's ODE solver with one step size for the batch
ours                  the sampler as it was opened: gauss-newton unless another was chosen

Beside them, ``converged`` is what a solver without any error would give: it costs a hundred times as much.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
from numpy import ndarray as Array

from engine.condition import Condition
from engine.requests import Request, Sample
from engine.sampler import Sampler
from engine.solvers import TABLEAUS, Langevin, PredictorCorrector, RungeKutta, Solver
from lace_evaluation import OURS
from lace_evaluation.baselines import Plane, arithmetic, fit, reject
from lace_evaluation.paper import BATCH, SharedDopri5
from lace_evaluation.study import Study, at_end

# The paper's SDE has 1,000 levels and takes 3,000 evaluations. In a trial on the demo world 50 levels did better: for
# smile 97 % instead of 81 % of the heads were satisfied, for gender, smile and age they gave ACC 0.90 instead of 0.86.
LEVELS = 50
# A converged solution: a third-order method, which kinks trouble less than a fifth-order one, at a tight tolerance.
REFERENCE, TIGHT = "bosh3", 1e-4
UNLIMITED = 200_000  # evaluations


@dataclass(frozen=True, slots=True, eq=False)
class Outcome:
    """Samples, not yet decoded; which rows arrived at an answer (n,); seconds without decoding."""

    samples: list[Sample]
    reached: Array
    seconds: float


def plain(study: Study, requests: Sequence[Request]) -> Outcome:
    began = time.perf_counter()
    samples = study.sampler.solve([replace(request, condition=None) for request in requests])
    seconds = time.perf_counter() - began
    samples = [replace(s, request=r) for s, r in zip(samples, requests, strict=True)]
    return Outcome(at_end(study.sampler, samples), np.ones(len(samples), bool), seconds)


def rejection(study: Study, requests: Sequence[Request]) -> Outcome:
    """Its time is that of drawing and reading the proposals one after another."""
    samples, reached = reject(study.sampler, study.pool, requests)
    return Outcome(samples, reached, study.pool.seconds * sum(sample.evaluations for sample in samples))


def linear(study: Study, requests: Sequence[Request]) -> Outcome:
    planes = planes_of(study)
    began = time.perf_counter()
    samples = study.sampler.solve([replace(request, condition=None) for request in requests])
    samples = arithmetic(study.sampler, planes, samples, [wanted(request) for request in requests])
    return Outcome(samples, np.ones(len(samples), bool), time.perf_counter() - began)


def wanted(request: Request) -> Condition:
    assert request.expression is not None
    return request.expression


@cache
def planes_of(study: Study) -> dict[str, Plane]:
    return fit(study.pool, study.attributes)


def solved_by(solver: Solver, **changes) -> Callable[[Study, Sequence[Request]], Outcome]:
    return lambda study, requests: solved(study.open_sampler(solver=solver, **changes), requests)


def solved(sampler: Sampler, requests: Sequence[Request]) -> Outcome:
    began = time.perf_counter()
    samples = sampler.solve(list(requests))
    return Outcome(samples, np.ones(len(samples), bool), time.perf_counter() - began)


def tight(tolerance: float = TIGHT) -> RungeKutta:
    return RungeKutta(TABLEAUS[REFERENCE], rtol=tolerance, atol=tolerance, max_evaluations=UNLIMITED)


def converged(study: Study, requests: Sequence[Request]) -> Outcome:
    return solved(study.open_sampler(solver=tight()), requests)


METHODS: dict[str, Callable[[Study, Sequence[Request]], Outcome]] = {
    "plain": plain,
    "rejection": rejection,
    "arithmetic": linear,
    "langevin": solved_by(Langevin()),
    "sde": solved_by(PredictorCorrector(steps=LEVELS, corrections=0)),
    "predictor-corrector": solved_by(PredictorCorrector(steps=LEVELS)),
    "dopri5 (paper)": solved_by(SharedDopri5(), capacity=BATCH),
    OURS: lambda study, requests: solved(study.sampler, requests),
}
