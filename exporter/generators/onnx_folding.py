"""Shape arithmetic of ONNX graphs: small numbers that follow from constants and from the sizes of other results.

Exporters write ``x.view(x.size(0), -1, 4, 4)`` as a dozen nodes. What they compute depends on the number of rows at
most, so it is evaluated for two numbers of rows: what is alike in both is constant, and what is proportional to them
counts rows.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy import ndarray as Array
from onnx import helper

from engine.onnx_file import Malformed
from engine.operators import Dim

ROWS = "rows"
COUNTS = (1009, 2003)  # two primes, which no size of a network is a multiple of by chance
MOST_NUMBERS = 4096  # of a result that is computed here

# The same numbers for the two counts of rows.
Pair = tuple[Array, Array]


def constant(array: Array) -> Pair:
    return array, array


def is_constant(pair: Pair) -> bool:
    return pair[0].shape == pair[1].shape and bool(np.array_equal(*pair))


def of_dims(dims: Sequence[Dim]) -> Pair:
    """The sizes of a result as numbers."""
    return tuple(np.array([evaluate(dim, rows) for dim in dims], np.int64) for rows in COUNTS)  # type: ignore


def evaluate(dim: Dim, rows: int) -> int:
    if isinstance(dim, int):
        return dim
    return sum(math.prod(rows if factor == ROWS else int(factor) for factor in term.split("*"))
               for term in dim.split("+"))


def as_dims(pair: Pair, op: str) -> list[Dim]:
    """Sizes that a node computed: numbers, and ROWS where they count the rows."""
    found: list[Dim] = []
    for low, high in zip(pair[0].ravel().tolist(), pair[1].ravel().tolist(), strict=True):
        if low == high:
            found.append(int(low))
        elif (low, high) == COUNTS:
            found.append(ROWS)
        elif low * COUNTS[1] == high * COUNTS[0]:
            found.append(f"{low // COUNTS[0]}*{ROWS}")
        else:
            raise Malformed(f"{op} computes a size that is neither constant nor a multiple of the rows")
    return found


def fold(op: str, pairs: Sequence[Pair | None], attributes: Mapping[str, Any]) -> Pair | None:
    """The node's result, if it is arithmetic of small numbers. Inputs that are left out are None."""
    make = ARITHMETIC.get(op)
    if make is None or any(x.size > MOST_NUMBERS for pair in pairs if pair for x in pair):
        return None
    found = []
    for side in (0, 1):
        inputs = [None if pair is None else pair[side] for pair in pairs]
        try:
            if growth(op, inputs) > MOST_NUMBERS**2 / 16:
                return None
            with np.errstate(all="ignore"):
                found.append(np.asarray(make(inputs, attributes)))
        except (IndexError, KeyError, TypeError, ValueError, ZeroDivisionError, OverflowError, MemoryError) as error:
            raise Malformed(f"{op} has inputs or attributes that do not fit it") from error
    return found[0], found[1]


def growth(op: str, inputs: Sequence[Any]) -> float:
    """Numbers that the result may have, at most, before it is made."""
    sizes = [x.size for x in inputs if x is not None]
    if op in ("ConstantOfShape", "Expand"):
        return max(sizes) * math.prod(max(1, int(n)) for n in inputs[-1].ravel())
    if op == "Tile":
        return sizes[0] * math.prod(max(1, int(n)) for n in inputs[1].ravel())
    if op == "Range":
        first, last, step = (float(x.ravel()[0]) for x in inputs)
        return abs((last - first) / step) if step else math.inf
    if op == "Concat":
        return sum(sizes)
    return math.prod(max(1, size) for size in sizes) if op in MULTIPLYING else 0


def divide(a: Array, b: Array) -> Array:
    """Whole numbers are divided towards zero."""
    if a.dtype.kind == "f":
        return a / b
    return np.where(b == 0, 0, np.trunc(a / np.where(b == 0, 1, b))).astype(a.dtype)


def cut(inputs: Sequence[Any], _: Mapping) -> Array:
    data, starts, ends = inputs[:3]
    axes = inputs[3] if len(inputs) > 3 and inputs[3] is not None else np.arange(len(starts))
    steps = inputs[4] if len(inputs) > 4 and inputs[4] is not None else np.ones(len(starts), np.int64)
    index = [slice(None)] * data.ndim
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        index[int(axis)] = slice(int(start), int(end) if abs(int(end)) < 2**31 else None, int(step))
    return data[tuple(index)]


def filled(inputs: Sequence[Any], attributes: Mapping) -> Array:
    value = attributes.get("value", np.zeros(1, np.float32))
    return np.full([int(n) for n in inputs[0]], np.ravel(value)[0], value.dtype)


def cast(inputs: Sequence[Any], attributes: Mapping) -> Array:
    return inputs[0].astype(helper.tensor_dtype_to_np_dtype(attributes["to"]))


def squeeze(inputs: Sequence[Any], _: Mapping) -> Array:
    axes = inputs[1] if len(inputs) > 1 else None
    return np.squeeze(inputs[0], None if axes is None else tuple(int(axis) for axis in axes))


def of_axes(make: Callable) -> Callable:
    def reduce(inputs: Sequence[Any], attributes: Mapping) -> Array:
        axes = inputs[1] if len(inputs) > 1 else None
        return make(inputs[0], axis=None if axes is None else tuple(int(axis) for axis in axes),
                    keepdims=bool(attributes.get("keepdims", 1)))

    return reduce


def binary(make: Callable) -> Callable:
    return lambda inputs, _: make(inputs[0], inputs[1])


def unary(make: Callable) -> Callable:
    return lambda inputs, _: make(inputs[0])


# Their results may have as many numbers as the product of their inputs'.
MULTIPLYING = {"Add", "And", "Div", "Equal", "Gather", "Greater", "Less", "Max", "Min", "Mod", "Mul", "Or", "Sub",
               "Where"}

ARITHMETIC: dict[str, Callable[[Sequence[Any], Mapping], Any]] = {
    "Add": binary(np.add), "Sub": binary(np.subtract), "Mul": binary(np.multiply), "Div": binary(divide),
    "Mod": binary(np.mod), "And": binary(np.logical_and), "Or": binary(np.logical_or), "Equal": binary(np.equal),
    "Greater": binary(np.greater), "Less": binary(np.less), "Max": binary(np.maximum), "Min": binary(np.minimum),
    "Not": unary(np.logical_not), "Neg": unary(np.negative), "Abs": unary(np.abs), "Floor": unary(np.floor),
    "Ceil": unary(np.ceil), "Round": unary(np.round), "Sqrt": unary(np.sqrt), "Identity": unary(np.asarray),
    "Cast": cast, "ConstantOfShape": filled, "Slice": cut, "Squeeze": squeeze,
    "Concat": lambda x, a: np.concatenate(x, axis=a["axis"]),
    "Expand": lambda x, _: np.broadcast_to(x[0], np.broadcast_shapes(x[0].shape, tuple(x[1].tolist()))),
    "Gather": lambda x, a: np.take(x[0], x[1].astype(np.int64), axis=a.get("axis", 0)),
    "Range": lambda x, _: np.arange(*(value.ravel()[0] for value in x), dtype=x[0].dtype),
    "ReduceProd": of_axes(np.prod), "ReduceSum": of_axes(np.sum),
    "Reshape": lambda x, _: np.reshape(x[0], tuple(x[1].tolist())),
    "Tile": lambda x, _: np.tile(x[0], x[1]),
    "Transpose": lambda x, a: np.transpose(x[0], a.get("perm")),
    "Unsqueeze": lambda x, _: np.expand_dims(x[0], tuple(x[1].tolist())),
    "Where": lambda x, _: np.where(x[0], x[1], x[2]),
}
