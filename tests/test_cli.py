"""lace-sample and lace-edit, called as a shell would."""

import json
import sys

import numpy as np
import pytest
from PIL import Image

from engine import Sampler, __version__
from engine.cli import edit, sample, writing
from engine.cli.console import BAD_INPUT, CHECK_FAILED, MISSING_PACKAGE, OK
from engine.runtimes.onnxruntime import Graphs
from exporter import export
from tests import tiny


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return export(tiny.parts(), tiny.heads(), out=tmp_path_factory.mktemp("cli") / "tiny.lace")


@pytest.fixture(scope="module")
def conditional(tmp_path_factory):
    """A conditional generator's field; its pictures are not what is tested."""
    heads = [tiny.stack("smile", {"smile": 2})]
    return export(tiny.parts(labels=3), heads, out=tmp_path_factory.mktemp("conditional") / "tiny.lace")


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    """Two threads that wait for each other beside other test processes are many times slower than one."""
    opening = Graphs.__init__
    monkeypatch.setattr(Graphs, "__init__", lambda self, bundle, _=0, *more: opening(self, bundle, 1, *more))


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def picture(path):
    with Image.open(path) as image:
        image.load()
    return image


def listing(folder):
    return sorted(path.name for path in folder.iterdir())


def usage_error(main, arguments, capsys) -> str:
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    assert caught.value.code == BAD_INPUT
    return capsys.readouterr().err


def complaint(main, arguments, capsys) -> str:
    """What standard error says of bad input; nothing may be on standard output."""
    assert main([str(argument) for argument in arguments]) == BAD_INPUT
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Traceback" not in captured.err
    return captured.err


def test_sample_writes_pictures_a_grid_and_a_record(bundle, out, capsys):
    code = sample.main([str(bundle.path), "smile=c1 & age=0.75", "--count", "5", "--seed", "3", "--out", str(out)])
    assert code == OK
    assert listing(out) == ["0000.png", "0001.png", "0002.png", "0003.png", "0004.png", "grid.png", "samples.json"]
    assert listing(out.parent) == ["out"]
    printed = capsys.readouterr().out
    assert "5 pictures in" in printed
    assert "smile=c1" in printed
    # 8 px pictures, enlarged to 128, three to a row, 2 px between them.
    assert picture(out / "grid.png").size == (3 * 130 - 2, 2 * 130 - 2)


def test_a_picture_says_where_it_comes_from(bundle, out):
    sample.main([str(bundle.path), "smile=c1", "--count", "2", "--seed", "7", "--truncation", "0.5", "--out", str(out)])
    first, second, grid = (picture(out / name) for name in ("0000.png", "0001.png", "grid.png"))
    people = {name: text for name, text in first.text.items() if name != "Recipe"}
    assert people == {"Software": f"lace-engine {__version__}", "Condition": "smile=c1", "Seed": "7",
                      "Truncation": "0.5", "Guidance": "1.0", "Bundle": bundle.hash}
    assert second.text["Seed"] == "8"
    assert grid.text["Seed"] == "7..8"
    again = Sampler(bundle, truncation=float(second.text["Truncation"]))
    drawn = again.sample(second.text["Condition"], int(second.text["Seed"]))[0].image
    assert np.array_equal(np.asarray(second), drawn)


def test_the_record_holds_every_sample(bundle, out):
    sample.main([str(bundle.path), "smile=c1 & age=0.75", "--count", "3", "--out", str(out)])
    body = json.loads((out / "samples.json").read_text())
    assert body["bundle"] == bundle.hash
    assert (body["runtime"], body["device"], body["precision"]) == ("native", "cpu", "fp32")
    assert f"runtime=native {body['version']}, device=cpu" in body["sampler"]
    assert [entry["seed"] for entry in body["samples"]] == [0, 1, 2]
    entry = body["samples"][1]
    assert entry["file"] == "0001.png"
    assert entry["condition"] == "smile=c1 & age=0.75"
    assert entry["status"] == "DONE"
    assert entry["truncation"] == 0.7
    assert list(entry["attributes"]) == list(bundle.attributes)
    assert sum(entry["attributes"]["hair"].values()) == pytest.approx(1, abs=1e-3)
    solved = Sampler(bundle).solve("smile=c1 & age=0.75", range(3))[1]
    assert entry["energy"] == pytest.approx(solved.energy, abs=1e-5)
    assert entry["attributes"]["age"] == pytest.approx(float(solved.logits["age"][0]), abs=1e-3)


def test_without_a_condition_the_samples_are_plain(bundle, out):
    assert sample.main([str(bundle.path), "--count", "1", "--out", str(out)]) == OK
    entry = json.loads((out / "samples.json").read_text())["samples"][0]
    assert (entry["condition"], entry["evaluations"], entry["energy"]) == (None, 0, 0.0)
    assert picture(out / "0000.png").text["Condition"] == ""
    assert picture(out / "grid.png").size == (128, 128)


def test_json_on_standard_output_is_the_record(bundle, out, capsys):
    assert sample.main([str(bundle.path), "smile=c1", "--count", "1", "--json", "--out", str(out)]) == OK
    assert json.loads(capsys.readouterr().out) == json.loads((out / "samples.json").read_text())
    arguments = [str(bundle.path), "smile=c1", "--json", "-v", "--out", str(out), "--overwrite"]
    assert edit.main(arguments) == OK
    captured = capsys.readouterr()
    assert json.loads(captured.out) == json.loads((out / "samples.json").read_text())
    assert "Sampler(" in captured.err


def test_edit_writes_the_stages_and_a_strip(bundle, out, capsys):
    assert edit.main([str(bundle.path), "smile=c1", "age=0.9", "--seed", "4", "--out", str(out)]) == OK
    assert listing(out) == ["00.png", "01.png", "02.png", "samples.json", "strip.png"]
    body = json.loads((out / "samples.json").read_text())
    assert [entry["edit"] for entry in body["samples"]] == ["start", "smile=c1", "age=0.9"]
    assert [entry["condition"] for entry in body["samples"]] == [None, "smile=c1", "age=0.9 & smile=c1"]
    assert {entry["seed"] for entry in body["samples"]} == {4}
    assert picture(out / "01.png").text["Edit"] == "smile=c1"
    assert picture(out / "strip.png").text["Bundle"] == bundle.hash
    assert picture(out / "strip.png").width == 3 * 162 - 2
    printed = capsys.readouterr().out
    assert all(name in printed for name in bundle.attributes)


def test_edit_options_change_what_is_held(bundle, out):
    arguments = [str(bundle.path), "smile=c1", "age=0.9", "--out", str(out), "--start", "hat=c1"]
    assert edit.main([*arguments, "--forget", "--near", "0", "--keep", ""]) == OK
    body = json.loads((out / "samples.json").read_text())
    assert [entry["condition"] for entry in body["samples"]] == ["hat=c1", "smile=c1", "age=0.9"]
    assert edit.main([*arguments, "--keep", "hair, tilt", "--keep-weight", "0.1", "--overwrite"]) == OK
    again = json.loads((out / "samples.json").read_text())
    assert again["samples"][2]["condition"] == "age=0.9 & smile=c1 & hat=c1"
    assert again["samples"][1]["attributes"] != body["samples"][1]["attributes"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sede", "3"], "unrecognised argument '--sede'; did you mean --seed?"),
        (["--cuont=3"], "did you mean --count?"),
        (["--solver", "dopri6"], "there is no solver 'dopri6'; did you mean dopri5?"),
        (["--runtime", "nativ"], "there is no runtime 'nativ'; did you mean native?"),
        (["--count", "1e3"], "'1e3' is not a whole number"),
        (["--threads", "-1"], "-1 is not in 0.."),
        (["--threads", "100000"], "100000 is not in 0.."),
        (["--capacity", "1000000000"], "1000000000 is not in 1..65536"),
        (["--seed", "-1"], "not in 0..2**64-1"),
        (["--count", "0"], "not a positive number"),
        (["--rtol", "nan"], "not a positive number"),
        (["--truncation", "inf"], "not a finite number"),
        (["--logic", "fuzzy"], "invalid choice"),
    ],
)
def test_bad_options_are_refused_with_a_hint(bundle, out, capsys, arguments, message):
    assert message in usage_error(sample.main, [bundle.path, "smile=c1", "--out", out, *arguments], capsys)
    assert not out.exists()


@pytest.mark.parametrize("main", [sample.main, edit.main])
@pytest.mark.parametrize(
    ("condition", "options", "message"),
    [
        ("smlie=c1", [], "there is no attribute 'smlie'; this bundle has: smile, age, hair, hat"),
        ("smlie=c1", [], "did you mean 'smile'?"),
        ("hair=c11", [], "'hair' has no class 'c11'"),
        ("smile=c1 & & hat", [], "^"),
        ("smile=c1 and hat", [], "write & for and"),
        ("age", [], "write age=0.5 or age>0.5"),
        ("smile=c1", ["--solver", "langevin", "--rtol", "0.1"], "langevin has no setting --rtol; it has: --steps"),
        ("smile=c1", ["--runtime", "numpy"], "'numpy' only solves"),
        ("smile=c1", ["--runtime", "openvino", "--device", "cuda"], "does not run on device 'cuda'"),
        ("smile=c1", ["--label", "1"], "unconditional"),
        ("smile=c1", ["--temperature", "2"], "temperature"),
    ],
)
def test_bad_input_is_one_message_and_leaves_nothing(bundle, out, capsys, main, condition, options, message):
    assert message in complaint(main, [bundle.path, condition, "--out", out, *options], capsys)
    assert listing(out.parent) == []


def test_a_typo_in_the_last_edit_is_found_before_the_first_is_solved(bundle, out, capsys, monkeypatch):
    monkeypatch.setattr(Sampler, "sample", lambda *_, **__: pytest.fail("solved"))
    assert "did you mean 'hat'?" in complaint(edit.main, [bundle.path, "smile=c1", "haat", "--out", out], capsys)


def test_seeds_do_not_run_over(bundle, out, capsys):
    arguments = [bundle.path, "--seed", 2**64 - 1, "--count", 2, "--out", out]
    assert "beyond 2**64" in complaint(sample.main, arguments, capsys)
    assert sample.main([str(bundle.path), "--seed", str(2**64 - 1), "--count", "1", "--out", str(out)]) == OK


def test_labels_are_asked_for_and_checked(conditional, out, capsys):
    base = [conditional.path, "smile=c1", "--count", 1, "--out", out]
    assert "add --label N, a class in 0..2" in complaint(sample.main, base, capsys)
    assert "--label 3 is out of range" in complaint(sample.main, [*base, "--label", 3], capsys)
    assert listing(out.parent) == []
    assert sample.main([str(argument) for argument in [*base, "--label", 2]]) == OK


@pytest.mark.parametrize("main", [sample.main, edit.main])
def test_a_foreign_folder_is_never_overwritten(bundle, out, capsys, main):
    out.mkdir()
    (out / "thesis.tex").write_text("mine")
    arguments = [bundle.path, "smile=c1", "--out", out]
    assert "exists already" in complaint(main, arguments, capsys)
    assert "never overwritten" in complaint(main, [*arguments, "--overwrite"], capsys)
    assert listing(out) == ["thesis.tex"]
    assert listing(out.parent) == ["out"]


def test_an_earlier_result_is_replaced_when_told_so(bundle, out, capsys):
    arguments = [str(bundle.path), "--count", "2", "--out", str(out)]
    assert sample.main(arguments) == OK
    capsys.readouterr()
    assert "--overwrite" in complaint(sample.main, arguments, capsys)
    assert sample.main([*arguments[:2], "1", *arguments[3:], "--overwrite"]) == OK
    assert listing(out) == ["0000.png", "grid.png", "samples.json"]


def test_an_error_while_writing_leaves_nothing(bundle, out, capsys, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writing, "save_png", full)
    said = complaint(sample.main, [bundle.path, "--count", 1, "--out", out], capsys)
    assert f"cannot write {out}: No space left on device; free some space" in said
    assert listing(out.parent) == []


def test_rows_that_did_not_arrive_are_reported(bundle, out, capsys):
    code = sample.main([str(bundle.path), "age=1e38", "--count", "2", "--out", str(out), "--seed", "5"])
    assert code == OK
    assert "2 rows met a value that is not finite: seeds [5, 6]" in capsys.readouterr().out
    statuses = [entry["status"] for entry in json.loads((out / "samples.json").read_text())["samples"]]
    assert statuses == ["NONFINITE", "NONFINITE"]


def test_a_missing_bundle_is_bad_input_and_a_missing_package_is_not(bundle, out, capsys, monkeypatch):
    assert "no bundle at" in complaint(sample.main, ["nothing.lace", "--out", out], capsys)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    for module in ("native", "onnxruntime"):
        monkeypatch.delitem(sys.modules, f"engine.runtimes.{module}", raising=False)
    assert sample.main([str(bundle.path), "--out", str(out)]) == MISSING_PACKAGE
    assert "pip install 'lace-engine[cpu]'" in capsys.readouterr().err
    assert listing(out.parent) == []


def test_exit_codes_are_documented(capsys):
    with pytest.raises(SystemExit) as caught:
        sample.main(["--help"])
    assert caught.value.code == OK
    text = capsys.readouterr().out
    assert all(str(code) in text for code in (OK, CHECK_FAILED, BAD_INPUT, MISSING_PACKAGE))
