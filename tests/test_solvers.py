"""Solvers against closed forms, invariants and torchdiffeq."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.linalg import expm
from torchdiffeq import odeint

from engine import Request, Sampler, SolveError, Status
from engine.clock import CLOCKS
from engine.solvers import SOLVERS, TABLEAUS, make_solver
from engine.solvers.control import remaining_budget_step
from engine.solvers.tableaus import Tableau, trees
from kernels.noise import normals
from tests.worlds import linear_world, random_world

LENGTH = CLOCKS["flow"][0]
CONDITION = "smile & ~glasses & age=0.75"
ADAPTIVE = ["gauss-newton", *(name for name, t in TABLEAUS.items() if t.error is not None)]


@pytest.fixture(scope="module")
def linear(tmp_path_factory):
    return linear_world(tmp_path_factory.mktemp("linear") / "b")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return random_world(tmp_path_factory.mktemp("world") / "b", seed=1)


def solve(bundle, wanted, seeds=None, **settings):
    return Sampler(bundle, runtime="numpy", **settings).solve(wanted, seeds)


def closed_form(bundle, z, targets):
    """z + (exp(-H L) - 1)(z - z*) for the linear flow dz/dtau = -B^T (B z + b - y) with sigma = 1."""
    b = np.concatenate([bundle.field[f"head.{name}.0.weight"] for name in "ab"]).astype(float)
    bias = np.concatenate([bundle.field[f"head.{name}.0.bias"] for name in "ab"]).astype(float)
    target = z + np.linalg.lstsq(b, targets - bias - b @ z, rcond=None)[0]
    return target + expm(-b.T @ b * LENGTH) @ (z - target)


def test_the_flow_has_the_papers_length():
    t = np.linspace(1e-3, 1, 200_001)
    assert np.trapezoid(0.5 * (0.1 + 19.9 * t), t) == pytest.approx(LENGTH, rel=1e-9)


@pytest.mark.parametrize("name", ADAPTIVE)
@pytest.mark.parametrize("clock", ["flow", "paper"])
def test_adaptive_solvers_reach_the_closed_form(linear, name, clock):
    if name == "gauss-newton" and clock == "paper":
        pytest.skip("gauss-newton has one clock; that it refuses the other is tested below")
    for sample in solve(linear, "a=0.9 & b=0.1", range(3), solver=name, rtol=1e-7, atol=1e-7, clock=clock,
                        max_evaluations=100_000):  # fmt: skip
        exact = closed_form(linear, normals(sample.seed, 0, 8).astype(float), np.array([0.9, 0.1]))
        assert sample.status == Status.DONE
        # Global error: the local tolerance times the number of steps.
        np.testing.assert_allclose(sample.z, exact, atol=1e-7 * max(sample.steps, 50))


ORDERS = {name: tableau.order for name, tableau in TABLEAUS.items()} | {"gauss-newton": 2}


@pytest.mark.parametrize("name", list(ORDERS))
def test_the_measured_order_is_the_stated_one(linear, name):
    errors = []
    counts = (64, 128, 256) if ORDERS[name] < 4 else (24, 48, 96)
    z = normals(0, 0, 8).astype(float)
    exact = closed_form(linear, z, np.array([0.9, 0.1]))
    for steps in counts:
        sample = solve(linear, [Request("a=0.9 & b=0.1", z=z)], solver=name, steps=steps)[0]
        assert sample.steps == steps
        errors.append(np.linalg.norm(sample.z - exact))
    order = np.polyfit(np.log(counts), -np.log(errors), 1)[0]
    assert order == pytest.approx(ORDERS[name], abs=0.35)


@pytest.mark.parametrize("name", ["gauss-newton", "dopri5", "tsit5", "bosh3"])
def test_the_end_agrees_with_torchdiffeq_at_tight_tolerance(world, name):
    tensors = {k: torch.from_numpy(v.astype(np.float64)) for k, v in world.field.items()}

    def stack(prefix, x):
        n = sum(k.startswith(f"{prefix}.") and k.endswith(".weight") for k in tensors)
        for i in range(n):
            x = torch.nn.functional.linear(x, tensors[f"{prefix}.{i}.weight"], tensors[f"{prefix}.{i}.bias"])
            x = torch.nn.functional.leaky_relu(x, 0.2) if i < n - 1 or prefix == "mapping" else x
        return x

    def logp(z):
        x = z / (z.square().mean(dim=1, keepdim=True) + 1e-8).sqrt()
        w = tensors["mapping.w_avg"] + 0.7 * (stack("mapping", x) - tensors["mapping.w_avg"])
        smile, glasses = (stack(f"head.{n}", w).log_softmax(dim=1) for n in ("smile", "glasses"))
        age = stack("head.age", w)[:, 0]
        return smile[:, 1] + glasses[:, 0] - (age - 0.75).square() / 0.02

    def velocity(_, z):
        with torch.enable_grad():
            z = z.detach().requires_grad_(True)
            return torch.autograd.grad(logp(z).sum(), z)[0]

    # A short flow ends before kinks have amplified rounding: the ends then agree to the tolerance of both.
    seeds = (0, 2, 3)
    starts = np.stack([normals(seed, 0, 32) for seed in seeds]).astype(float)
    end = odeint(velocity, torch.from_numpy(starts), torch.tensor([0.0, LENGTH], dtype=torch.float64),
                 rtol=1e-8, atol=1e-8, method="dopri5")[-1].numpy()  # fmt: skip
    tolerance = 1e-4 if name == "gauss-newton" else 1e-7
    ours = solve(world, CONDITION, seeds, solver=name, rtol=tolerance, atol=tolerance, max_evaluations=200_000)
    # Both solvers cross the same kinks at slightly different places; 1e-3 of |z| = 5.7 is what that leaves.
    for sample, expected in zip(ours, end, strict=True):
        assert np.linalg.norm(sample.z - expected) < 5e-3 * np.linalg.norm(expected)


@pytest.mark.parametrize("name", ADAPTIVE)
def test_the_length_of_z_is_conserved(world, name):
    for sample in solve(world, CONDITION, range(4), solver=name, rtol=1e-5, atol=1e-5, max_evaluations=20_000):
        before = np.linalg.norm(normals(sample.seed, 0, 32))
        assert np.linalg.norm(sample.z) == pytest.approx(before, rel=2e-3)


def test_log_p_never_decreases_along_the_flow(world):
    energies = [[s.energy for s in solve(world, CONDITION, range(4), solver="rk4", steps=n)] for n in (400,)]
    start = [s.energy for s in solve(world, CONDITION, range(4), solver="euler", steps=200_000 // 200_000)]
    assert np.all(np.array(energies[0]) >= 0)
    assert np.mean(energies[0]) < np.mean(start)


def test_the_budget_bounds_the_evaluations_of_unreachable_targets(world):
    samples = solve(world, "age=30 & yaw=-30 & smile & ~smile", range(8), max_evaluations=20)
    assert all(s.evaluations <= 20 for s in samples)
    assert all(s.status == Status.DONE for s in samples)
    assert any(s.forced for s in samples)


def test_the_budget_floor_covers_what_is_left():
    left, n = 3.0, 9
    for _ in range(n):
        left -= min(left, float(remaining_budget_step(np.array(left), np.array(n))))
        n -= 1
    assert left == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("steps", [1, 8, 16])
def test_fixed_steps_take_that_many_steps(world, steps):
    for sample in solve(world, CONDITION, range(3), steps=steps):
        assert (sample.steps, sample.rejected, sample.status) == (steps, 0, Status.DONE)


def test_more_fixed_steps_come_closer_to_the_flow(world):
    reference = np.stack([s.z for s in solve(world, CONDITION, range(6), solver="rk4", steps=1000)])
    errors = [
        np.linalg.norm(np.stack([s.z for s in solve(world, CONDITION, range(6), steps=n)]) - reference)
        for n in (4, 16, 256)
    ]
    assert all(a > b for a, b in pairwise(errors))


@pytest.mark.parametrize("name", ["langevin", "predictor-corrector"])
def test_stochastic_solvers_raise_log_p_and_repeat_exactly(world, name):
    steps = 100 if name == "langevin" else 200
    first, again = (solve(world, "smile & ~glasses", range(4), solver=name, steps=steps) for _ in range(2))
    plain = solve(world, "smile & ~glasses", range(4), solver="euler", steps=1)
    np.testing.assert_array_equal([s.z for s in first], [s.z for s in again])
    assert all(s.status == Status.DONE and s.steps == steps for s in first)
    assert np.isfinite([s.energy for s in first]).all()
    assert np.mean([s.energy for s in first]) < np.mean([s.energy for s in plain]) + 1


def test_a_tableau_with_a_typo_is_refused():
    good = TABLEAUS["bosh3"]
    with pytest.raises(ValueError, match="order"):
        Tableau("typo", 3, good.a, (2 / 9, 1 / 3, 4 / 9 + 1e-6, -1e-6), good.error, "")
    with pytest.raises(ValueError, match="sum to zero"):
        Tableau("typo", 3, good.a, good.b, (0.1, 0, 0, 0), "")
    with pytest.raises(ValueError, match="rows"):
        Tableau("typo", 1, ((1.0, 2.0),), (0.5, 0.5), None, "")


def test_there_are_as_many_order_conditions_as_rooted_trees():
    assert [len(list(trees(n))) for n in range(1, 7)] == [1, 1, 2, 4, 9, 20]


def test_first_same_as_last_is_inferred():
    assert {name for name, t in TABLEAUS.items() if t.is_fsal} == {"bosh3", "dopri5", "tsit5"}


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("gaus-newton", {}, "known are"),
        ("langevin", {"rtol": 1e-3}, "no setting"),
        ("gauss-newton", {"clock": "paper"}, "autonomous"),
        ("dopri5", {"clock": "wall"}, "no clock"),
        ("dopri5", {"rtol": 0.0}, "positive"),
        ("gauss-newton", {"max_evaluations": 2}, "max_evaluations"),
        ("rk4", {"steps": 0}, "at least 1"),
        ("predictor-corrector", {"steps": 1}, "steps >= 2"),
    ],
)
def test_bad_settings_are_refused(name, settings, message):
    with pytest.raises(SolveError, match=message):
        make_solver(name, **settings)


def test_every_solver_is_listed():
    assert set(TABLEAUS) < set(SOLVERS)
