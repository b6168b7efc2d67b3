"""lace-eval with a judge that anybody made, on a bundle that is none of the demonstration world."""

import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from engine.bundle import Attribute
from engine.classifier import file_hash
from engine.cli.console import BAD_INPUT, OK
from engine.grammar import parse
from exporter.exporting import export
from lace_evaluation import cli as cli_eval
from lace_evaluation import world
from lace_trainer import judges
from tests import tiny
from tests.classifiers import linear, write_spec
from tests.evaluation import made_once
from tests.test_suites import quick  # noqa: F401 - a fixture

CLASSES = {"tint": ("green", "red"), "shade": ()}


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    """A bundle with two heads of its own, and a judge that knows both and a third attribute."""
    folder = tmp_path_factory.mktemp("foreign")
    stacks = []
    for name, classes in CLASSES.items():
        stack = tiny.stack(name, {name: len(classes) or 1})
        stacks.append(replace(stack, attributes=(replace(stack.attributes[0], classes=classes),)))
    bundle = export(tiny.parts(), stacks, out=folder / "foreign.lace")
    path = linear(folder / "judge.onnx", np.array([[20.0, 1.0], [-20.0, 1.0], [0.0, 1.0]]), np.array([0.0, 0.0]))
    write_spec(path, {"tint": {"output": "y", "columns": [0, 1], "activation": "sigmoid", "classes": ["green", "red"]},
                      "shade": {"output": "y", "columns": [1, 2], "kind": "value", "scale": 0.33},
                      "other": {"output": "y", "columns": [0, 1], "activation": "sigmoid"}})
    return bundle, path


def evaluate(foreign, *options):
    return cli_eval.main([str(foreign[0].path), "--judge", str(foreign[1]), "--threads", "1", *options])


def test_the_suites_of_any_bundle_with_any_judge(foreign, quick, tmp_path, capsys):  # noqa: F811
    out = tmp_path / "out"
    assert evaluate(foreign, "--suite", "all", "--count", "4", "--out", str(out)) == OK
    facts = json.loads((out / "report.json").read_text())
    assert list(facts["suites"]) == list(cli_eval.EVERYWHERE)
    assert facts["judge"]["hash"] == file_hash(foreign[1])
    assert facts["identity"]["kind"] == "the judge's features"
    conditional = facts["suites"]["conditional"]
    assert conditional["reference"] == "fresh plain samples"
    assert conditional["groups"] == {"one": [["tint"], ["shade"]], "two": [["tint", "shade"]]}
    assert "renders" not in conditional["sets"]["one"]["uniform"]
    assert conditional["sets"]["one"]["training"]["plain"]["fid"] >= 0
    assert set(facts["suites"]["editing"]["steps"]) <= set(CLASSES)
    assert {f["kind"] for f in facts["suites"]["logic"]["formulas"]} >= {"bound", "not", "and", "or"}
    text = (out / "REPORT.md").read_text()
    assert "fresh plain samples, in the judge's features" in text
    for name in (line.partition("](")[2].rstrip(")") for line in text.splitlines() if line.startswith("![")):
        with Image.open(out / name) as picture:
            assert min(picture.size) >= 80


def test_the_goal_asks_for_every_statement_that_the_judge_can_tell(foreign, capsys):
    assert evaluate(foreign, "--count", "4", "--json") == OK
    facts = json.loads(capsys.readouterr().out)
    asked = [entry["condition"] for entry in facts["conditions"]]
    assert asked[:2] == ["tint=green", "tint=red"]
    assert len(asked) == 5
    assert evaluate(foreign, "--count", "2", "--condition", "tint=red & shade=0.5", "--json") == OK


def test_what_only_the_demonstration_world_can_be_asked_is_refused(foreign, tmp_path, capsys):
    for suite in ("zero-shot", "solvers"):
        assert evaluate(foreign, "--suite", suite, "--count", "2", "--out", str(tmp_path / "x")) == BAD_INPUT
        assert "of other bundles there are: conditional, editing, logic" in " ".join(capsys.readouterr().err.split())


def test_a_judge_of_something_else_is_refused(foreign, tmp_path, capsys):
    path = write_spec(linear(tmp_path / "m.onnx", np.eye(3), np.zeros(3)),
                      {"mood": {"output": "y", "classes": ["a", "b", "c"]}})
    assert evaluate((foreign[0], path), "--count", "2") == BAD_INPUT
    assert "can tell none of the bundle's attributes" in " ".join(capsys.readouterr().err.split())
    without = linear(tmp_path / "n.onnx", np.eye(3), np.zeros(3))
    assert evaluate((foreign[0], without), "--count", "2") == BAD_INPUT
    assert "n.spec.json" in capsys.readouterr().err


def test_who_labelled_cannot_judge_in_another_form_either(tmp_path, tmp_path_factory, capsys):
    """Heads that a .safetensors classifier labelled are not judged by the same network as ONNX."""
    from lace_trainer.judges import classifier
    from lace_trainer.judges.onnx_export import export_classifier

    made = made_once(tmp_path_factory)
    path = export_classifier(classifier.load(made[1]), tmp_path / "judge.onnx", same_as=made[1])
    head = tiny.stack("smile", {"smile": 2})
    labelled = {"trained_on": {"labellers": [file_hash(judges.Path(made[1]))]}}
    attribute = replace(head.attributes[0], classes=("no", "yes"), provenance=labelled)
    bundle = export(tiny.parts(), [replace(head, attributes=(attribute,))], out=tmp_path / "b.lace")
    assert evaluate((bundle, path), "--count", "2") == BAD_INPUT
    assert "labelled the pictures" in " ".join(capsys.readouterr().err.split())


def test_what_is_asked_follows_from_what_plain_samples_show():
    attributes = {"mood": Attribute("mood", "class", "mood", (0, 3), ("sad", "very happy", "calm")),
                  "age": Attribute("age", "value", "age", (0, 1), range=(0.2, 0.9))}
    rng = np.random.default_rng(0)
    labels = np.stack([rng.choice(3, 1000, p=[0.2, 0.7, 0.1]), rng.uniform(0, 1, 1000)], axis=1)
    steps = world.edits(attributes, labels)
    assert steps["mood"] == ("very happy", "sad")
    assert steps["age"] == pytest.approx((0.25, 0.75), abs=0.04)
    assert not world.is_rendered(attributes)
    for _, text in world.formulas(attributes, labels):
        parse(text)
    assert [str(parse(text)) for text in world.singles(attributes)][1] == 'mood="very happy"'
    law = world.plain_law(list(attributes), labels)(rng, 4000)
    np.testing.assert_allclose(np.bincount(law["mood"].astype(int)) / 4000, [0.2, 0.7, 0.1], atol=0.05)
