"""Small image classifiers of "others" for the tests: ONNX files made by hand, with their specs."""

import json
from pathlib import Path

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from engine.classifier_spec import FORMAT, spec_path

FLOAT = TensorProto.FLOAT


def write_model(path: Path, nodes, outputs, *, weights=(), inputs=None, opset=17, domains=(), functions=()) -> Path:
    """outputs: name -> dimensions; weights: name -> array. A picture comes in as x (n, 3, 8, 8) or as ``inputs``."""
    inputs = inputs or {"x": ("n", 3, 8, 8)}
    graph = helper.make_graph(
        list(nodes), "others", [helper.make_tensor_value_info(name, FLOAT, dims) for name, dims in inputs.items()],
        [helper.make_tensor_value_info(name, FLOAT, dims) for name, dims in outputs.items()],
        [numpy_helper.from_array(value, name) for name, value in dict(weights).items()])
    opsets = [helper.make_opsetid("", opset), *(helper.make_opsetid(domain, 1) for domain in domains)]
    model = helper.make_model(graph, opset_imports=opsets, functions=list(functions), ir_version=8)
    path.write_bytes(model.SerializeToString())
    return path


def write_spec(path: Path, attributes: dict, **entries) -> Path:
    document = {"format": FORMAT, "version": 1, "input": {"name": "x", "size": [8, 8], **entries.pop("input", {})},
                "attributes": attributes, **entries}
    spec_path(path).write_text(json.dumps(document))
    return path


def means(path: Path, **dims) -> Path:
    """The mean of each channel of what the model reads, as output y (n, 3)."""
    nodes = [helper.make_node("GlobalAveragePool", ["x"], ["p"]), helper.make_node("Flatten", ["p"], ["y"])]
    return write_model(path, nodes, {"y": ("n", 3)}, **dims)


def linear(path: Path, weight: np.ndarray, bias: np.ndarray, *, size: int = 8, hidden: str = "y") -> Path:
    """y (n, k) = mean channels @ weight (3, k) + bias."""
    nodes = [helper.make_node("GlobalAveragePool", ["x"], ["p"]), helper.make_node("Flatten", ["p"], ["m"]),
             helper.make_node("Gemm", ["m", "w", "b"], [hidden])]
    return write_model(path, nodes, {hidden: ("n", len(bias))}, inputs={"x": ("n", 3, size, size)},
                       weights={"w": weight.astype(np.float32), "b": bias.astype(np.float32)})
