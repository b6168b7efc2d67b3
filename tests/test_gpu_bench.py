"""The measurements of a GPU, tried out on a simulated one: that they run, count and judge; no time means anything."""

import numpy as np
import pytest

pytest.importorskip("cuda.bindings.driver", reason="needs cuda-bindings")
pytest.importorskip("torchdiffeq", reason="needs torchdiffeq")

import engine.sampler
from benchmarks.gpu import __main__ as program
from benchmarks.gpu import checklist, machine, peers, suites
from benchmarks.gpu.table import tables
from benchmarks.worlds import world
from engine.bench.contest import Bench, Peers
from engine.bench.drawing import golden_ws
from engine.bench.problem import Judge, Problem, ordinary
from engine.bench.records import Log, read
from engine.cuda.driver import Device
from engine.runtimes import open_runtime
from kernels.compile import CompileError, nvrtc_version
from tests import host_kernels
from tests.fake_cuda import FakeCuda
from tests.fake_kernels import open_fake
from tests.fake_memory import viewed
from tests.worlds import random_world

needs_compiler = pytest.mark.skipif(host_kernels.compiler() is None, reason="needs a C++ compiler")


@pytest.fixture
def bench(tmp_path, monkeypatch):
    def opened(bundle, name="auto", *, precision=None, **settings):
        return open_fake(bundle)[0] if name == "cuda" else open_runtime(bundle, name, precision=precision)

    for module in (engine.sampler, suites):
        monkeypatch.setattr(module, "open_runtime", opened)
    world = random_world(tmp_path / "world.lace", dim=32, layers=2, graphs=True)
    log = Log(tmp_path / "lines.jsonl", {"commit": "none", "machine": {"cpu": "none"}, "versions": {}})
    judge = Judge(tmp_path, rows=2, tolerance=1e-2)
    return Bench(world, (), log, judge, Peers(), 1, True, lambda _: None, "ours fp32")


@needs_compiler
def test_an_evaluation_is_timed_by_the_device_and_compared_with_its_floor(bench):
    suites.evaluation(bench, (2,))
    (line,) = read(bench.log.path)
    details = line["details"]
    assert line["median"] == details["launches"]  # a kernel takes a millisecond there
    assert details["times_floor"] == pytest.approx(line["median"] / details["floor_ms"], rel=1e-3)
    assert details["gigabytes_per_second"] > 0
    suites.evaluation(bench, (2,))
    assert len(read(bench.log.path)) == 1


@needs_compiler
def test_a_solve_is_one_launch_and_judged(bench):
    suites.solve(bench, (2,))
    (line,) = read(bench.log.path)
    assert line["check"] == "passed"
    assert line["details"]["launches"] == 1
    assert line["details"]["rounds"] >= line["evaluations"]["most"]
    row = tables(bench.log.path).splitlines()[-1]
    assert row.startswith("| ours fp32 | 3 | 2 |")
    assert row.endswith("| passed |")


def test_peers_solve_the_same_problem(bench, monkeypatch):
    monkeypatch.setattr(peers, "DEVICE", "cpu")
    monkeypatch.setattr(peers, "check_torch", lambda: None)
    problem = Problem(bench.bundle, ordinary(bench.bundle, 3), 2)
    answers = {name: peers.solvers(problem)[name]()() for name in ("paper", "torchdiffeq adaptive_heun")}
    for answer in answers.values():
        assert suites.examine(bench, problem, answer)["check"] == "passed"


def test_a_jax_without_a_gpu_says_so(bench, monkeypatch):
    pytest.importorskip("jax", reason="jax is not installed")
    monkeypatch.setattr(peers, "check_torch", lambda: None)
    with pytest.raises(peers.Unavailable, match="without CUDA"):
        peers.solvers(Problem(bench.bundle, ordinary(bench.bundle, 3), 2))["diffrax heun, jit"]()


def test_what_bounds_an_evaluation():
    device = Device(api=FakeCuda())
    assert machine.facts(device)["l2_megabytes"] == 50
    few, many = ({"bytes": 12e6, "flops": flops} for flops in (1e6, 1e12))
    assert machine.floor(device, few, "fp32") == pytest.approx(12e6 / 5.5e12 * 1e3)
    assert machine.floor(device, few, "fp16") == pytest.approx(6e6 / 5.5e12 * 1e3)
    assert machine.floor(device, many, "tf32") == pytest.approx(1e3 / 330)
    assert np.isfinite(list(machine.clock().values())).all()
    device.close()


def test_the_checklist_measures_nodes_and_rounds(monkeypatch):
    """On the simulated device a kernel takes a millisecond."""
    monkeypatch.setattr(checklist, "ROUNDS", 5)
    fake = FakeCuda()

    def again(launch, count, limit, handle):
        rounds = viewed(count, 4).view(np.int32)
        rounds += 1
        fake.set_condition(handle, int(rounds[0] < limit))

    fake.kernels = {"nothing": lambda *_: None, "again": again, "stream": lambda *_: None}
    device = Device(api=fake)
    probes = checklist.Probes(device, b"cubin")
    assert {value for _, value, _ in checklist.launches(device, probes)} == {1000}
    assert [value for _, value, _ in checklist.loops(device, probes)] == [1000, 25_000]
    rates = [value for _, value, _ in checklist.streams(device, probes)]
    assert rates[0] == pytest.approx(checklist.BUFFERS[0] * 100 / 1e-3 / 1e12, rel=1e-2)
    device.close()
    fake.check_nothing_is_left()


def test_the_probes_compile_without_a_gpu():
    try:
        nvrtc_version()
    except CompileError as error:
        pytest.skip(str(error))
    assert checklist.compile_probes("sm_90").startswith(b"\x7fELF")


def test_without_a_gpu_the_program_says_so(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("engine.cuda.driver.bindings", broken := FakeCuda())
    monkeypatch.setattr(Device.__init__, "__defaults__", (0, broken))
    broken.fail["cuInit"] = broken.CUresult.CUDA_ERROR_NO_DEVICE
    assert program.main(["--out", str(tmp_path / "lines.jsonl")]) == 3
    assert "need an NVIDIA GPU" in " ".join(capsys.readouterr().err.split())


def test_peers_draw_the_same_pictures(tmp_path, monkeypatch):
    monkeypatch.setattr(peers, "DEVICE", "cpu")
    monkeypatch.setattr(peers, "check_torch", lambda: None)
    bundle = world(tmp_path, 16, dim=64, hidden=(48, 32), precision="fp16")
    assert bundle.path.stem == "ffhq-16-fp16"
    found = peers.drawers(bundle, golden_ws(bundle, 3))
    for name in ("torch fp32", "torch fp16"):
        images = found[name]()()
        assert images.shape == (3, 3, 16, 16)
        assert suites.examine_half(bundle, images)["check"] == "passed"
