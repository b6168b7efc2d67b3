"""Adversarial training of a StyleGAN2: ``lace-train gan``.

Non-saturating logistic loss, lazy R1 on real pictures, an exponential moving average of the generator,
style mixing and minibatch standard deviation, as in Karras et al., CVPR 2020. Every step draws its
randomness from (seed, step), so that a run that was interrupted and resumed equals one that was not, up to
the arithmetic of the machine.
"""

import copy
import json
import logging
import pickle
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from engine.errors import CheckpointError, LaceError
from exporter.generators.stylegan2 import Generator, Mapping, Synthesis
from trainer.data import save_atomically
from trainer.discriminator import Discriminator

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class GanConfig:
    """What decides the result of a run.

    channels   {resolution: width}, the same for both networks
    noise      per-pixel noise in the generator: for data with random detail (hair, skin); it only stipples
               pictures that have none
    """

    z_dim: int = 128
    w_dim: int = 128
    mapping_layers: int = 8
    channels: dict[int, int] = field(default_factory=lambda: {4: 128, 8: 128, 16: 128, 32: 96, 64: 48})
    batch: int = 32
    learning_rate: float = 2.5e-3
    r1_gamma: float = 0.1
    r1_interval: int = 16
    style_mixing: float = 0.9
    ema_pictures: float = 10_000.0
    noise: bool = False
    precision: str = "bf16"
    seed: int = 0


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def build_generator(config: GanConfig) -> Generator:
    torch.manual_seed(config.seed)
    mapping = Mapping(config.z_dim, config.w_dim, num_layers=config.mapping_layers)
    return Generator(mapping, Synthesis(config.w_dim, config.channels, use_noise=config.noise))


# Settings that a resumed run may change: neither the shape of the networks nor the meaning of a step hangs on them.
MAY_CHANGE = ("precision", "learning_rate", "r1_gamma", "style_mixing", "ema_pictures")


class Training:
    """The networks, their optimisers and the count of steps; everything a checkpoint holds."""

    def __init__(self, config: GanConfig, device: str = "cpu"):
        self.config, self.device, self.step, self.seconds = config, torch.device(device), 0, 0.0
        layout = torch.channels_last
        self.generator = build_generator(config).to(self.device).to(memory_format=layout)
        self.discriminator = Discriminator(config.channels).to(self.device).to(memory_format=layout)
        self.ema = copy.deepcopy(self.generator).eval().requires_grad_(False)
        dtype = DTYPES[config.precision]
        self.generator.synthesis.set_precision(dtype)
        self.discriminator.dtype = dtype
        self.lazy = lazy = config.r1_interval / (config.r1_interval + 1)
        self.g_optimiser = torch.optim.Adam(
            self.generator.parameters(), lr=config.learning_rate, betas=(0.0, 0.99), eps=1e-8
        )
        # Lazy regularisation: the discriminator's learning rate and moments are rescaled by k / (k + 1).
        self.d_optimiser = torch.optim.Adam(
            self.discriminator.parameters(), lr=config.learning_rate * lazy, betas=(0.0, 0.99**lazy), eps=1e-8
        )

    @property
    def pictures(self) -> int:
        return self.step * self.config.batch

    def state_dict(self) -> dict:
        return {
            "config": asdict(self.config), "step": self.step, "seconds": self.seconds,
            "generator": self.generator.state_dict(), "discriminator": self.discriminator.state_dict(),
            "ema": self.ema.state_dict(), "g_optimiser": self.g_optimiser.state_dict(),
            "d_optimiser": self.d_optimiser.state_dict(),
        }  # fmt: skip

    def load_state_dict(self, state: dict) -> None:
        self.step, self.seconds = state["step"], state["seconds"]
        for name in ("generator", "discriminator", "ema", "g_optimiser", "d_optimiser"):
            getattr(self, name).load_state_dict(state[name])
        # The optimisers bring the rate they were saved with; the configuration decides.
        for optimiser, rate in ((self.g_optimiser, 1.0), (self.d_optimiser, self.lazy)):
            for group in optimiser.param_groups:
                group["lr"] = self.config.learning_rate * rate

    def latents(self, rng: torch.Generator) -> Tensor:
        return torch.randn(self.config.batch, self.config.z_dim, generator=rng, device=self.device)

    def styles(self, rng: torch.Generator) -> Tensor:
        """ws (batch, num_ws, w_dim); with probability ``style_mixing`` two latents share a picture."""
        generator, config = self.generator, self.config
        w = generator.mapping(self.latents(rng))
        with torch.no_grad():
            generator.mapping.w_avg.lerp_(w.detach().mean(dim=0), 0.002)
        num_ws = generator.synthesis.num_ws
        ws = w[:, None].expand(-1, num_ws, -1)
        if torch.rand([], generator=rng, device=self.device) < config.style_mixing:
            cut = torch.randint(1, num_ws, [], generator=rng, device=self.device)
            other = generator.mapping(self.latents(rng))[:, None]
            ws = torch.where((torch.arange(num_ws, device=self.device) < cut)[None, :, None], ws, other)
        return ws

    def fakes(self, rng: torch.Generator) -> Tensor:
        ws = self.styles(rng)
        return self.generator.synthesis(ws, self.generator.synthesis.random_noises(len(ws), rng))

    def train_step(self, reals: Tensor) -> dict[str, float]:
        """One update of each network.  reals (batch, 3, R, R) in [-1, 1]."""
        config = self.config
        rng = torch.Generator(self.device).manual_seed((config.seed << 40) + self.step)
        reals = reals.contiguous(memory_format=torch.channels_last)
        with torch.no_grad():
            fakes = self.fakes(rng)
        real_logits, fake_logits = self.discriminator(reals), self.discriminator(fakes)
        d_loss = F.softplus(fake_logits).mean() + F.softplus(-real_logits).mean()
        self.update(self.d_optimiser, d_loss)
        report = {"d_loss": d_loss.item(), "real": real_logits.mean().item(), "fake": fake_logits.mean().item()}
        if self.step % config.r1_interval == 0:
            report["r1"] = self.r1_step(reals)

        self.discriminator.requires_grad_(False)
        g_loss = F.softplus(-self.discriminator(self.fakes(rng))).mean()
        self.update(self.g_optimiser, g_loss)
        self.discriminator.requires_grad_(True)
        report["g_loss"] = g_loss.item()
        self.step += 1
        self.average()
        return report

    def r1_step(self, reals: Tensor) -> float:
        """R1 = gamma/2 |grad_x D(x)|^2 on real pictures (Mescheder et al., ICML 2018), every r1_interval steps."""
        reals = reals.detach().requires_grad_(True)
        gradient = torch.autograd.grad(self.discriminator(reals).sum(), reals, create_graph=True)[0]
        penalty = gradient.float().square().sum(dim=(1, 2, 3)).mean()
        self.update(self.d_optimiser, penalty * (self.config.r1_gamma / 2 * self.config.r1_interval))
        return penalty.item()

    @staticmethod
    def update(optimiser: torch.optim.Optimizer, loss: Tensor) -> None:
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()

    @torch.no_grad()
    def average(self) -> None:
        # The average's memory grows with the run (at most 5 % of it), or early samples would linger.
        memory = min(self.config.ema_pictures, 0.05 * self.pictures)
        beta = 0.5 ** (self.config.batch / max(memory, 1e-8))
        ours = [*self.ema.parameters(), *self.ema.buffers()]
        theirs = [*self.generator.parameters(), *self.generator.buffers()]
        for average, value in zip(ours, theirs, strict=True):
            average.lerp_(value, 1 - beta)


def sheet(generator: Generator, path: Path, *, count: int = 64, psi: float = 1.0, seed: int = 0) -> None:
    """Write a PNG of uncurated samples, 8 to a row."""
    rng = torch.Generator().manual_seed(seed)
    z = torch.randn(count, generator.mapping.z_dim, generator=rng)
    with torch.no_grad():
        images = generator(z.to(generator.mapping.w_avg.device), psi=psi).cpu()
    pixels = (images * 127.5 + 128).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()
    n, size = 8, pixels.shape[1]
    grid = pixels.reshape(-1, n, size, size, 3).swapaxes(1, 2).reshape(-1, n * size, 3)
    save_atomically(path, lambda p: Image.fromarray(grid).save(p, format="PNG"))


def resumed(config: GanConfig, checkpoint: Path, device: str = "cpu") -> Training:
    """The run as ``checkpoint`` holds it, or a new one when there is none."""
    if not checkpoint.exists():
        return Training(config, device)
    try:
        state = torch.load(checkpoint, map_location=device, weights_only=True)
        stored = GanConfig(**state["config"])
    except (OSError, RuntimeError, EOFError, KeyError, TypeError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"cannot resume from {checkpoint}: {error}; remove it to start again") from error
    if replace(stored, **{name: getattr(config, name) for name in MAY_CHANGE}) != config:
        raise LaceError(f"{checkpoint} was trained with {stored}; start a new directory for {config}")
    training = Training(config, device)
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
    progress: Callable[[int, int, str], None] | None = None,
) -> Training:  # fmt: skip
    """Train until ``pictures`` have been seen; resume from ``directory/checkpoint.pt`` when it is there.

    data       (n, R, R, 3) uint8
    directory  receives checkpoint.pt, samples-*.png and log.jsonl
    every      steps between checkpoints
    progress   called after every step with (pictures seen, pictures, text)
    """
    check_data(config, data)
    directory.mkdir(parents=True, exist_ok=True)
    training = resumed(config, directory / "checkpoint.pt", device)
    start, seen = time.perf_counter() - training.seconds, training.pictures
    began = time.perf_counter()
    while training.pictures < pictures:
        rng = np.random.default_rng((config.seed, training.step))
        batch = data[torch.from_numpy(np.sort(rng.choice(len(data), config.batch, replace=False)))]
        reals = (batch.permute(0, 3, 1, 2).to(training.device, torch.float32) - 127.5) / 127.5
        report = training.train_step(reals)
        if progress:
            progress(min(training.pictures, pictures), pictures, f"d {report['d_loss']:.2f} g {report['g_loss']:.2f}")
        if training.step % every == 0 or training.pictures >= pictures:
            training.seconds = time.perf_counter() - start
            record(training, directory, report, (training.pictures - seen) / (time.perf_counter() - began))
    return training


def record(training: Training, directory: Path, report: dict[str, float], rate: float) -> None:
    """Checkpoint, sheet of samples, line in the log."""
    checkpoint = directory / "checkpoint.pt"
    if not all(np.isfinite(value) for value in report.values()):
        raise LaceError(f"the training diverged at {training.pictures} pictures: {report}; the last good state is "
                        f"{checkpoint}; train with --precision fp32 or a lower learning rate")  # fmt: skip
    save_atomically(checkpoint, lambda p: torch.save(training.state_dict(), p))
    sheet(training.ema, directory / f"samples-{training.pictures // 10_000 * 10:04d}k.png")
    line = {"pictures": training.pictures, "seconds": round(training.seconds, 1), "rate": round(rate, 1),
            **{k: round(v, 4) for k, v in report.items()}}  # fmt: skip
    log.info(json.dumps(line))
    with open(directory / "log.jsonl", "a") as file:
        file.write(json.dumps({**line, "machine": platform.processor() or platform.machine()}) + "\n")
