"""The suite ``posterior`` written down: tables, a plot, grids of pictures side by side, and its goals."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from numpy import ndarray as Array
from PIL import Image, ImageDraw, ImageFont

from engine.pictures import GAP, INK, PAPER, to_image
from lace_evaluation.figures import COLOURS, panels, save
from lace_evaluation.goal_report import percent, rows
from lace_evaluation.posterior import ENOUGH, FLOW, GRID, METHODS, OURS, POOL
from lace_evaluation.store import Cell

TEXT = """
Truth: those of {pool} plain pictures that satisfy the condition by the judge, values to within the tolerance of their
head. ACC: share of a method's pictures that do. Others: mean distance (total variation of a class, Kolmogorov-Smirnov
of a value) of the attributes that nobody asked for, and what it is by chance with as many pictures. FID in the judge's
features and its floor, between two parts of the truth of the same sizes; precision, recall, density and coverage by
{neighbours} neighbours, in brackets between parts of the truth. Evaluations: of the heads; the flow's have derivatives,
those of the posterior have none. ms: of solving one row, without decoding, in batches of 16 and of 64. Exact: rows that
a candidate of the prior gave. Entered: rows that are samples; the others end as the flow leaves them."""
SIDE = 6  # pictures of a grid's side
SHOWN = "beard"  # the condition of the grids

# What must hold: of the classes, and of the values.
ACC, LEAST_ACC, ABOVE, RECALL, OTHERS, BRANCH = 0.97, 0.91, 2.0, 0.95, 1.5, 0.05
ERROR, MOST_ERROR, ABOVE_VALUES = 0.045, 0.07, 3.0


def number(value: float | None, digits: int = 3) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def beside(found: Mapping, name: str, digits: int = 2) -> str:
    """A measure with its floor in brackets."""
    return f"{number(found[name], digits)} ({number(found[f'{name}_floor'], digits)})" if found.get(name) else ""


def section(facts: Mapping) -> list[str]:
    from lace_trainer.judges.metrics import NEIGHBOURS

    lines = ["## Posterior", "", TEXT.strip().format(pool=facts["pool"], neighbours=NEIGHBOURS), ""]
    for group, title in (("classes", "Classes: singles, pairs, triples, OR, NOT, rare ones"),
                         ("values", "Values: intervals and targets")):
        lines += [f"### {title}", "", *rows(
            ("method", "conditions", "ACC", "least", "error", "most", "others (chance)", "FID above floor", "precision",
             "recall", "density", "coverage", "branch off by", "evaluations", "ms at 16", "at 64", "exact", "entered"),
            [summary_row(method, f) for method, f in facts["summaries"][group].items() if f["conditions"]]), ""]
    lines += ["### Each condition", "", *rows(
        ("condition", "1 in", "truth", "ACC", "others (chance)", "FID (floor)", "recall", "coverage", "exact",
         "flow: ACC", "others", "FID", "recall", "coverage"),
        [condition_row(c) for c in facts["conditions"]]), ""]
    found = [(c["condition"], c["branches"], c["methods"]) for c in facts["conditions"] if c["branches"]]
    lines += ["### Branches of OR", "", *rows(
        ("condition", "truth", *METHODS),
        [(f"`{text}`", shares(truth), *(shares(m[name]["branches"]) if name in m else "" for name in METHODS))
         for text, truth, m in found]), ""]
    return [*lines, "![FID against ACC](posterior.png)", "", f"![{SHOWN}](posterior-grids.png)", ""]


def shares(branches: Mapping[str, float]) -> str:
    return " / ".join(f"{share:.1%}" for share in branches.values())


def summary_row(method: str, f: Mapping) -> list[str]:
    cells = [method, str(f["conditions"]), number(f["acc"]), number(f["least_acc"]), number(f["error"]),
             number(f["most_error"]), f"{number(f['others'])} ({number(f['chance'])})", number(f["above"], 1),
             *(beside(f, name) for name in ("precision", "recall", "density", "coverage")), number(f["branch"]),
             number(f["evaluations"], 0), number(f["ms_16"], 2), number(f["ms_64"], 2), percent(f["exact"]),
             percent(f["entered"])]
    return [f"**{cell}**" if cell and method == OURS else cell for cell in cells]


def condition_row(c: Mapping) -> list[str]:
    ours, flow = c["methods"][OURS], c["methods"][FLOW]

    def measures(found: Mapping) -> list[str]:
        others = found["others"].values()
        if not others:
            return [number(found["holds"]), "", "", "", ""]
        means = [sum(v[name] for v in others) / len(others) for name in ("distance", "chance")]
        return [number(found["holds"]), f"{means[0]:.3f} ({means[1]:.3f})", beside(found["likeness"], "fid", 1),
                beside(found["likeness"], "recall"), beside(found["likeness"], "coverage")]

    rate = f"{1 / c['rate']:.0f}" if c["rate"] else ""
    return [f"`{c['condition']}`", rate, str(ours["truth"]), *measures(ours), percent(ours["exact"]), *measures(flow)]


def plot(facts: Mapping, folder: Path) -> None:
    """Fréchet distance above its floor against ACC, every condition and method."""
    figure, axes = panels(1, 1, 6.4, 4.4)
    ax: Any = axes[0][0]
    colours = {**COLOURS, OURS: COLOURS["ours"], FLOW: "#f0b27a", "langevin (true temperature)": "#8c6bb1"}
    for method in METHODS:
        points = [(m["holds"], max(m["likeness"]["fid"] - m["likeness"]["fid_floor"], 0.05))
                  for c in facts["conditions"] if (m := c["methods"].get(method)) and m["likeness"]]
        if points:
            x, y = zip(*points, strict=True)
            ax.scatter(x, y, s=22 if method in (OURS, FLOW) else 9, color=colours[method], label=method,
                       zorder=3 if method == OURS else 2)
    ax.set(xlabel="ACC by the judge", ylabel="FID above its floor", yscale="log")
    if ax.collections:
        ax.legend(fontsize=7)
    save(figure, folder / "posterior.png")


def grids(facts: Mapping, cells: Mapping[str, Cell], seed: int) -> Image.Image | None:
    """The same condition from the same seeds by the posterior and by the flow, side by side."""
    texts = [c["condition"] for c in facts["conditions"]]
    if SHOWN not in texts:
        return None
    i = texts.index(SHOWN)
    parts = [(f"{name}: {SHOWN}", cells[f"posterior/{i}/{name}"].other["pictures"][:GRID]) for name in (FLOW, OURS)]
    return side_by_side(parts)


def side_by_side(parts: Sequence[tuple[str, Sequence[Array]]], cell: int = 64, margin: int = 22) -> Image.Image:
    """Grids of SIDE pictures a row, each with its caption above."""
    lines = max(-(-len(pictures) // SIDE) for _, pictures in parts)
    width = SIDE * (cell + GAP)
    whole = Image.new("RGB", (len(parts) * (width + margin) - margin, margin + lines * (cell + GAP)), PAPER)
    draw, font = ImageDraw.Draw(whole), ImageFont.load_default(size=13)
    for k, (caption, pictures) in enumerate(parts):
        left = k * (width + margin)
        draw.text((left, 3), caption, fill=INK, font=font)
        for i, picture in enumerate(pictures):
            place = left + i % SIDE * (cell + GAP), margin + i // SIDE * (cell + GAP)
            whole.paste(to_image(picture).convert("RGB").resize((cell, cell), Image.Resampling.BICUBIC), place)
    return whole


def goals(facts: Mapping) -> Iterator[tuple[str, str, bool | None]]:
    """(text, found, met) of what the posterior promises."""
    classes, values = facts["summaries"]["classes"][OURS], facts["summaries"]["values"][OURS]
    whole = f"{facts['pool']} plain pictures" if facts["pool"] < POOL else ""

    def of(text: str, value: float | None, is_met: bool | None) -> tuple[str, str, bool | None]:
        return f"posterior: {text}", f"{number(value)}{' from ' + whole if whole else ''}", is_met

    def below(value: float | None, most: float) -> bool | None:
        return None if value is None else value <= most

    def above(value: float | None, least: float) -> bool | None:
        return None if value is None else value >= least

    yield of(f"mean ACC of class conditions at least {ACC:g}", classes["acc"], above(classes["acc"], ACC))
    yield of(f"none of them under {LEAST_ACC:g} where the truth has {ENOUGH} pictures", classes["least_acc"],
             above(classes["least_acc"], LEAST_ACC))
    yield of(f"mean FID at most {ABOVE:g} above its floor", classes["above"], below(classes["above"], ABOVE))
    for name in ("recall", "coverage"):
        yield of(f"mean {name} at least {RECALL:g}", classes[name], above(classes[name], RECALL))
    if classes["others"] is not None:
        ratio = classes["others"] / classes["chance"]
        yield of(f"other attributes within {OTHERS:g} times their sampling error", ratio, ratio <= OTHERS)
    yield of(f"branches of ORs within {100 * BRANCH:.0f} points of the truth", classes["branch"],
             below(classes["branch"], BRANCH))
    yield of(f"mean error of values at most {ERROR:g}", values["error"], below(values["error"], ERROR))
    yield of(f"none above {MOST_ERROR:g}", values["most_error"], below(values["most_error"], MOST_ERROR))
    yield of(f"their FID at most {ABOVE_VALUES:g} above its floor", values["above"],
             below(values["above"], ABOVE_VALUES))
