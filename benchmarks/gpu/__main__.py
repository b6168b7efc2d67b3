"""All measurements on a GPU:  python -m benchmarks.gpu --out FILE.jsonl [--suite solve] [--rows 16] [--quick]

The bundles have FFHQ's size and random weights (benchmarks/worlds.py). Lines are those of engine/bench/records.py; a
second run resumes, and ends with the tables of all that is there. Without a GPU it ends with code 3.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu import machine
from benchmarks.gpu.suites import SUITES
from benchmarks.gpu.table import tables
from benchmarks.worlds import world
from engine.bench import records
from engine.bench.contest import Bench, Peers
from engine.bench.problem import JUDGED, JUDGED_QUICK, Judge
from engine.bench.records import Log
from engine.bench.suites import cache, say
from engine.cli.console import EXIT_CODES, MISSING_PACKAGE, OK, complain, guarded, parse
from engine.cli.options import positive
from engine.origin import commit

SIZES, SIZES_QUICK = (256, 1024), (256,)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="benchmarks.gpu", description="Measure this engine and its peers on a GPU.",
                                     epilog=EXIT_CODES, allow_abbrev=False)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE",
                        help="JSON lines; what is measured there already is skipped")
    parser.add_argument("--suite", nargs="+", choices=[*SUITES, "all"], default=["all"], metavar="NAME",
                        help=f"{', '.join(SUITES)}, all (all)")
    parser.add_argument("--rows", nargs="+", type=positive, metavar="N", help="instead of the suites' own numbers")
    parser.add_argument("--quick", action="store_true", help="two rounds, and pictures of 256 pixels only")
    parser.add_argument("--only", default="", metavar="NAME", help="contestants whose name contains this")
    parser.add_argument("--cache", type=Path, default=cache(), metavar="DIR",
                        help="for what is safe to delete, such as converged solves (%(default)s)")
    return parser


def open_bench(options: argparse.Namespace, facts: dict) -> Bench:
    folder, drawn = options.cache / "worlds", {"decode", "end-to-end", "all"} & set(options.suite)
    sizes = SIZES_QUICK if options.quick else SIZES
    pictured = tuple(world(folder, size, precision=p) for size in sizes for p in ("fp32", "fp16")) if drawn else ()
    common = {
        "commit": commit(), "gpu": facts["gpu"], "threads": 1, "quick": options.quick,
        "machine": {**records.machine(), **facts}, "versions": {**records.versions(), **machine.versions()},
    }
    judge = Judge(options.cache / "converged", JUDGED_QUICK if options.quick else JUDGED)
    return Bench(world(folder), pictured, Log(options.out, common), judge, Peers(), 1, options.quick, say, options.only)


def measure(options: argparse.Namespace) -> int:
    from engine.cuda.driver import Device, NoDevice

    try:
        device = Device()
    except NoDevice as error:
        complain(f"{error} These measurements need an NVIDIA GPU; those of a processor are in benchmarks.run")
        return MISSING_PACKAGE
    bench = open_bench(options, machine.facts(device))
    device.close()
    for name, (suite, rows) in SUITES.items():
        if name in options.suite or "all" in options.suite:
            suite(bench, tuple(options.rows or rows))
    print(tables(options.out))
    return OK


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(build_parser(), arguments)
    return guarded(lambda: measure(options))


if __name__ == "__main__":
    raise SystemExit(main())
