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
