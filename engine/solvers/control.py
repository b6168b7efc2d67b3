"""Step control shared by the adaptive solvers. All of it is per row."""

import numpy as np
from numpy import ndarray as Array

# Steps of the rest of a budget grow by this factor. The flow is fast at first: with 1.05 the first steps were forced,
# and on trained faces the ends were 0.68 of the way off instead of 0.15; 1.3 leaves too much time for the last steps.
BUDGET_GROWTH = 1.2


def error_norm(error: Array, before: Array, after: Array, rtol: float, atol: float) -> Array:
    """Root mean square of error / (atol + rtol max(|before|, |after|)) over a row; accept at most 1.

    error, before, after (n, d) -> (n,).  torchdiffeq takes the same norm over the whole flattened batch, which
    couples the rows; here each row has its own.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        scale = atol + rtol * np.maximum(np.abs(before), np.abs(after))
        return np.sqrt(np.mean(np.square(error / scale), axis=1, dtype=float))


def root_mean_square(x: Array) -> Array:
    """Of each row: (n, d) -> (n,) float64."""
    return np.sqrt(np.vecdot(x, x).astype(float) / x.shape[1])


def first_step(z: Array, velocity: Array, rtol: float, atol: float, *, fraction: float) -> Array:
    """A first step that moves by ``fraction`` of |z|, both in the units of the tolerance; at most 0.3."""
    zero = np.zeros_like(z)
    distance, speed = error_norm(z, z, zero, rtol, atol), error_norm(velocity, z, zero, rtol, atol)
    # Both may overflow; where their quotient is not a number, the step is 0.3.
    return np.fmin(fraction * np.maximum(distance, 1.0) / np.maximum(speed, 1e-6), 0.3)


def remaining_budget_step(left: Array, evaluations: Array) -> Array:
    """The shortest step now from which ``evaluations`` growing steps still cover ``left``."""
    # Beyond 1,000 the floor is below any step anyway, and the power would overflow.
    n = np.minimum(np.maximum(evaluations, 1), 1000)
    return left * (BUDGET_GROWTH - 1) / (BUDGET_GROWTH**n - 1)
