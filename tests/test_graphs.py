"""The ONNX graphs against torch's autograd and the numpy definition of the field."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, numpy_helper, shape_inference
from safetensors.numpy import save_file

from engine.bundle import FIELD, GeneratorFacts
from engine.onnx_rewrite import widen
from engine.reference import field as twin
from exporter.contents import field_tensors, head_tensors, records
from exporter.field_graphs import write_field_graphs
from exporter.golden import field_answers, latents
from exporter.synthesis_graph import constant_nodes, export_synthesis, noisy_layers, prepare
from tests import tiny

HALF = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}


def session(model) -> ort.InferenceSession:
    settings = ort.SessionOptions()
    settings.log_severity_level = 3
    return ort.InferenceSession(str(model) if isinstance(model, Path) else model.SerializeToString(), settings)


@pytest.fixture(scope="module", params=[0, 3], ids=["unconditional", "conditional"])
def field(request, tmp_path_factory):
    """Folder with the field graphs of a tiny generator, and what they were made from."""
    parts, heads = tiny.parts(labels=request.param), tiny.heads()
    facts = GeneratorFacts("tiny", "none", 16, 16, 4, 8, labels=request.param)
    folder = tmp_path_factory.mktemp("field")
    tensors = field_tensors(parts.mapping) | head_tensors(heads)
    save_file(tensors, folder / FIELD)
    write_field_graphs(folder, facts, records(heads, facts)[0])
    return folder, parts, heads, tensors


def feeds_for(parts, rows: int) -> dict:
    return latents(16, parts.mapping.c_dim, rows)


def run(folder: Path, graph: str, feeds: dict) -> dict:
    opened = session(folder / f"{graph}.onnx")
    names = [node.name for node in opened.get_outputs()]
    return dict(zip(names, opened.run(names, feeds), strict=True))


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_the_field_equals_autograd_for_every_attribute(field, rows):
    folder, parts, heads, _ = field
    feeds = feeds_for(parts, rows)
    golden = field_answers(parts.mapping, heads, feeds)
    hidden = run(folder, "mapping", feeds)
    w = hidden.pop("w")
    assert w == pytest.approx(golden["mapping.w"], abs=1e-5)
    for head in heads:
        logits = head.attributes[-1].columns[1]
        x = w if head.space == "w" else feeds["z"]
        seeds = np.tile(np.eye(logits, dtype=np.float32), (rows, 1, 1))
        found = run(folder, f"head.{head.name}", {"x": x, "seeds": seeds})
        gradient = found["slopes"]
        assert gradient.shape == (rows, logits, 16)
        if head.space == "w":
            latent = {"z": feeds["z"], "psi": feeds["psi"], **hidden}
            gradient = run(folder, "pullback", {**latent, "cotangent": gradient})["dz"]
        assert found["logits"] == pytest.approx(golden[f"head.{head.name}.logits"], abs=1e-4)
        assert gradient == pytest.approx(golden[f"head.{head.name}.gradient"], abs=1e-4)


def test_the_graphs_equal_their_numpy_definition(field):
    folder, parts, _, tensors = field
    feeds = feeds_for(parts, 4)
    found = run(folder, "mapping", feeds)
    w, hidden = twin.mapping(tensors, feeds["z"], feeds["psi"], feeds.get("label"))
    names = [f"hidden.{i}" for i in range(len(hidden))]
    for name, expected in zip(names, hidden, strict=True):
        assert found[name] == pytest.approx(expected, abs=1e-5)
    rng = np.random.default_rng(0)
    for seeds in (rng.standard_normal((3, 7)).astype(np.float32), np.zeros((0, 7), np.float32)):
        stack = twin.layers(tensors, "head.trunk")
        logits, activations = twin.head(stack, w)
        answer = run(folder, "head.trunk", {"x": w, "seeds": np.tile(seeds, (len(w), 1, 1))})
        assert answer["logits"] == pytest.approx(logits, abs=1e-4)
        assert answer["slopes"] == pytest.approx(twin.head_rows(stack, activations, seeds), abs=1e-4)
    cotangent = rng.standard_normal((4, 3, 16)).astype(np.float32)
    latent = {"z": feeds["z"], "psi": feeds["psi"], **dict(zip(names, hidden, strict=True))}
    expected = twin.pullback(tensors, feeds["z"], feeds["psi"], hidden, cotangent)
    assert run(folder, "pullback", {**latent, "cotangent": cotangent})["dz"] == pytest.approx(expected, abs=1e-4)


def test_one_call_gives_what_three_give(field):
    """linearise, with heads that some rows read, that none reads, and near, against the numpy definition."""
    folder, parts, heads, tensors = field
    feeds, rng = feeds_for(parts, 4), np.random.default_rng(0)
    w, hidden = twin.mapping(tensors, feeds["z"], feeds["psi"], feeds.get("label"))
    wanted, cotangents, rows = dict(feeds), [], []
    on_w = [head for head in heads if head.space == "w"]
    for head, read in zip(on_w, ([0, 2, 3], [], [1], [0, 1, 2, 3]), strict=False):
        logits, read = head.attributes[-1].columns[1], np.array(read, np.int64)
        seeds = rng.standard_normal((2 if len(read) else 0, logits)).astype(np.float32)
        wanted |= {f"rows.{head.name}": read, f"seeds.{head.name}": seeds}
        stack = twin.layers(tensors, f"head.{head.name}")
        slopes = twin.head_rows(stack, twin.head(stack, w[read])[1], seeds, rows=len(read))
        cotangents += list(slopes.reshape(-1, 16))
        rows += list(np.repeat(read, len(seeds)))
    assert rows, "some head must be read"
    anchor = rng.standard_normal((2, 16)).astype(np.float32)
    cotangents, rows = [*cotangents, *(w[[3, 1]] - anchor)], np.array([*rows, 3, 1])
    order = rng.permutation(len(rows))
    wanted |= {"near_row": np.array([3, 1]), "near_anchor": anchor, "pair_row": rows[order], "source": order}
    found = run(folder, "linearise", wanted)
    part = [activation[rows[order]] for activation in hidden]
    z, psi = feeds["z"][rows[order]], feeds["psi"][rows[order]]
    expected = twin.pullback(tensors, z, psi, part, np.array(cotangents)[order][:, None])[:, 0]
    assert found["w"] == pytest.approx(w, abs=1e-5)
    assert found["jacobian"] == pytest.approx(expected, abs=1e-4)


def test_field_graphs_hold_no_weight_and_name_their_dimensions(field):
    folder, _, heads, _ = field
    for name in ("mapping", "pullback", *(f"head.{head.name}" for head in heads)):
        model = onnx.load(folder / f"{name}.onnx", load_external_data=False)
        assert model.ir_version <= 10
        for tensor in model.graph.initializer:
            external = tensor.data_location == TensorProto.EXTERNAL
            assert external or np.prod(tensor.dims) <= 16, tensor.name
        for value in (*model.graph.input, *model.graph.output):
            assert value.type.tensor_type.shape.dim[0].dim_param == "rows"


# Synthesis -----------------------------------------------------------------------------------------------------------


def noises_for(synthesis, mode: str, rows: int):
    """The graph's noise feeds and the same as torch's list."""
    if mode == "const":
        return {}, None
    noises: list = [None] * len(synthesis.layers)
    feeds = {}
    if mode == "input":
        for i in noisy_layers(synthesis):
            size = synthesis.layers[i].resolution
            noises[i] = torch.randn(rows, 1, size, size, generator=torch.Generator().manual_seed(i))
            feeds[f"noise.{i}"] = noises[i].numpy()
    return feeds, noises


@pytest.mark.parametrize(("noise", "architecture"), [("const", "resnet"), ("none", "orig"), ("input", "skip")])
def test_synthesis_equals_torch_at_every_batch_size(tmp_path, noise, architecture):
    synthesis = tiny.parts(architecture=architecture).synthesis
    record, remarks = export_synthesis(synthesis, tmp_path / "s.onnx", noise=noise)
    assert (record["noise"], record["lowering"], remarks) == (noise, "convt", [])
    runner = session(tmp_path / "s.onnx")
    inputs = {node.name: node.shape for node in runner.get_inputs()}
    assert inputs["ws"] == ["rows", synthesis.num_ws, 16]
    assert sorted(set(inputs) - {"ws"}) == (["noise.1", "noise.2"] if noise == "input" else [])
    for rows in (1, 2, 5):
        ws = torch.randn(rows, synthesis.num_ws, 16, generator=torch.Generator().manual_seed(rows))
        feeds, noises = noises_for(synthesis, noise, rows)
        found = runner.run(["image"], {"ws": ws.numpy(), **feeds})[0]
        assert found == pytest.approx(synthesis(ws, noises).numpy(), abs=2e-5)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_precision_is_typed_in_the_graph_from_8x8_upwards(tmp_path, precision):
    synthesis = tiny.parts(resolution=16).synthesis
    record, remarks = export_synthesis(synthesis, tmp_path / "s.onnx", precision=precision)
    model = onnx.load(tmp_path / "s.onnx")
    initialisers = {tensor.name: tensor for tensor in model.graph.initializer}
    weights = {}
    for node in model.graph.node:
        if node.op_type in ("Conv", "ConvTranspose") and initialisers[node.input[1]].dims[1] == 8:
            weights.setdefault(initialisers[node.input[1]].data_type, []).append(node)
        if node.op_type in ("Gemm", "MatMul"):
            assert all(initialisers[name].data_type == TensorProto.FLOAT for name in node.input if name in initialisers)
    # b4: one layer and its picture in float32; b8 and b16: two layers and a picture each.
    assert {kind: len(nodes) for kind, nodes in weights.items()} == {TensorProto.FLOAT: 2, HALF[precision]: 6}
    inferred = shape_inference.infer_shapes(model, check_type=True, strict_mode=True)
    assert inferred.graph.output[0].type.tensor_type.elem_type == TensorProto.FLOAT
    assert len(remarks) == (precision == "fp16")
    assert record["lowering"] == ("poly" if precision == "bf16" else "convt")
    ws = torch.randn(3, synthesis.num_ws, 16, generator=torch.Generator().manual_seed(0))
    runner = session(model if precision == "fp16" else onnx.load_from_string(widen(model.SerializeToString())))
    error = np.abs(runner.run(["image"], {"ws": ws.numpy()})[0] - synthesis(ws).numpy())
    assert error.max() < (0.02 if precision == "fp16" else 0.2)


def test_float16_does_not_overflow_with_wide_layers_and_large_styles(tmp_path):
    synthesis = tiny.parts(width=512, noise=0.0).synthesis
    for layer in synthesis.layers:
        layer.affine.bias.mul_(4)
        layer.affine.weight.mul_(4)
    synthesis.b4.const.mul_(1e4)
    export_synthesis(synthesis, tmp_path / "s.onnx", precision="fp16")
    model = onnx.load(tmp_path / "s.onnx")
    halves = [numpy_helper.to_array(t) for t in model.graph.initializer if t.data_type == TensorProto.FLOAT16]
    wide = [weight for weight in halves if weight.ndim == 4 and weight.shape[:2] == (512, 512)]
    assert len(wide) == 2
    assert all(np.abs(weight).max() <= 1.001 / np.sqrt(9 * 512) for weight in wide)
    # ONNX Runtime computes float16 in float32 on a CPU; torch really rounds, so the overflow would show there.
    ws = torch.randn(2, synthesis.num_ws, 16, generator=torch.Generator().manual_seed(0))
    prepared, _ = prepare(synthesis, "fp16", "convt")
    bounded, _ = prepare(synthesis, "fp32", "convt")
    bounded.set_conv_clamp(256.0)
    expected = bounded(ws)
    assert torch.isfinite(prepared(ws)).all()
    span = float(expected.max() - expected.min())
    assert np.abs(prepared(ws).numpy() - expected.numpy()).max() < 0.02 * span
    found = session(model).run(["image"], {"ws": ws.numpy()})[0]
    assert np.abs(found - expected.numpy()).max() < 0.02 * span
    raw = bounded.b8.conv0.weight.half()
    x = torch.full((1, 512, 4, 4), 250.0).half() * 4
    assert not torch.isfinite(torch.nn.functional.conv_transpose2d(x, raw.abs().transpose(0, 1), stride=2)).all()


def test_synthesis_is_folded_nameless_and_reproducible(tmp_path):
    for name in ("a", "b"):
        export_synthesis(tiny.parts().synthesis, tmp_path / f"{name}.onnx")
    text = (tmp_path / "a.onnx").read_bytes()
    assert text == (tmp_path / "b.onnx").read_bytes()
    assert b"/exporter/" not in text
    assert b"stack_trace" not in text
    model = onnx.load_from_string(text)
    assert constant_nodes(model) == []
    assert model.ir_version <= 10
    operators = {node.op_type for node in model.graph.node}
    assert not operators & {"Expand", "Shape", "Reshape", "Tile", "Identity", "Constant"}


@pytest.mark.slow
@pytest.mark.parametrize(("config", "precision"), [("T", "fp32"), ("R", "fp16")])
def test_stylegan3_goes_the_same_way(tmp_path, config, precision):
    from exporter.generators.stylegan3 import Synthesis3, design

    torch.manual_seed(0)
    plan = design(16, config=config, channel_base=256, channel_max=8, w_dim=8)
    synthesis = Synthesis3(plan).eval().requires_grad_(False)
    record, _ = export_synthesis(synthesis, tmp_path / "s.onnx", precision=precision)
    assert (record["noise"], record["precision"]) == ("none", precision)
    runner = session(tmp_path / "s.onnx")
    for rows in (1, 2, 5):
        ws = torch.randn(rows, synthesis.num_ws, 8, generator=torch.Generator().manual_seed(rows))
        found = runner.run(["image"], {"ws": ws.numpy()})[0]
        assert found == pytest.approx(synthesis(ws).numpy(), abs=1e-5 if precision == "fp32" else 5e-3)


# TensorRT-RTX builds on a machine without a GPU -----------------------------------------------------------------


def build_engine(trt, path: Path, rows: tuple[int, int, int] = (1, 2, 8)) -> int:
    """Bytes of the engine; fails with the parser's or the builder's own words."""
    builder = trt.Builder(trt.Logger(trt.Logger.ERROR))
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, trt.Logger(trt.Logger.ERROR))
    assert parser.parse_from_file(str(path)), [parser.get_error(i).desc() for i in range(parser.num_errors)]
    profile, config = builder.create_optimization_profile(), builder.create_builder_config()
    for i in range(network.num_inputs):
        given = network.get_input(i)
        shapes = [tuple(n if k == 0 else 3 if size < 0 else size for k, size in enumerate(given.shape)) for n in rows]
        profile.set_shape(given.name, *shapes)
    config.add_optimization_profile(profile)
    engine = builder.build_serialized_network(network, config)
    assert engine is not None, f"{path.name} does not build"
    return engine.nbytes


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_tensorrt_rtx_builds_the_synthesis(tmp_path, precision):
    trt = pytest.importorskip("tensorrt_rtx")
    export_synthesis(tiny.parts().synthesis, tmp_path / "s.onnx", precision=precision)
    assert build_engine(trt, tmp_path / "s.onnx") > 1000


def test_tensorrt_rtx_builds_the_field(field):
    trt = pytest.importorskip("tensorrt_rtx")
    for name in ("mapping", "pullback", "head.trunk", "head.shape"):
        assert build_engine(trt, field[0] / f"{name}.onnx") > 1000
