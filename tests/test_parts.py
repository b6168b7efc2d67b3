"""Parts: heads, smooth and sharp, are added to a bundle, in a new one."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from engine.bundle import Bundle
from engine.errors import BundleError, CheckpointError
from engine.reference import field as twin
from engine.runtimes import open_runtime
from engine.runtimes.onnxruntime import Graphs
from engine.sampler import Sampler
from engine.verify import check_bundle
from exporter import cli
from exporter import export as exporting
from exporter.export import add_parts, export
from exporter.heads import SharpStack, load_heads, save_head
from exporter.parts import KINDS, kind_of
from tests import tiny
from tests.fuzzed_bundles import as_format_1, read_files, write_files


def with_sharp(stack, *, seed=7, hidden=(9,), **facts):
    """The stack with a sharp one of other widths."""
    kinds = {a.name: a.columns[1] - a.columns[0] for a in stack.attributes}
    dim = stack.layers[0][0].shape[1]
    layers = tiny.stack(stack.name, kinds, dim=dim, hidden=hidden, seed=seed).layers
    return replace(stack, sharp=SharpStack(layers, **facts))


FACTS = {"calibrated": True, "temperature": {"smile": 1.2}, "ece": {"smile": {"0.5": 0.02, "1": 0.01}}}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Bundle:
    heads = [with_sharp(tiny.heads()[0], **FACTS), *tiny.heads()[1:]]
    return export(tiny.parts(labels=3), heads, out=tmp_path_factory.mktemp("made") / "tiny.lace", name="tiny")


@pytest.fixture
def lone() -> list:
    """Parts that only bring a sharp stack: of a trunk with a value, and of a head on z."""
    trunk = with_sharp(tiny.heads()[1], hidden=())
    attributes = tuple(replace(a, tolerance=0.06 if a.name == "age" else None) for a in trunk.attributes)
    shape = with_sharp(tiny.heads()[2])
    return [replace(trunk, layers=(), attributes=attributes, name="other name"), replace(shape, layers=())]


def test_a_sharp_stack_is_exported_with_its_facts_and_answers(made):
    record = made.heads["smile"].sharp
    assert record.widths == (16, 9, 2)
    assert (record.calibrated, record.temperature, record.ece) == (True, {"smile": 1.2}, FACTS["ece"])
    assert made.heads["trunk"].sharp is None
    assert list(made.stacks) == ["smile", "trunk", "shape", "plane", "smile.sharp"]
    names = {check["name"] for check in made.manifest.provenance["parity"]}
    assert {"smile.sharp.logits", "smile.sharp.gradient median"} <= names
    tensors = {name: tensor.astype(np.float64) for name, tensor in made.field.items()}
    w, _ = twin.mapping(tensors, made.golden["z"].astype(float), made.golden["psi"], made.golden["label"])
    logits, _ = twin.head(twin.layers(tensors, "head.smile.sharp"), w)
    assert made.golden["head.smile.sharp.logits"] == pytest.approx(logits, abs=1e-5)


@pytest.mark.parametrize("runtime", ["native", "onnxruntime", "numpy"])
def test_every_runtime_reads_sharp_stacks(made, runtime):
    checks = check_bundle(made, open_runtime(made, runtime), parts=("field",))
    assert all(check.passed for check in checks)
    assert "smile.sharp.logits" in {check.name for check in checks}


def test_graphs_take_seeds_of_each_row(made):
    """One row asks for one combination of logits, the next for another."""
    seeds = np.random.default_rng(0).standard_normal((3, 4, 2)).astype(np.float32)
    w = np.random.default_rng(1).standard_normal((3, 16)).astype(np.float32)
    found = Graphs(made, 1).run("head.smile.sharp", {"x": w, "seeds": seeds})["slopes"]
    stack = twin.layers(made.field, "head.smile.sharp")
    for i in range(3):
        expected = twin.head_rows(stack, twin.head(stack, w[i : i + 1])[1], seeds[i])
        assert found[i : i + 1] == pytest.approx(expected, abs=1e-5)


def test_parts_are_added_in_a_new_bundle(made, lone, tmp_path, monkeypatch):
    monkeypatch.setattr(exporting, "export_synthesis", None)
    before = {path.name: path.read_bytes() for path in made.path.iterdir()}
    hat = with_sharp(tiny.stack("mood", {"mood": 3}), calibrated=False)
    bundle = add_parts(made.path, [*lone, hat], out=tmp_path / "more.lace")
    assert {path.name: path.read_bytes() for path in made.path.iterdir()} == before
    assert [name for name, head in bundle.heads.items() if head.sharp] == ["smile", "trunk", "shape", "mood"]
    assert bundle.heads["trunk"].sharp.widths == (16, 7)
    assert bundle.attributes["age"].tolerance == 0.06
    assert bundle.attributes["hat"].tolerance is None
    for name, answer in made.golden.items():
        np.testing.assert_array_equal(bundle.golden[name], answer)
    names = {check["name"] for check in bundle.manifest.provenance["parity"]}
    assert {"shape.sharp.gradient 99 %", "hat.sharp.logits", "mood.logits", "image"} <= names
    assert bundle.files["synthesis.onnx"] == made.files["synthesis.onnx"]


def test_a_bundle_of_format_1_becomes_one_of_format_2(tmp_path):
    export(tiny.parts(), tiny.heads(), out=tmp_path / "new.lace")
    write_files(tmp_path / "old.lace", as_format_1(read_files(tmp_path / "new.lace")))
    old = Bundle(tmp_path / "old.lace")
    smile = replace(with_sharp(tiny.heads()[0]), layers=())
    bundle = add_parts(old, [smile], out=tmp_path / "b.lace")
    assert (old.manifest.format, bundle.manifest.format) == ((1, 0), (2, 0))
    assert bundle.generator == old.generator
    assert "head.smile.sharp.onnx" in bundle.files
    for name, tensor in old.field.items():
        np.testing.assert_array_equal(bundle.field[name], tensor)
    with Sampler(old, threads=1) as one, Sampler(bundle, threads=1) as two:
        np.testing.assert_array_equal(two.solve("smile", seeds=[3])[0].w, one.solve("smile", seeds=[3])[0].w)


def test_a_sharp_stack_replaces_one_of_more_layers(made, tmp_path):
    short = replace(with_sharp(tiny.heads()[0], hidden=(), **FACTS), layers=())
    bundle = add_parts(made, [short], out=tmp_path / "b.lace")
    assert sum(name.startswith("head.smile.sharp.") for name in bundle.field) == 2
    assert bundle.heads["smile"].sharp.widths[1:] == (2,)


def test_what_cannot_be_added_is_refused_and_nothing_is_written(made, lone, tmp_path):
    out = tmp_path / "out.lace"
    refused = [
        ([], "there is nothing to add"),
        ([replace(lone[0], space="z")], "no head of .* has exactly its attributes"),
        ([lone[0], lone[0]], "two parts bring a sharp stack for the head 'trunk'"),
        ([tiny.stack("smile", {"smile": 2})], "two heads are called 'smile'"),
        ([replace(with_sharp(tiny.stack("nose", {"nose": 2})), layers=())], "no head of"),
        ([tiny.stack("nose", {"nose": 2}, dim=24)], "reads 24 numbers"),
    ]
    for parts, match in refused:
        with pytest.raises(BundleError, match=match):
            add_parts(made.path, parts, out=out)
    with pytest.raises(BundleError, match="is the bundle itself, which is never changed"):
        add_parts(made.path, lone, out=made.path, overwrite=True)
    with pytest.raises(BundleError, match="a head needs a smooth stack"):
        export(tiny.parts(labels=3), lone, out=out)
    assert list(tmp_path.iterdir()) == []


# --- files of heads ------------------------------------------------------------------------------------------------


def test_a_head_file_carries_its_sharp_stack(tmp_path, lone):
    for i, stack in enumerate([with_sharp(tiny.heads()[0], **FACTS), *lone]):
        save_head(tmp_path / f"{i}.safetensors", stack)
        found = load_heads(tmp_path / f"{i}.safetensors")
        assert (found.name, found.space, found.attributes) == (stack.name, stack.space, stack.attributes)
        assert (found.sharp.calibrated, found.sharp.temperature, found.sharp.ece) == (
            stack.sharp.calibrated, stack.sharp.temperature, stack.sharp.ece)
        for ours, theirs in ((found.layers, stack.layers), (found.sharp.layers, stack.sharp.layers)):
            assert len(ours) == len(theirs)
            for (a, b), (c, d) in zip(ours, theirs, strict=True):
                np.testing.assert_array_equal(a, c)
                np.testing.assert_array_equal(b, d)


def test_stacks_of_a_head_must_fit_each_other():
    stack = tiny.heads()[0]
    with pytest.raises(CheckpointError, match="differ in their inputs or logits"):
        replace(stack, sharp=SharpStack(tiny.stack("smile", {"smile": 3}).layers))
    with pytest.raises(CheckpointError, match="has no layers"):
        replace(stack, layers=())
    with pytest.raises(CheckpointError, match="holds NaN"):
        replace(stack, sharp=SharpStack(((stack.layers[0][0] * np.nan, stack.layers[0][1]), *stack.layers[1:])))


def test_the_kind_of_a_part_is_told_by_its_metadata(tmp_path):
    save_head(tmp_path / "head.safetensors", tiny.heads()[0])
    assert kind_of(tmp_path / "head.safetensors") is KINDS["heads"]
    assert kind_of(tmp_path / "best_valid_ckpt_smile.pt") is KINDS["heads"]
    from safetensors.numpy import save_file

    save_file({"x": np.zeros(1, np.float32)}, tmp_path / "other.safetensors", metadata={"lace_dance": "{}"})
    with pytest.raises(CheckpointError, match=r"other.safetensors is no part .* names none of: heads of lace-train"):
        kind_of(tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match="there is no file"):
        kind_of(tmp_path / "none.safetensors")


# --- the command -----------------------------------------------------------------------------------------------------


def test_the_command_adds_parts(made, tmp_path, capsys):
    save_head(tmp_path / "mood.safetensors", tiny.stack("mood", {"mood": 3}))
    part, out = str(tmp_path / "mood.safetensors"), str(tmp_path / "more.lace")
    assert cli.main(["--bundle", str(made.path), "--add", part, "--out", out, "--json"]) == 0
    assert "mood" in json.loads(capsys.readouterr().out)["attributes"]
    for arguments, match in [
        (["--bundle", str(made.path), "--add", part], "--out is missing: parts are added in a new bundle"),
        (["--bundle", str(made.path), "--out", out], "there is nothing to add"),
        (["--bundle", str(made.path), "--heads", part, "--out", out], "--heads: does not go with --bundle"),
        (["--gan", "x.pkl", "--add", part], "--add: goes with --bundle"),
        (["--bundle", str(made.path), "--add", part, "--out", str(made.path), "--overwrite"], "is the bundle itself"),
    ]:
        assert cli.main(arguments) == 2
        assert match in capsys.readouterr().err.replace("\n", " ")


def test_heads_with_gan_and_a_bundle_still_work_and_say_what_comes(made, tmp_path, capsys):
    save_head(tmp_path / "mood.safetensors", tiny.stack("mood", {"mood": 3}))
    out = tmp_path / "more.lace"
    arguments = ["--gan", str(made.path), "--heads", str(tmp_path / "mood.safetensors"), "--out", str(out)]
    assert cli.main(arguments) == 0
    assert "--gan with a bundle is deprecated" in capsys.readouterr().err
    assert "mood" in Bundle(out).attributes


def test_a_model_card_and_a_licence_go_along(made, tmp_path):
    import shutil

    source = Path(shutil.copytree(made.path, tmp_path / "b.lace"))
    (source / "README.md").write_text("a card")
    (source / "LICENSE").write_text("terms")
    add_parts(source, [tiny.stack("mood", {"mood": 3})], out=tmp_path / "more.lace")
    assert (tmp_path / "more.lace" / "README.md").read_text() == "a card"
    assert (tmp_path / "more.lace" / "LICENSE").read_text() == "terms"
