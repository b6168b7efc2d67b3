"""Write the numbers of the README from benchmarks/results:  python benchmarks/readme.py [--check]

The files come from benchmarks/config_f.py, benchmarks/soak.py, from lace-eval (its report.json, under any name) and, as
JSON lines, from benchmarks/run.py. No number in that section is typed by hand.
"""

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- numbers:begin -->", "<!-- numbers:end -->"
NOTHING = "Nothing is recorded yet: `benchmarks/results` is empty."
MORE = ("All suites, with plots and what was not reached: [docs/benchmarks](docs/benchmarks/report.md). Command: "
        "`python -m benchmarks.run --suite all`.")
NUMBERS = {1: "one", 2: "two", 3: "three"}


class ReadmeError(Exception):
    """A result or the README is not what this script expects."""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0].partition(":")[0], allow_abbrev=False)
    parser.add_argument("--check", action="store_true", help="change nothing; fail if the README is out of date")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md", metavar="FILE", help="(README.md)")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks/results", metavar="DIR",
                        help="(benchmarks/results)")
    return parser


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; all columns but the first are right-aligned."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def seconds(value: float) -> str:
    if value < 0.1:
        return f"{1000 * value:.0f} ms"
    return f"{value:.1f} s" if value < 100 else f"{value:.0f} s"


def percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f} %"


def plain(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def short(commit: str | None) -> str:
    """Twelve digits, and a word where files had been changed since."""
    return "unknown" if not commit else f"{commit[:12]} with changes" if commit.endswith("+") else commit[:12]


def config_f(body: Mapping) -> str:
    """Phases of benchmarks/config_f.py."""
    what, phases, machine, versions = (body[key] for key in ("what", "phases", "machine", "versions"))
    solve, decode = phases["solve"], phases["decode"]
    rows = [
        ["`lace-export`", seconds(phases["export"]["seconds"]), f"{phases['export']['peak_gib']:.1f} GiB"],
        ["`lace-verify`", seconds(phases["verify"]["seconds"]), f"{phases['verify']['peak_gib']:.1f} GiB"],
        ["opening a `Sampler`", seconds(solve["open_seconds"]), ""],
        [f"solving {what['rows']} rows, first call", seconds(solve["first_seconds"]), ""],
        [f"solving {what['rows']} rows, again", seconds(solve["again_seconds"]), f"{solve['peak_gib']:.1f} GiB"],
        ["decoding one picture, first call", seconds(decode["first_seconds"]), ""],
        ["decoding one picture, again", seconds(decode["again_seconds"]), f"{decode['peak_gib']:.1f} GiB"],
    ]
    load = machine["load_before"]
    busy = f" The machine was busy with other work (load {load:.1f} at the start)." if load > 0.5 else ""
    mega = {name: count / 1e6 for name, count in body["bytes"].items()}
    return f"""### A StyleGAN2 of config-f at {what["resolution"]} pixels

Random weights, {what["heads"]} heads of LACE's size, {what["precision"]}; the condition is `{what["condition"]}`.

{table(["step", "time", "peak memory of its process"], rows)}

The solve took {solve["evaluations"]["mean"]:.0f} evaluations a row ({solve["evaluations"]["most"]} at most); the mean
energy fell from {solve["energy"]["start"]:.3g} to {solve["energy"]["end"]:.3g}. The bundle has {mega["bundle"]:.0f} MB,
the checkpoints had {mega["generator"] + mega["heads"]:.0f} MB. Command: `python benchmarks/config_f.py`, on
{machine["cores"]} cores of {machine.get("cpu", "an unnamed processor")} with {machine["memory_gib"]:.0f} GiB,
onnxruntime {versions["onnxruntime"]}, torch {versions["torch"]}, commit {short(body["commit"])}.{busy}"""


def evaluation(body: Mapping) -> str:
    """The summary of lace-eval: conditions of one, two, three attributes."""
    rows = [
        [NUMBERS.get(line["attributes"], str(line["attributes"])), str(line["conditions"]),
         percent(line["least_acc"]), percent(line["mean_acc"]), plain(line["mean_error"]), plain(line["most_error"]),
         percent(line["mean_whole"])]
        for line in body["summary"]
    ]
    head = ["asked together", "conditions", "classes met: least", "mean", "values: mean error", "greatest",
            "all hold: mean"]
    goal, machine = body["goal"], body["machine"]
    missed = [f"`{text}`" for line in body["summary"] for text in line["missed"]]
    verdict = f"Below the goal: {', '.join(missed)}." if missed else "Every statement meets the goal."
    return f"""### Do the pictures show what was asked for?

{body["count"]} pictures of every condition, judged by an image classifier that had no part in training the heads. Goal:
every class in {goal["class"]:.0%} of the pictures or more, every value within {goal["value_error"]:g} on average. *All
hold*: every statement is true of the picture, values within {goal["tolerance"]:g}.

{table(head, rows)}

{verdict} Command: `lace-eval`, in {body["seconds"]:.0f} s on {machine["cores"]} cores of
{machine.get("cpu", "an unnamed processor")}; bundle {body["bundle"][:12]}, commit {short(body["commit"])}."""


def speed(path: Path) -> str:
    """The short form of a run of benchmarks/run.py."""
    from engine.bench.report import table as short_form

    return f"### Speed beside others, on the same weights\n\n{short_form(path)}\n\n{MORE}"


def soak(body: dict) -> str:
    counts, memory = body["counts"], body["memory"]
    ends = ", ".join(f"{counts[end]:,} {end}" for end in ("finished", "late", "cancelled"))
    checks = "\n".join(f"- {name}: {'yes' if passed else '**no**'}" for name, passed in body["checks"].items())
    return f"""### A production process, for {body["seconds"] / 60:.0f} minutes

{body["threads"]} threads submit random requests to one sampler, valid and invalid ones, with deadlines and
cancellations. {counts["submitted"]:,} were accepted, {counts["ended"]:,} ended ({ends}), and
{counts["refused"]:,} were refused. {body["solved_again"]} results were solved again, alone. Memory: from
{memory["warm_mib"]:.1f} to {memory["end_mib"]:.1f} MiB after the warm-up. Command: `python -m benchmarks.soak`; commit
{short(body["commit"])}.

{checks}"""


def section(results: Path) -> str:
    """The text between the markers."""
    parts = []
    for path in sorted(results.glob("*.json")):
        body = json.loads(path.read_text(encoding="utf-8"))
        if body.get("benchmark") == "config_f":
            parts.append((2, config_f(body)))
        elif "summary" in body and "judge" in body:
            parts.append((1, evaluation(body)))
        elif body.get("benchmark") == "soak":
            parts.append((4, soak(body)))
        else:
            raise ReadmeError(f"{path} is of none of benchmarks/config_f.py, benchmarks/soak.py and lace-eval")
    parts += [(3, speed(path)) for path in sorted(results.glob("*.jsonl"))]
    return "\n\n".join(text for _, text in sorted(parts)) or NOTHING


def updated(readme: str, numbers: str) -> str:
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ReadmeError(f"the README lacks {BEGIN} or {END}")
    return f"{before}{BEGIN}\n{numbers}\n{END}{after}"


def main(arguments: Sequence[str] | None = None) -> int:
    options = build_parser().parse_args(arguments)
    old = options.readme.read_text(encoding="utf-8")
    try:
        new = updated(old, section(options.results))
    except (ReadmeError, KeyError, ValueError) as error:
        print(f"error: {error!r}", file=sys.stderr)
        return 2
    if options.check:
        if new != old:
            print(f"{options.readme} is out of date: run python benchmarks/readme.py", file=sys.stderr)
        return int(new != old)
    partial = options.readme.with_name(f".{options.readme.name}.{os.getpid()}.partial")
    partial.write_text(new, encoding="utf-8")
    os.replace(partial, options.readme)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
