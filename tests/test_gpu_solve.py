"""The cuda runtime on a real GPU: `make gpu`. Nothing here runs without one."""

import contextlib

import numpy as np
import pytest

import engine.sampler
from engine import Request, Sampler
from engine.runtimes import MissingRuntime, open_runtime
from engine.sampler import find_bundle
from engine.solvers import make_solver
from tests import host_kernels
from tests.worlds import random_world

pytest.importorskip("cuda.bindings.driver", reason="needs cuda-bindings")
from engine.cuda.compile import BLOCKS, build
from engine.cuda.driver import NoDevice
from engine.cuda.engine import Engine
from engine.runtimes import cuda
from engine.tensors import sample_tensors, solve_tensors
from tests.fake_kernels import open_fake
from tests.following import admitted, follow, tickets_of

pytestmark = pytest.mark.gpu
CONDITIONS = ("smile & ~glasses & age=0.7", "colour=c2 | smile", "yaw>0.5 & age<0.4", "colour=c1 & near(0.04)", "smile",
              "keep(smile, weight=0.1) & glasses", "2*yaw=0.4 & ~colour=c3")
SETTINGS = ({}, {"steps": 8}, {"solver": "bosh3"}, {"solver": "heun-euler", "clock": "paper"})
# Of the gradient's median, relative; and of the energy: by the precision of the operands.
GRADIENT = {"fp32": 1e-5, "tf32": 3e-3, "fp16": 3e-3}
ENERGY = {"fp32": 1e-3, "tf32": 1e-2, "fp16": 1e-2}


@pytest.fixture(scope="module", params=["fp32", "tf32", "fp16"])
def precision(request):
    return request.param


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Of FFHQ's width, so that every tile of the dense kernels is used."""
    return random_world(tmp_path_factory.mktemp("gpu") / "world.lace", dim=512, layers=8, up_dim=128, graphs=True)


def runtime_for(bundle, precision="fp32"):
    """It draws nothing, so it needs no other library."""
    try:
        return cuda.open_bundle(bundle, precision=precision, decoder=lambda _: pytest.fail("nothing is drawn here"))
    except NoDevice as error:
        pytest.skip(str(error))


@contextlib.contextmanager
def sampler_on(bundle, precision="fp32", **settings):
    runtime = runtime_for(bundle, precision)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine.sampler, "open_runtime", lambda *_, **__: runtime)
        sampler = Sampler(bundle, **settings)
    yield sampler
    runtime.close()


def requests(rows: int) -> list[Request]:
    return [Request(CONDITIONS[seed % len(CONDITIONS)], seed=seed) for seed in range(rows)]


# --- first: each kernel alone -------------------------------------------------------------------------------------


@pytest.mark.skipif(host_kernels.compiler() is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("solver", ["gauss-newton", "bosh3"])
@pytest.mark.parametrize("rows", [3, 40, 130])
def test_every_kernel_gives_what_its_source_gives_on_the_host(world, precision, solver, rows):
    runtime = runtime_for(world, precision)
    host, _ = open_fake(world, precision=precision)
    judge = Sampler(world, runtime="numpy")
    tickets = tickets_of([judge.starts.start(r) for r in requests(rows)])
    engines = runtime.solving.engine, host.solving.engine
    plans = [admitted(engine, tickets, make_solver(solver), capacity=128) for engine in engines]
    worst = follow(*plans, rounds=3)
    assert max(worst.values()) < (2e-5 if precision == "fp32" else 2e-3), worst


def test_gradients_agree_with_float64(world, precision):
    """By quantiles: rounding may carry a unit across the kink of its leaky ReLU, which is no mistake."""
    rng = np.random.default_rng(0)
    z, psi = rng.standard_normal((64, 512)).astype(np.float32), np.full((64, 1), 0.7, np.float32)
    heads = {"smile": np.array([[-1.0, 1.0]]), "age": np.ones((1, 1)), "colour": np.eye(5)[:3]}
    runtime, judge = runtime_for(world, precision), open_runtime(world, "numpy")
    jacobians = []
    for solving in (runtime.solving, judge.solving):
        field = solving.field(world.spaces["z"])
        _, found = field.forward(z, psi, None, heads)
        slopes = np.concatenate([found[name][1] for name in heads], axis=1)
        jacobians.append(field.pullback(np.ascontiguousarray(slopes, np.float32)))
    error = np.linalg.norm(jacobians[0] - jacobians[1], axis=2) / np.linalg.norm(jacobians[1], axis=2)
    assert np.median(error) < GRADIENT[precision]
    assert np.quantile(error, 0.99) < 0.2


# --- then: solves -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_solves_agree_with_the_processor(world, precision, settings):
    """The same work within 5 %, and the same energy."""
    with sampler_on(world, precision, **settings) as sampler:
        found = sampler.solve(requests(64))
    wanted = Sampler(world, runtime="onnxruntime", **settings).solve(requests(64))
    assert [s.status for s in found] == [s.status for s in wanted]
    work = [np.mean([s.evaluations for s in samples]) for samples in (found, wanted)]
    assert work[0] == pytest.approx(work[1], rel=0.05)
    gaps = [a.energy - b.energy for a, b in zip(found, wanted, strict=True)]
    assert np.median(np.abs(gaps)) < ENERGY[precision]
    assert abs(np.mean(gaps)) < 0.02 * np.mean([s.energy for s in wanted]) + ENERGY[precision]


def test_the_demo_reaches_the_energies_of_the_processor(precision):
    demo, condition = find_bundle("demo"), "smile & ~glasses & age=0.7"
    with sampler_on(demo, precision) as sampler:
        found = sampler.solve(condition, seeds=range(64))
    wanted = Sampler(demo).solve(condition, seeds=range(64))
    ends = [np.mean([s.energy for s in samples]) for samples in (found, wanted)]
    assert ends[0] == pytest.approx(ends[1], abs=ENERGY[precision], rel=0.02)


def test_the_graph_gives_the_same_bits_as_the_loop_on_the_host(world, precision):
    results = []
    for loops in (True, False):
        with sampler_on(world, precision, capacity=16) as sampler:
            own = sampler.runtime.solving.engine
            other = Engine(own.device, world, precision, build, blocks=BLOCKS, loops=loops)
            sampler.runtime.solving.engine = other
            results.append(sampler.solve(requests(40)))
            other.close_plans()
    for a, b in zip(*results, strict=True):
        assert np.array_equal(a.z, b.z)
        assert np.array_equal(a.w, b.w)
        assert (a.evaluations, a.energy) == (b.evaluations, b.energy)


def test_rows_do_not_know_their_neighbours(world, precision):
    """At equal capacity, bit for bit, and twice."""
    with sampler_on(world, precision, capacity=8) as sampler:
        together, backwards = sampler.solve(requests(21)), sampler.solve(requests(21)[::-1])[::-1]
        again = sampler.solve(requests(21))
    for a, b, c in zip(together, backwards, again, strict=True):
        assert np.array_equal(a.z, b.z)
        assert np.array_equal(a.z, c.z)


def test_tensors_of_torch_go_in_and_out_without_the_host(world):
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("torch was built without CUDA")
    with sampler_on(world) as sampler:
        z = torch.randn(5, 512, device="cuda")
        solved = solve_tensors(sampler, "smile & age=0.7", z=z)
        wanted = sampler.solve([Request("smile & age=0.7", z=row) for row in z.cpu().numpy()])
        assert torch.from_dlpack(solved.z).is_cuda
        assert np.array_equal(torch.from_dlpack(solved.w).cpu().numpy(), np.stack([s.w for s in wanted]))


def test_arrays_of_cupy_go_in_and_out_without_the_host(world):
    cupy = pytest.importorskip("cupy")
    with sampler_on(world) as sampler:
        z = cupy.random.standard_normal((5, 512), dtype=cupy.float32)
        solved = solve_tensors(sampler, "smile", z=z)
        wanted = sampler.solve([Request("smile", z=row) for row in cupy.asnumpy(z)])
        assert np.array_equal(cupy.asnumpy(cupy.from_dlpack(solved.z)), np.stack([s.z for s in wanted]))


def test_pictures_stay_on_the_device():
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("torch was built without CUDA")
    try:
        sampler = Sampler("demo", runtime="cuda", device="cuda")
    except (NoDevice, MissingRuntime) as error:
        pytest.skip(str(error))
    z = torch.randn(11, sampler.bundle.generator.z_dim, device="cuda")
    solved, pixels = sample_tensors(sampler, "smile", z=z)
    w = torch.from_dlpack(solved.w).cpu().numpy()
    wanted = sampler.runtime.drawing.pixels(np.repeat(w[:, None], sampler.bundle.generator.num_ws, axis=1))
    assert np.array_equal(torch.from_dlpack(pixels).cpu().numpy(), wanted)
