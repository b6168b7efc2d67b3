"""The measurements of a GPU, tried out on a simulated one: that they run, count and judge; no time means anything."""

from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("cuda.bindings.driver", reason="needs cuda-bindings")
pytest.importorskip("torchdiffeq", reason="needs torchdiffeq")

import engine.sampler
from benchmarks.gpu import __main__ as program
from benchmarks.gpu import layers, machine, peers, probes, suites
from benchmarks.gpu.table import tables
from benchmarks.worlds import world
from engine.bench.contest import Bench, Peers
from engine.bench.drawing import golden_ws
from engine.bench.problem import Judge, Problem, ordinary
from engine.bench.records import Log, read
from engine.cuda.compile import BLOCKS, CompileError, nvrtc_version
from engine.cuda.driver import Device
from engine.cuda.evaluation import Kernels
from engine.runtimes import open_runtime
from tests import host_kernels
from tests.fake_cuda import FakeCuda
from tests.fake_kernels import build, fake_cuda, open_fake
from tests.fake_launches import GPCS, PROCESSORS
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


@needs_compiler
@pytest.mark.parametrize(("capability", "widest"), [((9, 0), "dense_64x64 fp16"), ((8, 0), "dense_64x32 fp16")])
def test_a_layer_is_timed_by_every_kernel_that_the_device_has(bench, monkeypatch, capability, widest):
    def open_kernels(precision):
        fake = fake_cuda(precision)
        fake.capability = capability
        opened.append(fake)
        device = Device(api=fake)
        return device, Kernels(device, precision, build, BLOCKS)

    opened = []
    monkeypatch.setattr(layers, "open_kernels", open_kernels)
    monkeypatch.setattr(layers, "PRECISIONS", ("fp16",))
    monkeypatch.setattr(layers, "SIDE", 64)
    bench = replace(bench, only="")
    layers.layers(bench, (5,))
    lines = read(bench.log.path)
    assert {line["check"] for line in lines} == {"passed"}
    assert {line["median"] for line in lines} == {1}
    assert [line["contestant"] for line in lines][-1] == widest
    assert len(lines) == 3 + ("64x64" in widest)
    assert "dense_16x8 fp16" in tables(bench.log.path)
    opened[0].check_nothing_is_left()


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


@pytest.fixture
def probed(monkeypatch):
    """Opens the probes on a simulated device, where a kernel takes a millisecond."""
    monkeypatch.setattr(probes, "ROUNDS", 5)
    opened = []

    def open_probes(capability=(9, 0), **kernels):
        fake = FakeCuda(kernels)
        fake.capability = capability
        opened.append((Device(api=fake), fake))
        return probes.Probes(opened[-1][0], b"probes", b"loop"), fake

    yield open_probes
    for device, fake in opened:
        device.close()
        fake.check_nothing_is_left()


def values(part, found):
    return [value for _, value, _ in part(found.device, found)]


def test_the_checklist_measures_nodes_and_rounds(probed):
    def again(launch, count, limit, handle):
        rounds = viewed(count, 4).view(np.int32)
        rounds += 1
        fake.set_condition(handle, int(rounds[0] < limit))

    found, fake = probed(nothing=lambda *_: None, again=again, stream=lambda *_: None)
    assert set(values(probes.launches, found)) == {1000}
    assert values(probes.loops, found) == [1000, 25_000]
    rates = values(probes.streams, found)
    assert rates[0] == pytest.approx(probes.BUFFERS[0] * 100 / 1e-3 / 1e12, rel=1e-2)


@pytest.mark.parametrize("capability", [(9, 0), (8, 0)])
def test_the_checklist_measures_barriers(probed, capability):
    """The launches ask for what their kernels need: all blocks at once, or clusters."""
    seen = {}
    names = ("grid_barrier", "grid_sync", "cluster_barrier", "cluster_gather")
    kernels = {name: lambda launch, *_, name=name: seen.setdefault(name, set()).add(launch) for name in names}
    found, _ = probed(capability, **kernels)
    times = values(probes.barriers, found)
    assert set(times) == {200}
    assert {(launch.grid[0], launch.cooperative) for launch in seen["grid_sync"]} == {(132, True)}
    assert seen["grid_barrier"] == seen["grid_sync"]
    if capability == (8, 0):
        assert set(seen) == {"grid_barrier", "grid_sync"}
    else:
        assert {launch.cluster for launch in seen["cluster_gather"]} == {8, 16}


def test_the_checklist_finds_which_processors_lie_together(probed):
    """A cluster is placed anywhere in a graphics cluster, whose processors' numbers are spread."""
    random = np.random.default_rng(0)
    order = random.permutation(PROCESSORS)
    gpcs = np.split(order, np.cumsum(GPCS)[:-1])

    def whereabouts(launch, processor, nanoseconds):
        places = [random.permutation(gpc)[: len(gpc) // launch.cluster * launch.cluster] for gpc in gpcs]
        assert launch.grid[0] == sum(map(len, places))
        viewed(processor, 4 * launch.grid[0]).view(np.uint32)[:] = np.concatenate(places)

    found, _ = probed(large=lambda *_: None, whereabouts=whereabouts)
    facts = {name: value for name, value, _ in probes.clusters(found.device, found)}
    assert (facts["clusters of 8"], facts["clusters of 16"]) == (16, 8)
    assert facts["processors of each GPC"] == list(GPCS)
    assert sorted(facts[f"processors of GPC {i}"] for i in range(8)) == sorted(sorted(g.tolist()) for g in gpcs)


def test_a_gpu_without_clusters_says_so(probed):
    assert values(probes.clusters, probed((8, 0))[0]) == ["none"]


def test_links_are_joined_into_groups():
    assert probes.together([[1, 2], [3, 4], [5], [2, 3], [6, 5]]) == [[1, 2, 3, 4], [5, 6]]
    assert probes.together([]) == []


def test_the_checklist_measures_a_matrix_product(probed):
    seen = []

    def gemv(launch, weight, rows, output, k, rounds):
        viewed(weight, 2 * 16 * launch.grid[0] * k)
        seen.append((launch.grid[0], launch.block, k))

    found, _ = probed(gemv=gemv)
    one, weights, flops, *_ = values(probes.products, found)
    assert one == 200
    assert weights == pytest.approx(2 * 512 * 512 / 200e-6 / 1e12, abs=1e-3)
    assert flops == pytest.approx(8 * weights, abs=1e-2)
    assert set(seen) == {(32, 256, 512), (132, 256, 512)}


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_120"])
def test_the_probes_compile_without_a_gpu(architecture):
    try:
        nvrtc_version()
    except CompileError as error:
        pytest.skip(str(error))
    assert all(cubin.startswith(b"\x7fELF") for cubin in probes.compile_probes(architecture))


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
