"""The list of operators holds all that our exporter writes, and the reader of ONNX files reads what onnx reads."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper, shape_inference

from engine.bundle import Bundle, GeneratorFacts, Manifest
from engine.errors import BundleError
from engine.graphs import check_graph, signatures
from engine.onnx_file import Malformed, parse_model, read_bytes
from engine.onnx_rewrite import inline_weights, widen
from engine.operators import Shapes
from engine.runtimes import open_runtime
from engine.sampler import Sampler, find_bundle
from exporter import export
from exporter.synthesis_graph import export_synthesis
from tests import tiny
from tests.test_stylegan3 import network


def check_synthesis(synthesis, path: Path, **options) -> None:
    record, _ = export_synthesis(synthesis, path, **options)
    facts = GeneratorFacts("g", "x", 8, synthesis.w_dim, synthesis.num_ws, synthesis.resolution)
    manifest = Manifest(facts, (), (), {"synthesis": record})
    check_graph(path, signatures(manifest)["synthesis"](), facts, 0)


@pytest.mark.parametrize(
    ("architecture", "options"),
    [("resnet", {"lowering": "poly", "noise": "input"}),
     pytest.param("skip", {"precision": "fp16", "noise": "none"}, marks=pytest.mark.slow),
     pytest.param("orig", {}, marks=pytest.mark.slow)],
)
def test_stylegan2_is_within_the_list(tmp_path, architecture, options):
    check_synthesis(tiny.parts(architecture=architecture).synthesis, tmp_path / "synthesis.onnx", **options)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "options"),
    [("R", {"lowering": "poly"}), ("R", {"lowering": "convt"}), ("T", {"precision": "fp16"}),
     ("T", {"precision": "bf16"})],
)
def test_stylegan3_is_within_the_list(tmp_path, config, options):
    check_synthesis(network(config), tmp_path / "synthesis.onnx", **options)


@pytest.mark.parametrize("name", ["synthesis", "linearise", "head.smile", "mapping"])
def test_the_reader_sees_what_onnx_sees(name):
    path = find_bundle("demo").graph(name)
    ours, theirs = parse_model(read_bytes(path)), onnx.load(path, load_external_data=False)
    assert [(n.op, n.inputs, n.outputs) for n in ours.graph.nodes] == [
        (n.op_type, list(n.input), list(n.output)) for n in theirs.graph.node]
    for a, b in zip(ours.graph.initialisers, theirs.graph.initializer, strict=True):
        assert (a.name, a.kind, a.dims) == (b.name, b.data_type, tuple(b.dims))
        if a.span:
            assert ours.data[slice(*a.span)] == b.raw_data
        else:
            place = {entry.key: entry.value for entry in b.external_data}
            assert a.external == (place["location"], int(place["offset"]), int(place["length"]))
    named = (*ours.graph.inputs, *ours.graph.outputs), (*theirs.graph.input, *theirs.graph.output)
    for a, b in zip(*named, strict=True):
        tensor = b.type.tensor_type
        assert (a.name, a.kind) == (b.name, tensor.elem_type)
        assert a.dims == tuple(dim.dim_param or dim.dim_value for dim in tensor.shape.dim)


def test_shapes_are_those_that_onnx_infers():
    """Of every result of the demo's synthesis, whose convolutions are up, down and transposed."""
    bundle = find_bundle("demo")
    path = bundle.graph("synthesis")
    model = shape_inference.infer_shapes(onnx.load(path), strict_mode=True)
    inputs = {"ws": ("rows", bundle.generator.num_ws, bundle.generator.w_dim)}
    found = Shapes(parse_model(read_bytes(path)), inputs, most=1 << 30, work=1 << 40, weight=lambda tensor: None).shapes
    compared = 0
    for value in model.graph.value_info:
        dims = [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        assert len(found[value.name]) == len(dims)
        for ours, theirs in zip(found[value.name], dims, strict=True):
            assert ours == theirs or (isinstance(ours, str) and isinstance(theirs, str))
        compared += 1
    assert compared > 100


def model_of(op: str, tensors: dict, attributes: dict, shape: list) -> tuple[onnx.ModelProto, tuple]:
    """x -> y by one node, beside constants."""
    values = [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape),
              helper.make_tensor_value_info("y", TensorProto.FLOAT, None)]
    node = helper.make_node(op, ["x", *tensors], ["y"], **attributes)
    initialisers = [numpy_helper.from_array(np.asarray(array), name) for name, array in tensors.items() if name]
    graph = helper.make_graph([node], "g", values[:1], values[1:], initialisers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    model = shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
    del model.graph.value_info[:]
    return model, tuple(d.dim_param or d.dim_value for d in model.graph.output[0].type.tensor_type.shape.dim)


def weights(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.float32)


@pytest.mark.parametrize(
    ("op", "tensors", "attributes", "shape"),
    [
        ("Conv", {"k": weights(6, 4, 3, 3)}, {"strides": [2, 2], "pads": [1, 0, 0, 1]}, ["n", 4, 9, 8]),
        ("Conv", {"k": weights(4, 1, 3, 1)}, {"group": 4, "dilations": [2, 1]}, ["n", 4, 9, 8]),
        ("ConvTranspose", {"k": weights(4, 3, 3, 3)}, {"strides": [2, 2], "output_padding": [1, 0]}, ["n", 4, 5, 6]),
        ("ConvTranspose", {"k": weights(4, 1, 1, 12)}, {"group": 4, "strides": [1, 2], "pads": [0, 5, 0, 5]},
         ["n", 4, 5, 6]),
        ("Slice", {"a": [1], "b": [-1], "c": [2], "d": [2]}, {}, ["n", 4, 9, 8]),
        ("Slice", {"a": [0], "b": [2**63 - 1], "c": [0], "d": [1]}, {}, ["n", 4]),
        ("Slice", {"a": [7], "b": [0], "c": [1], "d": [-3]}, {}, ["n", 9]),
        ("Transpose", {}, {"perm": [2, 0, 1]}, ["n", 4, 9]),
        ("Reshape", {"s": [-1, 2, 2, 3]}, {}, ["n", 4, 3]),
        ("DepthToSpace", {}, {"blocksize": 2}, ["n", 8, 3, 5]),
        ("Unsqueeze", {"a": [0, -1]}, {}, ["n", 4]),
        ("ReduceMean", {"a": [-1, 1]}, {}, ["n", 4, 5]),
        ("Gather", {"i": np.array([[0, 1, 1]])}, {"axis": 1}, ["n", 4, 5]),
        ("Gemm", {"w": weights(7, 4), "b": weights(7)}, {"transB": 1}, ["n", 4]),
        ("MatMul", {"w": weights(5, 4, 7)}, {}, ["n", 1, 2, 4]),
        ("Mul", {"w": weights(5, 1, 7)}, {}, ["n", 1, 4, 7]),
        ("Expand", {"s": [3, 1, 1]}, {}, [1, 4]),
        ("Resize", {"": None, "s": np.array([1, 1, 2, 1.5], np.float32)}, {"mode": "linear"}, ["n", 4, 5, 7]),
        ("MaxPool", {}, {"kernel_shape": [3, 2], "strides": [2, 1], "pads": [1, 0, 1, 1]}, ["n", 4, 9, 8]),
        ("AveragePool", {}, {"kernel_shape": [2, 2], "dilations": [2, 1]}, ["n", 4, 9, 8]),
        ("Pad", {"p": [0, 0, 1, 2, 0, 0, 3, 0]}, {"mode": "reflect"}, ["n", 4, 9, 8]),
        ("ReduceMean", {"a": [2, 3]}, {"keepdims": 0}, ["n", 4, 5, 6]),
        ("Softmax", {}, {"axis": 1}, ["n", 4, 5]),
        ("BatchNormalization", {name: weights(4) for name in "sbmv"}, {}, ["n", 4, 5, 6]),
        ("InstanceNormalization", {name: weights(4) for name in "sb"}, {}, ["n", 4, 5, 6]),
        ("LayerNormalization", {name: weights(5, 6) for name in "sb"}, {"axis": -2}, ["n", 4, 5, 6]),
        ("PRelu", {"s": weights(4, 1, 1)}, {}, ["n", 4, 5, 6]),
        ("Max", {"a": weights(6), "b": weights(5, 1)}, {}, ["n", 5, 6]),
        *((op, {}, {}, ["n", 4]) for op in ("Tanh", "Sigmoid", "Relu", "Softplus", "Elu", "Erf", "HardSwish", "Cos")),
    ],
)
def test_the_shape_of_each_operator_is_the_one_that_onnx_says(op, tensors, attributes, shape):
    tensors = {name: np.array(value, np.int64) if isinstance(value, list) else value for name, value in tensors.items()}
    if op == "Gather":
        tensors["i"] = tensors["i"][0]
    model, expected = model_of(op, tensors, attributes, shape)
    shapes = Shapes(parse_model(model.SerializeToString()), {"x": tuple(shape)}, most=1 << 20, work=1 << 30,
                    weight=lambda tensor: None).shapes
    assert len(shapes["y"]) == len(expected)
    for ours, theirs in zip(shapes["y"], expected, strict=True):
        assert ours == theirs or str(theirs).startswith("unk__")  # what onnx does not know


def test_work_is_bounded():
    model, _ = model_of("MatMul", {"w": weights(64, 64)}, {}, ["n", 64])
    arguments = parse_model(model.SerializeToString()), {"x": ("n", 64)}
    Shapes(*arguments, most=64, work=64 * 64, weight=lambda tensor: None)
    with pytest.raises(Malformed, match="more multiplications a row than any generator"):
        Shapes(*arguments, most=64, work=64 * 64 - 1, weight=lambda tensor: None)
    with pytest.raises(Malformed, match="gives 64 numbers a row; expected at most 63"):
        Shapes(*arguments, most=63, work=64 * 64, weight=lambda tensor: None)


# --- rewriting -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("op", "tensors", "attributes", "shape"),
    [
        ("Resize", {"": None, "s": np.array([1, 2, 2, 2], np.float32)}, {}, ["n", 4, 5, 7]),  # channels
        ("Resize", {"": None, "s": np.array([1, 1, 1e9, 2], np.float32)}, {}, ["n", 4, 5, 7]),
        ("Pad", {"p": [1, 0, 0, 0]}, {}, ["n", 4]),  # rows
        ("Pad", {"p": [0, 0, 0, -1]}, {}, ["n", 4]),
        ("MaxPool", {}, {"kernel_shape": [9, 9]}, ["n", 4, 5, 5]),
        ("MaxPool", {}, {"kernel_shape": [2, 2], "ceil_mode": 1}, ["n", 4, 5, 5]),
        ("BatchNormalization", {name: weights(5) for name in "sbmv"}, {}, ["n", 4, 5, 6]),
        ("LayerNormalization", {"s": weights(5)}, {}, ["n", 4, 6]),
        ("Softmax", {}, {"axis": 3}, ["n", 4]),
        ("ReduceMean", {"a": [4]}, {}, ["n", 4, 5]),
    ],
)
def test_operators_that_do_not_fit_or_give_other_rows_are_refused(op, tensors, attributes, shape):
    tensors = {name: np.array(value, np.int64) if isinstance(value, list) else value for name, value in tensors.items()}
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in ("x", "y")]
    initialisers = [numpy_helper.from_array(array, name) for name, array in tensors.items() if name]
    graph = helper.make_graph([helper.make_node(op, ["x", *tensors], ["y"], **attributes)], "g", values[:1], values[1:],
                              initialisers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    with pytest.raises(Malformed):
        Shapes(parse_model(model.SerializeToString()), {"x": tuple(shape)}, most=1 << 20, work=1 << 30,
               weight=lambda tensor: None)


@pytest.mark.parametrize("name", ["linearise", "pullback", "head.hat"])
def test_weights_are_moved_into_the_file_as_onnx_would(name):
    """Branches of an If included."""
    bundle = find_bundle("demo")
    path = bundle.graph(name)
    moved = onnx.load_from_string(inline_weights(read_bytes(path), (bundle.path / "field.safetensors").read_bytes()))
    expected = onnx.load(path)

    def tensors(graph):
        found = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
        for node in graph.node:
            for attribute in node.attribute:
                if attribute.type == onnx.AttributeProto.GRAPH:
                    found |= {f"{node.name}/{attribute.name}/{k}": v for k, v in tensors(attribute.g).items()}
        return found

    ours, theirs = tensors(moved.graph), tensors(expected.graph)
    assert ours.keys() == theirs.keys()
    for key, array in theirs.items():
        np.testing.assert_array_equal(ours[key], array)
    assert [n.op_type for n in moved.graph.node] == [n.op_type for n in expected.graph.node]
    assert not any(tensor.external_data for tensor in moved.graph.initializer)


def test_widening_changes_types_and_nothing_else():
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n"])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n"])
    values = np.array([1.0, -2.5, 3.0, np.inf], np.float32)
    halves = (values.view(np.uint32) >> 16).astype(np.uint16).tobytes()
    half = helper.make_tensor("h", TensorProto.BFLOAT16, [4], halves, raw=True)
    nodes = [helper.make_node("Cast", ["x"], ["a"], to=TensorProto.BFLOAT16),
             helper.make_node("Mul", ["a", "h"], ["b"]), helper.make_node("Cast", ["b"], ["y"], to=TensorProto.FLOAT)]
    model = helper.make_model(helper.make_graph(nodes, "g", [x], [y], [half]))
    wide = onnx.load_from_string(widen(model.SerializeToString()))
    onnx.checker.check_model(wide, full_check=True)
    np.testing.assert_array_equal(numpy_helper.to_array(wide.graph.initializer[0]), values)
    assert [a.i for node in wide.graph.node for a in node.attribute] == [1, 1]


@pytest.fixture(scope="module")
def halved(tmp_path_factory) -> Bundle:
    return export(tiny.parts(), tiny.heads()[:1], out=tmp_path_factory.mktemp("bf16") / "b.lace", precision="bf16")


@pytest.mark.parametrize("runtime", ["auto", "onnxruntime", "openvino"])
def test_C4_a_bfloat16_bundle_is_drawn_on_a_cpu(halved, runtime):
    """In float32, with the rounded weights; the exam sees it, and passes."""
    assert all(check["passed"] for check in halved.manifest.provenance["parity"])
    with Sampler(halved, runtime=runtime, threads=1) as sampler:
        (sample,) = sampler.sample("smile", seeds=1)
    original = tiny.parts().synthesis
    ws = torch.from_numpy(sample.w)[None, None].expand(-1, original.num_ws, -1)
    image = open_runtime(halved, runtime).drawing.synthesize(ws.numpy().copy())
    error = np.abs(image - original(ws).numpy())
    assert error.max() < 0.2
    assert np.abs(image).max() > 0.1


def test_facts_of_another_size_refuse_the_graph(halved):
    facts = replace(halved.generator, num_ws=halved.generator.num_ws + 1)
    manifest = replace(halved.manifest, generator=facts)
    with pytest.raises(BundleError, match="its input 'ws' is of type 1"):
        check_graph(halved.graph("synthesis"), signatures(manifest)["synthesis"](), facts, 0)
