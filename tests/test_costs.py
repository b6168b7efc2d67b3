"""B11: no file of less than a megabyte takes more than 10 s of computing, or 2 GB of memory, to be read or refused."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

SECONDS, BYTES = 10, 2 * 2**30


def measure(path: Path) -> dict:
    """Read one file in a process of its own: how it ended, seconds of computing, bytes above what it began with."""
    from engine.errors import CheckpointError
    from exporter.checkpoints import load_generator

    out, into = os.pipe()
    child = os.fork()
    if not child:
        began = memory()
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
        resource.setrlimit(resource.RLIMIT_AS, (began["VmSize"] + BYTES,) * 2)
        try:
            load_generator(path)
            ended = "read"
        except CheckpointError as error:
            ended = str(error)
        except BaseException as error:
            ended = f"raised {type(error).__name__}"
        os.write(into, json.dumps({"ended": ended, "bytes": memory()["VmHWM"] - began["VmRSS"]}).encode())
        os._exit(0)
    os.close(into)
    said = b"".join(iter(lambda: os.read(out, 65536), b""))
    os.close(out)
    _, status, usage = os.wait4(child, 0)
    found = json.loads(said) if said else {"ended": f"killed by signal {os.waitstatus_to_exitcode(status)}", "bytes": 0}
    return found | {"seconds": usage.ru_utime + usage.ru_stime}


def memory() -> dict[str, int]:
    lines = Path("/proc/self/status").read_text().splitlines()
    return {name: int(value.split()[0]) * 1024 for name, _, value in (line.partition(":") for line in lines)
            if name in ("VmSize", "VmRSS", "VmHWM")}


def measure_all(folder: str, size: int) -> None:
    """The child process of the test below: builds the files, and writes what each cost, as JSON."""
    from exporter.checkpoints import load_generator
    from exporter.generators import basicsr, stylegan3_files, tensorflow  # noqa: F401
    from tests import checkpoints as build
    from tests.costly import costly

    path = Path(folder) / "file.bin"
    path.write_bytes(build.nvidia_pickle(build.generator()))
    load_generator(path)  # what torch imports late is not what a file costs
    costs = {}
    for kind, data in costly(size).items():
        path.write_bytes(data)
        costs[kind] = measure(path) | {"size": len(data)}
    print(json.dumps(costs))  # noqa: T201


# Costs grow with the size at most: a tenth of it is tried in every run, with a fifth of the time and a tenth
# of the memory.
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc and sets limits of Linux")
@pytest.mark.parametrize("size", [90_000, pytest.param(900_000, marks=pytest.mark.slow)])
def test_B11_small_files_cost_little_whatever_they_hold(size, tmp_path):
    code = f"from tests.test_costs import measure_all; measure_all({str(tmp_path)!r}, {size})"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    costs = json.loads(done.stdout)
    assert len(costs) > 40
    for kind, cost in costs.items():
        assert cost["size"] < 2**20, kind
        share = 1 if cost["size"] > 2 * size else size / 900_000  # some have a size of their own
        assert cost["seconds"] < SECONDS * max(share, 0.2), (kind, cost)
        assert cost["bytes"] < BYTES * share, (kind, cost)
        assert not cost["ended"].startswith(("killed", "raised")), (kind, cost)
        assert "MemoryError" not in cost["ended"], (kind, cost)
        assert len(cost["ended"]) < 2000, (kind, cost)
