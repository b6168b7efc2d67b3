"""All benchmarks, with peers on the same weights:  python -m benchmarks.run --out FILE.jsonl [--suite solve] [--quick]

The bundles have FFHQ's size and random weights (benchmarks/worlds.py); hard targets and the stream are measured on the
demo bundle too, whose networks are trained. `benchmarks.report` makes tables and plots, and says which goals are met.
"""

import argparse
from collections.abc import Sequence

from benchmarks.peers import open_peers
from benchmarks.worlds import world
from engine.bench.suites import add_run_options, confine, open_bench, run
from engine.cli.console import EXIT_CODES, OK, guarded, parse
from engine.sampler import DEMO, find_bundle

SIZES, SIZES_QUICK = (64, 256, 1024), (64,)
WITH_PICTURES = {"decode", "end-to-end", "cold", "memory", "all"}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="benchmarks.run", description="Measure this engine beside its peers.",
                                     epilog=EXIT_CODES, allow_abbrev=False)
    add_run_options(parser)
    return parser


def measure(options: argparse.Namespace) -> int:
    folder, demo = options.cache / "worlds", find_bundle(DEMO)
    sizes = SIZES_QUICK if options.quick else SIZES
    pictured = [world(folder, size) for size in sizes] if WITH_PICTURES & set(options.suite) else []
    run(options, open_bench(options, world(folder), [*pictured, demo], open_peers(options.threads)), [demo])
    return OK


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(build_parser(), arguments)
    if arguments is None:
        confine(options.threads)
    return guarded(lambda: measure(options))


if __name__ == "__main__":
    raise SystemExit(main())
