"""Pairs (w, labels) for training heads, and where they come from: labelled samples of a generator."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.numpy import save as to_bytes

from engine.errors import LaceError
from trainer.data import save_atomically
from trainer.faces.factors import Attribute

Progress = Callable[[int, int, str], None]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


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
        for name in names:
            if name not in known:
                raise LaceError(f"there are no labels for {name!r}; there are some for: {', '.join(known)}")
        columns = [known.index(name) for name in names]
        attributes = tuple(self.attributes[i] for i in columns)
        return Pairs(self.w, self.labels[:, columns], attributes, self.test, self.validation, self.source)


def _check_labels(attribute: Attribute, labels: np.ndarray) -> None:
    known = labels[~np.isnan(labels)]
    if attribute.kind == "class" and len(known):
        n = len(attribute.classes)
        if not (np.equal(np.mod(known, 1), 0) & (known >= 0) & (known < n)).all():
            raise LaceError(f"labels of {attribute.name!r} range from {known.min():g} to {known.max():g}; "
                            f"expected whole numbers from 0 to {n - 1}")  # fmt: skip


def file_hash(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sampled_pairs(
    generator: Path, labeller: Path, *, count: int = 40_000, seed: int = 0, directory: Path, batch: int = 64,
    precision: str = "fp32", progress: Progress | None = None,
) -> Pairs:  # fmt: skip
    """``count`` samples of the generator at truncation 1 with constant noise, labelled by the classifier.

    The pairs are kept in ``directory``, under a name made of everything that decides them.
    """
    from exporter.checkpoints import load_generator
    from trainer.classifier import load

    hashes = {"generator": file_hash(Path(generator)), "labeller": file_hash(Path(labeller))}
    facts = {"kind": "generator samples", **hashes, "count": count, "seed": seed, "precision": precision}
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
    path = Path(directory) / f"pairs-{key}.safetensors"
    model = load(labeller)
    facts["labeller_accuracy"] = model.metadata.get("accuracy", {})
    if not path.exists():
        w, labels = label_samples(load_generator(generator), model, count, seed, batch, precision, progress)
        save_atomically(path, lambda p: p.write_bytes(to_bytes({"w": w, "labels": labels})))
    with safe_open(str(path), framework="numpy") as file:
        w, labels = file.get_tensor("w"), file.get_tensor("labels")
    return Pairs(w, labels, model.attributes, validation=min(max(500, count // 20), count // 4), source=facts)


@torch.inference_mode()
def label_samples(parts, labeller, count: int, seed: int, batch: int, precision: str, progress: Progress | None):
    """w (count, w_dim) and labels (count, attributes), both float32."""
    mapping, synthesis = parts.mapping, parts.synthesis
    if synthesis.resolution != labeller.shape.size:
        raise LaceError(f"the generator draws {synthesis.resolution} px, the labeller reads {labeller.shape.size} px; "
                        "train a labeller of the generator's size")  # fmt: skip
    synthesis.set_precision(DTYPES[precision])
    rng = np.random.default_rng(seed)
    ws, labels = [], []
    for start in range(0, count, batch):
        # Always a full batch of latents, so that a sample does not depend on `count`.
        z = torch.from_numpy(rng.standard_normal((batch, mapping.z_dim), dtype=np.float32))[: count - start]
        w = mapping(z)
        pictures = synthesis(w[:, None].expand(-1, synthesis.num_ws, -1))
        ws.append(w.numpy())
        labels.append(labeller.predict(pictures))
        if progress:
            progress(min(start + batch, count), count, "sampling and labelling")
    return np.concatenate(ws), np.concatenate(labels)
