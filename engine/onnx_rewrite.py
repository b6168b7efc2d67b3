"""Rewriting an ONNX file that was checked: weights moved into it, or bfloat16 made float32. Nothing else changes."""

import mmap
from collections.abc import Callable

import numpy as np

from engine.onnx_file import ATTRIBUTE, BFLOAT16, BYTES, FLOAT, GRAPH, MODEL, NODE, VARINT, Message, Reader, Tensor

# What a tensor becomes: its element type and its bytes; None: it stays as it is.
Change = Callable[[Tensor], tuple[int, bytes] | None]


def inline_weights(data: "bytes | mmap.mmap", weights: bytes) -> bytes:
    """With its external tensors, which lie in ``weights``, inside the file."""

    def change(tensor: Tensor) -> tuple[int, bytes] | None:
        if tensor.external is None:
            return None
        _, offset, length = tensor.external
        return tensor.kind, weights[offset : offset + length]

    return Rewriter(data, change, {}).rewrite()


def widen(data: "bytes | mmap.mmap") -> bytes:
    """With every bfloat16 made float32: the same nodes and the same rounded weights, in float32 arithmetic."""

    def change(tensor: Tensor) -> tuple[int, bytes] | None:
        if tensor.kind != BFLOAT16 or tensor.span is None:
            return None
        start, end = tensor.span
        halves = np.frombuffer(data[start:end], "<u2")
        return FLOAT, (halves.astype("<u4") << 16).tobytes()

    return Rewriter(data, change, {BFLOAT16: FLOAT}).rewrite()


class Rewriter(Reader):
    """casts   the type that Cast converts to, by the type that it converted to before."""

    def __init__(self, data: "bytes | mmap.mmap", change: Change, casts: dict[int, int]):
        super().__init__(data)
        self.change, self.casts = change, casts

    def rewrite(self) -> bytes:
        return self.message(MODEL, 0, len(self.data), {58: self.graph_bytes})

    def message(self, message: Message, start: int, end: int, parts: dict[int, Callable[[int, int], bytes]]) -> bytes:
        """The message with some of its parts, by key, rewritten."""
        written = []
        for key, value, stop in self.fields(message, start, end):
            if key in parts:
                written.append(field(key, parts[key](value, stop)))
            elif key & 7 == VARINT:
                written.append(varint(key) + varint(value))
            else:
                content = self.data[value:stop]
                written.append(field(key, content) if key & 7 == BYTES else varint(key) + content)
        return b"".join(written)

    def graph_bytes(self, start: int, end: int) -> bytes:
        return self.message(GRAPH, start, end, {10: self.node_bytes, 42: self.tensor_bytes})

    def node_bytes(self, start: int, end: int) -> bytes:
        return self.message(NODE, start, end, {42: self.attribute_bytes})

    def attribute_bytes(self, start: int, end: int) -> bytes:
        name, content = self.attribute(start, end, 0)
        if name == "to" and content in self.casts:
            number = self.casts[content]
            return field(10, name.encode()) + varint(24) + varint(number) + varint(160) + varint(2)  # an int
        return self.message(ATTRIBUTE, start, end, {42: self.tensor_bytes, 50: self.graph_bytes})

    def tensor_bytes(self, start: int, end: int) -> bytes:
        tensor = self.tensor(start, end)
        changed = self.change(tensor)
        if changed is None:
            return bytes(self.data[start:end])
        kind, content = changed
        dims = b"".join(varint(8) + varint(n) for n in tensor.dims)
        return dims + varint(16) + varint(kind) + field(66, tensor.name.encode()) + field(74, content)


def field(key: int, content: bytes) -> bytes:
    return varint(key) + varint(len(content)) + content


def varint(value: int) -> bytes:
    value &= 0xFFFF_FFFF_FFFF_FFFF
    written = bytearray()
    while value > 127:
        written.append(value & 127 | 128)
        value >>= 7
    written.append(value)
    return bytes(written)
