"""Tables of labels: CSV files, CelebA's lists, folders that stand for classes."""

import csv
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy import ndarray as Array

from engine.errors import LaceError
from lace_trainer.attributes import Attribute
from lace_trainer.data import picture_files

# Columns that say which picture a row is about, and not what it shows.
KEYS = ("file", "seed", "truncation", "label", "latent")
FILE_NAMES = ("file", "image_id", "filename", "file_name", "path", "image", "picture")
NO_YES = ("no", "yes")
MISSING = ("", "nan", "none", "?")
MOST_CLASSES, MOST_NUMBERED = 200, 10  # of texts, and of whole numbers before they count as a value


@dataclass(frozen=True, slots=True)
class Table:
    """columns   name -> texts, one a row; the columns of KEYS among them"""

    path: Path
    columns: Mapping[str, list[str]]

    @property
    def count(self) -> int:
        return len(next(iter(self.columns.values())))

    @property
    def labels(self) -> list[str]:
        """The columns that say what pictures show."""
        return [name for name in self.columns if name not in KEYS]

    def numbers(self, name: str, whole: bool = False) -> list:
        """A column of KEYS as numbers. Raises LaceError with the line."""
        found = []
        for i, text in enumerate(self.columns[name]):
            try:
                found.append(int(text) if whole else float(text))
            except ValueError:
                raise LaceError(f"{self.path}, row {i + 1}: its {name} is {text!r:.40}; expected a "
                                f"{'whole ' if whole else ''}number") from None
        return found


def read_table(path: Path) -> Table:
    """A CSV (comma, semicolon or tab) whose first line names the columns, or a list as CelebA's: the number of rows,
    the names, and rows with blanks between. Raises LaceError.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise LaceError(f"cannot read the table {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise LaceError(f"the table {path} is no text in UTF-8: save it as CSV in UTF-8") from error
    lines = text.splitlines()
    if lines and lines[0].strip().isdigit() and len(lines) > 2:
        header, rows = ["file", *lines[1].split()], [line.split() for line in lines[2:] if line.strip()]
    else:
        delimiter = max(",;\t", key=lambda mark: lines[0].count(mark)) if lines else ","
        try:
            rows = [row for row in csv.reader(lines, delimiter=delimiter, strict=True) if any(map(str.strip, row))]
        except csv.Error as error:
            raise LaceError(f"the table {path} is no CSV: {error}") from error
        header, rows = (rows[0], rows[1:]) if rows else ([], [])
    names = [column_name(name, i) for i, name in enumerate(header)]
    if not rows or len(set(names)) < len(names) or "" in names:
        raise LaceError(f"the table {path} has {len(rows)} rows and the columns {', '.join(names)[:200] or 'none'}; "
                        "expected a first line with a different name for every column, and a line for every picture")
    for i, row in enumerate(rows):
        if len(row) != len(names):
            raise LaceError(f"the table {path} has {len(row)} entries in row {i + 1}; expected {len(names)}")
    return Table(path, {name: [row[i].strip() for row in rows] for i, name in enumerate(names)})


def column_name(text: str, place: int) -> str:
    """A name that conditions can use: letters, digits and _; a first column of file names is 'file'."""
    text = text.strip()
    if place == 0 and text.lower() in FILE_NAMES:
        return "file"
    name = re.sub(r"[^A-Za-z0-9_]", "_", text)
    return f"_{name}" if name[:1].isdigit() else name


def folder_table(folder: Path, attribute: str) -> Table:
    """A folder with one folder of pictures for each class."""
    files = picture_files(folder)
    classes = [file.relative_to(folder).parts[0] if len(file.relative_to(folder).parts) > 1 else "" for file in files]
    if "" in classes or len(set(classes)) < 2:
        raise LaceError(f"{folder} is no folder with one folder of pictures for each class: give --table FILE, a table "
                        "of its pictures' labels")
    return Table(folder, {"file": [str(file.relative_to(folder)) for file in files], attribute: classes})


# --- what a column says ----------------------------------------------------------------------------------------------


def labels_of(table: Table, names: Sequence[str] | None, scales: Mapping[str, tuple[float, float]]
              ) -> tuple[tuple[Attribute, ...], Array]:
    """Attributes and labels (rows, attributes) float32: class index or value, NaN where a cell is empty.

    names    of the columns that are wanted; None: all
    scales   (factor, offset) of values: age in years with a factor of 0.01
    """
    from lace_trainer.heads.pairs import check_names

    check_names([*(names or ()), *scales], table.labels)
    if not table.labels:
        raise LaceError(f"the table {table.path} has no column of labels beside {', '.join(table.columns)}")
    found = [column_labels(table, name, scales.get(name)) for name in names or table.labels]
    return tuple(attribute for attribute, _ in found), np.stack([labels for _, labels in found], axis=1)


def column_labels(table: Table, name: str, scale: tuple[float, float] | None) -> tuple[Attribute, Array]:
    texts = [None if text.lower() in MISSING else text for text in table.columns[name]]
    known = {text for text in texts if text is not None}
    if not known:
        raise LaceError(f"the column {name!r} of {table.path} is empty: fill it in, or choose others with --attributes")
    numbers = {text: number for text in known if (number := number_or_none(text)) is not None}
    if len(numbers) < len(known):
        return classes_of(table, name, texts, sorted(known), scale)
    distinct = sorted(set(numbers.values()))
    if scale is None and set(distinct) in ({-1, 1}, {0, 1}, {-1}, {0}, {1}):
        return Attribute(name, "class", NO_YES), np.array(
            [np.nan if text is None else float(numbers[text] > 0) for text in texts], np.float32)
    if scale is None and len(distinct) <= MOST_NUMBERED and all(number == int(number) for number in distinct):
        return classes_of(table, name, [None if text is None else f"{numbers[text]:g}" for text in texts],
                          [f"{number:g}" for number in distinct], scale)
    factor, offset = scale or (1.0, 0.0)
    values = np.array([np.nan if text is None else offset + factor * numbers[text] for text in texts], np.float32)
    low, high = np.nanquantile(values, (0.01, 0.99))
    if low < -0.01 or high > 1.01:
        raise LaceError(f"the values of {name!r} in {table.path} reach from {low:g} to {high:g}; expected about 0 to "
                        f"1: say how to scale them, as --scale {name}=0.01 of years")
    return Attribute(name, "value"), values


def classes_of(table: Table, name: str, texts: Sequence[str | None], classes: Sequence[str], scale: object
               ) -> tuple[Attribute, Array]:
    if scale is not None or len(classes) > MOST_CLASSES:
        raise LaceError(f"the column {name!r} of {table.path} holds {len(classes)} different texts "
                        f"({classes[0]!r:.40}, ...): expected "
                        f"{'numbers' if scale else f'at most {MOST_CLASSES} classes'}")
    if len(classes) < 2:
        raise LaceError(f"the column {name!r} of {table.path} says {classes[0]!r:.40} of every picture: nothing can be "
                        "learnt from that; label others, or choose other columns with --attributes")
    place = {text: float(i) for i, text in enumerate(classes)}
    return Attribute(name, "class", tuple(classes)), np.array(
        [np.nan if text is None else place[text] for text in texts], np.float32)


def number_or_none(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None
