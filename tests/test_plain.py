"""Plain generators, as others write them: DCGAN, BigGAN with classes, the decoder of a VAE; ONNX files and modules."""

import json
import random
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from engine import CheckpointError, Request, Sampler
from engine.bundle import Bundle
from engine.cli import info, sample, verify
from engine.onnx_file import Malformed, parse_model
from engine.operators import Shapes
from engine.runtimes.onnxruntime import open_session
from engine.verify import check_bundle
from exporter import add_parts, cli, export
from exporter.generators.onnx_folding import as_dims, fold
from exporter.generators.onnx_operators import free_sizes
from exporter.generators.onnx_rows import Rows
from exporter.generators.plain import guess, layout_of, parts_of, rewrite
from exporter.generators.plain_loading import Wishes, load_plain
from exporter.generators.plain_onnx import network_of_onnx
from exporter.generators.plain_torch import network_of_module
from tests import tiny
from tests.strangers import DCGAN, BigGAN, Decoder, Learned, made

ROWS = "rows"
# Of each network: its class, what it is made with, the latent's width and the classes.
NETWORKS = {"dcgan": (DCGAN, {}, 20, 0), "biggan": (BigGAN, {}, 18, 5), "onehot": (BigGAN, {"one_hot": True}, 18, 5),
            "vae": (Decoder, {}, 8, 0), "learned": (Learned, {}, 6, 0)}


def inputs(kind: str, rows: int, seed: int = 0) -> tuple[torch.Tensor, ...]:
    _, _, width, classes = NETWORKS[kind]
    z = torch.from_numpy(np.random.default_rng(seed).standard_normal((rows, width), dtype=np.float32))
    z = z[:, :, None, None] if kind == "dcgan" else z
    label = torch.arange(rows) % max(classes, 1)
    return (z, torch.eye(classes)[label] if kind == "onehot" else label) if classes else (z,)


def network(kind: str) -> torch.nn.Module:
    cls, settings, *_ = NETWORKS[kind]
    return made(cls, **settings)


def write_onnx(kind: str, path: Path, *, opset: int = 17, batch: int | None = None) -> Path:
    """As torch's older exporter writes it, with shapes that are computed; ``batch``: for so many rows and no others."""
    names = ["z", "label"][: 2 if NETWORKS[kind][3] else 1]
    free = {} if batch else {name: {0: "n"} for name in names}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(network(kind), inputs(kind, batch or 2), str(path), dynamo=False, opset_version=opset,
                          input_names=names, output_names=["picture"], dynamic_axes=free)
    return path


def pictures_by_torch(kind: str, rows: int) -> np.ndarray:
    """(rows, channels, side, side) in [-1, 1], by the module alone and what its class says of its values."""
    with torch.no_grad():
        output = network(kind)(*inputs(kind, rows)).numpy()
    if kind == "learned":
        return output.transpose(0, 3, 1, 2) / 127.5 - 1
    return 2 * output - 1 if kind == "vae" else output


def pictures_by_graph(kind: str, rows: int, parts) -> np.ndarray:
    z, *label = inputs(kind, rows)
    label = torch.arange(rows) % NETWORKS[kind][3] if label else None
    ws = parts.mapping(z.reshape(rows, -1), label)[:, None]
    return open_session(parts.synthesis.graph.SerializeToString(), 1).run(["image"], {"ws": ws.numpy()})[0]


FILES = [("dcgan", 17, None), ("dcgan", 9, 1), ("biggan", 17, 1), ("biggan", 13, 4), ("onehot", 17, 1),
         ("vae", 11, None), ("vae", 17, 4), ("learned", 11, None), ("learned", 17, 1), ("learned", 17, 4)]


@pytest.mark.parametrize(("kind", "opset", "batch"), FILES)
def test_an_onnx_file_draws_as_the_network_for_any_number_of_rows(kind, opset, batch, tmp_path):
    parts = parts_of(network_of_onnx(write_onnx(kind, tmp_path / "g.onnx", opset=opset, batch=batch)), "g")
    _, _, width, classes = NETWORKS[kind]
    assert (parts.mapping.z_dim, parts.mapping.c_dim, parts.mapping.w_dim) == (width, classes, width + classes)
    for rows in (1, 5):
        np.testing.assert_allclose(pictures_by_graph(kind, rows, parts), pictures_by_torch(kind, rows), atol=1e-5)
    # Nothing computes a shape as it runs, and every result follows from the rows: what opening a bundle demands.
    model = parse_model(parts.synthesis.graph.SerializeToString())
    shapes = Shapes(model, {"ws": (ROWS, 1, width + classes)}, most=1 << 24, work=1 << 36, weight=lambda _: None).shapes
    assert shapes["image"] == (ROWS, parts.synthesis.img_channels, *[parts.synthesis.resolution] * 2)


@pytest.mark.parametrize("kind", ["dcgan", pytest.param("biggan", marks=pytest.mark.slow),
                                  pytest.param("onehot", marks=pytest.mark.slow),
                                  pytest.param("vae", marks=pytest.mark.slow),
                                  pytest.param("learned", marks=pytest.mark.slow)])
def test_a_module_in_memory_draws_as_itself(kind):
    _, _, width, classes = NETWORKS[kind]
    parts = parts_of(network_of_module(network(kind), latent=width, classes=classes or None), "g")
    assert parts.synthesis.network.latent.class_input == ("onehot" if kind == "onehot" else "integer")
    for rows in (1, 5):
        np.testing.assert_allclose(pictures_by_graph(kind, rows, parts), pictures_by_torch(kind, rows), atol=1e-5)


# --- the whole export -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bundles(tmp_path_factory) -> dict[str, Bundle]:
    folder = tmp_path_factory.mktemp("plain")
    return {kind: export(write_onnx(kind, folder / f"{kind}.onnx", batch=1), out=folder / f"{kind}.lace")
            for kind in ("dcgan", "biggan", "vae")}


@pytest.mark.parametrize("runtime", ["native", "onnxruntime", "openvino"])
@pytest.mark.parametrize("kind", ["dcgan", "biggan", "vae"])
def test_a_bundle_of_a_plain_generator_passes_its_exam_and_samples_what_the_network_draws(bundles, kind, runtime):
    bundle, classes = bundles[kind], NETWORKS[kind][3]
    assert all(check.passed for check in check_bundle(bundle, runtime))
    sampler = Sampler(bundle, runtime=runtime)
    samples = sampler.sample([Request(seed=seed, label=seed % classes if classes else None) for seed in range(5)])
    z = torch.from_numpy(np.stack([sample.z for sample in samples]))
    given = (z[:, :, None, None] if kind == "dcgan" else z, *([torch.arange(5) % classes] if classes else []))
    with torch.no_grad():
        expected = network(kind)(*given).numpy()
    expected = expected * 255 if kind == "vae" else (expected + 1) * 127.5
    found = np.stack([sample.image for sample in samples]).transpose(0, 3, 1, 2)
    assert np.abs(found - expected).max() <= 1  # of 255: rounding
    assert found.std() > 5


def test_what_a_bundle_of_a_plain_generator_says_of_itself(bundles):
    facts = bundles["biggan"].generator
    assert (facts.architecture, facts.z_dim, facts.w_dim, facts.labels, facts.num_ws) == ("plain", 18, 23, 5, 1)
    assert (facts.truncation, facts.is_plain, facts.resolution) == (1.0, True, 16)
    assert "for batches of 1" in bundles["biggan"].manifest.provenance["remarks"][0]
    assert bundles["vae"].generator.img_channels == 1


def test_the_class_decides_the_picture_and_has_to_be_given(bundles):
    sampler = Sampler(bundles["biggan"], runtime="native")
    images = [s.image for s in sampler.sample([Request(seed=3, label=label) for label in (0, 1, 1)])]
    assert not np.array_equal(images[0], images[1])
    assert np.array_equal(images[1], images[2])


def test_the_commands_work_on_a_bundle_without_heads(bundles, tmp_path, capsys):
    path = str(bundles["vae"].path)
    assert info.main([path]) == 0
    assert verify.main([path]) == 0
    assert "unconditional" in capsys.readouterr().out
    assert sample.main([path, "--count", "3", "--truncation", "0.5", "--out", str(tmp_path / "out"), "--json"]) == 0
    assert len(list((tmp_path / "out").glob("*.png"))) >= 3


def test_lace_export_makes_a_bundle_of_a_class_and_the_weights_of_a_file(tmp_path, capsys):
    """As training scripts save them: under netG_state_dict, from a DataParallel, with an optimizer."""
    state = {f"module.{name}": tensor for name, tensor in network("dcgan").state_dict().items()}
    torch.save({"epoch": 3, "netG_state_dict": state, "optG": {"lr": 0.1}}, tmp_path / "weights.pt")
    arguments = ["--gan", str(tmp_path / "weights.pt"), "--module", "tests.strangers:DCGAN", "--module-args",
                 "nz=20,ngf=4", "--latent", "20,1,1", "--out", str(tmp_path / "g.lace"), "--json"]
    assert cli.main(arguments) == 0
    body = json.loads(capsys.readouterr().out)
    assert body["remarks"] == ["weights are those under netG_state_dict"]
    (found,) = Sampler(tmp_path / "g.lace").sample([Request(z=inputs("dcgan", 1)[0].numpy().ravel())])
    expected = (pictures_by_torch("dcgan", 1)[0].transpose(1, 2, 0) + 1) * 127.5
    assert np.abs(found.image - expected).max() <= 1


@pytest.mark.parametrize("keys", [(), ("state_dict",), ("g_ema",), ("generator",), ("model", "netG_state_dict")])
@pytest.mark.parametrize("prefix", ["", "module.", "generator."])
def test_weights_are_found_where_training_scripts_leave_them(keys, prefix, tmp_path):
    from exporter.generators.plain_weights import load_weights

    content: dict = {f"{prefix}{name}": tensor for name, tensor in network("dcgan").state_dict().items()}
    for key in reversed(keys):
        content = {key: content, "epoch": 1}
    torch.save(content, tmp_path / "w.pt")
    module = made(DCGAN, seed=5)
    load_weights(module, tmp_path / "w.pt")
    for name, tensor in network("dcgan").state_dict().items():
        assert torch.equal(module.state_dict()[name], tensor), name


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("arguments", "message"), [
    (["--module", "tests.strangers:DCGAN", "--latent", "20", "--module-args", "nz=21"], "do not fill DCGAN"),
    (["--module", "tests.strangers:Block", "--latent", "20"], "cannot be made with {}"),
    (["--module", "tests.strangers:Nobody", "--latent", "20"], "there is no tests.strangers:Nobody"),
    (["--module", "os.system", "--latent", "20"], "expected package.module:Class"),
    (["--module", "tests.strangers:made", "--latent", "20", "--module-args", "kind=3"], "cannot be made with"),
    (["--module", "tests.strangers:DCGAN"], "give latent= (--latent)"),
    (["--module", "tests.strangers:DCGAN", "--module-args", "nz=20,ngf=4", "--latent", "21"], "takes no latent of 21"),
    (["--latent", "20"], "--latent: goes with an ONNX file"),
    (["--module", "tests.strangers:DCGAN", "--module-args", "nz=20,ngf=4", "--latent", "20", "--precision", "fp16"],
     "precision: is of StyleGAN's layers"),
])
def test_a_module_that_does_not_fit_is_one_clear_error(arguments, message, tmp_path, capsys):
    torch.save(network("dcgan").state_dict(), tmp_path / "w.pt")
    assert cli.main(["--gan", str(tmp_path / "w.pt"), *arguments, "--out", str(tmp_path / "g.lace")]) != 0
    said = capsys.readouterr().err
    assert message in " ".join(said.split())
    assert "Traceback" not in said
    assert not (tmp_path / "g.lace").exists()


def test_a_generator_that_is_not_in_evaluation_mode_is_refused(tmp_path):
    """Its pictures depend on their batch; a module is put into evaluation mode, a file cannot be."""
    z = helper.make_tensor_value_info("z", TensorProto.FLOAT, ["n", 12])
    picture = helper.make_tensor_value_info("p", TensorProto.FLOAT, ["n", 3, 2, 2])
    nodes = [helper.make_node("Reshape", ["z", "shape"], ["x"]), helper.make_node("ReduceMean", ["x", "axes"], ["m"]),
             helper.make_node("Sub", ["x", "m"], ["p"])]
    sizes, axes = np.array([-1, 3, 2, 2]), np.array([0])
    weights = [numpy_helper.from_array(sizes, "shape"), numpy_helper.from_array(axes, "axes")]
    path = save_graph(tmp_path, nodes, [z], [picture], weights)
    with pytest.raises(CheckpointError, match=r"depends on the others of its batch"):
        parts_of(network_of_onnx(path), "g")


def save_graph(folder: Path, nodes, given, made_of, weights=(), *, opset: int = 18, **more) -> Path:
    graph = helper.make_graph(list(nodes), "g", list(given), list(made_of), list(weights))
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8, **more)
    (folder / "g.onnx").write_bytes(model.SerializeToString())
    return folder / "g.onnx"


@pytest.mark.parametrize(("low", "high", "found"), [
    (0.0, 1.0, "unit"), (0.2, 0.9, "unit"), (-1.0, 1.0, "signed"), (-2.3, 3.1, "signed"), (0.0, 254.9, "byte"),
    (3.0, 120.0, "byte"),
])
def test_the_range_of_values_is_found_out(low, high, found):
    assert guess(low, high) == found


def test_a_range_that_nothing_explains_has_to_be_given():
    with pytest.raises(CheckpointError, match=r"from -50 to 50: say what they mean with --range"):
        guess(-50, 50)


def test_a_range_that_is_given_is_taken(tmp_path):
    path = write_onnx("vae", tmp_path / "g.onnx")
    assert load_plain(path, Wishes(value_range="signed")).synthesis.picture.values == "signed"
    with pytest.raises(CheckpointError, match=r"expected one of: signed, unit, byte"):
        Wishes(value_range="0..1")


@pytest.mark.parametrize(("shape", "layout"), [
    ((ROWS, 3, 8, 8), (3, 8, (0, 1, 2, 3))), ((ROWS, 8, 8, 1), (1, 8, (0, 3, 1, 2))), ((ROWS, 8, 8), (1, 8, (0, 1, 2))),
])
def test_the_layout_of_pictures_is_found_out(shape, layout):
    assert layout_of(shape) == layout


@pytest.mark.parametrize("shape", [(ROWS, 3, 8, 4), (ROWS, 784), (ROWS, 5, 8, 8), (ROWS, 3, 3, 3), (1, 3, 8, 8),
                                   (ROWS, 8192, 8192, 3)])
def test_what_are_no_pictures_is_refused(shape):
    with pytest.raises(CheckpointError, match="expected"):
        layout_of(shape)


@pytest.mark.parametrize(("dims", "wanted", "frozen", "found"), [
    ((ROWS, 12), [-1, 3, 2, 2], None, [ROWS, 3, 2, 2]), ((ROWS, 12), [1, 3, 2, 2], 1, [ROWS, 3, 2, 2]),
    ((ROWS, 12), [4, -1, 2], 4, [ROWS, 6, 2]), ((ROWS, 12), [8, 6], 4, ["2*rows", 6]), ((6, 2), [3, -1], None, [3, 4]),
])
def test_sizes_that_were_written_for_a_batch_are_freed(dims, wanted, frozen, found):
    freed = free_sizes(dims, wanted, frozen)
    assert [ROWS if n == -1 and ROWS in found else n for n in freed] == found or freed == wanted


def test_shape_arithmetic_that_is_no_multiple_of_the_rows_is_refused():
    rows = (np.array([1009]), np.array([2003]))
    one = (np.array([1]), np.array([1]))
    assert as_dims(rows, "Reshape") == [ROWS]
    with pytest.raises(ValueError, match="neither constant nor a multiple of the rows"):
        as_dims(fold("Add", [rows, one], {}), "Reshape")


# --- hostile files ----------------------------------------------------------------------------------------------------

Z = helper.make_tensor_value_info("z", TensorProto.FLOAT, ["n", 4])
P = helper.make_tensor_value_info("p", TensorProto.FLOAT, ["n", 3, 2, 2])


def external(location: str, **more: str) -> TensorProto:
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4, 12], data_location=TensorProto.EXTERNAL)
    for key, value in {"location": location, "offset": "0", "length": "192", **more}.items():
        tensor.external_data.add(key=key, value=value)
    return tensor


def dense(weight: TensorProto, folder: Path) -> Path:
    shape = numpy_helper.from_array(np.array([-1, 3, 2, 2]), "shape")
    nodes = [helper.make_node("MatMul", ["z", "w"], ["x"]), helper.make_node("Reshape", ["x", "shape"], ["p"])]
    return save_graph(folder, nodes, [Z], [P], [weight, shape])


def outside(folder: Path) -> Path:
    (folder.parent / "secret.bin").write_bytes(bytes(192))
    return dense(external("../secret.bin"), folder)


def linked(folder: Path) -> Path:
    (folder.parent / "secret.bin").write_bytes(bytes(192))
    (folder / "w.bin").symlink_to(folder.parent / "secret.bin")
    return dense(external("w.bin"), folder)


def pipe(folder: Path) -> Path:
    import os

    os.mkfifo(folder / "w.bin")
    return dense(external("w.bin"), folder)


def short(folder: Path) -> Path:
    (folder / "w.bin").write_bytes(bytes(100))
    return dense(external("w.bin"), folder)


def claims(folder: Path) -> Path:
    return dense(TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[2**20, 2**20], raw_data=bytes(16)), folder)


def absurd(folder: Path) -> Path:
    return dense(TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[2**50, 12], raw_data=bytes(16)), folder)


def custom(folder: Path) -> Path:
    return save_graph(folder, [helper.make_node("Evil", ["z"], ["p"], domain="com.evil")], [Z], [P])


def unknown(folder: Path) -> Path:
    return save_graph(folder, [helper.make_node("StringNormalizer", ["z"], ["p"])], [Z], [P])


def endless(folder: Path) -> Path:
    body = helper.make_graph([helper.make_node("Identity", ["c"], ["d"])], "b",
                             [helper.make_tensor_value_info("i", TensorProto.INT64, []),
                              helper.make_tensor_value_info("c", TensorProto.BOOL, [])],
                             [helper.make_tensor_value_info("d", TensorProto.BOOL, [])])
    return save_graph(folder, [helper.make_node("Loop", ["", "yes"], [], body=body)], [Z], [P])


def branches(folder: Path) -> Path:
    inner = helper.make_graph([helper.make_node("Identity", ["z"], ["q"])], "b", [], [P])
    return save_graph(folder, [helper.make_node("If", ["z"], ["p"], then_branch=inner, else_branch=inner)], [Z], [P])


def functions(folder: Path) -> Path:
    function = helper.make_function("lib", "Twice", ["x"], ["y"], [helper.make_node("Add", ["x", "x"], ["y"])],
                                    [helper.make_opsetid("", 18)])
    graph = helper.make_graph([helper.make_node("Twice", ["z"], ["p"], domain="lib")], "g", [Z], [P])
    model = helper.make_model(graph, functions=[function], opset_imports=[helper.make_opsetid("", 18),
                                                                          helper.make_opsetid("lib", 1)])
    (folder / "g.onnx").write_bytes(model.SerializeToString())
    return folder / "g.onnx"


def noisy(folder: Path) -> Path:
    return save_graph(folder, [helper.make_node("RandomNormalLike", ["z"], ["p"])], [Z], [P])


def many_zeros(folder: Path) -> Path:
    size = numpy_helper.from_array(np.array([2**20, 2**20]), "size")
    return save_graph(folder, [helper.make_node("ConstantOfShape", ["size"], ["p"])], [Z], [P], [size])


def growing(folder: Path) -> Path:
    """Twice as large with each node: 2^60 pixels."""
    shape, scales = np.array([-1, 1, 2, 2]), np.array([1, 1, 4, 4], np.float32)
    nodes = [helper.make_node("Reshape", ["z", "shape"], ["r0"])]
    nodes += [helper.make_node("Resize", [f"r{i}", "", "scales"], [f"r{i + 1}"]) for i in range(30)]
    return save_graph(folder, nodes, [Z], [helper.make_tensor_value_info("r30", TensorProto.FLOAT, ["n", 1, 1, 1])],
                      [numpy_helper.from_array(shape, "shape"), numpy_helper.from_array(scales, "scales")])


def circular(folder: Path) -> Path:
    nodes = [helper.make_node("Add", ["z", "b"], ["a"]), helper.make_node("Add", ["a", "z"], ["b"])]
    return save_graph(folder, nodes, [Z], [helper.make_tensor_value_info("b", TensorProto.FLOAT, ["n", 4])])


def long_one(folder: Path) -> Path:
    nodes = [helper.make_node("Relu", [f"x{i}" if i else "z"], [f"x{i + 1}"]) for i in range(20_000)]
    return save_graph(folder, nodes, [Z], [helper.make_tensor_value_info("x20000", TensorProto.FLOAT, ["n", 4])])


def future(folder: Path) -> Path:
    return save_graph(folder, [helper.make_node("Relu", ["z"], ["p"])], [Z], [P], opset=99)


def torn(folder: Path) -> Path:
    path = dense(numpy_helper.from_array(np.ones((4, 12), np.float32), "w"), folder)
    path.write_bytes(path.read_bytes()[:-20])
    return path


def nested(folder: Path) -> Path:
    """Messages in messages, deeper than a parser should follow."""
    data = b""
    for _ in range(20_000):
        length, size = len(data), bytearray()
        while length > 127:
            size.append(length & 127 | 128)
            length >>= 7
        data = b"\x3a" + bytes([*size, length]) + data
    (folder / "g.onnx").write_bytes(b"\x08\x08" + data[:2_000_000])
    return folder / "g.onnx"


def two_latents(folder: Path) -> Path:
    more = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 4]) for name in ("a", "b")]
    return save_graph(folder, [helper.make_node("Add", ["z", "a"], ["p"])], [Z, *more], [P])


def no_size(folder: Path) -> Path:
    z = helper.make_tensor_value_info("z", TensorProto.FLOAT, ["n", "d"])
    return save_graph(folder, [helper.make_node("Relu", ["z"], ["p"])], [z], [P])


HOSTILE = {
    outside: "no file in the model's folder; it was not opened", linked: "leads out of the model's folder",
    pipe: "in 'w.bin', which", short: "does not hold them", claims: "says that it has", absurd: "which no weight has",
    custom: "operators of the domain 'com.evil'", unknown: "the operator 'StringNormalizer'", endless: "'Loop'",
    branches: "'If'", functions: "functions of its own", noisy: "draws random numbers itself",
    many_zeros: "numbers a row", growing: "numbers a row", circular: "'b', which nothing before it gives",
    long_one: "20000 nodes", future: "its operator set is [99]", torn: "cannot be read as one",
    nested: "", two_latents: "its inputs are", no_size: "say them with --latent",
}


@pytest.mark.parametrize("make", HOSTILE, ids=lambda make: make.__name__)
def test_a_hostile_onnx_file_is_refused_in_one_line_before_anything_runs(make, tmp_path, capsys, monkeypatch):
    """Issue 26: external data outside the folder, absurd shapes, custom operators, graphs without end."""
    folder = tmp_path / "model"
    folder.mkdir()
    monkeypatch.setattr("engine.runtimes.onnxruntime.open_session", lambda *_, **__: pytest.fail("ONNX Runtime ran"))
    path = make(folder)
    assert cli.main(["--gan", str(path), "--out", str(tmp_path / "g.lace")]) != 0
    said = capsys.readouterr().err
    assert HOSTILE[make] in " ".join(said.split())
    assert said.count("error") == 1
    assert "Traceback" not in said
    assert not (tmp_path / "g.lace").exists()


def test_weights_beside_the_file_are_read(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "w.bin").write_bytes(rng.uniform(-0.2, 0.2, (4, 12)).astype("<f4").tobytes())
    parts = parts_of(network_of_onnx(dense(external("w.bin"), tmp_path)), "g")
    assert parts.synthesis.resolution == 2
    assert not any(tensor.external_data for tensor in parts.synthesis.graph.graph.initializer)


@pytest.mark.parametrize("runtime", ["native", "onnxruntime", "openvino"])
def test_heads_on_z_and_on_w_serve_a_conditional_plain_generator(bundles, runtime, tmp_path):
    """Their golden answers pass, a condition is obeyed, an edit keeps the class."""
    stacks = [tiny.stack("smile", {"smile": 2}, dim=23), tiny.stack("shape", {"shape": 3}, dim=18, space="z")]
    bundle = add_parts(bundles["biggan"], stacks, out=tmp_path / "heads.lace")
    assert all(check.passed for check in check_bundle(bundle, runtime))
    sampler = Sampler(bundle, runtime=runtime, guidance=20)
    found = sampler.solve([Request("smile=c1 & shape=c2", seed=seed, label=seed % 5) for seed in range(6)])
    assert [sample.logits["smile"].argmax() for sample in found] == [1] * 6
    edited = sampler.edit(found, "smile=c0")
    for before, after in zip(found, edited, strict=True):
        assert after.logits["smile"][0] > before.logits["smile"][0]
        np.testing.assert_array_equal(after.w[18:], before.w[18:])


@pytest.mark.parametrize("kind", ["dcgan", "biggan", "vae"])
def test_tensorrt_rtx_compiles_the_graph_of_a_plain_generator(bundles, kind):
    """Ahead of time, which needs no GPU: every operator that the rewriting leaves is one that it parses."""
    pytest.importorskip("tensorrt_rtx")
    from engine.runtimes.compiling import build
    from tests.test_tensorrt import plan

    assert len(build(plan(), bundles[kind].graph("synthesis"))) > 10_000


@pytest.mark.parametrize(("kind", "opset", "batch"), [("biggan", 17, 1), ("vae", 11, None), ("dcgan", 9, 1)])
@pytest.mark.parametrize("count", [60, pytest.param(3000, marks=pytest.mark.slow)])
def test_a_damaged_onnx_file_is_a_checkpoint_error_or_is_read(kind, opset, batch, count, tmp_path):
    """Bytes changed, removed and put in, most of them where the nodes are; up to where ONNX Runtime would see it."""
    source, read = write_onnx(kind, tmp_path / "g.onnx", opset=opset, batch=batch).read_bytes(), 0
    for seed in range(count):
        rng, data = random.Random(seed), bytearray(source)
        for _ in range(rng.choice((1, 1, 2, 4, 16))):
            place = rng.randrange(len(data) if rng.random() < 0.4 else min(len(data), 3000))
            more, gone = rng.randbytes(rng.randrange(1, 20)), rng.choice((1, 1, rng.randrange(20)))
            data[place : place + gone] = more[: rng.choice((0, 1, len(more)))]
        (tmp_path / "f.onnx").write_bytes(data)
        try:
            found = network_of_onnx(tmp_path / "f.onnx")
            rewrite(found, Rows(18, found.frozen))
            read += 1
        except (CheckpointError, Malformed):
            pass
    assert 0 < read < count  # some changes do not matter, and most do
