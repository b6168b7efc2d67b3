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

from engine.bundle import sha256
from engine.errors import LaceError
from engine.folders import write_atomically
from lace_trainer.attributes import Attribute
from lace_trainer.heads.labellers import Labellers

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
    labellers.check_size(synthesis.resolution)
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
