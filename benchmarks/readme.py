"""Write the numbers of the README and the docs from benchmarks/results:  python -m benchmarks.readme [--check]

The files come from benchmarks/config_f.py, soak.py and kills.py, from lace-eval (report.json of the goals, or of the
suite posterior, under any name) and, as JSON lines, from benchmarks/run.py. Each page has one section between two
markers, in which no number is typed by hand. The tables of speed are pages of their own, which benchmarks.report
writes.
"""

import argparse
import json
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.goals import PAPER, find_goals
from engine.bench.records import RecordError, fastest, is_ours, some
from engine.bench.report import latest, markdown
from engine.folders import write_atomically

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- numbers:begin -->", "<!-- numbers:end -->"
NOTHING = "Nothing is recorded yet: `benchmarks/results` has no such measurement."
NUMBERS = {1: "one", 2: "two", 3: "three"}
SPEED, OBEDIENCE, CONFIG_F, RELIABILITY, POSTERIOR = (
    "docs/benchmarks/speed/report.md", "docs/benchmarks/obedience.md", "docs/benchmarks/config-f.md",
    "docs/reliability.md", "docs/posterior.md")


class ReadmeError(Exception):
    """A result or a page is not what this script expects."""


@dataclass
class Results:
    """What benchmarks/results holds; None or empty where a benchmark was not run."""

    evaluation: Mapping | None = None
    posterior: Mapping | None = None
    config_f: Mapping | None = None
    soak: Mapping | None = None
    kills: Mapping | None = None
    speed: Sequence[Mapping] = ()


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0].partition(":")[0], allow_abbrev=False)
    parser.add_argument("--check", action="store_true", help="change nothing; fail if a page is out of date")
    parser.add_argument("--root", type=Path, default=ROOT, metavar="DIR", help="with README.md and docs (this one)")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks/results", metavar="DIR",
                        help="(benchmarks/results)")
    return parser


def read_results(folder: Path) -> Results:
    """Raises ReadmeError for a file that no benchmark of ours writes."""
    results = Results()
    for path in sorted(folder.glob("*.json")):
        body = json.loads(path.read_text(encoding="utf-8"))
        if body.get("benchmark") == "config_f":
            results.config_f = body
        elif body.get("benchmark") == "soak":
            results.soak = body
        elif body.get("benchmark") == "kills":
            results.kills = body
        elif "summary" in body and "judge" in body:
            results.evaluation = body
        elif "posterior" in body.get("suites", {}):
            results.posterior = body
        else:
            raise ReadmeError(f"{path} is of none of benchmarks/config_f.py, soak.py, kills.py and lace-eval")
    for path in sorted(folder.glob("*.jsonl")):
        results.speed = latest(path)
    return results


def seconds(value: float) -> str:
    if value < 0.1:
        return f"{1000 * value:.0f} ms"
    return f"{value:.1f} s" if value < 100 else f"{value:.0f} s"


def milliseconds(value: float) -> str:
    """Three digits."""
    return f"{value:,.0f} ms" if value >= 100 else f"{value:.3g} ms"


def percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f} %"


def plain(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def short(commit: str | None) -> str:
    """Twelve digits, and a word where files had been changed since."""
    return "unknown" if not commit else f"{commit[:12]} with changes" if commit.endswith("+") else commit[:12]


def paragraph(*sentences: str) -> str:
    return textwrap.fill(" ".join(sentences), 120, break_long_words=False, break_on_hyphens=False)


def where(body: Mapping) -> str:
    machine = body["machine"]
    return f"on {machine['cores']} cores of {machine.get('cpu', 'an unnamed processor')}"


# --- the README: one line for each of the other pages -------------------------------------------------------------


def headline(results: Results) -> str:
    lines = [obedience_line(results.evaluation), *speed_lines(results.speed), soak_line(results.soak)]
    rows = [line for line in lines if line]
    if not rows:
        return NOTHING
    right = f"{right_or_obeying(results.posterior)}\n\n" if results.posterior else ""
    return f"{right}{markdown(['', 'measured', 'more'], rows, numbers=False)}{goals_sentence(results.speed)}"


def right_or_obeying(body: Mapping) -> str:
    """The two ways to sample, over the class conditions of lace-eval's suite posterior."""
    names = {"posterior": "samples of the posterior", "flow": "ends of LACE's flow"}
    found = body["suites"]["posterior"]["summaries"]["classes"]
    rows = [[names[name], *measures(found[name])] for name in ("flow", "posterior")]
    head = [f"{found['posterior']['conditions']} conditions on classes", "obey", "FID above its floor", "recall",
            "coverage", "other attributes off by (by chance)"]
    return f"{markdown(head, rows)}\n\n" + paragraph(
        f"Measured against the plain pictures of which the condition is true ([how, and each condition]({POSTERIOR})).")


def measures(f: Mapping) -> list[str]:
    return [percent(f["acc"]), f"{f['above']:.3f}", plain(f["recall"]), plain(f["coverage"]),
            f"{plain(f['others'])} ({plain(f['chance'])})"]


def obedience_line(body: Mapping | None) -> list[str] | None:
    """How many pictures show all that was asked for."""
    if body is None:
        return None
    shares = [f"{percent(line['mean_whole'])} with {NUMBERS.get(line['attributes'], line['attributes'])}"
              for line in body["summary"]]
    return ["pictures of which every statement of the condition is true, says an image classifier that had no part in "
            "the training", f"{', '.join(shares)} statements (values within {body['goal']['tolerance']:g})",
            f"[obedience]({OBEDIENCE})"]


def speed_lines(lines: Sequence[Mapping]) -> list[list[str] | None]:
    return [solve_line(lines), picture_line(lines), cold_line(lines)]


def solve_line(lines: Sequence[Mapping], rows: int = 16) -> list[str] | None:
    """The default solver, adaptive and in float32, beside the paper's method and the best peer."""
    solves = some(lines, suite="solve", world="ffhq", attributes=3, rows=rows)
    ours, paper = (fastest(some(solves, contestant=name)) for name in ("ours", PAPER))
    peer = fastest([line for line in solves if not is_ours(line) and line["contestant"] != PAPER])
    if ours is None or paper is None or peer is None:
        return None
    worse = [fact for fact in ("energy", "trajectory_error") if ours[fact] > paper[fact]]
    accuracy = f"less accurate than the paper's method in {' and '.join(worse)}" if worse else (
        "no less accurate than the paper's method")
    return [f"finding {rows} latents for 3 attributes by the defaults, networks of FFHQ's size (random weights)",
            f"{milliseconds(ours['median'])}: {paper['median'] / ours['median']:,.0f} times as fast as the paper's "
            f"method, {peer['median'] / ours['median']:,.0f} times as fast as `{peer['contestant']}`, the best peer; "
            f"{accuracy}", f"[solves]({Path(SPEED).parent.as_posix()}/solving.md)"]


def picture_line(lines: Sequence[Mapping]) -> list[str] | None:
    pictures = some(lines, suite="decode", world="ffhq-1024", rows=1)
    names = {"ours": "ONNX Runtime", "ours on openvino fp32": "OpenVINO",
             "ours on openvino bf16": "OpenVINO in bfloat16", "torch": "eager torch"}
    times = {name: fastest(some(pictures, contestant=contestant)) for contestant, name in names.items()}
    found = [f"{milliseconds(line['median'])} by {name}" for name, line in times.items() if line]
    if not found:
        return None
    return ["drawing one picture of 1024 pixels", "; ".join(found),
            f"[pictures]({Path(SPEED).parent.as_posix()}/pictures.md)"]


def cold_line(lines: Sequence[Mapping]) -> list[str] | None:
    found = [(name, fastest(some(lines, suite="cold", world=world)))
             for name, world in (("the demo bundle", "demo"), ("a StyleGAN2 of 1024 pixels", "ffhq-1024"))]
    times = [f"{line['median'] / 1e3:.2f} s with {name}" for name, line in found if line]
    if not times:
        return None
    return ["starting Python to the first picture", "; ".join(times),
            f"[cold start]({Path(SPEED).parent.as_posix()}/serving.md)"]


def soak_line(body: Mapping | None) -> list[str] | None:
    if body is None:
        return None
    counts, memory = body["counts"], body["memory"]
    failed = [name for name, passed in body["checks"].items() if not passed]
    verdict = f"**failed**: {', '.join(failed)}" if failed else "each ended once"
    return [f"requests to one sampler from {body['threads']} threads in {body['seconds'] / 60:.0f} minutes",
            f"{counts['submitted']:,}, {verdict}; memory {memory['warm_mib']:.1f} to {memory['end_mib']:.1f} MiB",
            f"[reliability]({RELIABILITY})"]


def goals_sentence(lines: Sequence[Mapping]) -> str:
    """What the benchmark of speed did not reach, counted."""
    if not lines:
        return ""
    met = [goal.met for goal in find_goals(lines) if goal.met is not None]
    machine = lines[-1].get("machine", {}).get("cpu", "an unnamed processor")
    return "\n\n" + paragraph(
        f"Times are medians with {lines[-1].get('threads')} threads of {machine}. Of {len(met)} goals that the speed "
        f"benchmark sets itself, {met.count(True)} are met; [the others]({SPEED}) are listed with their numbers.")


# --- the other pages ----------------------------------------------------------------------------------------------


def obedience(results: Results) -> str:
    """The summary of lace-eval: conditions of one, two, three attributes."""
    body = results.evaluation
    if body is None:
        return NOTHING
    rows = [
        [NUMBERS.get(line["attributes"], str(line["attributes"])), str(line["conditions"]),
         percent(line["least_acc"]), percent(line["mean_acc"]), plain(line["mean_error"]), plain(line["most_error"]),
         percent(line["mean_whole"])]
        for line in body["summary"]
    ]
    head = ["asked together", "conditions", "classes met: least", "mean", "values: mean error", "greatest",
            "all hold: mean"]
    goal = body["goal"]
    missed = [f"`{text}`" for line in body["summary"] for text in line["missed"]]
    verdict = f"Below the goal: {', '.join(missed)}." if missed else "Every statement meets the goal."
    lead = paragraph(
        f"{body['count']} pictures of every condition.",
        f"Goal: every class in {goal['class']:.0%} of the pictures or more, every value within "
        f"{goal['value_error']:g} on average.",
        f"*All hold*: every statement is true of the picture, values within {goal['tolerance']:g}.")
    end = paragraph(verdict, f"Command: `lace-eval`, in {body['seconds']:.0f} s {where(body)}; bundle "
                             f"{body['bundle'][:12]}, commit {short(body['commit'])}.")
    return "\n\n".join((lead, markdown(head, rows), end))


def posterior(results: Results) -> str:
    """The suite posterior of lace-eval: methods, and each condition by the posterior and by the flow."""
    if results.posterior is None:
        return NOTHING
    body, found = results.posterior, results.posterior["suites"]["posterior"]
    methods = [[name, *measures(f), plain(f["branch"])]
               for name, f in found["summaries"]["classes"].items() if f["conditions"]]
    rows = [[f"`{c['condition']}`", f"{1 / c['rate']:,.0f}" if c["rate"] else "", *each(c["methods"]["posterior"]),
             *each(c["methods"]["flow"])[:-1]] for c in found["conditions"]]
    count = found["conditions"][0]["methods"]["posterior"]["rows"]
    lead = paragraph(
        f"The truth of a condition: those of {found['pool']:,} plain pictures that satisfy it, says a classifier that "
        f"had no part in the training. {count} pictures of each condition.")
    end = paragraph(f"Command: `lace-eval demo --suite posterior`, {where(body)}; bundle {body['bundle'][:12]}, commit "
                    f"{short(body['commit'])}.")
    return "\n\n".join((lead, markdown(
        ["method, over the classes", "obey", "FID above its floor", "recall", "coverage", "others off by (by chance)",
         "branches of OR off by at most"], methods), markdown(
        ["condition", "one in", "posterior: obey", "FID (floor)", "error", "exact", "flow: obey", "FID (floor)",
         "error"], rows), end))


def each(found: Mapping) -> list[str]:
    """A condition by one method."""
    near = found["likeness"]
    error = max(found["errors"].values(), default=None)
    return [percent(found["holds"]), f"{near['fid']:.3f} ({near['fid_floor']:.3f})" if near else "", plain(error),
            percent(found["exact"])]


def config_f(results: Results) -> str:
    """Phases of benchmarks/config_f.py."""
    body = results.config_f
    if body is None:
        return NOTHING
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
    mega = {name: count / 1e6 for name, count in body["bytes"].items()}
    lead = paragraph(f"A generator of {what['resolution']} pixels and {what['heads']} heads, {what['precision']}; the "
                     f"condition is `{what['condition']}`.")
    end = [f"The solve took {solve['evaluations']['mean']:.0f} evaluations a row ({solve['evaluations']['most']} at "
           f"most); the mean energy fell from {solve['energy']['start']:.3g} to {solve['energy']['end']:.3g}.",
           f"The bundle is {mega['bundle']:.0f} MB; the checkpoints were {mega['generator'] + mega['heads']:.0f} MB.",
           f"Command: `python benchmarks/config_f.py`, {where(body)} with {machine['memory_gib']:.0f} GiB, onnxruntime "
           f"{versions['onnxruntime']}, torch {versions['torch']}, commit {short(body['commit'])}."]
    if machine["load_before"] > 0.5:
        end.append(f"The machine was busy with other work (load {machine['load_before']:.1f} at the start).")
    return "\n\n".join((lead, markdown(["step", "time", "peak memory of its process"], rows), paragraph(*end)))


def reliability(results: Results) -> str:
    """The counts and checks of benchmarks/soak.py, and what the kills of benchmarks/kills.py left."""
    found = [write(body) for write, body in ((soak, results.soak), (kills, results.kills)) if body is not None]
    return "\n\n".join(found) or NOTHING


def kills(body: Mapping) -> str:
    kept, cleaned = ("old or absent", "whole new"), ("torn", "not cleaned", "next run failed")
    rows = [[action, str(found["kills"]), str(found.get("old", 0) + found.get("absent", 0)), str(found["new"]),
             *(str(found[name]) for name in ("torn", "left_behind", "failed"))]
            for action, found in body["actions"].items()]
    lead = paragraph(f"{body['kills']} kills with SIGKILL, half of them after a random time and half at a random "
                     f"operation on files (`python -m benchmarks.kills`), {where(body)}; commit "
                     f"{short(body['commit'])}. After each the target was opened, and the action run again.")
    return f"## Kills at all moments\n\n{lead}\n\n{markdown(['what was killed', 'kills', *kept, *cleaned], rows)}"


def soak(body: Mapping) -> str:
    counts, memory = body["counts"], body["memory"]
    names = {"submitted": "accepted", "finished": "finished", "late": "ended by their deadline",
             "cancelled": "cancelled by their caller", "refused": "invalid, refused at once"}
    rows = [[name, f"{counts[count]:,}"] for count, name in names.items()]
    checks = [[name, "yes" if passed else "**no**"] for name, passed in body["checks"].items()]
    lead = paragraph(f"{body['seconds'] / 60:.0f} minutes, {body['threads']} threads, {where(body)}; commit "
                     f"{short(body['commit'])}.")
    end = paragraph(f"{body['solved_again']} results were solved again, alone. Memory of the process: "
                    f"{memory['warm_mib']:.1f} MiB after the warm-up, {memory['end_mib']:.1f} MiB at the end.")
    tables = markdown(["requests", "number"], rows), markdown(["check", "holds"], checks, numbers=False)
    return "\n\n".join((lead, *tables, end))


PAGES: dict[str, Callable[[Results], str]] = {
    "README.md": headline, OBEDIENCE: obedience, CONFIG_F: config_f, RELIABILITY: reliability,
    POSTERIOR: posterior}


def updated(page: Path, numbers: str) -> str:
    """The page's text with ``numbers`` between its markers."""
    before, begin, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ReadmeError(f"{page} lacks {BEGIN} or {END}")
    return f"{before}{BEGIN}\n{numbers}\n{END}{after}"


def main(arguments: Sequence[str] | None = None) -> int:
    options = build_parser().parse_args(arguments)
    try:
        results = read_results(options.results)
        pages = {options.root / name: write(results) for name, write in PAGES.items()}
        texts = {page: updated(page, numbers) for page, numbers in pages.items()}
    except (ReadmeError, RecordError, KeyError, OSError, ValueError) as error:
        print(f"error: {error!r}", file=sys.stderr)
        return 2
    stale = [page for page, text in texts.items() if page.read_text(encoding="utf-8") != text]
    for page in stale:
        if options.check:
            print(f"{page} is out of date: run python -m benchmarks.readme", file=sys.stderr)
        else:
            write_atomically(page, texts[page])
    return int(options.check and bool(stale))


if __name__ == "__main__":
    raise SystemExit(main())
