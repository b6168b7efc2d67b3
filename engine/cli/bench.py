"""lace-bench: how fast is a bundle on this machine, and is what it computes right?"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from engine.bench.contest import Peers
from engine.bench.suites import add_run_options, confine, open_bench, run
from engine.cli.console import OK, Parser, Terminal, guarded, parse
from engine.sampler import find_bundle


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="lace-bench",
        description="Measure a bundle: evaluations, solves, pictures, cold start and memory. Every answer is checked.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    measure = commands.add_parser("run", help="measure")
    measure.add_argument("bundle", nargs="?", default="demo", metavar="BUNDLE",
                         help="a folder made by lace-export, or demo (demo)")
    add_run_options(measure)
    write = commands.add_parser("report", help="tables and plots of a file of measurements")
    write.add_argument("file", type=Path, metavar="FILE", help="JSON lines of lace-bench run")
    write.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for report.md and its plots")
    write.add_argument("--overwrite", action="store_true", help="replace DIR if it is an earlier report")
    return parser


def measure(options: argparse.Namespace) -> int:
    bundle = find_bundle(options.bundle)
    pictured = [bundle] if "synthesis" in bundle.manifest.graphs else []
    run(options, open_bench(options, bundle, pictured, Peers()))
    return OK


def report(options: argparse.Namespace) -> int:
    from engine.bench.report import write_report

    path = write_report(options.file, options.out, overwrite=options.overwrite)
    Terminal().say(f"written: {path}")
    return OK


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(build_parser(), arguments)
    if arguments is None and options.command == "run":
        confine(options.threads)
    return guarded(lambda: {"run": measure, "report": report}[options.command](options), options.out)


if __name__ == "__main__":
    raise SystemExit(main())
