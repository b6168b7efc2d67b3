"""What decides a Fréchet distance from the renders, and which of two is smaller by more than chance.

The judge's features have a heavy tail: most of the renders' variance lies along one direction, in which a few faces are
far out. So a distance from few rows depends on how many of them happened to be such faces, and two distances must be
compared with the same rows drawn for both.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy import ndarray as Array

from lace_evaluation.statistics import resampled
from lace_trainer.judges.metrics import Moments, frechet_distance

EQUAL = 1.05  # Fréchet distances of which one is at most this many times the other count as equal
FID_RESAMPLES = 200
FAR = 2.0  # standard deviations beyond which a face is far out


@dataclass(frozen=True, slots=True, eq=False)
class Widest:
    """The direction in which features of renders vary most.

    direction (d,) of length 1;  mean, spread: of the renders along it, the latter a standard deviation
    share   of the renders' whole variance
    """

    direction: Array
    mean: float
    spread: float
    share: float

    def far(self, features: Array) -> float:
        """Share of the rows (n, d) that lie more than FAR spreads of the renders from their mean."""
        return float((np.abs(features @ self.direction - self.mean) > FAR * self.spread).mean())

    def distance(self, features: Array) -> float:
        """Fréchet distance of features (n, d) from the renders along this direction alone."""
        along = features @ self.direction
        return float((along.mean() - self.mean) ** 2 + (along.std(ddof=1) - self.spread) ** 2)


def widest(real: Moments) -> Widest:
    values, vectors = np.linalg.eigh(real.covariance)
    direction = vectors[:, -1]
    share = float(values[-1] / values.sum())
    return Widest(direction, float(real.mean @ direction), float(np.sqrt(values[-1])), share)


def weighted_moments(features: Array, weights: Array) -> Moments:
    """Moments of features (n, d), each counted ``weights`` (n,) times."""
    count = weights.sum()
    mean = weights @ features / max(count, 1)
    centred = features - mean
    return Moments(mean, (centred * weights[:, None]).T @ centred / max(count - 1, 1), int(count))


def frechet_change(real: Moments, before: Array, after: Array,
                   counted: Sequence[Array | float] = (1.0, 1.0)) -> tuple[float, float, float]:
    """Of the distance of ``after`` (n, d) minus that of ``before``: 95 % bootstrap interval, and standard error.

    Each time the same rows are drawn for both.  counted: of each, 1 or 0 for every row, whether it has a picture
    """
    pair = [(np.asarray(x, np.float64), here) for x, here in zip((before, after), counted, strict=True)]
    draws = resampled(len(before), seed=0, resamples=FID_RESAMPLES)
    found = [[frechet_distance(real, weighted_moments(x, weights * here)) for x, here in pair] for weights in draws]
    change = np.array(found) @ (-1.0, 1.0)
    low, high = np.quantile(change, (0.025, 0.975))
    return float(low), float(high), float(change.std())
