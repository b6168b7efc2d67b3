"""A small, strict reader of ONNX files: what a graph consists of, without running or loading any of it.

The engine has no need of the onnx package, and a bundle may come from a stranger. So this reads the protobuf itself,
and only the part of ONNX that our exporter writes: every other field is refused, as is a file that says one thing
twice. It looks at names, shapes and places; the numbers of weights stay where they are.

Field numbers are those of onnx.proto (ONNX IR version 10).
"""

import mmap
import struct
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy import ndarray as Array

# Of all messages of a file together: a synthesis of 1024 px has 9,000. Bounds the time of reading to a second.
MOST_FIELDS = 400_000
# Files up to this size are read at once; larger ones are weights nearly everywhere, and stay on the disk.
SMALL = 1 << 24
DEEPEST = 2  # graphs in graphs

VARINT, EIGHT, BYTES, FOUR = 0, 1, 2, 5
FLOAT, INT32, INT64, BOOL, HALF, BFLOAT16 = 1, 6, 7, 9, 10, 16
# Element types of our exporter, and their bytes.
WIDTHS = {FLOAT: 4, INT32: 4, INT64: 8, BOOL: 1, HALF: 2, BFLOAT16: 2}
INTEGERS = {INT32: np.dtype("<i4"), INT64: np.dtype("<i8")}
MOST_DIMENSIONS = 8


class Malformed(ValueError):
    """The file is no ONNX, or uses a part of it that our exporter never does."""


class Value(NamedTuple):
    """An input or output. ``dims``: sizes, or the names of those that stay open."""

    name: str
    kind: int
    dims: tuple[int | str, ...]


class Tensor(NamedTuple):
    """``span``: where in the file its bytes are; None if they are ``external``: location, offset, length."""

    name: str
    kind: int
    dims: tuple[int, ...]
    span: tuple[int, int] | None
    external: tuple[str, int, int] | None


class Node(NamedTuple):
    """``attributes``: name to int, float, bytes, a tuple of ints, Tensor or Graph."""

    op: str
    domain: str
    inputs: list[str]
    outputs: list[str]
    attributes: dict[str, Any]


class Graph(NamedTuple):
    nodes: list[Node]
    initialisers: list[Tensor]
    inputs: list[Value]
    outputs: list[Value]


class Model(NamedTuple):
    """``opsets``: version by domain."""

    ir_version: int
    opsets: dict[str, int]
    graph: Graph
    data: "bytes | mmap.mmap"

    def integers(self, tensor: Tensor) -> Array:
        """The numbers of an integer tensor that lies in the file, in one line."""
        assert tensor.span is not None
        start, end = tensor.span
        return np.frombuffer(self.data[start:end], INTEGERS[tensor.kind])

    def floats(self, tensor: Tensor) -> Array:
        """The numbers of a float32 tensor that lies in the file, in one line."""
        assert tensor.span is not None
        start, end = tensor.span
        return np.frombuffer(self.data[start:end], "<f4")


class Message:
    """The fields of a message that we take: by key (number and wire type), whether it may come more than once.

    ``once`` and ``many`` are written as in onnx.proto: b for bytes, v for a number, f for four bytes; "7b".
    """

    def __init__(self, name: str, once: str, many: str = ""):
        wires = {"b": BYTES, "v": VARINT, "f": FOUR}
        keys = [(int(field[:-1]) << 3 | wires[field[-1]], False) for field in once.split()]
        keys += [(int(field[:-1]) << 3 | wires[field[-1]], True) for field in many.split()]
        self.name, self.repeats = name, dict(keys)


# Names of producers and nodes, and comments, are skipped. Functions, training, metadata, sparse and typed values are
# none of ours.
MODEL = Message("model", "1v 2b 3b 4b 5v 6b 7b", "8b")
OPSET = Message("operator set", "1b 2v")
GRAPH = Message("graph", "2b 10b", "1b 5b 11b 12b")
NODE = Message("node", "3b 4b 6b 7b", "1b 2b 5b")
ATTRIBUTE = Message("attribute", "1b 2f 3v 4b 5b 6b 13b 20v", "8v 8b")
TENSOR = Message("tensor", "2v 8b 9b 12b 14v", "1v 1b 13b")
ENTRY = Message("entry", "1b 2b")
VALUE = Message("value", "1b 2b 3b")
TYPE = Message("type", "1b")
TENSOR_TYPE = Message("tensor type", "1v 2b")
SHAPE = Message("shape", "", "1b")
DIMENSION = Message("dimension", "1v 2b")


def read_model(path: Path) -> Model:
    """Raises Malformed."""
    return parse_model(read_bytes(path))


def read_bytes(path: Path) -> "bytes | mmap.mmap":
    with open(path, "rb") as file:
        size = path.stat().st_size
        return file.read() if size < SMALL else mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def parse_model(data: "bytes | mmap.mmap") -> Model:
    try:
        return Reader(data).model(0, len(data))
    except IndexError as error:
        raise Malformed("it ends in the middle of a number") from error
    except UnicodeDecodeError as error:
        raise Malformed("a name in it is not UTF-8") from error


class Reader:
    """Messages of a file. Methods named after a message read what lies from ``start`` to ``end``."""

    unknown = "which our exporter never writes"

    def __init__(self, data: "bytes | mmap.mmap"):
        self.data, self.left = data, MOST_FIELDS
        self.entries: dict[bytes, tuple[str, str]] = {}  # read before: all weights say the same location

    def fields(self, message: Message, start: int, end: int) -> list[tuple[int, int, int]]:
        """(key, value or first byte, end) of each field; those that come twice or are not ours are refused."""
        data, found, i, left, repeats, seen = self.data, [], start, self.left, message.repeats, 0
        while i < end:
            key = data[i]
            i += 1
            if key > 127:
                key, i = self.varint(i - 1)
            may_repeat = repeats.get(key)
            if not may_repeat:
                if may_repeat is None or seen >> key & 1:
                    why = self.unknown if may_repeat is None else "twice"
                    raise Malformed(f"a {message.name} has the field {key >> 3} of type {key & 7}, {why}")
                seen |= 1 << key
            left -= 1
            if left < 0:
                raise Malformed(f"it has more than {MOST_FIELDS} fields")
            wire = key & 7
            if wire == 2:
                size = data[i]
                i += 1
                if size > 127:
                    size, i = self.varint(i - 1)
                stop = i + size
                found.append((key, i, stop))
                i = stop
            elif wire == 0:
                value = data[i]
                i += 1
                if value > 127:
                    value, i = self.varint(i - 1)
                    value = value - (1 << 64) if value >> 63 else value
                found.append((key, value, i))
            else:
                found.append((key, i, i + 4))
                i += 4
        if i > end:
            raise Malformed(f"a field of a {message.name} is longer than what holds it")
        self.left = left
        return found

    def varint(self, i: int) -> tuple[int, int]:
        """An unsigned number of up to 64 bits, and where it ends."""
        value = 0
        for shift in range(0, 70, 7):
            byte, i = self.data[i], i + 1
            value |= (byte & 127) << shift
            if byte < 128:
                return value & 0xFFFF_FFFF_FFFF_FFFF, i
        raise Malformed("a number has more than 64 bits")

    def packed(self, i: int, end: int) -> list[int]:
        """The numbers of a repeated field that are written in one piece."""
        self.left -= end - i
        if self.left < 0:
            raise Malformed(f"it has more than {MOST_FIELDS} fields")
        found = []
        while i < end:
            value, i = self.varint(i)
            found.append(value - (1 << 64) if value >> 63 else value)
        return found

    # --- messages: keys are 8 times the field, plus the wire type -----------------------------------------------------

    def model(self, start: int, end: int) -> Model:
        opsets, version, graph = {}, 0, None
        for key, value, stop in self.fields(MODEL, start, end):
            if key == 8:
                version = value
            elif key == 58:
                graph = self.graph(value, stop, 0)
            elif key == 66:
                domain, number = self.opset(value, stop)
                if domain in opsets:
                    raise Malformed(f"it names the operators of {domain or 'the default domain'!r} twice")
                opsets[domain] = number
        if graph is None:
            raise Malformed("it holds no graph")
        return Model(version, opsets, graph, self.data)

    def opset(self, start: int, end: int) -> tuple[str, int]:
        domain, number = "", 0
        for key, value, stop in self.fields(OPSET, start, end):
            if key == 10:
                domain = self.data[value:stop].decode()
            else:
                number = value
        return domain, number

    def graph(self, start: int, end: int, depth: int) -> Graph:
        if depth > DEEPEST:
            raise Malformed(f"it has graphs in graphs, more than {DEEPEST} deep")
        graph = Graph([], [], [], [])
        for key, value, stop in self.fields(GRAPH, start, end):
            if key == 10:
                graph.nodes.append(self.node(value, stop, depth))
            elif key == 42:
                graph.initialisers.append(self.tensor(value, stop))
            elif key == 90:
                graph.inputs.append(self.value(value, stop))
            elif key == 98:
                graph.outputs.append(self.value(value, stop))
        return graph

    def node(self, start: int, end: int, depth: int) -> Node:
        data, op, domain, inputs, outputs, attributes = self.data, "", "", [], [], {}
        for key, value, stop in self.fields(NODE, start, end):
            if key == 10:
                inputs.append(data[value:stop].decode())
            elif key == 18:
                outputs.append(data[value:stop].decode())
            elif key == 34:
                op = data[value:stop].decode()
            elif key == 42:
                name, content = self.attribute(value, stop, depth)
                if name in attributes:
                    raise Malformed(f"a node says its {name!r} twice")
                attributes[name] = content
            elif key == 58:
                domain = data[value:stop].decode()
        return Node(op, domain, inputs, outputs, attributes)

    def attribute(self, start: int, end: int, depth: int) -> tuple[str, Any]:
        name, found = "", []
        many: list[int] | None = None
        for key, value, stop in self.fields(ATTRIBUTE, start, end):
            if key == 10:
                name = self.data[value:stop].decode()
            elif key == 24:
                found.append(value)
            elif key == 21:
                found.append(struct.unpack("<f", self.data[value:stop])[0])
            elif key == 34:
                found.append(self.data[value:stop])
            elif key == 42:
                found.append(self.tensor(value, stop))
            elif key == 50:
                found.append(self.graph(value, stop, depth + 1))
            elif key in (64, 66):
                many = many or []
                many += [value] if key == 64 else self.packed(value, stop)
        if len(found) + (many is not None) > 1:
            raise Malformed(f"the attribute {name!r} has more than one value")
        return name, found[0] if found else tuple(many or ())

    def tensor(self, start: int, end: int) -> Tensor:
        data, entries = self.data, self.entries
        name, kind, dims, span, is_external = "", 0, [], None, False
        place: dict[str, str] = {}
        for key, value, stop in self.fields(TENSOR, start, end):
            if key == 8:
                dims.append(value)
            elif key == 10:
                dims += self.packed(value, stop)
            elif key == 16:
                kind = value
            elif key == 66:
                name = self.data[value:stop].decode()
            elif key == 74:
                span = value, stop
            elif key == 106:
                content = data[value:stop]
                entry, said = entries.get(content) or entries.setdefault(content, self.entry(value, stop))
                if entry in place:
                    raise Malformed(f"the tensor {name!r} says its {entry!r} twice")
                place[entry] = said
            elif key == 112:
                is_external = value != 0
        size = tensor_bytes(name, kind, dims)
        external = external_place(name, place) if is_external else None
        if (external and span) or (place and not external):
            raise Malformed(f"the tensor {name!r} has its numbers in two places")
        if not external and not span:
            span = end, end
        held = external[2] if external else span[1] - span[0]  # type: ignore[index]
        if held != size:
            raise Malformed(f"the tensor {name!r} of shape {dims} has {held} bytes; expected {size}")
        return Tensor(name, kind, tuple(dims), span, external)

    def entry(self, start: int, end: int) -> tuple[str, str]:
        found = {10: "", 18: ""}
        for key, value, stop in self.fields(ENTRY, start, end):
            found[key] = self.data[value:stop].decode()
        return found[10], found[18]

    def value(self, start: int, end: int) -> Value:
        name, kind, dims = "", 0, None
        for key, value, stop in self.fields(VALUE, start, end):
            if key == 10:
                name = self.data[value:stop].decode()
            elif key == 18:
                kind, dims = self.type(value, stop)
        if dims is None:
            raise Malformed(f"{name!r} has no type, or no shape")
        return Value(name, kind, dims)

    def type(self, start: int, end: int) -> tuple[int, tuple[int | str, ...] | None]:
        """Of a tensor, the only type that we know."""
        kind, dims = 0, None
        for _, value, stop in self.fields(TYPE, start, end):
            for key, inner, past in self.fields(TENSOR_TYPE, value, stop):
                if key == 8:
                    kind = inner
                else:
                    dims = tuple(self.dimension(a, b) for _, a, b in self.fields(SHAPE, inner, past))
        return kind, dims

    def dimension(self, start: int, end: int) -> int | str:
        found = self.fields(DIMENSION, start, end)
        if len(found) != 1:
            raise Malformed("a dimension is neither a number nor a name")
        key, value, stop = found[0]
        return value if key == 8 else self.data[value:stop].decode()


def tensor_bytes(name: str, kind: int, dims: list[int]) -> int:
    if kind not in WIDTHS:
        raise Malformed(f"the tensor {name!r} has the element type {kind}; expected one of {sorted(WIDTHS)}")
    size = WIDTHS[kind]
    for n in dims:
        if not 0 <= n < 1 << 40:
            raise Malformed(f"the tensor {name!r} has an impossible shape")
        size *= n
    if len(dims) > MOST_DIMENSIONS:
        raise Malformed(f"the tensor {name!r} has an impossible shape")
    return size


def external_place(name: str, place: dict[str, str]) -> tuple[str, int, int]:
    if set(place) != {"location", "offset", "length"} or not all(
        place[key].isascii() and place[key].isdigit() and len(place[key]) < 16 for key in ("offset", "length")
    ):
        raise Malformed(f"the tensor {name!r} must say location, offset and length of its numbers")
    return place["location"], int(place["offset"]), int(place["length"])
