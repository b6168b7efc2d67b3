"""Pictures on a real GPU, by every runtime that is installed: `pytest -m gpu`."""

import logging

import numpy as np
import pytest

from engine import Sampler
from engine.bundle import Bundle
from engine.runtimes import RUNTIMES, MissingRuntime, UnfitDevice, open_runtime
from engine.sampler import find_bundle
from engine.verify import check_bundle

pytestmark = pytest.mark.gpu
NAMES = [name for name, entry in RUNTIMES.items() if "cuda" in entry.extras]


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The demo bundle, with an empty cache of plans."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LACE_PLANS", str(tmp_path_factory.mktemp("plans")))
        yield find_bundle("demo")


def opened(demo: Bundle, name: str, precision: str | None = None):
    try:
        return open_runtime(demo, name, device="cuda", precision=precision)
    except (MissingRuntime, UnfitDevice) as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("precision", [None, "tf32"])
@pytest.mark.parametrize("name", NAMES)
def test_golden_answers(demo, name, precision):
    checks = check_bundle(demo, opened(demo, name, precision))
    assert [check for check in checks if not check.passed] == []


@pytest.mark.parametrize("name", NAMES)
def test_any_number_of_rows_decodes_alike(demo, name):
    runtime, reference = opened(demo, name), open_runtime(demo, "onnxruntime")
    w = np.resize(demo.golden["mapping.w"], (21, demo.generator.w_dim))
    ws = np.ascontiguousarray(np.repeat(w[:, None], demo.generator.num_ws, axis=1))
    expected = reference.drawing.synthesize(ws)
    for rows in (1, 2, 3, 7, 8, 21):
        for _ in range(3):  # run, captured, replayed
            np.testing.assert_allclose(runtime.drawing.synthesize(ws[:rows]), expected[:rows], atol=2e-4)


@pytest.mark.parametrize("name", ["tensorrt", "tensorrt_rtx"])
def test_a_plan_is_built_once(demo, name, caplog):
    opened(demo, name)
    for _ in range(2):
        Sampler(demo, runtime=name, device="cuda").sample("smile", seeds=1)
        with caplog.at_level(logging.INFO):
            caplog.clear()
            Sampler(demo, runtime=name, device="cuda").sample("smile", seeds=1)
        assert "builds a plan" not in caplog.text
        assert "refuses its plan" not in caplog.text
