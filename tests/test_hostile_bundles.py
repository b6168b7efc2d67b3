"""Bundles made by hand to harm who opens them: one sentence of our own, whichever runtime would run them (B1, B2, B7).

Random ones are in tests/fuzzed_bundles.py.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import load, save

from engine import Request, Sampler
from engine.bundle import FIELD, GOLDEN, MANIFEST, Bundle
from engine.errors import BundleError
from tests.fuzzed_bundles import (
    Files,
    as_format_1,
    check_sentence,
    loop,
    read_ends,
    read_files,
    run_child,
    try_bundle,
    wide,
    write_base,
    write_files,
)

RUNTIMES = ("native", "onnxruntime")


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return write_base(tmp_path_factory.mktemp("base") / "base").path


@pytest.fixture
def files(base) -> Files:
    return read_files(base)


def refused(path: Path, files: Files, match: str) -> None:
    """By every runtime, in one sentence."""
    write_files(path, files)
    for runtime in RUNTIMES:
        with pytest.raises(BundleError, match=match) as caught:
            Sampler(path, runtime=runtime)
        check_sentence(caught.value)


@pytest.mark.parametrize("runtime", [*RUNTIMES, "openvino", "numpy"])
@pytest.mark.parametrize("version", [1, 2])
def test_the_bundle_itself_answers_in_both_formats(base, files, tmp_path, runtime, version):
    if version == 1:
        write_files(tmp_path / "b", as_format_1(files))
    bundle = Bundle(base if version == 2 else tmp_path / "b")
    assert bundle.manifest.format == (version, 0)
    assert (bundle.generator.mapping_layers, bundle.generator.normalise) == (2, True)
    assert set(bundle.golden) >= {"mapping.w", "head.smile.logits", "synthesis.image"}
    if runtime != "onnxruntime" or version == 2:  # as_format_1 leaves the graphs of heads out
        with Sampler(bundle, runtime=runtime, threads=1) as sampler:
            assert sampler.solve([Request("smile & age=0.5", seed=0, label=1)])[0].status == 1


# --- tensors -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "change", "match"),
    [
        (FIELD, {"mapping.9.weight": np.ones((1, 4), np.float32)}, "'mapping.9.weight' is none"),
        (FIELD, {"head.smile.9.weight": np.ones((100_000, 2), np.float32)}, "'head.smile.9.weight' is none"),
        (FIELD, {"mapping.embedding": np.ones((1, 4), np.float32)}, r"mapping.embedding is F32 \(1, 4\); expected"),
        (FIELD, {"mapping.0.weight": None}, "tensor mapping.0.weight is missing"),
        (FIELD, {"head.smile.sharp.1.bias": None}, "tensor head.smile.sharp.1.bias is missing"),
        (FIELD, {"mapping.w_avg": np.full(8, np.nan, np.float32)}, "mapping.w_avg holds numbers that are infinite"),
        (FIELD, {"head.age.0.bias": np.full(6, np.inf, np.float32)}, "head.age.0.bias holds numbers that are inf"),
        (FIELD, {"mapping.w_avg": np.ones(8, np.float64)}, r"mapping.w_avg is F64 \(8,\); expected F32"),
        (FIELD, {"mapping.w_avg": np.ones((8, 1), np.float32)}, r"mapping.w_avg is F32 \(8, 1\); expected"),
        (GOLDEN, {"label": np.array([10**9, 0])}, "a label is out of range; expected 0 to 1"),
        (GOLDEN, {"label": np.array([-1, 0])}, "a label is out of range"),
        (GOLDEN, {"label": None}, "tensor label is missing"),
        (GOLDEN, {"label": np.zeros(2, np.float32)}, r"label is F32 \(2,\); expected I64"),
        (GOLDEN, {"z": np.ones((0, 8), np.float32)}, "expected 1 to 64 rows"),
        (GOLDEN, {"z": np.ones(8, np.float32)}, "expected 1 to 64 rows"),
        (GOLDEN, {"psi": np.ones((3, 1), np.float32)}, r"psi is F32 \(3, 1\)"),
        (GOLDEN, {"head.smile.sharp.logits": None}, "head.smile.sharp.logits is missing"),
        (GOLDEN, {"synthesis.image": np.ones((1, 3, 8, 8), np.float32)}, r"synthesis.image is F32 \(1, 3, 8, 8\)"),
        (GOLDEN, {"mapping.w": np.full((2, 8), -np.inf, np.float32)}, "mapping.w holds numbers"),
    ],
)
def test_B1_tensors_are_exactly_those_that_the_manifest_promises(files, tmp_path, file, change, match):
    tensors = load(files[file]) | {name: tensor for name, tensor in change.items() if tensor is not None}
    kept = {name: tensor for name, tensor in tensors.items() if change.get(name, tensor) is not None}
    refused(tmp_path / "b", {**files, file: save(kept)}, match)


def test_B1_format_1_is_checked_as_strictly(files, tmp_path):
    """The layers of its mapping are counted, so that one more is promised; it must then fit."""
    files = as_format_1(files)
    for name in ("mapping.2.weight", "mapping.x.weight", "head.smile.9.bias"):
        tensors = load(files[FIELD]) | {name: np.ones((1, 4), np.float32)}
        refused(tmp_path / name, {**files, FIELD: save(tensors)}, "mapping.2|mapping.x|head.smile.9")
    golden = load(files[GOLDEN])
    del golden["smile.logits"]
    refused(tmp_path / "golden", {**files, GOLDEN: save(golden)}, "smile.logits is missing")


def header(entries: dict, space: int) -> bytes:
    text = json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text + bytes(space)


@pytest.mark.parametrize(
    "data",
    [b"", b"\xff" * 64, (2**62).to_bytes(8, "little") + b"{}", header({"z": 3}, 0), header([], 0),  # type: ignore
     header({"z": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 8]}}, 8),
     header({"z": {"dtype": "F32", "shape": [2], "data_offsets": [0, 2**50]}}, 8),
     header({"z": {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}}, 8),
     header({"z": {"dtype": "F32", "shape": [True], "data_offsets": [0, 8]}}, 8),
     header({"z": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, 16),
     header({"z": {"dtype": "\x1b[31m", "shape": [2, 8], "data_offsets": [0, 8]}}, 8),
     header({"z": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
             "y": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}}, 12)],
    ids=["empty", "no header", "huge header", "entry", "list", "huge shape", "huge offset", "backwards", "true", "gap",
         "escape", "overlap"],
)
@pytest.mark.parametrize("file", [FIELD, GOLDEN])
def test_B1_announced_sizes_are_compared_with_the_file(files, tmp_path, file, data):
    refused(tmp_path / "b", {**files, file: data}, "cannot be read as safetensors|shape|is missing|expected F32")


# --- the manifest ------------------------------------------------------------------------------------------------


def deep(levels: int) -> list:
    value: list = []
    for _ in range(levels):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda b: b["generator"].update(z_dim="8"), "generator.z_dim is '8'; expected a whole number from 1"),
        (lambda b: b["generator"].update(z_dim=True), "z_dim is True; expected a whole number"),
        (lambda b: b["generator"].update(w_dim=10**30), "w_dim is 1000000000000000"),
        (lambda b: b["generator"].update(resolution=10**6), "resolution is 1000000; expected .* to 4096"),
        (lambda b: b["generator"].update(truncation=float("nan")), "truncation is nan; expected a number"),
        (lambda b: b["generator"].update(guidance=-1), "guidance is -1; expected a number above 0"),
        (lambda b: b["generator"].update(guidance=1e400), "guidance is inf"),
        (lambda b: b["generator"].update(name="\x1b[31mred"), "expected a text of .* printable characters"),
        (lambda b: b["generator"].update(labels=-1), "labels is -1"),
        (lambda b: b["generator"].update(mapping_layers=3), "mapping.2.weight is missing"),
        (lambda b: b["generator"].update(mapping_layers=0), "a generator without a mapping has a w that is its z"),
        (lambda b: b["generator"].update(normalise="yes"), "normalise is 'yes'; expected true or false"),
        (lambda b: b["generator"].pop("mapping_layers"), "generator lacks mapping_layers: it is incomplete"),
        (lambda b: b["heads"][0].update(widths=[8, 2**40, 2]), r"widths\[1\] is .*; expected a whole num"),
        (lambda b: b["heads"][0].update(widths="88"), "widths is '88'; expected a list"),
        (lambda b: b["heads"][0].update(widths=[[8], 2]), "expected a whole number"),
        (lambda b: b["heads"].append(b["heads"][0]), "two heads have the same name"),
        (lambda b: b["heads"][0]["sharp"].update(widths=[8, 6, 3]), "leads from 8 numbers to 3 logits; expected"),
        (lambda b: b["heads"][0]["sharp"].update(temperature={"smile": 0}), "temperature.smile is 0"),
        (lambda b: b["heads"][0]["sharp"].update(temperature={"age": 1}), "calibrated for attributes that it does not"),
        (lambda b: b["heads"][0]["sharp"].update(ece={"smile": {"0.7": 2}}), "ece.smile.0.7 is 2; expected"),
        (lambda b: b["heads"][0].update(sharp=[1]), "sharp is .*; expected a table"),
        (lambda b: b["attributes"].append(b["attributes"][0]), "two attributes have the same name"),
        (lambda b: b["attributes"][0].update(classes=["a", 3]), r"classes\[1\] is 3; expected a text"),
        (lambda b: b["attributes"][0].update(classes=["a", "a"]), "two classes of one name"),
        (lambda b: b["attributes"][0].update(columns=[0, 2.0]), r"columns\[1\] is 2.0; expected a whole number"),
        (lambda b: b["attributes"][3].update(sigma="x"), "sigma is 'x'; expected a number"),
        (lambda b: b["attributes"][3].update(tolerance=0), "tolerance is 0; expected a number above 0"),
        (lambda b: b["attributes"][3].update(range=[1, 0]), "has an empty range"),
        (lambda b: b["attributes"][0].update(layers=[-1]), r"layers\[0\] is -1"),
        (lambda b: b["attributes"][0].update(head={}), "head is .*; expected a text"),
        (lambda b: b.update(provenance=3), "provenance is 3; expected a table"),
        (lambda b: b.update(heads=deep(900)), "expected a table"),
        (lambda b: b["files"][FIELD].update(sha256="x"), "is damaged|expected its sha256"),
        (lambda b: b["files"].update({"run.py": {"kind": "run", "bytes": 0, "sha256": "0" * 64}}), "'run.py' is no"),
        (lambda b: b["files"].update({"../x": {"kind": "x", "bytes": 0, "sha256": "0" * 64}}), "is no file of a bund"),
        (lambda b: b["graphs"].update(vjp={"file": "vjp.onnx"}), "'vjp' is reserved for a later version"),
        (lambda b: b["graphs"].update(x={"file": "x.onnx"}), "the graph 'x' is unknown"),
        (lambda b: b["graphs"]["mapping"].update(file="pullback.onnx"), "'pullback.onnx'; expected mapping.onnx"),
        (lambda b: b["graphs"]["mapping"].update(file="../mapping.onnx"), "expected mapping.onnx"),
        (lambda b: b["graphs"]["synthesis"].update(precision="fp8"), "precision is 'fp8'; expected one of"),
        (lambda b: b["graphs"]["synthesis"].update(noises={"ws": [4, 4]}), "expected names such as noise.3"),
        (lambda b: b["graphs"]["synthesis"].update(noises={"noise.1": [4, 10**6]}), r"noises.noise.1\[1\] is 1000000"),
    ],
)
def test_B1_values_of_the_manifest_have_their_types_and_ranges(files, tmp_path, change, match):
    body = json.loads(files[MANIFEST])
    body["heads"].sort(key=lambda head: head["name"] != "smile")
    change(body)
    data = json.dumps(body).encode()
    write_files(tmp_path / "b", {**files, MANIFEST: data})
    (tmp_path / "b" / MANIFEST).write_bytes(data if b'"x"' in data and b"sha256" in data else
                                            (tmp_path / "b" / MANIFEST).read_bytes())
    with pytest.raises(BundleError, match=match) as caught:
        Bundle(tmp_path / "b")
    check_sentence(caught.value)


def test_every_file_has_a_record_with_its_kind(base):
    body = json.loads((base / MANIFEST).read_text())
    assert body["format"] == "2.0"
    assert set(body["files"]) == {path.name for path in base.iterdir()} - {MANIFEST}
    kinds = {name: facts["kind"] for name, facts in body["files"].items()}
    assert kinds["head.smile.sharp.onnx"] == "head.sharp"
    assert kinds["head.smile.onnx"] == "head"
    assert kinds[FIELD] == "field"


def test_a_readme_and_a_licence_may_lie_beside(base, tmp_path):
    copied = Path(shutil.copytree(base, tmp_path / "b"))
    (copied / "README.md").write_text("a card")
    (copied / "LICENSE").symlink_to("/etc/passwd")
    assert Bundle(copied).hash == Bundle(base).hash


# --- graphs ------------------------------------------------------------------------------------------------------


def edited(files: Files, file: str, change) -> Files:
    model = onnx.load_from_string(files[file])
    change(model)
    return {**files, file: model.SerializeToString()}


def operator(name: str, domain: str = "", at: int = 0):
    def change(model):
        model.graph.node[at].op_type, model.graph.node[at].domain = name, domain

    return change


def place(key: str, value: str):
    def change(model):
        tensor = next(t for t in model.graph.initializer if t.external_data)
        next(entry for entry in tensor.external_data if entry.key == key).value = value

    return change


def integers(name: str, values):
    def change(model):
        tensor = next(t for t in model.graph.initializer if t.name == name)
        tensor.CopyFrom(numpy_helper.from_array(np.array(values, np.int64), name))

    return change


def insert(*nodes, **tensors):
    def change(model):
        for i, node in enumerate(nodes):
            model.graph.node.insert(i, node)
        model.graph.initializer.extend(numpy_helper.from_array(np.asarray(v), name) for name, v in tensors.items())

    return change


def rename_output(model):
    model.graph.output[0].name = "picture"


def widen_output(model):
    model.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 400


def freeze_rows(model):
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 4


def retype(model):
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.DOUBLE


def add_input(model):
    model.graph.input.append(helper.make_tensor_value_info("more", TensorProto.FLOAT, ["rows", 1]))


def nest(model):
    """An If in an If in an If."""
    graph = helper.make_graph([], "g", [], [])
    for _ in range(4):
        node = helper.make_node("If", ["ws"], [], then_branch=graph, else_branch=graph)
        graph = helper.make_graph([node], "g", [], [])
    model.graph.node.extend(graph.node)


def with_function(model):
    body = [helper.make_node("Identity", ["a"], ["b"])]
    model.functions.append(helper.make_function("x", "F", ["a"], ["b"], body, [helper.make_opsetid("", 18)]))


def with_sparse(model):
    model.graph.sparse_initializer.add()


def many_nodes(model):
    for i in range(10_001):
        model.graph.node.append(helper.make_node("Neg", ["image" if not i else f"n{i}"], [f"n{i + 1}"]))


def overflow(model):
    tensor = next(t for t in model.graph.initializer if t.name == "weight")
    tensor.dims[0] = 2**31


def outer(model):
    """(rows, n, 1) times (n, 1)^T in turns: 2^42 numbers a row."""
    x = "image"
    for i in range(3):
        model.graph.node.append(helper.make_node("Reshape", [x, f"tall.{i}"], [f"t{i}"]))
        model.graph.node.append(helper.make_node("Reshape", [x, f"flat.{i}"], [f"f{i}"]))
        model.graph.node.append(helper.make_node("Mul", [f"t{i}", f"f{i}"], [f"o{i}"]))
        n = 48 ** (2**i)
        for kind, dims in (("tall", [-1, n, 1]), ("flat", [-1, 1, n])):
            model.graph.initializer.append(numpy_helper.from_array(np.array(dims), f"{kind}.{i}"))
        x = f"o{i}"


SYNTHESIS, MAPPING = "synthesis.onnx", "mapping.onnx"


@pytest.mark.parametrize(
    ("file", "change", "match"),
    [
        (SYNTHESIS, operator("Loop"), "the operator Loop, which no graph of ours has"),
        (SYNTHESIS, operator("Lo\x1b[31m\nop"), "the operator Lo"),
        (SYNTHESIS, operator("Gemm", "a\rb", 1), "the operator a"),
        (SYNTHESIS, operator("Gemm", "com.microsoft", 1), "the operator com.microsoft.Gemm"),
        (SYNTHESIS, lambda m: loop(None, m, m.graph), "the operator Loop|a tensor has the field 5"),
        (SYNTHESIS, lambda m: wide(np.random.default_rng(1), m, m.graph), "repeats what it joins|numbers a row"),
        (SYNTHESIS, outer, "numbers a row; expected at most"),
        (SYNTHESIS, many_nodes, "more than 10000 nodes"),
        (SYNTHESIS, nest, "graphs in graphs"),
        (SYNTHESIS, with_function, "the field 25"),
        (SYNTHESIS, with_sparse, "the field 15"),
        (SYNTHESIS, rename_output, "its outputs are 'picture'; expected 'image'"),
        (SYNTHESIS, widen_output, "its output 'image' is of type 1"),
        (SYNTHESIS, freeze_rows, "its input 'ws' is of type 1"),
        (SYNTHESIS, retype, "its input 'ws' is of type 11"),
        (SYNTHESIS, add_input, "its inputs are 'more', 'ws'; expected 'ws'"),
        (SYNTHESIS, integers("shape", [-1, 3, 2, 8]), "its output 'image' comes out as"),
        (SYNTHESIS, integers("shape", [10**12, 1, 1, 1]), "Reshape has inputs or attributes that do not fit"),
        (SYNTHESIS, integers("first", 7), "Gather has inputs or attributes that do not fit"),
        (SYNTHESIS, overflow, "has .* bytes; expected"),
        (SYNTHESIS, insert(helper.make_node("ConstantOfShape", ["n"], ["big"]), n=[10**12]), "or ConstantOfShape"),
        (SYNTHESIS, insert(helper.make_node("Expand", ["weight", "n"], ["big"]), n=[10**9, 1, 1]), "numbers a row"),
        (SYNTHESIS, insert(helper.make_node("Unsqueeze", ["n", "n"], ["x"]), n=[10**12]), "do not fit"),
        (SYNTHESIS, lambda m: setattr(m.opset_import[0], "version", 99), "version 18 to 22"),
        (SYNTHESIS, lambda m: m.opset_import.append(helper.make_opsetid("com.microsoft", 1)), "default domain"),
        (SYNTHESIS, lambda m: setattr(m, "ir_version", 99), "IR version is 99"),
        (MAPPING, place("location", "../../secret.bin"), r"lie in '\.\./\.\./secret\.bin'; expected fie"),
        (MAPPING, place("location", "/etc/passwd"), "lie in '/etc/passwd'"),
        (MAPPING, place("location", "*/_ORT_MEM_ADDR_/*"), "lie in .*_ORT_MEM_ADDR_"),
        (MAPPING, place("location", GOLDEN), "lie in 'golden.safetensors'"),
        (MAPPING, place("offset", str(10**12)), "end at byte 10000000000.. of field.safetensors, which has"),
        (MAPPING, place("offset", "-8"), "must say location, offset and length"),
        (MAPPING, place("length", "4"), "has 4 bytes; expected 64"),
        ("head.smile.onnx", operator("TopK", at=1), "the operator TopK"),
        ("head.smile.sharp.onnx", operator("NonZero"), "the operator NonZero"),
        ("linearise.onnx", operator("Scan", at=3), "the operator Scan"),
        ("pullback.onnx", rename_output, "its outputs are 'picture'; expected 'dz'"),
    ],
)
def test_B2_B7_graphs_are_such_as_our_exporter_writes(files, tmp_path, file, change, match):
    refused(tmp_path / "b", edited(files, file, change), match)


def varint(value: int) -> bytes:
    return bytes([value & 127 | 128, value >> 7]) if value > 127 else bytes([value])


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda data: b"", "holds no graph"),
        (lambda data: data[:-1], "longer than what holds it|ends in the middle"),
        (lambda data: data + data, "twice"),  # protobuf would merge the two
        (lambda data: data + b"\x0b\x0c", "the field 1 of type 3"),
        (lambda data: data + b"\x08" + b"\xff" * 11, "more than 64 bits|twice"),
        (lambda data: b"\x0a" * 1_000_000, "the field 1 of type 2"),
        (lambda data: b"\x42\x00" * 500_000, "twice|more than 400000 fields"),
        (lambda data: b"\x3a" + varint(10_000) + b"\x0a\x00" * 5_000, r"its inputs are none"),
        (lambda data: b"\xff\xff\xff\xff\xff", "ends in the middle|which our exporter never writes"),
    ],
)
def test_B2_files_that_are_no_graph_are_refused(files, tmp_path, make, match):
    refused(tmp_path / "b", {**files, SYNTHESIS: make(files[SYNTHESIS])}, match)


# --- symbolic links ----------------------------------------------------------------------------------------------


def in_hub_cache(root: Path, files: Files, folder: str = "") -> Path:
    """The layout of the Hugging Face Hub: snapshots/REVISION[/FOLDER]/NAME -> ../../blobs/HASH."""
    write_files(root / "real", files)
    (root / "blobs").mkdir()
    bundle = root / "snapshots" / "0123abc" / folder
    bundle.mkdir(parents=True)
    up = "../" * (3 if folder else 2)
    for i, file in enumerate(sorted((root / "real").iterdir())):
        file.rename(root / "blobs" / f"hash{i}")
        (bundle / file.name).symlink_to(f"{up}blobs/hash{i}")
    return bundle


@pytest.mark.parametrize("runtime", ["native", "onnxruntime", "openvino", "numpy"])
@pytest.mark.parametrize("folder", ["", "face.lace"])
def test_a_bundle_in_the_cache_of_the_hub_answers_like_its_copy(base, files, tmp_path, runtime, folder):
    bundle = Bundle(in_hub_cache(tmp_path, files, folder))
    assert bundle.hash == Bundle(base).hash
    assert bundle.is_linked
    with Sampler(bundle, runtime=runtime, threads=1) as linked, Sampler(base, runtime=runtime, threads=1) as plain:
        requests = [Request("smile & age=0.5", seed=0, label=1), Request("shape & glasses", seed=1, label=0)]
        found, expected = linked.solve(requests), plain.solve(requests)
        for a, b in zip(found, expected, strict=True):
            np.testing.assert_array_equal(a.w, b.w)
        if runtime != "numpy":
            np.testing.assert_array_equal(linked.render(found)[0].image, plain.render(expected)[0].image)


@pytest.mark.parametrize("file", [MANIFEST, FIELD, GOLDEN, SYNTHESIS, MAPPING])
def test_links_that_leave_the_bundle_are_refused(files, tmp_path, file):
    bundle = tmp_path / "b"
    write_files(bundle, files)
    (bundle / file).rename(tmp_path / "secret")
    (bundle / file).symlink_to(tmp_path / "secret")
    with pytest.raises(BundleError, match=f"{file} is a symbolic link that leaves the bundle"):
        Bundle(bundle)
    (tmp_path / "secret").unlink()
    with pytest.raises(BundleError, match=f"lacks {file}|has no manifest"):
        Bundle(bundle)
    (bundle / file).unlink()
    (bundle / file).symlink_to(file)
    with pytest.raises(BundleError, match=f"lacks {file}|has no manifest"):
        Bundle(bundle)


def test_a_link_from_the_hub_to_elsewhere_is_refused(files, tmp_path):
    bundle = in_hub_cache(tmp_path, files)
    (tmp_path / "secret").write_bytes((bundle / FIELD).read_bytes())
    for target in (tmp_path / "secret", tmp_path / "blobs" / "deep" / "secret"):
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(files[FIELD])
        (bundle / FIELD).unlink()
        (bundle / FIELD).symlink_to(target)
        with pytest.raises(BundleError, match="leaves the bundle"):
            Bundle(bundle)


# --- random ones -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("runtime", "count"), [("native", 300), ("onnxruntime", 60)])
def test_B1_B2_changed_bundles_are_refused_or_answer(base, runtime, count):
    ends = run_child(base, 0, count, runtime)
    assert ends["refused"] > count / 2
    assert ends["answered"] > count / 20


@pytest.mark.slow
@pytest.mark.parametrize(("runtime", "count"), [("native", 10_000), ("onnxruntime", 2_000), ("openvino", 300)])
def test_B1_B2_many_changed_bundles_are_refused_or_answer(base, runtime, count):
    for first in range(1000, 1000 + count, 1000):
        run_child(base, first, min(1000, count), runtime, timeout=3000)


def test_the_runner_of_random_bundles_sees_what_goes_wrong(base):
    """A test of the test: a traceback, a slow case, a death, a case that is missing."""
    assert try_bundle(base, "native") == "answered"
    fine = "case 0: x\nend 0: refused\ncase 1: y\nend 1: answered\n"
    assert read_ends(fine, 0, "", 2) == {"refused": 1, "answered": 1}
    for said, code, match in [
        (fine.replace("answered", "traceback 'ValueError'"), 0, "1 of 2 cases: case 1: y -> end 1: traceback"),
        (fine.replace("refused", "slow 11.0 s"), 0, "case 0: x -> end 0: slow"),
        ("case 0: x\nend 0: refused\ncase 1: y\n", -11, "died with -11 after: .*case 1: y"),
        (fine, 0, "2 of 3 cases ended"),
    ]:
        with pytest.raises(AssertionError, match=match):
            read_ends(said, code, "", 3 if "3 cases" in match else 2)
