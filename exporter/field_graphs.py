"""The field as ONNX graphs, written node by node: mapping, pullback, one head.{stack} a stack, and all in one.

One file a head, because a runtime runs all of a graph (ONNX Runtime ignores ``only_execute_path_to_fetches`` in its
inference builds) and a request mentions few of a bundle's heads. linearise.onnx is what a step of the default solver
needs in one call, with a switch before each head: a runtime with a pool of threads a session is then not slowed by
the idle threads of four other sessions. The graphs hold no weight: their initialisers are external data that point
into field.safetensors, whose tensors are raw little-endian rows behind an 8-byte length and a JSON header.

The derivatives are written by hand: tracing ``torch.func.vjp`` fails or freezes the batch (torch 2.13), and
engine/reference/field.py says what they must be.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from engine.bundle import FIELD, GeneratorFacts, Head, Oneshot

OPSET = 18
IR_VERSION = 10
SLOPE = 0.2
ROWS, R, K, PAIRS = "rows", "r", "k", "pairs"


class Graph:
    """An ONNX graph under construction beside a safetensors file that holds its weights."""

    def __init__(self, name: str, file: Path, *, prefix: str = ""):
        self.name, self.file, self.prefix = name, file, prefix
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
        out = out or f"{self.prefix}{op}.{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, list(inputs), [out], name=f"make.{out}", **attributes))
        return out

    def constant(self, name: str, values) -> str:
        if name not in self.initialisers:
            self.initialisers[name] = numpy_helper.from_array(np.asarray(values), name)
        return name

    def branch(self, outputs: Sequence[tuple[str, Sequence[int | str]]]) -> onnx.GraphProto:
        """This graph as a branch of an If, with these outputs; it may read names of the graph around it."""
        ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in outputs]
        return helper.make_graph(self.nodes, self.name, [], ends, list(self.initialisers.values()))

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


def normalised(graph: Graph, facts: GeneratorFacts, z: str) -> tuple[str, str | None]:
    """z -> z / s and s (rows, 1), with s = sqrt(mean z^2 + 1e-8); or z as it is and None, as the facts say."""
    if not facts.normalise:
        return z, None
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
        graph.node("Unsqueeze", row_slope(graph, activation), axes(graph, 1), out=name)
    return name


def row_slope(graph: Graph, activation: str) -> str:
    """(rows, n) -> (rows, n)."""
    positive = graph.node("Greater", activation, scalar(graph, "zero", 0.0))
    return graph.node("Where", positive, scalar(graph, "one", 1.0), scalar(graph, "slope", SLOPE))


def head_graph(file: Path, stack: str, widths: Sequence[int]) -> Graph:
    """x (rows, dim), seeds (rows, k, C) -> logits (rows, C), slopes (rows, k, dim): derivatives of seeds @ logits."""
    graph = Graph(f"head.{stack}", file)
    dim, logits = widths[0], widths[-1]
    x, seeds = graph.input("x", (ROWS, dim)), graph.input("seeds", (ROWS, K, logits))
    outputs = graph.output("logits", (ROWS, logits)), graph.output("slopes", (ROWS, K, dim))
    hidden = forward_nodes(graph, f"head.{stack}", widths, x, outputs[0])
    backward_nodes(graph, f"head.{stack}", seeds, hidden, outputs[1])
    return graph


def forward_nodes(graph: Graph, prefix: str, widths: Sequence[int], x: str, logits: str) -> list[str]:
    """A stack of dense layers at x; returns its hidden activations."""
    top, hidden = len(widths) - 2, []
    for i in range(top):
        hidden.append(graph.node("LeakyRelu", dense(graph, hidden[-1] if hidden else x, f"{prefix}.{i}"), alpha=SLOPE))
    dense(graph, hidden[-1] if hidden else x, f"{prefix}.{top}", logits)
    return hidden


def backward_nodes(graph: Graph, prefix: str, seeds: str, hidden: Sequence[str], out: str) -> None:
    """seeds ([rows,] k, C) -> (rows, k, dim), or (k, dim) of a linear stack whose seeds all rows share."""
    last = graph.weight(f"{prefix}.{len(hidden)}.weight")
    cotangent = graph.node("MatMul", seeds, last, out=None if hidden else out)
    for i in reversed(range(len(hidden))):
        product = graph.node("Mul", cotangent, slope(graph, hidden[i]))
        cotangent = graph.node("MatMul", product, graph.weight(f"{prefix}.{i}.weight"), out=None if i else out)


def mapping_graph(file: Path, facts: GeneratorFacts) -> Graph:
    """z (rows, z_dim), psi (rows, 1) [, label (rows,)] -> w (rows, w_dim) truncated, hidden.{i} (rows, w_dim)."""
    graph = Graph("mapping", file)
    z, psi, label = latent(graph, facts)
    x, _ = normalised(graph, facts, z)
    w = graph.output("w", (ROWS, facts.w_dim))
    hidden = mapping_nodes(graph, x, psi, label, w)
    for name in hidden:
        graph.output(name, (ROWS, facts.w_dim))
    return graph


def latent(graph: Graph, facts: GeneratorFacts) -> tuple[str, str, str | None]:
    """The inputs z, psi and, of a conditional generator, the label."""
    z, psi = graph.input("z", (ROWS, facts.z_dim)), graph.input("psi", (ROWS, 1))
    return z, psi, graph.input("label", (ROWS,), TensorProto.INT64) if facts.labels else None


def mapping_nodes(graph: Graph, x: str, psi: str, label: str | None, w: str, *, prefix: str = "hidden") -> list[str]:
    """Normalised x -> truncated ``w``; returns the hidden activations. Without layers x itself is truncated."""
    if label:
        embedded = graph.node("Gather", graph.weight("mapping.embedding"), label, axis=0)
        x = graph.node("Concat", x, embedded, axis=1)
    average, hidden = graph.weight("mapping.w_avg"), []
    for i in range(depth(graph, "mapping")):
        x = graph.node("LeakyRelu", dense(graph, x, f"mapping.{i}"), alpha=SLOPE, out=f"{prefix}.{i}")
        hidden.append(x)
    graph.node("Add", average, graph.node("Mul", psi, graph.node("Sub", x, average)), out=w)
    return hidden


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
        g = graph.node("MatMul", graph.node("Mul", g, slope(graph, hidden[i])), backward_weight(graph, facts, i))
    if facts.labels and not count:
        g = latent_part(graph, facts, g, axis=2)
    dz = graph.output("dz", (ROWS, R, facts.z_dim))
    x, s = normalised(graph, facts, z)
    if s is None:
        graph.node("Mul", g, scalar(graph, "one", 1.0), out=dz)
        return graph
    x = graph.node("Unsqueeze", x, axes(graph, 1))
    denormalise(graph, g, x, graph.node("Unsqueeze", s, axes(graph, 1)), dz, axis=2)
    return graph


def denormalise(graph: Graph, g: str, x: str, s: str, out: str, *, axis: int) -> None:
    """Cotangents on x = z / s -> on z: (g - x mean(x g)) / s. ``axis``: the latent's."""
    radial = graph.node("ReduceMean", graph.node("Mul", g, x), axes(graph, axis), keepdims=1)
    tangent = graph.node("Sub", g, graph.node("Mul", radial, x))
    graph.node("Div", tangent, s, out=out)


def backward_weight(graph: Graph, facts: GeneratorFacts, layer: int) -> str:
    weight = graph.weight(f"mapping.{layer}.weight")
    if layer or not facts.labels:
        return weight
    return latent_part(graph, facts, weight, axis=1)  # constant, so every compiler folds it


def latent_part(graph: Graph, facts: GeneratorFacts, name: str, *, axis: int) -> str:
    """Of numbers for z and, behind them, the label: those for z, because the label does not move."""
    ends = [graph.constant(f"columns.{k}", np.array([k], np.int64)) for k in (0, facts.z_dim)]
    return graph.node("Slice", name, *ends, axes(graph, axis))


def linearise_graph(file: Path, facts: GeneratorFacts, heads: Sequence[Head]) -> Graph:
    """Mapping, the heads on w that are read, and the pullback of what is wanted of their slopes.

    z, psi [, label]; rows.{head} (m,) and seeds.{head} (k, C) of every head, of no row where nobody reads it;
    near_row (q,) and near_anchor (q, w_dim), which add w - anchor to the cotangents
    pair_row (pairs,), source (pairs,): the row of each cotangent, and its place among all heads' (m, k) and near's
    -> w (rows, w_dim), logits.{head} (m, C), jacobian (pairs, z_dim)
    """
    graph = Graph("linearise", file)
    z, psi, label = latent(graph, facts)
    x, s = normalised(graph, facts, z)
    w = graph.output("w", (ROWS, facts.w_dim))
    hidden = mapping_nodes(graph, x, psi, label, w)
    near = graph.node("Gather", w, graph.input("near_row", ("near",), TensorProto.INT64), axis=0)
    cotangents = [switched_head(graph, file, head, w) for head in heads if head.space == "w"]
    cotangents.append(graph.node("Sub", near, graph.input("near_anchor", ("near", facts.w_dim))))
    row = graph.input("pair_row", (PAIRS,), TensorProto.INT64)
    source = graph.input("source", (PAIRS,), TensorProto.INT64)
    g = graph.node("Gather", graph.node("Concat", *cotangents, axis=0), source, axis=0)
    g = graph.node("Mul", g, graph.node("Gather", psi, row, axis=0))
    for i in reversed(range(len(hidden))):
        slopes = graph.node("Gather", row_slope(graph, hidden[i]), row, axis=0)
        g = graph.node("MatMul", graph.node("Mul", g, slopes), backward_weight(graph, facts, i))
    if facts.labels and not hidden:
        g = latent_part(graph, facts, g, axis=1)
    jacobian = graph.output("jacobian", (PAIRS, facts.z_dim))
    if s is None:
        graph.node("Mul", g, scalar(graph, "one", 1.0), out=jacobian)
        return graph
    x, s = (graph.node("Gather", name, row, axis=0) for name in (x, s))
    denormalise(graph, g, x, s, jacobian, axis=1)
    return graph


def switched_head(graph: Graph, file: Path, head: Head, w: str) -> str:
    """The head for the rows that read it, if any: gives logits.{head}, and returns its slopes (m k, w_dim)."""
    name, (dim, *_, logits) = head.name, head.widths
    rows = graph.input(f"rows.{name}", (f"m.{name}",), TensorProto.INT64)
    seeds = graph.input(f"seeds.{name}", (f"k.{name}", logits))
    is_read = graph.node("Cast", graph.node("Size", rows), to=TensorProto.BOOL)
    ends: list[tuple[str, tuple]] = [("logits", (f"m.{name}", logits)), ("slopes", ("wanted", dim))]
    then, otherwise = (Graph(f"{branch}.{name}", file, prefix=f"{name}/{branch}.") for branch in ("then", "else"))
    found = [(f"{then.prefix}{end}", shape) for end, shape in ends]
    x = then.node("Gather", w, rows, axis=0)
    each = slopes_of_all(then, head, x, seeds, found[0][0])
    flat = then.constant(f"{then.prefix}flat", np.array([-1, dim], np.int64))
    then.node("Reshape", each, flat, out=found[1][0])
    missing = [(f"{otherwise.prefix}{end}", shape) for end, shape in ends]
    for (out, _), width in zip(missing, (logits, dim), strict=True):
        empty = numpy_helper.from_array(np.zeros((0, width), np.float32))
        otherwise.node("Constant", out=out, value=empty)
    outputs = [graph.output(f"logits.{name}", (f"m.{name}", logits)), f"slopes.{name}"]
    switch = helper.make_node("If", [is_read], outputs, name=f"make.{name}")
    branches = {"then_branch": then.branch(found), "else_branch": otherwise.branch(missing)}
    switch.attribute.extend(helper.make_attribute(key, branch) for key, branch in branches.items())
    graph.nodes.append(switch)
    return outputs[1]


def slopes_of_all(graph: Graph, head: Head, x: str, seeds: str, logits: str) -> str:
    """The head at x with seeds (k, C) that all rows share: gives ``logits``, and returns its slopes (m, k, dim)."""
    prefix, out = f"head.{head.name}", f"{graph.prefix}each"
    hidden = forward_nodes(graph, prefix, head.widths, x, logits)
    if hidden:
        backward_nodes(graph, prefix, graph.node("Unsqueeze", seeds, axes(graph, 0)), hidden, out)
        return out
    backward_nodes(graph, prefix, seeds, hidden, f"{graph.prefix}slopes.of.any")
    slopes = graph.node("Unsqueeze", f"{graph.prefix}slopes.of.any", axes(graph, 0))
    rows = graph.node("Shape", x, start=0, end=1)
    size = graph.node("Concat", rows, graph.constant("ones", np.array([1, 1], np.int64)), axis=0)
    return graph.node("Expand", slopes, size, out=out)


def oneshot_graph(file: Path, facts: GeneratorFacts, entry: Oneshot) -> Graph:
    """noise (rows, z_dim) [, targets (rows, T)] -> latent (rows, z_dim): engine.reference.oneshot."""
    graph = Graph(f"oneshot.{entry.name}", file)
    x = graph.input("noise", (ROWS, facts.z_dim))
    targets = [graph.input("targets", (ROWS, len(entry.targets)))] if entry.targets else []
    psi, label = scalar(graph, "psi", entry.truncation), None
    if facts.labels:  # the same of every row: the rows' own zeros, and the class
        zeros = graph.node("Cast", graph.node("Mul", first_column(graph, x), scalar(graph, "nothing", 0.0)),
                           to=TensorProto.INT64)
        label = graph.node("Add", zeros, graph.constant("class", np.array(entry.label, np.int64)))
    for i, widths in enumerate(entry.blocks):
        unit, _ = normalised(graph, facts, x)
        w, moved = f"w.{i}", f"moved.{i}"
        mapping_nodes(graph, unit, psi, label, w, prefix=f"hidden.{i}")
        seen = graph.node("Concat", x, w, *targets, axis=1)
        for j in range(len(widths) - 1):
            seen = graph.node("Mul", seen, graph.node("Sigmoid", seen)) if j else seen
            seen = dense(graph, seen, f"oneshot.{entry.name}.{i}.{j}", moved if j == len(widths) - 2 else None)
        is_last = i == len(entry.blocks) - 1
        x = graph.node("Add", x, moved, out=graph.output("latent", (ROWS, facts.z_dim)) if is_last else None)
    return graph


def first_column(graph: Graph, x: str) -> str:
    """(rows, n) -> (rows,)."""
    return graph.node("Gather", x, graph.constant("first", np.array(0, np.int64)), axis=1)


def write_field_graphs(folder: Path, facts: GeneratorFacts, heads: Sequence[Head],
                       oneshots: Sequence[Oneshot] = ()) -> dict[str, dict]:
    """Write the graphs beside the field.safetensors that ``folder`` holds; their entries for the manifest."""
    file = folder / FIELD
    stacks = {head.name: head.widths for head in heads}
    stacks |= {f"{head.name}.sharp": head.sharp.widths for head in heads if head.sharp}
    graphs = [mapping_graph(file, facts), pullback_graph(file, facts), linearise_graph(file, facts, heads),
              *(head_graph(file, stack, widths) for stack, widths in stacks.items()),
              *(oneshot_graph(file, facts, entry) for entry in oneshots)]
    for graph in graphs:
        graph.save(folder / f"{graph.name}.onnx")
    return {graph.name: {"file": f"{graph.name}.onnx"} for graph in graphs}
