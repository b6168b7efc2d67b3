"""Two reports side by side: what changed, and is it more than chance?

Both must have asked the same of the same rows (``SETTINGS``), so that differences are paired: row by row for what is a
mean over rows, and with the same resampled rows for Fréchet distances. What may differ is the subject: the bundle, its
precision, the runtime, the solver, the code.
"""

import json
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist

import numpy as np
from numpy import ndarray as Array

from engine.errors import LaceError
from lace_evaluation.nearness import frechet_change
from lace_evaluation.statistics import bootstrap
from lace_evaluation.store import read_arrays
from lace_trainer.judges.metrics import Moments, frechet_distance, moments

FORM = "lace-eval suites"
REPORT, ROWS = "report.json", "rows.npz"
SETTINGS = ("protocol", "count", "seed", "label", "truncation", "attributes", "judge", "identity")
# metric: +1 where more is better, -1 where less is
BETTER = {
    "acc": 1, "holds": 1, "heads": 1, "true": 1, "step_identity": 1, "first_identity": 1, "single_identity": 1,
    "kept_classes": 1, "moved_values": -1, "energy": -1, "evaluations": -1, "distance": -1, "fid": -1,
}
LEVEL = 0.05  # chance of one false alarm in the whole comparison
FEATURES, MOMENTS = "features", "reference"  # keys in ROWS


@dataclass(frozen=True, slots=True)
class Change:
    """One metric of one cell.

    low, high     95 % bootstrap interval of ``after - before``
    significant   0 is further off than chance explains among as many metrics as were compared (Bonferroni)
    """

    cell: str
    metric: str
    before: float
    after: float
    low: float
    high: float
    significant: bool

    @property
    def difference(self) -> float:
        return self.after - self.before

    @property
    def worse(self) -> bool:
        return self.significant and self.difference * BETTER[self.metric] < 0


@dataclass(frozen=True, slots=True, eq=False)
class Report:
    """A report and its rows {cell/metric: (n,)}."""

    path: Path
    facts: Mapping
    rows: Mapping[str, Array]


def load(path: Path) -> Report:
    """``report.json`` of the suites with ``rows.npz`` beside it."""
    path = Path(path)
    path = path / REPORT if path.is_dir() else path
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LaceError(f"cannot read the report {path}: {error}; give a report.json of lace-eval --suite") from error
    if not isinstance(facts, dict) or facts.get("form") != FORM:
        raise LaceError(f"{path} is not a report of the suites; expected what lace-eval BUNDLE --suite NAME wrote")
    rows = path.with_name(ROWS)
    try:
        return Report(path, facts, read_arrays(rows))
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise LaceError(f"cannot read {rows}: {error}; it belongs beside {path.name}, keep both together") from error


def check_settings(a: Report, b: Report) -> None:
    """Refuse reports that did not ask the same."""
    differing = [
        f"{name}: {a.facts['settings'].get(name)} and {b.facts['settings'].get(name)}"
        for name in SETTINGS if a.facts["settings"].get(name) != b.facts["settings"].get(name)
    ]
    if differing:
        raise LaceError(f"{a.path} and {b.path} cannot be compared, they differ in {'; '.join(differing)}: run both "
                        "with the same settings")


def compare(a: Report, b: Report) -> list[Change]:
    """Every metric of every cell that both reports have, in the order of the first."""
    check_settings(a, b)
    found = [*means(a.rows, b.rows), *distances(a, b)]
    if not found:
        raise LaceError(f"{a.path} and {b.path} have no cell in common: run the same suites for both")
    limit = NormalDist().inv_cdf(1 - LEVEL / (2 * len(found)))
    return [
        Change(*names, before, after, low, high, abs(after - before) > limit * error)
        for names, before, after, (low, high, error) in found
    ]


Difference = tuple[tuple[str, str], float, float, tuple[float, float, float]]


def means(a: Mapping[str, Array], b: Mapping[str, Array]) -> Iterator[Difference]:
    for name, before in a.items():
        cell, _, metric = name.rpartition("/")
        if metric in BETTER and name in b and len(b[name]) == len(before):
            interval = bootstrap(b[name].astype(float) - before)
            yield (cell, metric), float(before.mean(dtype=float)), float(b[name].mean(dtype=float)), interval


def distances(a: Report, b: Report) -> Iterator[Difference]:
    """Fréchet distances of the cells that kept their features; the same rows are drawn for both."""
    if MOMENTS not in a.rows or MOMENTS not in b.rows:
        return
    reference = unpacked(a.rows[MOMENTS])
    for name, before in a.rows.items():
        cell, _, kind = name.rpartition("/")
        if kind != FEATURES or name not in b.rows or b.rows[name].shape != before.shape:
            continue
        pair = [np.asarray(features, np.float64) for features in (before, b.rows[name])]
        before_fid, after_fid = (frechet_distance(reference, moments(x)) for x in pair)
        yield (cell, "fid"), before_fid, after_fid, frechet_change(reference, *pair)


def packed(moments: Moments) -> Array:
    """Mean and covariance as one array (d + 1, d)."""
    return np.vstack([moments.mean, moments.covariance]).astype(np.float32)


def unpacked(array: Array) -> Moments:
    return Moments(array[0].astype(float), array[1:].astype(float), 0)


def notable(changes: Sequence[Change], own: str) -> list[Change]:
    """What is worth a line: what changed significantly, and all that concerns the sampler itself."""
    return [c for c in changes if c.significant or (c.cell.endswith(f"/{own}") and c.difference)]
