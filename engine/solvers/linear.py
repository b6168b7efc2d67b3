"""The linear flow of a Gauss-Newton step, solved in the few directions that a condition reads."""

import numpy as np
from numpy import ndarray as Array

# More columns than these are padded to a multiple of as many before the inverse, so that a batch of many conditions
# takes few calls of it. That depends on the row alone, and so do its bits.
FEW = 4


class Linear:
    """S = (I - c A)^-1 with A = -(J^T C J + lambda I), for n rows with up to r columns each.

    jacobian (n, r, d) = J, gradient (n, d) = F, curvature (n, r, r) = C, shift (n,) = lambda, c (n,); zeros beyond the
    columns (n,) of a row

    S is ``scale``, 1 / (1 + c lambda), times an S with less of c and without lambda. That one takes x = a F + J^T y to
    a F + J^T (y - pull s), where s is what J sees of the result, inverse^T J x. So only ``project`` and ``expand``
    touch vectors of d numbers.

    A row's bits do not depend on r, which its neighbours influence: einsum sums column by column, so that zeros behind
    a row's columns change nothing (a matrix product may sum in another order), and the size of the inverse depends on
    the row's own columns only.
    """

    def __init__(self, jacobian: Array, gradient: Array, curvature: Array, shift: Array, c: Array, columns: Array):
        self.jacobian, self.gradient = jacobian, gradient
        self.scale = 1 / (1 + c * shift)
        self.pull = (c * self.scale)[:, None, None] * curvature
        gram = np.vecdot(jacobian[:, :, None], jacobian[:, None]).astype(float)
        # Woodbury: (I + c J^T C J)^-1 = I - J^T c C (I + c G C)^-1 J; the symmetric C and G transpose what is inverted.
        self.inverse = inverses(self.pull, gram, columns)

    def powers(self, weights: Array) -> Array:
        """Sums of S F, S^2 F, ... with k weights for each, (n, k, powers), as (a, y): (n, k, 1 + r)."""
        n, k, count = weights.shape
        seen = np.empty((count + 1, n, self.pull.shape[1]))
        seen[0] = self.project(self.gradient)
        for power in range(count):
            np.einsum("nji,nj->ni", self.inverse, seen[power], out=seen[power + 1])
        pulled = np.cumsum(np.einsum("nji,pnj->pni", self.pull, seen[1:]), axis=0)
        weights = weights * (self.scale[:, None] ** np.arange(1, count + 1))[:, None]
        short = np.empty((n, k, 1 + seen.shape[2]))
        short[:, :, 0] = weights.sum(axis=2)
        short[:, :, 1:] = np.einsum("nkp,pnr->nkr", -weights, pulled)
        return short

    def twice(self, x: Array, less: Array) -> Array:
        """S^2 x (n, d) minus the vector ``less``, which is given as (a, y), (n, 1 + r)."""
        square = self.scale * self.scale
        once = np.einsum("nji,nj->ni", self.inverse, self.project(x))
        seen = once + np.einsum("nji,nj->ni", self.inverse, once)
        short = -less
        short[:, 1:] -= square[:, None] * np.einsum("nji,nj->ni", self.pull, seen)
        return self.expand(short[:, None])[0] + square.astype(x.dtype)[:, None] * x

    def project(self, x: Array) -> Array:
        """J x: (n, d) -> (n, r) float64."""
        return np.vecdot(self.jacobian, x[:, None]).astype(float)

    def expand(self, short: Array) -> Array:
        """The vectors that (a, y) stand for: (n, k, 1 + r) -> (k, n, d)."""
        short = short.astype(self.gradient.dtype)
        full = np.einsum("nkr,nrd->knd", short[:, :, 1:], self.jacobian)
        full += short[:, :, 0].T[:, :, None] * self.gradient
        return full


def inverses(pull: Array, gram: Array, columns: Array) -> Array:
    """(I + pull gram)^-1 of each row's own columns, (n, r, r). Singular by rounding only: then not-a-number."""
    most = gram.shape[1]
    sizes = np.where(columns > FEW, -(-columns // FEW) * FEW, columns)
    distinct = set(sizes.tolist())
    if distinct == {most}:
        return invert_each(np.eye(most) + np.matmul(pull, gram))
    found = np.zeros_like(gram)
    for size in distinct:
        part, r = np.flatnonzero(sizes == size), min(size, most)
        padded = np.zeros((2, len(part), size, size))
        padded[0, :, :r, :r], padded[1, :, :r, :r] = pull[part, :r, :r], gram[part, :r, :r]
        found[part, :r, :r] = invert_each(np.eye(size) + np.matmul(*padded))[:, :r, :r]
    return found


def invert_each(systems: Array) -> Array:
    """np.linalg.inv, but a system that is singular in double precision gives not-a-number for its own row."""
    try:
        return np.linalg.inv(systems)
    except np.linalg.LinAlgError:
        if len(systems) == 1:
            return np.full_like(systems, np.nan)
        return np.concatenate([invert_each(systems[i : i + 1]) for i in range(len(systems))])
