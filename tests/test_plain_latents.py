"""Plain latents: truncation is in the draw, the class stands behind z, and no mapping keeps |z|."""

import logging
from statistics import NormalDist

import numpy as np
import pytest

import engine.sampler
from engine import Request, RequestError, Sampler, Status
from engine.prior import EDGE, StandardNormal, TruncatedNormal, prior_of, restore, split, truncate
from engine.solvers.stochastic import Langevin
from tests import test_native
from tests.test_mappings import opened
from tests.worlds import random_world

pytestmark = test_native.pytestmark
DIM, LABELS = 24, 3


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Without a mapping, of three classes, with sharp heads."""
    path = tmp_path_factory.mktemp("plain") / "w.lace"
    return random_world(path, dim=DIM, layers=0, normalise=False, labels=LABELS, sharp=True, z_head=True, graphs=True)


# --- the draw ---------------------------------------------------------------------------------------------------------


def test_truncation_is_the_exact_function_from_a_normal_to_a_truncated_one():
    """Against the quantiles of Python's own normal distribution."""
    normal, noise = NormalDist(), np.random.default_rng(0).standard_normal(2000)
    low, share = normal.cdf(-EDGE), normal.cdf(EDGE) - normal.cdf(-EDGE)
    exact = [normal.inv_cdf(low + share * normal.cdf(x)) for x in noise]
    np.testing.assert_allclose(truncate(noise), exact, atol=1e-10)
    np.testing.assert_allclose(restore(truncate(noise)), noise, atol=1e-4)
    assert truncate(np.array([-40.0, 0.0, 40.0])) == pytest.approx([-EDGE, 0.0, EDGE])


def test_psi_1_is_the_normal_itself_and_less_is_that_much_of_the_truncated_one():
    noise = np.random.default_rng(1).standard_normal((4000, 8)).astype(np.float32)
    prior, psi = TruncatedNormal(8), np.repeat([[1.0], [0.5], [0.25], [0.0]], 1000, axis=0)
    z = prior.push(noise, psi).reshape(4, 1000, 8)
    assert np.array_equal(z[0], noise[:1000])
    assert np.abs(z[1]).max() <= 1
    assert np.abs(z[2]).max() <= 0.5
    assert not z[3].any()
    assert z[1].std() == pytest.approx(0.5 * 0.8796, rel=0.02)  # of a normal truncated to [-2, 2]
    assert z.dtype == np.float32
    np.testing.assert_allclose(prior.pull(prior.push(noise, psi), psi)[:3000], noise[:3000], atol=2e-3)


def test_lengths_beyond_the_farthest_are_rare_and_lengths_just_below_are_not():
    prior, noise = TruncatedNormal(100), np.random.default_rng(2).standard_normal((20_000, 100))
    for psi in (1.0, 0.5):
        lengths = np.linalg.norm(prior.push(noise, psi), axis=1)
        limit = prior.farthest(np.array([[psi]]))[0]
        assert (lengths > limit).mean() < 1e-3
        assert (lengths > 0.9 * limit).mean() > 1e-3


def test_a_generator_with_a_mapping_keeps_its_truncation_and_its_draw(tmp_path):
    mapped = random_world(tmp_path / "w.lace", dim=8).generator
    assert isinstance(prior_of(mapped), StandardNormal)
    assert split(mapped, 0.7) == (1.0, 0.7)


# --- sampling ---------------------------------------------------------------------------------------------------------


def test_a_plain_w_is_the_truncated_z_and_behind_it_the_class(world):
    sampler = Sampler(world, runtime="native", truncation=0.5)
    for sample in sampler.solve([Request(seed=seed, label=seed % LABELS) for seed in range(6)]):
        assert sample.z is not None
        assert np.abs(sample.z).max() <= 1
        np.testing.assert_allclose(sample.w, [*sample.z, *np.eye(LABELS)[sample.seed % LABELS]], atol=1e-6)


def test_the_default_truncation_is_that_of_the_request_and_its_own_latent_is_left_alone(world):
    z = np.full(DIM, 1.5, np.float32)
    sampler = Sampler(world, runtime="native", truncation=0.1)
    wide, own = sampler.solve([Request(seed=1, label=0, truncation=1.0), Request(z=z, label=0)])
    assert np.abs(wide.z).max() > 1
    np.testing.assert_array_equal(own.z, z)


@pytest.mark.parametrize("psi", [-0.1, 1.2])
def test_a_truncation_that_no_draw_has_is_refused(world, psi):
    with pytest.raises(RequestError, match=r"expected 0 to 1, because this generator takes its latent as it is"):
        Sampler(world, runtime="native").solve(Request(truncation=psi, label=0))


def test_a_w_that_holds_the_class_is_no_start(world):
    with pytest.raises(RequestError, match=r"a request begins with z= and label="):
        Sampler(world, runtime="native").solve(Request(w=np.zeros(DIM + LABELS, np.float32)))
    with pytest.raises(RequestError, match=r"give each Request a label"):
        Sampler(world, runtime="native").solve(Request())


CONDITIONS = ("smile & ~glasses", "colour=c2 | smile", "yaw>0.5", "shape & smile", "smile & near(0.04)", None)


@pytest.mark.parametrize("runtime", ["native", "onnxruntime", "cuda"])
def test_every_runtime_solves_a_conditional_plain_generator_as_the_twin(world, runtime, monkeypatch):
    wanted = [Request(condition, seed=i, label=i % LABELS) for i, condition in enumerate(CONDITIONS)]
    settings = {"solver": "gauss-newton", "truncation": 0.8}
    expected = Sampler(world, runtime="numpy", **settings).solve(wanted)
    with opened(world, runtime) as opened_runtime:
        monkeypatch.setattr(engine.sampler, "open_runtime", lambda *_, **__: opened_runtime)
        found = Sampler(world, **settings).solve(wanted)
    assert {sample.status for sample in found} == {Status.DONE}
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a.w[DIM:], np.eye(LABELS)[a.request.label])
        assert abs(a.energy - b.energy) < 1e-2 * (1 + abs(b.energy))


@pytest.mark.parametrize("runtime", ["native", "onnxruntime", "numpy"])
def test_the_posterior_draws_from_the_truncated_prior(world, runtime):
    requests = [Request("smile", seed=seed, label=seed % LABELS, confidence=0.8) for seed in range(12)]
    samples = Sampler(world, runtime=runtime, truncation=0.5).solve(requests)
    assert sum(sample.exact for sample in samples) > 6
    for sample in samples:
        if sample.status == Status.DONE:
            assert np.abs(sample.z).max() <= 1
            assert np.exp(-sample.energy) > 0.8
            np.testing.assert_allclose(sample.w[:DIM], sample.z, atol=1e-6)


def test_rows_that_no_candidate_serves_walk_in_the_truncated_prior(tmp_path):
    """A rare wish: rows are brought nearer by the flow and walk from there, and stay where latents can be."""
    world = random_world(tmp_path / "w.lace", dim=DIM, layers=0, normalise=False, sharp=True, more=3)
    wish = " & ".join(f"more{i}" for i in range(3)) + " & smile & glasses"
    samples = Sampler(world, runtime="native", truncation=0.6).solve([Request(wish, seed=seed) for seed in range(8)])
    walked = [sample for sample in samples if sample.status == Status.DONE and not sample.exact]
    assert walked
    assert max(np.abs(sample.z).max() for sample in walked) <= 1.2 + 1e-6


def test_a_flow_that_leaves_the_prior_says_so_once(world, caplog):
    def solve(guidance):
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="engine.solving"):
            Sampler(world, runtime="native", solver="gauss-newton").solve(
                [Request("yaw=9", seed=seed, label=0, guidance=guidance) for seed in range(4)])
        return [record.getMessage() for record in caplog.records]

    (message,) = solve(1000.0)
    assert "a row ended where this generator's prior hardly reaches" in message
    assert not solve(1e-3)


def test_langevin_dynamics_stays_near_the_truncated_prior(world):
    """Its score is that of the truncated draw: without a condition |z| does not grow to that of N(0, I)."""
    sampler = Sampler(world, runtime="native", solver=Langevin(steps=200, rate=0.01, noise=0.1), truncation=0.25)
    samples = sampler.solve([Request("smile", seed=seed, label=0, guidance=1e-3) for seed in range(4)])
    assert max(np.linalg.norm(sample.z) for sample in samples) < 0.6 * np.sqrt(DIM)
