"""The kernels around the solver, compiled for the host, against their numpy twins."""

import ctypes
import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.grammar import parse
from engine.layout import OPCODES, pack, to_operand
from engine.reference import field
from engine.runtimes import to_pixels
from engine.tape import lower
from tests.host_kernels import FRESH, HostSolve, address, call, compiler, library, struct
from tests.test_tape import ATTRIBUTES, WIDTHS

pytestmark = pytest.mark.skipif(compiler() is None and "CI" not in os.environ, reason="no C++ compiler is installed")


@pytest.fixture(scope="module", autouse=True)
def kernels():
    """Once, before hypothesis could try a source that does not compile a hundred times."""
    return library()


TOLERANCE = {np.float64: 1e-12, np.float32: 1e-5}


# --- the ends of the network ------------------------------------------------------------------------------------------


def test_normalise_takes_a_start_and_feeds_the_network():
    random = np.random.default_rng(0)
    start, embedding = random.normal(size=(3, 40)), random.normal(size=(2, 5))
    solve = HostSolve(capacity=2, width=40, input_stride=64, state_stride=64, embedded=5)
    solve.put(
        start=start, start_psi=np.array([0.1, 0.2, 0.3]), label=np.array([0, 0, 1], np.int32), embedding=embedding,
        phase=np.array([FRESH, 2], np.int32), ticket=np.array([2, 1], np.int32), z=np.zeros((2, 40)), psi=np.zeros(2),
        trial=random.normal(size=(2, 40)), input=np.full((2, 64), np.nan), state=np.full((2, 64), np.nan),
        moment=np.zeros(2),
    )
    pending = solve.trial[1].copy()
    solve.run("normalise")
    here = np.stack([start[2], pending])
    x, moment = field.second_moment(here)
    np.testing.assert_allclose(solve.input, np.pad(np.hstack([x, embedding[[1, 0]]]), ((0, 0), (0, 19))), rtol=1e-14)
    np.testing.assert_array_equal(solve.state, np.pad(here, ((0, 0), (0, 24))))
    np.testing.assert_allclose(solve.moment, moment[:, 0], rtol=1e-14)
    assert (solve.z[0] == start[2]).all()
    assert solve.psi.tolist() == [0.3, 0.0]


@pytest.mark.parametrize("linear", [0, 1])
@pytest.mark.parametrize("real", [np.float64, np.float32])
def test_cotangents_and_pullback(linear, real):
    """Two columns on w, one on the state, near; through psi, the last slopes and the normalisation."""
    random = np.random.default_rng(linear)
    width, w_dim, rows, r = 24, 40, 2, 3
    on_w, on_z = random.normal(size=(rows, 2, w_dim)), random.normal(size=(rows, width))
    hidden, trial_w = random.normal(size=(rows, 64)), random.normal(size=(rows, 64))
    anchor_w, psi, near = random.normal(size=(rows, w_dim)), np.array([0.7, 1.0]), np.array([0.0, 0.4])
    weights, slots = random.normal(size=(rows, r)), (r + 1 if linear else 1)
    slopes = [on_w[:, 0].astype(real), on_z.astype(real), on_w[:, 1].astype(real)]
    solve = HostSolve(real, capacity=rows, width=width, w_dim=w_dim, w_stride=64, input_stride=32, columns=r,
                      slots=slots, linear=linear, has_near=1)
    solve.put(
        column=np.stack([struct("Column", slopes=part, row_stride=part.strides[0] // part.itemsize, direct=j == 1)
                         for j, part in enumerate(map(np.ascontiguousarray, slopes))]),
        ticket_columns=np.tile(np.arange(r, dtype=np.int32), (rows, 1)), column_count=np.full(rows, r, np.int32),
        phase=np.full(rows, 2, np.int32), ticket=np.arange(rows, dtype=np.int32), psi=psi.astype(real), near=near,
        weights=weights, hidden=hidden.astype(real), trial_w=trial_w.astype(real), anchor_w=anchor_w.astype(real),
        cotangent=np.full((rows, slots, 64), np.nan, real), unit=np.zeros((rows, slots), real),
        trial=random.normal(size=(rows, width)).astype(real), pulled=random.normal(size=(rows, slots, 32)).astype(real),
        trial_jacobian=np.zeros((rows, slots, width), real),
    )
    solve.put(moment=field.second_moment(solve.trial)[1][:, 0])
    solve.run("cotangents")
    pull = -2 * near[:, None] * (trial_w[:, :w_dim] - anchor_w)
    columns = np.stack([on_w[:, 0], np.zeros((rows, w_dim)), on_w[:, 1], pull], axis=1)
    direct = np.zeros((rows, 4, width))
    direct[:, 1] = on_z
    if not linear:
        factors = np.hstack([weights, np.ones((rows, 1))])[:, :, None]
        columns, direct = (factors * columns).sum(axis=1)[:, None], (factors * direct).sum(axis=1)[:, None]
    expected = psi[:, None, None] * columns * field.slope(hidden[:, None, :w_dim])
    np.testing.assert_allclose(solve.cotangent[:, :, :w_dim], expected, atol=TOLERANCE[real])
    assert (solve.cotangent[:, :, w_dim:] == 0).all()
    assert (solve.unit == 1).all()
    solve.unit[:] = 2.0 ** random.integers(-4, 5, solve.unit.shape)
    solve.run("pullback")
    through = field.pullback({}, solve.trial, np.ones((rows, 1)), [], solve.pulled) * solve.unit[:, :, None]
    np.testing.assert_allclose(solve.trial_jacobian, through + direct, atol=TOLERANCE[real] * np.abs(through).max())


def test_cotangents_in_half_precision_keep_their_digits():
    """Neither 1e-9 nor 1e9 is a half; the power of two is taken out and given back."""
    sizes = np.array([1e-9, 1e9])
    slopes = (sizes[:, None] * np.random.default_rng(1).normal(size=(2, 32))).astype(np.float32)
    solve = HostSolve(np.float32, "fp16", capacity=2, width=32, w_dim=32, w_stride=32, columns=1, slots=1, linear=1)
    solve.put(
        column=struct("Column", slopes=slopes, row_stride=32), ticket_columns=np.zeros((2, 1), np.int32),
        column_count=np.ones(2, np.int32), phase=np.full(2, 2, np.int32), ticket=np.arange(2, dtype=np.int32),
        psi=np.ones(2, np.float32), hidden=np.ones((2, 32), np.float16), cotangent=np.zeros((2, 32), np.float16),
        unit=np.zeros(2, np.float32),
    )
    solve.run("cotangents")
    assert (np.abs(solve.cotangent).max(axis=1) < 1).all()
    given_back = solve.cotangent.astype(float) * solve.unit[:, None]
    assert (np.abs(given_back - slopes).max(axis=1) < 1e-3 * np.abs(slopes).max(axis=1)).all()


# --- dense layers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("real", "precision"), [(np.float64, "fp32"), (np.float32, "tf32"), (np.float32, "fp16")])
def test_the_epilogues_of_a_dense_layer(real, precision):
    """Forwards with truncation and with seeds, and backwards; both problems of the level at once."""
    random, tolerance = np.random.default_rng(3), {"fp32": 1e-13, "tf32": 4e-3, "fp16": 4e-3}[precision]
    rows, k, n, columns = 5, 64, 32, 2
    operand = lambda *shape: rounded(random.normal(size=shape), real, precision)  # noqa: E731
    x, weight, bias = operand(rows, k), operand(n, k), random.normal(size=n).astype(real)
    average, psi, seeds = (random.normal(size=shape).astype(real) for shape in (n, rows, (columns, n)))
    out, truncated = np.zeros_like(x, shape=(rows, n)), np.zeros_like(x, shape=(rows, n))
    exact, seeded = np.zeros((rows, n), real), np.zeros_like(x, shape=(rows * columns, n))
    cotangent, back, activation = operand(rows * columns, k), operand(n, k), operand(rows, n)
    pulled = np.zeros((rows * columns, n), real)
    problems = np.stack([
        struct("Dense", input=x, weight=weight, bias=bias, output=out, exact=exact, average=average, psi=psi,
               truncated=truncated, seeds=seeds, seeded=seeded, columns=columns, n=n, k=k, each=1, leaky=1),
        struct("Dense", input=cotangent, weight=back, exact=pulled, activation=activation, n=n, k=k, each=columns),
    ])
    call("dense_16x8", struct("Level", problems=problems, count=2, rows=rows), real=real, precision=precision)
    hidden = field.leaky(x.astype(float) @ weight.astype(float).T + bias)
    w = average + psi[:, None] * (hidden - average)
    products = (cotangent.astype(float) @ back.astype(float).T).reshape(rows, columns, n)
    expected = {
        "out": (out, hidden), "exact": (exact, w), "truncated": (truncated, w),
        "seeded": (seeded.reshape(rows, columns, n), seeds * field.slope(hidden)[:, None]),
        "pulled": (pulled.reshape(rows, columns, n), products * field.slope(activation)[:, None]),
    }
    for name, (found, twin) in expected.items():
        np.testing.assert_allclose(found, twin, rtol=tolerance, atol=tolerance * np.abs(twin).max(), err_msg=name)


def rounded(values, real, precision):
    return values if real is np.float64 else to_operand(values.astype(real), precision)


@given(st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=20))
def test_operands_are_rounded_as_the_kernels_round(values):
    """A layer with the identity as its weight gives back its input, rounded."""
    given_ = np.resize(np.array(values, np.float32), (1, 32))
    for precision in ("tf32", "fp16"):
        out, eye = to_operand(np.zeros((1, 32)), precision), to_operand(np.eye(32), precision)
        # The bias carries the number: a product with a rounded operand would round it before.
        dense = struct("Dense", input=np.zeros_like(out), weight=eye, bias=given_[0], output=out, n=32, k=32, each=1)
        call("dense_16x8", struct("Level", problems=dense, count=1, rows=1), real=np.float32, precision=precision)
        np.testing.assert_array_equal(out, to_operand(given_, precision))


# --- turnover, packing, pixels ----------------------------------------------------------------------------------------


@given(st.lists(st.sampled_from([0, 1, 2, 3]), min_size=1, max_size=12), st.integers(0, 20), st.integers(0, 20))
def test_waiting_tickets_take_the_free_rows_in_order(phases, count, taken):
    capacity, next_ticket = len(phases), min(taken, count)
    solve = HostSolve(capacity=capacity)
    solve.put(
        queue=np.array([count, next_ticket, 0, 0, 100, 0], np.int32), phase=np.array(phases, np.int32),
        ticket=np.full(capacity, -1, np.int32), counters=np.ones((capacity, 4), np.int32),
        **{name: np.ones(capacity, np.int32) for name in ("status", "stage")},
        **{name: np.ones(capacity) for name in ("clock", "step", "taken", "passes", "error", "reach")},
    )
    solve.run("turnover")
    free = [row for row, phase in enumerate(phases) if phase == 0]
    admitted = free[: count - next_ticket]
    assert solve.ticket[admitted].tolist() == list(range(next_ticket, next_ticket + len(admitted)))
    assert (np.delete(solve.ticket, admitted) == -1).all()
    assert (solve.phase[admitted] == FRESH).all()
    assert (solve.counters[admitted] == 0).all()
    assert (solve.clock[admitted] == 0).all()
    running = capacity - len(free) + len(admitted)
    assert solve.queue.tolist() == [count, next_ticket + len(admitted), running, 1, 100, int(running > 0)]


def test_the_loop_ends_at_its_limit():
    solve = HostSolve(capacity=1)
    solve.put(queue=np.array([0, 0, 0, 7, 7, 1], np.int32), phase=np.array([2], np.int32))
    solve.run("turnover")
    assert solve.queue.tolist() == [0, 0, 1, 8, 7, 0]


def test_packed_tapes_know_their_operands():
    lowered = lower(parse("(smile | 2*age=0.3) & haircolor=blond"), ATTRIBUTES)
    code = [(OPCODES[row[0]], *row[1:]) for row in pack(lowered.program).tolist()]
    names = [name for name, *_ in lowered.program]
    assert [row[0] for row in code] == names == ["difference", "value", "weight", "or", "class", "and"]
    assert code[3][1:] == (0, 0, 0)  # the left operand of the OR is node 0, the right one is the node before
    assert code[5][1:] == (3, 0, 0)
    assert code[4][2] == WIDTHS["haircolor"]
    assert pack(()).shape == (0, 4)


def test_pixels_are_rounded_as_the_sampler_rounds():
    images = np.random.default_rng(5).uniform(-1.2, 1.2, (2, 3, 5, 7)).astype(np.float32)
    edges = (np.arange(2 * 3 * 5 * 7, dtype=np.float32).reshape(images.shape) - 128) / np.float32(127.5)
    for image in (images, edges):
        pixels = np.zeros((2, 5, 7, 3), np.uint8)
        library().host_pixels_f32(*map(ctypes.c_void_p, (address(image), address(pixels))), 2, 3, 35)
        np.testing.assert_array_equal(pixels, to_pixels(image))
