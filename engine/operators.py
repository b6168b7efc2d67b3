"""The operators that a graph in a bundle may use, all of the default domain, and the shape that each gives.

A graph with any other operator is refused. Because the shape of every result follows here from the shapes of inputs
and weights, what a graph costs is known before it runs: no shape is computed from numbers, nothing loops, and a
graph that needs more than the largest generators do is refused. A new kind of graph adds what it needs to this file.

A dimension is a number, or a symbol: the name of one that stays open ("rows"), a product ("k*rows"), or a sum.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

from engine.onnx_file import FLOAT, INTEGERS, Graph, Malformed, Model, Node, Tensor

OLDEST_OPSET, NEWEST_OPSET, NEWEST_IR = 18, 22, 10
MOST_NODES = 10_000
MOST_SYMBOLS = 2  # in one shape: rows, and cotangents of each
PICTURE_RANK = 4  # rows, channels, height, width

Dim = int | str
Shape = tuple[Dim, ...]


class Shapes:
    """The shape of every result of a graph, found node by node. Raises Malformed.

    most      numbers that one result may have for each row
    work      multiplications that the graph may take for each row
    weight    called with each initialiser whose numbers lie in another file
    """

    def __init__(self, model: Model, inputs: Mapping[str, Shape], *, most: int, work: int,
                 weight: Callable[[Tensor], None]):
        self.check_versions(model)
        self.model, self.most, self.work, self.weight, self.nodes = model, most, work, weight, MOST_NODES
        self.shapes: dict[str, Shape] = dict(inputs)
        self.values: dict[str, Shape] = {}  # small vectors of integers whose numbers are known
        self.scales: dict[str, tuple[float, ...]] = {}  # vectors that may be the scales of a Resize
        self.bounded: set[Shape] = set()  # shapes that are not too large
        self.own = set(inputs)  # names that this graph gives, and not one around it
        self.run(model.graph)

    def check_versions(self, model: Model) -> None:
        if not OLDEST_OPSET <= model.opsets.get("", 0) <= NEWEST_OPSET or set(model.opsets) != {""}:
            raise Malformed(f"its operators are of {model.opsets or 'no version'}; expected those of the default "
                            f"domain, version {OLDEST_OPSET} to {NEWEST_OPSET}")
        if model.ir_version > NEWEST_IR:
            raise Malformed(f"its IR version is {model.ir_version}; expected at most {NEWEST_IR}")

    def operators(self) -> "Mapping[str, Rule]":
        return OPERATORS

    def run(self, graph: Graph) -> None:
        for tensor in graph.initialisers:
            self.forget(tensor.name)  # of the same name in a graph around this one
            self.define(tensor.name, tensor.dims)
            self.learn(tensor.name, tensor)
        for node in graph.nodes:
            self.nodes -= 1
            if self.nodes < 0:
                raise Malformed(f"it has more than {MOST_NODES} nodes")
            if node.domain or node.op not in self.operators():
                raise Malformed(f"it uses the operator {f'{node.domain}.' if node.domain else ''}{node.op}, which no "
                                "graph of ours has")
            for name in node.inputs:
                if name and name not in self.shapes:
                    raise Malformed(f"{node.op} reads {name!r}, which nothing before it gives")
            self.apply(node)

    def forget(self, name: str) -> None:
        self.values.pop(name, None)
        self.scales.pop(name, None)

    def branch(self, graph: Graph) -> list[Shape]:
        """The results of a graph within the graph, whose names nobody else sees."""
        around = self.shapes, self.values, self.scales, self.own
        self.shapes, self.values, self.scales, self.own = dict(self.shapes), dict(self.values), dict(self.scales), set()
        self.run(graph)
        found = [self.shapes[output.name] for output in graph.outputs]
        self.shapes, self.values, self.scales, self.own = around
        return found

    def apply(self, node: Node) -> None:
        if self.values or self.scales:
            for name in node.outputs:
                self.forget(name)
        try:
            found = self.operators()[node.op](self, node)
        except (IndexError, KeyError, TypeError, ValueError) as error:
            if isinstance(error, Malformed):
                raise
            raise Malformed(f"{node.op} has inputs or attributes that do not fit it") from error
        results = found if isinstance(found, list) else [found]
        if len(results) != len(node.outputs):
            raise Malformed(f"{node.op} has {len(node.outputs)} outputs; expected {len(results)}")
        for name, shape in zip(node.outputs, results, strict=True):
            self.define(name, shape)
            self.bound(node, shape)

    def define(self, name: str, shape: Shape) -> None:
        if not name or name in self.own:
            raise Malformed(f"the name {name!r} is given twice, or empty")
        self.own.add(name)
        self.shapes[name] = shape

    def bound(self, node: Node, shape: Shape) -> None:
        if shape in self.bounded:
            return
        symbols = [factor for dim in shape if isinstance(dim, str) for factor in dim.split("*")]
        if len(symbols) > MOST_SYMBOLS or len(set(symbols)) < len(symbols):
            raise Malformed(f"{node.op} gives the shape {shape}, which grows faster than the rows")
        if size(shape) > self.most:
            raise Malformed(f"{node.op} gives {size(shape):,} numbers a row; expected at most {self.most:,}")
        self.bounded.add(shape)

    def spend(self, node: Node, multiplications: int) -> None:
        self.work -= multiplications
        if self.work < 0:
            raise Malformed(f"it takes more multiplications a row than any generator of this size ({node.op})")

    def learn(self, name: str, tensor: Tensor) -> None:
        """Remember the numbers of integer constants; weights must be where they say."""
        if tensor.external:
            self.weight(tensor)
        elif tensor.kind == FLOAT and len(tensor.dims) == 1 and tensor.dims[0] == PICTURE_RANK:
            self.scales[name] = tuple(self.model.floats(tensor).tolist())
        elif tensor.kind in INTEGERS:
            if len(tensor.dims) > 1 or size(tensor.dims) > 64:
                raise Malformed(f"the integers {tensor.name!r} have the shape {tensor.dims}; expected at most 64")
            self.values[name] = tuple(self.model.integers(tensor).tolist())

    # --- what operators ask -----------------------------------------------------------------------------------------

    def of(self, node: Node, i: int) -> Shape:
        return self.shapes[node.inputs[i]]

    def numbers(self, node: Node, i: int) -> Shape:
        """The numbers of a small integer input."""
        if node.inputs[i] not in self.values:
            raise Malformed(f"{node.op} computes a shape from numbers that are not constant")
        return self.values[node.inputs[i]]

    def integers(self, node: Node, i: int) -> tuple[int, ...]:
        found = self.numbers(node, i)
        if any(isinstance(number, str) for number in found):
            raise Malformed(f"{node.op} has an axis that is not constant")
        return found  # type: ignore[return-value]


def size(shape: Shape) -> int:
    """Numbers for each row."""
    total = 1
    for dim in shape:
        if type(dim) is int:
            total *= dim
    return total


def expect(node: Node, fits: bool) -> None:
    if not fits:
        raise Malformed(f"{node.op} has inputs or attributes that do not fit it")


def attribute(node: Node, name: str, default: int) -> int:
    value = node.attributes.get(name, default)
    expect(node, type(value) is int)
    return value  # type: ignore[return-value]


def attributes(node: Node, name: str, default: tuple[int, ...]) -> tuple[int, ...]:
    value = node.attributes.get(name, default)
    expect(node, isinstance(value, tuple) and len(value) == len(default))
    expect(node, all(type(n) is int and 0 <= n < 1 << 16 for n in value))  # type: ignore[union-attr]
    return value  # type: ignore[return-value]


def axis_of(node: Node, axis: int, rank: int) -> int:
    expect(node, -rank <= axis < rank)
    return axis % rank


def broadcast(node: Node, *shapes: Shape) -> Shape:
    if len(shapes) == 2:
        a, b = shapes
        if a == b or not b:
            return a
    rank = max(map(len, shapes))
    padded = [(1,) * (rank - len(shape)) + shape for shape in shapes]
    result: list[Dim] = []
    for dims in zip(*padded, strict=True):
        found = {dim for dim in dims if dim != 1}
        expect(node, len(found) <= 1)
        result.append(found.pop() if found else 1)
    return tuple(result)


# --- the operators --------------------------------------------------------------------------------------------------


def same(shapes: Shapes, node: Node) -> Shape:
    """Number by number; further inputs (of Clip) are scalars."""
    expect(node, all(not name or shapes.shapes[name] in ((), (1,)) for name in node.inputs[1:]))
    return shapes.of(node, 0)


def elementwise(shapes: Shapes, node: Node) -> Shape:
    return broadcast(node, *(shapes.shapes[name] for name in node.inputs))


def matmul(shapes: Shapes, node: Node) -> Shape:
    (*left, n, k), (*right, depth, m) = shapes.of(node, 0), shapes.of(node, 1)
    expect(node, len(node.inputs) == 2 and isinstance(k, int) and k == depth)
    result = (*broadcast(node, tuple(left), tuple(right)), n, m)
    shapes.spend(node, size((*result, k)))
    return result


def gemm(shapes: Shapes, node: Node) -> Shape:
    a, b = shapes.of(node, 0), shapes.of(node, 1)
    expect(node, len(a) == len(b) == 2 and attribute(node, "transA", 0) == 0)
    k, n = reversed(b) if attribute(node, "transB", 0) else b
    expect(node, a[1] == k and isinstance(k, int))
    expect(node, broadcast(node, (a[0], n), *(shapes.shapes[name] for name in node.inputs[2:])) == (a[0], n))
    shapes.spend(node, size((a[0], n, k)))
    return a[0], n


def gather(shapes: Shapes, node: Node) -> Shape:
    data, index = shapes.of(node, 0), shapes.of(node, 1)
    axis = axis_of(node, attribute(node, "axis", 0), len(data))
    known = shapes.values.get(node.inputs[1], ())
    length = data[axis]
    expect(node, all(isinstance(length, int) and isinstance(i, int) and 0 <= i < length for i in known))
    return (*data[:axis], *index, *data[axis + 1 :])


def unsqueeze(shapes: Shapes, node: Node) -> Shape:
    data, axes = list(shapes.of(node, 0)), shapes.integers(node, 1)
    rank = len(data) + len(axes)
    expect(node, rank <= 8)
    for axis in sorted({axis_of(node, axis, rank) for axis in axes}):
        data.insert(axis, 1)
    expect(node, len(data) == rank)
    return tuple(data)


def concat(shapes: Shapes, node: Node) -> Shape:
    parts = [shapes.shapes[name] for name in node.inputs]
    axis = axis_of(node, attribute(node, "axis", 0), len(parts[0]))
    expect(node, len({(*part[:axis], *part[axis + 1 :]) for part in parts}) == 1)
    total = add(node, [part[axis] for part in parts])
    if len(parts[0]) == 1 and all(name in shapes.values for name in node.inputs):
        shapes.values[node.outputs[0]] = tuple(n for name in node.inputs for n in shapes.values[name])
    return (*parts[0][:axis], total, *parts[0][axis + 1 :])


def add(node: Node, dims: list[Dim]) -> Dim:
    """The sum of sizes. Each symbol may come once: twice the rows, and that again and again, would grow without end."""
    if all(isinstance(dim, int) for dim in dims):
        return sum(dims)  # type: ignore[arg-type]
    terms = [term for dim in dims for term in str(dim).replace("*", "x").split("+")]
    if len(set(terms)) < len(terms):
        raise Malformed(f"{node.op} repeats what it joins, which would grow without limit")
    return "+".join(terms)


def slice_of(shapes: Shapes, node: Node) -> Shape:
    data, starts, ends = list(shapes.of(node, 0)), shapes.integers(node, 1), shapes.integers(node, 2)
    axes = shapes.integers(node, 3) if len(node.inputs) > 3 else tuple(range(len(starts)))
    steps = shapes.integers(node, 4) if len(node.inputs) > 4 else (1,) * len(starts)
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        axis = axis_of(node, axis, len(data))
        if (start, step) == (0, 1) and end >= (1 << 63) - 1:
            continue  # all of it, as torch writes it
        dim = data[axis]
        expect(node, isinstance(dim, int) and step != 0)
        data[axis] = len(range(*slice(start, end, step).indices(dim)))  # type: ignore[arg-type]
    return tuple(data)


def shape_of(shapes: Shapes, node: Node) -> Shape:
    dims = shapes.of(node, 0)
    end = attribute(node, "end", len(dims))
    shapes.values[node.outputs[0]] = found = dims[attribute(node, "start", 0) : end]
    return (len(found),)


def number_of(shapes: Shapes, node: Node) -> Shape:
    return ()


def expand(shapes: Shapes, node: Node) -> Shape:
    wanted = shapes.numbers(node, 1)
    expect(node, all(isinstance(dim, str) or dim >= 1 for dim in wanted))
    return broadcast(node, shapes.of(node, 0), wanted)


def reshape(shapes: Shapes, node: Node) -> Shape:
    data, wanted = shapes.of(node, 0), shapes.integers(node, 1)
    symbols = [dim for dim in data if isinstance(dim, str)]
    fixed, known = size(data), math.prod(n for n in wanted if n != -1)
    expect(node, wanted.count(-1) <= 1 and all(n == -1 or n > 0 for n in wanted) and len(wanted) <= 8)
    if -1 not in wanted:
        expect(node, not symbols and fixed == known)
        return wanted
    expect(node, fixed % known == 0)
    rest: Dim = fixed // known
    if symbols:
        expect(node, rest == 1)
        rest = "*".join(sorted(factor for dim in symbols for factor in dim.split("*")))
    return tuple(rest if n == -1 else n for n in wanted)


def transpose(shapes: Shapes, node: Node) -> Shape:
    data = shapes.of(node, 0)
    order = attributes(node, "perm", tuple(reversed(range(len(data)))))
    expect(node, sorted(order) == list(range(len(data))))
    return tuple(data[i] for i in order)


def reduce(shapes: Shapes, node: Node) -> Shape:
    data = shapes.of(node, 0)
    axes = {axis_of(node, axis, len(data)) for axis in shapes.integers(node, 1)}
    expect(node, bool(axes) and "noop_with_empty_axes" not in node.attributes)
    if not attribute(node, "keepdims", 1):
        return tuple(dim for i, dim in enumerate(data) if i not in axes)
    return tuple(1 if i in axes else dim for i, dim in enumerate(data))


def window(shapes: Shapes, node: Node) -> tuple[list[int], Shape, int, list[tuple[int, int, int, int]]]:
    """Of a convolution in two dimensions: (channels, height, width), the kernel's shape, groups, and for each side
    the kernel's extent, stride, padding before and after."""
    data, kernel = shapes.of(node, 0), shapes.of(node, 1)
    group = attribute(node, "group", 1)
    expect(node, len(data) == len(kernel) == 4 and all(isinstance(n, int) and n > 0 for n in (*data[1:], *kernel)))
    expect(node, node.attributes.get("auto_pad", b"NOTSET") == b"NOTSET" and group > 0)
    expect(node, attributes(node, "kernel_shape", kernel[2:]) == kernel[2:])  # type: ignore[arg-type]
    strides, dilations = attributes(node, "strides", (1, 1)), attributes(node, "dilations", (1, 1))
    expect(node, min(*strides, *dilations) > 0)
    pads = attributes(node, "pads", (0, 0, 0, 0))
    sides = [((kernel[2 + i] - 1) * dilations[i] + 1, strides[i], pads[i], pads[2 + i])  # type: ignore[operator]
             for i in range(2)]
    for name in node.inputs[2:]:
        expect(node, len(shapes.shapes[name]) == 1)
    return list(data[1:]), kernel, group, sides  # type: ignore[return-value]


def conv(shapes: Shapes, node: Node) -> Shape:
    (channels, *data), kernel, group, sides = window(shapes, node)
    expect(node, kernel[1] * group == channels and kernel[0] % group == 0)  # type: ignore[operator]
    out = [(n + a + b - extent) // stride + 1 for n, (extent, stride, a, b) in zip(data, sides, strict=True)]
    expect(node, min(out) > 0)
    shapes.spend(node, math.prod(out) * size(kernel))
    return (shapes.of(node, 0)[0], kernel[0], *out)


def conv_transpose(shapes: Shapes, node: Node) -> Shape:
    (channels, *data), kernel, group, sides = window(shapes, node)
    expect(node, kernel[0] == channels and channels % group == 0 and "output_shape" not in node.attributes)
    more = attributes(node, "output_padding", (0, 0))
    out = [(n - 1) * stride + extent - a - b + extra
           for n, (extent, stride, a, b), extra in zip(data, sides, more, strict=True)]
    expect(node, min(out) > 0)
    shapes.spend(node, math.prod(data) * size(kernel))
    return (shapes.of(node, 0)[0], kernel[1] * group, *out)  # type: ignore[operator]


def pool(shapes: Shapes, node: Node) -> Shape:
    data = shapes.of(node, 0)
    expect(node, len(data) == PICTURE_RANK and len(node.outputs) == 1)
    expect(node, node.attributes.get("auto_pad", b"NOTSET") == b"NOTSET" and not attribute(node, "ceil_mode", 0))
    kernel, strides = (attributes(node, name, (1, 1)) for name in ("kernel_shape", "strides"))
    dilations, pads = attributes(node, "dilations", (1, 1)), attributes(node, "pads", (0, 0, 0, 0))
    expect(node, min(*kernel, *strides, *dilations) > 0)
    out = [(n + pads[i] + pads[2 + i] - (kernel[i] - 1) * dilations[i] - 1) // strides[i] + 1  # type: ignore[operator]
           for i, n in enumerate(data[2:])]
    expect(node, min(out) > 0)
    shapes.spend(node, math.prod(out) * math.prod(kernel) * data[1])  # type: ignore[arg-type]
    return (*data[:2], *out)


def resize(shapes: Shapes, node: Node) -> Shape:
    """By constant scales of height and width."""
    data = shapes.of(node, 0)
    expect(node, len(data) == PICTURE_RANK and len(node.inputs) == 3 and not node.inputs[1])
    expect(node, not {"axes", "keep_aspect_ratio_policy"} & set(node.attributes))
    expect(node, node.attributes.get("coordinate_transformation_mode") != b"tf_crop_and_resize")
    scales = shapes.scales[node.inputs[2]]
    expect(node, scales[:2] == (1, 1) and all(0 < scale <= 1 << 12 for scale in scales))
    out = [math.floor(n * scale) for n, scale in zip(data[2:], scales[2:], strict=True)]  # type: ignore[operator]
    expect(node, min(out) > 0)
    return (*data[:2], *out)


def pad(shapes: Shapes, node: Node) -> Shape:
    data, more = shapes.of(node, 0), shapes.integers(node, 1)
    expect(node, len(more) == 2 * len(data) and all(0 <= n < 1 << 16 for n in more) and len(node.inputs) <= 3)
    before, after = more[: len(data)], more[len(data) :]
    expect(node, all(isinstance(dim, int) or not a + b for dim, a, b in zip(data, before, after, strict=True)))
    return tuple(dim + a + b if a + b else dim  # type: ignore[operator]
                 for dim, a, b in zip(data, before, after, strict=True))


def by_channel(shapes: Shapes, node: Node) -> Shape:
    """A normalisation with numbers of each channel."""
    data = shapes.of(node, 0)
    expect(node, len(data) >= 2 and len(node.inputs) >= 3 and not attribute(node, "training_mode", 0))
    expect(node, all(shapes.shapes[name] == data[1:2] for name in node.inputs[1:]))
    return data


def by_layer(shapes: Shapes, node: Node) -> Shape:
    data = shapes.of(node, 0)
    axis = axis_of(node, attribute(node, "axis", -1), len(data))
    expect(node, len(node.inputs) >= 2 and all(shapes.shapes[name] == data[axis:] for name in node.inputs[1:]))
    return data


def softmax(shapes: Shapes, node: Node) -> Shape:
    axis_of(node, attribute(node, "axis", -1), len(shapes.of(node, 0)))
    return same(shapes, node)


def depth_to_space(shapes: Shapes, node: Node) -> Shape:
    n, channels, height, width = shapes.of(node, 0)
    block = attribute(node, "blocksize", 0)
    expect(node, 0 < block < 1 << 8 and channels % block**2 == 0)  # type: ignore[operator]
    return n, channels // block**2, height * block, width * block  # type: ignore[operator]


def constant(shapes: Shapes, node: Node) -> Shape:
    tensor = node.attributes["value"]
    expect(node, isinstance(tensor, Tensor) and not tensor.external and not node.inputs)
    shapes.learn(node.outputs[0], tensor)  # type: ignore[arg-type]
    return tensor.dims  # type: ignore[union-attr]


def either(shapes: Shapes, node: Node) -> list[Shape]:
    """One branch or the other: where nobody reads a head, a result of no rows takes the place of its answers."""
    expect(node, set(node.attributes) == {"then_branch", "else_branch"})
    found = []
    for name in ("then_branch", "else_branch"):
        branch = node.attributes[name]
        expect(node, isinstance(branch, Graph) and not branch.inputs)  # type: ignore[union-attr]
        found.append(shapes.branch(branch))  # type: ignore[arg-type]
    for then, otherwise in zip(*found, strict=True):
        expect(node, then[1:] == otherwise[1:] and otherwise[:1] == (0,))
    return found[0]


# What networks of others draw pictures with, beside what our own graphs need.
UNARY = ("Abs", "Cast", "Ceil", "Clip", "Cos", "Elu", "Erf", "Exp", "Floor", "Gelu", "HardSigmoid", "HardSwish",
         "LeakyRelu", "Log", "Mish", "Neg", "Reciprocal", "Relu", "Selu", "Sigmoid", "Sin", "Softplus", "Softsign",
         "Sqrt", "Tanh")

Rule = Callable[[Any, Node], Shape | list[Shape]]
OPERATORS: dict[str, Rule] = {
    **dict.fromkeys(UNARY, same),
    **dict.fromkeys(("Add", "Div", "Equal", "Greater", "Less", "Max", "Min", "Mul", "PRelu", "Pow", "Sub", "Where"),
                    elementwise),
    **dict.fromkeys(("ReduceMax", "ReduceMean", "ReduceMin", "ReduceSum"), reduce),
    **dict.fromkeys(("AveragePool", "MaxPool"), pool),
    **dict.fromkeys(("BatchNormalization", "InstanceNormalization"), by_channel),
    "LayerNormalization": by_layer, "Pad": pad, "Resize": resize, "Softmax": softmax,
    "Concat": concat, "Constant": constant, "Conv": conv, "ConvTranspose": conv_transpose,
    "DepthToSpace": depth_to_space, "Expand": expand, "Gather": gather, "Gemm": gemm, "If": either, "MatMul": matmul,
    "Reshape": reshape, "Shape": shape_of, "Size": number_of, "Slice": slice_of, "Transpose": transpose,
    "Unsqueeze": unsqueeze,
}
