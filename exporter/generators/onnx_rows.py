"""The nodes of an ONNX graph written again for any number of rows, in the operators that a bundle's graphs have.

Every result's shape is followed while it is written (engine/operators.py), so that what a stranger's file would cost is
known, and refused if no generator costs as much, before anything runs. Files that were exported for a fixed batch, or
that compute shapes as they run, come out with rows that are free and shapes that are constant.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from numpy import ndarray as Array
from onnx import TensorProto, helper, numpy_helper

from engine.errors import CheckpointError
from engine.graphs import MOST_NUMBERS, MOST_WORK, NUMBERS_PER_PIXEL, WORK_PER_PIXEL
from engine.onnx_file import Graph, Malformed, Model, Node
from engine.operators import OPERATORS, Dim, Shape, Shapes
from exporter.field_graphs import IR_VERSION
from exporter.generators.onnx_folding import MOST_NUMBERS as SMALL
from exporter.generators.onnx_folding import ROWS, Pair, as_dims, constant, fold, is_constant, of_dims
from exporter.generators.onnx_operators import SPECIAL
from exporter.generators.onnx_reading import attributes_of, constant_of

AREA = 1 << 20  # pixels of the pictures that bound what a file may cost before its own are known


class Rows:
    """A graph under construction: what others wrote, and what we put around it.

    frozen    the batch that the file was exported for, None where it is free
    opset     of the operators

    Its methods raise Malformed for what does not fit.
    """

    def __init__(self, opset: int, frozen: int | None = None):
        self.frozen, self.opset = frozen, opset
        self.nodes: list[onnx.NodeProto] = []
        self.initialisers: list[TensorProto] = []
        empty = Model(10, {"": opset}, Graph([], [], [], []), b"")
        self.shapes = Shapes(empty, {}, most=MOST_NUMBERS + NUMBERS_PER_PIXEL * AREA,
                             work=MOST_WORK + WORK_PER_PIXEL * AREA, weight=lambda tensor: None)
        self.count = 0
        self.batch = ""  # an input whose first size is the rows

    # --- our own names ----------------------------------------------------------------------------------------------

    def name(self, kind: str) -> str:
        self.count += 1
        return f"{kind}.{self.count}"

    def input(self, name: str, shape: Shape) -> str:
        self.shapes.define(name, shape)
        self.batch = self.batch or name
        return name

    def weight(self, array: Array | np.generic) -> str:
        """An initialiser; numbers that shapes depend on are remembered."""
        array = np.asarray(array, np.float32 if array.dtype == np.float64 else None)
        name = self.name("constant")
        self.initialisers.append(numpy_helper.from_array(np.ascontiguousarray(array).reshape(array.shape), name))
        self.shapes.define(name, array.shape)
        if array.dtype in (np.int32, np.int64):
            if array.ndim <= 1 and array.size <= 64:
                self.shapes.values[name] = tuple(array.ravel().tolist())
        elif array.dtype == np.float32 and array.shape == (4,):
            self.shapes.scales[name] = tuple(array.tolist())
        return name

    def integers(self, *numbers: int) -> str:
        return self.weight(np.array(numbers, np.int64))

    def emit(self, op: str, *inputs: str, **attributes: Any) -> str:
        """Append a node; the name of its result."""
        out = self.name(op)
        self.nodes.append(helper.make_node(op, list(inputs), [out], **attributes))
        plain = {key: value.encode() if isinstance(value, str) else tuple(value) if isinstance(value, list) else value
                 for key, value in attributes.items()}
        self.shapes.nodes -= 1
        if self.shapes.nodes < 0:
            raise Malformed("it has more nodes than any generator")
        self.shapes.apply(Node(op, "", list(inputs), [out], plain))
        return out

    def shape(self, name: str) -> Shape:
        return self.shapes.shapes[name]

    def rename(self, old: str, new: str) -> None:
        for node in self.nodes:
            node.input[:] = [new if name == old else name for name in node.input]
            node.output[:] = [new if name == old else name for name in node.output]
        self.shapes.shapes[new] = self.shapes.shapes.pop(old)

    def model(self, name: str, inputs: Sequence[str], outputs: Sequence[str]) -> onnx.ModelProto:
        """All of it, without what no output needs; inputs and outputs are float32."""
        self.drop_unread(outputs)
        given, made = ([helper.make_tensor_value_info(end, TensorProto.FLOAT, self.shape(end)) for end in ends]
                       for ends in (inputs, outputs))
        graph = helper.make_graph(self.nodes, name, given, made, self.initialisers)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=IR_VERSION,
                                 producer_name="lace-engine")

    def drop_unread(self, outputs: Sequence[str]) -> None:
        read, kept = set(outputs), []
        for node in reversed(self.nodes):
            if read & set(node.output):
                kept.append(node)
                read |= set(node.input)
        self.nodes = kept[::-1]
        self.initialisers = [tensor for tensor in self.initialisers if tensor.name in read]

    def expand(self, name: str, dims: Sequence[Dim]) -> str:
        """Broadcast to sizes, the rows among them."""
        if all(isinstance(dim, int) for dim in dims):
            return self.emit("Expand", name, self.integers(*dims))  # type: ignore[arg-type]
        rows, parts = self.emit("Shape", self.batch, start=0, end=1), []
        for dim in dims:
            if isinstance(dim, str) and dim != ROWS:
                raise Malformed(f"it broadcasts to {dim}; expected the rows, or a number")
            parts.append(rows if dim == ROWS else self.integers(dim))  # type: ignore[arg-type]
        return self.emit("Expand", name, self.emit("Concat", *parts, axis=0) if len(parts) > 1 else parts[0])

    def reshape(self, name: str, dims: Sequence[Dim]) -> str:
        """To sizes of which at most one is not a number."""
        target = [dim if isinstance(dim, int) else -1 for dim in dims]
        return self.emit("Reshape", name, self.integers(*target))

    def slice(self, name: str, first: int, last: int, axis: int) -> str:
        return self.emit("Slice", name, self.integers(first), self.integers(last), self.integers(axis))


class Rewriting:
    """The graph of a file, node by node, into a ``Rows``. ``given``: our names of its inputs."""

    def __init__(self, rows: Rows, graph: onnx.GraphProto, given: Mapping[str, str]):
        self.rows, self.given = rows, dict(given)
        self.weights = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
        self.known: dict[str, Pair] = {}
        for name, array in self.weights.items():
            self.learn(name, array)
        for node in graph.node:
            try:
                self.rewrite(node)
            except Malformed as error:
                advice = "" if rows.frozen is None else (
                    f". It was exported for batches of {rows.frozen}: export it with a batch that is free")
                raise CheckpointError(f"its {node.op_type} {node.output[0][:60]!r} cannot be used: {error}{advice}"
                                      ) from error

    def learn(self, name: str, array: Array) -> None:
        self.weights[name] = array
        if array.size <= SMALL:
            self.known[name] = constant(array)

    def rewrite(self, node: onnx.NodeProto) -> None:
        op, inputs, attributes = node.op_type, list(node.input), attributes_of(node)
        if op == "Constant":
            return self.learn(node.output[0], constant_of(node))
        if op in ("Identity", "Dropout") and inputs[0] in self.given:
            self.given[node.output[0]] = self.given[inputs[0]]
            return None
        if op in ("Shape", "Size") and (dims := self.dims_of(inputs[0])) is not None:
            whole = of_dims(dims[attributes.get("start", 0) : attributes.get("end")] if op == "Shape" else dims)
            self.known[node.output[0]] = whole if op == "Shape" else tuple(np.prod(x) for x in whole)  # type: ignore
            return None
        pairs = [self.known.get(name) if name else None for name in inputs]
        # Of a frozen batch, what is repeated may be repeated for each row.
        is_repeated = self.rows.frozen is not None and op in ("Expand", "Tile")
        if not is_repeated and all(pair or not name for pair, name in zip(pairs, inputs, strict=True)):
            found = fold(op, pairs, attributes)
            if found is not None and max(x.size for x in found) <= SMALL:
                self.known[node.output[0]] = found
                return None
        special = SPECIAL.get(op)
        results = special(self, inputs, attributes, len(node.output)) if special else None
        if results is None:
            results = [self.keep(op, inputs, attributes)]
        if len(results) < len([name for name in node.output if name]):
            raise Malformed(f"it has {len(node.output)} results; expected {len(results)}")
        for name, ours in zip(node.output, results, strict=False):
            self.given[name] = ours
        return None

    def dims_of(self, name: str) -> Shape | None:
        if name in self.given:
            return self.rows.shape(self.given[name])
        if name in self.known:
            return self.known[name][0].shape
        return self.weights[name].shape if name in self.weights else None

    def our(self, name: str) -> str:
        """Our name of a result, which becomes a constant here if it is one."""
        if not name:
            return ""
        if name not in self.given:
            if name in self.known and is_constant(self.known[name]):
                array = self.known[name][0]
            elif name in self.weights:
                array = self.weights[name]
            elif name in self.known:
                raise Malformed(f"it uses {name[:60]!r}, a number of rows, as data")
            else:
                raise Malformed(f"it reads {name[:60]!r}, which nothing before it gives")
            self.given[name] = self.rows.weight(array)
        return self.given[name]

    def keep(self, op: str, inputs: Sequence[str], attributes: Mapping[str, Any]) -> str:
        """The node as it is."""
        if op not in OPERATORS:
            raise Malformed(f"{op} of numbers that depend on the latent is not supported")
        if op == "Cast":
            attributes = {**attributes, "to": {TensorProto.DOUBLE: TensorProto.FLOAT}.get(attributes["to"],
                                                                                          attributes["to"])}
        plain = {name: list(value) if isinstance(value, tuple) else value for name, value in attributes.items()}
        return self.rows.emit(op, *map(self.our, inputs), **plain)

    def numbers(self, name: str, op: str) -> list[int]:
        """A constant vector of integers."""
        if name not in self.known or not is_constant(self.known[name]):
            raise Malformed(f"{op} takes sizes or axes that are not constant")
        return [int(n) for n in self.known[name][0].ravel()]

    def sizes(self, name: str, op: str) -> list[Dim]:
        if name not in self.known:
            raise Malformed(f"{op} takes sizes that depend on the latent")
        return as_dims(self.known[name], op)
