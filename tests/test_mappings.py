"""Mappings without layers or without normalisation: every runtime agrees with the twin, and the twin with autograd."""

import numpy as np
import pytest
import torch

import engine.sampler
from engine import Request, Sampler, Status
from engine.reference import field as twin
from tests import test_native
from tests.worlds import random_world

pytestmark = test_native.pytestmark
DIM = 40
KINDS = [(0, False), (0, True), (3, False), (3, True)]
CONDITIONS = ("smile & ~glasses & age=0.7", "colour=c2 | smile", "yaw>0.5 & near(0.04)", "shape & smile", "shape",
              "keep(smile, weight=0.1) & glasses", None)


@pytest.fixture(scope="module", params=KINDS, ids=lambda kind: f"{kind[0]} layers{', normalised' * kind[1]}")
def world(request, tmp_path_factory):
    layers, normalise = request.param
    path = tmp_path_factory.mktemp("mappings") / "w.lace"
    return random_world(path, dim=DIM, layers=layers, normalise=normalise, z_head=True, graphs=True)


def requests() -> list[Request]:
    return [Request(condition, seed=seed) for seed, condition in enumerate(CONDITIONS)]


def by_torch(tensors, z, psi, normalise):
    """The mapping, written again."""
    x = z / torch.sqrt((z * z).mean(dim=1, keepdim=True) + 1e-8) if normalise else z
    for weight, bias in twin.layers(tensors, "mapping"):
        x = torch.nn.functional.leaky_relu(x @ torch.tensor(weight).T + torch.tensor(bias), 0.2)
    average = torch.tensor(tensors["mapping.w_avg"])
    return average + psi * (x - average)


def test_the_twins_pullback_is_that_of_autograd(world):
    tensors = {name: tensor.astype(float) for name, tensor in world.field.items()}
    rng, normalise = np.random.default_rng(0), world.generator.normalise
    z, psi, cotangent = rng.normal(size=(5, DIM)), rng.uniform(0.5, 1, (5, 1)), rng.normal(size=(5, 2, DIM))
    w, hidden = twin.mapping(tensors, z, psi, normalise=normalise)
    assert len(hidden) == world.generator.mapping_layers
    found = twin.pullback(tensors, z, psi, hidden, cotangent, normalise=normalise)
    latent = torch.tensor(z, requires_grad=True)
    exact = by_torch(tensors, latent, torch.tensor(psi), normalise)
    np.testing.assert_allclose(w, exact.detach(), atol=1e-12)
    for k in range(2):
        (expected,) = torch.autograd.grad(exact, latent, torch.tensor(cotangent[:, k]), retain_graph=True)
        np.testing.assert_allclose(found[:, k], expected, atol=1e-11)


def test_without_layers_and_normalisation_w_is_z(tmp_path):
    world = random_world(tmp_path / "w.lace", dim=DIM, layers=0, normalise=False)
    for sample in Sampler(world, runtime="native").solve([Request(seed=seed, truncation=1.0) for seed in range(3)]):
        np.testing.assert_allclose(sample.w, sample.z, atol=1e-6)


@pytest.mark.parametrize("runtime", ["native", "onnxruntime", "cuda"])
def test_every_runtime_has_the_twins_field(world, runtime):
    rng = np.random.default_rng(1)
    z, psi = rng.normal(size=(6, DIM)).astype(np.float32), np.full((6, 1), 0.7, np.float32)
    heads = {name: np.eye(head.widths[-1], dtype=np.float32) for name, head in world.heads.items()}
    cotangent, rows = rng.normal(size=(4, 2, DIM)).astype(np.float32), np.array([5, 0, 2, 2])
    answers = []
    for name in ("numpy", runtime):
        with opened(world, name) as opened_runtime:
            field = opened_runtime.solving.field(world.spaces["z"])
            w, found = field.forward(z, psi, None, heads)
            pulled = field.pullback(cotangent, rows)
            answers.append([w, *(array for name in heads for array in found[name]), pulled])
    for exact, found in zip(*answers, strict=True):
        assert np.median(np.abs(found - exact)) < 1e-6
        assert np.mean(np.abs(found - exact) > 1e-4) < 0.01  # rounding may carry a unit across its kink


@pytest.mark.parametrize("runtime", ["native", "onnxruntime", "cuda"])
@pytest.mark.parametrize("settings", [{}, {"steps": 3}, {"solver": "bosh3"}], ids=str)
def test_every_runtime_solves_as_the_twin(world, runtime, settings, monkeypatch):
    expected = Sampler(world, runtime="numpy", **settings).solve(requests())
    with opened(world, runtime) as opened_runtime:
        monkeypatch.setattr(engine.sampler, "open_runtime", lambda *_, **__: opened_runtime)
        found = Sampler(world, **settings).solve(requests())
    assert [sample.status for sample in found] == [sample.status for sample in expected]
    assert {sample.status for sample in found} == {Status.DONE}
    gaps = [abs(a.energy - b.energy) / (1 + abs(b.energy)) for a, b in zip(found, expected, strict=True)]
    assert np.median(gaps) < 1e-3
    assert max(gaps) < 0.1


def opened(world, name):
    """A runtime in a context that closes it; for CUDA the kernels' text on a simulated device."""
    from contextlib import closing, nullcontext

    from engine.runtimes import open_runtime

    if name != "cuda":
        if name == "onnxruntime":
            pytest.importorskip(name)
        return nullcontext(open_runtime(world, name))
    pytest.importorskip("cuda.bindings.driver")
    from tests.fake_kernels import open_fake

    return closing(open_fake(world)[0])
