"""The whole export, from torch modules to an opened bundle."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.bundle import Bundle
from engine.errors import BundleError, CheckpointError
from engine.folders import PARTIAL
from engine.reference import field as twin
from engine.runtimes import open_runtime
from engine.verify import ParityError
from exporter import cli, export, exporting
from tests import checkpoints, tiny


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Bundle:
    """A conditional generator with heads of every sort."""
    target = tmp_path_factory.mktemp("made") / "tiny.lace"
    return export(tiny.parts(labels=3), tiny.heads(), out=target, name="tiny", truncation=0.8)


@pytest.fixture
def graph_of_made(made, monkeypatch):
    """Exports in this test take their synthesis from ``made``: tracing is not what they test."""

    def copied(synthesis, path, **options):
        shutil.copyfile(made.graph("synthesis"), path)
        return dict(made.manifest.graphs["synthesis"]), []

    monkeypatch.setattr(exporting, "export_synthesis", copied)


def test_a_bundle_says_what_it_holds(made):
    facts = made.generator
    assert (facts.name, facts.architecture, facts.labels, facts.truncation) == ("tiny", "stylegan2-skip", 3, 0.8)
    assert list(made.attributes) == ["smile", "age", "hair", "hat", "shape", "plane", "tilt"]
    assert made.attributes["hat"].columns == (5, 7)
    assert made.heads["shape"].space == "z"
    assert made.heads["trunk"].widths == (16, 12, 10, 7)
    assert all(check["passed"] for check in made.manifest.provenance["parity"])
    assert json.loads((made.path / "manifest.json").read_text())["format"] == "2.0"


def test_golden_answers_are_those_of_the_numpy_field(made):
    golden, tensors = made.golden, {name: tensor.astype(np.float64) for name, tensor in made.field.items()}
    assert sorted(set(golden["psi"].ravel().tolist())) == pytest.approx([0.5, 0.7, 1.0])
    w, hidden = twin.mapping(tensors, golden["z"].astype(np.float64), golden["psi"].astype(np.float64), golden["label"])
    assert golden["mapping.w"] == pytest.approx(w, abs=1e-5)
    stack = twin.layers(tensors, "head.trunk")
    rows = twin.head_rows(stack, twin.head(stack, w)[1], np.eye(7)[0:1])
    expected = twin.pullback(tensors, golden["z"].astype(np.float64), golden["psi"], hidden, rows)
    assert golden["head.trunk.gradient"][:, :1] == pytest.approx(expected, abs=1e-5)
    assert golden["synthesis.images"].shape == (4, 3, 8, 8)
    assert golden["synthesis.image"].shape == (1, 3, 8, 8)


def test_pictures_equal_the_torch_generator(made):
    parts = tiny.parts(labels=3)
    ws = torch.randn(5, parts.synthesis.num_ws, 16, generator=torch.Generator().manual_seed(1))
    runtime = open_runtime(made, "onnxruntime")
    assert runtime.drawing.synthesize(ws.numpy()) == pytest.approx(parts.synthesis(ws).numpy(), abs=2e-5)


def test_bfloat16_is_checked_without_a_runtime_that_has_it(tmp_path):
    bundle = export(tiny.parts(), out=tmp_path / "b.lace", precision="bf16")
    checks = {check["name"]: check for check in bundle.manifest.provenance["parity"]}
    assert checks["image psnr"]["passed"]
    assert checks["image of the torch module, psnr"]["passed"]


def test_noise_inputs_are_named_in_the_manifest_and_zero_by_default(tmp_path):
    parts = tiny.parts()
    bundle = export(parts, out=tmp_path / "n.lace", noise="input")
    assert bundle.manifest.graphs["synthesis"]["noises"] == {"noise.1": (8, 8), "noise.2": (8, 8)}
    ws = torch.randn(2, parts.synthesis.num_ws, 16, generator=torch.Generator().manual_seed(1))
    expected = parts.synthesis(ws, [None] * 3).numpy()
    assert open_runtime(bundle, "onnxruntime").drawing.synthesize(ws.numpy()) == pytest.approx(expected, abs=2e-5)


def test_a_wrong_graph_is_refused_and_nothing_is_left(tmp_path, monkeypatch, graph_of_made):
    parts = tiny.parts(labels=3)
    recorded = exporting.golden_answers

    def then_break(mapping, synthesis, heads, **options):
        altered = tiny.parts(labels=3)
        altered.mapping.fc1.weight[0] *= 1.01
        return recorded(altered.mapping, synthesis, heads, **options)

    monkeypatch.setattr(exporting, "golden_answers", then_break)
    with pytest.raises(ParityError, match=r"w is \d.*at most 0.0001.*Nothing was written"):
        export(parts, tiny.heads(), out=tmp_path / "wrong.lace")
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_picture_is_refused(tmp_path, monkeypatch, graph_of_made):
    parts = tiny.parts(labels=3)
    parts.synthesis.b8.torgb.weight *= 1.01
    with pytest.raises(ParityError, match="image is"):
        export(parts, out=tmp_path / "wrong.lace")
    assert list(tmp_path.iterdir()) == []


KILLED = """
import os, signal, sys
from exporter import export
from tests import tiny

def progress(phase):
    if phase == "synthesis graph":
        os.kill(os.getpid(), signal.SIGKILL)

export(tiny.parts(labels=3), tiny.heads(), out=sys.argv[1], progress=progress)
"""


def test_a_killed_export_leaves_no_bundle_and_the_next_cleans_up(tmp_path, graph_of_made):
    target = tmp_path / "killed.lace"
    done = subprocess.run([sys.executable, "-c", KILLED, str(target)], capture_output=True, check=False)
    assert done.returncode == -9, done.stderr
    assert not target.exists()
    lock, left = sorted(tmp_path.iterdir())
    assert lock.name == ".killed.lace.lock"
    assert left.name.startswith(f".killed.lace{PARTIAL}")
    with pytest.raises(BundleError, match="not finished"):
        Bundle(left)
    export(tiny.parts(labels=3), out=target)
    assert list(tmp_path.iterdir()) == [target]


def test_heads_are_added_without_exporting_the_generator_again(made, tmp_path, monkeypatch):
    monkeypatch.setattr(exporting, "export_synthesis", None)
    more = [tiny.stack("trunk", {"beard": 2, "mood": 3}, seed=9), tiny.stack("slant", {"slant": 1}, hidden=())]
    bundle = export(made.path, more, out=tmp_path / "more.lace")
    assert list(bundle.attributes) == [*made.attributes, "beard", "mood", "slant"]
    assert bundle.attributes["beard"].head == "trunk_2"
    assert bundle.files["synthesis.onnx"] == made.files["synthesis.onnx"]
    assert np.array_equal(bundle.golden["head.smile.gradient"], made.golden["head.smile.gradient"])
    names = [check["name"] for check in bundle.manifest.provenance["parity"]]
    assert {"slant.logits", "beard.gradient median", "image"} <= set(names)
    # The same answers as if all heads had been exported at once, by autograd.
    from exporter.golden import field_answers

    given = {name: made.golden[name] for name in ("z", "psi", "label")}
    answers = field_answers(tiny.parts(labels=3).mapping, more, given)
    assert bundle.golden["head.trunk_2.gradient"] == pytest.approx(answers["head.trunk.gradient"], abs=1e-5)
    assert bundle.golden["head.slant.gradient"] == pytest.approx(answers["head.slant.gradient"], abs=1e-5)


def test_a_bundle_is_replaced_in_place_only_when_told_so(made, tmp_path):
    target = tmp_path / "own.lace"
    shutil.copytree(made.path, target)
    heads = [tiny.stack("mood", {"mood": 3})]
    with pytest.raises(BundleError, match="exists already"):
        export(target, heads, out=target)
    assert "mood" in export(target, heads, overwrite=True, out=target).attributes
    assert list(tmp_path.iterdir()) == [target]


def other_head(**changes):
    return replace(tiny.stack("smile", {"smile": 2}), **changes)


@pytest.mark.parametrize(
    ("heads", "options", "message"),
    [
        ([other_head(), other_head(name="second")], {}, "two heads are called 'smile'"),
        ([tiny.stack("smile", {"smile": 2}, dim=24)], {}, "reads 24 numbers, but w of 'g' has 16"),
        ([tiny.stack("smile", {"smile": 2}, dim=24, space="z")], {}, "but z of 'g' has 16"),
        ([], {"precision": "fp8"}, "precision is 'fp8'; expected one of: fp32, fp16, bf16"),
        ([], {"noise": "random"}, "noise is 'random'"),
        ([], {"truncation": float("nan")}, "truncation is nan"),
        ([], {"guidance": 0.0}, "guidance is 0.0; expected a number above 0"),
        ([], {"precision": "bf16", "lowering": "convt"}, "leave lowering out"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(tmp_path, heads, options, message):
    with pytest.raises(BundleError, match=message):
        export(tiny.parts(), heads, out=tmp_path / "g.lace", name="g", **options)
    assert list(tmp_path.iterdir()) == []


def test_options_of_the_generator_do_not_go_with_an_existing_bundle(made, tmp_path):
    with pytest.raises(BundleError, match="precision: cannot be changed"):
        export(made.path, [tiny.stack("mood", {"mood": 3})], out=tmp_path / "x.lace", precision="fp16")
    more = export(made.path, [tiny.stack("mood", {"mood": 3})], out=tmp_path / "more.lace", guidance=2.0)
    assert (more.generator.guidance, more.generator.truncation) == (2.0, made.generator.truncation)
    with pytest.raises(BundleError, match="pass --heads"):
        export(made.path, out=tmp_path / "x.lace")
    with pytest.raises(BundleError, match="two heads are called 'smile'"):
        export(made.path, [tiny.stack("other", {"smile": 2})], out=tmp_path / "x.lace")


def test_style_layers_of_the_paper_are_dropped_for_other_sizes(made):
    from exporter.contents import records

    stack = tiny.stack("smile", {"smile": 2})
    (attribute,) = stack.attributes
    paper = replace(stack, attributes=(replace(attribute, layers=(4, 5)),))
    facts = replace(made.generator, num_ws=18)
    assert records([paper], facts)[1][0].layers == (4, 5)
    assert records([paper], made.generator)[1][0].layers is None
    chosen = replace(stack, attributes=(replace(attribute, layers=(0, 9)),))
    with pytest.raises(BundleError, match="edits the style layers"):
        records([chosen], made.generator)


# The command line -----------------------------------------------------------------------------------------------


def test_command_line_exports_and_reports(tmp_path, monkeypatch, capsys, graph_of_made):
    parts = replace(tiny.parts(labels=3), remarks=("the centre was [estimated]",))
    monkeypatch.setattr(exporting, "load_generator", lambda path: parts)
    monkeypatch.setattr(exporting, "read_part", lambda path, **options: tiny.stack("smile", {"smile": 2}))
    (tmp_path / "faces.pkl").write_bytes(b"not read")
    monkeypatch.chdir(tmp_path)
    assert cli.main(["--gan", "faces.pkl", "--heads", "smile.pt"]) == 0
    shown = capsys.readouterr()
    assert "gradient median, worst of 2: smile" in shown.out
    assert "written: faces.lace" in shown.out
    assert "note: the centre was [estimated]" in shown.out
    assert "golden answers" in shown.err
    assert cli.main(["--gan", "faces.pkl", "--overwrite", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["attributes"] == []
    assert {check["name"] for check in facts["checks"]} == {"w", "image", "images"}
    assert Bundle("faces.lace").manifest.provenance["source"] == "faces.pkl"
    assert cli.main(["--gan", "faces.pkl"]) == 2
    assert "--overwrite" in capsys.readouterr().err


def test_command_line_errors_are_one_message_and_an_exit_code(tmp_path, monkeypatch, capsys):
    assert cli.main(["--gan", str(tmp_path / "none.pkl")]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("error:")
    assert "Traceback" not in shown
    with pytest.raises(SystemExit) as stopped:
        cli.main(["--gan", "x", "--presicion", "fp16"])
    assert stopped.value.code == 2
    assert "did you mean --precision?" in capsys.readouterr().err
    for error, code in ((ParityError("w is 1"), 1), (CheckpointError("unsafe"), 2), (ModuleNotFoundError("x"), 3)):
        monkeypatch.setattr(exporting, "load_generator", raising(error))
        assert cli.main(["--gan", str(tmp_path / "x.pkl")]) == code


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A folder with files of every sort that somebody may give by mistake."""
    monkeypatch.chdir(tmp_path)
    net = checkpoints.generator()
    (tmp_path / "net.pt").write_bytes(checkpoints.rosinality_file(net))
    for name, options in (("smile", {}), ("wide", {"widths": (7, 5, 4, 3)}), ("hat-fur", {"logits": 4})):
        (tmp_path / f"{name}.pt").write_bytes(checkpoints.torch_bytes(checkpoints.lace_head(**options)[0]))
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "diary").write_text("x")
    (tmp_path / "text").write_text("x")
    (tmp_path / "empty").write_text("")
    (tmp_path / "bundle.lace").mkdir()
    (tmp_path / "bundle.lace" / "manifest.json").write_text("{}")
    os.symlink("loop", tmp_path / "loop")
    os.mkfifo(tmp_path / "pipe")
    np.save(tmp_path / "matrix.npy", np.ones((2, 6)))
    (tmp_path / "deep.json").write_text("[" * 100_000)
    (tmp_path / "latin.json").write_bytes(b"\xff\xfe{}")
    labels = {"list": [1], "range": {"smile": {"range": 5}}, "one": {"smile": {"classes": ["a"]}}, "layers": {
        "smile": {"layers": ["a"]}}, "far": {"smile": {"layers": [99]}}, "none": {"smile": {"layers": []}}, "escape": {
        "smile": ["no", "\x1b[31m"]}, "blank": {"smile": ["no", ""]}, "number": {"smile": 3}, "other": {
        "smail": ["a", "b"]}, "twice": {"smile": ["a", "a"]}, "word": {"smile": {"sigma": "wide"}}}
    for name, content in labels.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    return tmp_path


SMILE = "--gan net.pt --heads smile.pt "


@pytest.mark.parametrize(("line", "message"), [
    ("--gan nowhere.pt", "no file nowhere"), ("--gan folder", "is a folder"), ("--gan empty", "empty is empty"),
    ("--gan text", "a text file"), ("--gan ''", "the name of the checkpoint is empty"), ("--gan .", "is empty"),
    ("--gan /", "is a folder"), ("--gan loop", "no file loop"), ("--gan pipe", "not an ordinary file"),
    ("--gan bundle.lace", "is a bundle already"), ("--gan bundle.lace --heads smile.pt", "manifest"),
    ("--gan smile.pt", "give it as a head"), (f"--gan {'x' * 300}", "cannot be called"),
    ("--gan net.pt --heads nowhere", "no file nowhere"), ("--gan net.pt --heads net.pt", "state_dict"),
    ("--gan net.pt --heads wide.pt", "reads 7 numbers, but w of 'net' has 6"),
    ("--gan net.pt --heads hat-fur.pt", "--labels FILE"), ("--gan net.pt --heads folder", "is a folder"),
    ("--gan net.pt --heads ''", "is empty"), ("--gan net.pt --heads matrix.npy", "shape (2, 6)"),
    ("--gan net.pt --heads smile.pt smile.pt", "two heads are called 'smile'"),
    ("--gan net.pt --out folder", "exists already"), ("--gan net.pt --out text", "exists already"),
    ("--gan net.pt --out text/x.lace", "cannot be written"), ("--gan net.pt --out loop", "leads nowhere"),
    ("--gan net.pt --out ''", "exists already"), ("--gan net.pt --out /", "exists already"),
    (f"--gan net.pt --out {'x' * 300}", "cannot be called"), ("--gan net.pt --out 'a\0b'", "cannot be called"),
    ("--gan net.pt --out folder --overwrite", "never overwritten"),
    ("--gan net.pt --truncation nan", "truncation is nan"), ("--gan net.pt --truncation -1", "truncation is -1"),
    ("--gan net.pt --truncation 1e400", "truncation is inf"), ("--gan net.pt --guidance 0", "guidance is 0"),
    ("--gan net.pt --guidance nan", "guidance is nan"), ("--gan net.pt --name ''", "the name is ''"),
    (f"--gan net.pt --name {'x' * 300}", "the name is"), ("--gan net.pt --name '\x1b[31m'", "the name is"),
    ("--gan net.pt --tensorrt sm90", "sm90"), ("--gan net.pt --tensorrt nope", "nope"),
    (SMILE + "--labels nowhere.json", "cannot read the labels"), (SMILE + "--labels folder", "cannot read the labels"),
    (SMILE + "--labels empty", "no JSON"), (SMILE + "--labels deep.json", "no JSON"),
    (SMILE + "--labels latin.json", "no JSON"), (SMILE + "--labels loop", "cannot read the labels"),
    (SMILE + "--labels list.json", "must be a JSON object"), (SMILE + "--labels range.json", "wrong sigma, range"),
    (SMILE + "--labels one.json", "shares out: smile 1"), (SMILE + "--labels layers.json", "wrong sigma, range"),
    (SMILE + "--labels far.json", "edits the style layers"), (SMILE + "--labels none.json", "empty list of layers"),
    (SMILE + "--labels escape.json", "not a printable text"), (SMILE + "--labels blank.json", "not a printable text"),
    (SMILE + "--labels number.json", "must be \"value\""), (SMILE + "--labels other.json", "did you mean 'smile'"),
    (SMILE + "--labels twice.json", "repeat a name"), (SMILE + "--labels word.json", "wrong sigma"),
])
def test_B15_what_cannot_be_exported_is_one_sentence_before_the_work(files, capsys, monkeypatch, line, message):
    def too_late(*arguments, **options):
        raise AssertionError("the synthesis is exported already")

    monkeypatch.setattr(exporting, "export_synthesis", too_late)
    before = sorted(path.name for path in files.iterdir())
    try:
        code = cli.main(shlex.split(line))
    except SystemExit as stopped:  # by argparse
        code = stopped.code
    assert code == 2
    shown = capsys.readouterr().err
    assert message in shown
    assert shown.count("error:") == 1
    assert sorted(path.name for path in files.iterdir()) == before


def test_B15_names_with_brackets_are_text_in_the_report(files, capsys, graph_of_made, monkeypatch):
    monkeypatch.setattr(exporting, "load_generator", lambda path: tiny.parts(labels=3))
    (files / "brackets.json").write_text(json.dumps({"smile": ["[/x]", "[red]"]}))
    np.save(files / "smile_boundary.npy", np.ones((1, 16)))
    line = "--gan net.pt --heads smile_boundary.npy --labels brackets.json --name [/bold]"
    assert cli.main(shlex.split(line)) == 0
    shown = capsys.readouterr().out
    assert "[/x], [red]" in shown
    assert "[/bold]: stylegan2" in shown


@pytest.mark.parametrize("package", cli.PACKAGES)
def test_C9_a_package_that_is_missing_is_told_before_the_work(files, capsys, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr(exporting, "load_generator", raising(AssertionError("the work began")))
    assert cli.main(["--gan", "net.pt"]) == 3
    assert f"the package {package!r} is missing; install it with: pip install" in capsys.readouterr().err


def test_C9_the_extra_for_the_export_holds_every_package_of_it():
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    names = {re.match(r"[\w-]+", line)[0] for line in extras["export"] + extras["cpu"]}
    assert "lace-engine[cpu]" in extras["export"]
    assert set(cli.PACKAGES) <= names


def raising(error):
    def load(path):
        raise error

    return load
