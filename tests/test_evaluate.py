"""lace-eval: intervals, scoring, what it asks and refuses, and one run from end to end."""

import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from engine.bundle import sha256
from engine.cli.console import BAD_INPUT, OK
from engine.condition import attr
from engine.errors import LaceError
from engine.grammar import parse
from engine.tape import lower
from lace_evaluation import cli as cli_eval
from lace_evaluation.goal import Result, Score, as_logits, score, summarise
from lace_evaluation.questions import CONDITIONS, asked, check_judge, default_conditions, statements
from lace_evaluation.statistics import wilson
from lace_trainer.attributes import Attribute
from lace_trainer.faces import ATTRIBUTES
from tests import tiny
from tests.evaluation import made_once, world_head

SMILE, AGE = Attribute("smile", "class", ("no", "yes")), Attribute("age", "value")
HAIR = Attribute("hair", "class", ("black", "blond", "red"))


class Fake:
    """A judge of three attributes, whose labels are given."""

    attributes = (SMILE, AGE, HAIR)
    by_name = {a.name: a for a in attributes}  # noqa: RUF012


@pytest.mark.parametrize(("hits", "count", "low", "high"), [
    (5, 10, 0.2366, 0.7634), (0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (81, 263, 0.2553, 0.3662),
])
def test_wilson_intervals_are_those_of_the_literature(hits, count, low, high):
    assert wilson(hits, count) == pytest.approx((low, high), abs=5e-5)


def test_statements_are_what_must_all_hold():
    condition = parse("2 * (smile & ~hat) & age=0.5 & (bald | beard) & smile & near(0.04) & keep(width)")
    assert [str(s) for s in statements(condition)] == ["smile", "~hat", "age=0.5", "bald | beard"]
    assert asked(condition) == ("smile", "hat", "age", "bald", "beard")


def test_scores_of_labels_made_by_hand():
    seen = as_logits(Fake.attributes, np.array([[1, 0.50, 2], [1, 0.65, 2], [0, 0.40, 1], [1, 0.45, 2]], np.float32))
    plain = as_logits(Fake.attributes, np.array([[0, 0.0, 2], [1, 1.0, 0]], np.float32))
    smile, age, red = (score(parse(t), Fake.by_name, seen, seen, plain) for t in ("smile", "age=0.5", "hair=red"))
    assert (smile.rate, smile.plain, smile.error, smile.met) == (0.75, 0.5, None, False)
    assert (smile.low, smile.high) == wilson(3, 4)
    assert age.error == pytest.approx((0 + 0.15 + 0.1 + 0.05) / 4)
    assert age.acc == pytest.approx(0.925)
    assert (age.rate, age.plain_error, age.met) == (0.75, 0.5, True)
    assert (red.rate, red.plain) == (0.75, 0.5)
    assert score(parse("smile & age=0.5 & hair=red"), Fake.by_name, seen, seen, plain).rate == 0.5
    assert score(parse("~smile | age>0.6"), Fake.by_name, seen, seen, plain).rate == 0.5


def test_the_summary_counts_classes_and_values_apart_and_lists_what_was_missed():
    def scored(statement, rate, error=None):
        return Score(statement, rate, 0, 1, error, 1, 0, None if error is None else 0.3)

    def result(condition, *scores):
        return Result(condition, len(scores), 10, scores, scored(condition, 0.5), 0.1, 10, 12, 0, {"solve": 1})

    one, two = summarise([result("smile", scored("smile", 1.0)), result("hat", scored("hat", 0.9)),
                          result("hat & age=0.5", scored("hat", 0.97), scored("age=0.5", 0.6, 0.2))])
    assert (one.attributes, one.conditions, one.least_acc, one.mean_acc) == (1, 2, 0.9, 0.95)
    assert (one.mean_error, one.missed) == (None, ("hat",))
    assert (two.least_acc, two.mean_error, two.most_error) == (0.97, 0.2, 0.2)
    assert two.missed == ("age=0.5 in hat & age=0.5",)


def test_default_conditions_can_be_asked_of_the_demonstration_world():
    attributes = bundle_like()
    conditions = default_conditions(attributes)
    assert [str(parse(text)) for text in CONDITIONS] == [str(c) for c in conditions]
    assert len(set(conditions)) == len(conditions)
    assert {len(asked(c)) for c in conditions} == {1, 2, 3}
    assert {name for c in conditions for name in asked(c)} == set(attributes)
    for condition in conditions:
        assert lower(condition, attributes).columns


def test_default_conditions_stay_inside_the_range_and_the_bundle():
    some = {name: a for name, a in bundle_like().items() if name in ("age", "glasses")}
    some["age"] = replace(some["age"], range=(0.4, 0.72))
    assert [str(c) for c in default_conditions(some)] == ["glasses", "~glasses", "age=0.5", "glasses & age=0.7"]


@pytest.mark.parametrize("other", [
    Attribute("moustache", "class", ("no", "yes")), Attribute("hair", "class", ("dark", "light")),
    Attribute("age", "class", ("young", "old")), replace(tiny.stack("age", {"age": 1}).attributes[0], range=(-1, 1)),
])
def test_an_attribute_that_the_judge_does_not_know_is_refused(other):
    with pytest.raises(LaceError, match=f"cannot tell {other.name}.*it knows: smile .*--judge"):
        check_judge(Fake, {other.name: other}, [other.name])
    check_judge(Fake, Fake.by_name, Fake.by_name)


def bundle_like() -> dict:
    """The demonstration world's attributes as a bundle has them."""
    return {a.name: replace(h, classes=a.classes) for a in ATTRIBUTES
            for h in tiny.stack(a.name, {a.name: len(a.classes) or 1}).attributes}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return made_once(tmp_path_factory)


def run(made, *options: str) -> int:
    return cli_eval.main([str(made[0].path), "--judge", made[1], "--threads", "1", "--count", "3", *options])


def test_a_run_writes_a_report_and_contact_sheets(made, tmp_path, capsys):
    out = tmp_path / "judged"
    texts = ["smile", "age=0.5", "smile & ~glasses & age>0.5", "hat | bald"]
    assert run(made, "--out", str(out), "--condition", *texts) == OK
    assert "summary of 3 pictures" in capsys.readouterr().out
    names = ["one-attribute.png", "report.json", "report.md", "three-attributes.png", "two-attributes.png"]
    assert sorted(path.name for path in out.iterdir()) == names
    facts = json.loads((out / "report.json").read_text())
    assert (facts["bundle"], facts["judge"]["hash"]) == (made[0].hash, sha256(made[1]))
    assert [c["condition"] for c in facts["conditions"]] == texts
    assert [s["statement"] for s in facts["conditions"][2]["scores"]] == ["smile", "~glasses", "age>0.5"]
    assert facts["sampler"].startswith("Sampler(")
    assert {"machine", "versions", "commit", "seconds", "left_out"} <= set(facts)
    lines = (out / "report.md").read_text().splitlines()
    assert any(line.startswith("| smile & \\~glasses & age>0.5 | \\~glasses |") for line in lines)
    assert any(line.startswith("| hat \\| bald |") for line in lines)
    with Image.open(out / "one-attribute.png") as sheet:
        assert sheet.width > 3 * 96
        assert sheet.text["Bundle"] == made[0].hash
    assert run(made, "--out", str(out), "--condition", "smile") == BAD_INPUT


def test_json_goes_to_standard_output(made, capsys):
    assert run(made, "--json", "--seed", "7", "--condition", str(attr("hat"))) == OK
    facts = json.loads(capsys.readouterr().out)
    assert (facts["seed"], facts["count"], facts["summary"][0]["conditions"]) == (7, 3, 1)
    again = facts["conditions"][0]["scores"]
    assert run(made, "--json", "--seed", "7", "--condition", "hat", "smile") == OK
    assert json.loads(capsys.readouterr().out)["conditions"][0]["scores"] == again


@pytest.mark.parametrize(("options", "message"), [
    (["--condition", "moustache"], "no attribute 'moustache'"),
    (["--condition", "near(0.1)"], "states nothing"),
    (["--judge", "nowhere.safetensors"], "cannot read the classifier"),
])
def test_what_cannot_be_judged_is_refused(made, options, message, capsys):
    assert run(made, *options) == BAD_INPUT
    assert message in " ".join(capsys.readouterr().err.split())


def test_the_labeller_of_the_heads_may_not_judge_them(made, monkeypatch, capsys):
    monkeypatch.setattr(cli_eval, "sha256", lambda path: "the labeller")
    for attribute in world_head().attributes:
        monkeypatch.setitem(made[0].attributes, attribute.name, attribute)
    opened = replace(
        next(iter(made[0].attributes.values())), provenance={"trained_on": {"labellers": ["the labeller"]}}
    )
    monkeypatch.setitem(made[0].attributes, opened.name, opened)
    monkeypatch.setattr(cli_eval, "open_sampler", lambda options: type("Opened", (), {"bundle": made[0]})())
    assert run(made) == BAD_INPUT
    assert "labelled the pictures" in " ".join(capsys.readouterr().err.split())
