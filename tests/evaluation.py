"""A tiny world for the tests of the suites: all attributes of the demonstration world, a judge that knows nothing."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from engine.bundle import Attribute, Bundle, GeneratorFacts, Head
from engine.sampler import Sampler
from exporter import export
from exporter.heads import HeadStack
from lace_evaluation.store import Store
from lace_evaluation.study import Study
from lace_trainer.faces import ATTRIBUTES
from lace_trainer.judges import classifier
from tests import tiny
from tests.worlds import head_tensors, mapping_tensors, write_bundle

MADE: list[tuple[Bundle, str]] = []


class Embedding:
    """In the place of the identity network: the mean colour, as unit rows."""

    metadata = {"verification": {"auc": 0.5}}  # noqa: RUF012

    def embed(self, pictures: np.ndarray) -> np.ndarray:
        rows = pictures.mean(axis=(1, 2)) + 1
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def world_head() -> HeadStack:
    """One random head of all the world's attributes."""
    stack = tiny.stack("world", {a.name: len(a.classes) or 1 for a in ATTRIBUTES})
    named = tuple(replace(h, classes=a.classes) for h, a in zip(stack.attributes, ATTRIBUTES, strict=True))
    return replace(stack, attributes=named)


def make_judge() -> classifier.Classifier:
    """Untrained, of pictures of 8 px."""
    torch.manual_seed(0)
    return classifier.Classifier(classifier.Shape((4, 8), (1,), size=8), ATTRIBUTES)


def made_once(tmp_path_factory) -> tuple[Bundle, str]:
    """A random generator of 8 px, and the file of an untrained judge of such pictures; one export for all modules."""
    if not MADE:
        folder = tmp_path_factory.mktemp("made")
        classifier.save(make_judge(), folder / "judge.safetensors")
        bundle = export(tiny.parts(), [world_head()], out=folder / "tiny.lace")
        MADE.append((bundle, str(folder / "judge.safetensors")))
    return MADE[0]


def make_study(bundle: Bundle, folder: Path, count: int = 4) -> Study:
    return Study(lambda **changes: Sampler(bundle, threads=1, **changes), make_judge(), Store(folder, {}), count=count,
                 identity=Embedding())


def straight_world(path: Path, *, dim: int = 8, seed: int = 0) -> Bundle:
    """age, smile and haircolor, linear in w: what arithmetic in w assumes is true here."""
    rng = np.random.default_rng(seed)
    tensors = mapping_tensors(rng, dim, dim, 2)
    known = {a.name: a for a in ATTRIBUTES}
    heads, attributes = [], []
    for name in ("age", "smile", "haircolor"):
        classes = known[name].classes
        logits = len(classes) or 1
        tensors |= head_tensors(rng, name, (dim, logits), 3.0 if classes else 0.4, 0.0 if classes else 0.5)
        heads.append(Head(name, "w", (dim, logits)))
        attributes.append(Attribute(name, known[name].kind, name, (0, logits), classes))
    return write_bundle(path, tensors, heads, attributes, GeneratorFacts("straight", "none", dim, dim, 2, 4))
