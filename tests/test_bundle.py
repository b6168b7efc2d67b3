"""What a bundle refuses when it is opened, and how a folder comes into being."""

import hashlib
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from engine.bundle import FIELD, GOLDEN, MANIFEST, Attribute, Bundle, Head
from engine.errors import BundleError, LaceError
from engine.folders import PARTIAL, writing_folder
from tests.worlds import random_world


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Bundle:
    return random_world(tmp_path_factory.mktemp("whole") / "b", dim=8, layers=2, labels=2, z_head=True)


@pytest.fixture
def copy(whole, tmp_path):
    return shutil.copytree(whole.path, tmp_path / "b")


def alter(folder, change) -> None:
    """Change the manifest as a dictionary."""
    body = json.loads((folder / MANIFEST).read_text())
    change(body)
    (folder / MANIFEST).write_text(json.dumps(body))


def alter_tensors(folder, change) -> None:
    """Change the field's tensors and make the manifest agree with the file."""
    tensors = load_file(folder / FIELD)
    change(tensors)
    save_file(tensors, folder / FIELD)
    data = (folder / FIELD).read_bytes()
    facts = {"kind": "field", "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    alter(folder, lambda body: body["files"].__setitem__(FIELD, facts))


def test_an_untouched_copy_opens_and_has_the_same_hash(whole, copy):
    assert Bundle(copy).hash == whole.hash
    assert "random" in repr(whole)


def test_a_missing_bundle_a_file_and_another_folder_are_told_apart(tmp_path):
    with pytest.raises(BundleError, match=r"no bundle at .*expected a folder made by lace-export"):
        Bundle(tmp_path / "nothing")
    (tmp_path / "gan.pkl").write_bytes(b"")
    with pytest.raises(BundleError, match=r"is a file; .*lace-export --gan"):
        Bundle(tmp_path / "gan.pkl")
    (tmp_path / "folder").mkdir()
    with pytest.raises(BundleError, match=r"has no manifest\.json"):
        Bundle(tmp_path / "folder")


@pytest.mark.parametrize(
    "text",
    [b"", b"{", b"[]", b"3", b'{"format": "1.0"}', b'{"format": 1, "files": {}}', b'{"format": "1", "files": {}}',
     b'{"format": "1.0.0", "files": {}}', b'{"format": "1.0", "files": ["a"]}', b'{"format": "1.0", "files": {"a": 3}}',
     b"\xff\xfe", b"[" * 100_000],
)
def test_a_manifest_that_cannot_be_read_is_refused(copy, text):
    (copy / MANIFEST).write_bytes(text)
    with pytest.raises(BundleError, match=r"cannot be read|is incomplete|expected a table"):
        Bundle(copy)


@pytest.mark.parametrize("version", ["3.0", "0.9"])
def test_another_major_version_is_refused_with_advice(copy, version):
    alter(copy, lambda body: body.__setitem__("format", version))
    with pytest.raises(BundleError, match=rf"format {version}; .* reads 1\.x and 2\.x: export it again"):
        Bundle(copy)


def test_a_newer_minor_version_with_unknown_keys_is_read(copy):
    def change(body):
        body["format"] = "2.7"
        body["colour_space"] = "sRGB"
        for entry in (body["generator"], *body["heads"], *body["attributes"]):
            entry["invented"] = {"later": [1]}

    alter(copy, change)
    assert list(Bundle(copy).attributes) == ["smile", "glasses", "colour", "age", "yaw", "shape"]


@pytest.mark.parametrize("name", ["../field.safetensors", "a/b", "/etc/passwd", "/", "..", ".", "", "a\\b", MANIFEST])
def test_files_outside_the_bundle_are_refused(copy, name):
    alter(copy, lambda body: body["files"].__setitem__(name, {"kind": "field", "bytes": 0, "sha256": ""}))
    with pytest.raises(BundleError, match=r"is no file of a bundle"):
        Bundle(copy)


@pytest.mark.parametrize("file", [FIELD, GOLDEN])
def test_a_missing_or_damaged_file_is_named(copy, file):
    data = (copy / file).read_bytes()
    for damaged in (data[:-1], data[:-1] + bytes([data[-1] ^ 1])):
        (copy / file).write_bytes(damaged)
        with pytest.raises(BundleError, match=f"{file} is damaged"):
            Bundle(copy)
    (copy / file).unlink()
    with pytest.raises(BundleError, match=f"lacks {file}"):
        Bundle(copy)
    alter(copy, lambda body: body["files"].pop(file))
    with pytest.raises(BundleError, match=f"{file}. is not listed"):
        Bundle(copy)


def test_a_file_that_is_no_safetensors_is_refused(copy):
    data = b"\xff" * 64
    (copy / FIELD).write_bytes(data)
    facts = {"kind": "field", "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    alter(copy, lambda body: body["files"].__setitem__(FIELD, facts))
    with pytest.raises(BundleError, match="cannot be read as safetensors"):
        Bundle(copy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("mapping.w_avg"), r"mapping\.w_avg is missing; expected F32 \(8,\)"),
        (lambda t: t.pop("mapping.embedding"), r"mapping\.embedding is missing"),
        (lambda t: t.pop("mapping.1.bias"), r"mapping\.1\.bias is missing"),
        (lambda t: t.update({"head.age.0.weight": np.zeros((2, 2), np.float32)}), r"is F32 \(2, 2\); expected"),
        (lambda t: t.update({"head.age.0.bias": t["head.age.0.bias"].astype(float)}), r"is F64 .*; expected F32"),
    ],
)
def test_a_missing_or_misshapen_tensor_is_named(copy, change, message):
    alter_tensors(copy, change)
    with pytest.raises(BundleError, match=message):
        Bundle(copy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda body: body.pop("generator"), "incomplete"),
        (lambda body: body["generator"].pop("z_dim"), "incomplete"),
        (lambda body: body.update(generator=3), "generator is 3; expected a table"),
        (lambda body: body.update(heads={"a": 1}), "heads is .*; expected a list"),
        (lambda body: body.update(graphs=[]), "graphs is .*; expected a table"),
        (lambda body: body.update(graphs={"mapping": "a"}), "expected a table"),
        (lambda body: body.update(graphs={"mapping": {"file": "mapping.onnx"}}), "'mapping.onnx' is not listed"),
        (lambda body: body["attributes"][0].update(head="nose"), "'smile' names the missing head 'nose'"),
        (lambda body: body["attributes"][0].update(kind="text"), "unknown kind 'text': expected class or value"),
        (lambda body: body["attributes"][0].update(classes=["yes"]), "2 logits for 1 classes"),
        (lambda body: body["attributes"][0].update(columns=[1, 3]), "does not fit its head"),
        (lambda body: body["attributes"][0].update(columns=[-1, 1]), "is -1; expected a whole number"),
        (lambda body: body["attributes"][0].update(columns=[0, 1, 2]), "expected a list of 2 to 2"),
        (lambda body: body["attributes"][3].update(sigma=0), "sigma > 0"),
        (lambda body: body["attributes"][0].update(name="a b"), "not an identifier"),
        (lambda body: body["heads"][0].update(name="../x"), "not an identifier"),
        (lambda body: body["heads"][0].update(space="s"), "expected one of w, z"),
        (lambda body: body["heads"][0].update(widths=[]), "expected a list of 2 to"),
    ],
)
def test_a_manifest_that_contradicts_itself_is_refused(copy, change, message):
    alter(copy, change)
    with pytest.raises(BundleError, match=message):
        Bundle(copy)


def test_a_graph_that_is_not_there_is_refused_with_those_that_are(whole):
    with pytest.raises(BundleError, match="no graph 'synthesis'; it has:"):
        whole.graph("synthesis")


def test_a_generator_without_a_mapping_is_a_bundle_too(tmp_path):
    """Its w is its z: no layers, nothing normalised; its graphs are checked like the others."""
    bundle = random_world(tmp_path / "b", dim=8, layers=0, normalise=False, graphs=True)
    facts = bundle.generator
    assert (facts.mapping_layers, facts.normalise, facts.z_dim) == (0, False, facts.w_dim)
    assert not [name for name in bundle.field if name.endswith(".weight") and name.startswith("mapping")]
    for change in ({"w_dim": 9}, {"labels": 2}):
        copied = shutil.copytree(bundle.path, tmp_path / str(change))
        alter(copied, lambda body, change=change: body["generator"].update(change))
        with pytest.raises(BundleError, match="a generator without a mapping has a w that is its z"):
            Bundle(copied)


def test_records_check_themselves():
    with pytest.raises(BundleError, match="one logit"):
        Attribute("age", "value", "age", (0, 2))
    with pytest.raises(BundleError, match="identifier"):
        Head("head of age", "w", (4, 1))


MARKER = "mark.txt"


def write(target, text="new", *, overwrite=False, marker=True):
    with writing_folder(target, marker=MARKER, overwrite=overwrite, error=LaceError) as folder:
        (folder / "content").write_text(text)
        if marker:
            (folder / MARKER).write_text("")


def listing(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_folder_appears_whole(tmp_path):
    write(tmp_path / "deep" / "out")
    assert listing(tmp_path / "deep") == ["out"]
    assert listing(tmp_path / "deep" / "out") == ["content", MARKER]


def test_nothing_appears_after_an_error(tmp_path):
    def fail():
        with writing_folder(tmp_path / "out", marker=MARKER, overwrite=False, error=LaceError) as folder:
            (folder / MARKER).write_text("")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    with pytest.raises(LaceError, match="was not written"):
        write(tmp_path / "out", marker=False)
    assert listing(tmp_path) == []


def test_an_earlier_result_is_replaced_only_when_told_so(tmp_path):
    write(tmp_path / "out", "old")
    with pytest.raises(LaceError, match=r"exists already: .*--overwrite"):
        write(tmp_path / "out")
    assert (tmp_path / "out" / "content").read_text() == "old"
    write(tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "content").read_text() == "new"
    assert listing(tmp_path) == ["out"]


def test_an_error_leaves_the_earlier_result_as_it_was(tmp_path):
    write(tmp_path / "out", "old")
    with pytest.raises(LaceError):
        write(tmp_path / "out", overwrite=True, marker=False)
    assert (tmp_path / "out" / "content").read_text() == "old"
    assert listing(tmp_path) == ["out"]


def test_a_foreign_folder_or_file_is_never_overwritten(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for target in (tmp_path / "out", tmp_path / "file"):
        with pytest.raises(LaceError, match="never overwritten"):
            write(target, overwrite=True)
    assert (tmp_path / "out" / "thesis.tex").read_text() == "mine"
    assert listing(tmp_path) == ["file", "out"]


def finished_process() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


@pytest.mark.parametrize("name", ["out", "out[1]"])
def test_what_a_killed_run_left_is_removed(tmp_path, name):
    # A container gives each run the same number: a folder with ours is not in use either.
    for pid in (finished_process(), os.getpid()):
        (tmp_path / f".{name}{PARTIAL}{pid}").mkdir()
    running = tmp_path / f".{name}{PARTIAL}{os.getppid()}"
    running.mkdir()
    write(tmp_path / name)
    assert listing(tmp_path) == [running.name, name]


@pytest.mark.parametrize("overwrite", [True, False])
def test_a_run_killed_between_its_renames_loses_nothing(tmp_path, overwrite):
    write(tmp_path / "out", "old")
    pid = finished_process()
    os.rename(tmp_path / "out", tmp_path / f".out{PARTIAL}{pid}-old")
    (tmp_path / f".out{PARTIAL}{pid}").mkdir()
    if not overwrite:
        with pytest.raises(LaceError, match="exists already"):
            write(tmp_path / "out")
        assert (tmp_path / "out" / "content").read_text() == "old"
    else:
        write(tmp_path / "out", overwrite=True)
        assert (tmp_path / "out" / "content").read_text() == "new"
    assert listing(tmp_path) == ["out"]
