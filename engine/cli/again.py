"""lace-sample --again: draw a picture once more from what it says of itself, and compare the bits."""

import argparse
from pathlib import Path

from engine.bundle import Bundle
from engine.cli.console import CHECK_FAILED, OK, Terminal, write_json
from engine.cli.options import CHECKING, RUNNING, SOLVING, UsageError, flag, given
from engine.cli.recipe import Recipe, chunks, differences, draw, make_sampler, read_recipe
from engine.cli.writing import SAMPLES, head, record
from engine.folders import writing_folder
from engine.pictures import save_png, to_image
from engine.sampler import DEMO, find_bundle
from engine.text import to_json

DRAWN_BY_RECIPE = (*SOLVING, *CHECKING, "condition", "count", "seed", "nvidia_seed", "z", "w", "label",
                   "oneshot", "polish", "target")


def draw_again(options: argparse.Namespace) -> int:
    """Write the picture drawn anew as again.png; CHECK_FAILED, and what differs, unless its bits are the same."""
    for name in given(options, DRAWN_BY_RECIPE):
        shown = "CONDITION" if name == "condition" else flag(name)
        raise UsageError(f"{shown} is part of what the picture says of itself: leave it out beside --again")
    recipe, old = read_recipe(options.again)
    bundle = bundle_of(recipe, options)
    console = Terminal(stderr=options.json)
    with writing_folder(options.out, marker=SAMPLES, overwrite=options.overwrite, error=UsageError) as folder:
        sampler = make_sampler(recipe, bundle, given(options, RUNNING))
        if options.verbose:
            Terminal(stderr=True).say(repr(sampler))
        sample = draw(recipe, sampler)
        found = differences(recipe, sampler, old, sample.image)
        save_png(folder / "again.png", to_image(sample.image), chunks(recipe))
        (logits,) = sampler.measure([sample])
        entry = {"file": "again.png", "same_bits": not found, "differences": found,
                 **record(sample, sampler, logits, recipe.start)}
        facts = {**head(sampler, recipe.engine["precision"]), "samples": [entry]}
        (folder / SAMPLES).write_text(to_json(facts) + "\n", encoding="utf-8")
    if options.json:
        write_json(facts)
    where = Path(options.out) / "again.png"
    console.say(f"{where} has {'other bits than' if found else 'the same bits as'} {options.again}",
                "yellow" if found else "green")
    for line in found:
        console.say(line)
    return CHECK_FAILED if found else OK


def bundle_of(recipe: Recipe, options: argparse.Namespace) -> Bundle:
    """The bundle that was given, or the demo. Raises UsageError if it is not the one that drew the picture."""
    bundle = find_bundle(options.bundle or DEMO)
    if bundle.hash != recipe.engine["bundle"]:
        what = f"the bundle {options.bundle}" if options.bundle else "the demo bundle; give BUNDLE"
        raise UsageError(f"{options.again} was drawn by {recipe.engine['generator']!r}, a bundle with the hash "
                         f"{recipe.engine['bundle'][:12]}, not by {what} (its hash is {bundle.hash[:12]})")
    return bundle
