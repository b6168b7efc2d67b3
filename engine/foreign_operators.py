"""The operators that an image classifier of others may use, and the shape that each gives: see ``engine.operators``.

More operators than a bundle's graphs have, of more versions: what was an attribute before opset 13 is an input today.
None loops, branches or reads files; the shape of every result follows from the shapes of inputs and from constants.
"""

import operator
from collections.abc import Mapping
from typing import Any

from engine.foreign_onnx import FEW, ForeignTensor
from engine.onnx_file import FLOAT, Malformed, Model, Node
from engine.operators import (
    OPERATORS,
    Dim,
    Rule,
    Shape,
    Shapes,
    add,
    attribute,
    axis_of,
    broadcast,
    elementwise,
    expect,
    matmul,
    size,
)

OLDEST, NEWEST, NEWEST_IR = 7, 26, 13
# Numbers of one result, and of all results, for each picture; multiplications for each. The largest vision transformers
# take 6e11 and have results of 1e7.
MOST_NUMBERS, MOST_IN_ALL, MOST_WORK = 1 << 25, 1 << 32, 1 << 40


class ForeignShapes(Shapes):
    """The shapes of a graph that our exporter did not write, for inputs of known sizes. Raises Malformed.

    rows   pictures of a call, as the inputs have them
    """

    def __init__(self, model: Model, inputs: Mapping[str, Shape], rows: int):
        self.left, self.floats = MOST_IN_ALL * rows, dict[str, tuple]()
        super().__init__(model, inputs, most=MOST_NUMBERS * rows, work=MOST_WORK * rows, weight=lambda tensor: None)

    def check_versions(self, model: Model) -> None:
        version = model.opsets.get("", model.opsets.get("ai.onnx", 0))
        if not OLDEST <= version <= NEWEST:
            raise Malformed(f"its operators are of version {version}; expected {OLDEST} to {NEWEST}")
        if model.ir_version > NEWEST_IR:
            raise Malformed(f"its IR version is {model.ir_version}; expected at most {NEWEST_IR}")

    def operators(self) -> Mapping[str, Rule]:
        return FOREIGN

    def learn(self, name: str, tensor: ForeignTensor) -> None:  # type: ignore[override]
        if tensor.numbers is not None and len(tensor.dims) <= 1:
            known: dict[str, Any] = self.floats if tensor.kind == FLOAT else self.values
            known[name] = tensor.numbers

    def bound(self, node: Node, shape: Shape) -> None:
        if len(shape) > 8 or not all(type(dim) is int and dim >= 0 for dim in shape):
            raise Malformed(f"{node.op} gives the impossible shape {shape}")
        super().bound(node, shape)
        self.left -= size(shape)
        if self.left < 0:
            raise Malformed("its results are more numbers than any known classifier has")

    def apply(self, node: Node) -> None:
        """Outputs that a node leaves out have no name."""
        while node.outputs and not node.outputs[-1]:
            node.outputs.pop()
        super().apply(node)


# --- numbers that shapes depend on ---------------------------------------------------------------------------------


def constants(shapes: ForeignShapes, node: Node, i: int, name: str) -> tuple[int, ...] | None:
    """Integers that are an attribute in old versions and an input in new ones; None if there are none."""
    if name in node.attributes:
        found = node.attributes[name]
        expect(node, isinstance(found, tuple) and all(type(n) is int for n in found))
        return found  # type: ignore[return-value]
    if len(node.inputs) <= i or not node.inputs[i]:
        return None
    return shapes.integers(node, i)


def know(shapes: ForeignShapes, node: Node, found: tuple | None) -> None:
    """The numbers of the result, if they are known, few, and such as 64 bits hold."""
    if found is not None and len(found) <= FEW and all(abs(n) < 1 << 63 for n in found):
        shapes.values[node.outputs[0]] = found


def known(shapes: ForeignShapes, node: Node, i: int = 0) -> tuple | None:
    return shapes.values.get(node.inputs[i])


# --- the operators ---------------------------------------------------------------------------------------------------


def passed_on(shapes: ForeignShapes, node: Node) -> Shape:
    know(shapes, node, known(shapes, node))
    return shapes.of(node, 0)


def dropout(shapes: ForeignShapes, node: Node) -> list[Shape]:
    return [shapes.of(node, 0)] * len(node.outputs)


def first(shapes: ForeignShapes, node: Node) -> Shape:
    """The shape of the first input, whatever the others are (scales, thresholds, statistics)."""
    return shapes.of(node, 0)


def arithmetic(shapes: ForeignShapes, node: Node) -> Shape:
    """Also of sizes that are numbers, as in x.view(n, c * h * w)."""
    left, right = known(shapes, node), known(shapes, node, 1)
    if left and right and (1 in (len(left), len(right)) or len(left) == len(right)):
        pairs = [*zip(left, right, strict=True)] if len(left) == len(right) else [(a, b) for a in left for b in right]
        if node.op not in ("Div", "Mod") or all(b for _, b in pairs):
            know(shapes, node, tuple(int(COMBINE[node.op](a, b)) for a, b in pairs))
    return elementwise(shapes, node)


COMBINE = {"Add": operator.add, "Sub": operator.sub, "Mul": operator.mul, "Div": operator.floordiv,
           "Equal": operator.eq, "Mod": operator.mod}


def gather(shapes: ForeignShapes, node: Node) -> Shape:
    data, index = known(shapes, node), known(shapes, node, 1)
    if data is not None and index is not None:
        expect(node, all(type(i) is int and -len(data) <= i < len(data) for i in index))
        know(shapes, node, tuple(data[i] for i in index))
    whole, axis = shapes.of(node, 0), attribute(node, "axis", 0)
    axis = axis_of(node, axis, len(whole))
    return (*whole[:axis], *shapes.of(node, 1), *whole[axis + 1 :])


def unsqueeze(shapes: ForeignShapes, node: Node) -> Shape:
    data, axes = list(shapes.of(node, 0)), constants(shapes, node, 1, "axes")
    expect(node, axes is not None)
    rank = len(data) + len(axes or ())
    for axis in sorted({axis_of(node, axis, rank) for axis in axes or ()}):
        data.insert(axis, 1)
    expect(node, len(data) == rank)
    know(shapes, node, known(shapes, node))
    return tuple(data)


def squeeze(shapes: ForeignShapes, node: Node) -> Shape:
    data, axes = shapes.of(node, 0), constants(shapes, node, 1, "axes")
    gone = {i for i, dim in enumerate(data) if dim == 1} if axes is None else {
        axis_of(node, axis, len(data)) for axis in axes}
    expect(node, all(data[i] == 1 for i in gone))
    know(shapes, node, known(shapes, node))
    return tuple(dim for i, dim in enumerate(data) if i not in gone)


def flatten(shapes: ForeignShapes, node: Node) -> Shape:
    data, axis = shapes.of(node, 0), attribute(node, "axis", 1)
    expect(node, -len(data) <= axis <= len(data))
    axis = axis + len(data) if axis < 0 else axis
    return size(data[:axis]), size(data[axis:])


def reshape(shapes: ForeignShapes, node: Node) -> Shape:
    """0 copies a size, -1 is the rest."""
    data, wanted = shapes.of(node, 0), constants(shapes, node, 1, "shape")
    expect(node, wanted is not None and len(wanted) <= 8)
    out = [data[i] if n == 0 and not attribute(node, "allowzero", 0) else n for i, n in enumerate(wanted or ())]
    expect(node, out.count(-1) <= 1 and all(n == -1 or n > 0 for n in out))  # type: ignore[operator]
    taken = size(tuple(n for n in out if n != -1))
    expect(node, size(data) % taken == 0 if -1 in out else size(data) == taken)
    know(shapes, node, known(shapes, node))
    return tuple(size(data) // taken if n == -1 else n for n in out)


def reduce(shapes: ForeignShapes, node: Node) -> Shape:
    data, axes = shapes.of(node, 0), constants(shapes, node, 1, "axes")
    if not axes and attribute(node, "noop_with_empty_axes", 0):
        return data
    gone = {axis_of(node, axis, len(data)) for axis in axes} if axes else set(range(len(data)))
    if attribute(node, "keepdims", 1):
        return tuple(1 if i in gone else dim for i, dim in enumerate(data))
    return tuple(dim for i, dim in enumerate(data) if i not in gone)


def arg_reduce(shapes: ForeignShapes, node: Node) -> Shape:
    data = shapes.of(node, 0)
    axis = axis_of(node, attribute(node, "axis", 0), len(data))
    return (*data[:axis], *((1,) if attribute(node, "keepdims", 1) else ()), *data[axis + 1 :])


def sides(node: Node, data: Shape, extents: tuple[int, ...]) -> tuple[int, ...]:
    """Sizes (height, width, ...) that windows of these extents give."""
    n = len(extents)
    strides, dilations = ints(node, "strides", (1,) * n), ints(node, "dilations", (1,) * n)
    pads, auto = ints(node, "pads", (0,) * 2 * n), node.attributes.get("auto_pad", b"NOTSET")
    expect(node, min(*strides, *dilations, *extents) > 0 and min(pads) >= 0 and max(pads, default=0) < 1 << 12)
    out = []
    for i, dim in enumerate(data):
        expect(node, type(dim) is int)
        extent = (extents[i] - 1) * dilations[i] + 1
        if auto in (b"SAME_UPPER", b"SAME_LOWER"):
            out.append(-(-dim // strides[i]))  # type: ignore[operator]
            continue
        expect(node, auto in (b"NOTSET", b"VALID"))
        room = dim - extent + (0 if auto == b"VALID" else pads[i] + pads[n + i])  # type: ignore[operator]
        ceiling = attribute(node, "ceil_mode", 0)
        out.append((-(-room // strides[i]) if ceiling else room // strides[i]) + 1)
    expect(node, min(out) > 0)
    return tuple(out)


def ints(node: Node, name: str, default: tuple[int, ...]) -> tuple[int, ...]:
    found = node.attributes.get(name, default)
    expect(node, isinstance(found, tuple) and len(found) == len(default) and all(type(n) is int for n in found))
    return found  # type: ignore[return-value]


def conv(shapes: ForeignShapes, node: Node) -> Shape:
    return convolve(shapes, node, shapes.of(node, 1))


def quantised_conv(shapes: ForeignShapes, node: Node) -> Shape:
    return convolve(shapes, node, shapes.of(node, 3))  # after the scale and the zero of the data


def convolve(shapes: ForeignShapes, node: Node, kernel: Shape) -> Shape:
    rows, channels, *data = shapes.of(node, 0)
    group = attribute(node, "group", 1)
    expect(node, len(data) in (1, 2) and len(kernel) == len(data) + 2 and all(type(n) is int for n in kernel))
    expect(node, group > 0 and kernel[1] * group == channels and kernel[0] % group == 0)  # type: ignore[operator]
    out = sides(node, tuple(data), kernel[2:])  # type: ignore[arg-type]
    shapes.spend(node, size((rows, *out)) * size(kernel))
    return (rows, kernel[0], *out)


def pool(shapes: ForeignShapes, node: Node) -> Shape:
    rows, channels, *data = shapes.of(node, 0)
    kernel = node.attributes.get("kernel_shape")
    expect(node, isinstance(kernel, tuple) and len(kernel) == len(data) and len(node.outputs) == 1)
    out = sides(node, tuple(data), kernel)  # type: ignore[arg-type]
    shapes.spend(node, size((rows, channels, *out)) * size(kernel))  # type: ignore[arg-type]
    return (rows, channels, *out)


def global_pool(shapes: ForeignShapes, node: Node) -> Shape:
    rows, channels, *data = shapes.of(node, 0)
    return (rows, channels, *(1 for _ in data))


def pad(shapes: ForeignShapes, node: Node) -> Shape:
    data, pads = shapes.of(node, 0), constants(shapes, node, 1, "pads")
    expect(node, pads is not None and len(pads) == 2 * len(data) and all(abs(n) < 1 << 12 for n in pads or ()))
    expect(node, len(node.inputs) < 4 or not node.inputs[3])
    out: list[Dim] = []
    for i, dim in enumerate(data):
        more = pads[i] + pads[len(data) + i]  # type: ignore[index]
        expect(node, not more or type(dim) is int)
        out.append(dim + more if more else dim)  # type: ignore[operator]
    expect(node, all(isinstance(dim, str) or dim > 0 for dim in out))
    return tuple(out)


def slice_of(shapes: ForeignShapes, node: Node) -> Shape:
    data = list(shapes.of(node, 0))
    starts, ends = (constants(shapes, node, i, name) for i, name in ((1, "starts"), (2, "ends")))
    expect(node, starts is not None and ends is not None)
    axes = constants(shapes, node, 3, "axes") or tuple(range(len(starts or ())))
    steps = constants(shapes, node, 4, "steps") or (1,) * len(axes)
    numbers = known(shapes, node)
    for start, end, axis, step in zip(starts or (), ends or (), axes, steps, strict=True):
        axis = axis_of(node, axis, len(data))
        if (start, step) == (0, 1) and end >= (1 << 31) - 1:
            continue
        dim = data[axis]
        expect(node, type(dim) is int and step != 0)
        data[axis] = len(range(*slice(start, end, step).indices(dim)))  # type: ignore[arg-type]
        numbers = numbers[slice(start, end, step)] if numbers is not None else None
    know(shapes, node, numbers)
    return tuple(data)


def split(shapes: ForeignShapes, node: Node) -> list[Shape]:
    data, parts = shapes.of(node, 0), constants(shapes, node, 1, "split")
    axis = axis_of(node, attribute(node, "axis", 0), len(data))
    length, count = data[axis], len(node.outputs)
    expect(node, type(length) is int and count > 0)
    if parts is None:
        step = -(-length // count)  # type: ignore[operator]
        parts = (*(step,) * (count - 1), length - step * (count - 1))  # type: ignore[operator]
    expect(node, sum(parts) == length and min(parts) >= 0 and len(parts) == count)
    return [(*data[:axis], part, *data[axis + 1 :]) for part in parts]


def constant(shapes: ForeignShapes, node: Node) -> Shape:
    expect(node, not node.inputs and len(node.attributes) == 1)
    (name, value), = node.attributes.items()
    if name == "value":
        expect(node, isinstance(value, ForeignTensor) and not value.external)
        shapes.learn(node.outputs[0], value)
        return value.dims
    if name in ("value_int", "value_ints"):
        know(shapes, node, value if isinstance(value, tuple) else (value,))
    expect(node, name in ("value_int", "value_ints", "value_float"))
    return (len(value),) if isinstance(value, tuple) else ()


def filled(shapes: ForeignShapes, node: Node) -> Shape:
    out, value = shapes.integers(node, 0), node.attributes.get("value")
    if isinstance(value, ForeignTensor) and value.numbers and len(out) == 1 and value.kind != FLOAT and out[0] <= FEW:
        know(shapes, node, value.numbers * out[0])
    return out


def where(shapes: ForeignShapes, node: Node) -> Shape:
    parts = [known(shapes, node, i) for i in range(3)]
    if all(part is not None for part in parts) and len({len(part) for part in parts if part}) == 1:
        know(shapes, node, tuple(a if condition else b for condition, a, b in zip(*parts, strict=True)))
    return elementwise(shapes, node)


def tile(shapes: ForeignShapes, node: Node) -> Shape:
    data, repeats = shapes.of(node, 0), shapes.integers(node, 1)
    expect(node, len(data) == len(repeats) and all(0 < n < 1 << 16 for n in repeats))
    expect(node, all(type(dim) is int or n == 1 for dim, n in zip(data, repeats, strict=True)))
    return tuple(dim if n == 1 else dim * n for dim, n in zip(data, repeats, strict=True))  # type: ignore[operator]


def concat(shapes: ForeignShapes, node: Node) -> Shape:
    parts = [shapes.shapes[name] for name in node.inputs]
    axis = axis_of(node, attribute(node, "axis", 0), len(parts[0]))
    expect(node, len({(*part[:axis], *part[axis + 1 :]) for part in parts}) == 1)
    if len(parts[0]) == 1 and all(name in shapes.values for name in node.inputs):
        know(shapes, node, tuple(n for name in node.inputs for n in shapes.values[name]))
    return (*parts[0][:axis], add(node, [part[axis] for part in parts]), *parts[0][axis + 1 :])


def resize(shapes: ForeignShapes, node: Node) -> Shape:
    """To sizes, or by scales, that are constants."""
    data = shapes.of(node, 0)
    place = 2 if node.op == "Resize" and len(node.inputs) > 2 else 1
    expect(node, "axes" not in node.attributes)
    if len(node.inputs) > 3 and node.inputs[3]:
        out = shapes.integers(node, 3)
    else:
        scales = shapes.floats.get(node.inputs[place], ())
        expect(node, len(scales) == len(data) and all(0 < scale < 1 << 8 for scale in scales))
        out = tuple(int(dim * scale) for dim, scale in zip(data, scales, strict=True))  # type: ignore[operator]
    expect(node, len(out) == len(data) and all(n > 0 for n in out))
    return out


def quantise_all(shapes: ForeignShapes, node: Node) -> list[Shape]:
    return [shapes.of(node, 0), (), ()][: len(node.outputs)]


def integer_matmul(shapes: ForeignShapes, node: Node) -> Shape:
    return matmul(shapes, node._replace(inputs=node.inputs[:2]))


def prelu(shapes: ForeignShapes, node: Node) -> Shape:
    data = shapes.of(node, 0)
    expect(node, broadcast(node, data, shapes.of(node, 1)) == data)
    return data


FOREIGN: Mapping[str, Rule] = {
    **{name: rule for name, rule in OPERATORS.items() if name != "If"},
    **dict.fromkeys(("Abs", "BatchNormalization", "Celu", "Ceil", "Clip", "Cos", "DequantizeLinear", "Elu", "Erf",
                     "Exp", "Floor", "Gelu", "GroupNormalization", "HardSigmoid", "HardSwish", "InstanceNormalization",
                     "LRN", "LayerNormalization", "LeakyRelu", "Log", "LogSoftmax", "LpNormalization",
                     "MeanVarianceNormalization", "Mish", "Neg", "Not", "QuantizeLinear", "Reciprocal", "Relu", "Round",
                     "Selu", "Sigmoid", "Sign", "Sin", "Softmax", "Softplus", "Softsign", "Sqrt", "Tanh",
                     "ThresholdedRelu"), first),
    **dict.fromkeys(("Cast", "Identity"), passed_on),
    **dict.fromkeys(("And", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Max", "Mean", "Min",
                     "Or", "Pow", "Sum", "Xor"), elementwise),
    **dict.fromkeys(COMBINE, arithmetic),
    **dict.fromkeys(("ReduceL1", "ReduceL2", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd", "ReduceSum",
                     "ReduceSumSquare"), reduce),
    **dict.fromkeys(("ArgMax", "ArgMin"), arg_reduce),
    **dict.fromkeys(("AveragePool", "LpPool", "MaxPool"), pool),
    **dict.fromkeys(("GlobalAveragePool", "GlobalLpPool", "GlobalMaxPool"), global_pool),
    "Concat": concat, "Constant": constant, "ConstantOfShape": filled, "Conv": conv, "ConvInteger": conv,
    "Dropout": dropout, "DynamicQuantizeLinear": quantise_all,
    "Flatten": flatten, "Gather": gather, "MatMul": matmul, "MatMulInteger": integer_matmul, "PRelu": prelu, "Pad": pad,
    "QLinearConv": quantised_conv, "Reshape": reshape, "Resize": resize, "Slice": slice_of, "Split": split,
    "Squeeze": squeeze, "Tile": tile, "Unsqueeze": unsqueeze, "Upsample": resize, "Where": where,
}
