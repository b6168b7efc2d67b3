"""Conditions that read as many logits as CelebA's 40 attributes have (B13)."""

import numpy as np
import pytest

from engine import Request, Sampler, Status
from engine.condition import keep
from engine.grammar import parse
from engine.layout import pack
from engine.reference.tape import evaluate
from engine.tape import MAX_COLUMNS, lower
from tests import host_kernels, test_native
from tests.worlds import random_world

pytestmark = test_native.pytestmark
ATTRIBUTES = 40


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """38 attributes of two classes more than smile and glasses; and colour, age and yaw."""
    path = tmp_path_factory.mktemp("wide") / "w.lace"
    return random_world(path, dim=96, layers=2, graphs=True, more=ATTRIBUTES - 2)


@pytest.mark.parametrize("runtime", ["native", "onnxruntime", "numpy"])
def test_B13_forty_attributes_of_two_classes_are_edited_with_defaults(world, runtime):
    if runtime == "onnxruntime":
        pytest.importorskip(runtime)
    sampler = Sampler(world, runtime=runtime)
    sampler.render = list  # this world has no synthesis
    plain = sampler.solve([Request(None, seed=seed) for seed in range(3)])
    asked = [1 - int(np.argmax(sampler.measure([sample])[0]["smile"])) for sample in plain]
    for sample, wish in zip(plain, asked, strict=True):
        (edited,) = sampler.edit(sample, ("~smile", "smile")[wish])
        assert edited.status == Status.DONE
        assert len(edited.logits) == len(world.attributes)
        assert np.argmax(edited.logits["smile"]) == wish
        before = sampler.measure([sample])[0]
        held = [np.argmax(edited.logits[name]) == np.argmax(before[name])
                for name, attribute in world.attributes.items() if name != "smile" and attribute.kind == "class"]
        assert np.mean(held) > 0.8


def test_wide_rows_are_solved_alike_by_compiled_and_python_steps(world):
    requests = [Request("smile & keep(*, weight=0.01) & near(0.04)", seed=1), Request("smile", seed=2),
                Request("glasses & keep(*, weight=0.1)", seed=3)]
    native, python = (Sampler(world, runtime=name).solve(requests) for name in ("native", "numpy"))
    for a, b in zip(native, python, strict=True):
        assert a.status == b.status == Status.DONE
        assert a.energy == pytest.approx(b.energy, rel=0.02, abs=1e-3)


def test_a_wide_tape_means_the_same_in_the_kernels_text(world):
    """79 columns and more, in C++ by one thread and by a block of them, against numpy."""
    tape = lower(parse("smile & (age>0.5 | ~colour=c1)") & keep("*", weight=0.1), world.attributes)
    columns, rng = len(tape.columns), np.random.default_rng(0)
    assert 64 < columns <= MAX_COLUMNS
    u, parameters = rng.normal(size=(1, columns)), np.where(np.isnan(tape.parameters), 0.3, tape.parameters)
    v, g, c = evaluate(tape.program, parameters[None], u)
    code, table = pack(tape.program), [host_kernels.struct("Column", plus=j, minus=-1) for j in range(columns)]
    for kind in (host_kernels.HostSolve, host_kernels.BlockSolve):
        solve = kind(capacity=1, columns=columns, nodes=len(code), parameters=len(parameters), outputs=columns)
        solve.put(
            phase=np.full(1, 2, np.int32), ticket=np.zeros(1, np.int32), trial_logits=u, trial_logp=np.zeros(1),
            column=np.stack(table), ticket_columns=np.arange(columns, dtype=np.int32)[None], code=code[None],
            column_count=np.full(1, columns, np.int32), code_length=np.full(1, len(code), np.int32),
            parameter=parameters[None], weights=np.zeros((1, columns)), curvature=np.zeros((1, columns, columns)),
            scratch=np.zeros((1, columns * (3 * columns + 5) + 8 * len(code) + 2)),
        )
        solve.run("tape")
        np.testing.assert_allclose(solve.trial_logp, v, rtol=1e-12)
        np.testing.assert_allclose(solve.weights, g, rtol=1e-11, atol=1e-12)
        np.testing.assert_allclose(solve.curvature, c, rtol=1e-11, atol=1e-12)
