"""A bundle's mapping and heads on the device, as the kernels of kernels/dense.cuh read them."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy import ndarray as Array

from engine.bundle import Bundle
from engine.cuda.driver import Device
from engine.cuda.memory import Region
from engine.layout import padded, to_operand
from engine.reference import field as reference


@dataclass(frozen=True, slots=True)
class Layer:
    """Widths (padded) of what goes in and comes out, and addresses; ``back`` is the transposed weight."""

    into: int
    out: int
    weight: int
    back: int
    bias: int


@dataclass(frozen=True, slots=True)
class Stack:
    """A head: its hidden layers on the device, its last and linear one on both sides.

    into           padded width of its input
    first, count   its logits among those of all heads
    final (count, k) float32, and the addresses of it and of its bias
    """

    space: str
    into: int
    hidden: tuple[Layer, ...]
    first: int
    count: int
    final: Array
    weight: int
    bias: int


class Network:
    """precision   of the operands of matrix products: 'fp32', 'tf32' or 'fp16'; sums and all else are float32"""

    def __init__(self, device: Device, bundle: Bundle, precision: str):
        self.device, self.bundle, self.precision = device, bundle, precision
        self.operand = np.dtype(np.float16 if precision == "fp16" else np.float32)
        g, tensors = bundle.generator, bundle.field
        self.arrays: dict[str, Array] = {"average": flat(tensors["mapping.w_avg"], padded(g.w_dim))}
        self.embedded = 0
        if "mapping.embedding" in tensors:
            self.arrays["embedding"] = np.ascontiguousarray(tensors["mapping.embedding"], np.float32)
            self.embedded = tensors["mapping.embedding"].shape[1]
        mapping, stacks = reference.layers(tensors, "mapping"), {}
        self.take("mapping", mapping)
        for name in bundle.heads:
            stacks[name] = reference.layers(tensors, f"head.{name}")
            self.take(name, stacks[name][:-1])
            weight, bias = stacks[name][-1]
            self.arrays[f"{name}.weight"] = np.ascontiguousarray(weight, np.float32)
            self.arrays[f"{name}.bias"] = np.ascontiguousarray(bias, np.float32)
        self.region = Region(device, {name: (array.shape, array.dtype) for name, array in self.arrays.items()})
        for name, array in self.arrays.items():
            device.upload(self.region[name], array)
        device.synchronize()
        self.mapping = self.layers("mapping", len(mapping))
        self.heads: dict[str, Stack] = {}
        self.outputs = 0
        for name, stack in stacks.items():
            final = self.arrays[f"{name}.weight"]
            self.heads[name] = Stack(
                bundle.heads[name].space, padded(stack[0][0].shape[1]), self.layers(name, len(stack) - 1),
                self.outputs, len(final), final, self.region[f"{name}.weight"], self.region[f"{name}.bias"],
            )
            self.outputs += len(final)
        self.depth = max((len(stack.hidden) for stack in self.heads.values()), default=0)
        self.sizes = {name: array.shape for name, array in self.arrays.items()}
        self.nbytes = sum(array.nbytes for array in self.arrays.values())
        del self.arrays

    def take(self, prefix: str, stack: Sequence[tuple[Array, Array]]) -> None:
        """Both orientations of each weight, padded with zeros."""
        for i, (weight, bias) in enumerate(stack):
            whole = np.zeros([padded(side) for side in weight.shape], np.float32)
            whole[: weight.shape[0], : weight.shape[1]] = weight
            self.arrays[f"{prefix}.{i}.weight"] = to_operand(whole, self.precision)
            self.arrays[f"{prefix}.{i}.back"] = to_operand(whole.T, self.precision)
            self.arrays[f"{prefix}.{i}.bias"] = flat(bias, len(whole))

    def layers(self, prefix: str, count: int) -> tuple[Layer, ...]:
        shapes = [self.arrays[f"{prefix}.{i}.weight"].shape for i in range(count)]
        return tuple(
            Layer(into, out, *(self.region[f"{prefix}.{i}.{part}"] for part in ("weight", "back", "bias")))
            for i, (out, into) in enumerate(shapes)
        )

    def widest(self, level: int) -> int:
        """Of the hidden layers number ``level`` of all heads."""
        return max((s.hidden[level].out for s in self.heads.values() if level < len(s.hidden)), default=0)


def flat(values: Array, width: int) -> Array:
    """float32, with zeros up to ``width``."""
    whole = np.zeros(width, np.float32)
    whole[: len(values)] = values
    return whole
