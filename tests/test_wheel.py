"""The wheel in environments of their own, beside packages that others own: nobody's files are touched."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LARGEST = 20e6  # bytes of the wheel, demo bundle included
OTHERS = ("kernels", "trainer")  # of the index; the names that this project's folders had once
# Every installed file of a package as its RECORD has it, what importing it does, and whose module that is.
LOOK = """
import base64, hashlib, importlib, json, sys
from importlib.metadata import distribution
def state(name):
    broken = []
    for file in distribution(name).files:
        path = file.locate()
        if not path.exists():
            broken.append(str(file))
        elif file.hash and "__pycache__" not in str(file):
            found = base64.urlsafe_b64encode(hashlib.new(file.hash.mode, path.read_bytes()).digest()).rstrip(b"=")
            if found.decode() != file.hash.value:
                broken.append(str(file))
    return broken
def attempt(name):
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        return f"needs {error.name}"
    return module.__file__
print(json.dumps({name: [state(name), attempt(name)] for name in sys.argv[1:]}))
"""

pytestmark = pytest.mark.slow


def call(*command, **options) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False, env=environment, **options)
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    call(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", folder, ROOT)
    (found,) = folder.glob("*.whl")
    return found


@pytest.fixture
def environment(tmp_path):
    """A fresh environment without this checkout; its folder of commands."""
    call(sys.executable, "-m", "venv", tmp_path / "venv")
    return tmp_path / "venv" / "bin"


def install(environment: Path, what: str | Path) -> None:
    options = ["--no-deps"] if what in OTHERS else []
    call(environment / "pip", "install", "-q", *options, f"{what}[cpu]" if isinstance(what, Path) else what)


def look(environment: Path, *names: str) -> dict:
    return json.loads(call(environment / "python", "-c", LOOK, *names, cwd=environment))


def sample(environment: Path, out: Path) -> None:
    call(environment / "lace-sample", "demo", "smile", "--count", "2", "--out", out, "--overwrite", cwd=environment)
    assert len(list(out.glob("00*.png"))) == 2


def test_the_wheel_is_small_enough(wheel):
    assert wheel.stat().st_size < LARGEST


@pytest.mark.parametrize("ours_first", [True, False])
def test_packages_called_kernels_and_trainer_stay_whole_beside_it(wheel, environment, tmp_path, ours_first):
    for what in (wheel, *OTHERS) if ours_first else (*OTHERS, wheel):
        install(environment, what)
    alone = look(environment, *OTHERS, "lace-engine")
    assert all(broken == [] for broken, _ in alone.values()), alone
    for name in OTHERS:  # of their own, though they may need what --no-deps left out
        assert f"/{name}/" in alone[name][1] or alone[name][1].startswith("needs "), alone
    sample(environment, tmp_path / "out")

    call(environment / "pip", "uninstall", "-q", "-y", "lace-engine")
    assert look(environment, *OTHERS) == {name: alone[name] for name in OTHERS}
    install(environment, wheel)
    for gone, left in itertools.pairwise([*OTHERS, None]):
        call(environment / "pip", "uninstall", "-q", "-y", gone)
        if left:
            assert look(environment, left) == {left: alone[left]}
        assert look(environment, "lace-engine")["lace-engine"][0] == []
        sample(environment, tmp_path / "out")


def test_files_of_a_users_own_called_trainer_and_kernels_disturb_nothing(wheel, environment, tmp_path):
    install(environment, wheel)
    for name in OTHERS:
        (tmp_path / f"{name}.py").write_text("name = 'the user'\n")
    script = tmp_path / "script.py"
    script.write_text("import kernels, trainer\nfrom engine import Sampler\n"
                      "(sample,) = Sampler('demo').sample('smile', seeds=[0])\n"
                      "print(kernels.name, trainer.name, sample.image.shape)\n")
    assert call(environment / "python", script, cwd=tmp_path) == "the user the user (64, 64, 3)\n"


def test_lace_bench_works_without_the_benchmarks_of_the_repository(wheel, environment, tmp_path):
    install(environment, wheel)
    assert "lace-bench" in call(environment / "lace-bench", "--help", cwd=tmp_path)
    measure = ("run", "demo", "--suite", "machine", "--quick", "--out", "lines.jsonl")
    call(environment / "lace-bench", *measure, cwd=tmp_path)
    assert (tmp_path / "lines.jsonl").stat().st_size
    call(environment / "python", "-c", "import engine.bench.report, engine.cli.bench, importlib.util; "
         "assert importlib.util.find_spec('benchmarks') is None", cwd=tmp_path)
