"""From a bundle and a condition to a part: exact samples, a map that is fitted to them, and its distances."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np

from engine.bundle import Bundle, Oneshot
from engine.errors import LaceError
from engine.oneshot import Wish
from engine.reference.posterior import Settings
from engine.solvers.posterior import CONFIDENCE
from exporter.oneshots import OneshotPart, fingerprint, save_oneshot
from lace_trainer.oneshot.distance import Features
from lace_trainer.oneshot.monitors import Judge, judge, refuse
from lace_trainer.oneshot.training import MapConfig, fit
from lace_trainer.oneshot.truth import LEAST, Truth, draw_truth, tapes_of
from lace_trainer.oneshot.world import World

Progress = Callable[[int, int, str], None]
HELD_OUT = 4000  # exact samples that the map is judged by, or a quarter of few


def make_oneshot(bundle: Bundle, wish: Wish, out: str | Path, *, name: str, config: MapConfig | None = None,
                 confidence: float | None = None, guidance: float | None = None, truncation: float | None = None,
                 label: int | None = None, samples: int = 20_000, progress: Progress | None = None) -> Oneshot:
    """Fit a map and write it as the part ``out``. Its record says how far it is from exact samples.

    Raises TooFar, and writes nothing, if that is too far; LaceError where the bundle or the condition does not do.
    """
    config = config or MapConfig()
    if confidence is None and guidance is None:
        confidence = CONFIDENCE
    settings = Settings(confidence, guidance)
    check(bundle, wish, settings, label)
    psi = bundle.generator.truncation if truncation is None else truncation
    world = World(bundle, psi, label)
    truth = draw_truth(world, wish, settings, most=max(samples, LEAST), seed=config.seed, progress=progress)
    held, own = split(truth)
    features = Features(world, tapes_of(world, wish, settings), list(wish.targets), own.z)
    network, seconds = fit(world, features, own, config, progress=progress)
    measured = judge(Judge(world, wish, settings, held), network, seed=config.seed)
    refuse(measured)
    layers = network.layers()
    blocks = tuple((stack[0][0].shape[1], *(len(bias) for _, bias in stack)) for stack in layers)
    provenance = {"training": asdict(config), "samples": len(own.z), "held_out": len(held.z), "rate": truth.rate,
                  "training_seconds": seconds}
    record = Oneshot(name, wish.text, blocks, float(psi), dict(wish.targets), label or 0, confidence, guidance,
                     measured, provenance, wish.even)
    tensors = {f"{i}.{j}.{key}": np.ascontiguousarray(tensor, np.float32) for i, stack in enumerate(layers)
               for j, pair in enumerate(stack) for key, tensor in zip(("weight", "bias"), pair, strict=True)}
    save_oneshot(out, OneshotPart(record, tensors, fingerprint(bundle, wish.names)))
    return record


def check(bundle: Bundle, wish: Wish, settings: Settings, label: int | None) -> None:
    for name in wish.names:
        attribute = bundle.attributes.get(name)
        if attribute is None:
            raise LaceError(f"the bundle has no attribute {name!r}; it has: {', '.join(bundle.attributes)}")
        sharp = bundle.heads[attribute.head].sharp
        if not (sharp and sharp.calibrated) or (attribute.kind == "value" and not attribute.tolerance):
            raise LaceError(f"the attribute {name!r} has no calibrated sharp head, which exact samples need: train one "
                            "(lace-train heads --bundle B --sharp) and add it")
        if name in wish.even and attribute.kind != "class":
            raise LaceError(f"{name!r} is a value: only classes can be made even; leave a value's target open instead")
        if name in wish.targets and attribute.kind != "value":
            raise LaceError(f"{name}=? leaves a class open; only targets of values can be chosen at run time")
    if not wish.names:
        raise LaceError("the map has nothing to grant: give a condition, or attributes to make even")
    if wish.even and settings.confidence is None:
        raise LaceError("with a guidance a latent may count for several classes: make them even with a confidence")
    if wish.targets and settings.confidence is None:
        raise LaceError("open targets are met within a tolerance, which a guidance does not have: use a confidence")
    labels = bundle.generator.labels
    if (label is None) != (not labels) or (label is not None and not 0 <= label < labels):
        expected = f"a label in 0..{labels - 1}" if labels else "no label: this generator is unconditional"
        raise LaceError(f"the label is {label}; expected {expected}")


def split(truth: Truth) -> tuple[Truth, Truth]:
    """Held-out samples, and those that are learnt from."""
    held = min(HELD_OUT, len(truth.z) // 4)
    return Truth(truth.z[:held], truth.targets[:held], truth.drawn), Truth(truth.z[held:], truth.targets[held:],
                                                                            truth.drawn)
