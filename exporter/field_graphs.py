"""The field as ONNX graphs, written node by node: mapping.onnx, pullback.onnx and one head.{name}.onnx a head.

One file a head, because a runtime runs all of a graph (ONNX Runtime ignores ``only_execute_path_to_fetches`` in its
inference builds) and a request mentions few of a bundle's heads. The graphs hold no weight: their initialisers are
external data that point into field.safetensors, whose tensors are raw little-endian rows behind an 8-byte length and
a JSON header.

The derivatives are written by hand: tracing ``torch.func.vjp`` fails or freezes the batch (torch 2.13), and
kernels/field.py says what they must be.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from engine.bundle import FIELD, GeneratorFacts, Head

OPSET = 18
IR_VERSION = 10
SLOPE = 0.2
ROWS, R, K = "rows", "r", "k"


class Graph:
    """An ONNX graph under construction beside a safetensors file that holds its weights."""

    def __init__(self, name: str, file: Path):
        self.name, self.file = name, file
        with open(file, "rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length))
        self.start = 8 + length
        self.header = {key: entry for key, entry in header.items() if key != "__metadata__"}
        self.nodes: list[onnx.NodeProto] = []
        self.initialisers: dict[str, TensorProto] = {}
        self.inputs: list[onnx.ValueInfoProto] = []
        self.outputs: list[onnx.ValueInfoProto] = []

    def input(self, name: str, shape: Sequence[int | str], kind: int = TensorProto.FLOAT) -> str:
        self.inputs.append(helper.make_tensor_value_info(name, kind, shape))
        return name

    def output(self, name: str, shape: Sequence[int | str]) -> str:
        self.outputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
        return name

    def node(self, op: str, *inputs: str, out: str | None = None, **attributes) -> str:
        """Append a node with one output and return the output's name."""
        out = out or f"{op}.{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, list(inputs), [out], name=f"make.{out}", **attributes))
        return out

    def constant(self, name: str, values) -> str:
        if name not in self.initialisers:
            self.initialisers[name] = numpy_helper.from_array(np.asarray(values), name)
        return name

    def weight(self, name: str) -> str:
        """An initialiser that is a tensor of the file."""
        if name not in self.initialisers:
            first, last = self.header[name]["data_offsets"]
            place = {"location": self.file.name, "offset": self.start + first, "length": last - first}
            tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=self.header[name]["shape"])
            tensor.data_location = TensorProto.EXTERNAL
            for key, value in place.items():
                tensor.external_data.add(key=key, value=str(value))
            self.initialisers[name] = tensor
        return name

    def save(self, path: Path) -> None:
        graph = helper.make_graph(self.nodes, self.name, self.inputs, self.outputs, list(self.initialisers.values()))
        opset = [helper.make_opsetid("", OPSET)]
        model = helper.make_model(graph, opset_imports=opset, ir_version=IR_VERSION, producer_name="lace-engine")
        path.write_bytes(model.SerializeToString())
        onnx.checker.check_model(str(path))


def depth(graph: Graph, prefix: str) -> int:
    return sum(name.startswith(f"{prefix}.") and name.endswith(".weight") for name in graph.header)


def scalar(graph: Graph, name: str, value: float) -> str:
    return graph.constant(name, np.array(value, np.float32))


def axes(graph: Graph, axis: int) -> str:
    return graph.constant(f"axis.{axis}", np.array([axis], np.int64))


def second_moment(graph: Graph, z: str) -> tuple[str, str]:
    """z -> z / s and s (rows, 1), with s = sqrt(mean z^2 + 1e-8)."""
    mean = graph.node("ReduceMean", graph.node("Mul", z, z), axes(graph, 1), keepdims=1)
    s = graph.node("Sqrt", graph.node("Add", mean, scalar(graph, "epsilon", 1e-8)))
    return graph.node("Div", z, s), s


def dense(graph: Graph, x: str, prefix: str, out: str | None = None) -> str:
    weight, bias = graph.weight(f"{prefix}.weight"), graph.weight(f"{prefix}.bias")
    return graph.node("Gemm", x, weight, bias, transB=1, out=out)


def slope(graph: Graph, activation: str) -> str:
    """(rows, n) -> (rows, 1, n): the derivative of the leaky ReLU, read off the sign of its output."""
    name = f"{activation}.slope"
    if all(node.output[0] != name for node in graph.nodes):
        positive = graph.node("Greater", activation, scalar(graph, "zero", 0.0))
        value = graph.node("Where", positive, scalar(graph, "one", 1.0), scalar(graph, "slope", SLOPE))
        graph.node("Unsqueeze", value, axes(graph, 1), out=name)
    return name


def head_graph(file: Path, head: Head) -> Graph:
    """x (rows, dim), seeds (k, C) -> logits (rows, C), slopes (rows, k, dim): the derivatives of seeds @ logits."""
    graph = Graph(f"head.{head.name}", file)
    dim, logits = head.widths[0], head.widths[-1]
    prefix, top = f"head.{head.name}", len(head.widths) - 2
    x, seeds = graph.input("x", (ROWS, dim)), graph.input("seeds", (K, logits))
    hidden = []
    for i in range(top):
        source = hidden[-1] if hidden else x
        hidden.append(graph.node("LeakyRelu", dense(graph, source, f"{prefix}.{i}"), alpha=SLOPE))
    dense(graph, hidden[-1] if hidden else x, f"{prefix}.{top}", graph.output("logits", (ROWS, logits)))
    cotangent = graph.node("MatMul", seeds, graph.weight(f"{prefix}.{top}.weight"))
    cotangent = graph.node("Unsqueeze", cotangent, axes(graph, 0))
    out = graph.output("slopes", (ROWS, K, dim))
    if not hidden:  # a linear head: the same slopes for every row
        rows = graph.node("Shape", x, start=0, end=1)
        size = graph.node("Concat", rows, graph.constant("ones", np.array([1, 1], np.int64)), axis=0)
        graph.node("Expand", cotangent, size, out=out)
    for i in reversed(range(len(hidden))):
        product = graph.node("Mul", cotangent, slope(graph, hidden[i]))
        cotangent = graph.node("MatMul", product, graph.weight(f"{prefix}.{i}.weight"), out=None if i else out)
    return graph


def mapping_graph(file: Path, facts: GeneratorFacts) -> Graph:
    """z (rows, z_dim), psi (rows, 1) [, label (rows,)] -> w (rows, w_dim) truncated, hidden.{i} (rows, w_dim)."""
    graph = Graph("mapping", file)
    z = graph.input("z", (ROWS, facts.z_dim))
    psi = graph.input("psi", (ROWS, 1))
    x, _ = second_moment(graph, z)
    if facts.labels:
        label = graph.input("label", (ROWS,), TensorProto.INT64)
        embedded = graph.node("Gather", graph.weight("mapping.embedding"), label, axis=0)
        x = graph.node("Concat", x, embedded, axis=1)
    average = graph.weight("mapping.w_avg")
    w = graph.output("w", (ROWS, facts.w_dim))
    for i in range(depth(graph, "mapping")):
        out = graph.output(f"hidden.{i}", (ROWS, facts.w_dim))
        x = graph.node("LeakyRelu", dense(graph, x, f"mapping.{i}"), alpha=SLOPE, out=out)
    graph.node("Add", average, graph.node("Mul", psi, graph.node("Sub", x, average)), out=w)
    return graph


def pullback_graph(file: Path, facts: GeneratorFacts) -> Graph:
    """z, psi, cotangent (rows, r, w_dim), hidden.{i} -> dz (rows, r, z_dim) = cotangent^T dw/dz."""
    graph = Graph("pullback", file)
    z = graph.input("z", (ROWS, facts.z_dim))
    psi = graph.input("psi", (ROWS, 1))
    cotangent = graph.input("cotangent", (ROWS, R, facts.w_dim))
    count = depth(graph, "mapping")
    hidden = [graph.input(f"hidden.{i}", (ROWS, facts.w_dim)) for i in range(count)]
    g = graph.node("Mul", cotangent, graph.node("Unsqueeze", psi, axes(graph, 2)))
    for i in reversed(range(count)):
        weight = graph.weight(f"mapping.{i}.weight")
        if i == 0 and facts.labels:  # only z moves, the label does not; constant, so every compiler folds it
            ends = [graph.constant(f"columns.{k}", np.array([k], np.int64)) for k in (0, facts.z_dim)]
            weight = graph.node("Slice", weight, *ends, axes(graph, 1))
        g = graph.node("MatMul", graph.node("Mul", g, slope(graph, hidden[i])), weight)
    x, s = second_moment(graph, z)
    x = graph.node("Unsqueeze", x, axes(graph, 1))
    radial = graph.node("ReduceMean", graph.node("Mul", g, x), axes(graph, 2), keepdims=1)
    tangent = graph.node("Sub", g, graph.node("Mul", radial, x))
    dz = graph.output("dz", (ROWS, R, facts.z_dim))
    graph.node("Div", tangent, graph.node("Unsqueeze", s, axes(graph, 1)), out=dz)
    return graph


def write_field_graphs(folder: Path, facts: GeneratorFacts, heads: Sequence[Head]) -> dict[str, dict]:
    """Write the graphs beside the field.safetensors that ``folder`` holds; their entries for the manifest."""
    file = folder / FIELD
    graphs = [mapping_graph(file, facts), pullback_graph(file, facts), *(head_graph(file, head) for head in heads)]
    for graph in graphs:
        graph.save(folder / f"{graph.name}.onnx")
    return {graph.name: {"file": f"{graph.name}.onnx"} for graph in graphs}
