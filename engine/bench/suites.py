"""The suites by name, and the options of a run, which lace-bench and benchmarks/run.py share."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from engine.bench import drawing, solving, streaming
from engine.bench.contest import Bench, Peers
from engine.bench.problem import JUDGED, JUDGED_QUICK, Judge
from engine.bench.records import Log, machine, versions
from engine.bundle import Bundle
from engine.cli.options import positive
from engine.origin import commit

SUITES: dict[str, tuple[str, Callable[[Bench], None]]] = {
    "machine": ("rates of streaming and of products: what the floors are made of", solving.machine),
    "field": ("one linearised evaluation", solving.field),
    "solve": ("one condition for many rows", solving.solve),
    "hard": ("targets that are rare, contradict each other or lie out of range", solving.hard_targets),
    "stream": ("mixed requests in static batches and as one queue", streaming.stream),
    "decode": ("w to pictures", drawing.decode),
    "end-to-end": ("a condition to one PNG", drawing.end_to_end),
    "cold": ("import, open and first picture in a fresh process", drawing.cold),
    "memory": ("peak resident memory of a fresh process", drawing.memory),
}
THREADS = 2


def add_run_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, required=True, metavar="FILE",
                        help="JSON lines; what is measured there already is skipped")
    parser.add_argument("--suite", nargs="+", choices=[*SUITES, "all"], default=["all"], metavar="NAME",
                        help=f"{', '.join(SUITES)}, all (all)")
    parser.add_argument("--quick", action="store_true", help="few rows, two rounds: to try it out")
    parser.add_argument(
        "--threads", type=positive, default=THREADS, metavar="N", help=f"of every contestant ({THREADS})"
    )
    parser.add_argument("--only", default="", metavar="NAME", help="contestants whose name contains this")
    parser.add_argument("--cache", type=Path, default=cache(), metavar="DIR",
                        help="for what is safe to delete, such as converged solves (%(default)s)")


def cache() -> Path:
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "lace-bench"


def open_bench(options: argparse.Namespace, bundle: Bundle, pictured: Sequence[Bundle], peers: Peers) -> Bench:
    common = {"commit": commit(), "threads": options.threads, "quick": options.quick, "machine": machine(),
              "versions": versions()}
    judge = Judge(options.cache / "converged", JUDGED_QUICK if options.quick else JUDGED)
    return Bench(bundle, tuple(pictured), Log(options.out, common), judge, peers, options.threads, options.quick, say,
                 options.only)


def run(options: argparse.Namespace, bench: Bench, other_worlds: Sequence[Bundle] = ()) -> None:
    """The wanted suites; hard targets and the stream also on ``other_worlds``."""
    for name, (_, suite) in SUITES.items():
        if name in options.suite or "all" in options.suite:
            suite(bench)
            for world in other_worlds if name in ("hard", "stream") else ():
                suite(replace(bench, bundle=world))


def say(text: str) -> None:
    sys.stderr.write(f"{text}\n")


def confine(threads: int) -> None:
    """Start this program again on ``threads`` processors, so that every package takes as many threads.

    Thread pools are sized when a package is loaded, most of them by the processors that the process may use.
    """
    if not hasattr(os, "sched_setaffinity"):
        return
    allowed = sorted(os.sched_getaffinity(0))
    if len(allowed) <= threads:
        return
    os.sched_setaffinity(0, allowed[:threads])
    if len(os.sched_getaffinity(0)) <= threads:  # or this would never end
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
