"""lace-edit: sequential editing, one attribute after another, the rest held in place."""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from numpy import ndarray as Array
from rich.table import Table
from rich.text import Text

from engine.aims import NOTICED
from engine.cli.beginnings import Beginnings, add_start_options
from engine.cli.console import OK, Parser, Terminal, guarded, new_table, parse, progress_bar, write_json
from engine.cli.options import UsageError, add_sampler_options, finite, one_of, open_sampler, opened
from engine.cli.readings import Tally, notes, readings
from engine.cli.recipe import Edit, Recipe, chunks, engine_facts, request_facts
from engine.cli.writing import SAMPLES, head, record
from engine.condition import Condition
from engine.editing import FLOW, LADDER, METHODS
from engine.folders import writing_folder
from engine.grammar import parse as parse_condition
from engine.pictures import save_png, table, to_image
from engine.requests import Request, Sample
from engine.sampler import Sampler
from engine.text import to_json

CELL = 160
ASKED, MOVED, KEPT = "asked", "moved", "kept"
LOOKS = {ASKED: "green", MOVED: "yellow", KEPT: "dim"}
LEGEND = (f"{ASKED}: the edit is about it; {MOVED}: not asked for, and of another class or changed by more than "
          f"{NOTICED:g}; {KEPT}: the rest. Each stage is compared with the one before it.")
CHANGED = "changed: what nobody asked for and could not be kept, compared with the first picture, by the sharp heads."


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="lace-edit",
        description='Edit a picture step by step: lace-edit demo --seed 4 "yaw=0.75" "smile" "age=0.3". '
        "What a bundle knows: lace-info BUNDLE.",
    )
    add = parser.add_argument
    add("bundle", metavar="BUNDLE", help="a folder made by lace-export, or demo")
    add("edits", metavar="EDIT", nargs="+", help="conditions, one for each stage")
    add_start_options(parser, "of the picture that is edited (0)")
    add("--start", metavar="CONDITION", help="what the picture shows before the first edit (anything)")
    add("--keep", default="*", metavar="NAMES", help="attributes to hold, with commas; * all others; '' none (*)")
    add("--method", type=one_of("method", METHODS), metavar="NAME",
        help="ladder changes as little else as it can; flow is the paper's (ladder, if the bundle has sharp heads)")
    add("--near", type=finite, metavar="K", help="of the flow: hold on to the latents; 0: off (0.04)")
    add("--keep-weight", type=finite, metavar="K", help="of the flow: how strongly attributes are held (0.01)")
    add("--forget", action="store_true", help="of the flow: do not hold on to the targets of earlier stages")
    add("--out", default="out", metavar="DIR", help="folder for the pictures (out)")
    add("--overwrite", action="store_true", help="replace DIR if it is an earlier result")
    add("--json", action="store_true", help="write samples.json to standard output too")
    add("-v", "--verbose", action="store_true", help="say what can change a bit of the result")
    add_sampler_options(parser)
    return parser


def edit_options(options: argparse.Namespace) -> dict[str, Any]:
    """Arguments of ``Sampler.edit``."""
    keep = [name.strip() for name in options.keep.split(",")] if options.keep.strip() else None
    settings = {"keep_weight": options.keep_weight, "near": options.near}
    given = {name: value for name, value in settings.items() if value is not None}
    if given.get("near") == 0:
        given["near"] = None
    return {"method": options.method, "keep": keep, **given, **({"hold": False} if options.forget else {})}


def stages(sampler: Sampler, start: Sample, edits: Sequence[Condition], arguments: Mapping[str, Any]) -> list[Sample]:
    """The picture before the first edit and after each."""
    samples = [start]
    with progress_bar("editing", len(edits)) as progress:
        for done, edit in enumerate(edits, start=1):
            samples += sampler.edit(samples[-1], edit, **arguments)
            progress(done, len(edits), "")
    return samples


def changes(edits: Sequence[Condition], found: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """What became of every attribute at every stage after the first, in words. ``found``: the readings of each."""
    return [{name: ASKED if name in edit.attributes() else MOVED if has_moved(before[name], after[name]) else KEPT
             for name in after} for edit, before, after in zip(edits, found[:-1], found[1:], strict=True)]


def has_moved(before: float | dict[str, float], after: float | dict[str, float]) -> bool:
    """See NOTICED."""
    (old_class, old), (new_class, new) = likeliest(before), likeliest(after)
    return old_class != new_class or not abs(new - old) <= NOTICED


def likeliest(value: float | dict[str, float]) -> tuple[str, float]:
    """The likeliest class with its probability; a value has no class."""
    if not isinstance(value, dict):
        return "", value
    name = max(value, key=value.__getitem__)
    return name, value[name]


def changes_table(edits: Sequence[Condition], found: Sequence[Mapping[str, Any]],
                  words: Sequence[Mapping[str, str]]) -> Table:
    """Every attribute at every stage, with the word for what became of it."""
    result = new_table("what changed and what was kept, by the bundle's heads", "attribute", "start>",
                       *(f"{edit}>" for edit in edits))
    for name in found[0]:
        cells = [Text(f"{shown(stage[name])} {word[name]}", LOOKS[word[name]])
                 for stage, word in zip(found[1:], words, strict=True)]
        result.add_row(name, shown(found[0][name]), *cells)
    return result


def report_changed(console: Terminal, edits: Sequence[Condition], samples: Sequence[Sample]) -> None:
    """After which edits something that nobody asked for was not kept."""
    for edit, sample in zip(edits, samples[1:], strict=True):
        if sample.changed:
            console.say(f"changed: {', '.join(sample.changed)} (after {edit})", "yellow")
    if any(sample.changed for sample in samples):
        console.print(CHANGED, style="dim")


def shown(value: float | dict[str, float]) -> str:
    name, number = likeliest(value)
    return f"{name} {number:.0%}" if name else f"{number:.2f}"


class Stages:
    """The stages of an edit as files: numbered pictures, the film strip and samples.json."""

    def __init__(self, sampler: Sampler, samples: Sequence[Sample], titles: Sequence[str], beginnings: Beginnings,
                 options: argparse.Namespace):
        self.sampler, self.samples, self.titles, self.start = sampler, samples, titles, beginnings.at(0)
        # The method that was taken, so that the recipe does not depend on what the default is.
        method = LADDER if samples[-1].anchor else FLOW
        self.arguments, self.precision = {**edit_options(options), "method": method}, options.precision

    def chunks(self, last: int) -> dict[str, str]:
        """Of the picture after so many edits: it is drawn again from the first, edit by edit."""
        first = request_facts(self.samples[0], self.sampler)
        edits = tuple(Edit(title, self.arguments) for title in self.titles[1 : last + 1])
        recipe = Recipe(engine_facts(self.sampler, self.precision), first, self.start, edits)
        condition = request_facts(self.samples[last], self.sampler)["condition"]
        changed = self.samples[last].changed
        return {**chunks(recipe), "Condition": condition or "", "Edit": self.titles[last],
                **({"Changed": ", ".join(changed)} if changed else {})}

    def write(self, folder: Path, logits: Sequence[Mapping[str, Array]], words: Sequence[Mapping[str, str]]) -> dict:
        """Returns what samples.json holds."""
        records = []
        for i, (sample, values, title) in enumerate(zip(self.samples, logits, self.titles, strict=True)):
            name = f"{i:02}.png"
            save_png(folder / name, to_image(sample.image), self.chunks(i))
            records.append({"file": name, "edit": title, **record(sample, self.sampler, values, self.start),
                            **({"changes": words[i - 1], "changed": sample.changed} if i else {})})
        strip = table([[to_image(sample.image) for sample in self.samples]], CELL, captions=self.titles)
        people = {name: text for name, text in self.chunks(len(self.samples) - 1).items() if name != "Recipe"}
        save_png(folder / "strip.png", strip, people)
        document = {**head(self.sampler, self.precision), "held": self.arguments, "legend": LEGEND, "samples": records}
        (folder / SAMPLES).write_text(to_json(document) + "\n", encoding="utf-8")
        return document


def edit(options: argparse.Namespace) -> int:
    edits = [parse_condition(text) for text in options.edits]
    start = parse_condition(options.start) if options.start else None
    status, console = Terminal(stderr=True), Terminal()
    with writing_folder(options.out, marker=SAMPLES, overwrite=options.overwrite, error=UsageError) as folder:
        beginnings = Beginnings(options, opened(options), 1, 1)
        sampler = open_sampler(options)
        if options.verbose:
            status.say(repr(sampler))
        attributes = sampler.bundle.attributes
        for condition in (start, *edits):
            sampler.starts.lower(condition)  # a typo in the last edit is found before the first is solved
            for note in notes(condition, attributes):
                status.say(f"note: {note}", "yellow")
        latent = beginnings.at(0).arguments(sampler.bundle.generator.z_dim)
        first = sampler.sample([Request(start, seed=beginnings.first, label=options.label, **latent)])[0]
        samples = stages(sampler, first, edits, edit_options(options))
        logits = sampler.measure(samples)
        found = [readings(attributes, values) for values in logits]
        words = changes(edits, found)
        titles = ["start", *map(str, edits)]
        document = Stages(sampler, samples, titles, beginnings, options).write(folder, logits, words)
    if options.json:
        write_json(document)
        return OK
    console.print(changes_table(edits, found, words))
    console.print(LEGEND, style="dim")
    report_changed(console, edits, samples)
    console.say(f"{len(samples)} pictures in {options.out} (see {Path(options.out) / 'strip.png'})")
    tally = Tally(None, attributes)
    tally.add(samples, logits)
    tally.report(console)
    return OK


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(build_parser(), arguments)
    return guarded(lambda: edit(options), options.out)


if __name__ == "__main__":
    raise SystemExit(main())
