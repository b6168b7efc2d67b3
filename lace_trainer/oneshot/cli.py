"""lace-train oneshot: fit a one-pass map to the exact samples of a condition."""

import argparse
import re
import time
from collections.abc import Callable
from pathlib import Path

from engine.bundle import NAME
from engine.cli.options import UsageError, positive, real, share, tolerance, whole

Report = Callable[[int, int, str], None]
RANGE = re.compile(r"(?P<name>[\w-]+)=(?P<low>[^:]+):(?P<high>[^:]+)\Z")


def add_oneshot(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("bundle", metavar="BUNDLE", help="a bundle with calibrated sharp heads, or demo")
    add("condition", metavar="CONDITION", nargs="?", default="",
        help="what the map grants; age=? leaves a target open until run time")
    add("--even", nargs="+", default=[], metavar="NAME", help="make all combinations of these classes equally frequent")
    add("--name", required=True, help="of the map in the bundle")
    add("--out", required=True, type=Path, metavar="FILE", help="the part to write, for lace-export --add")
    add("--confidence", type=share, metavar="C", help="of the posterior that it is fitted to (0.9)")
    add("--guidance", type=tolerance, metavar="G", help="the same by the power of P, instead of --confidence")
    add("--truncation", type=real, metavar="PSI", help="at which it works (the bundle's)")
    add("--label", type=whole, metavar="N", help="class of a conditional generator")
    add("--range", nargs="+", default=[], metavar="NAME=LOW:HIGH", help="of open targets (the attribute's)")
    add("--samples", type=positive, default=20_000, metavar="N", help="exact samples to learn from (20000)")
    add("--steps", type=positive, default=1500, help="of training (1500)")
    add("--hidden", type=positive, nargs="+", default=[256, 256, 256], metavar="N", help="widths (256 256 256)")
    add("--blocks", type=positive, default=2, help="(2)")


def train_oneshot(options: argparse.Namespace, report: Report) -> dict:
    from engine.oneshot import Wish, open_names
    from engine.sampler import find_bundle
    from lace_trainer.oneshot.making import make_oneshot
    from lace_trainer.oneshot.training import MapConfig

    check(options)
    bundle = find_bundle(options.bundle)
    ranges = dict(map(range_of, options.range))
    names = open_names(options.condition)
    if extra := sorted(set(ranges) - set(names)):
        raise UsageError(f"--range names {', '.join(extra)}, whose target {options.condition!r} does not leave open")
    if missing := [name for name in (*names, *options.even) if name not in bundle.attributes]:
        raise UsageError(f"the bundle has no attribute {missing[0]!r}; it has: {', '.join(bundle.attributes)}")
    targets = {name: ranges.get(name, bundle.attributes[name].range) for name in names}
    config = MapConfig(tuple(options.hidden), options.blocks, options.steps, seed=options.seed or 0)
    began = time.perf_counter()
    wish = Wish(options.condition, targets, tuple(options.even))
    record = make_oneshot(bundle, wish, options.out, name=options.name, config=config,
                          confidence=options.confidence, guidance=options.guidance, truncation=options.truncation,
                          label=options.label, samples=options.samples, progress=report)
    return {"oneshot": str(options.out), "condition": record.condition, **record.measured,
            "seconds": round(time.perf_counter() - began, 1)}


def check(options: argparse.Namespace) -> None:
    if not NAME.match(options.name):
        raise UsageError(f"--name is {options.name!r}: expected letters, digits and _, not beginning with a digit")
    if options.confidence is not None and options.guidance is not None:
        raise UsageError("--confidence and --guidance both say how sure the heads must be: give one of them")


def range_of(text: str) -> tuple[str, tuple[float, float]]:
    found = RANGE.match(text)
    try:
        low, high = float(found["low"]), float(found["high"])  # type: ignore[index]
        if found is not None and low < high:
            return found["name"], (low, high)
    except (TypeError, ValueError):
        pass
    raise UsageError(f"--range is {text!r}: expected NAME=LOW:HIGH, as age=0.2:0.8")
