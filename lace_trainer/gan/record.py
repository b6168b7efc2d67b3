"""What a training leaves behind: checkpoints, the best generator, sheets of samples, a log."""

import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from engine.errors import LaceError
from engine.folders import append_lines, write_atomically
from engine.text import to_json
from exporter.generators.stylegan2 import Generator
from lace_trainer.gan.score import sampled_features, to_pixels
from lace_trainer.gan.training import Training, device_name
from lace_trainer.judges.classifier import Classifier
from lace_trainer.judges.metrics import Moments, frechet_distance, moments

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class Fid:
    """Fréchet distance during a training.

    reference   moments of real pictures by ``judge``
    samples     of the averaged generator
    every       pictures between two measurements; they fall on checkpoints
    """

    judge: Classifier
    reference: Moments
    samples: int = 2000
    every: int = 0

    def __call__(self, generator: Generator) -> float:
        found = sampled_features(self.judge, generator.mapping, generator.synthesis, self.samples)
        return frechet_distance(self.reference, moments(found))


def record(
    training: Training, directory: Path, report: dict[str, float], *, rate: float, fid: Fid | None, last: bool
) -> None:
    """Checkpoint, sheet of samples, line in the log; the generator as best.pt when its distance is the least so far."""
    checkpoint = directory / "checkpoint.pt"
    if not all(np.isfinite(value) for value in report.values()):
        raise LaceError(f"the training diverged at {training.pictures} pictures: {report}; the last good state is "
                        f"{checkpoint}; train with --precision fp32 or a lower learning rate")
    if fid and (last or training.pictures - training.fid_at >= fid.every):
        report = {**report, "fid": fid(training.ema)}
        training.fid_at = training.pictures
        if report["fid"] < training.best_fid:
            training.best_fid = report["fid"]
            save_best(training, directory / "best.pt")
    write_atomically(checkpoint, lambda file: torch.save(training.state_dict(), file))
    sheet(training.ema, directory / f"samples-{training.pictures // 10_000 * 10:04d}k.png")
    line = {"pictures": training.pictures, "seconds": round(training.seconds, 1), "rate": round(rate, 1),
            **{k: round(v, 4) for k, v in report.items()}}
    log.info(to_json(line, indent=None))
    entry = {**line, "machine": device_name(training.device)}
    append_lines(directory / "log.jsonl", to_json(entry, indent=None) + "\n")


def save_best(training: Training, path: Path) -> None:
    """The averaged generator alone, in the form of a checkpoint: it can be exported and scored, not resumed."""
    whole = training.state_dict()
    state = {key: whole[key] for key in ("config", "step", "seconds", "machine", "best_fid", "ema")}
    write_atomically(path, lambda file: torch.save(state, file))


def sheet(generator: Generator, path: Path, *, count: int = 64, psi: float = 1.0, seed: int = 0) -> None:
    """Write a PNG of uncurated samples, 8 to a row."""
    rng = torch.Generator().manual_seed(seed)
    z = torch.randn(count, generator.mapping.z_dim, generator=rng)
    with torch.no_grad():
        pixels = to_pixels(generator(z.to(generator.mapping.w_avg.device), psi=psi))
    n, size = 8, pixels.shape[1]
    grid = pixels.reshape(-1, n, size, size, 3).swapaxes(1, 2).reshape(-1, n * size, 3)
    write_atomically(path, lambda file: Image.fromarray(grid).save(file, format="PNG"))
