"""What the compiled library is given is checked at its doors: wrong numbers are refused, and nothing else changes."""

import ctypes
import os
import subprocess
import sys

import numpy as np
import pytest

from engine import BundleError, Request, RequestError, Sampler, SolveError
from engine.constants import MOST_THREADS, Refusal
from engine.layout import OPCODES
from engine.native.library import REASONS, Call, CpuField, Use, check
from tests import test_native
from tests.test_native import W_DIM, Z_DIM, Question, open_network
from tests.worlds import random_world

pytestmark, tensors = test_native.pytestmark, test_native.tensors
HUGE = (-1, 10**9, 2**40, 2**62, -(2**63))


@pytest.fixture(scope="module")
def network(tensors):
    return open_network(tensors)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    path = tmp_path_factory.mktemp("doors") / "w.lace"
    return random_world(path, dim=40, layers=3, labels=3, z_head=True, graphs=True)


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """Another bundle: other widths, no labels."""
    return random_world(tmp_path_factory.mktemp("doors") / "o.lace", dim=32, layers=3, graphs=True)


# --- the field ----------------------------------------------------------------------------------------------------


def same(found, expected) -> bool:
    return (np.array_equal(found[0], expected[0]) and np.array_equal(found[2], expected[2])
            and all(np.array_equal(found[1][name], logits) for name, logits in expected[1].items()))


@pytest.mark.parametrize(("change", "words"), [
    ({"z": np.zeros((9, Z_DIM + 1))}, rf"z has shape \(9, {Z_DIM + 1}\): expected \(9, {Z_DIM}\)"),
    ({"psi": np.ones((8, 1))}, r"psi has shape \(8, 1\): expected \(9, 1\)"),
    ({"label": np.zeros(10, int)}, r"label has shape \(10,\): expected \(9,\)"),
    ({"label": np.full(9, 10**9)}, "a label is not one of the generator's classes"),
    ({"label": np.full(9, -1)}, "a label is not one of the generator's classes"),
    ({"label": None}, "an array is missing"), ({"psi": None}, "an array is missing"),
    ({"heads": {"flat": (None, np.eye(4))}}, r"seeds of 'flat' has shape \(4, 4\): expected \(4, 5\)"),
    ({"heads": {"flat": (np.array([9]), np.eye(5))}}, "a position is outside its array"),
    ({"heads": {"flat": (np.array([0]), np.eye(5))}, "source": [5]}, "a position is outside its array"),
    ({"pair_row": [9]}, "a position is outside its array"), ({"source": [-1]}, "a position is outside its array"),
    ({"heads": {"on_z": (None, np.eye(1))}, "source": [0]}, "a width is not the network's"),
])
def test_B6_what_does_not_fit_the_network_is_a_request_error(network, tensors, change, words):
    question = Question(tensors, 9)
    given = {"z": question.z, "psi": question.psi, "label": question.label, "heads": question.heads}
    pairs = None
    if change.keys() & {"pair_row", "source"}:
        row, source = change.get("pair_row", [0]), change.get("source", [0])
        pairs = np.array(row), np.array(source), np.zeros(0, int), np.zeros((0, W_DIM))
    with pytest.raises(RequestError, match=words):
        CpuField(network).forward(**given | {k: v for k, v in change.items() if k in given}, pairs=pairs)


def test_the_way_back_needs_rows_to_start_from(network, tensors):
    field, question = CpuField(network), Question(tensors, 5)
    one = np.ones((1, W_DIM), np.float32)
    with pytest.raises(RequestError, match="continues what was not begun"):
        field.back(one, np.array([0]))
    w, *_ = field.forward(question.z, question.psi, question.label, {})
    field.back(one, np.array([4]))
    with pytest.raises(RequestError, match="a position is outside its array"):
        field.back(one, np.array([5]))
    with pytest.raises(RequestError, match=rf"cotangent has shape \(1, 3\): expected \(1, {W_DIM}\)"):
        field.back(one[:, :3], np.array([0]))
    field.forward(w, None, None, {}, is_w=True)
    with pytest.raises(RequestError, match="continues what was not begun"):
        field.back(one, np.array([0]))


def test_a_random_call_is_answered_or_refused(network, tensors):
    """Every number and every pointer of a call in turn, and values of its arrays, become what they must not be."""
    rng, question = np.random.default_rng(0), Question(tensors, 9)
    field, expected = CpuField(network), question.ask(network)
    refused = []

    def broken(call: Call, uses) -> None:
        numbers = [name for name, kind in Call._fields_ if kind is ctypes.c_int64 and name != "is_w"]
        pointers = [name for name, kind in Call._fields_ if kind is ctypes.c_void_p and name != "cotangent"]
        match rng.integers(5):
            case 0:  # more than there are would be read behind the arrays, which only Python can see
                setattr(call, rng.choice(numbers), int(rng.choice([-1, -(2**63), 2**62])))
            case 1:
                setattr(call, rng.choice(pointers), None)
            case 2:
                name = rng.choice(["pair_row", "source", "near_row", "label"])
                count = {"label": 9, "near_row": int(call.near)}.get(name, int(call.pairs))
                values = (ctypes.c_int64 * count).from_address(getattr(call, name))
                values[rng.integers(count)] = int(rng.choice(HUGE))
            case 3:
                use = uses[rng.integers(len(uses))]
                setattr(use, rng.choice(["stack", "seeds", "logits"]), None)
            case 4:
                use = uses[rng.integers(len(uses))]
                setattr(use, rng.choice(["rows", "wanted"]), int(rng.choice([-1, 2**41, 2**62])))

    for _ in range(300):
        with pytest.MonkeyPatch.context() as patch:
            own = Question(tensors, 9)

            def evaluate(call, own=own):
                uses = (Use * call.uses).from_address(call.use)
                broken(call, uses)
                CpuField.evaluate(field, call)

            patch.setattr(field, "evaluate", evaluate, raising=False)
            try:
                field.forward(own.z, own.psi, own.label, own.heads, pairs=own.pairs)
            except RequestError as error:
                refused.append(str(error))
    assert len(refused) > 280  # -1 uses of nothing, say, is still a call
    assert len(set(refused)) >= 4
    assert same(question.ask(network), expected)


def test_every_reason_has_a_sentence():
    assert set(REASONS) == set(Refusal) - {Refusal.NONE, Refusal.MEMORY}
    check(Refusal.NONE, "nothing")
    with pytest.raises(MemoryError, match="no memory for it"):
        check(Refusal.MEMORY, "it")


@pytest.mark.parametrize(("name", "shape"), [
    ("mapping.1.weight", (W_DIM, W_DIM + 1)), ("mapping.0.weight", (W_DIM + 1, Z_DIM + W_DIM)),
    ("mapping.embedding", (3, W_DIM + 5)), ("mapping.1.bias", (W_DIM - 1,)),
])
def test_B1_tensors_that_do_not_fit_each_other_are_a_damaged_bundle(tensors, name, shape):
    with pytest.raises(BundleError, match=r"layer \d has a weight of shape .*the bundle is damaged"):
        open_network(tensors | {name: np.zeros(shape, np.float32)})


def test_B1_one_more_layer_of_a_head_is_a_damaged_bundle(tensors):
    wrong = {"head.flat.1.weight": np.zeros((10_000, 7), np.float32), "head.flat.1.bias": np.zeros(10_000, np.float32)}
    network, question = open_network(tensors | wrong), Question(tensors, 2)
    with pytest.raises(BundleError, match=r"layer 1 has a weight of shape \(10000, 7\)"):
        CpuField(network).forward(question.z, question.psi, question.label, {"flat": (None, np.zeros((1, 10_000)))})


@pytest.mark.parametrize(("name", "number"), [
    ("z_dim", Z_DIM + 1), ("z_dim", 2**40), ("w_dim", W_DIM - 1), ("embedded", 0), ("labels", -1), ("average", None),
    ("embedding", None),
])
def test_a_record_that_does_not_fit_opens_no_field(tensors, name, number):
    network = open_network(tensors)
    setattr(network.record, name, number)
    with pytest.raises(RequestError, match="the compiled library refused the network"):
        CpuField(network)


# --- rows ---------------------------------------------------------------------------------------------------------


def admitted(sampler: Sampler, request: Request, change) -> None:
    """Admit one row after ``change(column, code, parameter)``, and solve on as if nothing had happened."""
    from engine.native.rows import CpuRows

    admit = CpuRows.admit
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CpuRows, "admit", lambda rows, slots, *tape: admit(rows, slots, *change(*map(np.array, tape))))
        sampler.solve(request)


def test_a_random_tape_is_solved_or_refused(world):
    rng, sampler = np.random.default_rng(1), Sampler(world, runtime="native", threads=1, max_evaluations=4)
    request = Request("smile & ~glasses & colour=c2 & age=0.4 | yaw>0.3", seed=1, label=1)
    expected, refused = sampler.solve(request)[0], 0

    def change(column, code, parameter):
        match rng.integers(4):
            case 0:
                column[rng.integers(len(column))] = rng.choice([-1, 99, 2**31 - 1, -(2**31)])
            case 1:
                code[rng.integers(len(code)), rng.integers(4)] = rng.choice([-1, len(OPCODES), 7, 2**31 - 1, -(2**31)])
            case 2:
                parameter[rng.integers(len(parameter))] = rng.choice([-1, 1e9, np.nan, np.inf])
            case 3:
                code = np.delete(code, rng.integers(len(code)), axis=0)
        return column, code, parameter

    for _ in range(300):
        try:
            admitted(sampler, request, change)
        except RequestError as error:
            assert "refused the rows of a solve" in str(error)  # noqa: PT017
            refused += 1
    assert 150 < refused < 300
    again = sampler.solve(request)[0]
    assert np.array_equal(again.w, expected.w)


def test_slots_that_do_not_run_are_refused(world):
    sampler = Sampler(world, runtime="native", threads=1, capacity=4)
    sampler.solve(Request("smile", seed=1, label=1))
    rows = sampler.flows.idle[sampler.bundle.spaces["z"]][0].field.rows
    for slots in ([0], [-1], [3], [4], [2**40]):
        with pytest.raises(RequestError, match=r"continues what was not begun|is out of range"):
            rows.advance(np.array(slots), 1)
    column, code = np.array([0]), np.array([[0, 0, 1, 0]])
    for slot in (-1, 4, 2**40):
        with pytest.raises(RequestError, match="a position is outside its array"):
            rows.admit([slot], column, code, np.zeros(1))
    with pytest.raises(RequestError, match=r"batch's w has shape \(4, 39\): expected \(4, 40\)"):
        rows.hold(z=np.zeros((4, 40), np.float32), w=np.zeros((4, 39), np.float32))


# --- values of another bundle -------------------------------------------------------------------------------------


@pytest.fixture(params=["native", "numpy", "onnxruntime", "openvino"])
def runtime(request):
    if request.param not in ("native", "numpy"):
        pytest.importorskip(request.param)
    return request.param


def test_B6_samples_of_another_bundle_are_a_request_error_on_every_runtime(world, other, runtime):
    sampler, foreign = Sampler(world, runtime=runtime), Sampler(other, runtime=runtime)
    own = sampler.solve(Request("smile", seed=1, label=2))
    theirs = foreign.solve(Request("smile", seed=1))
    theirs_in_w = foreign.solve(Request("smile", w=theirs[0].w))
    for samples, name in ((theirs, "z"), (theirs_in_w, "w")):
        for use in (sampler.measure, lambda samples: sampler.edit(samples, "glasses")):
            with pytest.raises(RequestError, match=rf"{name} has shape \(32,\): expected \(40,\)"):
                use(samples)
    with pytest.raises(RequestError, match=r"z has shape \(40,\): expected \(32,\)"):
        foreign.measure(own)
    assert sampler.measure(own)[0]["smile"] == pytest.approx(own[0].logits["smile"], abs=1e-4)


@pytest.mark.parametrize("label", [3, 10**9])
def test_B6_a_label_of_another_bundle_is_a_request_error_on_every_runtime(world, runtime, label):
    from dataclasses import replace

    sampler = Sampler(world, runtime=runtime)
    (sample,) = sampler.solve(Request("smile", seed=1, label=2))
    wrong = replace(sample, request=replace(sample.request, label=label))
    with pytest.raises(RequestError, match=rf"label {label} is out of range: expected 0\.\.2"):
        sampler.measure([wrong])


def test_B6_pictures_of_another_bundles_w_are_a_request_error(other):
    from dataclasses import replace

    sampler = Sampler("demo", runtime="native")
    (sample,) = Sampler(other, runtime="native").solve("smile", 1)
    g = sampler.bundle.generator
    with pytest.raises(RequestError, match=rf"w has shape \(32,\): expected \({g.w_dim},\)"):
        sampler.render([sample])
    with pytest.raises(RequestError, match=rf"ws has shape \(2, {g.w_dim}\): expected \({g.num_ws}, {g.w_dim}\)"):
        sampler.render([replace(sample, ws=np.zeros((2, g.w_dim), np.float32))])


# --- threads ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [-1, MOST_THREADS + 1, 100_000])
def test_an_absurd_number_of_threads_is_refused(world, threads):
    with pytest.raises(SolveError, match=rf"threads must be an integer from 0 to {MOST_THREADS}, not {threads}"):
        Sampler(world, runtime="native", threads=threads)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the limit is POSIX's")
def test_B8_threads_that_the_system_refuses_leave_the_work_to_the_others():
    """Each thread wants room for its stack; where there is no more, the system gives none. The bits are the same."""
    code = """
import resource
import numpy as np
from engine import Sampler
expected = Sampler("demo", runtime="native", threads=1).solve("smile", range(8))
own = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (own + 200 * 2**20,) * 2)
found = Sampler("demo", runtime="native", threads=1000).solve("smile", range(8))
assert all(np.array_equal(a.w, b.w) for a, b in zip(expected, found))
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, timeout=120)
