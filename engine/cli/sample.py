"""lace-sample: pictures that obey a condition."""

import argparse
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from engine.cli.again import draw_again
from engine.cli.beginnings import Beginnings, add_start_options
from engine.cli.console import OK, Parser, Terminal, guarded, parse, progress_bar
from engine.cli.options import (
    SOLVING,
    UsageError,
    add_sampler_options,
    flag,
    from_zero,
    given,
    open_sampler,
    opened,
    positive,
)
from engine.cli.readings import Tally, notes
from engine.cli.writing import SAMPLES, TILES, Writer, groups, writing_samples
from engine.folders import writing_folder
from engine.grammar import parse as parse_condition
from engine.requests import Request, Sample
from engine.sampler import Sampler

COUNT = 16
# Samples that are under way before the next ones begin: bounds what waits for a row that takes long.
CHUNK = 4096
# Samples that are measured and written together: their pictures are in memory at a time.
GROUP = 16


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="lace-sample",
        description="Draw pictures that obey a condition, such as: smile & ~glasses & haircolor=blond & age=0.3. "
        "What a bundle knows: lace-info BUNDLE.",
    )
    add = parser.add_argument
    add("bundle", metavar="BUNDLE", nargs="?", help="a folder made by lace-export, or demo")
    add("condition", metavar="CONDITION", nargs="?", help="what the pictures must show (anything)")
    add("--again", type=Path, metavar="FILE.png", help="draw a picture of lace-sample or lace-edit again from what it "
        "says of itself, and compare: exit code 1 and what differs unless the bits are the same")
    add("--count", type=positive, metavar="N", help=f"number of pictures ({COUNT}; with --z or --w all of the file)")
    add("--oneshot", metavar="NAME", help="a one-pass map of the bundle in place of CONDITION; lace-info lists them")
    add("--polish", type=from_zero, metavar="N", help="steps that bring what a map makes nearer to the posterior (0)")
    add("--target", nargs="+", metavar="NAME=VALUE", help="of a map's open targets, as age=0.7")
    add_start_options(parser, "of the first; the others follow (0)")
    add("--check", type=Path, metavar="MODEL", help="an image classifier, MODEL.onnx with its spec: a picture "
        "that it denies is drawn again from the next candidate")
    add("--max-decodes", type=positive, metavar="N", help="pictures that it may look at for each one (32)")
    add("--out", default="out", metavar="DIR", help="folder for the pictures (out)")
    add("--overwrite", action="store_true", help="replace DIR if it is an earlier result")
    add("--json", action="store_true", help="write samples.json to standard output too")
    add("-v", "--verbose", action="store_true", help="say what can change a bit of the result")
    add_sampler_options(parser)
    return parser


def stream(sampler: Sampler, first_request: Request, beginnings: Beginnings) -> Iterator[Sample]:
    """Samples as they finish, of requests like the first one. Memory is bounded: of a chunk no more is under way than
    the sampler has room for."""
    width = sampler.bundle.generator.z_dim
    for first in range(0, beginnings.count, CHUNK):
        numbers = range(first, min(first + CHUNK, beginnings.count))
        yield from sampler.stream(
            replace(first_request, seed=beginnings.first + n, **beginnings.at(n).arguments(width))
            for n in numbers
        )


def write(sampler: Sampler, samples: Iterator[Sample], beginnings: Beginnings, writer: Writer, tally: Tally) -> None:
    """Write samples as they come, with a progress bar."""
    with progress_bar("sampling", beginnings.count) as progress:
        for group in groups(samples, GROUP):
            logits = sampler.measure(group)
            tally.add(group, logits)
            for sample, values in zip(group, logits, strict=True):
                number = sample.seed - beginnings.first
                writer.add(number, sample, values, beginnings.at(number))
            progress(tally.count, beginnings.count, "")


def targets_of(options: argparse.Namespace) -> dict[str, float] | None:
    """--target as a Request takes it. Raises UsageError."""
    found: dict[str, float] = {}
    for text in options.target or ():
        name, _, value = text.partition("=")
        try:
            found[name] = float(value)
        except ValueError:
            raise UsageError(f"--target is {text!r}: expected NAME=VALUE, as age=0.7") from None
    return found or None


def check_oneshot(options: argparse.Namespace) -> None:
    if options.oneshot is None:
        for name in given(options, ("polish", "target")):
            raise UsageError(f"{flag(name)} belongs to a one-pass map: add --oneshot NAME")
        return
    if options.condition is not None:
        raise UsageError(f"the one-pass map {options.oneshot!r} has a condition of its own: leave CONDITION out")
    for name in given(options, ("z", "w", "nvidia_seed", "label", *SOLVING)):
        raise UsageError(f"{flag(name)} does not go with --oneshot: a map draws from seeds, with a label and "
                         "settings of its own")


def sample(options: argparse.Namespace) -> int:
    if options.again is not None:
        return draw_again(options)
    if options.bundle is None:
        raise UsageError("give BUNDLE, a folder made by lace-export, or demo; or --again FILE.png")
    check_oneshot(options)
    console, status = Terminal(), Terminal(stderr=True)
    condition = parse_condition(options.condition) if options.condition else None
    with writing_folder(options.out, marker=SAMPLES, overwrite=options.overwrite, error=UsageError) as folder:
        beginnings = Beginnings(options, opened(options), options.count, COUNT)
        sampler = open_sampler(options)
        request = Request(condition, label=beginnings.label, oneshot=options.oneshot, polish=options.polish,
                          targets=targets_of(options))
        condition = sampler.starts.plain(request).expression
        sampler.starts.lower(condition)  # a typo is found before the first picture
        for note in notes(condition, sampler.bundle.attributes):
            status.say(f"note: {note}", "yellow")
        if options.verbose:
            status.say(repr(sampler))
        tally = Tally(condition, sampler.bundle.attributes)
        with writing_samples(folder, sampler, condition, beginnings, options.precision) as writer:
            write(sampler, stream(sampler, request, beginnings), beginnings, writer, tally)
    if options.json:
        with open(Path(options.out) / SAMPLES, encoding="utf-8") as file:
            shutil.copyfileobj(file, sys.stdout)
        return OK
    if condition is not None:
        console.print(tally.table())
    grid = f"{Path(options.out) / 'grid.png'}{f' shows the first {TILES}' if tally.count > TILES else ''}"
    console.say(f"{tally.count} pictures in {options.out} ({grid}); {tally.cost()}")
    tally.report(console)
    return OK


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(build_parser(), arguments)
    return guarded(lambda: sample(options), options.out)


if __name__ == "__main__":
    raise SystemExit(main())
