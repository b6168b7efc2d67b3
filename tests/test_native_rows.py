"""Steps of the default solver in C++ against their twin in Python, and what rows in one batch may not notice."""

import ctypes
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from itertools import count, islice

import numpy as np
import pytest

from engine import Request, Sampler, Status
from engine.bundle import Attribute, GeneratorFacts, Head
from engine.drive import Ticket
from engine.flow import Flow
from engine.native import library
from engine.native.library import Call, CpuField, Use, address
from engine.native.rows import CpuRows
from engine.reference.noise import normals
from engine.runtimes.native import NativeSteps
from engine.solvers import Langevin, RungeKutta
from engine.solvers.gauss_newton import GaussNewton
from engine.solvers.tableaus import TABLEAUS
from tests import test_native
from tests.worlds import head_tensors, mapping_tensors, write_bundle

# Widths that fill no register and no panel; labels, so that every request needs one.
Z_DIM, W_DIM, LABELS, SOON = 37, 51, 3, 20.0

pytestmark, variant = test_native.pytestmark, test_native.variant


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """colour, age and yaw are columns of one head, shape is read from z, by one layer."""
    rng = np.random.default_rng(3)
    widths = {"smile": (W_DIM, 33, 17, 2), "glasses": (W_DIM, 29, 2), "face": (W_DIM, 40, 21, 7), "shape": (Z_DIM, 2)}
    tensors = mapping_tensors(rng, Z_DIM, W_DIM, 3, LABELS)
    for name, sizes in widths.items():
        tensors |= head_tensors(rng, name, sizes, 1.0 if name == "face" else 2.0, 0.4 if name == "face" else 0.0)
    heads = [Head(name, "z" if name == "shape" else "w", sizes) for name, sizes in widths.items()]
    attributes = [Attribute(name, "class", name, (0, 2), ("no", "yes")) for name in ("smile", "glasses", "shape")]
    attributes += [Attribute("colour", "class", "face", (0, 5), tuple(f"c{i}" for i in range(5))),
                   Attribute("age", "value", "face", (5, 6)), Attribute("yaw", "value", "face", (6, 7))]
    facts = GeneratorFacts("rows", "none", Z_DIM, W_DIM, 2, 4, labels=LABELS, truncation=0.7)
    return write_bundle(tmp_path_factory.mktemp("rows") / "b", tensors, heads, attributes, facts)


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """The worlds of numbers have no synthesis."""
    monkeypatch.setattr(Sampler, "render", lambda self, samples: list(samples))


@pytest.fixture
def advances(monkeypatch):
    """The number of rows, and of rounds at most, in each call of the compiled steps so far."""
    calls, advance = [], CpuRows.advance

    def counted(rows, slots, rounds):
        calls.append((len(slots), rounds))
        advance(rows, slots, rounds)

    monkeypatch.setattr(CpuRows, "advance", counted)
    return calls


CONDITIONS = [
    "smile", "smile & ~glasses & age=0.75", "smile | glasses", "~(smile & glasses)", "~age=0.4", "yaw<0.1",
    "age=0.3 | ~colour=c2 & yaw>0.6", "colour=c1 & ~colour=c3", "~colour", "0.3<age<0.6", "2*smile & 0.5*age=0.2",
    "keep(smile, colour) & glasses", "near(0.04) & smile", "near(0.3)", "keep(*, weight=0.01) & near(0.04) & glasses",
    None,
]
ON_Z = ["shape", "shape & smile", "shape & near(0.1) & age=0.5 & colour=c2", "~shape | smile & age=0.9",
        "glasses & keep(shape, weight=0.1) & yaw<0.3"]


def asked(condition: str | None, seed: int) -> Request:
    return Request(condition, seed=seed, label=seed % LABELS, truncation=[None, 0.5, 1.0][seed % 3])


def in_w(condition: str | None, seed: int, scale: float = 1) -> Request:
    return Request(condition, seed=seed, w=normals(seed, 5, W_DIM) * np.float32(scale))


MIXED = [asked(condition, seed) for seed, condition in enumerate(CONDITIONS + ON_Z)]
MIXED += [in_w(condition, seed) for seed, condition in enumerate(CONDITIONS)]


def opened(world, **settings) -> Sampler:
    return Sampler(world, **{"runtime": "native", "threads": 1, "capacity": 16} | settings)


def by_twin(world, requests, **settings):
    """The same field, the steps in Python."""
    sampler = opened(world, **settings)
    sampler.flows.stepper = lambda steps: sampler.flows.solver
    return sampler.solve(requests)


def fate(sample):
    return sample.request, sample.status, sample.steps, sample.evaluations, sample.rejected, sample.forced


def numbers(sample) -> dict:
    own = {"w": sample.w, "energy": sample.energy} | ({} if sample.z is None else {"z": sample.z})
    return own | dict(sample.logits)


def assert_close(found, expected):
    """Both round to float32, which makes 1e-6 here and 6e-6 at most; tolerances leave room for other processors."""
    for ours, theirs in zip(found, expected, strict=True):
        assert fate(ours) == fate(theirs)
        assert list(numbers(ours)) == list(numbers(theirs))
        for name, number in numbers(ours).items():
            about = f"{name} of {ours}"
            np.testing.assert_allclose(number, numbers(theirs)[name], rtol=1e-4, atol=1e-4, err_msg=about)


def assert_same_bits(found, expected):
    for one, other in zip(found, expected, strict=True):
        assert fate(one) == fate(other)
        assert list(numbers(one)) == list(numbers(other))
        assert all(np.array_equal(number, numbers(other)[name]) for name, number in numbers(one).items())


def has_half() -> bool:
    return bool(library.library(library.chosen()).lace_has_half())


# --- the twin -----------------------------------------------------------------------------------------------------


SETTINGS = [
    {}, {"max_evaluations": 3}, {"max_evaluations": 4}, {"max_evaluations": 8}, {"rtol": 0.03, "atol": 1e-3},
    {"guidance": 4.0}, {"logic": "lace"}, {"logic": "lace", "temperature": 2.0, "max_evaluations": 12},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_adaptive_rows_step_as_their_twins(world, settings):
    samples = opened(world, **settings).solve(MIXED)
    assert_close(samples, by_twin(world, MIXED, **settings))
    assert sum(sample.forced for sample in samples) > 0
    assert sum(sample.rejected for sample in samples) > 0 or "max_evaluations" in settings


@pytest.mark.parametrize("steps", [1, 2, 6])
def test_fixed_steps_lead_where_their_twins_do(world, steps):
    samples = opened(world, steps=steps).solve(MIXED)
    assert_close(samples, by_twin(world, MIXED, steps=steps))
    for sample in samples:
        taken = 0 if sample.condition is None else steps
        assert (sample.steps, sample.evaluations) == (taken, taken + bool(taken))


@pytest.mark.parametrize("settings", [{}, {"steps": 2}, {"max_evaluations": 5}], ids=str)
def test_every_variant_steps_as_its_twin(world, variant, settings):
    some = MIXED[::3]
    sampler = opened(world, **settings)
    assert f"({variant})" in sampler.runtime.version
    assert_close(sampler.solve(some), by_twin(world, some, **settings))


def test_steps_with_slopes_in_bfloat16_are_those_of_their_twins(world):
    if not has_half():
        pytest.skip("this processor has no bfloat16 instructions")
    precision = {"precision": "bf16-jacobian"}
    samples = opened(world, **precision).solve(MIXED)
    assert_close(samples, by_twin(world, MIXED, **precision))
    assert not np.array_equal(samples[0].w, opened(world).solve(MIXED[:1])[0].w)


# Gradients that float32 does not hold, at the start or on the way; tapes that overflow; and what only looks so.
EXTREMES = [
    *[asked(condition, seed) for seed, condition in enumerate((
        "age=1e38 & smile", "1e300*smile & 1e300*glasses", "1e150*age=0.3", "near(1e300) & smile", "age<-1e200",
        "age>1e200", "near(1e-46) & smile", "near(1e38) & smile", "keep(*, weight=1e300) & smile",
        "keep(*, weight=8e307) & 9*smile"))],
    *[replace(asked(condition, 1), z=normals(1, 0, Z_DIM) * np.float32(scale))
      for scale in (1e10, 1e18, 1e37) for condition in ("shape", "keep(shape, weight=1) & smile", "near(0.1) & smile")],
    *[in_w(condition, 2, scale) for scale in (1e18, 1e37) for condition in ("smile", "near(0.1) & yaw>0.2")],
]


@pytest.mark.parametrize("settings", [{}, {"max_evaluations": 5}, {"steps": 1}, {"steps": 4}], ids=str)
def test_what_is_not_finite_ends_as_its_twin_and_disturbs_nobody(world, settings):
    sampler = opened(world, **settings)
    mixed = sampler.solve([request for pair in zip(EXTREMES, MIXED, strict=False) for request in pair])
    assert list(map(fate, mixed[::2])) == list(map(fate, by_twin(world, EXTREMES, **settings)))
    assert {sample.status for sample in mixed[::2]} == {Status.DONE, Status.NONFINITE}
    assert_same_bits(mixed[1::2], sampler.solve(MIXED)[: len(EXTREMES)])


# --- a row and its neighbours -------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["fp32", "bf16-jacobian", "steps"])
def settings(request):
    if request.param == "bf16-jacobian" and not has_half():
        pytest.skip("this processor has no bfloat16 instructions")
    return {"steps": 3} if request.param == "steps" else {"precision": request.param}


@pytest.fixture(scope="module")
def alone(world, settings):
    """Each request by itself."""
    sampler = opened(world, capacity=1, **settings)
    return [sampler.solve(request)[0] for request in MIXED]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("capacity", [3, 64])
def test_a_row_has_the_same_bits_in_any_batch(world, settings, alone, capacity, threads):
    sampler = opened(world, capacity=capacity, threads=threads, **settings)
    order = np.random.default_rng(capacity).permutation(len(MIXED))
    assert_same_bits(sampler.solve(MIXED), alone)
    assert_same_bits(sampler.solve([MIXED[i] for i in order]), [alone[i] for i in order])


def test_streamed_and_submitted_rows_have_the_same_bits(world, settings, alone):
    expected = {id(sample.request): sample for sample in alone}
    with opened(world, capacity=5, threads=2, **settings) as sampler:
        futures = [sampler.submit(request) for request in MIXED]
        streamed = list(sampler.stream(iter(MIXED)))
        assert_same_bits([future.result(SOON) for future in futures], alone)
    assert {id(sample.request) for sample in streamed} == set(expected)
    assert_same_bits(streamed, [expected[id(sample.request)] for sample in streamed])


def test_threads_may_solve_on_one_sampler(world):
    sampler = opened(world, capacity=4, threads=2)
    expected = sampler.solve(MIXED)
    parts = [slice(begin, begin + 9) for begin in range(0, len(MIXED), 7)]
    with ThreadPoolExecutor(4) as pool:
        for part, found in zip(parts * 3, pool.map(sampler.solve, [MIXED[part] for part in parts] * 3), strict=True):
            assert_same_bits(found, expected[part])


def test_a_field_serves_other_batches_and_other_solvers(world):
    sampler = opened(world)
    for solver, requests in ((GaussNewton(), MIXED), (GaussNewton(), MIXED[:2]), (GaussNewton(steps=3), MIXED),
                             (GaussNewton(rtol=0.5), MIXED[::-1]), (GaussNewton(), MIXED)):
        sampler.flows.solver = solver
        assert_same_bits(sampler.solve(requests), opened(world, solver=solver).solve(requests))
    assert [len(idle) for idle in sampler.flows.idle.values()] == [1, 1]


# --- rows that leave, and calls that fail -------------------------------------------------------------------------


def tickets_of(sampler: Sampler, requests, **settings) -> list[Ticket]:
    return [Ticket(request, sampler.starts.start(request), **settings) for request in requests]


def taking(tickets: Iterator[Ticket], capacity: int):
    return lambda running: islice(tickets, capacity - running)


def test_who_leaves_makes_room_and_changes_nobody(world):
    sampler, turns = opened(world, capacity=4), count()
    some = [request for request in MIXED if request.w is None and request.condition is not None]
    expected, tickets = sampler.solve(some), tickets_of(sampler, some)
    for ticket in tickets:
        ticket.future = Future()
    cancelled, late, never = tickets[1], tickets[2], tickets[6]
    assert expected[1].evaluations > 3 < expected[2].evaluations
    take = taking(iter(tickets), 4)

    def dropping(running):
        """One row is cancelled after two steps and one is late after three; one is not wanted when its turn comes."""
        turn = next(turns)
        if turn == 2:
            cancelled.future.cancel()
        if turn == 3:
            late.deadline, _ = 0.0, never.future.cancel()
        return take(running)

    ended = [ticket for tickets in sampler.flows.run(dropping, 4) for ticket in tickets]
    assert sorted(map(id, ended)) == sorted(map(id, tickets))
    assert [ticket for ticket in tickets if ticket.sample is None] == [cancelled, late, never]
    kept = [i for i, ticket in enumerate(tickets) if ticket.sample is not None]
    assert_same_bits([tickets[i].sample for i in kept], [expected[i] for i in kept])


@pytest.mark.parametrize("name", ["lace_admit", "lace_advance"])
def test_a_call_without_memory_fails_alone(world, monkeypatch, name):
    sampler, turns = opened(world, capacity=6), count()
    expected = sampler.solve(MIXED)
    own = sampler.runtime.solving.network.library
    function = getattr(own, name)
    with monkeypatch.context() as patch:
        patch.setattr(own, name, lambda *given: 1 if next(turns) == 3 else function(*given))
        with pytest.raises(MemoryError, match="no memory for the rows of a solve"):
            sampler.solve(MIXED)
    assert_same_bits(sampler.solve(MIXED), expected)


def test_what_does_not_fit_leaves_the_memory_whole(world):
    network, rows = opened(world).runtime.solving.network, 3000
    field, z = CpuField(network), np.stack([normals(seed, 0, Z_DIM) for seed in range(rows)])
    psi, label = np.ones((rows, 1), np.float32), np.zeros(rows, np.int64)
    expected, *_ = CpuField(network).forward(z, psi, label, {})
    field.forward(z[:1], psi[:1], label[:1], {})
    many, logits = 1 << 40, np.empty(1, np.float32)
    head = network.head("smile")
    use = Use(ctypes.addressof(head), many, 0, None, None, address(logits), None)
    with pytest.raises(MemoryError, match="no memory for an evaluation"):
        field.evaluate(Call(rows=many, is_w=1, uses=1, z=address(z), use=ctypes.addressof(use)))
    assert np.array_equal(field.forward(z, psi, label, {})[0], expected)


# --- how many calls -----------------------------------------------------------------------------------------------


def test_rows_that_nobody_watches_go_on_to_the_first_arrival(world, advances, monkeypatch):
    monkeypatch.setattr(Flow, "measure", None)  # they know where they are
    samples = opened(world, capacity=8).solve(MIXED[:8])
    ends = sorted({sample.evaluations for sample in samples})
    assert 1 < len(ends) < 8
    assert [rows for rows, _ in advances] == [sum(s.evaluations >= end for s in samples) for end in ends]


@pytest.mark.parametrize("watch", [{"future": Future()}, {"deadline": 1e30}], ids=["future", "deadline"])
def test_rows_that_may_be_dropped_take_a_step_a_call(world, advances, watch):
    sampler = opened(world, capacity=8)
    tickets = tickets_of(sampler, MIXED[:8], **watch)
    advances.clear()  # those of the anchors
    for _ in sampler.flows.run(taking(iter(tickets), 8), 8):
        pass
    evaluations = [ticket.sample.evaluations for ticket in tickets]
    turns = range(1, max(evaluations) + 1)
    assert advances == [(sum(n >= turn for n in evaluations), 1) for turn in turns]


class Own(GaussNewton):
    """Whoever changes the default solver expects its own methods to be called."""

    def propose(self, batch, rows):
        proposals.append(len(rows))
        return super().propose(batch, rows)


proposals: list[int] = []


@pytest.mark.parametrize("solver", [RungeKutta(TABLEAUS["heun"], steps=3), Langevin(steps=3), Own()], ids=repr)
def test_other_solvers_step_in_python(world, advances, solver):
    proposals.clear()
    sampler = opened(world, solver=solver)
    assert sampler.flows.stepper() is solver
    samples = sampler.solve(MIXED)
    assert advances == []
    if isinstance(solver, Own):
        assert sum(proposals) > len(MIXED)
        assert_close(samples, opened(world).solve(MIXED))
    assert isinstance(opened(world).flows.stepper(), NativeSteps)
