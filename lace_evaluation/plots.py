"""Plots of the suites. matplotlib is imported when the first is drawn."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lace_evaluation import OURS, oneshot, posterior_report
from lace_evaluation.conditional import CONVERGED, RENDERS, rows_of
from lace_evaluation.figures import COLOURS, panels, save
from lace_evaluation.methods import METHODS
from lace_evaluation.solvers import DEFAULT, PAPER
from lace_evaluation.tables import SIZES

MARKERS = {RENDERS: "*", CONVERGED: "x"}  # what is no method
# Solvers by kind: colour, and which families belong to it.
KINDS = {
    "gauss-newton, budgets": ("#d55e00", ("gauss-newton",)),
    "gauss-newton, no budget": ("#a93226", ("gauss-newton, no budget",)),
    "gauss-newton, fixed steps": ("#f0b27a", ("gauss-newton, fixed steps",)),
    "dopri5, shared step (paper)": ("#009e73", ("dopri5 (paper)",)),
    "adaptive Runge-Kutta, per row": ("#0072b2", ("heun-euler", "bosh3", "dopri5", "tsit5")),
    "fixed Runge-Kutta": ("#999999", ("euler", "midpoint", "heun", "rk4")),
    "stochastic": ("#cc79a7", ("langevin", "predictor-corrector")),
}
STOCHASTIC = KINDS["stochastic"][1]


def conditional(facts: Mapping, folder: Path) -> None:
    sets = facts["sets"]
    figure, axes = panels(2, len(sets), 3.1, 2.9)
    for (size, sources), top, bottom in zip(sets.items(), axes[0], axes[1], strict=True):
        for name in (name for name in rows_of("training") if name in sources["training"]):
            f = sources["training"][name]
            # One without an answer for most rows lies so far off that it would squeeze the others together.
            if f["fid"] is not None and f.get("reached", 1) > 0.5:
                top.scatter(f["fid"], f["acc"], color=COLOURS[name], marker=MARKERS.get(name, "o"), label=name,
                            s=110 if name in (OURS, RENDERS) else 45, zorder=4 if name in MARKERS else 3)
        for i, name in enumerate(shown_rows(sources["uniform"])):
            f = sources["uniform"][name]
            bottom.barh(-i, f["acc"], color=COLOURS[name], xerr=f["acc_half_width"], error_kw={"lw": 0.8})
            bottom.text(0.01, -i, f"{f['acc']:.3f}", va="center", ha="left", color="white", fontsize=8)
        top.set(title=SIZES[size], xlabel="FID (less is better)", xlim=(0, None))
        bottom.set(xlabel="ACC", xlim=(0, 1), yticks=[])
    axes[0][0].set_ylabel("ACC, training targets")
    names = shown_rows(next(iter(sets.values()))["uniform"])
    axes[1][0].set_yticks(-np.arange(len(names)), names)
    axes[1][0].set_ylabel("uniform targets")
    handles = {text: handle for ax in axes[0] for handle, text in zip(*ax.get_legend_handles_labels(), strict=True)}
    if handles:  # a few rows have no distance
        figure.legend(handles.values(), handles.keys(), loc="upper center", ncol=len(handles),
                      bbox_to_anchor=(0.5, 1.05))
    figure.tight_layout()
    save(figure, folder / "conditional.png")
    attributes(facts, folder)


def shown_rows(methods: Mapping) -> list[str]:
    """The truth, where there is one, then the methods."""
    return [name for name in (RENDERS, *METHODS) if name in methods]


def attributes(facts: Mapping, folder: Path) -> None:
    """ACC of every attribute and method, as a table in colours."""
    shown = [(size, source) for size, source in (("one", "uniform"), ("all", "training")) if size in facts["sets"]]
    figure, axes = panels(len(shown), 1, 9.0, 3.2)
    for (size, source), ax in zip(shown, axes[:, 0], strict=True):
        methods = facts["sets"][size][source]
        names = list(methods[OURS]["attributes"])
        table = np.array([[methods[m]["attributes"][n] for n in names] for m in shown_rows(methods)])
        ax.imshow(table, cmap="RdYlGn", vmin=0.4, vmax=1.0, aspect="auto")
        for (i, j), acc in np.ndenumerate(table):
            strong = acc > 0.93 or acc < 0.47
            ax.text(j, i, f"{acc:.2f}", ha="center", va="center", fontsize=8, color="white" if strong else "#222222")
        ax.set_xticks(range(len(names)), names)
        ax.set_yticks(range(len(table)), shown_rows(methods))
        ax.set_title(f"ACC, {SIZES[size].lower()}, {source} targets")
        ax.grid(False)
        ax.tick_params(length=0)
    figure.tight_layout()
    save(figure, folder / "attributes.png")


def editing(facts: Mapping, folder: Path) -> None:
    ticks = ["start", *facts["steps"]]
    shown = (
        ("acc", "ACC of the whole target"), ("first_identity", "identity: cosine with the first"),
        ("step_identity", "identity: cosine with the step before"), ("kept_classes", "other classes kept"),
    )
    figure, axes = panels(1, len(shown), 3.2, 2.9)
    for (key, title), ax in zip(shown, axes[0], strict=True):
        for name, f in facts["methods"].items():
            points = [(i, stage[key]) for i, stage in enumerate(f["stages"]) if key in stage]
            ax.plot(*zip(*points, strict=True), marker="o", ms=4, color=COLOURS[name], label=name,
                    lw=2.2 if name == OURS else 1.3)
        ax.set_title(title)
        ax.set_xticks(range(len(ticks)), ticks, rotation=30)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper center", ncol=len(labels), bbox_to_anchor=(0.5, 1.07))
    figure.tight_layout()
    save(figure, folder / "editing.png")


def grouped_bars(ax: Any, labels: Sequence[str], series: Mapping[str, Sequence[float]]) -> None:
    """Horizontal bars: one group a label, one bar a series, from top to bottom."""
    height = 0.8 / len(series)
    for k, (name, values) in enumerate(series.items()):
        places = -np.arange(len(labels)) + 0.4 - (k + 0.5) * height
        ax.barh(places, values, height=height * 0.92, color=COLOURS[name], label=name)
    ax.set_yticks(-np.arange(len(labels)), labels)
    ax.set(xlim=(0, 1))
    ax.grid(False, axis="y")


def zero_shot(facts: Mapping, folder: Path) -> None:
    combinations = facts["combinations"]
    if not combinations:
        return
    figure, axes = panels(1, 2, 5.5, 1 + 0.75 * len(combinations), sharey=True)
    labels = [c["condition"].replace(" & ", "\n& ", 1).replace("=yes", "") for c in combinations]
    for ax, key, title in ((axes[0][0], "holds", "all statements true"), (axes[0][1], "acc", "ACC")):
        grouped_bars(ax, labels, {m: [c["methods"][m][key] for c in combinations] for m in METHODS})
        ax.set_title(title)
    handles, names = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, names, loc="lower center", ncol=4, bbox_to_anchor=(0.5, -0.13))
    figure.tight_layout()
    save(figure, folder / "zero-shot.png")


def logic(facts: Mapping, folder: Path) -> None:
    formulas = facts["formulas"]
    names = {"plain": "plain", "paper": "paper", "lace": "paper's logic", "product": "product logic"}
    figure, axes = panels(1, 2, 6.2, 1 + 0.36 * len(formulas), width_ratios=(3, 2))
    series = {"plain": [f["plain"] for f in formulas],
              **{m: [f["methods"][m]["true"] for f in formulas] for m in ("paper", "lace", "product")}}
    grouped_bars(axes[0][0], [f["formula"] for f in formulas], series)
    axes[0][0].axvline(0.95, color="#444444", lw=0.8, ls=":")
    axes[0][0].set_title("pictures of which the formula is true")
    rows = [
        (f"{f['formula'] if m == 'plain' else ''}   {label}", f["plain_branches"] if m == "plain" else
         f["methods"][m]["branches"])
        for f in formulas if f["kind"] == "or" for m, label in names.items()
    ]
    rows = [row for row in rows if row[1]]
    left = np.zeros(len(rows))
    for key, colour in (("first", "#0072b2"), ("both", "#bbbbbb"), ("second", "#e69f00")):
        values = np.array([shares[key] for _, shares in rows])
        axes[0][1].barh(-np.arange(len(rows)), values, left=left, color=colour, height=0.75, label=key)
        left += values
    axes[0][1].set_yticks(-np.arange(len(rows)), [text for text, _ in rows])
    axes[0][1].set(xlim=(0, 1), title="branch of the OR that is true")
    axes[0][1].grid(False, axis="y")
    handles, _ = axes[0][0].get_legend_handles_labels()
    axes[0][0].legend(handles, names.values(), loc="upper center", bbox_to_anchor=(0.5, -0.04), ncol=4)
    axes[0][1].legend(loc="upper center", bbox_to_anchor=(0.5, -0.04), ncol=3)
    figure.tight_layout()
    save(figure, folder / "logic.png")


def solvers(facts: Mapping, folder: Path) -> None:
    """ACC, energy and error against evaluations: one column a set. A line is one solver, its settings the points."""
    sets = facts["sets"]
    figure, axes = panels(3, len(sets), 3.4, 2.6, sharex="col")
    for (name, found), column in zip(sets.items(), axes.T, strict=True):
        for key, ax in zip(("acc", "energy", "error"), column, strict=True):
            for kind, (colour, families) in KINDS.items():
                for family in families:
                    # Noise leads away from the flow, so that the distance from its end says nothing.
                    if not (key == "error" and family in STOCHASTIC):
                        trace(ax, found["solvers"], family, key, colour, kind)
            ax.set_xscale("log")
            if key != "acc":
                ax.set_yscale("log")
        column[2].axhline(found["reference"]["doubt"]["rms"], color="#444444", lw=0.8, ls=":")
        column[0].set_title(f"{name}: {', '.join(found['asked'])}" if len(found["asked"]) < 6 else f"{name} attributes")
        column[2].set_xlabel("evaluations")
    for ax, text in zip(axes[:, 0], ("ACC", "energy", "error of the end, relative"), strict=True):
        ax.set_ylabel(text)
    found_handles = zip(*axes[0][0].get_legend_handles_labels(), strict=True)
    handles = {text: handle for handle, text in found_handles}
    figure.legend(handles.values(), handles.keys(), loc="upper center", ncol=4, bbox_to_anchor=(0.5, 1.06))
    figure.tight_layout()
    save(figure, folder / "solvers.png")


def trace(ax: Any, found: Mapping[str, Mapping], family: str, key: str, colour: str, kind: str) -> None:
    """One solver's points, fewest evaluations first; the default and the paper's are circled."""
    points = sorted(
        (f["evaluations"], f["error"]["rms"] if key == "error" else f[key], label)
        for label, f in found.items() if f["family"] == family
    )
    if not points:
        return
    x, y, labels = zip(*points, strict=True)
    ours = colour == KINDS["gauss-newton, budgets"][0]
    ax.plot(x, y, marker="o", ms=5 if ours else 3, lw=2 if ours else 0.9, color=colour, label=kind,
            zorder=3 if ours else 2)
    for at, value, label in zip(x, y, labels, strict=True):
        if label in (DEFAULT, PAPER):
            ax.scatter(at, value, s=110, facecolors="none", edgecolors=colour, linewidths=1.5, zorder=4)


PLOTS = {"conditional": conditional, "editing": editing, "zero-shot": zero_shot, "logic": logic, "solvers": solvers,
         "posterior": posterior_report.plot, "oneshot": oneshot.plot}
