"""Classifiers of labelled photographs: a folder of pictures, and a table of what they show."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy import ndarray as Array
from torch import Tensor

from engine.errors import LaceError
from engine.folders import write_atomically
from lace_trainer.attributes import Attribute
from lace_trainer.data import these
from lace_trainer.heads import calibration
from lace_trainer.judges import classifier
from lace_trainer.judges.classifier import Classifier, ClassifierConfig, Shape
from lace_trainer.tables import Table, labels_of

FEWEST = 40  # pictures without which nothing can be learnt
FEW_OF_CLASS = 100
VALIDATION = 0.1  # of the pictures
LEAST_SIZE, MOST_SIZE = 32, 512
MOST_WEIGHT = 10.0
LEAST_STEPS = 16  # of an epoch: few pictures come in smaller batches


@dataclass(frozen=True, slots=True, eq=False)
class Photographs:
    """pictures (n, R, R, 3) uint8, labels (n, attributes) with NaN where unknown; the last ``held_out`` are not for
    training."""

    pictures: Tensor
    labels: Array
    attributes: tuple[Attribute, ...]
    held_out: int


def load_photographs(folder: Path, table: Table, *, size: int, cache: Path, names: Sequence[str] | None = None,
                     scales: Mapping[str, tuple[float, float]] | None = None, validation: int | None = None,
                     seed: int = 0) -> Photographs:
    """The pictures that a table names, centre-cropped and resized; shuffled, for tables are often sorted.

    Raises LaceError, also for pictures that are not there.
    """
    if "file" not in table.columns:
        raise LaceError(f"the first column of {table.path} is {next(iter(table.columns))!r}; expected the pictures' "
                        "file names in a column 'file'")
    attributes, labels = labels_of(table, names, scales or {})
    files = [folder / name for name in table.columns["file"]]
    check_files(folder, table, files)
    if table.count < FEWEST:
        raise LaceError(f"{table.path} names {table.count} pictures; a classifier needs at least {FEWEST}, and some "
                        "thousands to be worth anything")
    held = validation or max(1, int(VALIDATION * table.count))
    if held >= table.count:
        raise LaceError(f"--validation {held} leaves none of {table.count} pictures to learn from")
    order = np.random.default_rng((seed, 5)).permutation(table.count)
    pictures = these(folder, [files[i] for i in order], size, cache)
    return Photographs(pictures, labels[order], attributes, held)


def check_files(folder: Path, table: Table, files: Sequence[Path]) -> None:
    """Pictures are in the folder, under plain relative names."""
    inside = folder.resolve()
    for i, file in enumerate(files):
        if not file.is_file():
            raise LaceError(f"{table.path}, row {i + 1}: there is no picture {file}")
        if inside not in file.resolve().parents and not file.is_symlink():
            raise LaceError(f"{table.path}, row {i + 1}: {file} lies outside of {folder}")


def shape_for(size: int) -> Shape:
    """The labeller's network, with one more stage for each doubling beyond 64 pixels."""
    if not LEAST_SIZE <= size <= MOST_SIZE or size % 16:
        raise LaceError(f"--size is {size}: expected a multiple of 16 from {LEAST_SIZE} to {MOST_SIZE}")
    more = max(0, math.ceil(math.log2(size / 64)))
    widths, depths = classifier.ROLES["labeller"].shape.widths, classifier.ROLES["labeller"].shape.depths
    return Shape((*widths, *(widths[-1],) * more), (*depths, *(1,) * more), size=size)


def class_weights(data: Photographs) -> tuple[Tensor | None, ...]:
    """For each attribute what its classes count (C,), the rarer the more: the root of the inverse share. None: a value.

    Training with them shows rare classes often enough to be learnt; ``unweighted`` takes them out of the probabilities
    again.
    """
    found: list[Tensor | None] = []
    training = data.labels[: len(data.labels) - data.held_out]
    for attribute, column in zip(data.attributes, training.T, strict=True):
        if attribute.kind == "value":
            found.append(None)
            continue
        counts = np.bincount(column[~np.isnan(column)].astype(int), minlength=len(attribute.classes))
        inverse = np.sqrt(counts.sum() / np.maximum(counts, 1) / len(counts))
        found.append(torch.from_numpy(np.minimum(inverse, MOST_WEIGHT).astype(np.float32)))
    return tuple(found)


@torch.no_grad()
def unweighted(model: Classifier, weights: Sequence[Tensor | None]) -> None:
    """What learnt with weights w_c says what is proportional to w_c p(c): subtract log w_c from its logits."""
    for (low, high), weight in zip(model.spans, weights, strict=True):
        if weight is not None:
            model.out.bias[low:high] -= weight.log().to(model.out.bias.device)


def train_on(data: Photographs, config: ClassifierConfig, *, balance: bool = True, mirror: bool = False,
             progress=None) -> Classifier:
    """A classifier with its validation report in ``metadata``."""
    split = len(data.pictures) - data.held_out
    weights = class_weights(data) if balance else (None,) * len(data.attributes)
    config = replace(config, batch=min(config.batch, max(4, split // LEAST_STEPS)))
    validation = data.pictures[split:], data.labels[split:]
    model = classifier.train(shape_for(data.pictures.shape[1]), data.attributes, (data.pictures[:split],
                             data.labels[:split]), config, validation=validation, weights=weights, mirror=mirror,
                             progress=progress)
    unweighted(model, weights)
    model.metadata["accuracy"] = classifier.scores(model.attributes, model.predict(validation[0]), validation[1])
    model.metadata["validation"] = validated(model, data)
    return model


def validated(model: Classifier, data: Photographs) -> dict[str, dict]:
    """Of every attribute on the held-out pictures: accuracy, a guess's, of classes recall, precision, calibration error
    and confusion (said x labelled), and warnings."""
    split, found = len(data.pictures) - data.held_out, {}
    outputs = model.outputs(data.pictures[split:]).cpu().numpy()
    for i, (attribute, (low, high)) in enumerate(zip(data.attributes, model.spans, strict=True)):
        known = ~np.isnan(data.labels[split:, i])
        labels, said = data.labels[split:, i][known], outputs[known, low:high]
        training = data.labels[:split, i][~np.isnan(data.labels[:split, i])]
        if not len(labels):
            found[attribute.name] = {"warnings": ["no held-out picture says anything of it"]}
        elif attribute.kind == "class":
            found[attribute.name] = of_classes(attribute, said, labels.astype(int), training.astype(int))
        else:
            found[attribute.name] = {
                "accuracy": float(1 - np.abs(said[:, 0] - labels).mean()), "warnings": [],
                "guess": float(1 - np.abs(labels - np.median(training)).mean())}
    return found


def of_classes(attribute: Attribute, logits: Array, labels: Array, training: Array) -> dict:
    names, count = attribute.classes, len(attribute.classes)
    likeliest, hot = logits.argmax(axis=1), np.eye(count)[labels]
    confusion = np.zeros((count, count), int)
    np.add.at(confusion, (likeliest, labels), 1)
    right, of_label, of_said = np.diag(confusion), confusion.sum(axis=0), confusion.sum(axis=1)
    warnings = [f"only {n} training pictures show {name!r}: label more" for name, n in
                zip(names, np.bincount(training, minlength=count).tolist(), strict=True) if n < FEW_OF_CLASS]
    accuracy, guess = float(right.sum() / len(labels)), float(of_label.max() / len(labels))
    if accuracy <= guess:
        warnings.append(f"accuracy {accuracy:.3f} is no better than a guess ({guess:.3f}): more epochs, more pictures, "
                        "or plainer classes")
    return {
        "accuracy": accuracy, "guess": guess,
        "calibration_error": calibration.expected_error(calibration.reliability(logits, hot)),
        "recall": {name: float(right[k] / of_label[k]) for k, name in enumerate(names) if of_label[k]},
        "precision": {name: float(right[k] / of_said[k]) for k, name in enumerate(names) if of_said[k]},
        "confusion": confusion.tolist(), "warnings": warnings,
    }


def plot(path: Path, attributes: Sequence[Attribute], found: Mapping[str, Mapping]) -> None:
    """A PNG with the confusion of every class attribute."""
    from lace_trainer.heads.advice import draw_confusions

    tables = {a.name: (a.classes, np.array(found[a.name]["confusion"])) for a in attributes
              if "confusion" in found[a.name]}
    if tables:
        figure = draw_confusions(tables, said="read by the classifier")
        write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=120))
