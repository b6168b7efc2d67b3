"""The definition of the tape interpreter: log-truth-value, gradient and curvature of conditions, many rows at once.

A program is a tuple of nodes in post-order; a node is (name, *integers). Leaves push, joins pop two and push one. The
integers are local column numbers and positions in `parameters`, so rows that differ only in targets, weights or class
indices share a program. With u the row's columns and p = parameters[position:]:

    ("class", first, count, position)      p = y               v = log softmax(u)[y] over count columns from first
    ("not_class", first, count, position)  p = y               v = log(1 - softmax(u)[y])
    ("tempered", first, count, position)   p = y, 1/T - 1      v = u[y]/T - logsumexp(u)                         (LACE)
    ("difference", column, position)       p = +-1             v = log sigmoid(p u), u = logit[1] - logit[0]
    ("value", column, position)            p = y, 1/sigma      v = -x^2 / 2,  x = (u - y) / sigma
    ("not_value", column, position)        p = y, 1/sigma      v = log(1 - exp(-x^2 / 2))
    ("side", column, position)             p = a, +-1/sigma    v = log Phi(x),  x = +-(u - a) / sigma
    ("keep", first, count, position)       p = weight, anchor  v = -weight sum (u - anchor)^2
    ("weight", position)                   p = k               v = k v
    ("and",)                                                   v = a + b
    ("or",)                                                    v = log(1 - (1 - e^a)(1 - e^b))
    ("lace_or",)                                               v = log(20 e^a + e^b)                             (LACE)
    ("not",)                                                   v = -alpha v, alpha = min(0.1 / |v|, 1) constant  (LACE)

Every node carries v (rows,), g = dv/du (rows, columns) and two positive semi-definite curvatures (rows, columns,
columns): c for -v and n for +v (None is zero; only LACE's NOT, which swaps the two, ever reads n). c is the exact
Hessian of -v for a conjunction of leaves; where -v is not convex, the concave part is left out.

The functions below are stable for |u| up to 1e50, hence for any float32. There is no BLAS call and no reduction over
rows: a row's result does not depend on its neighbours, to the last bit.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

Array = np.ndarray
NOT_STRENGTH = 0.1  # LACE's NOT: the negated term pulls with at most this much of its own value
OR_LEFT_WEIGHT = 20.0  # LACE's OR is not symmetric
HIGHEST_VALUE = -1e-6  # ~(u = y) has no gradient direction at u = y and log 0 as its value; stay this far away

# (1 + 2z) exp(z^2) erfc(z) for z >= 0 as a polynomial in t = (z - 3.75) / (z + 3.75), t in [-1, 1).
# The form is that of Shepherd and Laframboise 1981, Math. Comp. 36(153), 249-253; the coefficients are our own
# Chebyshev projection in 60 digits, summed into powers of t. Relative error below 1e-15. One cumulative product makes
# it cheap in numpy, where Cody's three ranges would all be computed for all elements.
SCALED_ERFC = np.array([
    1.2375126308378275, -0.14024059858554697, 0.0035854154854790244, 0.08227673849014519, -0.10880393014244456,
    0.0923043211603778, -0.05869339857665025, 0.028362277418952194, -0.00974657968325749, 0.0017556258529250511,
    0.0002937143780065857, -0.0002901540806687894, 5.164652985937567e-05, 2.2384239507062384e-05,
    -1.1438048263916145e-05, -9.735605292737017e-07, 1.741982447999373e-06, -5.7217491776133646e-08,
    -2.4857148727700746e-07, 2.3262968376546198e-08, 3.1979365113738564e-08, -3.743985418249448e-09,
    -2.623125895761616e-09, 3.1110282151097085e-10,
])
ERFC_CENTRE = 3.75
FAR_TAIL = 200.0  # beyond it x + lam(x) would cancel; three terms of the asymptotic series have 1e-12 there


class Node(NamedTuple):
    """v, its gradient g, and the curvatures of -v and of +v."""

    v: Array
    g: Array
    c: Array | None
    n: Array | None = None


def evaluate(program: tuple, parameters: Array, u: Array) -> tuple[Array, Array, Array]:
    """Log-truth-value of a program, its gradient and a curvature, in float64.

    parameters  (rows, P)           targets, scales, weights, anchors
    u           (rows, columns)     logits and logit differences; v is not a number where one of them is not finite
    returns     v (rows,), g (rows, columns) = dv/du, c (rows, columns, columns) ~ Hessian of -v, PSD.  Energy E = -v.
    """
    parameters = np.asarray(parameters, dtype=np.float64)
    u = np.ascontiguousarray(u, dtype=np.float64)
    rows, columns = u.shape
    stack = []
    for name, *places in program:
        if name in LEAVES:
            stack.append(LEAVES[name](parameters, u, *places))
        elif name in JOINS:
            right = stack.pop()
            stack.append(JOINS[name](stack.pop(), right))
        elif name == "weight":
            stack.append(_scale(stack.pop(), parameters[:, places[0]]))
        else:
            stack.append(_not(stack.pop()))
    if not stack:
        return np.zeros(rows), np.zeros((rows, columns)), np.zeros((rows, columns, columns))
    (node,) = stack
    # The limit at infinity may be finite, but an infinite logit has overflowed on its way.
    v = np.where(np.isfinite(u).all(axis=1), node.v, np.nan)
    return v, node.g, np.zeros((rows, columns, columns)) if node.c is None else node.c


def log_ndtr(x: Array) -> tuple[Array, Array, Array]:
    """log Phi(x) of the normal distribution, its derivative lam = phi/Phi, and minus its second, lam (x + lam).

    x (n,) -> three (n,). Relative error below 1e-12 for the first two, for every x; below 1e-10 for the third.
    """
    z = np.abs(x) * np.sqrt(0.5)
    t = (z - ERFC_CENTRE) / (z + ERFC_CENTRE)
    powers = np.empty((*t.shape, len(SCALED_ERFC)))
    powers[..., 0], powers[..., 1:] = 1.0, t[..., None]
    np.multiply.accumulate(powers, axis=-1, out=powers)
    scaled = (powers * SCALED_ERFC).sum(axis=-1) / (1.0 + 2.0 * z)  # exp(z^2) erfc(z)
    square = z * z
    bell = np.exp(-square)
    negative = x < 0
    value = np.where(negative, np.log(0.5 * scaled) - square, np.log1p(-0.5 * scaled * bell))
    lam = np.sqrt(2 / np.pi) * np.where(negative, 1.0 / scaled, bell / (2.0 - scaled * bell))
    far = np.maximum(-x, FAR_TAIL) ** -2
    return value, lam, np.where(x < -FAR_TAIL, 1.0 - far + 6.0 * far * far, lam * (x + lam))


def _split(parameters: Array, u: Array, first: int, count: int, position: int) -> tuple[Array, Array, Array, Array]:
    """The chosen class against the others: one-hot, its logit, the others' softmax, and d = logit - lse(others).

    In d every class leaf is a two-class leaf, log sigmoid(+-d), so neither a probability near 1 nor one near 0 cancels.
    """
    logits = u[:, first : first + count]
    chosen = parameters[:, position, None] == np.arange(count)
    own = logits[chosen]  # one per row, in row order
    others = np.where(chosen, -np.inf, logits)
    top = others.max(axis=1)
    others = np.exp(others - top[:, None])
    total = others.sum(axis=1)
    return chosen, own, others / total[:, None], own - top - np.log(total)


def _class(parameters: Array, u: Array, first: int, count: int, position: int) -> Node:
    chosen, _, others, d = _split(parameters, u, first, count, position)
    v = -np.logaddexp(0.0, -d)
    missing = np.exp(v - d)[:, None]  # 1 - softmax[y]
    p = np.where(chosen, np.exp(v)[:, None], missing * others)
    block = -p[:, :, None] * p[:, None, :]
    block.reshape(len(p), -1)[:, :: count + 1] += p
    return _place(u, slice(first, first + count), v, missing * (chosen - others), block)


def _not_class(parameters: Array, u: Array, first: int, count: int, position: int) -> Node:
    chosen, _, others, d = _split(parameters, u, first, count, position)
    v = -np.logaddexp(0.0, d)
    p = np.exp(v + d)[:, None]  # softmax[y]
    towards = others - chosen
    block = p[:, :, None] * (towards[:, :, None] * towards[:, None, :])
    return _place(u, slice(first, first + count), v, p * towards, block)


def _tempered(parameters: Array, u: Array, first: int, count: int, position: int) -> Node:
    plain = _class(parameters, u, first, count, position)
    chosen = parameters[:, position, None] == np.arange(count)
    extra = parameters[:, position + 1]
    plain.g[:, first : first + count] += extra[:, None] * chosen
    return plain._replace(v=plain.v + extra * u[:, first : first + count][chosen])


def _difference(parameters: Array, u: Array, column: int, position: int) -> Node:
    sign = parameters[:, position]
    x = sign * u[:, column]
    v = -np.logaddexp(0.0, -x)
    missing = np.exp(v - x)
    return _place(u, column, v, sign * missing, missing * np.exp(v))


def _value(parameters: Array, u: Array, column: int, position: int) -> Node:
    scale = parameters[:, position + 1]
    x = (u[:, column] - parameters[:, position]) * scale
    return _place(u, column, -0.5 * x * x, -x * scale, scale * scale)


def _not_value(parameters: Array, u: Array, column: int, position: int) -> Node:
    scale = parameters[:, position + 1]
    x = (u[:, column] - parameters[:, position]) * scale
    inner = np.minimum(-0.5 * x * x, HIGHEST_VALUE)
    v = np.where(inner > -0.5, np.log(-np.expm1(inner)), np.log1p(-np.exp(inner)))
    odds = np.exp(inner - v)  # e^v / (1 - e^v)
    gradient = x * scale  # of x^2 / 2
    return _place(u, column, v, odds * gradient, odds * (1.0 + odds) * gradient * gradient)


def _side(parameters: Array, u: Array, column: int, position: int) -> Node:
    scale = parameters[:, position + 1]
    v, lam, bend = log_ndtr((u[:, column] - parameters[:, position]) * scale)
    return _place(u, column, v, lam * scale, bend * (scale * scale))


def _keep(parameters: Array, u: Array, first: int, count: int, position: int) -> Node:
    weight = parameters[:, position]
    gap = u[:, first : first + count] - parameters[:, position + 1 : position + 1 + count]
    block = (2.0 * weight)[:, None, None] * np.eye(count)
    return _place(
        u, slice(first, first + count), -weight * (gap * gap).sum(axis=1), -2.0 * weight[:, None] * gap, block
    )


def _place(u: Array, where: slice | int, v: Array, g: Array, c: Array) -> Node:
    """A leaf's gradient and curvature among all columns."""
    if u.shape[1] == 1:
        return Node(v, g.reshape(-1, 1), c.reshape(-1, 1, 1))
    gradient, curvature = np.zeros(u.shape), np.zeros((*u.shape, u.shape[1]))
    gradient[:, where] = g
    curvature[:, where, where] = c
    return Node(v, gradient, curvature)


def _and(a: Node, b: Node) -> Node:
    return Node(a.v + b.v, a.g + b.g, _sum(a.c, b.c), _sum(a.n, b.n))


def _or(a: Node, b: Node) -> Node:
    # log(e^a + e^b - e^(a+b)) around the larger term, so that (-1e6, -1e6) is as safe as (0, 0). The shares are built
    # from the excess and not from v, whose rounding at -1e6 would already cost five digits.
    high = np.maximum(a.v, b.v)
    excess = np.log1p(-np.expm1(high) * np.exp(np.minimum(a.v, b.v) - high))
    share_a = np.exp((a.v - high) - excess) * -np.expm1(b.v)
    share_b = np.exp((b.v - high) - excess) * -np.expm1(a.v)
    return Node(np.minimum(high + excess, 0.0), *_mix(share_a, a, share_b, b))


def _lace_or(a: Node, b: Node) -> Node:
    gap = (a.v - b.v) + np.log(OR_LEFT_WEIGHT)
    v = np.logaddexp(a.v + np.log(OR_LEFT_WEIGHT), b.v)
    share_a, share_b = np.exp(-np.logaddexp(0.0, -gap)), np.exp(-np.logaddexp(0.0, gap))
    g, c = _mix(share_a, a, share_b, b)
    between = a.g - b.g
    spread = (share_a * share_b)[:, None, None] * (between[:, :, None] * between[:, None, :])
    n = _sum(_times(share_a, a.n), _times(share_b, b.n))
    return Node(v, g, c, _sum(n, spread))


def _not(a: Node) -> Node:
    alpha = NOT_STRENGTH / np.maximum(np.abs(a.v), NOT_STRENGTH)
    scaled = _scale(a, alpha)
    return Node(-scaled.v, -scaled.g, scaled.n, scaled.c)


def _scale(a: Node, factor: Array) -> Node:
    return Node(factor * a.v, factor[:, None] * a.g, _times(factor, a.c), _times(factor, a.n))


def _mix(share_a: Array, a: Node, share_b: Array, b: Node) -> tuple[Array, Array | None]:
    g = share_a[:, None] * a.g + share_b[:, None] * b.g
    return g, _sum(_times(share_a, a.c), _times(share_b, b.c))


def _times(factor: Array, matrix: Array | None) -> Array | None:
    return None if matrix is None else factor[:, None, None] * matrix


def _sum(a: Array | None, b: Array | None) -> Array | None:
    return b if a is None else a if b is None else a + b


LEAVES: dict[str, Callable[..., Node]] = {
    "class": _class,
    "not_class": _not_class,
    "tempered": _tempered,
    "difference": _difference,
    "value": _value,
    "not_value": _not_value,
    "side": _side,
    "keep": _keep,
}
JOINS: dict[str, Callable[[Node, Node], Node]] = {"and": _and, "or": _or, "lace_or": _lace_or}
