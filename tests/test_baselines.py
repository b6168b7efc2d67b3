"""The baselines behave: they are no straw men."""

import numpy as np
import pytest

from engine.grammar import parse
from engine.requests import Request
from engine.sampler import Sampler
from engine.solvers import TABLEAUS, RungeKutta
from lace_evaluation import baselines
from lace_evaluation.baselines import arithmetic, fit, least_squares, logistic, reject
from lace_evaluation.paper import SharedDopri5
from lace_evaluation.study import Pool, as_labels, stacked
from tests.evaluation import straight_world
from tests.worlds import linear_world


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    sampler = Sampler(straight_world(tmp_path_factory.mktemp("straight") / "bundle"), runtime="numpy")
    return sampler, make_pool(sampler, 600)


def make_pool(sampler: Sampler, count: int) -> Pool:
    seeds = 1000 + np.arange(count)
    samples = sampler.solve([Request(None, seed=int(seed)) for seed in seeds])
    logits = stacked(sampler.measure(samples))
    return Pool(seeds, np.stack([s.w for s in samples]), logits, as_labels(logits, sampler.bundle.attributes), 1e-3)


def test_linear_models_find_the_plane(straight):
    rng = np.random.default_rng(0)
    x, truth = rng.standard_normal((400, 5)), np.array([1.0, -2.0, 0.5, 0.0, 0.0])
    x -= x.mean(axis=0)
    weight, bias = least_squares(x, (x @ truth + 0.7)[:, None])
    np.testing.assert_allclose(np.append(weight, bias), [*truth, 0.7], atol=0.02)
    weight, _ = logistic(x, (x @ truth > 0)[:, None])
    assert weight[0] @ truth / np.linalg.norm(weight) / np.linalg.norm(truth) > 0.98
    planes = fit(straight[1], straight[0].bundle.attributes)
    assert {name: len(plane.weight) for name, plane in planes.items()} == {"age": 1, "smile": 1, "haircolor": 5}


def test_arithmetic_reaches_its_target_where_the_heads_are_linear(straight):
    sampler, pool = straight
    attributes = sampler.bundle.attributes
    planes = fit(pool, attributes)
    samples = sampler.solve([Request(None, seed=i) for i in range(12)])
    for text in ("smile", "~smile & age=0.8", "haircolor=red & age=0.2"):
        condition = parse(text.replace("~smile", "smile=no"))
        moved = arithmetic(sampler, planes, samples, [condition] * 12)
        labels = as_labels(stacked(sampler.measure(moved)), attributes)
        if "smile" in text:
            assert (labels[:, 1] == (0 if "~" in text else 1)).all()
        if "haircolor" in text:
            assert (labels[:, 2] == 3).mean() > 0.9
        if "age" in text:
            np.testing.assert_allclose(labels[:, 0], 0.8 if "0.8" in text else 0.2, atol=0.05)
        assert all(s.evaluations == baselines.ROUNDS and s.z is None for s in moved)


def test_conditional_arithmetic_leaves_the_rest_where_it_was(straight):
    sampler, pool = straight
    planes = fit(pool, sampler.bundle.attributes)
    samples = sampler.solve([Request(None, seed=i) for i in range(12)])
    before = sampler.measure(samples)

    def age_moved(stay):
        after = sampler.measure(arithmetic(sampler, planes, samples, [parse("smile")] * 12, stay=stay))
        return np.mean([abs(float(a["age"][0] - b["age"][0])) for a, b in zip(before, after, strict=True)])

    assert age_moved(("age",)) < 0.2 * age_moved(())


def test_rejection_takes_the_first_proposal_that_fits_and_counts_the_others(straight, monkeypatch):
    sampler, pool = straight
    pool = Pool(pool.seeds[:6], pool.w[:6], {n: v[:6].copy() for n, v in pool.logits.items()}, pool.labels[:6], 1e-3)
    pool.logits["age"][:, 0] = 0.1, 0.1, 0.7, 0.1, 0.72, 0.1
    monkeypatch.setattr(baselines, "TRIES", 4)
    requests = [Request(text, seed=i) for i, text in enumerate(("age=0.7", "age=0.7", "age=0.9", "age=0.7"))]
    samples, reached = reject(sampler, pool, requests)
    assert [s.evaluations for s in samples] == [3, 2, 4, 2]  # the third gives up at proposals 5, 0, 1, 2
    assert reached.tolist() == [True, True, False, True]
    np.testing.assert_array_equal(samples[1].w, pool.w[4])
    assert samples[0].request is requests[0]


def test_the_shared_step_agrees_with_our_dopri5_at_tight_tolerance(tmp_path):
    bundle = linear_world(tmp_path / "linear")
    requests = [Request(f"a={0.1 * i} & b=0.5", seed=i) for i in range(4)]
    shared = Sampler(bundle, runtime="numpy", solver=SharedDopri5(1e-9, 1e-9), capacity=16).solve(requests)
    ours = Sampler(bundle, runtime="numpy", solver=RungeKutta(TABLEAUS["dopri5"], 1e-9, 1e-9)).solve(requests)
    for a, b in zip(shared, ours, strict=True):
        np.testing.assert_allclose(a.z, b.z, atol=1e-6)
    assert len({s.evaluations for s in shared}) == 1
    assert len({s.evaluations for s in ours}) > 1
    loose = Sampler(bundle, runtime="numpy", solver=SharedDopri5(), capacity=16).solve(requests)
    assert loose[0].evaluations < shared[0].evaluations
