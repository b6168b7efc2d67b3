"""What lace-eval shows in the terminal."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from engine.cli.console import Terminal
from lace_evaluation import goal_report as report
from lace_evaluation.goal import Result, Summary

if TYPE_CHECKING:
    from lace_evaluation.compare import Change

VERDICTS = {True: ("met", "green"), False: ("not met", "red"), None: ("cannot tell", "yellow")}


def conditions(results: Sequence[Result], summaries: Sequence[Summary], facts: Mapping, console: Terminal) -> None:
    """The suite ``goal``: conditions with their statements, and the summary last."""
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
    console.print(report.NOTE, style="dim")
    for line in summaries:
        if line.missed:
            console.print(f"below the goal with {report.words(line.attributes)}: {'; '.join(line.missed)}",
                          style="yellow")
    if stopped := sum(result.stopped for result in results):
        console.print(f"{stopped} rows did not reach the end of the flow; they are counted", style="yellow")
    if facts["left_out"]:
        console.print(f"{report.LEFT_OUT}: {'; '.join(facts['left_out'])}")


def goals(facts: Mapping, console: Terminal) -> None:
    """The goals of the suites that were run."""
    table = grid(f"goals, after {facts['seconds']:.0f} s", ("goal", "found", ""))
    for goal in facts["goals"]:
        word, colour = VERDICTS[goal["met"]]
        table.add_row(goal["text"], goal["found"], Text(word, colour))
    console.print(table)


def changes(found: "Sequence[Change]", compared: int, console: Terminal) -> None:
    table = grid("second report minus first", ("cell", "metric", "first", "second", "difference", "95 %", ""))
    for change in found:
        word = Text("worse", "red") if change.worse else Text("better", "green") if change.significant else Text("")
        table.add_row(change.cell, change.metric, f"{change.before:.4g}", f"{change.after:.4g}",
                      f"{change.difference:+.3g}", f"{change.low:+.3g} to {change.high:+.3g}", word)
    if found:
        console.print(table)
    significant = sum(change.significant for change in found)
    console.print(f"{compared} metrics compared; {significant} changed by more than chance, of which "
                  f"{sum(change.worse for change in found)} for the worse")


def grid(title: str, headings: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for i, heading in enumerate(headings):
        table.add_column(heading, justify="right" if i else "left", overflow="fold", min_width=0 if i else 17)
    return table
