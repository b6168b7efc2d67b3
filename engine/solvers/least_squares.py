"""Residuals made small near an anchor, by damped Gauss-Newton steps, for many rows at once.

A row minimises F(x) = |rho(x)|^2 / 2 + pull |x - anchor|^2 / 2. With J the Jacobian of its K residuals, b = J^T rho +
pull (x - anchor) and D = pull + damping, a step is -(D + J^T J)^-1 b, which takes a K x K system only:

    step = -(b - J^T (D + J J^T)^-1 J b) / D

The damping is a row's own (Levenberg, Marquardt): less after a step that lowers F, more after one that does not and is
taken back. A row's bits do not depend on its neighbours.

Nocedal and Wright, "Numerical Optimization", chapter 10.
"""

from collections.abc import Callable

import numpy as np
from numpy import ndarray as Array

# rows (n,), x (n, d) -> residuals (n, K) and their Jacobian (n, K, d), both float64
Evaluate = Callable[[Array, Array], tuple[Array, Array]]

LESS, MORE = 0.25, 4.0  # of the damping after a step that was accepted, or taken back
FIRST, LEAST, MOST = 0.5, 1e-3, 1e4  # in units of the pull: the first damping, what counts as none, what ends a row
SETTLED = 1e-3  # a step that lowers F by less than this part ends a row


def settle(evaluate: Evaluate, offset: Array, pull: float, steps: int) -> tuple[Array, Array, Array]:
    """Where rows settle that begin at 0 with their anchors at -offset (n, d), after at most so many steps.

    returns   x (n, d); evaluations and steps taken back (n,)
    """
    x, damping = np.zeros_like(offset), np.zeros(len(offset))
    evaluations, rejected = np.ones(len(offset), int), np.zeros(len(offset), int)
    rows = np.arange(len(offset))
    residuals, jacobian = evaluate(rows, x)
    cost = total(residuals, offset, pull)
    for _ in range(steps):
        trial = x[rows] + step(residuals[rows], jacobian[rows], x[rows] + offset[rows], pull, damping[rows])
        there, slopes = evaluate(rows, trial)
        after = total(there, trial + offset[rows], pull)
        evaluations[rows] += 1
        good = after < cost[rows]  # false where something is not a number
        ends = good & (cost[rows] - after <= SETTLED * after)
        damping[rows] = damped(damping[rows], good, pull)
        moved = rows[good]
        x[moved], residuals[moved], jacobian[moved], cost[moved] = trial[good], there[good], slopes[good], after[good]
        rejected[rows] += ~good
        rows = rows[~ends & (damping[rows] < MOST * pull)]
        if not len(rows):
            break
    return x, evaluations, rejected


def total(residuals: Array, way: Array, pull: float) -> Array:
    """F (n,)."""
    return 0.5 * np.vecdot(residuals, residuals) + 0.5 * pull * np.vecdot(way, way)


def step(residuals: Array, jacobian: Array, way: Array, pull: float, damping: Array) -> Array:
    """residuals (n, K), jacobian (n, K, d), way from the anchor (n, d), damping (n,) -> (n, d)."""
    scale = pull + damping
    b = np.einsum("nk,nkd->nd", residuals, jacobian) + pull * way
    gram = np.vecdot(jacobian[:, :, None], jacobian[:, None])
    gram += scale[:, None, None] * np.eye(gram.shape[1])
    seen = np.linalg.solve(gram, np.vecdot(jacobian, b[:, None])[:, :, None])[:, :, 0]
    return (np.einsum("nk,nkd->nd", seen, jacobian) - b) / scale[:, None]


def damped(damping: Array, good: Array, pull: float) -> Array:
    """The next damping (n,)."""
    less = np.where(damping * LESS < LEAST * pull, 0.0, damping * LESS)
    return np.where(good, less, np.maximum(damping * MORE, FIRST * pull))
