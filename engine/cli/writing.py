"""A folder of samples, written as they finish: numbered pictures, samples.json, and a grid of the first of them.

Memory does not grow with the number of samples: pictures are written at once, records as soon as those before them are
there, and the grid has a bounded number of tiles.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

from numpy import ndarray as Array
from PIL import Image

from engine import __version__
from engine.cli.beginnings import Beginnings
from engine.cli.readings import readings
from engine.cli.recipe import Beginning, Recipe, chunks, engine_facts, request_facts
from engine.condition import Condition
from engine.pictures import save_png, sheet, shrunk, to_image
from engine.requests import Sample
from engine.sampler import Sampler
from engine.text import to_json

SAMPLES = "samples.json"
TILES = 64  # of a grid, at most
GRID_SIDE = 4096  # pixels; larger tiles are shrunk


def head(sampler: Sampler, precision: str | None) -> dict:
    """The part of samples.json that all samples share: what computed them, and with which settings."""
    runtime = sampler.runtime
    return {
        "bundle": sampler.bundle.hash,
        "runtime": runtime.name,
        "version": runtime.version,
        "device": runtime.device,
        "precision": runtime.drawing.precision,
        "sampler": repr(sampler),
        "engine": engine_facts(sampler, precision),
        "check": sampler.check and {"hash": sampler.check.classifier.hash, "max_decodes": sampler.check.max_decodes},
    }


def record(sample: Sample, sampler: Sampler, logits: Mapping[str, Array], start: Beginning) -> dict:
    """One sample for samples.json."""
    return {
        **request_facts(sample, sampler),
        "start": start.document(),
        "energy": round(float(sample.energy), 6),
        "status": sample.status.name,
        "steps": sample.steps,
        "evaluations": sample.evaluations,
        "forced": sample.forced,
        "exact": sample.exact,
        "candidates": sample.candidates,
        "corrections": sample.corrections,
        "acceptance": None if sample.acceptance is None else round(sample.acceptance, 4),
        "decodes": sample.decodes,
        "attributes": readings(sampler.bundle.attributes, logits),
    }


def groups(samples: Iterable[Sample], size: int) -> Iterator[list[Sample]]:
    """The samples in lists of at most ``size``."""
    source = iter(samples)
    while group := list(islice(source, size)):
        yield group


class Records:
    """samples.json, written record by record in the order of their numbers, whatever order they come in."""

    def __init__(self, file: TextIO):
        self.file, self.count = file, 0
        self.waiting: dict[int, dict] = {}

    def add(self, number: int, entry: dict) -> None:
        self.waiting[number] = entry
        while self.count in self.waiting:
            self.file.write(f"{',' if self.count else ''}\n{to_json(self.waiting.pop(self.count))}")
            self.count += 1


@contextmanager
def record_file(path: Path, facts: Mapping[str, Any]) -> Iterator[Records]:
    """Records below the facts that they share."""
    with open(path, "w", encoding="utf-8") as file:
        file.write(to_json(facts).removesuffix("\n}") + ',\n "samples": [')
        yield Records(file)
        file.write("\n ]\n}\n")


class Grid:
    """The first tiles of a grid, shrunk so that the whole is no wider than GRID_SIDE."""

    def __init__(self, count: int):
        self.size = min(count, TILES)
        self.columns = math.ceil(math.sqrt(self.size))
        self.tiles: dict[int, Image.Image] = {}

    def add(self, number: int, image: Image.Image) -> None:
        if number < self.size:
            self.tiles[number] = shrunk(image, GRID_SIDE // self.columns)

    def save(self, path: Path, text: Mapping[str, str]) -> None:
        tiles = [self.tiles[number] for number in sorted(self.tiles)]
        save_png(path, sheet(tiles, self.columns), text)


class Writer:
    """Writes samples whose numbers count from 0 into ``folder``."""

    def __init__(self, folder: Path, sampler: Sampler, grid: Grid, digits: int, engine: dict, records: Records):
        self.folder, self.sampler, self.grid, self.digits = folder, sampler, grid, digits
        self.engine, self.records = engine, records

    def add(self, number: int, sample: Sample, logits: Mapping[str, Array], start: Beginning) -> None:
        name, image = f"{number:0{self.digits}}.png", to_image(sample.image)
        save_png(self.folder / name, image, chunks(Recipe(self.engine, request_facts(sample, self.sampler), start)))
        self.grid.add(number, image)
        self.records.add(number, {"file": name, **record(sample, self.sampler, logits, start)})


@contextmanager
def writing_samples(folder: Path, sampler: Sampler, condition: Condition | None, beginnings: Beginnings,
                    precision: str | None) -> Iterator[Writer]:
    """A writer for as many samples as there are ``beginnings``; the grid is drawn at the end."""
    shared, grid = head(sampler, precision), Grid(beginnings.count)
    with record_file(folder / SAMPLES, {**shared, "grid": grid.size}) as records:
        yield Writer(folder, sampler, grid, max(4, len(str(beginnings.count - 1))), shared["engine"], records)
    text = {"Software": f"lace-engine {__version__}", "Condition": "" if condition is None else str(condition),
            "Seed": f"{beginnings.first}..{beginnings.first + grid.size - 1}", "Bundle": sampler.bundle.hash}
    grid.save(folder / "grid.png", text)
