"""Pairs from where the sampler goes: samples that a first set of heads steered, labelled by the image classifiers.

Plain samples of a generator hardly ever show what is rare, and never what a flow finds on its way there. Heads that
never saw such latents are sure of themselves where the picture is not. So the samples that the heads lead to are
labelled too, and the heads are trained again with them: the idea of Ross, Gordon, Bagnell, AISTATS 2011 (DAgger).
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from engine.bundle import Attribute
from engine.condition import And, Condition, Is
from engine.requests import Request
from engine.sampler import Sampler
from exporter import export
from exporter.heads import HeadStack
from lace_trainer.heads.labellers import Labellers
from lace_trainer.heads.pairs import Pairs, held_back

BLOCK = 64  # requests in a row that name the same attributes: they then share the evaluation of their heads
MOST = 3  # attributes in a condition
TRUNCATIONS = (0.5, 1.0)


def random_conditions(attributes: Sequence[Attribute], count: int, rng: np.random.Generator) -> list[Condition]:
    """Conditions on one to three attributes, every class and every value within its range equally often."""
    conditions = []
    for start in range(0, count, BLOCK):
        names = rng.choice(len(attributes), size=rng.integers(1, min(MOST, len(attributes)) + 1), replace=False)
        for _ in range(min(BLOCK, count - start)):
            terms = tuple(Is(attributes[i].name, target(attributes[i], rng)) for i in names)
            conditions.append(terms[0] if len(terms) == 1 else And(terms))
    return conditions


def target(attribute: Attribute, rng: np.random.Generator) -> str | float:
    if attribute.kind == "class":
        return attribute.classes[rng.integers(len(attribute.classes))]
    return round(float(rng.uniform(*attribute.range)), 4)


def steered_pairs(
    generator: Path, stacks: Sequence[HeadStack], labellers: Labellers, *, count: int, seed: int,
    progress: Callable[[int, int, str], None] | None = None,
) -> Pairs:
    """w and labels of ``count`` samples under random conditions and truncations.

    generator   a file that ``lace-export`` reads
    stacks      the heads that steer
    """
    rng = np.random.default_rng((seed, 2))
    ws, labels = [], []
    with TemporaryDirectory(prefix="lace-steered-") as folder:
        bundle = export(generator, stacks, out=Path(folder) / "steered.lace")
        labellers.check_size(bundle.generator.resolution)
        sampler = Sampler(bundle.path)
        conditions = random_conditions(list(bundle.attributes.values()), count, rng)
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
                 source=source)


def joined(pairs: Pairs, steered: Pairs) -> Pairs:
    """Both together. The steered ones come first, for the last rows of ``pairs`` may be for testing only."""
    steered = steered.select([attribute.name for attribute in pairs.attributes])
    w, labels = np.concatenate([steered.w, pairs.w]), np.concatenate([steered.labels, pairs.labels])
    source = pairs.source | {"steered": pairs.source.get("steered", 0) + len(steered.w)}
    return Pairs(w, labels, pairs.attributes, pairs.test, steered.validation + pairs.validation, source)
