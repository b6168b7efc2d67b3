"""An ONNX file of a stranger: read whole, checked, and brought to one way of writing. Nothing of it runs.

What is refused here is refused before ONNX Runtime sees the file: weights outside the folder, operators of other
domains, graphs within graphs, functions, and tensors whose numbers do not fit their shapes.
"""

import math
from pathlib import Path

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from onnx import AttributeProto, TensorProto, helper, numpy_helper, version_converter

from engine.errors import CheckpointError
from engine.operators import MOST_NODES, NEWEST_OPSET, OLDEST_OPSET

MAX_BYTES = 2**31 - 2**20  # one protobuf
NEWEST_IR = 10
MAX_TENSORS, MAX_NAME = 20_000, 500
# Operators whose results follow from shapes and constants, and those that are written in other words (onnx_rows.py).
REWRITTEN = {"Constant", "ConstantOfShape", "Dropout", "Flatten", "GlobalAveragePool", "Identity", "Range", "Shape",
             "Size", "Split", "Squeeze", "Sum", "Tile", "Upsample"}
FOLDED = {"And", "Mod", "Not", "Or", "ReduceProd", "Round"}
RANDOM = {"Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike"}
WIDTHS: dict[int, int] = {TensorProto.FLOAT: 4, TensorProto.FLOAT16: 2, TensorProto.DOUBLE: 8, TensorProto.INT32: 4,
          TensorProto.INT64: 8, TensorProto.BOOL: 1, TensorProto.UINT8: 1, TensorProto.INT8: 1}
ADVICE = "nothing of the file was run"


def is_onnx(data: bytes) -> bool:
    """Whether a file begins as an ONNX file does: its IR version, and then another field of a model."""
    return len(data) > 2 and data[0] == 0x08 and 1 <= data[1] <= 31 and data[2] in (0x12, 0x1A, 0x22, 0x28, 0x32, 0x3A,
                                                                                    0x42, 0x72)


def read_onnx(path: Path) -> onnx.ModelProto:
    """The model with all weights inside, of an operator set that we know. Raises CheckpointError."""
    if path.stat().st_size > MAX_BYTES:
        raise CheckpointError(f"{path} has {path.stat().st_size / 1e9:.1f} GB; one ONNX file holds 2 GB")
    try:
        model = onnx.ModelProto.FromString(path.read_bytes())
    except (DecodeError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: it begins as an ONNX file and cannot be read as one") from error
    try:
        check(model)
        for tensor in all_tensors(model):
            bring_inside(tensor, path.parent)
        return renew(model)
    except CheckpointError as error:
        raise CheckpointError(f"cannot use {path}: {error}") from error


def check(model: onnx.ModelProto) -> None:
    """What no generator needs, and what could cost anything. Raises CheckpointError."""
    graph = model.graph
    if model.functions or model.training_info or graph.sparse_initializer:
        raise CheckpointError(f"it has functions of its own, training steps or sparse weights; {ADVICE}. Export it for "
                              "inference, with plain operators")
    domains = sorted({entry.domain for entry in model.opset_import} - {"", "ai.onnx"})
    used = sorted({node.domain for node in graph.node} - {"", "ai.onnx"})
    if used:
        raise CheckpointError(f"it uses operators of the domain {used[0]!r:.60}, which may be anybody's code; {ADVICE}"
                              ". Export it with the operators of ONNX itself")
    for domain in domains:  # named, and not used
        model.opset_import.remove(next(entry for entry in model.opset_import if entry.domain == domain))
    if len(graph.node) > MOST_NODES or len(graph.initializer) > MAX_TENSORS:
        raise CheckpointError(f"it has {len(graph.node)} nodes and {len(graph.initializer)} tensors; at most "
                              f"{MOST_NODES} and {MAX_TENSORS} are read")
    for node in graph.node:
        check_node(node)


def check_node(node: onnx.NodeProto) -> None:
    from engine.operators import OPERATORS

    if node.op_type in RANDOM:
        raise CheckpointError(f"it draws random numbers itself ({node.op_type}), so that a latent would not give one "
                              f"picture; {ADVICE}. Export it without noise, or with the noise as a constant")
    if node.op_type not in OPERATORS.keys() | REWRITTEN | FOLDED or node.op_type == "If":
        raise CheckpointError(f"it uses the operator {node.op_type!r:.60}, which is not among those that a generator "
                              f"may have (engine/operators.py); {ADVICE}")
    if any(a.type in (AttributeProto.GRAPH, AttributeProto.GRAPHS) for a in node.attribute):
        raise CheckpointError(f"its {node.op_type} holds a graph of its own; {ADVICE}")
    if any(len(name) > MAX_NAME for name in (*node.input, *node.output)):
        raise CheckpointError(f"it has names of over {MAX_NAME} letters; {ADVICE}")


def all_tensors(model: onnx.ModelProto) -> list[TensorProto]:
    inner = [a.t for node in model.graph.node for a in node.attribute if a.type == AttributeProto.TENSOR]
    return [*model.graph.initializer, *inner]


# --- weights --------------------------------------------------------------------------------------------------------


def bring_inside(tensor: TensorProto, folder: Path) -> None:
    """The tensor with its numbers in the model, as many as its shape says."""
    name = f"the tensor {tensor.name[:80]!r}"
    if tensor.data_type not in WIDTHS:
        raise CheckpointError(f"{name} has the element type {tensor.data_type}, which is not read; expected float32, "
                              "float16, float64 or integers")
    if len(tensor.dims) > 8 or any(not 0 <= n < 2**40 for n in tensor.dims):
        raise CheckpointError(f"{name} has the shape {list(tensor.dims)[:10]}, which no weight has")
    size = math.prod(tensor.dims) * WIDTHS[tensor.data_type]
    if tensor.data_location == TensorProto.EXTERNAL:
        tensor.raw_data = read_external(tensor, folder, size, name)
        tensor.data_location = TensorProto.DEFAULT
        del tensor.external_data[:]
    elif tensor.external_data:
        raise CheckpointError(f"{name} has its numbers in two places")
    if tensor.HasField("raw_data"):
        held = len(tensor.raw_data)
    else:
        held = max(map(len, (tensor.float_data, tensor.int32_data, tensor.int64_data, tensor.double_data)))
        held *= WIDTHS[tensor.data_type]
    if held != size:
        raise CheckpointError(f"{name} says that it has {size} bytes, and has {held}: the file is damaged")


def read_external(tensor: TensorProto, folder: Path, size: int, name: str) -> bytes:
    """Numbers in a file beside the model. Only an ordinary file in its folder is opened."""
    place = {entry.key: entry.value for entry in tensor.external_data}
    location = place.get("location", "")
    file = folder / location
    if not location or "\0" in location or Path(location).is_absolute() or ".." in Path(location).parts:
        raise CheckpointError(f"{name} has its numbers in {location[:80]!r}, which is no file in the model's folder; "
                              "it was not opened")
    if not file.is_file() or not file.resolve().is_relative_to(folder.resolve()):
        what = "leads out of the model's folder" if file.exists() else "is missing"
        raise CheckpointError(f"{name} has its numbers in {location[:80]!r}, which {what}: keep the files of a model "
                              "together")
    numbers = {key: place.get(key, "0") for key in ("offset", "length")}
    if not all(value.isascii() and value.isdigit() and len(value) < 16 for value in numbers.values()):
        raise CheckpointError(f"{name} does not say where in {location[:80]!r} its numbers are")
    offset, length = int(numbers["offset"]), int(numbers["length"]) or size
    if length != size or offset + size > file.stat().st_size:
        raise CheckpointError(f"{name} needs {size} bytes of {location[:80]!r}, which does not hold them: download "
                              "both files again")
    with open(file, "rb") as stream:
        stream.seek(offset)
        return stream.read(size)


# --- one way of writing ---------------------------------------------------------------------------------------------


def renew(model: onnx.ModelProto) -> onnx.ModelProto:
    """Of an operator set between the oldest and the newest that we read; without names, comments and typed values."""
    versions = [entry.version for entry in model.opset_import]
    if len(versions) != 1 or not 1 <= versions[0] <= NEWEST_OPSET:
        raise CheckpointError(f"its operator set is {versions}; expected one, up to {NEWEST_OPSET}: export it with "
                              f"opset {OLDEST_OPSET}")
    forget_constants_as_inputs(model.graph)
    if versions[0] < OLDEST_OPSET:
        model.ir_version = max(model.ir_version, 4)
        try:
            onnx.checker.check_model(model)
            model = version_converter.convert_version(model, OLDEST_OPSET)
        except Exception as error:  # of both, in many private types
            reason = " ".join(str(error).split())[:160]
            raise CheckpointError(f"its operator set {versions[0]} could not be brought to {OLDEST_OPSET} ({reason}): "
                                  f"export it with opset {OLDEST_OPSET}") from error
        check(model)
    model.ir_version = NEWEST_IR
    for tensor in all_tensors(model):
        plain = numpy_helper.from_array(numpy_helper.to_array(tensor), tensor.name)
        tensor.CopyFrom(plain)
    return model


def forget_constants_as_inputs(graph: onnx.GraphProto) -> None:
    """Files of IR version 3 list weights among the inputs."""
    weights = {tensor.name for tensor in graph.initializer}
    inputs = [value for value in graph.input if value.name not in weights]
    del graph.input[:]
    graph.input.extend(inputs)


def attributes_of(node: onnx.NodeProto) -> dict:
    """By name: int, float, bytes, a tuple, or an array."""
    found = {}
    for attribute in node.attribute:
        value = helper.get_attribute_value(attribute)
        if isinstance(value, TensorProto):
            value = numpy_helper.to_array(value)
        elif not isinstance(value, int | float | bytes):
            value = tuple(value)
        found[attribute.name] = value
    return found


def constant_of(node: onnx.NodeProto) -> np.ndarray:
    """The numbers of a Constant node, however it says them."""
    found = attributes_of(node)
    for name, kind in (("value", None), ("value_float", np.float32), ("value_floats", np.float32),
                       ("value_int", np.int64), ("value_ints", np.int64)):
        if name in found:
            return np.asarray(found[name], kind)
    raise CheckpointError("it has a constant that is no number")
