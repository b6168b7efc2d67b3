"""What importing the engine costs, and what it does not pull in."""

import json
import subprocess
import sys

import pytest

OPTIONAL = ["torch", "onnx", "onnxruntime", "openvino", "tensorrt", "tensorrt_rtx", "cuda", "scipy", "torchdiffeq"]
# CPU time, which does not depend on what else this machine does. Measured 0.1 s.
LIMIT = 0.3


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("module", ["engine", "engine.cli.sample", "engine.cli.edit", "engine.cli.verify", "kernels"])
def test_importing_loads_no_optional_package(module):
    loaded = json.loads(run(f"import {module}, sys, json; print(json.dumps(sorted(sys.modules)))"))
    assert [name for name in OPTIONAL if name in loaded] == []


def test_importing_the_engine_is_quick():
    code = "import numpy, time; t = time.process_time(); import engine; print(time.process_time() - t)"
    assert min(float(run(code)) for _ in range(3)) < LIMIT


@pytest.fixture
def beside(tmp_path):
    """Runs a script that draws a picture, beside modules of the user's own."""

    def run_beside(*names: str, options: tuple[str, ...] = ()) -> subprocess.CompletedProcess:
        for name in names:
            (tmp_path / name).write_text("MINE = True\n")
        script = tmp_path / "script.py"
        script.write_text("from engine import Sampler\nprint(len(Sampler('demo').solve('smile', 0)))\n")
        return subprocess.run([sys.executable, *options, str(script)], capture_output=True, text=True)

    return run_beside


def test_modules_called_trainer_and_kernels_beside_a_script_disturb_nothing(beside):
    assert beside("trainer.py", "kernels.py").stdout == "1\n"


def test_an_engine_beside_a_script_shadows_ours_as_docs_stability_says(beside):
    assert "cannot import name 'Sampler' from 'engine'" in beside("engine.py").stderr
    assert beside("engine.py", options=("-P",)).stdout == "1\n"
