"""Finished cells on the disk, so that an evaluation that was stopped goes on where it was."""

import hashlib
import json
import time
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy import ndarray as Array

from engine import sources
from engine.folders import write_atomically

ROOT = Path(__file__).parent.parent
# The code that may decide what is in a cell: all of these packages and the device sources, whatever is added to them.
# What only shows results makes no finished cell stale.
PACKAGES, SUFFIXES = ("engine", "lace_trainer", "lace_evaluation"), (".py", ".h", ".cpp", ".cuh", ".cu")
PRESENTATION = frozenset(
    f"lace_evaluation/{name}.py" for name in
    ("tables", "plots", "sheets", "report", "compare", "goal_report", "goals", "exceptions", "show", "posterior_report")
) | {"engine/cli", "engine/bench"}
MADE_IN = "made_in"  # seconds, among the facts of a cell


@dataclass(frozen=True, slots=True, eq=False)
class Cell:
    """What one cell of an evaluation found.

    facts   JSON: means, rates, seconds
    rows    {metric: (n,)}, one number for each row; a row is the same seed and target in every method's cell
    other   {name: array}: pictures for the sheets, features, latents
    """

    facts: dict
    rows: dict[str, Array] = field(default_factory=dict)
    other: dict[str, Array] = field(default_factory=dict)


class Store:
    """A folder of cells, one file each.

    key       all that decides what is in them, ready for JSON
    seconds   {cell: what it took to make}, of the cells that were asked for
    """

    def __init__(self, folder: Path, key: Mapping):
        self.folder = Path(folder)
        self.key = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        self.seconds: dict[str, float] = {}

    def cell(self, name: str, make: Callable[[], Cell]) -> Cell:
        """The cell ``name``, from the disk if it was made with the same key; else made, and kept."""
        path = self.folder / f"{name}.npz"
        found = read(path, self.key)
        if found is None:
            began = time.perf_counter()
            found = make()
            found.facts[MADE_IN] = round(time.perf_counter() - began, 3)
            write(path, self.key, found)
        self.seconds[name] = found.facts[MADE_IN]
        return found


def read(path: Path, key: str) -> Cell | None:
    """The cell in a file; None if there is none, if it is damaged or has another key."""
    try:
        arrays = read_arrays(path)
        if str(arrays["key"]) != key:
            return None
        parts: dict[str, dict[str, Array]] = {"rows": {}, "other": {}}
        for name, array in arrays.items():
            kind, slash, rest = name.partition("/")
            if slash:
                parts[kind][rest] = array
        return Cell(json.loads(str(arrays["facts"])), **parts)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None


def read_arrays(path: Path) -> dict[str, Array]:
    """All arrays of an .npz; nothing that is pickled. An open file, because numpy leaves a damaged one open."""
    with open(path, "rb") as stream, np.load(stream, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def save_arrays(path: Path, arrays: Mapping[str, Array]) -> None:
    """An .npz, in one step."""
    write_atomically(path, lambda file: np.savez_compressed(file, allow_pickle=False, **arrays))


def write(path: Path, key: str, cell: Cell) -> None:
    arrays = {f"{kind}/{name}": array for kind in ("rows", "other") for name, array in getattr(cell, kind).items()}
    save_arrays(path, {"key": np.array(key), "facts": np.array(json.dumps(cell.facts)), **arrays})


def code_hash() -> str:
    """Of the code that decides what is in a cell: cells that another version made are made again."""
    hashed = hashlib.sha256()
    for name, path in sorted(code_files().items()):
        hashed.update(name.encode() + b"\0" + path.read_bytes())
    return hashed.hexdigest()


def code_files() -> dict[str, Path]:
    """The files of the code that may decide what is in a cell, by their names in a checkout."""
    roots = {"kernels": sources.folder(), **{package: ROOT / package for package in PACKAGES}}
    found = {f"{name}/{path.relative_to(root).as_posix()}": path
             for name, root in roots.items() for path in root.rglob("*") if path.suffix in SUFFIXES}
    return {name: path for name, path in found.items()
            if not any(name == shown or name.startswith(f"{shown}/") for shown in PRESENTATION)}
