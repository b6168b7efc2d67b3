"""Pairs (w, labels) for training heads, and where they come from: labelled samples of a generator."""

import difflib
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.numpy import save as to_bytes
from torch import Tensor

from engine.bundle import sha256
from engine.errors import LaceError
from engine.folders import write_atomically
from lace_trainer.attributes import Attribute

Progress = Callable[[int, int, str], None]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SURE = 0.75  # probability of the likeliest class below which several labellers give no label


@dataclass(frozen=True, slots=True, eq=False)
class Pairs:
    """Latents and what is to be predicted from them.

    w            (n, w_dim) float32
    labels       (n, attributes) float32: class index or value, NaN where missing
    test         how many of the last rows are for testing only
    validation   how many of the others choose the best epoch
    source       where the pairs come from, for the provenance of the heads
    """

    w: np.ndarray
    labels: np.ndarray
    attributes: tuple[Attribute, ...]
    test: int = 0
    validation: int = 500
    source: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        wanted = (len(self.w), len(self.attributes))
        if self.w.ndim != 2 or self.labels.shape != wanted:
            raise LaceError(f"latents {self.w.shape} and labels {self.labels.shape} do not fit; expected {wanted}")
        if self.test + self.validation >= len(self.w):
            raise LaceError(
                f"{len(self.w)} pairs are too few for {self.test} test and {self.validation} validation rows"
            )
        for i, attribute in enumerate(self.attributes):
            _check_labels(attribute, self.labels[:, i])

    def split(self, seed: int = 1234) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Rows for training, validation and test. LACE shuffles all but the test rows with numpy's seed 1234."""
        head = len(self.w) - self.test
        order = np.random.RandomState(seed).permutation(head)
        return order[self.validation :], order[: self.validation], np.arange(head, len(self.w))

    def select(self, names: tuple[str, ...] | list[str]) -> "Pairs":
        """Only these attributes."""
        known = [a.name for a in self.attributes]
        check_names(names, known)
        columns = [known.index(name) for name in names]
        attributes = tuple(self.attributes[i] for i in columns)
        return Pairs(self.w, self.labels[:, columns], attributes, self.test, self.validation, self.source)


def check_names(names: Sequence[str], known: Sequence[str]) -> None:
    """Raises LaceError for a name that nothing is known about, with the nearest one."""
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise LaceError(f"there are no labels for {name!r}; there are some for: {', '.join(known)}{hint}")


def _check_labels(attribute: Attribute, labels: np.ndarray) -> None:
    known = labels[~np.isnan(labels)]
    if attribute.kind == "class" and len(known):
        n = len(attribute.classes)
        if not (np.equal(np.mod(known, 1), 0) & (known >= 0) & (known < n)).all():
            raise LaceError(f"labels of {attribute.name!r} range from {known.min():g} to {known.max():g}; "
                            f"expected whole numbers from 0 to {n - 1}")


class Labellers:
    """One image classifier, or several whose opinions are joined.

    One gives its likeliest class, as in the paper. Several give a class drawn from the mean of their probabilities, so
    that a head learns doubt where they disagree instead of one network's mistake; and no class at all where they are
    not SURE of any, as of the colour of hair under a hat: otherwise a hat becomes a way to every colour. Values are
    their mean.
    """

    def __init__(self, paths: Sequence[Path]):
        from lace_trainer.judges.classifier import load

        self.hashes = [sha256(Path(path)) for path in paths]
        self.members = [load(Path(path)) for path in paths]
        self.attributes, self.size = self.members[0].attributes, self.members[0].shape.size
        for path, member in zip(paths, self.members, strict=True):
            if (member.attributes, member.shape.size) != (self.attributes, self.size):
                raise LaceError(f"{path} and {paths[0]} do not label the same attributes at the same size; give "
                                "labellers that were trained alike")

    @property
    def accuracy(self) -> dict[str, float]:
        """On rendered faces, by attribute; the members' mean."""
        found = [member.metadata.get("accuracy", {}) for member in self.members]
        return {name: float(np.mean([each[name] for each in found])) for name in found[0]} if all(found) else {}

    @property
    def spans(self) -> list[tuple[int, int]]:
        """(first, past-last) column of every attribute among ``opinions``."""
        return self.members[0].spans

    def opinions(self, pictures: Tensor | np.ndarray) -> np.ndarray:
        """How likely each member finds each class, and the values: (members, n, columns) float64."""
        found = []
        for member in self.members:
            output = member.outputs(pictures).double()
            for attribute, (low, high) in zip(self.attributes, self.spans, strict=True):
                if attribute.kind == "class":
                    output[:, low:high] = output[:, low:high].softmax(dim=1)
            found.append(output.cpu().numpy())
        return np.stack(found)

    def label(self, pictures: Tensor | np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Labels (n, attributes) float32 of pictures, see ``Classifier.predict``; NaN where they are not sure."""
        if len(self.members) == 1:
            return self.members[0].predict(pictures)
        return draw_labels(self.opinions(pictures).mean(axis=0), self.attributes, self.spans, rng)


def draw_labels(likely: np.ndarray, attributes: Sequence[Attribute], spans: Sequence[tuple[int, int]],
                rng: np.random.Generator) -> np.ndarray:
    """How likely each class is (n, columns), as labels (n, attributes) float32: drawn as likely, if one is SURE."""
    columns = []
    for attribute, (low, high) in zip(attributes, spans, strict=True):
        part = likely[:, low:high].astype(np.float64)
        if attribute.kind == "class":
            drawn = (part.cumsum(axis=1) < rng.random((len(part), 1))).sum(axis=1).clip(max=high - low - 1)
            columns.append(np.where(part.max(axis=1) < SURE, np.nan, drawn))
        else:
            columns.append(part[:, 0])
    return np.stack(columns, axis=1).astype(np.float32)


def sampled_pairs(
    generator: Path, labellers: Labellers, *, count: int = 40_000, seed: int = 0, directory: Path, batch: int = 64,
    precision: str = "fp32", progress: Progress | None = None,
) -> Pairs:
    """``count`` samples of the generator at truncation 1 with constant noise, labelled by the classifiers.

    The pairs are kept in ``directory``, under a name made of everything that decides them.
    """
    from exporter.checkpoints import load_generator

    hashes = {"generator": sha256(Path(generator)), "labellers": labellers.hashes}
    facts = {"kind": "generator samples", **hashes, "count": count, "seed": seed, "precision": precision}
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
    path = Path(directory) / f"pairs-{key}.safetensors"
    facts["labeller_accuracy"] = labellers.accuracy
    if not path.exists():
        w, labels = label_samples(load_generator(generator), labellers, count, seed, batch, precision, progress)
        write_atomically(path, to_bytes({"w": w, "labels": labels}))
    with safe_open(str(path), framework="numpy") as file:
        w, labels = file.get_tensor("w"), file.get_tensor("labels")
    return Pairs(w, labels, labellers.attributes, validation=held_back(count), source=facts)


def held_back(count: int) -> int:
    """How many of ``count`` pairs choose the best epoch."""
    return min(max(500, count // 20), count // 4)


@torch.inference_mode()
def label_samples(parts, labellers: Labellers, count: int, seed: int, batch: int, precision: str,
                  progress: Progress | None):
    """w (count, w_dim) and labels (count, attributes), both float32."""
    mapping, synthesis = parts.mapping, parts.synthesis
    check_size(synthesis.resolution, labellers)
    synthesis.set_precision(DTYPES[precision])
    rng, opinions = np.random.default_rng(seed), np.random.default_rng((seed, 1))
    ws, labels = [], []
    for start in range(0, count, batch):
        # Always a full batch, so that a sample does not depend on `count`: products round by the number of rows.
        w = mapping(torch.from_numpy(rng.standard_normal((batch, mapping.z_dim), dtype=np.float32)))[: count - start]
        pictures = synthesis(w[:, None].expand(-1, synthesis.num_ws, -1))
        ws.append(w.numpy())
        labels.append(labellers.label(pictures, opinions))
        if progress:
            progress(min(start + batch, count), count, "sampling and labelling")
    return np.concatenate(ws), np.concatenate(labels)


def check_size(resolution: int, labellers: Labellers) -> None:
    if resolution != labellers.size:
        raise LaceError(f"the generator draws {resolution} px, the labeller reads {labellers.size} px; "
                        "train a labeller of the generator's size")
