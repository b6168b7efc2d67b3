"""How well a bundle's pictures obey conditions, by the word of an image classifier.

The judge is a ``lace_trainer.judges.classifier`` that had no part in training the heads. A class counts by its hit
rate, a value by its mean absolute error: Nie, Vahdat, Anandkumar, NeurIPS 2021, call the hit rate and 1 - error both
ACC.
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy import ndarray as Array

from engine.batch import Status
from engine.condition import Condition, Is
from engine.requests import Request, Sample
from engine.sampler import Sampler
from engine.tape import satisfied
from lace_evaluation.questions import SHOWN, TOLERANCE, Judge, Known, asked, statements
from lace_evaluation.statistics import wilson

CLASS_GOAL, VALUE_GOAL = 0.95, 0.1  # least hit rate, greatest mean absolute error


@dataclass(frozen=True, slots=True)
class Score:
    """How often a statement holds.

    rate, low, high   of pictures in which it holds, a value within 0.1; 95 % Wilson interval
    error             mean absolute error where a value was asked for, else None
    heads             the rate by the bundle's own heads, which steered the sampling
    plain, plain_error   rate and error among the same seeds without a condition
    """

    statement: str
    rate: float
    low: float
    high: float
    error: float | None
    heads: float
    plain: float
    plain_error: float | None

    @property
    def acc(self) -> float:
        return self.rate if self.error is None else 1 - self.error

    @property
    def met(self) -> bool:
        return self.rate >= CLASS_GOAL if self.error is None else self.error <= VALUE_GOAL


@dataclass(frozen=True, slots=True)
class Result:
    """One condition. ``seconds``: of solving, decoding and judging; ``stopped``: rows that did not arrive."""

    condition: str
    attributes: int
    count: int
    scores: tuple[Score, ...]
    whole: Score
    energy: float
    evaluations: float
    most_evaluations: int
    stopped: int
    seconds: dict[str, float]


@dataclass(frozen=True, slots=True)
class Summary:
    """All conditions with one number of attributes; None where they state no class or no value.

    missed   the statements that did not meet the goal, each with its condition
    """

    attributes: int
    conditions: int
    least_acc: float | None
    mean_acc: float | None
    mean_error: float | None
    most_error: float | None
    mean_whole: float
    missed: tuple[str, ...]


def as_logits(attributes: Iterable[Known], labels: Array) -> dict[str, Array]:
    """labels (rows, attributes) as logits that say the same: one-hot rows, values as they are."""
    found = {}
    for i, attribute in enumerate(attributes):
        column = labels[:, i]
        found[attribute.name] = (
            np.eye(len(attribute.classes))[column.astype(int)] if attribute.kind == "class" else column[:, None]
        )
    return found


def score(leaf: Condition, attributes: Mapping, seen: dict, heads: dict, plain: dict) -> Score:
    """``seen``, ``heads``, ``plain``: logits by the judge, by the bundle's heads, by the judge without a condition."""
    holds = [satisfied(leaf, attributes, logits, tolerance=TOLERANCE) for logits in (seen, heads, plain)]
    errors: tuple[float | None, float | None] = (None, None)
    if isinstance(leaf, Is) and attributes[leaf.name].kind == "value":
        errors = tuple(float(np.abs(logits[leaf.name][:, 0] - leaf.choice).mean()) for logits in (seen, plain))
    rate, by_heads, by_chance = (float(held.mean()) for held in holds)
    low, high = wilson(int(holds[0].sum()), len(holds[0]))
    return Score(str(leaf), rate, low, high, errors[0], by_heads, by_chance, errors[1])


def look(sampler: Sampler, judge: Judge, requests: list[Request]) -> tuple[list[Sample], dict, dict[str, float]]:
    """Decoded samples, what the judge sees in them, and the seconds of each part."""
    times = [time.perf_counter()]
    samples = sampler.solve(requests)
    times.append(time.perf_counter())
    samples = sampler.render(samples)
    times.append(time.perf_counter())
    seen = as_logits(judge.attributes, judge.predict(np.stack([sample.image for sample in samples])))
    times.append(time.perf_counter())
    spent = np.diff(times).round(3).tolist()
    return samples, seen, dict(zip(("solve", "decode", "judge"), spent, strict=True))


def evaluate(
    sampler: Sampler, judge: Judge, conditions: Sequence[Condition], *, count: int, seed: int = 0,
    label: int | None = None, progress: Callable[[int, int, str], None] | None = None,
) -> tuple[list[Result], dict[str | None, list[Array]]]:
    """Judge ``count`` samples of every condition, all from the same seeds.

    returns   results in the order of ``conditions``, and the first pictures of each condition and of None
    """
    attributes = sampler.bundle.attributes
    results, pictures, plain = [], {}, {}
    for i, condition in enumerate([None, *conditions]):
        name = None if condition is None else str(condition)
        if progress:
            progress(i, len(conditions) + 1, name or "no condition")
        requests = [Request(condition, seed=seed + row, label=label) for row in range(count)]
        samples, seen, seconds = look(sampler, judge, requests)
        pictures[name] = [sample.image for sample in samples[:SHOWN]]
        if name is None:
            plain = seen
            continue
        heads = {a: np.stack([sample.logits[a] for sample in samples]) for a in asked(condition)}
        scores = tuple(score(leaf, attributes, seen, heads, plain) for leaf in statements(condition))
        evaluations = [sample.evaluations for sample in samples]
        results.append(Result(
            name, len(asked(condition)), count, scores, score(condition, attributes, seen, heads, plain),
            float(np.mean([sample.energy for sample in samples])), float(np.mean(evaluations)), max(evaluations),
            sum(sample.status != Status.DONE for sample in samples), seconds,
        ))
    return results, pictures


def summarise(results: Iterable[Result]) -> list[Summary]:
    """One summary for every number of attributes that was asked for together."""
    results = list(results)
    found = []
    for number in sorted({result.attributes for result in results}):
        group = [result for result in results if result.attributes == number]
        scores = [(result, s) for result in group for s in result.scores]
        rates = [s.rate for _, s in scores if s.error is None]
        errors = [s.error for _, s in scores if s.error is not None]
        missed = tuple(f"{s.statement} in {result.condition}" if number > 1 else s.statement
                       for result, s in scores if not s.met)
        found.append(Summary(
            number, len(group), min(rates, default=None), float(np.mean(rates)) if rates else None,
            float(np.mean(errors)) if errors else None, max(errors, default=None),
            float(np.mean([result.whole.rate for result in group])), missed,
        ))
    return found
