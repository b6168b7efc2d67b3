"""Is a commit faster or slower than another?  python -m benchmarks.compare OLD NEW [--rounds 7]

Both are checked out into a temporary folder and measured in turns, each turn a process of its own, the order of the two
changing from round to round. A ratio counts as a difference when the 95 % interval of the rounds' median ratio
(bootstrap) leaves out 1. The demo bundle is each commit's own.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from rich.table import Table

from engine.cli.console import EXIT_CODES, OK, Terminal, guarded, parse, write_json
from engine.errors import LaceError

ROOT = Path(__file__).resolve().parent.parent
BUILDS = ("engine.native.build", "kernels.cpu.build")  # the second before 0.2
PROBE = Path(__file__).with_name("probe.py")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="benchmarks.compare", description="Measure two commits in turns.",
                                     epilog=EXIT_CODES, allow_abbrev=False)
    parser.add_argument("old", metavar="OLD", help="a commit")
    parser.add_argument("new", metavar="NEW", help="another commit")
    parser.add_argument("--rounds", type=int, default=7, help="(%(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="of the runtime (%(default)s)")
    parser.add_argument("--seconds", type=float, default=1.0, help="for each number of a turn (%(default)s)")
    parser.add_argument("--json", action="store_true", help="write the result as JSON")
    return parser


def check_out(commit: str, folder: Path) -> Path:
    """A worktree of the commit with its compiled kernels."""
    run(["git", "worktree", "add", "--detach", str(folder), commit], ROOT)
    for module in BUILDS:
        if (folder / f"{module.replace('.', '/')}.py").exists():
            run([sys.executable, "-m", module], folder)
    return folder


def run(command: list[str], folder: Path) -> str:
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise LaceError(f"{' '.join(command)} failed: {done.stderr.strip()[-2000:]}")
    return done.stdout


def measure(folder: Path, threads: int, seconds: float) -> dict[str, float]:
    return json.loads(run([sys.executable, str(PROBE), str(threads), str(seconds)], folder))


def interval(ratios: np.ndarray) -> tuple[float, float]:
    """95 % of the median, by 2,000 bootstraps with a fixed seed."""
    rng = np.random.default_rng(0)
    medians = np.median(rng.choice(ratios, (2000, len(ratios))), axis=1)
    return float(np.quantile(medians, 0.025)), float(np.quantile(medians, 0.975))


def compare(options: argparse.Namespace) -> int:
    with TemporaryDirectory(prefix="lace-compare-") as scratch:
        folders = [Path(scratch) / name for name in ("old", "new")]
        try:
            for commit, folder in zip((options.old, options.new), folders, strict=True):
                check_out(commit, folder)
            found: list[list[dict[str, float]]] = [[], []]
            for turn in range(options.rounds):
                for i in (0, 1) if turn % 2 else (1, 0):
                    found[i].append(measure(folders[i], options.threads, options.seconds))
        finally:
            for folder in folders:
                subprocess.run(["git", "worktree", "remove", "--force", str(folder)], cwd=ROOT, check=False,
                               capture_output=True)
    facts = {}
    for name in found[0][0]:
        old, new = (np.array([turn[name] for turn in turns]) for turns in found)
        low, high = interval(new / old)
        verdict = "slower" if low > 1 else "faster" if high < 1 else "within noise"
        facts[name] = {"old": float(np.median(old)), "new": float(np.median(new)),
                       "ratio": float(np.median(new / old)), "interval": [low, high], "verdict": verdict}
    if options.json:
        write_json({"old": options.old, "new": options.new, "rounds": options.rounds, "threads": options.threads,
                    "milliseconds": facts})
    else:
        show(facts, options)
    return OK


def show(facts: dict, options: argparse.Namespace) -> None:
    table = Table(title=f"{options.old} -> {options.new}: medians of {options.rounds} turns, milliseconds",
                  title_justify="left")
    for heading in ("", "old", "new", "ratio", "95 % of it", ""):
        table.add_column(heading, justify="left" if not heading else "right")
    for name, f in facts.items():
        low, high = f["interval"]
        table.add_row(name, f"{f['old']:.2f}", f"{f['new']:.2f}", f"{f['ratio']:.3f}", f"{low:.3f} to {high:.3f}",
                      f["verdict"])
    Terminal().print(table)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(build_parser(), arguments)
    return guarded(lambda: compare(options))


if __name__ == "__main__":
    raise SystemExit(main())
