"""Intervals: of a rate, of a mean, of the difference of two runs."""

import math
from functools import lru_cache

import numpy as np
from numpy import ndarray as Array

RESAMPLES = 2000
NORMAL = 1.959963984540054  # two-sided 95 %


def wilson(hits: int, count: int) -> tuple[float, float]:
    """95 % interval of a rate. Wilson 1927, J. Am. Stat. Assoc. 22(158); unlike Wald's it holds near 0 and 1."""
    centre = (hits + NORMAL * NORMAL / 2) / (count + NORMAL * NORMAL)
    half = NORMAL / (count + NORMAL * NORMAL) * math.sqrt(hits * (count - hits) / count + NORMAL * NORMAL / 4)
    return max(0.0, centre - half), min(1.0, centre + half)


def half_width(rows: Array) -> float:
    """Half of the 95 % interval of the mean of rows (n,), by the normal law; 0 for a single row."""
    return NORMAL * float(np.std(rows, ddof=1)) / math.sqrt(len(rows)) if len(rows) > 1 else 0.0


@lru_cache(maxsize=8)
def resampled(count: int, seed: int, resamples: int = RESAMPLES) -> Array:
    """How often each of ``count`` rows is drawn in each bootstrap sample, (resamples, count) float32."""
    rng = np.random.default_rng(seed)
    return rng.multinomial(count, np.full(count, 1 / count), size=resamples).astype(np.float32)


def bootstrap(difference: Array, seed: int = 0) -> tuple[float, float, float]:
    """Of the mean of ``difference`` (n,): low and high end of the 95 % percentile interval, and standard error.

    Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 13.
    """
    means = resampled(len(difference), seed) @ difference.astype(np.float64) / len(difference)
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high), float(means.std())


def bootstrap_rms(before: Array, after: Array, seed: int = 0) -> tuple[float, float]:
    """95 % percentile interval of the root mean square of ``after`` (n,) minus that of ``before``, paired by rows."""
    drawn = resampled(len(before), seed) / len(before)
    change = np.sqrt(drawn @ np.square(after, dtype=float)) - np.sqrt(drawn @ np.square(before, dtype=float))
    low, high = np.quantile(change, (0.025, 0.975))
    return float(low), float(high)
