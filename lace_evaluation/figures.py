"""How all plots of the evaluation look, and how they are written. matplotlib is imported when the first is drawn."""

from pathlib import Path
from typing import Any

from engine.folders import write_atomically
from lace_evaluation import OURS
from lace_evaluation.conditional import CONVERGED, RENDERS

# One colour a method, in all plots. Ours stands out, what is not a sampler is grey. Okabe and Ito's palette.
COLOURS = {
    RENDERS: "#000000", "plain": "#999999", "rejection": "#8a6d3b", "arithmetic": "#cc79a7", "langevin": "#e69f00",
    "sde": "#56b4e9", "predictor-corrector": "#0072b2", "dopri5 (paper)": "#009e73", OURS: "#d55e00",
    "arithmetic, conditional": "#7b3f6b", "ours, nothing kept": "#f0b27a", "paper": "#009e73", "lace": "#f0b27a",
    "product": "#d55e00", CONVERGED: "#7f2704",
}
STYLE = {
    "figure.dpi": 110, "savefig.bbox": "tight", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "grid.color": "#e4e4e4", "grid.linewidth": 0.7, "axes.axisbelow": True, "legend.frameon": False,
    "axes.titlesize": 10, "axes.titleweight": "bold",
}


def panels(rows: int, columns: int, width: float, height: float, **options) -> tuple[Any, Any]:
    """A figure and its axes (rows, columns), in the style of all plots."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    mpl.rcParams.update(STYLE)
    return plt.subplots(rows, columns, figsize=(width * columns, height * rows), squeeze=False, **options)


def save(figure: Any, path: Path) -> None:
    import matplotlib.pyplot as plt

    write_atomically(path, lambda file: figure.savefig(file, format="png"))
    plt.close(figure)
