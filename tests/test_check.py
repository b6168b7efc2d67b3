"""A picture classifier confirms what heads accept: delayed acceptance."""

import json
from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import truncnorm

from engine.batch import Status
from engine.check import Check, open_check
from engine.cli import sample as sample_command
from engine.cli.console import BAD_INPUT, OK
from engine.errors import ClassifierError, RequestError, SolveError
from engine.grammar import parse
from engine.reference import posterior as definition
from engine.requests import Request
from engine.sampler import Sampler
from tests.classifiers import linear, write_spec
from tests.test_posterior import Half, follows

SEEDS = range(24)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Calls a picture of the demo a smile if it is reddish: it has little to do with smiles, so it denies many."""
    path = linear(tmp_path_factory.mktemp("check") / "red.onnx", np.array([[40.0], [-40.0], [0.0]]), np.array([-4.5]),
                  size=64)
    return write_spec(path, {"smile": {"output": "y", "activation": "sigmoid"}}, input={"size": [64, 64]})


@pytest.fixture(scope="module")
def sampler():
    return Sampler("demo", threads=1)


def says_yes(model, samples):
    return model.read(np.stack([s.image for s in samples]), alone=True)[:, 1] > 0.5


def test_a_sample_is_the_first_candidate_that_heads_and_check_accept(sampler, model):
    check = sampler.open_check(model, None)
    found = sampler.sample("smile", SEEDS, check=check)
    assert says_yes(check.classifier, found).all()
    assert {s.decodes for s in found} > {1}
    for sample in found:
        assert sample.status == Status.DONE
        # One candidate after another, by hand.
        begin = 0
        for decodes in range(1, sample.decodes + 1):
            (one,) = sampler.sample([Request("smile", seed=sample.seed, candidate=begin)])
            begin += one.candidates
            assert says_yes(check.classifier, [one])[0] == (decodes == sample.decodes)
        np.testing.assert_array_equal(one.z, sample.z)
        np.testing.assert_array_equal(one.image, sample.image)
        assert begin == sample.candidates
        assert one.candidate == sample.candidate


def test_it_does_not_depend_on_neighbours_nor_on_the_way_that_it_is_asked(sampler, model):
    expected = sampler.sample("smile", SEEDS, check=model)
    few = Sampler("demo", threads=1, capacity=3, check=model)
    requests = [Request("smile", seed=seed) for seed in SEEDS]
    with few:
        submitted = [future.result(120) for future in map(few.submit, requests)]
    streamed = sorted(few.stream(requests), key=lambda s: s.seed)
    for others in (few.sample(requests[::-1])[::-1], submitted, streamed, few.solve(requests)):
        for a, b in zip(expected, others, strict=True):
            np.testing.assert_array_equal(a.z, b.z)
            assert (a.decodes, a.candidates, a.evaluations, a.status) == (
                b.decodes, b.candidates, b.evaluations, b.status)
    assert few.solve(requests[:1])[0].image is None


def test_a_row_ends_as_denied_after_max_decodes(sampler, model, tmp_path):
    path = write_spec(linear(tmp_path / "no.onnx", np.zeros((3, 1)), np.array([-9.0]), size=64),
                      {"smile": {"output": "y", "activation": "sigmoid"}}, input={"size": [64, 64]})
    found = sampler.sample("smile", range(3), check=path, max_decodes=4)
    assert {(s.status, s.decodes) for s in found} == {(Status.DENIED, 4)}
    with pytest.raises(SolveError, match="met the check's denial"):
        sampler.sample("smile", 0, check=path, max_decodes=2, strict=True)
    with Sampler("demo", threads=1, check=path, max_decodes=2) as served:
        assert served.submit(Request("smile")).result(60).status == Status.DENIED
    every = sampler.sample("smile & ~smile", 0, check=path, max_decodes=4)[0]
    assert (every.status, every.decodes) == (Status.NOT_ENTERED, 0)  # nothing that the heads accepted was denied


def test_rows_that_walk_go_on_to_another_walk(sampler, model):
    """Where no candidate is accepted, a denied row walks again from later candidates, with other noise."""
    wish = "smile & hat & beard & glasses & gender=male"
    plain = sampler.sample(wish, range(6))
    again = sampler.sample([Request(wish, seed=s.seed, candidate=s.candidates) for s in plain])
    assert any(not s.exact for s in plain)
    for a, b in zip(plain, again, strict=True):
        assert not np.array_equal(a.z, b.z)


@pytest.mark.parametrize(("bound", "fresh"), [(0.5, 64), (1.5, 1)])
def test_what_heads_and_check_accept_has_the_law_of_both(bound, fresh):
    """The heads are sure beyond ``bound`` of one coordinate, the check says yes beyond 0.3 of the other one: truncated
    normals in both, also where most rows walk. Every attempt is a new one: nothing of the one before is left."""
    world, settings = Half(bound), definition.Settings(0.5, fresh=fresh, steps=48)
    rows, first, x = np.arange(2000), np.zeros(2000, int), np.zeros((2000, 2))
    pairs = []
    while len(rows):
        ends = definition.sample(world, rows.tolist(), settings, first=first[rows])
        first[rows] += ends.candidates
        yes = ends.x[:, 0] > 0.3
        pairs += [(x[row, 0], now) for row, now in zip(rows, ends.x[:, 0], strict=True) if x[row].any()]
        x[rows] = ends.x
        rows = rows[~yes]
    assert follows(x[:, 1], truncnorm(bound, np.inf))
    assert follows(x[:, 0], truncnorm(0.3, np.inf))
    assert abs(np.corrcoef(np.array(pairs).T)[0, 1]) < 4 / len(pairs) ** 0.5
    again = definition.sample(world, [7], settings)
    np.testing.assert_array_equal(again.x, definition.sample(world, [7], settings, first=[0]).x)


def test_what_the_check_does_not_know_may_be_either(sampler, model):
    check = open_check(model, sampler.bundle.attributes, None)
    red, blue = np.zeros((2, 64, 64, 3), np.uint8)
    red[..., 0] = blue[..., 2] = 200
    pictures = np.stack([red, blue])
    for text, denied in (("smile", [False, True]), ("~smile", [True, False]), ("smile & hat", [False, True]),
                         ("smile | hat", [False, False]), ("~(smile | hat)", [True, False]),
                         ("smile & ~smile", [True, True]), ("2*smile & age>0.5", [False, True]),
                         ("(smile & age=0.3) | (~smile & hat)", [False, False])):
        condition = parse(text)
        assert check.denies([condition] * 2, pictures).tolist() == denied
        check.require(condition)


def test_classes_may_come_in_another_order(sampler, model):
    spec = model.with_name("red.spec.json")
    turned = json.loads(spec.read_text())
    turned["attributes"]["smile"] = {"output": "y", "activation": "sigmoid", "classes": ["yes", "no"]}
    other = linear(model.with_name("turned.onnx"), np.array([[-40.0], [40.0], [0.0]]), np.array([4.5]), size=64)
    other.with_name("turned.spec.json").write_text(json.dumps(turned))
    first, second = (sampler.sample("smile", range(4), check=path) for path in (model, other))
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a.z, b.z)


def test_what_cannot_be_checked_is_refused(sampler, model):
    with pytest.raises(ClassifierError, match=r"can tell nothing of hat: it knows smile"):
        sampler.sample("hat", 0, check=model)
    with pytest.raises(RequestError, match=r"check confirms samples of the posterior.*its own start"):
        sampler.sample(Request("smile", z=np.zeros(128, np.float32)), check=model)
    with pytest.raises(RequestError, match="the sampler takes the flow"):
        Sampler("demo", solver="gauss-newton").sample("smile", 0, check=model)
    with pytest.raises(SolveError, match="give check"):
        Sampler("demo", max_decodes=3)
    with pytest.raises(SolveError, match="from 1 to 1000"):
        sampler.sample("smile", 0, check=model, max_decodes=0)
    with pytest.raises(ClassifierError, match="there is no classifier"):
        sampler.sample("smile", 0, check="missing.onnx")
    with pytest.raises(RequestError, match="candidate"):
        Request("smile", candidate=-1)
    assert sampler.sample(None, 0, check=model)[0].decodes == 0  # nothing is asked


def test_a_classifier_that_means_another_thing_is_refused(sampler, tmp_path):
    path = write_spec(linear(tmp_path / "m.onnx", np.eye(3), np.zeros(3), size=64),
                      {"smile": {"output": "y", "classes": ["a", "b", "c"]}}, input={"size": [64, 64]})
    with pytest.raises(ClassifierError, match="rename it or its classes in the spec"):
        sampler.sample("smile", 0, check=path)


def test_lace_sample_checks_counts_and_draws_again_without_the_check(model, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["demo", "smile", "--count", "6", "--threads", "1", "--check", str(model), "--out", str(out)]
    assert sample_command.main(arguments) == OK
    assert "the check looked at" in capsys.readouterr().out
    document = json.loads((out / "samples.json").read_text())
    assert document["check"]["max_decodes"] == 32
    most = max(document["samples"], key=lambda s: s["decodes"])
    assert most["decodes"] > 1
    assert most["candidate"] > 0
    again = ["--again", str(out / most["file"]), "--threads", "1", "--out", str(tmp_path / "x")]
    assert sample_command.main(again) == OK
    assert sample_command.main(["demo", "smile", "--max-decodes", "3", "--out", str(tmp_path / "y")]) == BAD_INPUT
    assert "add --check MODEL.onnx" in capsys.readouterr().err


def test_costs_of_all_attempts_are_added_up(sampler, model):
    check = replace(sampler.open_check(model, None), max_decodes=5)
    assert isinstance(check, Check)
    for sample in sampler.sample("smile", SEEDS, check=check):
        assert sample.evaluations == sample.candidates + sample.corrections
        assert 1 <= sample.decodes <= 5
