"""lace-edit: sequential editing, one attribute after another, the rest held in place."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from numpy import ndarray as Array
from rich.console import Console
from rich.table import Table

from engine.cli.console import EXIT_CODES, OK, guarded, parse, write_json
from engine.cli.options import (
    UsageError,
    add_sampler_options,
    chunks,
    finite,
    open_sampler,
    readings,
    record,
    seed,
    told,
)
from engine.cli.sample import SAMPLES
from engine.condition import Condition
from engine.folders import writing_folder
from engine.grammar import parse as parse_condition
from engine.pictures import save_png, table, to_image
from engine.requests import Request, Sample
from engine.sampler import Sampler

CELL = 160
# Attributes that no edit asked for may move this much before the table points at them.
MOVED = 0.1


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lace-edit", allow_abbrev=False, epilog=EXIT_CODES,
        description='Edit a picture step by step: lace-edit demo --seed 4 "yaw=0.75" "smile" "age=0.3"',
    )
    parser.add_argument("bundle", metavar="BUNDLE", help="a folder made by lace-export, or demo")
    parser.add_argument("edits", metavar="EDIT", nargs="+", help="conditions, one for each stage")
    parser.add_argument("--seed", type=seed, default=0, metavar="S", help="of the picture that is edited (0)")
    parser.add_argument("--start", metavar="CONDITION", help="what the picture shows before the first edit (anything)")
    parser.add_argument("--label", type=int, metavar="N", help="class of a conditional generator")
    parser.add_argument("--near", type=finite, default=0.04, metavar="K", help="hold on to the latents; 0: off (0.04)")
    parser.add_argument("--keep", default="*", metavar="NAMES",
                        help="attributes to hold, with commas; * all others; '' none (*)")
    parser.add_argument("--keep-weight", type=finite, default=0.01, metavar="K", help="how strongly (0.01)")
    parser.add_argument("--forget", action="store_true", help="do not hold on to the targets of earlier stages")
    parser.add_argument("--out", default="out", metavar="DIR", help="folder for the pictures (out)")
    parser.add_argument("--overwrite", action="store_true", help="replace DIR if it is an earlier result")
    parser.add_argument("--json", action="store_true", help="write samples.json to standard output too")
    parser.add_argument("-v", "--verbose", action="store_true", help="say what can change a bit of the result")
    add_sampler_options(parser)
    return parser


def stages(sampler: Sampler, start: Sample, edits: list[Condition], options: argparse.Namespace) -> list[Sample]:
    """The picture before the first edit and after each."""
    keep = [name.strip() for name in options.keep.split(",")] if options.keep.strip() else None
    samples = [start]
    for edit in edits:
        samples += sampler.edit(
            samples[-1], edit, keep=keep, keep_weight=options.keep_weight, near=options.near or None,
            hold=not options.forget,
        )
    return samples


def changes_table(sampler: Sampler, edits: list[Condition], logits: list[dict[str, Array]]) -> Table:
    """Every attribute at every stage: asked for (green), moved without being asked (yellow), kept."""
    attributes = sampler.bundle.attributes
    rows = [{name: shown(value) for name, value in readings(attributes, values).items()} for values in logits]
    result = Table(title="what changed and what was kept, by the bundle's heads", title_justify="left")
    result.add_column("attribute")
    for title in ("start", *map(str, edits)):
        result.add_column(title, justify="right")
    for name in attributes:
        cells, asked = [f"{rows[0][name][0]}"], False
        for edit, before, after in zip(edits, rows[:-1], rows[1:], strict=True):
            asked = name in edit.attributes()
            moved = after[name][0].split()[0] != before[name][0].split()[0] or after[name][1] - before[name][1] > MOVED
            moved = moved or before[name][1] - after[name][1] > MOVED
            colour = "green" if asked else "yellow" if moved else "dim"
            cells.append(f"[{colour}]{after[name][0]}[/]")
        result.add_row(name, *cells)
    return result


def shown(value: float | dict[str, float]) -> tuple[str, float]:
    """A value, or the likeliest class with its probability: as text and as the number that may move."""
    if not isinstance(value, dict):
        return f"{value:.2f}", value
    name = max(value, key=value.__getitem__)
    return f"{name} {value[name]:.0%}", value[name]


def write_stages(folder: Path, samples: list[Sample], titles: list[str], sampler: Sampler,
                 logits: list[dict[str, Array]]) -> str:
    """Numbered pictures, the film strip and samples.json, which is also returned."""
    records = []
    for i, (sample, values, title) in enumerate(zip(samples, logits, titles, strict=True)):
        name = f"{i:02}.png"
        save_png(folder / name, to_image(sample.image), {**chunks(sample, sampler), "Edit": title})
        records.append({"file": name, "edit": title, **record(sample, sampler, values)})
    strip = table([[to_image(sample.image) for sample in samples]], CELL, captions=titles)
    save_png(folder / "strip.png", strip, chunks(samples[-1], sampler))
    document = json.dumps({**told(sampler), "samples": records}, indent=1)
    (folder / SAMPLES).write_text(document + "\n", encoding="utf-8")
    return document


def edit(options: argparse.Namespace) -> int:
    edits = [parse_condition(text) for text in options.edits]
    start = parse_condition(options.start) if options.start else None
    with writing_folder(options.out, marker=SAMPLES, overwrite=options.overwrite, error=UsageError) as folder:
        sampler = open_sampler(options)
        if options.verbose:
            Console(stderr=True).print(repr(sampler), highlight=False, markup=False)
        for condition in (start, *edits):
            sampler.starts.lower(condition)  # a typo in the last edit is found before the first is solved
        with Console(stderr=True).status(f"{len(edits)} edits"):
            first = sampler.sample([Request(start, seed=options.seed, label=options.label)])[0]
            samples = stages(sampler, first, edits, options)
        logits = sampler.measure(samples)
        titles = ["start", *map(str, edits)]
        document = write_stages(folder, samples, titles, sampler, logits)
    if options.json:
        write_json(document)
        return OK
    console = Console()
    console.print(changes_table(sampler, edits, logits))
    console.print(f"{len(samples)} pictures in {options.out} (see {Path(options.out) / 'strip.png'})",
                  highlight=False, soft_wrap=True)
    return OK


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(build_parser(), arguments)
    return guarded(lambda: edit(options))


if __name__ == "__main__":
    raise SystemExit(main())
