"""Do probabilities keep what they promise? Temperature, calibration error and reliability of class heads; error of
value heads and the tolerance that follows from it.

Guo, Pleiss, Sun, Weinberger, "On Calibration of Modern Neural Networks", ICML 2017.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy import ndarray as Array

from engine.folders import write_atomically

BINS = 15
WARN = 1.5  # a temperature beyond it: the head has learnt its labels' noise
LEAST_TOLERANCE = 0.03
COOLEST, HOTTEST, ROUNDS = 0.05, 50.0, 60


@dataclass(frozen=True, slots=True)
class Bin:
    """Predictions of which the confidence falls together: their number, mean confidence and accuracy."""

    count: int
    confidence: float
    accuracy: float


@dataclass(frozen=True, slots=True)
class Calibration:
    """Of one attribute on held-out pairs; by truncation where it says so.

    temperature   what the logits were divided by (1 of a value)
    log_loss, ece, accuracy   of a class head; the error of a value is in ``error``
    bins          the reliability of the likeliest class
    tolerance     within which a value may be called met, None of a class
    """

    name: str
    kind: str
    temperature: float = 1.0
    log_loss: Mapping[str, float] = field(default_factory=dict)
    ece: Mapping[str, float] = field(default_factory=dict)
    accuracy: Mapping[str, float] = field(default_factory=dict)
    bins: Mapping[str, tuple[Bin, ...]] = field(default_factory=dict)
    error: Mapping[str, float] = field(default_factory=dict)
    tolerance: float | None = None

    @property
    def is_overconfident(self) -> bool:
        """Whether the head was so sure of itself before its temperature that it must have learnt noise."""
        return self.temperature > WARN


def log_softmax(logits: Array) -> Array:
    """logits (n, C) -> (n, C), float64."""
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def log_loss(logits: Array, votes: Array) -> float:
    """Mean cross-entropy of logits (n, C) against votes (n, C), the share of votes of each class."""
    return float(-(votes * log_softmax(logits)).sum(axis=1).mean())


def temperature(logits: Array, votes: Array) -> float:
    """The T > 0 of which logits / T have the least log loss. It is convex in 1/T: bisection on its derivative."""
    low, high = np.log(1 / HOTTEST), np.log(1 / COOLEST)
    for _ in range(ROUNDS):
        middle = (low + high) / 2
        p = np.exp(log_softmax(np.exp(middle) * logits))
        slope = ((p - votes) * logits).sum()
        low, high = (middle, high) if slope < 0 else (low, middle)
    return float(np.exp(-(low + high) / 2))


def reliability(logits: Array, votes: Array, bins: int = BINS) -> tuple[Bin, ...]:
    """Bins of equal width of the likeliest class's probability; empty ones are left out.

    Accuracy is that class's share of the votes, so that labels that are no certainties count as what they are.
    """
    p = np.exp(log_softmax(logits))
    likeliest = p.argmax(axis=1)
    rows = np.arange(len(p))
    confidence, accuracy = p[rows, likeliest], votes[rows, likeliest]
    place = np.minimum((confidence * bins).astype(int), bins - 1)
    return tuple(
        Bin(int(part.sum()), float(confidence[part].mean()), float(accuracy[part].mean()))
        for part in (place == i for i in range(bins)) if part.any()
    )


def expected_error(bins: Sequence[Bin]) -> float:
    """Expected calibration error: the mean gap between confidence and accuracy, weighted by the bins' counts."""
    total = sum(b.count for b in bins)
    return sum(b.count * abs(b.confidence - b.accuracy) for b in bins) / total if total else float("nan")


def tolerance(error: float) -> float:
    """Within which a value is met, from the head's mean error on held-out pairs."""
    return round(max(LEAST_TOLERANCE, 2 * error), 4)


def of_classes(name: str, parts: Mapping[str, tuple[Array, Array]], scale: float) -> Calibration:
    """parts   by truncation: logits that are divided by their temperature ``scale`` already, and votes, (n, C)"""
    bins = {psi: reliability(*part) for psi, part in parts.items()}
    right = {psi: float(votes[np.arange(len(votes)), logits.argmax(axis=1)].mean())
             for psi, (logits, votes) in parts.items()}
    return Calibration(
        name, "class", scale, {psi: log_loss(*part) for psi, part in parts.items()},
        {psi: expected_error(found) for psi, found in bins.items()}, right, bins,
    )


def of_values(name: str, parts: Mapping[str, tuple[Array, Array]]) -> Calibration:
    """parts   by truncation: what the head reads and what the labellers read, (n, 1)"""
    errors = {psi: float(np.abs(read - voted).mean()) for psi, (read, voted) in parts.items()}
    return Calibration(name, "value", error=errors, tolerance=tolerance(float(np.mean(list(errors.values())))))


def plot(path: Path, found: Sequence[Calibration]) -> None:
    """A PNG with a reliability diagram for every class attribute, a line for every truncation."""
    from matplotlib.figure import Figure

    classes = [c for c in found if c.kind == "class"]
    columns = min(4, max(1, len(classes)))
    lines = max(1, -(-len(classes) // columns))
    figure = Figure(figsize=(2.6 * columns, 2.7 * lines), layout="constrained")
    for i, calibration in enumerate(classes):
        axes = figure.add_subplot(lines, columns, i + 1)
        axes.plot([0, 1], [0, 1], color="0.7", linewidth=1)
        for psi, bins in calibration.bins.items():
            axes.plot([b.confidence for b in bins], [b.accuracy for b in bins], marker=".",
                      label=f"psi {psi}: {calibration.ece[psi]:.3f}")
        axes.set(title=calibration.name, xlabel="promised", ylabel="kept", xlim=(0, 1.02), ylim=(0, 1.02))
        axes.legend(title="calibration error", fontsize=7, title_fontsize=7)
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=120))
