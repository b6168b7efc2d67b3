"""Numbers that are too large end as NONFINITE, on every runtime and in every solver, and never as finite and wrong."""

import numpy as np
import pytest

from engine import Request, Sampler, Status
from engine.layout import OPCODES, pack
from engine.reference import field as twin
from engine.reference.noise import normals
from engine.reference.tape import evaluate
from engine.solvers import Langevin
from tests import host_kernels, test_native
from tests.host_kernels import HostSolve, compiler
from tests.worlds import random_world

DIM = 40
pytestmark = test_native.pytestmark


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return random_world(tmp_path_factory.mktemp("overflow") / "w.lace", dim=DIM, layers=3, z_head=True, graphs=True)


@pytest.fixture(params=["native", "numpy", "onnxruntime", "openvino"])
def runtime(request):
    if request.param not in ("native", "numpy"):
        pytest.importorskip(request.param)
    return request.param


def far(scale: float, condition: str | None, seed: int = 1, **values) -> Request:
    return Request(condition, seed=seed, z=np.sign(normals(seed, 0, DIM)) * np.float32(scale), **values)


CONDITIONS = ("smile", "smile | glasses & age=0.4", "near(0.1) & smile", "keep(smile, weight=1) & glasses", "shape",
              None)
SOLVERS = [{}, {"steps": 2}, {"solver": "bosh3"}, {"solver": "rk4", "steps": 2}, {"solver": Langevin(steps=2)}]


@pytest.mark.parametrize("settings", SOLVERS, ids=str)
def test_B14_a_latent_whose_squares_overflow_is_not_finite_on_every_runtime(world, runtime, settings):
    """s = sqrt(mean z^2) would be infinite and z / s zero: the same finite and wrong picture for all of them."""
    sampler = Sampler(world, runtime=runtime, **settings)
    for scale in (1e19, 1e30, 3e38):
        found = sampler.solve([far(scale, condition) for condition in CONDITIONS])
        assert [sample.status for sample in found] == [Status.NONFINITE] * len(CONDITIONS), scale
    below = sampler.solve([far(2e18, condition) for condition in ("smile", None)])
    assert {sample.status for sample in below} == {Status.DONE}
    assert all(np.isfinite(sample.w).all() for sample in below)


def test_B14_a_row_that_overflows_changes_no_neighbour(world, runtime):
    sampler = Sampler(world, runtime=runtime)
    own = [Request(condition, seed=seed) for seed, condition in enumerate(CONDITIONS)]
    mixed = sampler.solve([request for pair in zip(own, (far(1e19, c) for c in CONDITIONS), strict=True)
                           for request in pair])
    for alone, found in zip(sampler.solve(own), mixed[::2], strict=True):
        assert found.status == alone.status == Status.DONE
        assert np.allclose(found.w, alone.w, atol=0 if sampler.runtime.solving.row_independent else 1e-12)


def test_an_infinite_w_is_not_finite(world, runtime):
    """A truncation that float32 holds, but not times w, or not at all."""
    for psi in (3e38, 1e39):
        found = Sampler(world, runtime=runtime).solve([Request(c, seed=2, truncation=psi) for c in (None, "shape")])
        if runtime != "numpy":  # float64 holds it
            assert {sample.status for sample in found} == {Status.NONFINITE}
        assert all(np.isfinite(sample.w).all() for sample in found if sample.status == Status.DONE)


def test_infinite_logits_are_not_finite_on_every_runtime(tmp_path, runtime):
    """log sigmoid(infinity) is 0: met, it would seem, by a number that has overflowed."""
    world = random_world(tmp_path / "w.lace", dim=DIM, layers=3, graphs=True)
    sampler = Sampler(world, runtime=runtime)
    found = sampler.solve([Request(condition, w=np.full(DIM, 3e38, np.float32))
                           for condition in ("smile", "~smile", "age>0.5 | smile")])
    if runtime != "numpy":
        assert {sample.status for sample in found} == {Status.NONFINITE}
    assert all(np.isfinite(sample.energy) for sample in found if sample.status == Status.DONE)


# --- the twins ----------------------------------------------------------------------------------------------------


LEAF = {"class": 3, "not_class": 3, "tempered": 3, "difference": 1, "value": 1, "not_value": 1, "side": 1, "keep": 2}
PARAMETERS = {"class": [1], "not_class": [1], "tempered": [1, 0.5], "difference": [1], "keep": [1, 0, 0]}


def leaf(name: str) -> tuple[tuple, list[float]]:
    count = LEAF[name]
    places = (0, count, 0) if count > 1 else (0, 0)
    return (name, *places), PARAMETERS.get(name, [0.5, 2.0])


@pytest.mark.parametrize("name", LEAF)
@pytest.mark.parametrize("number", [np.inf, -np.inf, np.nan])
def test_a_leaf_with_an_infinite_logit_has_no_value(name, number):
    node, parameters = leaf(name)
    for place in range(LEAF[name]):
        u = np.full((2, LEAF[name]), 0.3)
        u[1, place] = number
        for program in ((node,), (node, node, ("or",)), (node, node, ("and",)), (node, ("not",))):
            with np.errstate(all="ignore"):
                v, *_ = evaluate(program, np.array([parameters] * 2, float), u)
            assert np.isfinite(v).tolist() == [True, False]
            assert np.isfinite(on_the_host(program, parameters, u)).tolist() == [True, False]


def on_the_host(program: tuple, parameters: list[float], u: np.ndarray) -> np.ndarray:
    """The kernels' text for the same."""
    rows, columns = u.shape
    solve = HostSolve(capacity=rows, columns=columns, nodes=len(program), parameters=len(parameters), outputs=columns,
                      heads=0)
    table = np.concatenate([np.atleast_1d(host_kernels.struct("Column", plus=j, minus=-1)) for j in range(columns)])
    solve.put(
        phase=np.full(rows, 2, np.int32), ticket=np.arange(rows, dtype=np.int32), trial_logits=u,
        trial_logp=np.zeros(rows), column=table, ticket_columns=np.tile(np.arange(columns, dtype=np.int32), (rows, 1)),
        column_count=np.full(rows, columns, np.int32), code=np.tile(pack(program), (rows, 1, 1)),
        code_length=np.full(rows, len(program), np.int32), parameter=np.tile(np.array(parameters, float), (rows, 1)),
        weights=np.zeros((rows, columns)), curvature=np.zeros((rows, columns, columns)),
        scratch=np.zeros((rows, columns * (3 * columns + 5) + 8 * len(program) + 2)),
    )
    solve.run("tape")
    return solve.trial_logp


@pytest.mark.skipif(compiler() is None, reason="no C++ compiler is installed")
@pytest.mark.parametrize("scale", [2e18, 1e19, 3e38])
def test_B14_the_kernels_say_so_too(scale):
    z = np.full((1, DIM), scale, np.float32)
    solve = HostSolve(np.float32, capacity=1, width=DIM, input_stride=64, state_stride=64)
    solve.put(start=z, start_psi=np.ones(1, np.float32), label=np.zeros(1, np.int32), phase=np.ones(1, np.int32),
              ticket=np.zeros(1, np.int32), z=z.copy(), psi=np.zeros(1, np.float32), trial=z.copy(),
              input=np.zeros((1, 64), np.float32), moment=np.zeros(1, np.float32))
    solve.run("normalise")
    with np.errstate(over="ignore"):
        x, s = twin.second_moment(z)
    assert np.isfinite(solve.moment).all() == np.isfinite(s).all() == (scale < 1e19)
    np.testing.assert_allclose(solve.input[:, :DIM], x, rtol=1e-5)


def test_every_leaf_is_tried():
    assert set(LEAF) == set(OPCODES[: len(LEAF)])
