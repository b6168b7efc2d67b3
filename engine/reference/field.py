"""The definition of the field: mapping and heads forward, their Jacobians, and the pullback.

ONNX graphs and kernels are compared with this file, which is written for clarity and not for speed. All functions work
in the precision of the tensors that they are given.

Karras et al., CVPR 2020 (mapping); Nie, Vahdat, Anandkumar, NeurIPS 2021 (heads).
"""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy import ndarray as Array

SLOPE = 0.2
MOMENT_EPSILON = 1e-8
LARGEST = float(np.finfo(np.float32).max)


def leaky(x: Array) -> Array:
    return np.where(x > 0, x, SLOPE * x)


def slope(activation: Array) -> Array:
    """Derivative of the leaky ReLU, read off the sign of its output."""
    return np.where(activation > 0, 1.0, SLOPE).astype(activation.dtype)


def second_moment(z: Array) -> tuple[Array, Array]:
    """z (rows, d) -> z / s and s (rows, 1), with s = sqrt(mean z^2 + MOMENT_EPSILON).

    Not a number where the sum of squares is more than float32 holds, in any precision: infinity would make z / s zero,
    a finite and wrong input, and a row is to end alike on all runtimes.
    """
    squares = np.sum(z * z, axis=1, keepdims=True)
    s = np.sqrt(np.where(squares <= LARGEST, squares, np.nan) / z.shape[1] + MOMENT_EPSILON)
    return z / s, s


def normalised(z: Array, normalise: bool) -> tuple[Array, Array]:
    """``second_moment``, or z as it is and ones."""
    return second_moment(z) if normalise else (z, np.ones((len(z), 1), z.dtype))


def layers(tensors: Mapping[str, Array], prefix: str) -> list[tuple[Array, Array]]:
    """The (weight (out, in), bias (out,)) pairs named ``prefix.{i}.weight``."""
    found = []
    while f"{prefix}.{len(found)}.weight" in tensors:
        i = len(found)
        found.append((tensors[f"{prefix}.{i}.weight"], tensors[f"{prefix}.{i}.bias"]))
    return found


def mapping(
    tensors: Mapping[str, Array], z: Array, psi: Array, label: Array | None = None, *, normalise: bool = True
) -> tuple[Array, list[Array]]:
    """z (rows, z_dim), psi (rows, 1), label (rows,) -> truncated w (rows, w_dim), hidden activations.

    A mapping without layers truncates its input, which without ``normalise`` is z: then w = z at psi 1.
    """
    x, _ = normalised(z, normalise)
    if "mapping.embedding" in tensors:
        x = np.concatenate([x, tensors["mapping.embedding"][label]], axis=1)
    hidden = []
    for weight, bias in layers(tensors, "mapping"):
        x = leaky(x @ weight.T + bias)
        hidden.append(x)
    average = tensors["mapping.w_avg"]
    return average + psi * (x - average), hidden


def head(stack: Sequence[tuple[Array, Array]], x: Array) -> tuple[Array, list[Array]]:
    """x (rows, dim) -> logits (rows, C), hidden activations. The last layer is linear."""
    hidden = []
    for weight, bias in stack[:-1]:
        x = leaky(x @ weight.T + bias)
        hidden.append(x)
    weight, bias = stack[-1]
    return x @ weight.T + bias, hidden


def head_rows(
    stack: Sequence[tuple[Array, Array]], hidden: Sequence[Array], seeds: Array, *, rows: int | None = None
) -> Array:
    """Rows of the Jacobian of ``seeds @ logits``.

    seeds (k, C): one row per wanted combination of logits;  returns (rows, k, dim)
    rows: needed for a linear head only, which has no hidden activations to take it from
    """
    count = hidden[0].shape[0] if rows is None else rows
    cotangent = np.broadcast_to((seeds @ stack[-1][0])[None], (count, len(seeds), stack[-1][0].shape[1]))
    for (weight, _), activation in zip(reversed(stack[:-1]), reversed(hidden), strict=True):
        cotangent = (cotangent * slope(activation)[:, None, :]) @ weight
    return cotangent


def pullback(tensors: Mapping[str, Array], z: Array, psi: Array, hidden: Sequence[Array], cotangent: Array, *,
             normalise: bool = True) -> Array:
    """cotangent (rows, r, w_dim) on the truncated w -> (rows, r, z_dim) on z.

    The normalisation contributes ``(g - x (x . g) / d) / s``: it removes the radial part (up to the 1e-8 in
    s), which is why |z| is conserved along the flow.
    """
    g = cotangent * psi[:, :, None]
    for (weight, _), activation in zip(reversed(layers(tensors, "mapping")), reversed(hidden), strict=True):
        g = (g * slope(activation)[:, None, :]) @ weight
    g = g[:, :, : z.shape[1]]
    if not normalise:
        return g
    x, s = second_moment(z)
    radial = np.einsum("rkd,rd->rk", g, x) / z.shape[1]
    return (g - radial[:, :, None] * x[:, None, :]) / s[:, :, None]
