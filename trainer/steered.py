"""Pairs from where the sampler goes: samples that a first set of heads steered, labelled by the image classifiers.

Plain samples of a generator hardly ever show what is rare, and never what a flow finds on its way there. Heads that
never saw such latents are sure of themselves where the picture is not. So the samples that the heads lead to are
labelled too, and the heads are trained again with them: the idea of Ross, Gordon, Bagnell, AISTATS 2011 (DAgger).
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from numpy import ndarray as Array

from engine.bundle import Attribute
from engine.condition import And, Condition, Is
from engine.requests import Request
from engine.sampler import Sampler
from exporter.export import export
from exporter.heads import HeadStack
from trainer.pairs import Labellers, Pairs, check_size, held_back

BLOCK = 64  # requests in a row that name the same attributes: they then share the evaluation of their heads
MOST = 3  # attributes in a condition of random targets
WHOLE = 0.25  # of the blocks ask for all that the labels of a plain sample say
TRUNCATIONS = (0.5, 1.0)
WEIGHTS = (1.0, 10.0)  # of a whole condition: the heavier, the farther its flow goes


def random_conditions(
    attributes: Sequence[Attribute], labels: Array, count: int, rng: np.random.Generator
) -> list[Condition]:
    """Weighted conditions: on one to three attributes, every class and every value within its range equally often;
    or on all attributes, as in a row of ``labels`` (n, attributes; NaN where missing)."""
    conditions = []
    for start in range(0, count, BLOCK):
        whole = rng.random() < WHOLE
        names = rng.choice(len(attributes), size=rng.integers(1, min(MOST, len(attributes)) + 1), replace=False)
        for _ in range(min(BLOCK, count - start)):
            terms = described(attributes, labels[rng.integers(len(labels))]) if whole else ()
            terms = terms or tuple(Is(attributes[i].name, target(attributes[i], rng)) for i in names)
            weight = round(float(np.exp(rng.uniform(*np.log(WEIGHTS)))), 2)
            conditions.append(weight * (terms[0] if len(terms) == 1 else And(terms)))
    return conditions


def described(attributes: Sequence[Attribute], labels: Array) -> tuple[Condition, ...]:
    """What ``labels`` (attributes,) say, as statements."""
    return tuple(
        Is(a.name, a.classes[int(label)] if a.kind == "class" else float(label))
        for a, label in zip(attributes, labels, strict=True)
        if not np.isnan(label)
    )


def target(attribute: Attribute, rng: np.random.Generator) -> str | float:
    if attribute.kind == "class":
        return attribute.classes[rng.integers(len(attribute.classes))]
    return round(float(rng.uniform(*attribute.range)), 4)


def steered_pairs(
    generator: Path, stacks: Sequence[HeadStack], labellers: Labellers, plain: Pairs, *, count: int, seed: int,
    progress: Callable[[int, int, str], None] | None = None,
) -> Pairs:  # fmt: skip
    """w and labels of ``count`` samples under random conditions and truncations.

    generator   a file that ``lace-export`` reads
    stacks      the heads that steer
    plain       pairs whose labels stand together as in plain samples
    """
    rng = np.random.default_rng((seed, 2))
    ws, labels = [], []
    with TemporaryDirectory(prefix="lace-steered-") as folder:
        bundle = export(generator, stacks, out=Path(folder) / "steered.lace")
        check_size(bundle.generator.resolution, labellers)
        sampler = Sampler(bundle.path)
        attributes = list(bundle.attributes.values())
        together = plain.select([attribute.name for attribute in attributes]).labels
        conditions = random_conditions(attributes, together, count, rng)
        for start in range(0, count, BLOCK):
            requests = [
                Request(condition, seed=(seed << 32) + start + i, truncation=float(rng.uniform(*TRUNCATIONS)))
                for i, condition in enumerate(conditions[start : start + BLOCK])
            ]
            samples = sampler.sample(requests)
            ws.append(np.stack([sample.w for sample in samples]))
            labels.append(labellers.label(np.stack([sample.image for sample in samples]), rng))
            if progress:
                progress(start + len(samples), count, "steering and labelling")
    source = {"kind": "steered samples", "seed": seed, "count": count}
    return Pairs(np.concatenate(ws), np.concatenate(labels), labellers.attributes, validation=held_back(count),
                 source=source)  # fmt: skip


def joined(pairs: Pairs, steered: Pairs) -> Pairs:
    """Both together. The steered ones come first, for the last rows of ``pairs`` may be for testing only."""
    steered = steered.select([attribute.name for attribute in pairs.attributes])
    w, labels = np.concatenate([steered.w, pairs.w]), np.concatenate([steered.labels, pairs.labels])
    source = pairs.source | {"steered": pairs.source.get("steered", 0) + len(steered.w)}
    return Pairs(w, labels, pairs.attributes, pairs.test, steered.validation + pairs.validation, source)
