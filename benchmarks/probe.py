"""What ``benchmarks.compare`` runs in a process of its own for each commit: milliseconds as one line of JSON.

It uses only what every version offers, so that old commits can be measured.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable

START = time.perf_counter()
CONDITION = "smile & ~glasses & age=0.7"
MIXED = (CONDITION, "hat | beard", "yaw>0.6", "haircolor=red", "gender=male & bald", "0.3<age<0.5")
SIZES = (1, 16, 64)


def median(run: Callable[[], object], seconds: float) -> float:
    """Of runs within about so many seconds, in milliseconds; the first one is not counted."""
    run()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < 5:
        began = time.perf_counter()
        run()
        times.append((time.perf_counter() - began) * 1e3)
    return statistics.median(times)


def measure(threads: int, seconds: float) -> dict[str, float]:
    from engine import Request, Sampler

    sampler = Sampler("demo", solver="gauss-newton", threads=threads)
    sampler.sample(CONDITION, 0)
    found = {"cold start to the first picture": (time.perf_counter() - START) * 1e3}
    for rows in SIZES:
        found[f"solve {rows}"] = median(lambda rows=rows: sampler.solve(CONDITION, range(rows)), seconds)
    fixed = Sampler("demo", solver="gauss-newton", steps=6, threads=threads)
    found["7 evaluations of the field, 64 rows"] = median(lambda: fixed.solve(CONDITION, range(64)), seconds)
    found["sample 16"] = median(lambda: sampler.sample(CONDITION, range(16)), seconds)
    requests = [Request(MIXED[i % len(MIXED)], seed=i) for i in range(96)]
    found["stream 96 mixed requests"] = median(lambda: list(sampler.stream(requests)), seconds)
    return found


if __name__ == "__main__":
    print(json.dumps(measure(int(sys.argv[1]), float(sys.argv[2]))))
