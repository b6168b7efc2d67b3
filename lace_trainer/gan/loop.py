"""The loop of ``lace-train gan``: resume, take steps, record."""

import pickle
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from engine.errors import CheckpointError, LaceError
from engine.folders import locked
from lace_trainer.gan.config import MAY_CHANGE, GanConfig
from lace_trainer.gan.record import Fid, record
from lace_trainer.gan.training import Training
from lace_trainer.judges.classifier import Classifier


def resumed(config: GanConfig, checkpoint: Path, device: str = "cpu", classifier: Classifier | None = None) -> Training:
    """The run as ``checkpoint`` holds it, or a new one when there is none."""
    training = Training(config, device, classifier)
    if not checkpoint.exists():
        return training
    try:
        state = torch.load(checkpoint, map_location=device, weights_only=True)
        stored = GanConfig(**state["config"])
    except (OSError, RuntimeError, EOFError, KeyError, TypeError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"cannot resume from {checkpoint}: {error}; remove it to start again") from error
    if replace(stored, **{name: getattr(config, name) for name in MAY_CHANGE}) != config:
        raise LaceError(f"{checkpoint} was trained with {stored}; start a new directory for {config}")
    training.load_state_dict(state)
    return training


def check_data(config: GanConfig, data: Tensor) -> None:
    size = max(config.channels)
    if data.ndim != 4 or data.shape[1:] != (size, size, 3) or data.dtype != torch.uint8:
        raise LaceError(f"the pictures are {data.dtype} {tuple(data.shape)}; expected uint8 (n, {size}, {size}, 3)")
    if len(data) < config.batch:
        raise LaceError(f"{len(data)} pictures do not fill a batch of {config.batch}; give more, or a smaller batch")


def train(
    config: GanConfig, data: Tensor, directory: Path, *, pictures: int, device: str = "cpu", every: int = 250,
    classifier: Classifier | None = None, fid: Fid | None = None, compiled: bool = False,
    progress: Callable[[int, int, str], None] | None = None,
) -> Training:
    """Train until ``pictures`` have been seen; resume from ``directory/checkpoint.pt`` when it is there.

    data       (n, R, R, 3) uint8
    directory  receives checkpoint.pt, samples-*.png and log.jsonl; with ``fid`` also best.pt
    every      steps between checkpoints
    classifier  whose features the feature discriminator reads
    fid        measures the averaged generator at checkpoints
    compiled   compile the networks first
    progress   called after every step with (pictures seen, pictures, text)

    Raises LaceError, also while another process trains in the same directory.
    """
    check_data(config, data)
    with locked(directory):
        directory.mkdir(parents=True, exist_ok=True)
        training = resumed(config, directory / "checkpoint.pt", device, classifier)
        if compiled:
            training.compile()
        run(training, data, directory, pictures, every, fid, progress)
    return training


def run(
    training: Training, data: Tensor, directory: Path, pictures: int, every: int, fid: Fid | None,
    progress: Callable[[int, int, str], None] | None,
) -> None:
    """The steps of ``train``."""
    config = training.config
    start, seen = time.perf_counter() - training.seconds, training.pictures
    began = time.perf_counter()
    while training.pictures < pictures:
        rng = np.random.default_rng((config.seed, training.step))
        batch = data[torch.from_numpy(np.sort(rng.choice(len(data), config.batch, replace=False)))]
        reals = (batch.permute(0, 3, 1, 2).to(training.device, torch.float32) - 127.5) / 127.5
        report = training.train_step(reals)
        if progress:
            progress(min(training.pictures, pictures), pictures, f"d {report['d_loss']:.2f} g {report['g_loss']:.2f}")
        last = training.pictures >= pictures
        if training.step % every == 0 or last:
            training.seconds = time.perf_counter() - start
            rate = (training.pictures - seen) / (time.perf_counter() - began)
            record(training, directory, report, rate=rate, fid=fid, last=last)
