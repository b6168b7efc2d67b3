"""The tables that the dense kernels read: the layers that each level multiplies, and the columns of the heads."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy import ndarray as Array

from engine.cuda.memory import Region
from engine.cuda.network import Network, Stack
from engine.layout import DTYPES, padded
from engine.spaces import Space

REAL = np.dtype(np.float32)


@dataclass(frozen=True, slots=True)
class Shape:
    """What fixes an evaluation's memory and launches; a solve needs at most these.

    columns       that a tape reads;  slots: cotangents a row
    heads, each   heads that are read, and columns of one head
    """

    capacity: int
    columns: int
    slots: int
    heads: int
    each: int
    space: Space


@dataclass(frozen=True, slots=True, eq=False)
class Reading:
    """The heads that are read, in order, each with its seeds (columns, logits); and the cotangents a row."""

    heads: Mapping[str, Array]
    slots: int


class Tables:
    """The structs of kernels/layout.cuh for one evaluation, on both sides.

    Levels in order: the mapping, the heads' hidden layers, both backwards (``first_back`` is the first of those).
    """

    def __init__(self, network: Network, shape: Shape, buffers: Region):
        self.network, self.shape, self.buffers = network, shape, buffers
        self.mapping = network.mapping if shape.space.is_mapped else ()
        self.heads_first, self.depth = len(self.mapping), network.depth
        self.back_first = self.heads_first + self.depth
        self.mapping_back = self.back_first + self.depth
        levels = max(self.mapping_back + len(self.mapping), 1)
        g = network.bundle.generator
        self.widest = max([network.widest(i) for i in range(self.depth)] + [padded(g.z_dim), padded(g.w_dim)])
        self.region = Region(network.device, {
            "problems": ((levels, shape.heads), DTYPES["Dense"]), "levels": ((levels,), DTYPES["Level"]),
            "heads": ((shape.heads,), DTYPES["Head"]), "columns": ((shape.heads * shape.each,), DTYPES["Column"]),
            "seeds": ((shape.heads, shape.each * self.widest), REAL),
        }, mirrored=True)
        self.host = self.region.host
        for level, table in enumerate(self.host["levels"]):
            table["problems"] = self.region["problems"] + level * shape.heads * DTYPES["Dense"].itemsize
            table["rows"] = shape.capacity
        self.connect_mapping()

    def level(self, number: int) -> int:
        """Address of a level."""
        return self.region["levels"] + number * DTYPES["Level"].itemsize

    def connect_mapping(self) -> None:
        """The mapping's levels: forwards they never change, backwards only the number of cotangents does."""
        buffers, last = self.buffers, len(self.mapping) - 1
        for i, layer in enumerate(self.mapping):
            forward, back = self.add(i), self.add(self.mapping_back + last - i)
            put(forward, input=buffers["input" if i == 0 else f"mapped.{i - 1}"], weight=layer.weight, bias=layer.bias,
                output=buffers[f"mapped.{i}"], n=layer.out, k=layer.into, each=1, leaky=1)
            if i == last:
                put(forward, average=self.network.region["average"], psi=buffers["psi"], exact=buffers["trial_w"],
                    truncated=buffers["truncated"])
            source = "cotangent" if i == last else f"mapping_back.{(i + 1) % 2}"
            put(back, input=buffers[source], weight=layer.back, n=layer.into, k=layer.out)
            if i == 0:
                put(back, exact=buffers["pulled"])
            else:
                put(back, output=buffers[f"mapping_back.{i % 2}"], activation=buffers[f"mapped.{i - 1}"])

    def connect(self, reading: Reading) -> None:
        """Set the tables for these heads and upload them."""
        self.set_slots(reading.slots)
        self.host["levels"]["count"][self.heads_first : self.mapping_back] = 0
        column = 0
        for place, (name, seeds) in enumerate(reading.heads.items()):
            self.connect_head(place, self.network.heads[name], seeds, column)
            column += len(seeds)
        self.region.upload()

    def set_slots(self, slots: int) -> None:
        """Set how many cotangents a row has in the mapping's backward levels."""
        self.host["problems"]["each"][self.mapping_back :, 0] = slots

    def connect_head(self, place: int, stack: Stack, seeds: Array, column: int) -> None:
        """One head at its ``place`` among those that are read; its columns start at ``column``."""
        each, hidden = len(seeds), stack.hidden
        width = hidden[-1].out if hidden else stack.into
        inputs = [self.source(stack), *(self.part(f"hidden.{i}", place) for i in range(len(hidden)))]
        put(self.host["heads"][place], input=inputs[-1], weight=stack.weight, bias=stack.bias, k=stack.final.shape[1],
            stride=width, first=stack.first, count=stack.count)
        # What the columns are by the last hidden layer, or by the input of a head that has none.
        table = self.host["seeds"][place, : each * width].reshape(each, width)
        table[:] = 0
        table[:, : stack.final.shape[1]] = seeds @ stack.final
        seeded = self.region["seeds"] + place * self.shape.each * self.widest * REAL.itemsize
        jacobian, stride, row_stride = self.part("head_jacobian", place), stack.into, each * stack.into
        if not hidden:
            jacobian, stride, row_stride = seeded, width, 0
        self.add_levels(place, stack, inputs, each, seeded)
        for j, seed in enumerate(seeds):
            plus, minus = int(np.argmax(seed)), int(np.argmin(seed))
            put(self.host["columns"][column + j], slopes=jacobian + j * stride * REAL.itemsize, row_stride=row_stride,
                plus=stack.first + plus, minus=stack.first + minus if seed[minus] < 0 else -1,
                direct=not self.shape.space.is_mapped or stack.space == "z")

    def add_levels(self, place: int, stack: Stack, inputs: list[int], each: int, seeds: int) -> None:
        """A head's hidden layers, forwards and backwards."""
        last = len(stack.hidden) - 1
        for i, layer in enumerate(stack.hidden):
            forward = self.add(self.heads_first + i)
            put(forward, input=inputs[i], weight=layer.weight, bias=layer.bias, output=inputs[i + 1], n=layer.out,
                k=layer.into, each=1, leaky=1)
            if not each:
                continue
            if i == last:
                put(forward, seeds=seeds, seeded=self.part(f"back.{i % 2}", place), columns=each)
            back = self.add(self.back_first + last - i)
            put(back, input=self.part(f"back.{i % 2}", place), weight=layer.back, n=layer.into, k=layer.out, each=each)
            if i:
                put(back, output=self.part(f"back.{(i - 1) % 2}", place), activation=inputs[i])
            else:
                put(back, exact=self.part("head_jacobian", place))

    def source(self, stack: Stack) -> int:
        """Address of a head's input: in W the state is w."""
        return self.buffers["state" if not self.shape.space.is_mapped or stack.space == "z" else "truncated"]

    def part(self, name: str, place: int) -> int:
        """Address of a head's part of a buffer that all heads share."""
        return self.buffers[name] + place * self.buffers.nbytes[name] // self.shape.heads

    def add(self, level: int) -> Any:
        """Another problem of a level, cleared."""
        table = self.host["levels"][level]
        problem = self.host["problems"][level, table["count"]]
        for name in DTYPES["Dense"].names or ():
            problem[name] = 0
        table["count"] += 1
        return problem


def put(record: Any, **values: int) -> None:
    for name, value in values.items():
        record[name] = value
