"""What the suite ``goal`` writes: facts as JSON, tables as Markdown, contact sheets."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from numpy import ndarray as Array
from PIL import Image

from engine.origin import commit, machine, versions
from engine.pictures import GAP, PAPER, save_png, table, to_image
from engine.sampler import Sampler
from engine.text import code, table_row, to_json
from engine.text import markdown as words_of
from lace_evaluation.goal import CLASS_GOAL, VALUE_GOAL, Result, Score, Summary
from lace_evaluation.questions import TOLERANCE

REPORT = "report.json"
WORDS = {1: "one attribute", 2: "two attributes", 3: "three attributes"}
COLUMNS = 8  # conditions side by side on a contact sheet

STATEMENT_HEADINGS = ("condition", "statement", "judged", "95 %", "by the heads", "no condition")
CONDITION_HEADINGS = ("condition", "all hold", "95 %", "no condition", "energy", "evaluations", "most", "seconds")
SUMMARY_HEADINGS = ("together", "asked", "ACC", "least", "error", "most", "all hold", "goal")
LEFT_OUT = "Not asked, because the bundle lacks the attribute or its data the value"
NOTE = (f"Judged: hit rate (ACC) of a class, ± mean absolute error of a value (its ACC is 1 - error). Summary: mean "
        f"and least ACC of the classes, mean and greatest error of the values. Goal: every class {CLASS_GOAL:.0%} or "
        f"more, every value within {VALUE_GOAL:g} on average. All hold: every statement is true of the picture, values "
        f"to within {TOLERANCE:g}.")


def words(number: int) -> str:
    return WORDS.get(number, f"{number} attributes")


def percent(rate: float | None) -> str:
    return "" if rate is None else f"{100 * rate:.1f} %"


def decimal(number: float | None) -> str:
    return "" if number is None else f"{number:.3f}"


def interval(score: Score) -> str:
    return f"{100 * score.low:.1f}–{100 * score.high:.1f}"


def statement_row(result: Result, score: Score) -> tuple[str, ...]:
    """Cells under STATEMENT_HEADINGS."""
    first = result.condition, score.statement
    if score.error is not None:
        return (*first, f"± {score.error:.3f}", "", percent(score.heads), f"± {score.plain_error:.3f}")
    return (*first, percent(score.rate), interval(score), percent(score.heads), percent(score.plain))


def condition_row(result: Result) -> tuple[str, ...]:
    """Cells under CONDITION_HEADINGS."""
    whole = result.whole
    return (result.condition, percent(whole.rate), interval(whole), percent(whole.plain), decimal(result.energy),
            f"{result.evaluations:.1f}", str(result.most_evaluations),
            f"{sum(result.seconds.values()):.1f}")


def summary_row(summary: Summary) -> tuple[str, ...]:
    """Cells under SUMMARY_HEADINGS."""
    return (words(summary.attributes), str(summary.conditions), percent(summary.mean_acc), percent(summary.least_acc),
            decimal(summary.mean_error), decimal(summary.most_error), percent(summary.mean_whole),
            f"{len(summary.missed)} below" if summary.missed else "met")


def document(sampler: Sampler, judge: Mapping, results: Sequence[Result], summaries: Sequence[Summary], *,
             left_out: Sequence[str], count: int, seed: int, seconds: float) -> dict:
    """Everything, ready for JSON. ``judge``: hash and facts of the classifier. ``left_out``: of the default list."""

    def scored(score: Score) -> dict:
        return {**asdict(score), "acc": score.acc, "met": score.met}

    conditions = [
        {**asdict(r), "scores": [scored(s) for s in r.scores], "whole": asdict(r.whole)} for r in results
    ]
    return {
        "bundle": sampler.bundle.hash, "sampler": repr(sampler), "judge": dict(judge), "count": count, "seed": seed,
        "goal": {"class": CLASS_GOAL, "value_error": VALUE_GOAL, "tolerance": TOLERANCE},
        "met": not any(summary.missed for summary in summaries), "summary": [asdict(s) for s in summaries],
        "conditions": conditions, "left_out": list(left_out), "seconds": round(seconds, 1), "machine": machine(),
        "versions": versions(), "commit": commit(),
    }


def markdown(facts: Mapping, results: Sequence[Result], summaries: Sequence[Summary]) -> str:
    missed = [f"- {words(s.attributes)}: {', '.join(map(code, s.missed))}" for s in summaries if s.missed]
    origin = [f"- {name}: {code(facts[name])}" for name in ("bundle", "sampler", "commit") if facts[name]]
    lists = {name: words_of(", ".join(f"{k} {v}" for k, v in facts[name].items()))
             for name in ("machine", "versions")}
    known = facts["judge"].get("accuracy", {})
    accuracy = words_of(", ".join(f"{name} {value:.3f}" for name, value in known.items()))
    return "\n".join([
        "# What the pictures show", "",
        f"{facts['count']} pictures of every condition, from seed {facts['seed']} on, judged by an image classifier "
        f"that had no part in training the heads. {NOTE}", "",
        *rows(SUMMARY_HEADINGS, map(summary_row, summaries)), "",
        *(["Below the goal:", "", *missed, ""] if missed else []),
        *([f"{LEFT_OUT}: {', '.join(map(code, facts['left_out']))}", ""] if facts["left_out"] else []),
        "## Conditions", "", *rows(CONDITION_HEADINGS, [map(words_of, condition_row(r)) for r in results]), "",
        "## Statements", "",
        *rows(STATEMENT_HEADINGS, [map(words_of, statement_row(r, s)) for r in results for s in r.scores]), "",
        "## Origin", "", *origin, f"- judge: {code(facts['judge']['hash'])}",
        *([f"- the judge on renders that it has not seen (1 - error of a value): {accuracy}"] if accuracy else []),
        *(f"- {name}: {text}" for name, text in lists.items()), f"- seconds: {facts['seconds']}", "",
    ])


def rows(headings: Sequence[str], cells) -> list[str]:
    """A Markdown table of cells that are Markdown; the bar of an alternative does not end a cell."""
    return [table_row(line) for line in (headings, ["---"] * len(headings), *cells)]


def sheet(results: Sequence[Result], pictures: Mapping[str | None, Sequence[Array]]) -> Image.Image:
    """One column a condition, one row a seed; each band of columns begins with the pictures of no condition."""
    bands = []
    for first in range(0, len(results), COLUMNS):
        part = results[first : first + COLUMNS]
        columns = [pictures[None], *(pictures[r.condition] for r in part)]
        captions = ["no condition", *(f"{r.condition} ({r.whole.rate:.0%})" for r in part)]
        bands.append(table([[to_image(i) for i in row] for row in zip(*columns, strict=True)], 96, captions))
    height = sum(band.height for band in bands) + 4 * GAP * (len(bands) - 1)
    whole, top = Image.new("RGB", (max(band.width for band in bands), height), PAPER), 0
    for band in bands:
        whole.paste(band, (0, top))
        top += band.height + 4 * GAP
    return whole


def write(folder: Path, facts: Mapping, results: Sequence[Result], summaries: Sequence[Summary],
          pictures: Mapping[str | None, Sequence[Array]]) -> None:
    (folder / REPORT).write_text(to_json(facts) + "\n", encoding="utf-8")
    (folder / "report.md").write_text(markdown(facts, results, summaries), encoding="utf-8")
    origin = {"Software": "lace-engine", "Bundle": facts["bundle"], "Seed": str(facts["seed"])}
    for summary in summaries:
        group = [result for result in results if result.attributes == summary.attributes]
        name = words(summary.attributes).replace(" ", "-")
        save_png(folder / f"{name}.png", sheet(group, pictures), origin)
