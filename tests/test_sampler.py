"""The sampler's promises: rows do not know their neighbours, failures are values, calls are checked."""

import sys
from dataclasses import replace

import numpy as np
import pytest

from engine import BackendError, ConditionError, LaceError, Request, Sampler, SolveError, Status, attr, keep, near
from engine.bundle import Attribute, GeneratorFacts, Head
from engine.reference.noise import normals
from engine.runtimes import RUNTIMES
from engine.runtimes.onnxruntime import Graphs
from exporter import export
from tests import tiny
from tests.worlds import head_tensors, mapping_tensors, random_world, write_bundle

DIM = 32


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return random_world(tmp_path_factory.mktemp("world") / "b", dim=DIM, layers=3, z_head=True, graphs=True)


@pytest.fixture(scope="module")
def conditional(tmp_path_factory):
    return random_world(tmp_path_factory.mktemp("conditional") / "b", dim=16, layers=2, labels=3)


@pytest.fixture(scope="module", params=["native", "onnxruntime"])
def sampler(world, request):
    """Shared: a sampler keeps no state between calls but its open sessions."""
    return Sampler(world, runtime=request.param, capacity=8, threads=1)


MIXED = [
    Request("smile", seed=1),
    Request("smile=no & ~glasses", seed=2, truncation=0.5),
    Request("smile & ~glasses & colour=c1", seed=3),
    Request("smile & ~glasses & colour=c2 & age=0.75", seed=4, truncation=1.0),
    Request("smile & glasses & ~colour=c3 & age=0.2 & yaw>0.7", seed=5),
    Request("shape & 0.3<yaw<0.6 | 2*age=0.1", seed=6),
    Request("glasses & keep(*, weight=0.01) & near(0.04)", seed=7),
    Request(None, seed=8),
    Request("age=0.9", z=np.linspace(-2, 2, DIM, dtype=np.float32)),
    Request("smile & yaw=0.1", w=np.linspace(-1, 1, DIM, dtype=np.float32)),
]
# The gradient of this row does not fit into float32.
FAILS = Request("age=1e38 & smile", seed=11)


def assert_same_bits(first, second):
    for a, b in zip(first, second, strict=True):
        assert a.request is b.request
        assert (a.z is None) == (b.z is None)
        assert a.z is None or np.array_equal(a.z, b.z)
        assert np.array_equal(a.w, b.w)
        assert (a.energy, a.status, a.steps, a.evaluations) == (b.energy, b.status, b.steps, b.evaluations)
        assert list(a.logits) == list(b.logits)
        assert all(np.array_equal(a.logits[name], b.logits[name]) for name in a.logits)


@pytest.fixture(scope="module")
def together(sampler):
    return sampler.solve(MIXED)


def test_a_row_equals_itself_alone_bit_for_bit(sampler, together):
    assert_same_bits([sampler.solve(request)[0] for request in MIXED], together)


def test_a_row_does_not_depend_on_the_order_of_arrival(sampler, together):
    order = np.random.default_rng(0).permutation(len(MIXED))
    assert_same_bits(sampler.solve([MIXED[i] for i in order]), [together[i] for i in order])


def test_a_row_does_not_depend_on_its_neighbours(sampler, together):
    others = [Request("colour=c4 & yaw<0.2 & shape=no & keep(smile)", seed=seed) for seed in range(20, 26)]
    mixed = [request for pair in zip(others, MIXED, strict=False) for request in pair]
    found = {id(sample.request): sample for sample in sampler.solve(mixed)}
    assert_same_bits([found[id(request)] for request in MIXED[: len(others)]], together[: len(others)])


def test_a_failed_row_does_not_stop_or_change_its_neighbours(sampler, together):
    samples = sampler.solve([FAILS, *MIXED[:5], FAILS, *MIXED[5:], FAILS])
    failed = [sample for sample in samples if sample.request is FAILS]
    assert [sample.status for sample in failed] == [Status.NONFINITE] * 3
    assert_same_bits([sample for sample in samples if sample.request is not FAILS], together)


@pytest.mark.parametrize("capacity", [1, 3, 64])
def test_another_capacity_gives_the_same_rows(world, sampler, together, capacity):
    # The promise is closeness; these runtimes sum in the same order for any number of rows.
    assert_same_bits(Sampler(world, runtime=sampler.runtime.name, capacity=capacity, threads=1).solve(MIXED), together)


@pytest.mark.parametrize("solver", ["dopri5", "heun", "langevin", "predictor-corrector"])
def test_rows_are_independent_with_every_kind_of_solver(world, sampler, solver):
    steps = {} if solver == "dopri5" else {"steps": 20 if solver == "predictor-corrector" else 6}
    tolerances = {"rtol": 1e-2, "atol": 1e-2, "max_evaluations": 40} if solver == "dopri5" else {}
    sampler = Sampler(world, runtime=sampler.runtime.name, capacity=4, threads=1, solver=solver, **steps, **tolerances)
    assert_same_bits([sampler.solve(request)[0] for request in MIXED], sampler.solve(MIXED))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("runtime", ["native", "onnxruntime"])
def test_the_field_of_a_row_has_the_same_bits_in_any_batch(tmp_path, runtime, threads):
    """At LACE's width, where the products are large enough to be split between threads."""
    bundle = random_world(tmp_path / "b", dim=512, layers=1, up_dim=16, graphs=True)
    field = Sampler(bundle, runtime=runtime, threads=threads).flows.new_flow().field
    rng = np.random.default_rng(0)
    z, psi = rng.standard_normal((40, 512)).astype(np.float32), np.full((40, 1), 0.7, np.float32)
    cotangent = rng.standard_normal((40, 3, 512)).astype(np.float32)
    heads = {name: np.eye(head.widths[-1], dtype=np.float32) for name, head in bundle.heads.items()}

    def answers(rows):
        w, found = field.forward(z[:rows], psi[:rows], None, heads)
        return [w, *(array for pair in found.values() for array in pair), field.pullback(cotangent[:rows])]

    whole = answers(40)
    for rows in (1, 2, 3, 16):
        assert all(np.array_equal(part, full[:rows]) for part, full in zip(answers(rows), whole, strict=True))


def test_the_pinned_solve(tmp_path):
    """A regression net: change the literals only together with a reason."""
    bundle = random_world(tmp_path / "b", dim=16, layers=2)
    sample = Sampler(bundle, runtime="numpy").solve("smile & ~glasses & age=0.75", 5)[0]
    assert sample.z[:4] == pytest.approx([0.65974084, 0.3460896, 0.13739427, 0.2290206], abs=1e-6)
    assert sample.energy == pytest.approx(0.7276082109, abs=1e-6)


def test_strict_lists_the_rows_that_failed(sampler):
    with pytest.raises(SolveError, match=r"2 of 3 rows .* row 0 \(seed 11\) met a value .* row 2 \(seed 11\)"):
        sampler.solve([FAILS, MIXED[0], FAILS], strict=True)
    assert sampler.solve([MIXED[0]], strict=True)[0].status == Status.DONE


def test_a_singular_system_fails_its_row_only(tmp_path):
    rng = np.random.default_rng(0)
    tensors = mapping_tensors(rng, 8, 8, 1) | head_tensors(rng, "h", (8, 1), 1.0, 0.0)
    # Two names of one logit, each wanted to twenty digits: I + c C G has no inverse in double precision.
    sigmas = {"a": 1e-20, "b": 1e-20, "c": 1.0}
    twins = [Attribute(name, "value", "h", (0, 1), sigma=sigma) for name, sigma in sigmas.items()]
    facts = GeneratorFacts("twins", "none", 8, 8, 2, 4)
    bundle = write_bundle(tmp_path / "b", tensors, [Head("h", "w", (8, 1))], twins, facts)
    samples = Sampler(bundle, runtime="numpy").solve([Request("a=0.3 & b=0.3", seed=1), Request("c=0.3", seed=1)])
    assert samples[1].status == Status.DONE


def test_stream_yields_each_request_once_as_the_object_that_was_given(sampler, monkeypatch):
    monkeypatch.setattr(Sampler, "render", lambda self, samples: list(samples))
    requests = [*MIXED, *[Request("smile", seed=seed) for seed in range(20)]]
    found = list(sampler.stream(requests))
    assert sorted(id(sample.request) for sample in found) == sorted(map(id, requests))


def test_solve_keeps_the_order_of_the_requests(sampler):
    assert [sample.seed for sample in sampler.solve("age=0.5", [9, 3, 7, 3, *range(12)])] == [9, 3, 7, 3, *range(12)]
    assert sampler.solve([]) == []
    assert sampler.solve("smile", []) == []


def test_no_condition_gives_plain_samples_without_an_evaluation(sampler, world):
    sample = sampler.solve(None, 3)[0]
    assert (sample.evaluations, sample.steps, sample.energy, sample.status) == (0, 0, 0.0, Status.DONE)
    assert np.array_equal(sample.z, normals(3, 0, DIM))
    assert sample.logits == {}


def test_an_explicit_z_equals_the_seeds_z(sampler):
    given = sampler.solve(Request("smile & age=0.75", seed=99, z=normals(4, 0, DIM)))[0]
    drawn = sampler.solve("smile & age=0.75", 4)[0]
    assert np.array_equal(given.z, drawn.z)
    assert given.energy == drawn.energy


@pytest.mark.parametrize("runtime", ["numpy", "native", "onnxruntime"])
def test_a_request_in_w_flows_in_w(world, runtime):
    sampler = Sampler(world, runtime=runtime, capacity=4)
    starts = [sample.w for sample in sampler.solve(None, range(6))]
    condition = "smile & ~glasses & age=0.75"
    ends = sampler.solve([Request(condition, w=w) for w in starts])
    begun = Sampler(world, runtime=runtime, solver="euler", steps=1_000_000, max_evaluations=2)
    first = begun.solve([Request(condition, w=w) for w in starts])
    assert all(end.z is None and end.status == Status.DONE for end in ends)
    assert all(end.energy < start.energy for end, start in zip(ends, first, strict=True))
    measured = sampler.measure(ends)
    assert "shape" not in measured[0]
    assert measured[0]["age"] == pytest.approx(ends[0].logits["age"], abs=1e-5)


def test_heads_on_z_cannot_be_asked_of_a_request_in_w(sampler):
    w = np.zeros(DIM, np.float32)
    for condition in ("smile & shape", "smile & keep(shape)"):
        with pytest.raises(ConditionError, match=r"'shape' is read from z.*starts from w"):
            sampler.solve(Request(condition, w=w))
    with pytest.raises(ConditionError, match=r"no attribute 'smil'.*did you mean 'smile'"):
        sampler.solve(Request("smil", w=w))
    # The * of keep means what can be read.
    assert sampler.solve(Request("smile & keep(*)", w=w))[0].status == Status.DONE


def test_labels_are_required_checked_and_matter(conditional, world):
    sampler = Sampler(conditional, runtime="numpy")
    with pytest.raises(LaceError, match=r"conditional: .* label in 0\.\.2"):
        sampler.solve("smile", 1)
    for label in (3, -1):
        with pytest.raises(LaceError, match=rf"label {label} is out of range: expected 0\.\.2"):
            sampler.solve(Request("smile", label=label))
    with pytest.raises(LaceError, match="unconditional"):
        Sampler(world, runtime="numpy").solve(Request("smile", label=0))
    ends = [sampler.solve(Request("smile", seed=1, label=label))[0] for label in range(3)]
    assert not np.allclose(ends[0].w, ends[1].w)
    mixed = sampler.solve([Request("smile", seed=1, label=label) for label in range(3)])
    for alone, beside in zip(ends, mixed, strict=True):
        np.testing.assert_allclose(alone.z, beside.z, atol=1e-9)


def test_truncation_is_a_rows_own(sampler, world):
    half, full, default = sampler.solve(
        [Request(None, seed=1, truncation=0.5), Request(None, seed=1, truncation=1.0), Request(None, seed=1)]
    )
    centre = world.field["mapping.w_avg"]
    np.testing.assert_allclose(half.w - centre, 0.5 * (full.w - centre), atol=1e-5)
    np.testing.assert_allclose(default.w - centre, 0.7 * (full.w - centre), atol=1e-5)
    assert Sampler(world, runtime="numpy", truncation=0.0).solve(None, 1)[0].w == pytest.approx(centre, abs=1e-6)


class Spy:
    """A field that counts its calls."""

    def __init__(self, field):
        self.field, self.heads, self.pullbacks = field, [], 0
        self.linearise = field.linearise

    def forward(self, z, psi, label, heads, some):
        self.heads.append(sorted(heads))
        return self.field.forward(z, psi, label, heads, some)

    def pullback(self, cotangent, rows=None):
        self.pullbacks += 1
        return self.field.pullback(cotangent, rows)


@pytest.mark.parametrize("condition", ["smile", "smile & ~glasses & colour=c1 & age=0.5 & yaw>0.6"])
def test_the_mapping_runs_once_a_step_and_only_the_mentioned_heads_run(world, condition, monkeypatch):
    sampler = Sampler(world, runtime="numpy", steps=5)
    flow = sampler.flows.new_flow()
    spy = flow.field = Spy(flow.field)
    monkeypatch.setattr(sampler.flows, "new_flow", lambda space: flow)
    samples = sampler.solve(condition, range(4))
    assert spy.pullbacks == 5
    assert spy.heads == [sorted(samples[0].condition.attributes())] * 6
    assert all(sample.evaluations == 6 for sample in samples)


def test_a_new_condition_opens_no_session_and_writes_no_file(world, monkeypatch):
    opened, opening = [], Graphs.open
    monkeypatch.setattr(Graphs, "open", lambda self, graph: opened.append(graph) or opening(self, graph))
    for settings in ({}, {"steps": 2}):
        opened.clear()
        sampler = Sampler(world, runtime="onnxruntime", **settings)
        sampler.solve("smile & glasses & age=0.5", range(2))
        assert opened == ["linearise"]
    before = sorted((path.name, path.stat().st_mtime_ns) for path in world.path.iterdir())
    for condition in ("~smile | age>0.7", "2*glasses & 0.1<age<0.4", "keep(smile) & near(0.1) & glasses=no"):
        sampler.solve([Request(condition, seed=1) for _ in range(3)])
    # The anchor of keep is measured without derivatives: the mapping and every head, once.
    assert sorted(opened[1:]) == sorted(["mapping", *(f"head.{name}" for name in world.heads)])
    assert sorted((path.name, path.stat().st_mtime_ns) for path in world.path.iterdir()) == before


def test_a_runtime_leaves_the_processors_arithmetic_alone(sampler):
    """onnxruntime's denormal-as-zero option would switch it for the whole calling thread, and for all of numpy."""
    sampler.solve("smile", 1)
    assert np.array([5e-324])[0] * 1.0 > 0


@pytest.fixture
def editor(world, monkeypatch):
    """A sampler whose edits are not decoded: the worlds of numbers have no synthesis."""
    monkeypatch.setattr(Sampler, "render", lambda self, samples: list(samples))
    return Sampler(world, runtime="numpy")


def test_an_edit_holds_on_to_what_it_does_not_mention(editor):
    starts = editor.solve("smile & ~glasses", range(16))
    before = editor.measure(starts)

    def moved(**holders):
        ends = editor.edit(starts, "age=0.9", **holders)
        after = editor.measure(ends)
        names = ("colour", "yaw", "shape")
        logits = [np.linalg.norm(a[name] - b[name]) for a, b in zip(after, before, strict=True) for name in names]
        return np.mean(logits), np.mean([np.linalg.norm(e.z - s.z) for e, s in zip(ends, starts, strict=True)])

    free = moved(keep=None, near=None)
    assert moved(keep="*", near=None, keep_weight=1.0)[0] < 0.7 * free[0]
    assert moved(keep=["colour", "yaw", "shape"], near=None, keep_weight=1.0)[0] < 0.7 * free[0]
    assert moved(keep=None, near=1.0)[1] < 0.5 * free[1]


def test_an_edit_keeps_former_targets_and_a_new_one_overrides(editor):
    starts = editor.solve("smile & age=0.2", range(8))
    held = editor.edit(starts, "glasses")
    assert str(held[0].condition) == "glasses & smile & age=0.2"
    assert np.mean([sample.logits["age"] for sample in held]) == pytest.approx(0.2, abs=0.1)
    older = editor.edit(held, "age=0.9")
    assert str(older[0].condition) == "age=0.9 & glasses & smile"
    ages = [np.mean([sample.logits["age"] for sample in samples]) for samples in (held, older)]
    assert ages[1] > ages[0] + 0.3  # random heads do not let every face grow as old as asked
    assert str(editor.edit(held[0], "age=0.9", hold=False)[0].condition) == "age=0.9"
    plain = editor.edit(editor.solve(None, 1), "smile")
    assert str(plain[0].condition) == "smile"


def test_an_edit_does_not_inherit_near_and_keep(editor):
    start = editor.solve(attr("smile") & near(0.1) & keep("age"), 1)
    assert str(editor.edit(start, "glasses")[0].condition) == "glasses & smile"


def test_a_sample_in_w_is_edited_in_w(editor):
    start = editor.solve(Request("smile", w=np.linspace(-1, 1, DIM, dtype=np.float32)))
    end = editor.edit(start, "age=0.9")[0]
    assert (end.z, end.status) == (None, Status.DONE)
    assert abs(end.logits["age"][0] - 0.9) < abs(editor.measure(start)[0]["age"][0] - 0.9)


def test_near_in_a_plain_request_holds_on_to_its_own_start(sampler):
    start, free, held = (sampler.solve(text, 3)[0] for text in (None, "age=0.9", "age=0.9 & near(1)"))
    assert np.linalg.norm(held.z - start.z) < np.linalg.norm(free.z - start.z)


def test_repr_names_everything_that_can_change_a_bit(world):
    text = repr(Sampler(world, runtime="numpy", capacity=5, rtol=1e-4, truncation=0.6, logic="lace", temperature=2.0))
    expected = ("runtime=numpy", np.__version__, "device=cpu", "precision=fp64", "capacity=5", "solver=gauss-newton",
                "rtol=0.0001", "atol=0.002", "max_evaluations=32", "steps=None", "clock=flow", "logic=lace",
                "temperature=2.0", "guidance=1.0", "truncation=0.6", world.hash[:12],
                repr(world.path.name))
    assert [part for part in expected if part not in text] == []


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"capacity": 0}, SolveError, "from 1 to 65536"),
        ({"solver": "dopri6"}, SolveError, "no solver 'dopri6'.*gauss-newton.*dopri5"),
        ({"solver": "langevin", "rtol": 0.1}, SolveError, "no setting 'rtol'"),
        ({"runtime": "torch"}, BackendError, "no runtime 'torch'.*auto.*onnxruntime.*numpy"),
        ({"device": "cuda"}, BackendError, "does not run on device 'cuda'.*cpu"),
        ({"logic": "fuzzy"}, ConditionError, "no logic 'fuzzy'.*product.*lace"),
        ({"temperature": 2.0}, ConditionError, "temperature"),
        ({"guidance": 0.0}, ConditionError, "guidance must be a finite number greater than 0"),
    ],
)
def test_bad_options_are_refused_with_what_is_known(world, options, kind, message):
    with pytest.raises(kind, match=message):
        Sampler(world, **{"runtime": "numpy", **options})


@pytest.mark.parametrize("name", ["onnxruntime", "auto"])
def test_a_missing_runtime_names_its_extra(world, monkeypatch, name):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    for runtime in ("native", "onnxruntime"):
        monkeypatch.delitem(sys.modules, RUNTIMES[runtime].module, raising=False)
    with pytest.raises(BackendError, match=r"pip install 'lace-engine\[cpu\]'") as caught:
        Sampler(world, runtime=name)
    assert isinstance(caught.value.__cause__, ImportError)


def test_the_numpy_runtime_says_that_it_has_no_pictures(world):
    with pytest.raises(BackendError, match=r"only solves.*onnxruntime"):
        Sampler(world, runtime="numpy").sample("smile", 1)


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"seed": -1}, ValueError, "seed"),
        ({"seed": 2**64}, ValueError, "seed"),
        ({"seed": 1.5}, ValueError, "seed"),
        ({"z": np.zeros(4), "w": np.zeros(4)}, ValueError, "not from both"),
        ({"truncation": float("nan")}, ValueError, "finite"),
        ({"condition": 3}, ConditionError, "expression or a text"),
        ({"condition": ""}, ConditionError, "empty"),
    ],
)
def test_bad_requests_are_refused_when_they_are_made(arguments, kind, message):
    with pytest.raises(kind, match=message):
        Request(**arguments)


def test_guidance_multiplies_a_condition_and_nothing_that_holds_on(world):
    guided, plain = (Sampler(world, runtime="numpy", guidance=factor) for factor in (4.0, 1.0))
    (wanted,) = plain.solve("4*(smile & age=0.7) & near(0.1) & keep(yaw, weight=0.2)", 3)
    (found,) = guided.solve("smile & age=0.7 & near(0.1) & keep(yaw, weight=0.2)", 3)
    assert found.z == pytest.approx(wanted.z, abs=1e-9)
    assert found.energy == pytest.approx(wanted.energy, rel=1e-9)


def test_guidance_is_the_bundles_unless_another_is_given_or_the_logic_is_the_papers(tmp_path):
    world = random_world(tmp_path / "guided.lace", dim=8, layers=1, guidance=3.0)
    settings = {}, {"guidance": 0.5}, {"logic": "lace"}
    found = [Sampler(world, runtime="numpy", **given).starts.guidance for given in settings]
    assert found == [3.0, 0.5, 1.0]


@pytest.mark.parametrize(
    "start", [{"z": np.zeros(3)}, {"w": np.zeros(3)}, {"z": np.full(DIM, np.nan)}, {"w": np.full((1, DIM), 1.0)}]
)
def test_latents_of_the_wrong_shape_or_not_finite_are_refused(sampler, start):
    with pytest.raises((ValueError, LaceError), match=rf"expected \({DIM},\) finite numbers"):
        sampler.solve([MIXED[0], Request("smile", **start)])


def test_what_is_not_a_condition_or_a_request_is_refused(sampler):
    with pytest.raises(TypeError, match="found int"):
        sampler.solve([3])
    with pytest.raises(ValueError, match="own seed"):
        sampler.solve([MIXED[0]], [1, 2])
    with pytest.raises(ConditionError, match=r"no attribute 'smil'.*did you mean 'smile'"):
        sampler.solve([MIXED[0], Request("smil")])


def test_a_request_is_a_value_that_solving_does_not_change(sampler):
    z = normals(4, 0, DIM)
    request = Request("age=0.9", z=z)
    sampler.solve([request, replace(request, seed=3)])
    assert np.array_equal(z, normals(4, 0, DIM))


def test_noise_inputs_come_from_the_seed(tmp_path):
    bundle = export(tiny.parts(), tiny.heads(), out=tmp_path / "noisy.lace", noise="input")
    sampler = Sampler(bundle, threads=1)
    assert sorted(sampler.runtime.drawing.noise_inputs()) == ["noise.1", "noise.2"]
    z = np.full(16, 0.5, np.float32)
    first, again, other = (sampler.sample(Request(None, seed=seed, z=z))[0].image for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert np.any(first != other)
