"""How sure the heads are that a condition holds: log P by product logic, forwards only, for many rows at once.

The programs are those of engine/reference/tape.py, of product logic. Two more leaves are statements on a value that are
true or false, see ``engine.tape.lower_crisp``; p = parameters[position:]:

    ("inside", column, position)    p = low, high, 1/sigma    true where low <= u <= high
    ("outside", column, position)   p = low, high, 1/sigma    false there

A statement that is false has the log-probability FALSE, or, where the program is ``relaxed``, -x^2 / 2 with x the
distance to where it would be true, in sigmas. Joins are monotone, so that a relaxed program is never below the crisp
one, and equal to it where all statements on values are true: its level sets hold the set that is wanted and lead to it.
"""

from collections.abc import Callable

import numpy as np
from numpy import ndarray as Array

from engine.reference.tape import HIGHEST_VALUE, log_ndtr

# Finite, so that sums and differences are; and so low that no weight of other terms makes up for it.
FALSE = -1e4


def log_probability(program: tuple, parameters: Array, u: Array, *, relaxed: bool = False) -> Array:
    """log P (rows,) of a program, float64.

    parameters (rows, P), u (rows, columns) as in ``engine.reference.tape.evaluate``, whose value this is for programs
    without crisp leaves
    """
    parameters = np.asarray(parameters, np.float64)
    u = np.asarray(u, np.float64)
    stack: list[Array] = []
    for name, *places in program:
        if name in CRISP:
            stack.append(CRISP[name](parameters, u, *places, relaxed))
        elif name in LEAVES:
            stack.append(LEAVES[name](parameters, u, *places))
        elif name == "weight":
            stack.append(stack.pop() * parameters[:, places[0]])
        else:
            right = stack.pop()
            stack.append(JOINS[name](stack.pop(), right))
    return stack[0] if stack else np.zeros(len(u))


def log_probabilities(program: tuple, parameters: Array, u: Array) -> tuple[Array, Array]:
    """log P relaxed and crisp, (rows,) each: the same array where no statement is crisp, and else two."""
    crisp = log_probability(program, parameters, u)
    if not any(name in CRISP for name, *_ in program):
        return crisp, crisp
    return log_probability(program, parameters, u, relaxed=True), crisp


def _others(parameters: Array, u: Array, first: int, count: int, position: int) -> Array:
    """The chosen class against the others: its logit minus the log-sum-exp of theirs."""
    logits = u[:, first : first + count]
    chosen = parameters[:, position, None] == np.arange(count)
    others = np.where(chosen, -np.inf, logits)
    top = others.max(axis=1)
    return logits[chosen] - top - np.log(np.exp(others - top[:, None]).sum(axis=1))


def _class(parameters: Array, u: Array, first: int, count: int, position: int) -> Array:
    return -np.logaddexp(0.0, -_others(parameters, u, first, count, position))


def _not_class(parameters: Array, u: Array, first: int, count: int, position: int) -> Array:
    return -np.logaddexp(0.0, _others(parameters, u, first, count, position))


def _difference(parameters: Array, u: Array, column: int, position: int) -> Array:
    return -np.logaddexp(0.0, -parameters[:, position] * u[:, column])


def _value(parameters: Array, u: Array, column: int, position: int) -> Array:
    return -0.5 * np.square((u[:, column] - parameters[:, position]) * parameters[:, position + 1])


def _not_value(parameters: Array, u: Array, column: int, position: int) -> Array:
    return np.log(-np.expm1(np.minimum(_value(parameters, u, column, position), HIGHEST_VALUE)))


def _side(parameters: Array, u: Array, column: int, position: int) -> Array:
    return log_ndtr((u[:, column] - parameters[:, position]) * parameters[:, position + 1])[0]


def _inside(parameters: Array, u: Array, column: int, position: int, relaxed: bool) -> Array:
    low, high, scale = parameters[:, position : position + 3].T
    value = u[:, column]
    return _missed(np.maximum(np.maximum(low - value, value - high), 0.0), scale, relaxed)


def _outside(parameters: Array, u: Array, column: int, position: int, relaxed: bool) -> Array:
    low, high, scale = parameters[:, position : position + 3].T
    value = u[:, column]
    return _missed(np.maximum(np.minimum(value - low, high - value), 0.0), scale, relaxed)


def _missed(distance: Array, scale: Array, relaxed: bool) -> Array:
    """distance (rows,) to where the statement is true, 0 there."""
    if relaxed:
        return np.maximum(-0.5 * np.square(distance * scale), FALSE)
    return np.where(distance > 0, FALSE, 0.0)


def _or(a: Array, b: Array) -> Array:
    high = np.maximum(a, b)
    return np.minimum(high + np.log1p(-np.expm1(high) * np.exp(np.minimum(a, b) - high)), 0.0)


LEAVES: dict[str, Callable[..., Array]] = {
    "class": _class, "not_class": _not_class, "difference": _difference, "value": _value, "not_value": _not_value,
    "side": _side,
}
CRISP: dict[str, Callable[..., Array]] = {"inside": _inside, "outside": _outside}
JOINS: dict[str, Callable[[Array, Array], Array]] = {"and": np.add, "or": _or}
