"""lace-eval: do a bundle's pictures show what was asked for?"""

import argparse
import json
import os
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from engine.bundle import sha256
from engine.cli.console import EXIT_CODES, OK, guarded, parse, write_json
from engine.cli.options import UsageError, add_sampler_options, open_sampler, positive, seed
from engine.folders import writing_folder
from engine.sampler import Sampler
from kernels.noise import SEED_LIMIT
from trainer import eval_report as report
from trainer.evaluate import Result, Summary, evaluate, summarise
from trainer.questions import CONDITIONS, conditions_for

JUDGE = Path(__file__).parent / "judge.safetensors"
EPILOG = f"""Without --condition the pictures are judged on a fixed list of one, two and three attributes of the
demonstration world. A missed goal is a result, not an error: it is told and the exit code is 0.

{EXIT_CODES}"""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lace-eval", allow_abbrev=False, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Judge a bundle's pictures with an image classifier that had no part in training the heads.",
    )  # fmt: skip
    add = parser.add_argument
    add("bundle", metavar="BUNDLE", help="a folder made by lace-export, or demo")
    add("--judge", type=Path, default=JUDGE, metavar="FILE", help="a classifier of lace-train (the package's)")
    add("--count", type=positive, default=256, metavar="N", help="pictures of every condition (256)")
    add("--seed", type=seed, default=0, metavar="S", help="of the first; the others follow (0)")
    add("--label", type=int, metavar="N", help="class of a conditional generator")
    add("--condition", nargs="+", action="extend", default=[], metavar="TEXT", help="ask this instead of the list")
    add("--out", metavar="DIR", help="folder for report.json, report.md and contact sheets (none is written)")
    add("--overwrite", action="store_true", help="replace DIR if it is an earlier result")
    add("--json", action="store_true", help="write report.json to standard output instead of tables")
    add_sampler_options(parser)
    return parser


def open_judge(path: Path, sampler: Sampler) -> tuple:
    """The classifier, and its hash and facts for the report; refused where it could not be impartial."""
    from trainer.classifier import load

    judge, digest = load(path), sha256(path)
    for attribute in sampler.bundle.attributes.values():
        if dict(attribute.provenance).get("trained_on", {}).get("labeller") == digest:
            raise UsageError(
                f"{path} labelled the pictures on which the head of {attribute.name!r} was trained: it cannot judge "
                "it; give --judge a classifier of another --role"
            )
    drawn, read = sampler.bundle.generator.resolution, judge.shape.size
    if drawn != read:
        raise UsageError(f"the generator draws {drawn} px, the judge {path} reads {read} px: give --judge a classifier "
                         "of the generator's pictures")  # fmt: skip
    facts = {key: judge.metadata[key] for key in ("role", "data", "accuracy") if key in judge.metadata}
    return judge, {"hash": digest, **facts}


def run(options: argparse.Namespace) -> int:
    import torch

    torch.set_num_threads(options.threads or os.cpu_count() or 1)
    if options.seed + options.count > SEED_LIMIT:
        raise UsageError("seed + count goes beyond 2**64: choose a smaller seed")
    began = time.perf_counter()
    target = nullcontext() if options.out is None else writing_folder(
        options.out, marker=report.REPORT, overwrite=options.overwrite, error=UsageError)  # fmt: skip
    with target as folder:
        sampler = open_sampler(options)
        judge, judge_facts = open_judge(options.judge, sampler)
        conditions = conditions_for(sampler, judge, options.condition)
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task("judging", total=None)
            results, pictures = evaluate(
                sampler, judge, conditions, count=options.count, seed=options.seed, label=options.label,
                progress=lambda done, total, text: bar.update(task, completed=done, total=total, description=text),
            )  # fmt: skip
        summaries = summarise(results)
        asked = {result.condition for result in results}
        left_out = [] if options.condition else [text for text in CONDITIONS if text not in asked]
        facts = report.document(sampler, judge_facts, results, summaries, left_out=left_out, count=options.count,
                                seed=options.seed, seconds=time.perf_counter() - began)  # fmt: skip
        if folder is not None:
            report.write(folder, facts, results, summaries, pictures)
    if options.json:
        write_json(json.dumps(facts, indent=1))
    else:
        show(results, summaries, facts, Console())
        if options.out:
            Console().print(f"written: {options.out}", highlight=False, markup=False, soft_wrap=True)
    return OK


def show(results: Sequence[Result], summaries: Sequence[Summary], facts: dict, console: Console):
    """Conditions with their statements, and the summary last."""
    table = grid("what the judge sees", ("asked", "judged", "95 %", "heads", "plain", "energy", "evaluations"))
    for result in results:
        cost = report.decimal(result.energy), f"{result.evaluations:.1f} ({result.most_evaluations})"
        alone = len(result.scores) == 1
        if not alone:
            table.add_row(
                *report.condition_row(result)[:3], "", report.percent(result.whole.plain), *cost, style="bold"
            )
        for score in result.scores:
            _, name, judged, *cells = report.statement_row(result, score)
            coloured = Text(judged, "green" if score.met else "red")
            table.add_row(name if alone else f"  {name}", coloured, *cells, *(cost if alone else ()))
    summary = grid(
        f"summary of {facts['count']} pictures a condition, in {facts['seconds']:.0f} s", report.SUMMARY_HEADINGS
    )
    for line in summaries:
        *cells, goal = report.summary_row(line)
        summary.add_row(*cells, Text(goal, "red" if line.missed else "green"))
    console.print(table)
    console.print(summary)
    console.print(report.NOTE, style="dim", highlight=False)
    for line in summaries:
        if line.missed:
            console.print(f"below the goal with {report.words(line.attributes)}: {'; '.join(line.missed)}",
                          style="yellow", highlight=False, markup=False)  # fmt: skip
    if stopped := sum(result.stopped for result in results):
        console.print(f"{stopped} rows did not reach the end of the flow; they are counted", style="yellow")
    if facts["left_out"]:
        console.print(f"{report.LEFT_OUT}: {'; '.join(facts['left_out'])}", highlight=False, markup=False)


def grid(title: str, headings: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for i, heading in enumerate(headings):
        table.add_column(heading, justify="right" if i else "left", overflow="fold", min_width=0 if i else 17)
    return table


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(build_parser(), arguments)
    return guarded(lambda: run(options))


if __name__ == "__main__":
    raise SystemExit(main())
