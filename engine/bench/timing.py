"""A race in a fair order, and what the machine itself can do."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

# Contestants that share a process have thread pools that spin for a while after their work; they must not spin into
# the next contestant's time.
PAUSE = 0.02
# A contestant faster than this runs once untimed before each of its turns, and several times in a turn.
QUICK_RUN, RUNS_PER_TURN = 0.05, 5
# A first run longer than this counts as one of the repeats: warming up is nothing beside it.
SLOW_RUN = 2.0


@dataclass(frozen=True, slots=True)
class Times:
    """Milliseconds of ``repeats`` runs: the median and the quartiles."""

    median: float
    q1: float
    q3: float
    repeats: int


def race(
    contestants: Mapping[str, Callable[[], Any]], rounds: int
) -> tuple[dict[str, Times], dict[str, Any], dict[str, Exception]]:
    """Run every contestant in every round, so that a drift of the machine hits all alike.

    Returns the times; what each contestant's first run returned; and the errors of those that failed in it, which are
    out of the race. What compiles has done so before it comes here.
    """
    seconds: dict[str, list[float]] = {}
    answers, errors = {}, {}
    for name, run in contestants.items():
        try:
            answers[name], first = timed(run)
        except Exception as error:  # a peer may raise anything
            errors[name] = error
            continue
        seconds[name] = [first] if first > SLOW_RUN else []
    for _ in range(rounds):
        for name in answers:
            if len(seconds[name]) >= rounds and seconds[name][0] > SLOW_RUN:
                continue
            time.sleep(PAUSE)
            _, once = timed(contestants[name])
            if once > QUICK_RUN:
                seconds[name].append(once)
            else:
                seconds[name] += [timed(contestants[name])[1] for _ in range(RUNS_PER_TURN)]
    return {name: summary(found) for name, found in seconds.items()}, answers, errors


def timed(run: Callable[[], Any]) -> tuple[Any, float]:
    start = time.perf_counter_ns()
    answer = run()
    return answer, (time.perf_counter_ns() - start) / 1e9


def summary(seconds: Sequence[float]) -> Times:
    q1, median, q3 = (float(x) for x in np.quantile(np.array(seconds) * 1e3, (0.25, 0.5, 0.75)))
    return Times(median, q1, q3, len(seconds))


# --- the machine --------------------------------------------------------------------------------------------------


def streaming(megabytes: float) -> float:
    """GB/s at which a matrix of this size flows through a matrix-vector product, as weights do for one row."""
    matrix = np.ones((int(megabytes * 1e6) // 2048, 512), np.float32)
    vector = np.ones(512, np.float32)
    return matrix.nbytes / best(lambda: matrix @ vector) / 1e9


def multiplying(rows: int) -> float:
    """GFLOP/s of a float32 product (rows, 512) x (512, 512), the field's usual one."""
    x, weight = np.ones((rows, 512), np.float32), np.ones((512, 512), np.float32)
    return 2 * rows * 512 * 512 / best(lambda: x @ weight) / 1e9


def best(run: Callable[[], object], seconds: float = 0.3) -> float:
    """The shortest run within about ``seconds``: what the machine can do when nothing disturbs it."""
    found, end = [], time.perf_counter() + seconds
    while time.perf_counter() < end or len(found) < 5:
        found.append(timed(run)[1])
    return min(found)
