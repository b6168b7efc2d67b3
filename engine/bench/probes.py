"""What only a fresh process can tell: how long the first picture takes, and how much memory is needed.

The measured code is a text, because it times its own imports.
"""

import json
import subprocess
import sys
import time

from engine.bench.problem import Problem, ordinary
from engine.bundle import Bundle
from engine.errors import LaceError

# Arguments: bundle, condition, label or null, threads, rows, whether to draw.
CODE = """
import json, sys, time
start = time.perf_counter()
bundle, condition, label, threads, rows, draw = json.loads(sys.argv[1])
from engine import Request, Sampler
imported = time.perf_counter()
sampler = Sampler(bundle, threads=threads)
opened = time.perf_counter()
requests = [Request(condition, seed=seed, label=label) for seed in range(rows)]
(sampler.sample if draw else sampler.solve)(requests)
end = time.perf_counter()
try:
    with open("/proc/self/status") as file:
        # Of this program alone; ru_maxrss would start with the peak of the process that started it.
        peak = int(next(line for line in file if line.startswith("VmHWM:")).split()[1]) * 1024
except OSError:
    import resource
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
print(json.dumps({"import": 1e3 * (imported - start), "open": 1e3 * (opened - imported), "first": 1e3 * (end - opened),
                  "peak": peak}), flush=True)
"""


class ProbeError(LaceError):
    """The measured process failed."""


def probe(bundle: Bundle, threads: int, rows: int, *, draw: bool) -> tuple[float, dict[str, float]]:
    """Seconds from the start of a process to its result, and what it measured itself: milliseconds, bytes."""
    condition = str(Problem(bundle, ordinary(bundle, min(3, len(bundle.attributes))), rows).condition)
    label = 0 if bundle.generator.labels else None
    given = json.dumps([str(bundle.path.absolute()), condition, label, threads, rows, draw])
    start = time.perf_counter()
    with subprocess.Popen([sys.executable, "-c", CODE, given], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          text=True) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        seconds = time.perf_counter() - start
        _, errors = process.communicate()
    if process.returncode or not line:
        raise ProbeError(f"the process that solves {condition} on {bundle.path} failed: {errors.strip()[-500:]}")
    return seconds, json.loads(line)


def cold_start(bundle: Bundle, threads: int) -> tuple[float, dict[str, float]]:
    """Seconds to the first picture, and milliseconds of its parts: 'import', 'open', 'first'."""
    seconds, found = probe(bundle, threads, 1, draw=True)
    del found["peak"]
    return seconds, found


def peak_memory(bundle: Bundle, threads: int, rows: int, *, draw: bool) -> float:
    """Bytes."""
    return probe(bundle, threads, rows, draw=draw)[1]["peak"]
