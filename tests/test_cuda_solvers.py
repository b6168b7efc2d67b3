"""The solvers' kernels and the tape's, compiled for the host, against their numpy twins."""

import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine import Request, Sampler
from engine.batch import Batch, Status
from engine.cuda.settings import kernel
from engine.layout import pack, padded
from engine.reference import tape
from engine.solvers import gauss_newton
from engine.solvers.compiled import numbers, tableau
from engine.solvers.gauss_newton import GaussNewton
from engine.tape import lower
from tests.host_kernels import FRESH, HostSolve, compiler, library, struct
from tests.test_tape import ATTRIBUTES, SEEDS, TREES, WIDTHS, inputs, logits_of
from tests.worlds import linear_world, random_world

pytestmark = pytest.mark.skipif(compiler() is None and "CI" not in os.environ, reason="no C++ compiler is installed")


@pytest.fixture(scope="module", autouse=True)
def kernels():
    """Once, before hypothesis could try a source that does not compile a hundred times."""
    return library()


TREE_TEST = settings(max_examples=100, deadline=None)


def scratch(columns, nodes):
    return 3 * columns**2 + 5 * columns + 8 * nodes + 2


# --- tape -------------------------------------------------------------------------------------------------------------


def interpreted(program, parameters, u, kind=HostSolve, real=np.float64):
    """The kernel ``tape`` on rows (n, columns) of logits, one tape for all: log p, gradient, curvature."""
    rows, columns = u.shape
    code, places = pack(program), np.arange(columns, dtype=np.int32)
    solve = kind(real, capacity=rows, columns=columns, nodes=len(code), parameters=parameters.shape[1], outputs=columns,
                 heads=1)
    solve.put(
        head=struct("Head", input=u.astype(real), weight=np.eye(columns, dtype=real), bias=np.zeros(columns, real),
                    k=columns, stride=columns, count=columns),
        column=np.stack([struct("Column", plus=j, minus=-1) for j in places]), code=np.tile(code, (rows, 1, 1)),
        phase=np.full(rows, FRESH, np.int32), ticket=np.arange(rows, dtype=np.int32), parameter=parameters,
        ticket_columns=np.tile(places, (rows, 1)), column_count=np.full(rows, columns, np.int32),
        code_length=np.full(rows, len(code), np.int32), scratch=np.full((rows, scratch(columns, len(code))), np.nan),
        trial_logits=np.zeros((rows, columns), real), trial_logp=np.zeros(rows), weights=np.zeros((rows, columns)),
        curvature=np.zeros((rows, columns, columns)),
    )
    solve.run("tape")
    return solve.trial_logp, solve.weights, solve.curvature


def compare_tapes(condition, seed, scale=1.0, kind=HostSolve, real=np.float64, **options):
    lowered = lower(condition, ATTRIBUTES, **options)
    lowered = lowered.anchored({name: np.linspace(-1, 1, width) for name, width in WIDTHS.items()})
    parameters, u = inputs(lowered, logits_of(seed, scale=scale))
    compare_programs(lowered.program, parameters, u, kind, real)


def compare_programs(program, parameters, u, kind=HostSolve, real=np.float64):
    u = u.astype(real).astype(float)
    found, twin = interpreted(program, parameters, u, kind, real), tape.evaluate(program, parameters, u)
    for ours, theirs in zip(found, twin, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-10, atol=1e-10 * max(1.0, np.abs(theirs).max(initial=0)))


@TREE_TEST
@given(TREES, SEEDS, st.sampled_from([0.1, 1.0, 30.0]))
def test_the_tape_in_product_logic(condition, seed, scale):
    compare_tapes(condition, seed, scale)


@TREE_TEST
@given(TREES, SEEDS, st.sampled_from([1.0, 0.7]))
def test_the_tape_in_the_papers_logic(condition, seed, temperature):
    compare_tapes(condition, seed, logic="lace", temperature=temperature)


@pytest.mark.parametrize("nodes", [6, 10])
def test_a_program_that_mixes_both_logics(nodes):
    """No condition lowers to it, but the twin defines it: an OR hides what is below it from the NOT above."""
    program = (("difference", 0, 0), ("difference", 1, 1), ("lace_or",), ("difference", 2, 2), ("or",), ("not",),
               ("class", 0, 3, 3), ("lace_or",), ("weight", 4), ("not",))
    parameters = np.tile([1.0, -1.0, 1.0, 2.0, 1.5], (5, 1))
    compare_programs(program[:nodes], parameters, np.random.default_rng(0).normal(size=(5, 3)))


# --- solvers ----------------------------------------------------------------------------------------------------------


class Rig:
    """A queue of tickets that the control kernels work off; the twin evaluates the flow for them."""

    def __init__(self, sampler, requests, capacity, real=np.float64, room=0, kind=HostSolve):
        self.flow, self.solver = sampler.flows.new_flow(), sampler.flows.solver
        tickets = [sampler.starts.start(request) for request in requests]
        n, g = len(tickets), sampler.bundle.generator
        columns = max(len(t.tape.columns) for t in tickets) + room
        near, linear = any(t.tape.near for t in tickets), isinstance(self.solver, GaussNewton)
        slots = columns + near if linear else 1
        stages = 0 if linear else len(self.solver.tableau.b)
        self.batch = Batch(n, g.z_dim, g.w_dim, np.float64)  # by ticket: what the twin's evaluation asks for
        for row, ticket in enumerate(tickets):
            self.batch.admit(row, ticket)
        self.solve = s = kind(
            real, capacity=capacity, width=g.z_dim, w_dim=g.w_dim, w_stride=padded(g.w_dim), columns=columns,
            slots=slots, has_near=near, **numbers(self.solver),
        )
        rows = lambda *shape: np.full((capacity, *shape), np.nan, real)  # noqa: E731
        s.put(
            start=self.batch.z.astype(real), near=self.batch.near, anchor=self.batch.anchor_z.astype(real),
            anchor_w=self.batch.anchor_w.astype(real), column_count=np.int32([len(t.tape.columns) for t in tickets]),
            result_z=np.full((n, g.z_dim), np.nan, real), result_w=np.full((n, g.w_dim), np.nan, real),
            result_logp=np.full(n, np.nan), result_status=np.full(n, -1, np.int32),
            result_counters=np.zeros((n, 4), np.int32), tableau=tableau(self.solver),
            queue=np.array([n, 0, 0, 0, 10_000, 0], np.int32), z=rows(g.z_dim), w=rows(g.w_dim), gradient=rows(g.z_dim),
            rest=rows(g.z_dim), jacobian=rows(columns, g.z_dim),
            slopes=rows(stages, g.z_dim), trial=rows(g.z_dim), trial_w=rows(padded(g.w_dim)), velocity=rows(g.z_dim),
            trial_rest=rows(g.z_dim), trial_jacobian=rows(slots, g.z_dim), weights=np.full((capacity, columns), np.nan),
            plan=np.full((capacity, 3 * columns**2 + 5 * columns + 6), np.nan),
            curvature=np.full((capacity, columns**2), np.nan), scratch=np.full((capacity, scratch(columns, 0)), np.nan),
            counters=np.zeros((capacity, 4), np.int32),
            **{name: np.zeros(capacity, np.int32) for name in ("ticket", "phase", "status", "stage")},
            **{name: np.zeros(capacity) for name in ("clock", "step", "taken", "passes", "error", "reach", "logp",
                                                     "trial_logp")},
        )

    def run(self):
        s = self.solve
        s.run("turnover")
        while s.queue[5]:
            self.evaluate()
            s.run(kernel(self.solver))
            s.run("turnover")
        return s

    @np.errstate(invalid="ignore")
    def evaluate(self):
        """As the kernels from normalise to pullback would: for every row that is not idle."""
        s, linear = self.solve, self.solve.numbers["linear"]
        for row in np.flatnonzero(s.phase):
            ticket = s.ticket[row : row + 1]
            if s.phase[row] == FRESH:
                s.z[row] = s.trial[row] = s.start[ticket]
            z, near = s.trial[row : row + 1].astype(float), self.batch.near[ticket]
            point = self.flow.evaluate(self.batch, ticket, z, linear=True)
            r = len(self.batch.tapes[ticket[0]].columns)
            gap_z, gap_w = z - self.batch.anchor_z[ticket], point.w - self.batch.anchor_w[ticket]
            s.trial_logp[row] = point.logp[0] + near[0] * ((gap_z**2).sum() + (gap_w**2).sum())
            s.trial_w[row, : point.w.shape[1]] = point.w[0]
            through_network = point.gradient[0] + 2 * near[0] * gap_z[0]
            if linear:
                s.weights[row, :r], s.trial_jacobian[row, :r] = point.cotangents[0, :r], point.jacobian[0, :r]
                s.curvature[row, : r * r] = point.curvature[0, :r, :r].ravel()
                if s.numbers["has_near"]:
                    s.trial_jacobian[row, -1] = through_network - point.cotangents[0, :r] @ point.jacobian[0, :r]
            else:
                s.trial_jacobian[row, 0] = through_network


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return random_world(tmp_path_factory.mktemp("rows") / "b", dim=16, layers=2, z_head=True)


CONDITIONS = ["smile & age=0.75", "3*(colour=c2 & ~glasses) | shape", "near(0.3) & age=0.2 & yaw>0.5", None,
              "age=9 & age=-9 & colour=c1"]
SOLVERS = [
    {"solver": "gauss-newton"}, {"solver": "gauss-newton", "rtol": 1e-3, "atol": 1e-3, "max_evaluations": 200},
    {"solver": "gauss-newton", "max_evaluations": 9}, {"solver": "gauss-newton", "steps": 6},
    {"solver": "dopri5", "max_evaluations": 300}, {"solver": "bosh3", "clock": "paper", "max_evaluations": 300},
    {"solver": "heun-euler", "max_evaluations": 300}, {"solver": "euler", "steps": 20}, {"solver": "rk4", "steps": 5},
]


@pytest.mark.parametrize("options", SOLVERS, ids=str)
def test_the_control_kernels_solve_as_their_twins_do(world, options):
    sampler = Sampler(world, runtime="numpy", **options)
    requests = [Request(CONDITIONS[seed % len(CONDITIONS)], seed=seed) for seed in range(10)]
    solve = Rig(sampler, requests, capacity=3).run()
    for i, sample in enumerate(sampler.solve(requests)):
        assert Status(solve.result_status[i]) == sample.status
        counters = [sample.steps, sample.evaluations, sample.rejected, sample.forced]
        assert list(solve.result_counters[i]) == counters
        np.testing.assert_allclose(solve.result_z[i], sample.z, rtol=1e-7, atol=1e-8)
        np.testing.assert_allclose(solve.result_w[i], sample.w, rtol=1e-7, atol=1e-8)
        assert solve.result_logp[i] == pytest.approx(-sample.energy, rel=1e-7, abs=1e-8)


def test_the_control_kernels_in_single_precision(tmp_path):
    """On a flow without kinks rounding stays small."""
    world = linear_world(tmp_path / "b")
    for options in ({"solver": "gauss-newton"}, {"solver": "dopri5"}):
        sampler = Sampler(world, runtime="numpy", **options)
        requests = [Request("a=0.9 & b=0.1", seed=seed) for seed in range(6)]
        solve = Rig(sampler, requests, capacity=4, real=np.float32).run()
        for i, sample in enumerate(sampler.solve(requests)):
            assert Status(solve.result_status[i]) == Status.DONE
            assert solve.result_counters[i, 1] == sample.evaluations
            np.testing.assert_allclose(solve.result_z[i], sample.z, atol=2e-5)


def test_a_row_does_not_know_its_place(world):
    """Other capacities and wider tables give the same bits."""
    sampler = Sampler(world, runtime="numpy")
    requests = [Request(CONDITIONS[seed % 3], seed=seed) for seed in range(7)]
    one, other = (Rig(sampler, requests, capacity, room=room).run() for capacity, room in ((7, 0), (2, 3)))
    np.testing.assert_array_equal(one.result_z, other.result_z)
    np.testing.assert_array_equal(one.result_counters, other.result_counters)


@pytest.mark.parametrize("name", ["gauss-newton", "dopri5"])
def test_a_value_that_is_not_finite_ends_its_row_alone(world, name):
    sampler = Sampler(world, runtime="numpy", solver=name)
    requests = [Request("smile & age=0.75", seed=seed) for seed in range(3)]
    rig = Rig(sampler, requests, capacity=3)
    rig.solve.start[1, 0] = np.nan
    solve = rig.run()
    assert [Status(status).name for status in solve.result_status] == ["DONE", "NONFINITE", "DONE"]
    assert solve.result_counters[1].tolist() == [0, 1, 0, 0]


# --- the linear flow --------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(SEEDS, st.integers(1, 9), st.integers(0, 3), st.sampled_from([0.0, 0.3]), st.sampled_from([1e-3, 1.0, 1e4]))
def test_a_proposal_is_that_of_the_linear_flow(seed, r, rank, near, stiffness):
    """Against the definition, with the full matrix: also for curvatures and Jacobians that lack rank."""
    random = np.random.default_rng(seed)
    width, h = 12, 0.3
    jacobian, g, rest = random.normal(size=(r, width)), random.normal(size=r), random.normal(size=width) * (near > 0)
    jacobian[r // 2 :] = jacobian[: r - r // 2]
    factors = random.normal(size=(r, rank)) * np.sqrt(stiffness)
    curvature = factors @ factors.T
    solver = GaussNewton(steps=1)
    solve = HostSolve(capacity=1, width=width, w_dim=1, w_stride=32, columns=r, slots=r + 1, has_near=1,
                      **numbers(solver) | {"length": h})
    zero, start = np.zeros((1, width)), random.normal(size=(1, width))
    one = {name: np.zeros(1) for name in ("clock", "step", "taken", "passes", "error", "reach", "logp", "trial_logp")}
    solve.put(
        phase=np.full(1, FRESH, np.int32), start=start, z=start.copy(), trial=start.copy(), near=np.full(1, near),
        # The anchor is the start, so that near's gradient is what its cotangent brings.
        anchor=start.copy(), anchor_w=np.zeros((1, 1)), column_count=np.full(1, r, np.int32), trial_w=np.zeros((1, 32)),
        w=np.zeros((1, 1)), rest=zero.copy(), trial_rest=zero.copy(), velocity=zero.copy(),
        jacobian=np.zeros((1, r, width)), trial_jacobian=np.vstack([jacobian, rest]), weights=g.copy(),
        curvature=curvature.copy(), plan=np.zeros(3 * r * r + 5 * r + 6), scratch=np.zeros(scratch(r, 0)),
        counters=np.zeros((1, 4), np.int32), **one,
        **{name: np.zeros(1, np.int32) for name in ("ticket", "status", "stage")},
    )
    solve.run("gauss_newton")
    flow = -(jacobian.T @ curvature @ jacobian + 2 * gauss_newton.NEAR_STRETCH * near * np.eye(width))
    s = np.linalg.inv(np.eye(width) - gauss_newton.GAMMA * h * flow)
    once = s @ (jacobian.T @ g + rest)
    expected = h * (gauss_newton.GAMMA * once + (1 - gauss_newton.GAMMA) * s @ once)
    np.testing.assert_allclose(solve.trial[0] - start[0], expected, atol=1e-9 * max(1.0, np.abs(expected).max()))
