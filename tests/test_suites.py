"""lace-eval --suite: what is asked, how it is counted, resuming, and a run of every suite from end to end."""

import json

import numpy as np
import pytest
from PIL import Image

from engine.bundle import sha256
from engine.cli.console import BAD_INPUT, MISSING_PACKAGE, OK
from engine.errors import LaceError
from engine.grammar import parse
from engine.requests import Request
from engine.sampler import Sampler
from engine.solvers import GaussNewton, Langevin
from lace_evaluation import OURS, SUITES, conditional, editing, logic, plots, runner, solvers, study, zero_shot
from lace_evaluation import cli as cli_eval
from lace_evaluation.exceptions import shortfalls
from lace_evaluation.goals import ahead, goals
from lace_evaluation.methods import METHODS, solved_by
from lace_evaluation.store import Cell, Store
from lace_evaluation.study import as_labels, at_end, check_world, stacked
from lace_evaluation.targets import MARGIN, Targets, draw, fixed, holds, scores, sets
from lace_trainer.faces import sample_factors
from lace_trainer.judges import identity
from tests.evaluation import Embedding, made_once, make_study, straight_world
from tests.worlds import random_world


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return made_once(tmp_path_factory)


def test_targets_are_drawn_by_group_source_and_seed(made):
    attributes = made[0].attributes
    drawn = draw("uniform", ("haircolor", "age"), attributes, 500, 0)
    assert set(drawn.values[:, 0]) == set(range(5))
    low, high = attributes["age"].range
    assert low + MARGIN * (high - low) <= drawn.values[:, 1].min() <= drawn.values[:, 1].max()
    assert drawn.values[:, 1].max() <= high - MARGIN * (high - low)
    np.testing.assert_array_equal(drawn.values, draw("uniform", ("haircolor", "age"), attributes, 500, 0).values)
    assert (draw("uniform", ("haircolor", "age"), attributes, 500, 1).values != drawn.values).any()
    condition = drawn.conditions(attributes)[0]
    assert parse(str(condition)) == condition
    again = fixed(condition, attributes, 3)
    np.testing.assert_array_equal(again.values, np.tile(drawn.values[0], (3, 1)))


def test_training_targets_have_the_law_of_the_renderer(made):
    drawn = draw("training", ("smile", "beard", "gender", "age"), made[0].attributes, 4000, 0).values
    faces = sample_factors(np.random.default_rng(1), 4000).labels[:, [2, 4, 8, 9]]
    np.testing.assert_allclose(drawn.mean(axis=0), faces.mean(axis=0), atol=0.03)
    assert not ((drawn[:, 1] == 1) & (drawn[:, 2] == 0)).mean() > 0.01  # joint, not each by itself


def test_scores_are_the_papers_accuracy(made):
    attributes = made[0].attributes
    names = list(attributes)
    labels = np.zeros((2, len(names)))
    labels[:, names.index("haircolor")] = 2, 3
    labels[:, names.index("age")] = 0.55, 2.0
    targets = Targets(("haircolor", "age"), np.array([[2, 0.5], [2, 0.5]]))
    score = scores(targets, labels, attributes)
    np.testing.assert_allclose(score, [[1, 0.95], [0, 0]])
    assert holds(targets, score, attributes).tolist() == [True, False]


def test_groups_are_those_that_the_bundle_can_serve(made, tmp_path):
    assert list(sets(made[0].attributes)) == ["one", "two", "three", "all"]
    assert list(sets(straight_world(tmp_path / "straight").attributes)) == ["one"]
    assert list(sets(random_world(tmp_path / "random").attributes)) == ["one", "two", "three", "all"]
    with pytest.raises(LaceError, match="need heads on w"):
        check_world(random_world(tmp_path / "z", z_head=True))


def test_energies_of_foreign_latents_are_those_of_the_sampler(made):
    sampler = Sampler(made[0], threads=1)
    wanted = ("haircolor=red & age=0.4", "~smile | hat & yaw>0.3", "gender=male & 0.2<pitch<0.7")
    samples = sampler.solve([Request(text, seed=i) for i, text in enumerate(wanted)])
    np.testing.assert_allclose([s.energy for s in at_end(sampler, samples)], [s.energy for s in samples], rtol=1e-5)
    labels = as_labels(stacked(sampler.measure(samples)), made[0].attributes)
    assert labels.shape == (3, 12)


def test_a_finished_cell_is_not_made_again(tmp_path):
    calls = []

    def compute() -> Cell:
        calls.append(1)
        return Cell({"acc": 0.5}, {"acc": np.arange(3)}, {"a/b": np.ones((2, 2))})

    for _ in range(2):
        cell = Store(tmp_path, {"bundle": "x"}).cell("suite/one", compute)
        assert (cell.facts["acc"], cell.rows["acc"].tolist(), cell.other["a/b"].shape) == (0.5, [0, 1, 2], (2, 2))
    assert len(calls) == 1
    Store(tmp_path, {"bundle": "y"}).cell("suite/one", compute)
    assert len(calls) == 2
    path = tmp_path / "suite/one.npz"
    path.write_bytes(path.read_bytes()[:-50])
    Store(tmp_path, {"bundle": "y"}).cell("suite/one", compute)
    assert len(calls) == 3
    with open(path, "wb") as file:  # a pickle is not read
        np.savez(file, key=Store(tmp_path, {"bundle": "y"}).key, facts="{}", **{"rows/bad": np.array([object()])})
    Store(tmp_path, {"bundle": "y"}).cell("suite/one", compute)
    assert len(calls) == 4


def test_untouched_attributes_and_branches_are_counted(made, tmp_path):
    tiny = make_study(made[0], tmp_path)
    names = list(tiny.attributes)
    before, after = np.zeros((2, 12)), np.zeros((2, 12))
    after[0, names.index("hat")] = 1  # one of seven classes, none of which is asked for
    after[0, names.index("age")], after[1, names.index("yaw")] = 0.3, 0.9
    kept, moved = editing.untouched(tiny, before, after, "yaw")
    np.testing.assert_allclose(kept, [6 / 7, 1])
    np.testing.assert_allclose(moved, [0.3 / 4, 0])
    labels = np.zeros((4, 12))
    labels[[0, 2], names.index("hat")] = 1
    labels[[1, 2], names.index("glasses")] = 1
    true, branches = logic.truth(tiny, parse("hat | glasses"), labels)
    assert true.tolist() == [True, True, True, False]
    assert logic.shares(branches) == pytest.approx({"first": 1 / 3, "second": 1 / 3, "both": 1 / 3})
    assert logic.truth(tiny, parse("hat & glasses"), labels)[1].shape == (4, 0)


def test_a_row_that_gave_up_counts_as_a_miss_and_has_no_picture_for_the_distance(made, tmp_path):
    tiny = make_study(made[0], tmp_path, count=6)
    targets = draw("training", ("age",), tiny.attributes, 6, 0)
    outcome = conditional.METHODS["plain"](tiny, tiny.requests(targets.conditions(tiny.attributes)))
    reached = np.array([1, 0, 1, 1, 1, 1], bool)
    cell = conditional.measured(tiny, targets, type(outcome)(outcome.samples, reached, 0.0))
    assert cell.rows["acc"][1] == 0
    whole = conditional.joined(tiny, "training", [cell], keep_features=True)
    seen = cell.other["features"][reached]
    assert whole.facts["fid"] == pytest.approx(tiny.near_renders(seen)["fid"])
    assert cell.rows["moved"].max() == 0


def test_verdicts_on_the_trajectory():
    def found(rms, evaluations):
        return {"error": {"rms": rms}, "evaluations": evaluations}

    def judged(ours, paper, low, high, doubt=0.01):
        difference = {"low": low, "high": high, "nearer": 0.5}
        verdict = solvers.verdict({solvers.DEFAULT: ours, solvers.PAPER: paper}, {"doubt": {"rms": doubt}}, difference)
        return verdict["near"], verdict["cheap"]

    assert judged(found(0.1, 30), found(0.2, 300), -0.15, -0.05) == (True, True)
    assert judged(found(0.1, 30), found(0.2, 300), -0.3, 0.1) == (None, True)
    assert judged(found(0.3, 31), found(0.2, 300), 0.05, 0.15) == (False, False)
    assert judged(found(0.3, 31), found(0.2, 300), 0.05, 0.15, doubt=0.5) == (None, False)
    end, exact, start = np.array([[1.0, 1.0], [2.0, 0.0]]), np.array([[1.0, 0.0], [2.0, 0.0]]), np.zeros((2, 2))
    distance = solvers.distances(end, exact, start)
    np.testing.assert_allclose(distance, [1 / np.sqrt(2.5), 0])
    assert solvers.summary(distance)["median"] == pytest.approx(distance[0] / 2)
    assert solvers.determined(np.array([0.01, 0.4])).tolist() == [True, False]
    assert solvers.determined(np.array([0.3, 0.4])).all()


def test_the_default_and_the_papers_solver_are_paired_on_rows_with_a_known_end():
    doubt, ours, paper = np.array([0.0, 0.0, 0.9, 0.0]), np.array([0.1, 0.2, 0, 0.1]), np.array([0.3, 0.3, 0, 0.05])
    rows = {"reference": {"doubt": doubt}, solvers.DEFAULT: {"distance": ours}, solvers.PAPER: {"distance": paper}}
    found = solvers.paired({f"solvers/one/{label}": Cell({}, arrays) for label, arrays in rows.items()}, "one")
    assert found["nearer"] == pytest.approx(2 / 3)
    assert found["low"] == pytest.approx(-0.2, abs=1e-6)  # the first row three times
    assert found["high"] == pytest.approx(0.05, abs=1e-6)  # the last row three times


def run(made, *options: str) -> int:
    return cli_eval.main([str(made[0].path), "--judge", str(made[1]), "--threads", "1", *options])


@pytest.fixture
def quick(monkeypatch, tmp_path):
    """Less of everything; returns an identity file for the command line."""
    monkeypatch.setattr(identity, "load", lambda path: Embedding())
    monkeypatch.setattr(study, "MOST_POOL", 40)
    monkeypatch.setattr(study, "MOST_REFERENCE", 40)
    monkeypatch.setattr(zero_shot, "MOST", 1)
    monkeypatch.setattr(logic, "FORMULAS", logic.FORMULAS[7:9])
    monkeypatch.setitem(logic.METHODS, "paper", logic.METHODS["lace"])
    monkeypatch.setattr(solvers, "EASY", 1e-2)
    monkeypatch.setattr(solvers, "HARD", 1e-2)
    some = {solvers.DEFAULT: solvers.Entry("gauss-newton", None), "langevin": solvers.Entry("l", Langevin(steps=2)),
            "gn": solvers.Entry("gauss-newton", GaussNewton(steps=2)),
            solvers.PAPER: solvers.Entry("dopri5 (paper)", solvers.SharedDopri5(0.1, 0.1), shared=True)}
    monkeypatch.setattr(solvers, "entries", lambda: some)
    asked = solvers.problems
    monkeypatch.setattr(solvers, "problems", lambda study: dict([*asked(study).items()][:1]))
    for name in ("langevin", "sde", "predictor-corrector", "dopri5 (paper)"):
        monkeypatch.setitem(conditional.METHODS, name, solved_by(Langevin(steps=2)))
    monkeypatch.setattr(conditional, "converged", solved_by(Langevin(steps=2)))
    monkeypatch.setitem(editing.METHODS, editing.PAPER, editing.free)
    file = tmp_path / "identity.safetensors"
    file.write_bytes(b"not read")
    return str(file)


def test_all_suites_from_end_to_end(made, quick, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    options = ("--identity", quick, "--count", "2", "--out", str(out))
    assert run(made, "--suite", "all", *options) == OK
    assert "goal" in capsys.readouterr().out
    facts = json.loads((out / "report.json").read_text())
    assert list(facts["suites"]) == [name for name in SUITES if name not in ("posterior", "oneshot")]  # sharp heads
    assert (facts["bundle"], facts["judge"]["hash"]) == (made[0].hash, sha256(made[1]))
    assert {"machine", "versions", "commit", "seconds", "settings", "goals"} <= set(facts)
    assert {goal["met"] for goal in facts["goals"]} <= {True, False, None}
    text = (out / "REPORT.md").read_text()
    for name in (line.partition("](")[2].rstrip(")") for line in text.splitlines() if line.startswith("![")):
        with Image.open(out / name) as picture:
            assert min(picture.size) >= 80
    assert "nan" not in text.lower().replace("nanny", "")
    monkeypatch.setattr(study.Study, "look", lambda *_, **__: pytest.fail("a finished cell was made again"))
    monkeypatch.setattr(plots, "PLOTS", dict.fromkeys(SUITES, lambda facts, folder: None))
    assert run(made, "--suite", "editing", *options) == OK  # the suites of an earlier run stay in the report
    again = json.loads((out / "report.json").read_text())
    assert again["suites"] == facts["suites"]
    assert cli_eval.main(["--compare", str(out / "report.json"), str(out)]) == OK
    assert "0 changed by more than chance" in " ".join(capsys.readouterr().out.split())


def test_goals_name_what_falls_short():
    def formula(text, rate):
        return {"formula": text, "methods": {"product": {"true": rate, "heads": 1.0}}}

    (goal,) = goals({"logic": {"formulas": [formula("hat", 0.99), formula("smile", 0.5)]}})
    assert (goal["met"], len(goal["notes"]), "`smile` 50.0%" in goal["notes"][0]) == (False, 1, True)
    single = {"cost": 1.2, "step_identity": 0.4, "single_identity": 0.5}
    (goal,) = goals({"editing": {"methods": {OURS: single}}})
    assert (goal["met"], goal["found"].startswith("1.20 times")) == (False, True)


def table(**changes: dict) -> dict:
    """Facts of a table of training targets in which ours is ahead of every baseline, but for ``changes``."""
    facts = {"acc": 0.9, "fid": 0.2, "evaluations": 100, "energy": 1.0, "moved": 1.0, "widest": 0.1, "far": 0.01,
             "ahead": {"mean": 0.05, "low": 0.04, "high": 0.06}}
    ours = {**facts, "acc": 0.95, "fid": 0.1, "evaluations": 20}
    methods = {**dict.fromkeys((conditional.RENDERS, *METHODS), facts), OURS: ours, conditional.CONVERGED: ours}
    return {name: {**made, **changes.get(name, {})} for name, made in methods.items()}


def test_every_lead_of_a_baseline_is_told_with_its_reason():
    def told(methods):
        return list(shortfalls("one", methods, {"share": 0.6, "far": 0.05}))

    assert told(table()) == []
    behind = {"acc": 0.96, "ahead": {"mean": -0.01, "low": -0.03, "high": 0.01}}
    (chance,) = told(table(sde=behind))
    assert ("may be chance" in chance.why, chance.certain) == (True, False)
    sure = {**behind, "ahead": {"mean": -0.01, "low": -0.02, "high": -0.005}}
    (flow,) = told(table(sde=sure))
    assert ("the flow itself" in flow.why, flow.certain) == (True, True)
    (solver,) = told(table(sde=sure, converged={"acc": 0.957}))
    assert "our solver's own error makes 0.0070 of the difference" in solver.why
    nearer = {"fid": 0.08, "farther": {"mean": 0.02, "low": 0.01, "high": 0.03}}
    (distance,) = told(table(langevin=nearer, ours={"widest": 0.11}))
    assert ("the flow itself" in distance.why, "0.010 of the difference" in distance.why) == (True, True)
    assert told(table(langevin={"fid": 0.096})) == []  # nearer by less than what counts as equal
    assert len(told(table(langevin=nearer, sde=sure))) == 2
    without = {name: made for name, made in table(sde=sure).items() if name != conditional.CONVERGED}
    (open_,) = told(without)
    assert (open_.why, str(open_).endswith("Why is not known")) == ("", True)


@pytest.mark.parametrize(("change", "found", "met"), [
    ({}, "everywhere", True),
    ({"sde": {"acc": 0.96, "ahead": {"mean": -0.01, "low": -0.02, "high": -0.005}}},
     "1 of 14 comparisons fall short, 1 by more than chance, each with its reason below", True),
])
def test_a_lead_of_a_baseline_needs_a_reason(change, found, met):
    facts = {"sets": {"two": {"training": table(**change)}}, "renders": {"share": 0.6, "far": 0.05}}
    goal = ahead(facts)
    assert (goal.found, goal.met) == (found, met)
    if change:
        del facts["sets"]["two"]["training"][conditional.CONVERGED]
        goal = ahead(facts)
        assert (goal.found.endswith("1 of them without a reason"), goal.met) == (True, False)


@pytest.mark.parametrize(("options", "message"), [
    (["--suite", "logic"], "give --out"),
    (["--suite", "logic", "--out", "x", "--condition", "smile"], "suite goal only"),
    (["--suite", "logic", "--out", "x", "--identity", "nowhere"], "cannot read the identity nowhere"),
    (["--compare", "a", "b"], "leave BUNDLE and --suite out"),
])
def test_bad_usage_is_told(made, options, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run(made, *options) == BAD_INPUT
    assert message in " ".join(capsys.readouterr().err.split())


def test_a_mistyped_suite_is_answered_with_the_nearest(capsys):
    with pytest.raises(SystemExit):
        cli_eval.main(["demo", "--suite", "editting"])
    assert "did you mean editing?" in capsys.readouterr().err
    assert cli_eval.main([]) == BAD_INPUT


def test_a_folder_of_something_else_is_left_alone(made, quick, tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("precious")
    options = ("--identity", quick, "--suite", "logic", "--out", str(tmp_path), "--overwrite")
    assert run(made, *options) == BAD_INPUT
    assert "choose another --out" in " ".join(capsys.readouterr().err.split())
    assert (tmp_path / "mine.txt").exists()


def test_a_missing_package_is_named(made, monkeypatch, tmp_path, capsys):
    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(runner, "import_module", missing)
    assert run(made, "--suite", "logic", "--out", str(tmp_path / "out")) == MISSING_PACKAGE
    assert "lace-engine[train]" in " ".join(capsys.readouterr().err.split())
