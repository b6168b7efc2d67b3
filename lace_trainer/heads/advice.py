"""Is an attribute worth offering? What was measured of its labels and its head, in numbers and in sentences.

A head can be no better than its labels: their number, how one-sided they are, and how often their labeller says the
same of a picture and of its mirror image. It can be no better than what the latent decides. And users need it to be
sure of something: sampling takes latents of which a head says more than 0.9.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy import ndarray as Array

from engine.folders import write_atomically
from exporter.heads import HeadStack
from lace_trainer.heads.agreement import Agreement
from lace_trainer.heads.calibration import WARN, Calibration, log_softmax
from lace_trainer.heads.labelled import Labelled
from lace_trainer.heads.sharp import logits_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CONFIDENCE = 0.9
FEW_LABELS, FEW_OF_CLASS, ONE_SIDED = 1000, 100, 0.02
READABLE = 0.3  # of the errors of a guess, the part that a head must avoid
AGREES = 0.85
MOST_ECE = 0.025
RARE = 1e-3  # of plain samples: fewer than that are hardly found
MOST_GAP, COUNTED = 0.05, 50  # between what is promised and what holds, where so many rows say it
YES, PARTLY, NO = "yes", "partly", "no"


@dataclass(frozen=True, slots=True)
class Report:
    """One attribute. Rates are hit rates of classes and 1 - mean absolute error of values, on held-out samples.

    accuracy   of the head;  guess: of the most frequent class, or of the median
    mirrored   the labeller's with itself on mirrored pictures, None where nobody was asked
    sides      classes that exchange places in the mirror
    labels     that it was trained on;  shares: of the classes among them
    sure       of each class, the share of held-out samples of which the head says more than 0.9
    promised, kept   the mean of what it says of those, and how many of them are so labelled; None without any
    worth      offering: yes, partly (some classes), no;  warnings: why, and what to do
    """

    name: str
    kind: str
    accuracy: float
    guess: float
    mirrored: float | None
    sides: tuple[str, ...]
    ece: float | None
    temperature: float | None
    labels: int
    shares: Mapping[str, float]
    sure: Mapping[str, float]
    promised: float | None
    kept: float | None
    worth: str = YES
    warnings: tuple[str, ...] = ()
    confusion: tuple[tuple[float, ...], ...] = ()

    @property
    def skill(self) -> float:
        """The part of a guess's errors that the head avoids."""
        return 1 - (1 - self.accuracy) / max(1 - self.guess, 1e-9)


def reports(labelled: Labelled, stacks: Sequence[HeadStack], found: Sequence[Calibration]) -> list[Report]:
    """Of every attribute, on the held-out samples that chose nothing."""
    rows = np.arange(len(labelled.w) - labelled.held_out, len(labelled.w))[1::2]
    made = []
    for i, (stack, calibration) in enumerate(zip(stacks, found, strict=True)):
        low, high = labelled.spans[i]
        some = rows[~np.isnan(labelled.votes[rows, low])]
        assert stack.sharp is not None
        logits = logits_of(stack.sharp.layers, labelled.w[some])
        training = labelled.votes[: len(labelled.w) - labelled.held_out, low:high]
        measure = of_class if calibration.kind == "class" else of_value
        report = measure(calibration, stack.attributes[0].classes, logits, labelled.votes[some, low:high],
                         training[~np.isnan(training[:, 0])], labelled.agreements[i])
        made.append(judge(report))
    return made


def of_class(calibration: Calibration, classes: Sequence[str], logits: Array, votes: Array, training: Array,
             mirror: Agreement | None) -> Report:
    p = np.exp(log_softmax(logits))
    likeliest, rows = p.argmax(axis=1), np.arange(len(p))
    is_sure = p[rows, likeliest] > CONFIDENCE
    confusion = np.stack([votes[likeliest == k].sum(axis=0) for k in range(len(classes))])
    shares = training.mean(axis=0)
    return Report(
        calibration.name, "class", float(votes[rows, likeliest].mean()), float(votes.mean(axis=0).max()),
        mirror and mirror.rate, mirror.sides if mirror else (), float(np.mean(list(calibration.ece.values()))),
        calibration.temperature, len(training), dict(zip(classes, shares.tolist(), strict=True)),
        {name: float((p[:, k] > CONFIDENCE).mean()) for k, name in enumerate(classes)},
        float(p[rows, likeliest][is_sure].mean()) if is_sure.any() else None,
        float(votes[rows, likeliest][is_sure].mean()) if is_sure.sum() >= COUNTED else None,
        confusion=tuple(map(tuple, confusion.tolist())),
    )


def of_value(calibration: Calibration, classes: Sequence[str], logits: Array, votes: Array, training: Array,
             mirror: Agreement | None) -> Report:
    error, spread = np.abs(logits - votes).mean(), np.abs(votes - np.median(training)).mean()
    return Report(calibration.name, "value", float(1 - error), float(1 - spread), mirror and mirror.rate,
                  mirror.sides if mirror else (), None, None, len(training), {}, {}, None, None)


def judge(report: Report) -> Report:
    """With the verdict and the warnings."""
    said = [*label_warnings(report), *head_warnings(report)]
    unreachable = [name for name, share in report.sure.items() if share < RARE]
    if unreachable:
        said.append(f"hardly any sample is surely {' or '.join(unreachable)} (fewer than 1 in {1 / RARE:,.0f}): ask "
                    "for it with a lower confidence, or label more pictures that show it")
    is_hollow = report.kept is not None and report.promised - report.kept > MOST_GAP  # type: ignore[operator]
    if report.skill < READABLE or is_hollow or len(unreachable) >= max(1, len(report.sure)):
        worth = NO if report.kind == "class" or report.skill < READABLE else YES
    else:
        worth = PARTLY if unreachable else YES
    return replace(report, worth=worth, warnings=tuple(said))


def label_warnings(report: Report) -> list[str]:
    said = []
    if report.labels < FEW_LABELS:
        said.append(f"only {report.labels:,} labels: label {FEW_LABELS:,} pictures or more")
    rare = {name: share for name, share in report.shares.items()
            if share < ONE_SIDED or share * report.labels < FEW_OF_CLASS}
    for name, share in rare.items():
        said.append(f"only {share * report.labels:,.0f} of {report.labels:,} labels ({share:.1%}) say {name!r}: label "
                    "more pictures that show it, or join it with another class")
    if report.mirrored is not None and report.mirrored < AGREES:
        said.append(f"the labeller agrees with itself on {report.mirrored:.0%} of mirrored pictures only, and a head "
                    "can be no better: take another labeller, or several")
    return said


def head_warnings(report: Report) -> list[str]:
    said = []
    if report.skill < READABLE:
        mirrored = "" if report.mirrored is None else f", and the labeller agrees with itself on {report.mirrored:.3f}"
        said.append(f"it can hardly be read from the latent: accuracy {report.accuracy:.3f}, where a guess without "
                    f"looking has {report.guess:.3f}{mirrored}: leave it out, or give it fewer, plainer classes")
    if report.temperature is not None and report.temperature > WARN:
        said.append(f"it promised too much (temperature {report.temperature:.2f}), for its labels are noisy: try "
                    "--dropout 0.3, fewer --sharp-epochs, or more samples")
    if report.ece is not None and report.ece > MOST_ECE:
        said.append(f"its probabilities are off by {report.ece:.3f} on average: more samples, or --dropout 0.3")
    if report.kept is not None and report.promised - report.kept > MOST_GAP:  # type: ignore[operator]
        said.append(f"where it promises {report.promised:.2f}, only {report.kept:.2f} holds: do not rely on it")
    return said


def document(report: Report) -> dict:
    """As JSON, rounded."""
    return {key: rounded(value) for key, value in asdict(report).items() if key not in ("name", "kind")} | {
        "skill": round(report.skill, 4)}


def rounded(value):
    if isinstance(value, float):
        return round(value, 4)
    if isinstance(value, Mapping):
        return {key: rounded(part) for key, part in value.items()}
    return [rounded(part) for part in value] if isinstance(value, tuple) else value


def noted(stacks: Sequence[HeadStack], made: Sequence[Report]) -> list[HeadStack]:
    """The stacks, whose provenance says what was measured."""
    kept = ("mirrored", "sides", "worth", "skill")
    found = []
    for stack, report in zip(stacks, made, strict=True):
        (attribute,) = stack.attributes
        sharp = dict(attribute.provenance.get("sharp", {})) | {
            key: value for key, value in document(report).items() if key in kept and value not in (None, [])}
        found.append(replace(stack, attributes=(
            replace(attribute, provenance={**attribute.provenance, "sharp": sharp}),)))
    return found


def plot_confusion(path: Path, made: Sequence[Report]) -> None:
    """A PNG with a table for every class attribute: what the head says against what the labels say."""
    tables = {report.name: (list(report.shares), np.array(report.confusion)) for report in made
              if report.kind == "class"}
    if tables:
        figure = draw_confusions(tables, said="read by the head")
        write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=120))


def draw_confusions(tables: Mapping[str, tuple[Sequence[str], Array]], *, said: str) -> "Figure":
    """tables   by attribute: the classes, and counts (said, labelled)"""
    from matplotlib.figure import Figure

    columns = min(4, len(tables))
    lines = -(-len(tables) // columns)
    figure = Figure(figsize=(2.8 * columns, 2.8 * lines), layout="constrained")
    for i, (title, (names, counts)) in enumerate(tables.items()):
        axes = figure.add_subplot(lines, columns, i + 1)
        shares = counts / np.maximum(counts.sum(axis=0), 1)
        axes.imshow(shares, vmin=0, vmax=1, cmap="Blues")
        for row, column in np.ndindex(shares.shape):
            if len(names) <= 8:
                axes.text(column, row, f"{shares[row, column]:.2f}", ha="center", va="center", fontsize=7,
                          color="white" if shares[row, column] > 0.6 else "black")
        axes.set_xticks(range(len(names)), names, rotation=45, ha="right", fontsize=7)
        axes.set_yticks(range(len(names)), names, fontsize=7)
        axes.set(title=title, xlabel="labelled", ylabel=said)
    return figure
