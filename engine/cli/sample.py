"""lace-sample: pictures that obey a condition."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy import ndarray as Array
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from engine.batch import Status
from engine.cli.console import EXIT_CODES, OK, guarded, parse, write_json
from engine.cli.options import (
    UsageError,
    add_sampler_options,
    chunks,
    open_sampler,
    positive,
    record,
    seed,
    softmax,
    told,
)
from engine.condition import And, Condition, Is, Keep, Near, Not, Or, Weighted, Within
from engine.folders import writing_folder
from engine.grammar import parse as parse_condition
from engine.pictures import grid, save_png, to_image
from engine.reference.noise import SEED_LIMIT
from engine.requests import Request, Sample
from engine.sampler import Sampler
from engine.tape import satisfied

SAMPLES = "samples.json"


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lace-sample", allow_abbrev=False, epilog=EXIT_CODES,
        description="Draw pictures that obey a condition, such as: smile & ~glasses & haircolor=blond & age=0.3",
    )
    parser.add_argument("bundle", metavar="BUNDLE", help="a folder made by lace-export, or demo")
    parser.add_argument("condition", metavar="CONDITION", nargs="?", help="what the pictures must show (anything)")
    parser.add_argument("--count", type=positive, default=16, metavar="N", help="number of pictures (16)")
    parser.add_argument("--seed", type=seed, default=0, metavar="S", help="of the first; the others follow (0)")
    parser.add_argument("--label", type=int, metavar="N", help="class of a conditional generator")
    parser.add_argument("--out", default="out", metavar="DIR", help="folder for the pictures (out)")
    parser.add_argument("--overwrite", action="store_true", help="replace DIR if it is an earlier result")
    parser.add_argument("--json", action="store_true", help="write samples.json to standard output too")
    parser.add_argument("-v", "--verbose", action="store_true", help="say what can change a bit of the result")
    add_sampler_options(parser)
    return parser


def draw(sampler: Sampler, requests: list[Request], console: Console) -> list[Sample]:
    """Samples in the order of the requests, with a progress bar."""
    order = {id(request): i for i, request in enumerate(requests)}
    samples: list[Sample | None] = [None] * len(requests)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("sampling", total=len(requests))
        for sample in sampler.stream(requests):
            samples[order[id(sample.request)]] = sample
            progress.advance(task)
    return [sample for sample in samples if sample is not None]


def write_samples(folder: Path, samples: list[Sample], sampler: Sampler, logits: list[dict[str, Array]]) -> str:
    """Numbered pictures, the grid and samples.json, which is also returned."""
    digits = max(4, len(str(len(samples) - 1)))
    records = []
    for i, (sample, values) in enumerate(zip(samples, logits, strict=True)):
        name = f"{i:0{digits}}.png"
        save_png(folder / name, to_image(sample.image), chunks(sample, sampler))
        records.append({"file": name, **record(sample, sampler, values)})
    text = {**chunks(samples[0], sampler), "Seed": f"{samples[0].seed}..{samples[-1].seed}"}
    save_png(folder / "grid.png", grid([sample.image for sample in samples]), text)
    document = json.dumps({**told(sampler), "samples": records}, indent=1)
    (folder / SAMPLES).write_text(document + "\n", encoding="utf-8")
    return document


def leaves(condition: Condition | None, negated: bool = False) -> list[Condition]:
    """The single statements of a condition, negations kept; for the table of what was met."""
    match condition:
        case Is() | Within():
            return [Not(condition) if negated else condition]
        case Not(part):
            return leaves(part, not negated)
        case Weighted(_, part):
            return leaves(part, negated)
        case And(parts) | Or(parts):
            return [leaf for part in parts for leaf in leaves(part, negated)]
        case Near() | Keep() | None:
            return []
    raise TypeError(f"not a condition: {type(condition).__name__}")


def met_table(condition: Condition | None, sampler: Sampler, logits: list[dict[str, Array]]) -> Table:
    """How well each statement was met, by the latent heads that steered the sampling."""
    attributes = sampler.bundle.attributes
    stacked = {name: np.stack([values[name] for values in logits]) for name in logits[0]}
    table = Table(title="met, according to the bundle's heads", title_justify="left")
    table.add_column("statement")
    for column in ("met", "on average"):
        table.add_column(column, justify="right")
    statements = list(dict.fromkeys(leaves(condition)))
    for leaf in [*statements, *([condition] if len(statements) > 1 else [])]:
        met = float(np.mean(satisfied(leaf, attributes, stacked)))
        colour = "green" if met >= 0.95 else "yellow" if met >= 0.5 else "red"
        table.add_row(str(leaf), f"[{colour}]{met:.0%}[/]", average(leaf, attributes, stacked))
    return table


def average(leaf: Condition, attributes, stacked: dict[str, Array]) -> str:
    """The mean value with its spread, or the mean probability of the class that was asked for."""
    inner = leaf.part if isinstance(leaf, Not) else leaf
    if not isinstance(inner, Is | Within):
        return ""
    attribute, values = attributes[inner.name], stacked[inner.name]
    if attribute.kind == "value":
        return f"{values.mean():.3f} ± {values.std():.3f}"
    choice = inner.choice if isinstance(inner, Is) else None
    index = attribute.classes.index(choice) if isinstance(choice, str) else -1 if choice is None else int(choice)
    p = np.mean([softmax(row)[index] for row in values])
    return f"p = {1 - p if isinstance(leaf, Not) else p:.3f}"


def sample(options: argparse.Namespace) -> int:
    console, status = Console(), Console(stderr=True)
    condition = parse_condition(options.condition) if options.condition else None
    if options.seed + options.count > SEED_LIMIT:
        raise UsageError("seed + count goes beyond 2**64: choose a smaller seed")
    with writing_folder(options.out, marker=SAMPLES, overwrite=options.overwrite, error=UsageError) as folder:
        sampler = open_sampler(options)
        if options.verbose:
            status.print(repr(sampler), highlight=False, markup=False)
        requests = [Request(condition, seed=options.seed + i, label=options.label) for i in range(options.count)]
        samples = draw(sampler, requests, status)
        logits = sampler.measure(samples)
        document = write_samples(folder, samples, sampler, logits)
    if options.json:
        write_json(document)
        return OK
    if condition is not None:
        console.print(met_table(condition, sampler, logits))
    report(samples, options.out, console)
    return OK


def report(samples: list[Sample], out: str, console: Console) -> None:
    """Where the pictures are, what they cost, and which rows did not arrive."""
    evaluations = [s.evaluations for s in samples]
    console.print(f"{len(samples)} pictures in {out} (see {Path(out) / 'grid.png'}); "
                  f"{np.mean(evaluations):.1f} evaluations a picture, at most {max(evaluations)}",
                  highlight=False, soft_wrap=True)
    for fate in sorted({s.status for s in samples} - {Status.DONE}):
        stopped = [s.seed for s in samples if s.status == fate]
        console.print(f"{len(stopped)} rows {fate.sentence}: seeds {stopped[:8]}", style="yellow", highlight=False)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(build_parser(), arguments)
    return guarded(lambda: sample(options))


if __name__ == "__main__":
    raise SystemExit(main())
