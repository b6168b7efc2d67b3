"""The measurements of a file as tables:  python -m benchmarks.gpu.table FILE.jsonl"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from engine.bench.report import groups, latest, markdown
from engine.cli.console import OK, guarded

HEAD = ("contestant", "attributes", "rows", "ms", "launches", "rounds", "GB/s", "TFLOP/s", "times the floor", "SM MHz",
        "check")


def tables(path: Path) -> str:
    """One table a suite, of the lines of the last run."""
    lines = latest(path)
    parts = [f"{line.get('gpu', 'no GPU')}, commit {line['commit']}, {told(line['versions'])}" for line in lines[-1:]]
    for (suite,), members in groups(lines, "suite").items():
        parts += [f"\n### {suite}\n", markdown(HEAD, map(cells, members))]
    return "\n".join(parts)


def told(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {number}" for name, number in versions.items())


def cells(line: Mapping) -> Sequence[str]:
    found = line.get("details", {})
    keys = ("launches", "rounds", "gigabytes_per_second", "teraflops", "times_floor", "clocks.sm")
    numbers = (found.get(key) for key in keys)
    size = (line.get("attributes", line.get("resolution", "")), line.get("rows", ""))
    shown = ("" if number is None else f"{number:.4g}" for number in numbers)
    took = "" if line.get("median") is None else f"{line['median']:.4g}"
    return [line["contestant"], *map(str, size), took, *shown, line.get("check", line.get("unavailable", ""))]


def main(arguments: Sequence[str]) -> int:
    def show() -> int:
        print(tables(Path(arguments[0])))
        return OK

    return guarded(show)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
