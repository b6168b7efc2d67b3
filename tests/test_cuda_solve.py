"""Whole solves on the simulated device: the real graphs and tables, and the real kernels' sources on the host."""

import re

import numpy as np
import pytest

pytest.importorskip("cuda.bindings.driver", reason="needs cuda-bindings")
import torch

import engine.sampler
from engine import Request, Sampler, layout, sources
from engine.batch import Status
from engine.cuda import solve, tables
from engine.cuda.dlpack import empty
from engine.cuda.engine import MOST_PLANS
from engine.errors import BackendError, RequestError
from engine.runtimes import to_pixels
from engine.solvers import make_solver
from engine.solvers.stochastic import Langevin
from engine.tensors import sample_tensors, solve_tensors
from tests import host_kernels
from tests.fake_cuda import FakeCuda
from tests.fake_kernels import open_fake, view
from tests.following import admitted, follow, tickets_of
from tests.worlds import linear_world, random_world

pytestmark = pytest.mark.skipif(host_kernels.compiler() is None, reason="needs a C++ compiler")
MIXED = ("smile & ~glasses & age=0.7", "colour=c2 | smile", "yaw>0.5 & age<0.4", "colour=c1 & near(0.04)", "smile",
         "keep(smile, weight=0.1) & glasses", "2*yaw=0.4 & ~colour=c3")
SHORT = ("smile & ~glasses", "colour=c2 | smile", "smile", "glasses & yaw>0.3")
SOLVERS = {
    "gauss-newton": {}, "gauss-newton in 6 steps": {"solver": "gauss-newton", "steps": 6}, "bosh3": {"solver": "bosh3"},
    "heun-euler on the paper's clock": {"solver": "heun-euler", "clock": "paper"},
    "rk4 in 8 steps": {"solver": "rk4", "steps": 8},
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return random_world(tmp_path_factory.mktemp("cuda") / "world.lace", dim=48, layers=3, graphs=True)


@pytest.fixture
def on_device(monkeypatch):
    """Opens samplers on simulated devices; at the end they must leave nothing behind."""
    opened = []

    def open_sampler(bundle, loops=True, **settings):
        runtime, fake = open_fake(bundle, loops=loops)
        opened.append((runtime, fake))
        with monkeypatch.context() as patch:
            patch.setattr(engine.sampler, "open_runtime", lambda *_, **__: runtime)
            return Sampler(bundle, **settings), fake

    yield open_sampler
    for runtime, fake in opened:
        runtime.close()
        fake.check_nothing_is_left()


def requests(conditions=MIXED, **settings) -> list[Request]:
    return [Request(condition, seed=seed, **settings) for seed, condition in enumerate(conditions)]


def assert_agree(found, wanted):
    """Rows take the same course; where rounding carries a unit across a kink, a row goes its own way."""
    assert [s.status for s in found] == [s.status for s in wanted]
    pairs = list(zip(found, wanted, strict=True))
    same = [a.evaluations == b.evaluations and np.allclose(a.z, b.z, atol=2e-3) for a, b in pairs]
    assert np.mean(same) >= 0.75
    assert np.median([abs(a.energy - b.energy) for a, b in pairs]) < 1e-3
    assert np.mean([a.energy for a in found]) == pytest.approx(np.mean([b.energy for b in wanted]), rel=0.1)
    assert all(a.logits.keys() == b.logits.keys() for a, b in pairs)


@pytest.mark.parametrize("name", SOLVERS)
def test_one_launch_solves_a_queue_longer_than_the_capacity(world, on_device, name):
    sampler, fake = on_device(world, capacity=2, **SOLVERS[name])
    host = Sampler(world, **SOLVERS[name])
    work = requests(MIXED if "gauss" in name else SHORT)
    fake.calls.clear()
    assert_agree(sampler.solve(work), host.solve(work))
    waves = -(-len(work) // 2) if "steps" in name and "gauss" in name else 1
    assert fake.calls.count("cuGraphLaunch") == waves


def test_the_graph_gives_the_same_bits_as_the_loop_on_the_host(world, on_device):
    by_graph, _ = on_device(world, capacity=4)
    by_host, fake = on_device(world, capacity=4, loops=False)
    for a, b in zip(by_graph.solve(requests()), by_host.solve(requests()), strict=True):
        assert np.array_equal(a.z, b.z)
        assert np.array_equal(a.w, b.w)
        assert (a.evaluations, a.energy) == (b.evaluations, b.energy)
    assert "cuGraphLaunch" not in fake.calls


@pytest.mark.parametrize("solver", ["gauss-newton", "bosh3"])
def test_devices_can_be_compared_kernel_by_kernel(world, solver):
    """What judges a GPU, on two simulated devices: nothing differs, and a kernel that does is named."""
    pairs = [open_fake(world) for _ in range(2)]
    judge = Sampler(world, runtime="numpy")
    tickets = tickets_of([judge.starts.start(r) for r in requests()])
    plans = [admitted(runtime.solving.engine, tickets, make_solver(solver), capacity=4) for runtime, _ in pairs]
    assert max(follow(*plans, rounds=2).values()) == 0
    wrong, kernel = pairs[0][1], pairs[0][1].kernels["pullback"]

    def off(launch, address):
        kernel(launch, address)
        view(plans[0].evaluation.buffers["trial_jacobian"], np.float32, 8)[:] += 1

    wrong.kernels["pullback"] = off
    worst = follow(*plans, rounds=1)
    assert [name for name, gap in worst.items() if gap] == ["pullback"]
    for runtime, fake in pairs:
        runtime.close()
        fake.check_nothing_is_left()


@pytest.mark.slow
def test_operands_in_half_precision_reach_the_same_energies(world):
    runtime, _ = open_fake(world, precision="fp16")
    sampler = Sampler(world, runtime="numpy", capacity=4)
    wanted = sampler.solve(requests())
    sampler.flows.solving = runtime.solving
    sampler.flows.idle.clear()
    gaps = [abs(a.energy - b.energy) for a, b in zip(sampler.solve(requests()), wanted, strict=True)]
    assert 0 < np.median(gaps) < 1e-2
    runtime.close()


def test_a_driver_without_the_loop_gets_it_on_the_host(world, monkeypatch, caplog):
    load = FakeCuda.cuModuleLoadData
    refused = (FakeCuda().CUresult.CUDA_ERROR_NOT_FOUND, None)
    monkeypatch.setattr(FakeCuda, "cuModuleLoadData", lambda f, image: refused if image == b"loop" else load(f, image))
    runtime, fake = open_fake(world)
    assert "runs on the host" in caplog.text
    sampler = Sampler(world, runtime="numpy")
    wanted, sampler.flows.solving = sampler.solve(requests()), runtime.solving
    sampler.flows.idle.clear()
    assert_agree(sampler.solve(requests()), wanted)
    assert "cuGraphLaunch" not in fake.calls
    runtime.close()


def test_a_driver_that_refuses_overlapping_kernels_in_a_loop_gets_plain_ones(world, on_device, caplog):
    sampler, fake = on_device(world)
    fake.refuses_overlap = True
    assert sampler.solve("smile", seeds=[0])[0].status == Status.DONE
    assert "may not overlap" in caplog.text
    assert fake.calls.count("cuGraphLaunch") == 1


def test_rows_do_not_know_their_neighbours(world, on_device):
    """At equal capacity, bit for bit."""
    sampler, _ = on_device(world, capacity=4)
    together = sampler.solve(requests())
    again = sampler.solve(requests()[::-1])[::-1]
    for a, b in zip(together, again, strict=True):
        assert np.array_equal(a.z, b.z)


def test_another_condition_of_the_same_size_builds_nothing(world, on_device):
    sampler, fake = on_device(world)
    sampler.solve("smile & age=0.7", seeds=range(4))
    fake.calls.clear()
    fake.launched.clear()
    found = sampler.solve("~glasses & yaw=0.2", seeds=range(3, 7))
    wanted = Sampler(world, runtime="numpy").solve("~glasses & yaw=0.2", seeds=range(3, 7))
    assert_agree(found, wanted)
    assert {"cuGraphInstantiate", "cuMemAlloc", "cuLaunchKernelEx"}.isdisjoint(fake.calls)
    assert fake.launched


@pytest.mark.parametrize("kind", ["labels", "heads on z", "linear heads", "flow in W"])
def test_every_kind_of_bundle(tmp_path, on_device, kind):
    rng = np.random.default_rng(5)
    if kind == "labels":
        bundle, work = random_world(tmp_path / "a.lace", dim=40, layers=2, labels=3), requests(MIXED[:3], label=2)
    elif kind == "heads on z":
        conditions = ("shape & smile", "~shape & age=0.6 & near(0.01)", "shape | glasses")
        bundle, work = random_world(tmp_path / "a.lace", layers=2, z_head=True), requests(conditions)
    elif kind == "linear heads":
        bundle, work = linear_world(tmp_path / "a.lace"), requests(("a=0.5 & b=-0.3", "a>0.4", "b<0.1 | a=1"))
    else:
        bundle = random_world(tmp_path / "a.lace", dim=40, layers=2)
        work = [Request(c, w=rng.standard_normal(40).astype(np.float32)) for c in (*MIXED[:2], "smile & near(0.1)")]
    sampler, _ = on_device(bundle, capacity=2)
    for settings in ({}, {"solver": "bosh3"}):
        sampler.flows.solver = Sampler(bundle, **settings).flows.solver
        found, wanted = sampler.solve(work), Sampler(bundle, runtime="numpy", **settings).solve(work)
        for a, b in zip(found, wanted, strict=True):
            assert a.energy == pytest.approx(b.energy, rel=0.05, abs=2e-3)
            assert np.allclose(a.w, b.w, atol=5e-2)
            assert (a.z is None) == (b.z is None)


def test_solvers_without_a_kernel_run_step_by_step_on_the_field(world, on_device):
    settings = {"solver": Langevin(steps=5)}
    sampler, fake = on_device(world, **settings)
    found = sampler.solve(requests())
    wanted = Sampler(world, runtime="numpy", **settings).solve(requests())
    for a, b in zip(found, wanted, strict=True):
        assert np.allclose(a.z, b.z, atol=1e-3)
    assert "cuGraphLaunch" not in fake.calls


def test_the_field_gives_jacobians_like_the_judge(world, on_device):
    sampler, _ = on_device(world)
    judge = Sampler(world, runtime="numpy")
    rng = np.random.default_rng(0)
    z, psi = rng.standard_normal((5, 48)).astype(np.float32), np.full((5, 1), 0.7, np.float32)
    heads = {"colour": np.eye(5)[1:3], "age": np.ones((1, 1))}
    rows = np.array([0, 2, 2, 4])
    found, wanted = [], []
    for one, into in ((sampler, found), (judge, wanted)):
        field = one.flows.new_flow().field
        w, heads_found = field.forward(z, psi, None, heads, {"age": np.array([1, 3])})
        into += [w, *(part for pair in heads_found.values() for part in pair)]
        cotangent = np.repeat(np.arange(48.0)[None, None], 5, axis=0) + np.arange(3)[:, None]
        into += [field.pullback(cotangent.astype(np.float32)), field.pullback(cotangent[:4, :1], rows)]
    for a, b in zip(found, wanted, strict=True):
        assert a.shape == b.shape
        assert np.allclose(a, b, rtol=1e-3, atol=1e-4 * np.abs(b).max())


def test_what_arrives_while_others_run_is_drawn_too(world, on_device):
    sampler, _ = on_device(world, capacity=2)
    found = sorted(sampler.stream(requests()), key=lambda sample: sample.seed)
    for a, b in zip(found, sampler.solve(requests()), strict=True):
        assert a.energy == pytest.approx(b.energy, abs=1e-3)
        assert a.image.shape == (4, 4, 3)
    sampler.close()


def test_plain_samples_and_measuring(world, on_device):
    sampler, _ = on_device(world, capacity=2)
    judge = Sampler(world, runtime="numpy")
    plain = sampler.solve(None, seeds=[1, 2])
    assert np.allclose(plain[0].w, judge.solve(None, seeds=[1])[0].w, atol=1e-5)
    assert plain[0].evaluations == 0
    measured, wanted = sampler.measure(plain), judge.measure(judge.solve(None, seeds=[1, 2]))
    assert np.allclose(measured[1]["colour"], wanted[1]["colour"], atol=1e-4)


def test_a_row_that_fails_does_not_touch_the_others(tmp_path, on_device):
    bundle = linear_world(tmp_path / "linear.lace")
    sampler, _ = on_device(bundle, capacity=4)
    good = requests(["a=0.5 & b=-0.3"] * 6)
    found = sampler.solve([Request("a=0.5", z=np.full(8, 3e38, np.float32)), *good])
    assert found[0].status == Status.NONFINITE
    for a, b in zip(found[1:], sampler.solve(good), strict=True):
        assert np.array_equal(a.z, b.z)


def test_plans_that_are_no_longer_used_go(world, on_device):
    sampler, fake = on_device(world)
    for steps in range(1, MOST_PLANS + 3):
        sampler.flows.solver = Sampler(world, steps=steps).flows.solver
        sampler.solve("smile", seeds=[0])
    assert len(sampler.runtime.solving.engine.plans) == MOST_PLANS
    assert len(fake.objects["executable"]) == MOST_PLANS


def test_a_device_without_memory_says_so_and_works_again(world, on_device):
    sampler, fake = on_device(world)
    fake.fail["cuMemAlloc"] = fake.CUresult.CUDA_ERROR_OUT_OF_MEMORY
    with pytest.raises(BackendError, match=r"OUT_OF_MEMORY.*capacity"):
        sampler.solve("smile", seeds=[0])
    fake.fail.clear()
    assert sampler.solve("smile", seeds=[0])[0].status == Status.DONE


def test_a_loop_that_would_not_end_is_ended(world, on_device, monkeypatch):
    """The device counts its rounds; what is not finished by then is a fault and no result."""
    sampler, _ = on_device(world)
    monkeypatch.setattr(solve.settings, "most_evaluations", lambda _: 3)
    with pytest.raises(BackendError, match=r"stopped after . rounds, with 1 rows running"):
        sampler.solve("smile & yaw=0.1", seeds=[0])


def test_every_number_of_the_struct_is_set(world, on_device):
    """What the kernels read and nobody sets would be zero."""
    sampler, _ = on_device(world)
    sampler.solve("smile & near(0.1)", seeds=[0])
    (plan,) = [plan for plan in sampler.runtime.solving.engine.plans.values() if plan.tickets.host["near"].any()]
    runge_kutta = {"stages", "fsal", "proportional", "integral", "rate_slope"}
    left = {name for name in layout.DTYPES["Solve"].names if not plan.solve[name]}
    assert left <= runge_kutta | {"steps", "embedding", "embedded", "in_w", "state", "combined"}


def test_work_spaces_have_the_sizes_that_the_kernels_take():
    source = (sources.folder() / "layout.cuh").read_text()
    for name, size in (("PLAN", solve.plan_size(7)), ("SCRATCH", solve.scratch_size(7, 11))):
        text = re.search(rf"#define {name}\(s\) (.+)", source)[1]
        text = re.sub(r"\(s\)\.", "", text).replace("LL", "")
        assert eval(text, {"columns": 7, "nodes": 11}) == size


# --- tensors -------------------------------------------------------------------------------------------------------


def test_tensors_of_torch_go_in_and_out_without_the_host(world, on_device):
    sampler, _ = on_device(world, capacity=2)
    z = torch.from_numpy(np.random.default_rng(3).standard_normal((3, 48)).astype(np.float32))
    solved = solve_tensors(sampler, "smile & age=0.7", z=z)
    wanted = sampler.solve([Request("smile & age=0.7", z=row.numpy()) for row in z])
    ends, w = torch.from_dlpack(solved.z), torch.from_dlpack(solved.w)
    assert torch.equal(ends, torch.from_numpy(np.stack([s.z for s in wanted])))
    assert np.allclose(solved.energy, [s.energy for s in wanted])
    assert solved.evaluations.tolist() == [s.evaluations for s in wanted]
    sampler.solve("glasses", seeds=range(3))
    assert torch.equal(w, torch.from_numpy(np.stack([s.w for s in wanted])))  # its memory is its own
    edited = solve_tensors(sampler, ["glasses", "smile", "yaw=0.1"], w=w)
    assert edited.z is None
    assert torch.from_dlpack(edited.w).shape == (3, 48)


def test_pictures_are_drawn_before_the_host_waits(world, on_device):
    """5 rows, two a call; the decoder's own stream waits for the solve, the host for neither."""
    sampler, fake = on_device(world)
    z = torch.from_numpy(np.random.default_rng(4).standard_normal((5, 48)).astype(np.float32))
    assert sampler.runtime.drawing.decoder.rows == (2, 1)
    sample_tensors(sampler, "glasses & yaw=0.3", z=z)  # builds the graph
    fake.calls.clear()
    solved, pixels = sample_tensors(sampler, "smile & age=0.7", z=z)
    launched = [name for name in fake.calls if "Launch" in name or "Synchronize" in name]
    assert launched.index("cuStreamSynchronize") > launched.index("cuLaunchKernelEx") > launched.index("cuGraphLaunch")
    w = torch.from_dlpack(solved.w).numpy()
    wanted = sampler.runtime.drawing.synthesize(np.ascontiguousarray(np.repeat(w[:, None], 2, axis=1)))
    assert np.array_equal(torch.from_dlpack(pixels).numpy(), to_pixels(wanted))


def test_tensors_that_do_not_fit_are_refused(world, on_device):
    sampler, _ = on_device(world)
    z = empty(sampler.runtime.solving.engine.device, (2, 48), np.float32)
    for arguments, message in (
        ({}, "give z or w"), ({"z": z, "w": z}, "give z or w"), ({"z": torch.zeros(2, 5)}, r"expected \(rows, 48\)"),
    ):
        with pytest.raises(RequestError, match=message):
            solve_tensors(sampler, "smile", **arguments)
    with pytest.raises(RequestError, match="3 conditions for 2 rows"):
        solve_tensors(sampler, ["smile"] * 3, z=z)
    with pytest.raises(RequestError, match="anchor"):
        solve_tensors(sampler, "smile & near(0.1)", z=z)
    sampler.flows.solver = make_solver("langevin")
    with pytest.raises(RequestError, match="device='cuda'"):
        solve_tensors(sampler, "smile", z=z)


def test_a_table_knows_the_columns_of_its_heads(world, on_device):
    """The difference of two logits, and a logit alone."""
    sampler, _ = on_device(world)
    sampler.solve("smile & colour=c2", seeds=[0])
    (plan,) = sampler.runtime.solving.engine.plans.values()
    columns = plan.evaluation.tables.host["columns"]
    first = sampler.runtime.solving.engine.network.heads["colour"].first
    found = {(int(c["plus"]), int(c["minus"])) for c in columns[:6]}
    assert found == {(1, 0), *((first + i, -1) for i in range(5))}
    assert isinstance(plan.shape, tables.Shape)
