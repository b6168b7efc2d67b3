"""Tables, plots and goals of a file of measurements:  python -m benchmarks.report FILE.jsonl --out DIR [--overwrite]

What `lace-bench report` writes, and which of the goals of this project (benchmarks/goals.py) the measurements meet.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from benchmarks.goals import goals_table
from engine.bench.report import write_report
from engine.cli.console import EXIT_CODES, OK, guarded, parse


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="benchmarks.report", description="Tables, plots and goals of measurements.",
                                     epilog=EXIT_CODES, allow_abbrev=False)
    parser.add_argument("file", type=Path, metavar="FILE", help="JSON lines of benchmarks.run")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for report.md and its plots")
    parser.add_argument("--overwrite", action="store_true", help="replace DIR if it is an earlier report")
    return parser


def report(options: argparse.Namespace) -> int:
    print(f"written: {write_report(options.file, options.out, overwrite=options.overwrite, goals=goals_table)}")
    return OK


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(build_parser(), arguments)
    return guarded(lambda: report(options))


if __name__ == "__main__":
    raise SystemExit(main())
