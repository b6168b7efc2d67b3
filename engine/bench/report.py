"""Markdown pages from a file of measurements: one table a suite, and what could not be measured.

``write_report`` makes a folder: report.md with the machine, one page for each group of suites, the plots.
"""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from engine.bench.records import RecordError, counted, figures, read
from engine.errors import LaceError
from engine.folders import writing_folder
from engine.text import code, table_row
from engine.text import markdown as words

REPORT = "report.md"
Plots = Iterable[tuple[str, str, str]]  # section, description and file of each
WRONG = "†"  # behind a time whose answer did not pass its check
FIELDS = ("Ours with a row of the Jacobian for each column that the condition reads, as the default solver needs it, "
          "and called from Python, as the other solvers call it; peers: the gradient alone.")


class ReportError(LaceError):
    """A report cannot be written."""


def latest(path: Path) -> list[dict]:
    """The lines that share commit, machine and number of threads with the last one. Raises RecordError."""
    lines = read(path)
    if not lines:
        raise RecordError(f"{path} holds no measurement: run lace-bench run --out {path}")
    return [line for line in lines if run_of(line) == run_of(lines[-1])]


def run_of(line: Mapping) -> tuple:
    return line.get("commit"), line.get("threads"), line.get("quick"), line.get("machine", {}).get("cpu")


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: bool = True) -> str:
    """A table; if its cells are ``numbers``, all columns but the first are right-aligned."""
    lines = [head, ["---", *["---:" if numbers else "---"] * (len(head) - 1)], *rows]
    return "\n".join(map(table_row, lines))


def of_suite(lines: Sequence[Mapping], suite: str) -> list[Mapping]:
    return [line for line in lines if line["suite"] == suite]


def groups(lines: Sequence[Mapping], *keys: str) -> dict[tuple, list[Mapping]]:
    found: dict[tuple, list[Mapping]] = {}
    for line in lines:
        found.setdefault(tuple(line.get(key) for key in keys), []).append(line)
    return found


def time(line: Mapping | None) -> str:
    """A median in milliseconds, marked where the answer was wrong."""
    if line is None or line.get("median") is None:
        return ""
    value, mark = line["median"], "" if line["check"] == "passed" else WRONG
    digits = 2 if value < 10 else 1 if value < 100 else 0
    return f"{value:,.{digits}f}{mark}"


def contestants(lines: Sequence[Mapping]) -> list[str]:
    """In the order of their first line, those that were never measured left out."""
    return list(dict.fromkeys(line["contestant"] for line in lines if line.get("median") is not None))


def grid(lines: Sequence[Mapping], key: str, title: Callable[[object], str]) -> str:
    """Contestants down, the values of ``key`` across, times inside."""
    columns = sorted({line[key] for line in lines if line.get("median") is not None})
    cell = {(line["contestant"], line[key]): line for line in lines}
    rows = [[code(one), *(time(cell.get((one, column))) for column in columns)] for one in contestants(lines)]
    return markdown(["milliseconds", *map(title, columns)], rows)


# --- sections -----------------------------------------------------------------------------------------------------


def by_rows(lines: Sequence[Mapping], suite: str) -> str:
    """A grid for each world and condition."""
    parts = []
    for (world, condition), some in groups(of_suite(lines, suite), "world", "condition").items():
        title = f"{words(world)}, {counted(some[0]['attributes'], 'attribute')}: {code(condition)}"
        parts.append(f"{title}\n\n{grid(some, 'rows', lambda n: counted(n, 'row'))}")
    return "\n\n".join(parts)


def accuracy(lines: Sequence[Mapping]) -> str:
    """Evaluations, energies and trajectory errors of the solves, at the largest number of rows that most entered."""
    parts = []
    for (world, attributes), some in groups(of_suite(lines, "solve"), "world", "attributes").items():
        sizes = groups([line for line in some if "energy" in line], "rows")
        if not sizes:
            continue
        (rows,), chosen = max(sizes.items(), key=lambda entry: (len(entry[1]), entry[0]))
        body = [[code(line["contestant"]), f"{line['evaluations']['mean']:.0f}", f"{line['evaluations']['most']}",
                 f"{line['energy']:.4f}", f"{line['trajectory_error']:.2f}",
                 f"{figures(line['q1'])} to {figures(line['q3'])}",
                 str(line["repeats"]), words(line.get("note", ""))] for line in chosen]
        head = ["contestant", "evaluations: mean", "most", "energy", "trajectory error", "quartiles, ms", "repeats", ""]
        title = (f"{world}, {counted(attributes, 'attribute')}, {counted(rows, 'row')}; "
                 f"the converged flow ends at an energy of {chosen[0]['floor_energy']:.4f}.")
        parts.append(f"{title}\n\n{markdown(head, body)}")
    return "\n\n".join(parts)


def hard(lines: Sequence[Mapping]) -> str:
    body = []
    for line in of_suite(lines, "hard"):
        if "energy" in line:
            counts = line["evaluations"]
            body.append([f"{words(line['world'])}, {words(line['targets'])}: {code(line['contestant'])}", time(line),
                         f"{counts['mean']:.0f}", f"{counts['most']}", figures(line["energy"]),
                         figures(line["floor_energy"]), f"{line['trajectory_error']:.2f}"])
    head = ["targets", "ms", "evaluations: mean", "most", "energy", "converged", "trajectory error"]
    return markdown(head, body) if body else ""


def plain(lines: Sequence[Mapping], suite: str, facts: Sequence[str]) -> str:
    """One line for each measurement, with its ``facts``."""
    body = []
    for line in of_suite(lines, suite):
        if line.get("median") is not None:
            spread = f"{figures(line['q1'])} to {figures(line['q3'])}" if "q1" in line else ""
            mark = "" if line["check"] == "passed" else WRONG
            body.append([code(line["contestant"]), *(words(shown(line.get(fact))) for fact in facts),
                         f"{figures(line['median'])} {line['unit']}{mark}", spread])
    return markdown(["contestant", *facts, "median", "quartiles"], body) if body else ""


def shown(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {figures(part)}" for key, part in value.items())
    return "" if value is None else figures(value) if isinstance(value, float) else str(value)


def missing(lines: Sequence[Mapping]) -> str:
    """What was not measured, and why; what was wrong."""
    items = []
    for fact, mark in (("unavailable", ""), ("check", f" {WRONG}")):
        here = [line for line in lines if line.get(fact, "passed") != "passed"]
        for (suite, contestant, what), some in groups(here, "suite", "contestant", fact).items():
            items.append(f"- {words(suite)}, {code(contestant)}{mark}: {words(what)} ({counted(len(some), 'setting')})")
    return "\n".join(items)


def about(lines: Sequence[Mapping]) -> str:
    last = lines[-1]
    machine, versions = last.get("machine", {}), last.get("versions", {})
    packages = ", ".join(f"{package} {number}" for package, number in versions.items())
    features = ", ".join(machine.get("features", ())) or "none of the features that matter"
    quick = " A quick run: few rows and repeats." if last.get("quick") else ""
    return (f"{machine.get('cpu', 'unknown processor')} with {features}; {counted(last.get('threads'), 'thread')} for "
            f"every contestant. {packages}. Commit {last.get('commit')}.{quick} Times are medians; contestants take "
            f"turns. {WRONG} marks a time whose answer did not pass its check.")


def by_resolution(lines: Sequence[Mapping], suite: str) -> str:
    """A grid of single pictures."""
    some = [line for line in of_suite(lines, suite) if line["rows"] == 1 and is_benchmark_world(line)]
    return grid(some, "resolution", lambda n: f"{n} px") if some else ""


def is_benchmark_world(line: Mapping) -> bool:
    """The demo has another width than the benchmark's network of 64 pixels, and would take its column."""
    return line.get("world") != "demo"


def pages(lines: Sequence[Mapping], plots: Plots, goals: str = "") -> dict[str, str]:
    """Markdown by file name. A section without measurements is left out, and so is a page without sections."""
    fields = by_rows(lines, "field")
    parts = {
        "solving.md": ("Solves", {
            "Time": by_rows(lines, "solve"),
            "Accuracy": accuracy(lines),
            "Hard targets": hard(lines),
            "One evaluation": f"{FIELDS}\n\n{fields}" if fields else "",
        }),
        "pictures.md": ("Pictures", {
            "One picture": by_resolution(lines, "decode"),
            "Decode": plain(lines, "decode", ("world", "resolution", "rows", "psnr")),
            "A condition to a PNG": plain(lines, "end-to-end", ("world", "resolution", "energy")),
        }),
        "serving.md": ("Streams, cold start, memory", {
            "Stream": plain(lines, "stream", ("world", "pictures", "rows", "capacity", "details")),
            "Cold start": plain(lines, "cold", ("world", "resolution", "details")),
            "Memory": plain(lines, "memory", ("world", "rows")),
        }),
    }
    found = {file: page(title, about(lines), sections, plots) for file, (title, sections) in parts.items()
             if any(sections.values())}
    links = "\n".join(f"- [{parts[file][0]}]({file})" for file in found)
    front = {
        "Pages": links,
        "Goals": goals,
        "The machine": plain(lines, "machine", ()),
        "Not measured, or wrong": missing(lines),
    }
    return {REPORT: page("Speed", about(lines), front, plots), **found}


def page(title: str, lead: str, sections: Mapping[str, str], plots: Plots) -> str:
    text = [f"# {title}", lead]
    for section, body in sections.items():
        if body:
            text += [f"## {section}", body]
            text += [f"![{alt}]({file})" for at, alt, file in plots if at == section]
    return "\n\n".join(text) + "\n"


def write_report(
    path: Path, out: Path, *, overwrite: bool = False, goals: Callable[[Sequence[Mapping]], str] = lambda lines: ""
) -> Path:
    """A folder with report.md, its pages and plots; whole or not at all. Raises RecordError, ReportError.

    goals   from lines to the Markdown of a section on the goals that they meet
    """
    from engine.bench.plots import draw_plots

    lines = latest(path)
    with writing_folder(out, marker=REPORT, overwrite=overwrite, error=ReportError) as folder:
        for file, text in pages(lines, draw_plots(lines, folder), goals(lines)).items():
            (folder / file).write_text(text, encoding="utf-8")
    return Path(os.fspath(out)) / REPORT
