"""The solver ``posterior``: the definition's samples, on every runtime, whatever the neighbours."""

import numpy as np
import pytest

from engine import Request, RequestError, Sampler, SolveError, Status, parse
from engine.reference import posterior as definition
from engine.reference.field import layers
from engine.reference.worlds import BundleWorld, Stack, Wish
from engine.solvers.posterior import Posterior
from engine.tape import lower_crisp
from tests.worlds import random_world

CONDITIONS = ("smile", "~glasses & age>0.4", "smile | colour=c1", "colour=c2 & smile & ~glasses", "age=0.5")
RUNTIMES = ("native", "onnxruntime", "numpy")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return random_world(tmp_path_factory.mktemp("sharp") / "b", dim=24, layers=2, graphs=True, sharp=True)


def requests(count: int = 6) -> list[Request]:
    return [Request(text, seed=seed) for seed in range(count) for text in CONDITIONS]


def facts(samples):
    return [(s.status, s.exact, s.candidates, s.corrections) for s in samples]


def assert_same_bits(found, expected):
    assert facts(found) == facts(expected)
    for a, b in zip(found, expected, strict=True):
        assert np.array_equal(a.z, b.z)
        assert np.array_equal(a.w, b.w)
        assert a.energy == b.energy


def reference(world, request: Request) -> definition.Ends:
    """One row by the definition, without what leads far rows nearer."""
    stacks = {a.name: Stack(layers(world.field, f"head.{a.head}.sharp"), a.columns) for a in world.attributes.values()}
    tolerances = {a.name: a.tolerance for a in world.attributes.values() if a.tolerance}
    tape = lower_crisp(request.expression, world.attributes, tolerances)
    made = BundleWorld(world.field, stacks, [Wish(tape, 0.7)], world.generator.z_dim)
    return definition.sample(made, [request.seed], definition.Settings(0.9))


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_it_is_the_default_and_gives_the_samples_of_the_definition(world, runtime):
    samples = Sampler(world, runtime=runtime).solve(requests())
    assert {sample.exact for sample in samples} == {True, False}
    for sample in samples:
        assert sample.status in (Status.DONE, Status.NOT_ENTERED)
        if sample.exact:
            ends = reference(world, sample.request)
            assert ends.exact[0]
            assert sample.candidates == ends.candidates[0]
            assert np.allclose(sample.z, ends.x[0], atol=1e-6)
            assert sample.energy == pytest.approx(-ends.log_p[0], abs=1e-4)
            assert sample.energy < -np.log(0.9)


def test_runtimes_agree_but_for_rounding(world):
    found = [Sampler(world, runtime=runtime).solve(requests()) for runtime in RUNTIMES]
    for other in found[1:]:
        same = [a == b for a, b in zip(facts(found[0]), facts(other), strict=True)]
        assert np.mean(same) > 0.9  # a candidate at the very edge may be taken by one and refused by another


@pytest.mark.parametrize("strength", [{"confidence": 0.9}, {"guidance": 6.0}], ids=str)
@pytest.mark.parametrize("settings", [{"capacity": 3}, {"threads": 2}, {"capacity": 1, "threads": 1}], ids=str)
def test_a_row_does_not_know_its_neighbours(world, settings, strength):
    """Nor how much its waves try at once, which goes by how many rows are left."""
    expected = Sampler(world, runtime="native", threads=1, **strength).solve(requests())
    assert sum(sample.corrections > 0 for sample in expected) >= 6
    sampler = Sampler(world, runtime="native", **{"threads": 1} | settings | strength)
    assert_same_bits(sampler.solve(requests()), expected)
    assert_same_bits([sampler.solve(request)[0] for request in requests()[::7]], expected[::7])


def test_service_and_stream_give_the_same_bits(world, monkeypatch):
    monkeypatch.setattr(Sampler, "render", lambda self, samples: list(samples))
    with Sampler(world, runtime="native", threads=1) as sampler:
        expected = sampler.solve(requests(2))
        assert_same_bits([future.result(30) for future in map(sampler.submit, requests(2))], expected)
        streamed = {(s.seed, str(s.condition)): s for s in sampler.stream(requests(2))}
        assert_same_bits([streamed[s.seed, str(s.condition)] for s in expected], expected)


def test_a_row_that_does_not_enter_ends_as_the_flow_leaves_it(world):
    wish = "colour=c0 & colour=c1"  # nobody is sure of both
    found = Sampler(world, runtime="native").solve(wish, range(3))
    flow = Sampler(world, runtime="native", solver="gauss-newton").solve(wish, range(3))
    for a, b in zip(found, flow, strict=True):
        assert a.status == Status.NOT_ENTERED
        assert not a.exact
        assert a.candidates == 64
        assert np.array_equal(a.z, b.z)
        assert a.energy == pytest.approx(b.energy)


def test_what_it_cannot_serve_takes_the_flow_unless_it_was_named(world, tmp_path):
    z = np.zeros(24, np.float32)
    plain = random_world(tmp_path / "b", dim=24, layers=2, graphs=True)
    for request, bundle in ((Request("smile", z=z), world), (Request("smile & near(0.1)"), world),
                            (Request("smile"), plain)):
        expected = Sampler(bundle, solver="gauss-newton").solve(request)[0]
        found = Sampler(bundle).solve(request)[0]
        assert np.array_equal(found.z, expected.z)
        assert found.candidates == 0
        with pytest.raises(RequestError, match="'posterior' cannot serve this request, because"):
            Sampler(bundle, solver="posterior").solve(request)
    assert Sampler(world, solver="posterior").solve("smile", 1)[0].exact
    assert Sampler(world, steps=4).solve("smile", 1)[0].steps == 4  # a setting of the flow names it


def test_strength_is_a_confidence_or_a_guidance(world):
    sampler = Sampler(world, confidence=0.5)
    energies = [max(s.energy for s in sampler.solve([Request("smile", seed=i, confidence=c) for i in range(16)]))
                for c in (None, 0.99)]
    assert energies[0] < -np.log(0.5)
    assert energies[1] < -np.log(0.99)
    guided = Sampler(world, guidance=2).solve("smile", range(64))
    assert max(s.energy for s in guided) > -np.log(0.9)
    for wrong in ({"confidence": 0.9, "guidance": 2.0}, {"confidence": 1.5}, {"confidence": 0.9, "solver": "dopri5"},
                  {"confidence": 0.9, "logic": "lace"}, {"solver": Posterior(), "steps": 3}):
        with pytest.raises(SolveError):
            Sampler(world, **wrong)
    with pytest.raises(RequestError, match="give one of them"):
        Request("smile", confidence=0.9, guidance=2.0)
    with pytest.raises(RequestError, match="the sampler takes the flow"):
        Sampler(world, solver="gauss-newton").solve(Request("smile", confidence=0.9))


def test_evidence_says_how_rare_a_wish_is(world):
    sampler = Sampler(world, runtime="native")
    exact = [sample.candidates for sample in sampler.solve("smile & ~glasses", range(400)) if sample.exact]
    found = sampler.evidence("smile & ~glasses")
    assert found.one_in == pytest.approx(np.mean(exact), rel=0.2)
    with pytest.raises(RequestError, match="no evidence"):
        sampler.evidence("smile & near(1)")


def test_edits_keep_to_the_flow(world):
    sampler = Sampler(world, runtime="native")
    sampler.render = lambda samples: list(samples)
    before = sampler.solve("smile", range(3))
    after = sampler.edit(before, parse("glasses"))
    assert {sample.candidates for sample in after} == {0}
