"""Continuous batching: futures end once and rightly, threads do not disturb each other, nothing hangs."""

import math
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ALL_COMPLETED, CancelledError, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import count

import numpy as np
import pytest

from benchmarks import soak
from engine import (
    BackendError,
    ClosedError,
    ConditionError,
    DeadlineError,
    QueueFullError,
    Request,
    RequestError,
    Sampler,
    SolveError,
    Status,
)
from engine.service import Service
from tests.worlds import random_world

DIM, SOON = 16, 20.0  # seconds after which something hangs
PICTURE = np.zeros((1, 1, 3), np.uint8)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return random_world(tmp_path_factory.mktemp("world") / "b", dim=DIM, layers=2, graphs=True)


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """The worlds of numbers have no synthesis."""
    monkeypatch.setattr(Sampler, "render", lambda self, samples: [replace(s, image=PICTURE) for s in samples])


def service_of(sampler: Sampler, **settings) -> Service:
    return Service(sampler.begin, sampler.flows.run, sampler.render, capacity=sampler.capacity, **settings)


@dataclass(frozen=True, slots=True, eq=False)
class Gated:
    """A solver whose every step waits for the test; a row is done after two. Seed 13 breaks it."""

    gate: threading.Semaphore
    entered: threading.Semaphore
    seen: list

    def begin(self, flow, batch, rows):
        self.seen.extend(batch.seeds[row] for row in rows)

    def step(self, flow, batch, rows):
        self.entered.release()
        assert self.gate.acquire(timeout=SOON)
        if 13 in [batch.seeds[row] for row in rows]:
            raise FloatingPointError("seed 13")
        batch.steps[rows] += 1
        batch.status[rows[batch.steps[rows] >= 2]] = Status.DONE


@pytest.fixture
def gated(world):
    """A sampler for one row at a time, two waiting; call ``sampler.flows.solver.gate.release`` for each step."""
    solver = Gated(threading.Semaphore(0), threading.Semaphore(0), [])
    sampler = Sampler(world, runtime="numpy", solver=solver, capacity=1, queue_size=2)
    yield sampler
    solver.gate.release(1000)
    sampler.close(cancel=True)


def request(seed: int) -> Request:
    return Request("smile", seed=seed)


def running(sampler: Sampler, seed: int = 0):
    """Submit a request and wait until its first step has begun."""
    future = sampler.submit(request(seed))
    assert sampler.flows.solver.entered.acquire(timeout=SOON)
    return future


MIXED = [
    *[Request("smile & age=0.7 & ~colour=c2", seed=seed) for seed in range(6)],
    *[Request("glasses | yaw>0.6", seed=seed, truncation=0.5) for seed in range(5)],
    *[Request("age=0.9 & near(0.04) & keep(*)", seed=seed) for seed in range(3)],
    *[Request("smile & yaw=0.2", w=np.full(DIM, x, np.float32)) for x in (-0.5, 0.5)],
    Request(None, seed=9),
]


@pytest.mark.parametrize("capacity", [3, 64])
@pytest.mark.parametrize(("runtime", "threads"), [("native", 2), ("onnxruntime", 1)])
def test_submitted_by_many_threads_gives_the_bits_of_solve(world, runtime, threads, capacity):
    expected = Sampler(world, runtime=runtime, threads=threads, capacity=capacity).solve(MIXED)
    with (
        Sampler(world, runtime=runtime, threads=threads, capacity=capacity) as sampler,
        ThreadPoolExecutor(6) as pool,
    ):
        submitted = pool.map(sampler.submit, MIXED * 3)
        alone = pool.map(lambda request: sampler.solve(request)[0], MIXED)  # calls go on beside it
        samples = [future.result(timeout=SOON) for future in submitted]
        assert all(np.array_equal(a.w, b.w) for a, b in zip(alone, expected, strict=True))
    for sample, wanted, same in zip(samples, MIXED * 3, expected * 3, strict=True):
        assert sample.request is wanted
        assert np.array_equal(sample.w, same.w)
        assert (sample.energy, sample.evaluations, sample.status) == (same.energy, same.evaluations, same.status)


def test_a_full_queue_pushes_back(gated):
    first = running(gated)
    second, third = gated.submit(request(1)), gated.submit(request(2))
    with pytest.raises(QueueFullError, match=r"full with 2 requests.*queue_size"):
        gated.submit(request(3), block=False)
    with pytest.raises(QueueFullError):
        gated.submit(request(3), timeout=0.01)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(gated.submit, request(3))
        gated.flows.solver.gate.release(8)
        fourth = waiting.result(timeout=SOON)
    assert [future.result(timeout=SOON).seed for future in (first, second, third, fourth)] == [0, 1, 2, 3]
    assert gated.flows.solver.seen == [0, 1, 2, 3]


def test_what_is_cancelled_while_it_waits_is_never_run(gated):
    first, second, third = running(gated), gated.submit(request(1)), gated.submit(request(2))
    assert second.cancel()
    gated.flows.solver.gate.release(4)
    assert [first.result(timeout=SOON).seed, third.result(timeout=SOON).seed] == [0, 2]
    assert gated.flows.solver.seen == [0, 2]
    with pytest.raises(CancelledError):
        second.result()


def test_a_running_row_that_is_cancelled_leaves_its_slot(gated):
    first, second = running(gated), gated.submit(request(1))
    assert first.cancel()
    gated.flows.solver.gate.release(3)  # one step that had begun, two of the second row
    assert second.result(timeout=SOON).seed == 1
    assert wait([first], timeout=SOON, return_when=ALL_COMPLETED).done == {first}  # whoever waits has heard of it
    assert not second.cancel()


def test_a_deadline_fails_what_waits_and_what_runs(gated):
    first = running(gated)
    next(iter(gated.service.solving)).deadline = 0.0  # long past
    second, third = gated.submit(request(1), deadline=0.0), gated.submit(request(2), deadline=60)
    gated.flows.solver.gate.release(3)
    for late in (first, second):
        with pytest.raises(DeadlineError, match="deadline passed"):
            late.result(timeout=SOON)
    assert issubclass(DeadlineError, TimeoutError)
    assert third.result(timeout=SOON).seed == 2
    assert gated.flows.solver.seen == [0, 2]


def test_a_deadline_passes_while_all_rows_wait_for_the_decoder(world, monkeypatch):
    """Nothing steps then, so nothing but the clock can wake the solving thread."""
    decoding, gate = threading.Event(), threading.Event()

    def render(self, samples):
        decoding.set()
        assert gate.wait(SOON)
        return list(samples)

    monkeypatch.setattr(Sampler, "render", render)
    with service_of(Sampler(world, runtime="numpy", capacity=1), decode_batch=1) as service:
        done = [service.submit(request(seed)) for seed in range(3)]
        assert decoding.wait(SOON)
        late = service.submit(request(9), deadline=0.05)
        with pytest.raises(DeadlineError):
            late.result(timeout=SOON)
        gate.set()
    assert [future.result().seed for future in done] == [0, 1, 2]


def test_a_bad_request_fails_alone_and_at_once(gated):
    with pytest.raises(ConditionError, match="did you mean 'smile'"):
        gated.submit(Request("smil"))
    with pytest.raises(TypeError, match="expected a Request, found str"):
        gated.submit("smile")
    gated.flows.solver.gate.release(2)
    assert gated.submit(request(1)).result(timeout=SOON).seed == 1


def test_a_fault_fails_the_rows_in_flight_and_the_next_go_on(gated):
    bad, good = running(gated, 13), gated.submit(request(1))
    gated.flows.solver.gate.release(3)
    with pytest.raises(FloatingPointError, match="seed 13"):
        bad.result(timeout=SOON)
    assert good.result(timeout=SOON).seed == 1


def test_a_fault_of_the_decoder_reaches_its_futures(world, monkeypatch):
    def render(samples):
        raise MemoryError("no room for pictures")

    with Sampler(world, runtime="numpy") as sampler:
        assert sampler.submit(request(0)).result(timeout=SOON).image is PICTURE
        monkeypatch.setattr(sampler.service, "render", render)
        with pytest.raises(MemoryError):
            sampler.submit(request(1)).result(timeout=SOON)


def test_memory_is_bounded_while_decoding_is_slow(world, monkeypatch):
    gate, sizes = threading.Event(), []

    def render(self, samples):
        sizes.append(len(samples))
        assert gate.wait(SOON)
        return list(samples)

    monkeypatch.setattr(Sampler, "render", render)
    with service_of(Sampler(world, runtime="numpy", capacity=4, steps=1), queue_size=64, decode_batch=2) as service:
        futures = [service.submit(request(seed)) for seed in range(40)]
        until = time.monotonic() + SOON
        while len(service.waiting) > 32 and time.monotonic() < until:
            time.sleep(0.01)
        time.sleep(0.2)  # in which all would be solved if there were room
        assert len(service.waiting) == 40 - (4 + 2 * 2)
        gate.set()
        assert {future.result(timeout=SOON).seed for future in futures} == set(range(40))
    assert max(sizes) == 2


def test_pictures_wait_for_each_other_while_requests_wait(gated, monkeypatch):
    sizes, render = [], gated.service.render
    monkeypatch.setattr(gated.service, "render", lambda samples: sizes.append(len(samples)) or render(samples))
    monkeypatch.setattr("engine.service.GATHER", SOON)
    futures = [running(gated), gated.submit(request(1)), gated.submit(request(2))]
    gated.flows.solver.gate.release(6)
    wait(futures, timeout=SOON, return_when=ALL_COMPLETED)
    alone = gated.submit(request(3))
    gated.flows.solver.gate.release(2)
    assert alone.result(timeout=SOON / 2).seed == 3
    assert sizes[0] >= 2
    assert sum(sizes) == 4


def test_close_finishes_what_was_submitted_and_refuses_more(gated):
    futures = [running(gated), gated.submit(request(1)), gated.submit(request(2))]
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(gated.submit, request(3))  # for room in the queue
        closing = threading.Thread(target=gated.close)
        closing.start()
        with pytest.raises(ClosedError, match="was closed"):
            waiting.result(timeout=SOON)
    gated.flows.solver.gate.release(6)
    closing.join(SOON)
    assert [future.result(timeout=0).seed for future in futures] == [0, 1, 2]
    gated.close()
    with pytest.raises(ClosedError):
        gated.submit(request(4))
    assert all(thread.has_ended.is_set() for thread in gated.service.threads.values())


def test_close_may_cancel(gated):
    futures = [running(gated), gated.submit(request(1))]
    gated.flows.solver.gate.release()
    gated.close(cancel=True)
    assert all(future.cancelled() for future in futures)
    assert gated.flows.solver.seen == [0]


def test_closing_unused_and_closing_in_a_callback_do_not_hang(world):
    Sampler(world, runtime="numpy").close()
    sampler, closed = Sampler(world, runtime="numpy"), threading.Event()
    sampler.submit(request(0)).add_done_callback(lambda _: (sampler.close(), closed.set()))
    assert closed.wait(SOON)
    sampler.close()


@pytest.mark.parametrize("door", [lambda sampler: sampler, service_of])
def test_an_exception_in_the_with_block_cancels(gated, door):
    opened = door(gated)
    future = opened.submit(request(0))
    assert gated.flows.solver.entered.acquire(timeout=SOON)
    gated.flows.solver.gate.release()
    with pytest.raises(KeyError), opened:
        raise KeyError
    assert future.cancelled()


def test_a_stream_may_be_endless_and_be_left(world):
    drawn = []
    requests = (drawn.append(seed) or request(seed) for seed in count())
    before = threading.active_count()
    stream = Sampler(world, runtime="numpy", capacity=2).stream(requests)
    assert len({next(stream).seed for _ in range(50)}) == 50
    assert len(drawn) <= 50 + 2 + 2 * 8 + 1
    stream.close()
    assert threading.active_count() == before


def test_a_bad_request_ends_a_stream(world):
    stream = Sampler(world, runtime="numpy").stream([request(0), Request("smil")])
    with pytest.raises(ConditionError):
        list(stream)


def test_the_interpreter_ends_though_nobody_closed():
    code = """
from engine import Request, Sampler
sampler = Sampler("demo", threads=1)
futures = [sampler.submit(Request("smile & age=0.7", seed=seed)) for seed in range(100)]
futures[0].result()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_short_soak(monkeypatch):
    monkeypatch.undo()  # with pictures
    monkeypatch.setattr(soak, "CHECKED", 0.1)
    found = soak.run(Sampler("demo", threads=1, capacity=16, queue_size=16), seconds=4, threads=8)
    assert found["faults"] == []
    assert all(found["checks"].values()), found
    assert found["counts"]["finished"] > 0
    assert found["counts"]["refused"] > 0


# --- threads, forks and interrupts: findings B8, B9, B10, B15, C2, C12 ------------------------------------------------


def test_B8_a_refused_thread_fails_that_request_and_the_next_goes_on(world, monkeypatch):
    starting = threading.Thread.start
    with Sampler(world, runtime="numpy") as sampler:
        for refused in ("lace-solve", "lace-decode"):

            def start(self, name=refused):
                if self.name == name:
                    raise RuntimeError("can't start new thread")
                starting(self)

            with monkeypatch.context() as patch:
                patch.setattr(threading.Thread, "start", start)
                with pytest.raises(BackendError, match=r"no thread could be started.*was not queued"):
                    sampler.submit(request(0))
        assert sampler.submit(request(1)).result(timeout=SOON).seed == 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
@pytest.mark.parametrize("runtime", ["native", "onnxruntime", "openvino"])
def test_B9_C2_a_forked_child_submits_after_its_parent_did(runtime):
    code = f"""
import os, sys
from engine import Request, Sampler
sampler = Sampler("demo", runtime="{runtime}", threads=2)
expected = sampler.submit(Request("smile", seed=1)).result(timeout=60).w
child = os.fork()
if not child:
    sample = sampler.submit(Request("smile", seed=1)).result(timeout=60)
    good = (sample.w == expected).all() and sample.image.std() > 0
    sampler.close()
    os._exit(0 if good else 1)
_, status = os.waitpid(child, 0)
again = sampler.submit(Request("smile", seed=1)).result(timeout=60)
sampler.close()
sys.exit(os.waitstatus_to_exitcode(status) or not (again.w == expected).all())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt, ValueError])
def test_B10_a_callback_may_raise_anything(world, error):
    def fail(future):
        raise error("of a callback")

    with Sampler(world, runtime="numpy") as sampler:
        first = sampler.submit(request(0))
        first.add_done_callback(fail)
        assert first.result(timeout=SOON).seed == 0
        assert sampler.submit(request(1)).result(timeout=SOON).seed == 1


def test_B15_deadlines_and_timeouts_of_any_number_keep_their_promise(gated):
    with pytest.raises(RequestError, match="deadline is nan"):
        gated.submit(request(0), deadline=math.nan)
    with pytest.raises(RequestError, match="timeout is 'soon'"):
        gated.submit(request(0), timeout="soon")
    with pytest.raises(DeadlineError):
        gated.submit(request(0), deadline=0).result(timeout=SOON)
    done = [gated.submit(request(1), deadline=math.inf, timeout=math.inf), gated.submit(request(2), deadline=1e12)]
    gated.flows.solver.gate.release(8)
    assert [future.result(timeout=SOON).seed for future in done] == [1, 2]


def test_B15_a_stream_gives_what_is_finished_while_its_source_waits(world):
    more = threading.Event()

    def source():
        yield request(0)
        assert more.wait(SOON)
        yield request(1)

    stream = Sampler(world, runtime="numpy").stream(source())
    assert next(stream).seed == 0
    more.set()
    assert [sample.seed for sample in stream] == [1]


def test_C12_a_sampler_says_how_to_send_it_elsewhere(world):
    with pytest.raises(TypeError, match="hand over the bundle's path"):
        pickle.dumps(Sampler(world, runtime="numpy"))


@pytest.mark.parametrize(("name", "value"), [("capacity", 10**9), ("capacity", 0), ("threads", -1), ("threads", 10**5),
                                             ("threads", "2"), ("queue_size", 1.5)])
def test_C12_absurd_sizes_are_refused_with_their_limits(world, name, value):
    with pytest.raises(SolveError, match=rf"{name} must be an integer from \d+ to \d+"):
        Sampler(world, runtime="numpy", **{name: value})
    assert Sampler(world, runtime="numpy", capacity=np.int64(2)).solve("smile", 1)


@contextmanager
def started(command, *, stdout):
    """A process that does not outlive the test."""
    process = subprocess.Popen(command, stdout=stdout, stderr=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.mark.skipif(sys.platform == "win32", reason="signals differ")
@pytest.mark.parametrize("runtime", ["native", "numpy"])
def test_C12_an_interrupt_ends_a_long_solve_within_two_seconds(runtime):
    code = f"""
from engine import Sampler
sampler = Sampler("demo", runtime="{runtime}", threads=1, solver="gauss-newton", steps=1_000_000)
print("go", flush=True)
sampler.solve("smile & age=0.7", range(64))
"""
    with started([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == "go\n"
        time.sleep(1.0)
        process.send_signal(signal.SIGINT)
        began = time.monotonic()
        _, errors = process.communicate(timeout=SOON)
    assert time.monotonic() - began < 4  # two seconds on a machine that does nothing else
    assert "KeyboardInterrupt" in errors


@pytest.mark.skipif(sys.platform == "win32", reason="signals differ")
@pytest.mark.parametrize("pause", [0.0, 0.02, 0.1])
def test_B15_two_interrupts_end_a_command_without_an_abort(tmp_path, pause):
    command = [sys.executable, "-m", "engine.cli.sample", "demo", "smile", "--count", "20000", "--out",
               str(tmp_path / "out")]
    with started(command, stdout=subprocess.DEVNULL) as process:
        time.sleep(3.0)
        process.send_signal(signal.SIGINT)
        time.sleep(pause)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=SOON)
    assert process.returncode in (130, 1, -signal.SIGINT), (process.returncode, errors)
