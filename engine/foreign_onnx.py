"""ONNX files that others made: read without running them, and bounded before ONNX Runtime sees them.

``engine.onnx_file`` reads what our exporter writes and refuses everything else. Files of other tools say more:
comments, metadata, numbers in typed fields, dimensions that stay open. All of that is skipped or read here. What could
act or has no bound is refused: operators of other domains, functions, graphs within graphs (loops, branches), numbers
in files elsewhere, shapes that are computed from pictures, and graphs that take more memory or work than any known
classifier.

Field numbers are those of onnx.proto (ONNX IR version 13).
"""

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from engine.onnx_file import (
    ATTRIBUTE,
    BFLOAT16,
    BOOL,
    DIMENSION,
    FLOAT,
    GRAPH,
    HALF,
    INT32,
    INT64,
    MODEL,
    MOST_DIMENSIONS,
    NODE,
    SHAPE,
    TENSOR,
    TENSOR_TYPE,
    TYPE,
    VALUE,
    Malformed,
    Message,
    Model,
    Reader,
    external_place,
    read_bytes,
)

UINT8, INT8, UINT16, INT16, DOUBLE, UINT32, UINT64 = 2, 3, 4, 5, 11, 12, 13
WIDTHS = {FLOAT: 4, INT32: 4, INT64: 8, BOOL: 1, HALF: 2, BFLOAT16: 2, UINT8: 1, INT8: 1, UINT16: 2, INT16: 2,
          DOUBLE: 8, UINT32: 4, UINT64: 8}
TYPES = {INT32: np.dtype("<i4"), INT64: np.dtype("<i8"), FLOAT: np.dtype("<f4")}
MOST_BYTES = 2**32  # of a file and of the numbers beside it
FEW = 64  # numbers of a constant that shapes may depend on
METADATA = 14 << 3 | 2  # the key of a model's pairs of texts

# The same messages with what other tools write in them.
WIDER = {
    MODEL: Message("model", "1v 2b 3b 4b 5v 6b 7b", "8b 14b"),
    GRAPH: Message("graph", "2b 10b", "1b 5b 11b 12b 13b 14b 16b"),
    NODE: Message("node", "3b 4b 6b 7b 8b", "1b 2b 5b 9b"),
    ATTRIBUTE: Message("attribute", "1b 2f 3v 4b 5b 6b 13b 20v", "7b 7f 8v 8b 9b"),
    TENSOR: Message("tensor", "2v 8b 9b 12b 14v", "1v 1b 4b 4f 5b 5v 7b 7v 10b 11b 11v 13b 16b"),
    VALUE: Message("value", "1b 2b 3b", "4b"),
    TYPE: Message("type", "1b 6b"),
    TENSOR_TYPE: Message("tensor type", "1v 2b"),
    DIMENSION: Message("dimension", "1v 2b 3b"),
}


class ForeignTensor(NamedTuple):
    """See ``engine.onnx_file.Tensor``. ``numbers``: those of a small tensor of integers or of float32, else None."""

    name: str
    kind: int
    dims: tuple[int, ...]
    span: tuple[int, int] | None
    external: tuple[str, int, int] | None
    numbers: tuple[int | float, ...] | None


class ForeignReader(Reader):
    """``metadata``: the model's own pairs of texts, such as the names of its classes."""

    unknown = "which no graph needs that only computes"

    def __init__(self, data: Any):
        super().__init__(data)
        self.metadata: dict[str, str] = {}
        self.open = 0  # dimensions without a name

    def fields(self, message: Message, start: int, end: int) -> list[tuple[int, int, int]]:
        found = super().fields(WIDER.get(message, message), start, end)
        if message is MODEL:
            self.metadata = dict(self.entry(a, b) for key, a, b in found if key == METADATA)
        return found

    def tensor(self, start: int, end: int) -> ForeignTensor:  # type: ignore[override]
        """Numbers lie in the file as bytes, in a typed field, or in a file beside it."""
        name, kind, dims, span, is_external, place, typed = "", 0, [], None, False, {}, []
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
                entry, said = self.entry(value, stop)
                place[entry] = said
            elif key == 112:
                is_external = value != 0
            elif key >> 3 in (4, 5, 7, 10, 11):
                typed.append((key, value, stop))
        count = number_of(name, kind, dims)
        external = external_place(name, {"offset": "0", "length": str(count * WIDTHS[kind])} | {
            key: said for key, said in place.items() if key != "checksum"}) if is_external else None
        if sum(map(bool, (span, external, typed))) > 1:
            raise Malformed(f"the tensor {name!r} has its numbers in two places")
        held = external[2] if external else span[1] - span[0] if span else None
        if held not in (None, count * WIDTHS[kind]) or (held is None and not typed and count):
            raise Malformed(f"the tensor {name!r} of shape {dims} has {held or 0} bytes; expected "
                            f"{count * WIDTHS[kind]}")
        numbers = self.small(kind, count, span, typed) if not external and count <= FEW else None
        return ForeignTensor(name, kind, tuple(dims), span, external, numbers)

    def small(self, kind: int, count: int, span: tuple[int, int] | None,
              typed: list[tuple[int, int, int]]) -> tuple[int | float, ...] | None:
        """The numbers of a small tensor."""
        if kind not in TYPES:
            return None
        if span:
            return tuple(np.frombuffer(self.data[span[0] : span[1]], TYPES[kind]).tolist())
        found: list[int | float] = []
        for key, value, stop in typed:
            found += ([value] if key & 7 == 0 else self.packed(value, stop) if kind != FLOAT else
                      np.frombuffer(self.data[value : value + (stop - value) // 4 * 4], TYPES[kind]).tolist())
        if len(found) != count:
            raise Malformed(f"a tensor of {count} numbers holds {len(found)}")
        return tuple(found)

    def type(self, start: int, end: int) -> tuple[int, tuple[int | str, ...] | None]:
        inner = [(value, stop) for key, value, stop in self.fields(TYPE, start, end) if key == 10]
        kind, dims = 0, None
        for value, stop in inner:
            for key, first, past in self.fields(TENSOR_TYPE, value, stop):
                if key == 8:
                    kind = first
                else:
                    dims = self.shape(first, past)
        return kind, dims

    def shape(self, start: int, end: int) -> tuple[int | str, ...]:
        return tuple(self.dimension(a, b) for _, a, b in self.fields(SHAPE, start, end))

    def dimension(self, start: int, end: int) -> int | str:
        for key, value, stop in self.fields(DIMENSION, start, end):
            if key == 8 and value > 0:
                return value
            if key == 18:
                return self.data[value:stop].decode()
        self.open += 1
        return f"open {self.open}"


def number_of(name: str, kind: int, dims: list[int]) -> int:
    if kind not in WIDTHS:
        raise Malformed(f"the tensor {name!r} has the element type {kind}; expected one of {sorted(WIDTHS)}")
    if len(dims) > MOST_DIMENSIONS or not all(0 <= n < 1 << 32 for n in dims) or math.prod(dims) > MOST_BYTES:
        raise Malformed(f"the tensor {name!r} has an impossible shape, {dims[:MOST_DIMENSIONS]}")
    return math.prod(dims)


def read_foreign(path: Path) -> tuple[Model, Mapping[str, str]]:
    """The model with what it says of itself. Raises Malformed, also where its numbers lie anywhere but beside it."""
    size = path.stat().st_size
    if size > MOST_BYTES:
        raise Malformed(f"it has {size:,} bytes; expected at most {MOST_BYTES:,}")
    reader = ForeignReader(read_bytes(path))
    try:
        model = reader.model(0, len(reader.data))
    except IndexError as error:
        raise Malformed("it ends in the middle of a number") from error
    except UnicodeDecodeError as error:
        raise Malformed("a name in it is not UTF-8") from error
    for tensor in model.graph.initialisers:
        if tensor.external:
            check_beside(path, tensor.name, *tensor.external)
    return model, reader.metadata


def has_files_beside(model: Model) -> bool:
    return any(tensor.external for tensor in model.graph.initialisers)


def check_beside(path: Path, name: str, location: str, offset: int, length: int) -> None:
    """Numbers of a tensor lie in a plain file in the model's own folder."""
    target = path.parent / location
    if location in ("", ".", "..") or os.path.basename(location) != location or "\\" in location or "\0" in location:
        raise Malformed(f"the numbers of {name!r} lie in {location!r:.80}; expected the name of a file beside it")
    if target.is_symlink() or not target.is_file():
        raise Malformed(f"the numbers of {name!r} lie in {location!r:.80}, which is no file beside it")
    if offset + length > target.stat().st_size:
        raise Malformed(f"the numbers of {name!r} end at byte {offset + length} of {location!r:.80}, which has "
                        f"{target.stat().st_size}")
