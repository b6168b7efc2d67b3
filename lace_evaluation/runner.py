"""Run suites, cell by cell, and write the report.

The folder of a run holds report.json, REPORT.md, the pictures and rows.npz (one number for each row and metric, what
``--compare`` needs); and cells/, which makes it resumable and may be deleted.
"""

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from engine.disk import explaining
from engine.errors import LaceError
from engine.folders import locked
from engine.sampler import Sampler
from lace_evaluation import SUITES, posterior
from lace_evaluation.store import Cell, Store, code_hash
from lace_evaluation.study import Embedding, Study
from lace_evaluation.world import Judge

PROTOCOL = 1  # of what is asked and counted; reports of different ones cannot be compared
CELLS = "cells"
NEEDED = ("matplotlib", "torchdiffeq")
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True, slots=True)
class Eyes:
    """Who judges: the classifier, the identity network, and their hashes and facts for the report."""

    judge: Judge
    identity: Embedding
    judge_facts: Mapping
    identity_facts: Mapping


@dataclass(frozen=True, slots=True, eq=False)
class Run:
    """What was run: the facts of each suite, its cells, and the hash of the code."""

    study: Study
    suites: dict[str, dict]
    cells: dict[str, dict[str, Cell]]
    settings: dict
    code: str


def check_packages() -> None:
    for package in NEEDED:
        try:
            import_module(package)
        except ImportError as error:
            raise LaceError(f"the suites need {package}: pip install 'lace-engine[train]'") from error


def prepare(out: Path, *, overwrite: bool) -> Path:
    """The folder of a run: new, empty, or one of ours; with ``overwrite`` its cells are forgotten.

    Raises LaceError, also while another process runs suites there.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / CELLS).is_dir())):
        raise LaceError(f"{out} exists and is no folder of the suites (it has no {CELLS}/): choose another --out")
    with locked(out), explaining(out):
        if overwrite:
            shutil.rmtree(out / CELLS, ignore_errors=True)
        (out / CELLS).mkdir(parents=True, exist_ok=True)
    return out


def settings_of(sampler: Sampler, eyes: Eyes, *, count: int, seed: int, label: int | None) -> dict:
    """What two reports must share to be compared."""
    attributes = {
        name: [a.kind, list(a.classes), [round(bound, 6) for bound in a.range]]
        for name, a in sampler.bundle.attributes.items()
    }
    return {
        "protocol": PROTOCOL, "count": count, "seed": seed, "label": label, "truncation": sampler.starts.truncation,
        "attributes": attributes, "judge": eyes.judge_facts["hash"], "identity": eyes.identity_facts["hash"],
    }


def run(names: Sequence[str], open_sampler: Callable[..., Sampler], eyes: Eyes, out: Path, *, count: int, seed: int,
        label: int | None, progress: Progress) -> Run:
    """Run the suites ``names``; cells that ``out`` holds with the same bundle, settings and code are not run again.

    Raises LaceError while another process runs suites there.
    """
    with locked(out):
        return run_locked(names, open_sampler, eyes, out, count=count, seed=seed, label=label, progress=progress)


def run_locked(names: Sequence[str], open_sampler: Callable[..., Sampler], eyes: Eyes, out: Path, *, count: int,
               seed: int, label: int | None, progress: Progress) -> Run:
    sampler = open_sampler()
    settings = settings_of(sampler, eyes, count=count, seed=seed, label=label)
    code = code_hash()
    key = {**settings, "bundle": sampler.bundle.hash, "sampler": repr(sampler), "code": code}
    study = Study(open_sampler, eyes.judge, Store(out / CELLS, key), count=count, seed=seed, label=label,
                  identity=eyes.identity)
    progress(0, 0, "plain samples and renders")
    study.pool, study.reference  # noqa: B018 - made first, so that the bar counts cells only
    if "posterior" in names:
        posterior.pool(study)
    modules = {name: import_module(f"lace_evaluation.{SUITES[name]}") for name in names}
    planned = {name: module.cells(study) for name, module in modules.items()}
    total, done = sum(map(len, planned.values())), 0
    made: dict[str, dict[str, Cell]] = {name: {} for name in names}
    for name, cells in planned.items():
        for cell, make in cells.items():
            progress(done, total, cell)
            made[name][cell] = study.store.cell(cell, make)
            done += 1
    progress(total, total, "tables and pictures")
    facts = {
        name: {**module.facts(study, made[name]), "seconds": sum(study.store.seconds[cell] for cell in made[name])}
        for name, module in modules.items()
    }
    return Run(study, facts, made, settings, code)
