"""Plots of a run: latency against rows, energy against evaluations, measured time against the floor."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from engine.bench.records import is_ours, is_valid, some
from engine.errors import LaceError
from engine.text import visible

# A figure and its axes, of a package that is imported late.
Axes = Any
INK, GRID = "#222222", "#dddddd"
OURS = ("#c8102e", "#e8743b", "#8a1c5c", "#b08d00")
PEERS = (
    "#1f4e79",
    "#3a86c8",
    "#7fb2dd",
    "#2c7a51",
    "#62b58f",
    "#5b4b8a",
    "#9a8cc2",
    "#6b6b6b",
    "#a0a0a0",
    "#00808a",
    "#c0a080",
)
MARKERS = "os^Dv<>PX*hp"
DASHES = ("-", "--", ":", "-.")  # for those that share a colour
# Sizes whose floors lie closer than this share a label: narrower, and letters of 7 points would overlap.
APART = 1.25
STYLE: Any = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": INK,
         "axes.grid": True, "grid.color": GRID, "axes.axisbelow": True, "legend.frameon": False}


def draw_plots(lines: Sequence[Mapping], folder: Path) -> list[tuple[str, str, str]]:
    """Write the PNGs that the lines have data for; (section of the report, description, file) of each.

    Raises LaceError if matplotlib is not installed.
    """
    try:
        import matplotlib

        matplotlib.use("agg")
        from matplotlib import pyplot
    except ImportError as error:
        raise LaceError("a report needs matplotlib; install it with: pip install 'lace-engine[bench]'") from error
    pyplot.rcParams.update(STYLE)
    drawn = []
    for section, alt, file, draw in PLOTS:
        figure = draw(pyplot, lines)
        if figure is not None:
            figure.savefig(folder / file, dpi=120, bbox_inches="tight")
            pyplot.close(figure)
            drawn.append((section, alt, file))
    return drawn


def looks_of(lines: Sequence[Mapping]) -> dict[str, dict[str, Any]]:
    """Colour, marker and dashes of every contestant, warm colours for ours; no two look alike, and all plots agree."""
    names = list(dict.fromkeys(line["contestant"] for line in lines))
    mine = [name for name in names if is_ours({"contestant": name})]
    others = [name for name in names if name not in mine]
    return {name: {"color": palette[i % len(palette)], "marker": MARKERS[i % len(MARKERS)],
                   "linestyle": DASHES[i // len(palette) % len(DASHES)]}
            for group, palette in ((mine, OURS), (others, PEERS)) for i, name in enumerate(group)}


def latency(pyplot: Any, lines: Sequence[Mapping]) -> Any:
    """One panel for each number of attributes; both axes logarithmic. Wrong answers are left out."""
    solves = [line for line in some(lines, suite="solve") if is_valid(line)]
    counts = sorted({line["attributes"] for line in solves})
    if not counts:
        return None
    figure, axes = pyplot.subplots(1, len(counts), figsize=(4 * len(counts) + 1.5, 4), sharey=True, squeeze=False)
    looks = looks_of(solves)
    for panel, count in zip(axes[0], counts, strict=True):
        here = some(solves, attributes=count)
        for name in dict.fromkeys(line["contestant"] for line in here):
            curve = sorted((line["rows"], line["median"]) for line in some(here, contestant=name))
            panel.plot(*zip(*curve, strict=True), markersize=4, label=visible(name),
                       linewidth=2 if is_ours({"contestant": name}) else 1, **looks[name])
        rows = sorted({line["rows"] for line in here})
        panel.set(xscale="log", yscale="log", xlabel="rows", title=f"{count} attribute{'s' if count > 1 else ''}")
        panel.set_xticks(rows, [str(n) for n in rows])
        panel.minorticks_off()
    axes[0][0].set_ylabel("milliseconds a solve")
    legend(figure, axes[0])
    return figure


def legend(figure: Any, panels: Sequence[Axes]) -> None:
    """One legend on the right, for all panels."""
    entries: dict[str, Any] = {}
    for panel in panels:
        entries.update(zip(*reversed(panel.get_legend_handles_labels()), strict=True))
    figure.legend(entries.values(), entries.keys(), loc="center left", bbox_to_anchor=(0.92, 0.5))


def energies(pyplot: Any, lines: Sequence[Mapping]) -> Any:
    """At three attributes, and the rows that most contestants entered."""
    solves = [line for line in some(lines, suite="solve", attributes=3) if "energy" in line]
    if not solves:
        return None
    sizes = sorted({line["rows"] for line in solves}, key=lambda n: (len(some(solves, rows=n)), n))
    here = some(solves, rows=sizes[-1])
    figure, panel = pyplot.subplots(figsize=(5.5, 4))
    looks = looks_of(solves)
    for line in here:
        panel.plot(line["evaluations"]["mean"], line["energy"], markersize=7, label=visible(line["contestant"]),
                   **{**looks[line["contestant"]], "linestyle": "none"})
    panel.axhline(here[0]["floor_energy"], color=INK, linewidth=1, linestyle="--", label="converged flow")
    found = [line["energy"] for line in here]
    scale = "log" if max(found) > 5 * min(found) else "linear"
    panel.set(xscale="log", yscale=scale, xlabel="evaluations a row", ylabel="mean final energy, -log p",
              title=f"3 attributes, {sizes[-1]} rows")
    legend(figure, [panel])
    return figure


def roofline(pyplot: Any, lines: Sequence[Mapping]) -> Any:
    """One evaluation: measured time against the larger of bytes / rate and FLOPs / rate, in float32."""
    speed = {line["contestant"]: line["median"] for line in some(lines, suite="machine")}
    fields = [line for line in some(lines, suite="field") if is_valid(line)]
    if not fields or not speed:
        return None
    figure, panel = pyplot.subplots(figsize=(5.5, 4.5))
    looks = looks_of(fields)
    points = [(floor(line["details"], speed), line) for line in fields]
    for name in dict.fromkeys(line["contestant"] for line in fields):
        mine = [(x, line["median"]) for x, line in points if line["contestant"] == name]
        panel.plot(*zip(*mine, strict=True), label=visible(name), **{**looks[name], "linestyle": "none"})
    low, high = min(x for x, _ in points) / 1.5, max(x for x, _ in points) * 1.5
    for factor in (1, 2, 4, 8):
        panel.plot([low, high], [factor * low, factor * high], color=INK, linewidth=0.8, alpha=1 / factor)
        panel.annotate(f"{factor}x", (high, factor * high), color=INK, va="center")
    panel.set(xscale="log", yscale="log", xlabel="floor in ms: weights streamed twice, or FLOPs, in float32",
              ylabel="measured ms")
    # Above the panel, where no point lies.
    places, labels = zip(*sizes(points), strict=True)
    top = panel.secondary_xaxis("top")
    top.set_xticks(places, labels, rotation=45, ha="left", fontsize=7)
    top.minorticks_off()
    top.set_xlabel("one evaluation of rows x attributes")
    legend(figure, [panel])
    return figure


def sizes(points: Sequence[tuple[float, Mapping]]) -> list[tuple[float, str]]:
    """One label for each floor; settings whose floors are nearly equal share it."""
    found: list[tuple[float, str]] = []
    for x, text in sorted({(x, f"{line['rows']} x {line['attributes']}") for x, line in points}):
        if found and x < APART * found[-1][0]:
            found[-1] = (found[-1][0], f"{found[-1][1]}, {text}")
        else:
            found.append((x, text))
    return found


def floor(cost: Mapping, speed: Mapping[str, float]) -> float:
    """Milliseconds. Weights stream at the rate that was measured for the size next to theirs."""
    megabytes = cost["bytes"] / 2e6  # they are read twice
    sizes = {float(name.split()[1]): rate for name, rate in speed.items() if name.startswith("streaming")}
    stream = sizes[min(sizes, key=lambda size: abs(size - megabytes))]
    product = max(rate for name, rate in speed.items() if name.startswith("product"))
    return 1e3 * max(cost["bytes"] / (stream * 1e9), cost["flops"] / (product * 1e9))


PLOTS: tuple[tuple[str, str, str, Callable[[Any, Sequence[Mapping]], Any]], ...] = (
    ("Time", "latency against rows", "latency.png", latency),
    ("Accuracy", "energy against evaluations", "energy.png", energies),
    ("One evaluation", "measured time against the floor", "roofline.png", roofline),
)
