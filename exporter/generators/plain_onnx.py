"""Plain generators in ONNX files: which input is the latent and which the class, and how the file itself answers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy import ndarray as Array
from onnx import TensorProto, helper

from engine.errors import CheckpointError
from exporter.generators.onnx_reading import read_onnx
from exporter.generators.plain import INTEGER, ONE_HOT, PASSED, Latent, Network, Original

LABEL_NAMES = ("class", "label", "onehot", "one_hot", "y", "c", "cond", "condition")
FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE)
INTEGERS = (TensorProto.INT64, TensorProto.INT32)


def network_of_onnx(path: Path, *, latent: tuple[int, ...] | None = None, classes: int | None = None) -> Network:
    """The network of a file. Raises CheckpointError.

    latent    its sizes behind the rows, where the file leaves them open
    classes   of an integer input, where the file does not say
    """
    model = read_onnx(path)
    z, label = inputs_of(model)
    dims = dims_of(z)
    found = latent or tuple(n if isinstance(n, int) else 0 for n in dims[1:])
    if 0 in found:
        raise CheckpointError(f"cannot use {path}: its latent {z.name[:60]!r} has the sizes {dims}: say them with "
                              "--latent, such as 128 or 100,1,1")
    of_class, class_input = 0, INTEGER
    if label is not None:
        of_class, class_input = classes_of(model, label, classes)
    elif classes:
        raise CheckpointError(f"cannot use {path}: it has no input for a class, and --classes {classes} was given")
    frozen = dims[0] if isinstance(dims[0], int) else None
    output = picture_output(model)
    parts = Latent(found, of_class, class_input)
    original = run_by_onnxruntime(model, z, label, output, parts, frozen)
    remarks = () if frozen is None else (f"the file is for batches of {frozen}; its graph was freed from that",)
    return Network(model, parts, (z.name, None if label is None else label.name), original, "onnx", frozen, output,
                   remarks)


def dims_of(value: onnx.ValueInfoProto) -> tuple[int | str, ...]:
    dims = value.type.tensor_type.shape.dim
    return tuple(dim.dim_value if dim.HasField("dim_value") else dim.dim_param or "?" for dim in dims)


def inputs_of(model: onnx.ModelProto) -> tuple[onnx.ValueInfoProto, onnx.ValueInfoProto | None]:
    """The latent's input and that of the class, if there is one. Raises CheckpointError."""
    inputs = list(model.graph.input)
    listed = ", ".join(f"{value.name[:40]!r} {dims_of(value)}" for value in inputs[:6]) or "none"
    floats = [v for v in inputs if v.type.tensor_type.elem_type in FLOATS]
    integers = [v for v in inputs if v.type.tensor_type.elem_type in INTEGERS]
    if len(floats) + len(integers) != len(inputs) or len(inputs) not in (1, 2) or not floats:
        raise CheckpointError(f"its inputs are {listed}; expected a latent of floats, and perhaps a class (an integer, "
                              "or one-hot). Make other inputs constants of the model")
    if integers:
        if len(dims_of(integers[0])) not in (1, 2) or dims_of(integers[0])[1:] not in ((), (1,)):
            raise CheckpointError(f"its inputs are {listed}; expected one class for each row")
        return floats[0], integers[0]
    if len(floats) == 1:
        return floats[0], None
    named = [value for value in floats if any(value.name.lower().startswith(name) for name in LABEL_NAMES)]
    label = named[0] if len(named) == 1 else floats[1]
    return next(value for value in floats if value is not label), label


def classes_of(model: onnx.ModelProto, label: onnx.ValueInfoProto, wanted: int | None) -> tuple[int, str]:
    """(number of classes, how they come): one-hot says it by its size, an integer by the table that it looks up."""
    if label.type.tensor_type.elem_type not in INTEGERS:
        dims = dims_of(label)
        found = dims[-1] if len(dims) == 2 and isinstance(dims[-1], int) else wanted
        if not found or (wanted and wanted != found):
            raise CheckpointError(f"its class {label.name[:60]!r} has the sizes {dims}, and --classes is {wanted}; "
                                  "expected one number for each class")
        return found, ONE_HOT
    if wanted is None:
        wanted = table_length(model, label.name)
    if wanted is None:
        raise CheckpointError(f"its class {label.name[:60]!r} is an integer, and nothing says how many classes there "
                              "are: give --classes")
    return wanted, INTEGER


def table_length(model: onnx.ModelProto, label: str) -> int | None:
    """Rows of the table that a Gather looks the label up in."""
    tables, names = {tensor.name: tensor.dims for tensor in model.graph.initializer}, {label}
    for node in model.graph.node:
        if node.op_type in PASSED and node.input and node.input[0] in names:
            names.add(node.output[0])
        axis = next((a.i for a in node.attribute if a.name == "axis"), 0)
        if node.op_type == "Gather" and axis == 0 and node.input[1] in names and node.input[0] in tables:
            return tables[node.input[0]][0]
    return None


def picture_output(model: onnx.ModelProto) -> str:
    """The one output, or the one of several that may be pictures."""
    outputs = list(model.graph.output)
    likely = [value for value in outputs if len(dims_of(value)) in (3, 4)]
    if len(outputs) == 1 or len(likely) == 1:
        return (outputs if len(outputs) == 1 else likely)[0].name
    listed = ", ".join(f"{value.name[:40]!r} {dims_of(value)}" for value in outputs[:6]) or "none"
    raise CheckpointError(f"its outputs are {listed}; expected one that is a picture")


def run_by_onnxruntime(model: onnx.ModelProto, z: onnx.ValueInfoProto, label: onnx.ValueInfoProto | None, output: str,
                       latent: Latent, frozen: int | None) -> Original:
    """The file's own graph, in batches of its own size. It is opened at the first call, after all checks."""
    from engine.runtimes.onnxruntime import open_session

    sessions: list[Any] = []

    def run(latents: Array, labels: Array | None) -> Array:
        if not sessions:
            sessions.append(open_session(model.SerializeToString(), 0, name="the file"))
        feeds = {z.name: latents.reshape(-1, *latent.shape).astype(dtype_of(z))}
        if label is not None and labels is not None:
            chosen = np.eye(latent.classes)[labels] if latent.class_input == ONE_HOT else labels
            shape = (-1, 1) if latent.class_input == INTEGER and len(dims_of(label)) == 2 else chosen.shape
            feeds[label.name] = chosen.reshape(shape).astype(dtype_of(label))
        try:
            found = in_batches(lambda part: sessions[0].run([output], part)[0], feeds, frozen)
        except Exception as error:  # onnxruntime raises many private types
            reason = " ".join(str(error).split())[:200]
            raise CheckpointError(f"ONNX Runtime cannot run the file ({reason}): export it again") from error
        return found.astype(np.float32)

    return run


def dtype_of(value: onnx.ValueInfoProto) -> np.dtype:
    return helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)


def in_batches(run: Callable[[dict[str, Array]], Array], feeds: dict[str, Array], frozen: int | None) -> Array:
    """All rows, in calls of ``frozen`` rows; the last call's rest is filled with its first row."""
    count = len(next(iter(feeds.values())))
    if frozen is None:
        return run(feeds)
    found = []
    for first in range(0, count, frozen):
        places = [min(first + i, count - 1) for i in range(frozen)]
        found.append(run({name: array[places] for name, array in feeds.items()}))
    return np.concatenate(found)[:count]
