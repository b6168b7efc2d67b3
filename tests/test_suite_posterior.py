"""lace-eval --suite posterior: distances from the truth, the posterior on a bundle, and a run from end to end."""

import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from engine.cli.console import BAD_INPUT, OK
from engine.grammar import parse
from engine.solvers import GaussNewton, Langevin
from exporter.export import export
from exporter.heads import SharpStack
from lace_evaluation import cli, likeness, posterior, study
from lace_evaluation.methods import solved_by
from lace_evaluation.posterior_report import goals
from lace_trainer.judges import identity
from tests import tiny
from tests.evaluation import Embedding, made_once, world_head


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return made_once(tmp_path_factory)


@pytest.fixture(scope="module")
def sharp(tmp_path_factory):
    """The tiny world with a sharp stack, called calibrated, whose logits are steep."""
    stack = world_head()
    weight, bias = stack.layers[-1]
    named = tuple(replace(a, tolerance=0.2 if a.kind == "value" else None) for a in stack.attributes)
    stack = replace(stack, attributes=named, sharp=SharpStack((*stack.layers[:-1], (8 * weight, bias)), True))
    return export(tiny.parts(), [stack], out=tmp_path_factory.mktemp("sharp") / "tiny.lace")


def test_distances_of_the_truth_from_itself_are_those_of_chance(made):
    rng, attributes = np.random.default_rng(0), made[0].attributes
    features = rng.normal(size=(1600, 6)).astype(np.float32)
    same = likeness.features_likeness(features[:1000], features[1000:])
    other = likeness.features_likeness(features[:1000], features[1000:] + 1)
    assert same["fid"] == pytest.approx(same["fid_floor"], abs=0.1)
    assert same["coverage"] == pytest.approx(same["coverage_floor"], abs=0.05)
    assert other["fid"] > other["fid_floor"] + 4
    assert other["coverage"] < same["coverage"] - 0.1
    names = list(attributes)
    labels = np.zeros((3000, len(names)))
    labels[:, names.index("smile")] = rng.random(3000) < 0.3
    labels[:, names.index("age")] = rng.random(3000)
    found = likeness.labels_likeness(labels[:2000], labels[2000:], attributes, ["smile", "age"])
    moved = labels[2000:].copy()
    moved[:, names.index("smile")] = 1
    moved[:, names.index("age")] *= 0.5
    far = likeness.labels_likeness(labels[:2000], moved, attributes, ["smile", "age"])
    for name, expected in (("smile", 0.7), ("age", 0.5)):
        assert found[name]["distance"] < 3 * found[name]["chance"]
        assert far[name]["distance"] == pytest.approx(expected, abs=0.05)


def test_neighbours_are_those_of_the_definition():
    truth, samples = np.array([[0.0], [1.0], [2.0], [9.0]]), np.array([[0.5], [0.6], [30.0], [31.0]])
    found = likeness.neighbours(truth, samples, k=1)
    assert found.precision == 0.5
    assert found.coverage == 0.5  # the balls around 0 and 1
    assert found.density == (2 + 2 + 0 + 0) / 4


def test_arithmetic_is_asked_for_conjunctions_only():
    assert posterior.serves("arithmetic", parse("smile & age=0.3"))
    assert not posterior.serves("arithmetic", parse("hat | beard"))
    assert not posterior.serves("arithmetic", parse("~smile"))
    assert posterior.serves("flow", parse("hat | beard"))


def test_the_list_has_forty_conditions_of_all_kinds():
    texts = [text for texts in posterior.CONDITIONS.values() for text in texts]
    assert len(texts) == len(set(texts)) == 40
    assert all(str(parse(text)) for text in texts)


def test_the_suite_from_end_to_end(made, sharp, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(identity, "load", lambda path: Embedding())
    monkeypatch.setattr(study, "MOST_POOL", 40)
    monkeypatch.setattr(study, "MOST_REFERENCE", 40)
    some = {"single": ("beard",), "or": ("hat | glasses",), "value": ("age=0.5",)}
    monkeypatch.setattr(posterior, "CONDITIONS", some)
    for name in ("dopri5 (paper)", "langevin", "langevin (true temperature)", "predictor-corrector"):
        monkeypatch.setitem(posterior.METHODS, name, solved_by(Langevin(steps=2)))
    monkeypatch.setitem(posterior.METHODS, "flow", solved_by(GaussNewton(steps=2)))
    file = tmp_path / "identity.safetensors"
    file.write_bytes(b"not read")
    out = tmp_path / "out"
    options = ["--judge", str(made[1]), "--identity", str(file), "--threads", "1", "--suite",
               "posterior", "--count", "2", "--out", str(out)]
    assert cli.main([str(made[0].path), *options]) == BAD_INPUT
    assert "which this bundle lacks" in capsys.readouterr().err
    assert cli.main([str(sharp.path), *options]) == OK
    facts = json.loads((out / "report.json").read_text())["suites"]["posterior"]
    assert [c["condition"] for c in facts["conditions"]] == ["beard", "hat | glasses", "age=0.5"]
    assert set(facts["conditions"][1]["branches"]) == {"hat", "glasses"}
    assert facts["summaries"]["classes"]["posterior"]["conditions"] == 2
    assert facts["summaries"]["classes"]["posterior"]["ms_16"] > 0
    text = (out / "REPORT.md").read_text()
    assert "## Posterior" in text
    assert "nan" not in text.lower()
    with Image.open(out / "posterior-grids.png") as picture:
        assert picture.width > 700


def test_goals_of_the_posterior_are_those_of_its_summary():
    good = {"acc": 0.98, "least_acc": 0.92, "above": 1.0, "recall": 0.96, "coverage": 0.96, "others": 0.02,
            "chance": 0.02, "branch": 0.01, "error": 0.03, "most_error": 0.06}
    facts = {"pool": 40_000, "summaries": {"classes": {"posterior": good}, "values": {"posterior": good}}}
    assert all(met for *_, met in goals(facts))
    for name, bad in (("acc", 0.9), ("least_acc", 0.5), ("recall", 0.5), ("branch", 0.2), ("error", 0.05)):
        worse = {"classes": {"posterior": {**good, name: bad}}, "values": {"posterior": {**good, name: bad}}}
        assert sum(met is False for *_, met in goals({**facts, "summaries": worse})) == 1, name
