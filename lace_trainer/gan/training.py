"""What a StyleGAN2 in training is: the networks, their optimisers, and one step of each.

Logistic loss, lazy R1 and path-length regularisation, an exponential moving average of the generator, style mixing
and minibatch standard deviation, as in Karras et al., CVPR 2020; adaptive augmentation as in Karras et al., NeurIPS
2020. Every step draws its randomness from (seed, step), so that a run that was interrupted and resumed equals one that
was not, up to the arithmetic of the machine.
"""

import copy
import platform
from collections.abc import Callable
from dataclasses import asdict

import torch
from torch import Tensor

from engine.errors import BackendError, LaceError
from exporter.generators.stylegan2 import Generator, Mapping, Synthesis
from lace_trainer.gan.ada import Augmentation
from lace_trainer.gan.config import GanConfig
from lace_trainer.gan.discriminator import Discriminator
from lace_trainer.gan.feature_discriminator import R1_GAMMA, FeatureDiscriminator
from lace_trainer.gan.losses import discriminator_loss, generator_loss, path_lengths, r1_penalty
from lace_trainer.judges.classifier import Classifier

FEATURES_RATE = 2e-3  # learning rate of the feature discriminator
PATH_INTERVAL, PATH_DECAY = 4, 0.01  # steps between two path penalties; memory of their mean length
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
NETWORKS = ("generator", "discriminator", "ema", "g_optimiser", "d_optimiser")


def build_generator(config: GanConfig) -> Generator:
    torch.manual_seed(config.seed)
    mapping = Mapping(config.z_dim, config.w_dim, num_layers=config.mapping_layers)
    return Generator(mapping, Synthesis(config.w_dim, config.channels, use_noise=config.noise))


class Training:
    """The networks, their optimisers and the count of steps; everything a checkpoint holds.

    best_fid   of the generator in best.pt, infinite if there is none
    fid_at     pictures at which the distance was last measured
    features   the feature discriminator, if the configuration gives it a weight
    """

    def __init__(self, config: GanConfig, device: str = "cpu", classifier: Classifier | None = None):
        self.config, self.device, self.step, self.seconds = config, usable(device), 0, 0.0
        self.best_fid, self.fid_at = float("inf"), 0
        self.path_mean = torch.zeros([], device=self.device)
        layout = torch.channels_last
        self.generator = build_generator(config).to(self.device).to(memory_format=layout)
        self.discriminator = Discriminator(config.channels).to(self.device).to(memory_format=layout)
        self.ema = copy.deepcopy(self.generator).eval().requires_grad_(False)
        dtype = DTYPES[config.precision]
        self.generator.synthesis.set_precision(dtype)
        self.discriminator.dtype = dtype
        # The penalties differentiate twice, which compiled networks cannot; so each network has two names.
        self.synthesise: Callable[..., Tensor] = self.generator.synthesis
        self.discriminate: Callable[[Tensor], Tensor] = self.discriminator
        self.augmentation = Augmentation(config.ada, flips=config.ada_flips, turns=config.ada_turns)
        self.g_optimiser = self.adam(self.generator, PATH_INTERVAL if config.path_length else 0)
        self.d_optimiser = self.adam(self.discriminator, config.r1_interval)
        self.features = None
        if config.features:
            if classifier is None:
                raise LaceError("a feature discriminator needs a classifier whose features it reads")
            self.features = FeatureDiscriminator(classifier.to(self.device), dtype).to(self.device)
            self.f_optimiser = torch.optim.Adam(self.features.parameters(), lr=FEATURES_RATE, betas=(0.0, 0.99))

    def adam(self, network: torch.nn.Module, interval: int) -> torch.optim.Adam:
        """With a penalty every k = ``interval`` steps, the rate and the moments are rescaled by k / (k + 1)."""
        lazy = interval / (interval + 1) if interval else 1.0
        rate = self.config.learning_rate * lazy
        return torch.optim.Adam(network.parameters(), lr=rate, betas=(0.0, 0.99**lazy), eps=1e-8)

    def compile(self) -> None:
        """Compile both networks for their ordinary passes, now; BackendError if that fails."""
        try:
            self.synthesise = torch.compile(self.generator.synthesis, fullgraph=True, dynamic=False)
            self.discriminate = torch.compile(self.discriminator, fullgraph=True, dynamic=False)
            synthesis, rows = self.generator.synthesis, self.config.batch
            ws = torch.zeros(rows, synthesis.num_ws, self.config.w_dim, device=self.device)
            self.discriminate(self.synthesise(ws, synthesis.random_noises(rows))).sum().backward()
        except Exception as error:  # torch.compile has no common error
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise BackendError(f"torch.compile failed: {reason}; mend that (a C++ compiler, or Triton for a GPU, must "
                               "be installed) or train without --compile") from error
        finally:
            for network in (self.generator, self.discriminator):
                network.zero_grad(set_to_none=True)

    @property
    def pictures(self) -> int:
        return self.step * self.config.batch

    def state_dict(self) -> dict:
        return {
            "config": asdict(self.config), "step": self.step, "seconds": self.seconds,
            "machine": device_name(self.device), "best_fid": self.best_fid, "fid_at": self.fid_at,
            "path_mean": self.path_mean.item(), "augmentation": self.augmentation.state_dict(),
            **{name: getattr(self, name).state_dict() for name in (*NETWORKS, *self.extra)},
        }

    @property
    def extra(self) -> tuple[str, ...]:
        return ("features", "f_optimiser") if self.features else ()

    def load_state_dict(self, state: dict) -> None:
        """Checkpoints of the first version lack the distances, path_mean and augmentation: they are as at the start."""
        self.step, self.seconds = state["step"], state["seconds"]
        self.best_fid, self.fid_at = state.get("best_fid", float("inf")), state.get("fid_at", 0)
        self.path_mean.fill_(state.get("path_mean", 0.0))
        if "augmentation" in state:
            self.augmentation.load_state_dict(state["augmentation"])
        optimisers = (self.g_optimiser, self.d_optimiser)
        settings = [(o.param_groups[0]["lr"], o.param_groups[0]["betas"]) for o in optimisers]
        for name in NETWORKS:
            getattr(self, name).load_state_dict(state[name])
        # The optimisers bring the settings they were saved with; the configuration decides.
        for optimiser, (rate, betas) in zip(optimisers, settings, strict=True):
            for group in optimiser.param_groups:
                group["lr"], group["betas"] = rate, betas
        for name in self.extra:  # a run may take it up, or drop it, on its way
            if name in state:
                getattr(self, name).load_state_dict(state[name])

    def latents(self, rng: torch.Generator, count: int) -> Tensor:
        return torch.randn(count, self.config.z_dim, generator=rng, device=self.device)

    def styles(self, rng: torch.Generator, count: int) -> Tensor:
        """ws (count, num_ws, w_dim); with probability ``style_mixing`` two latents share a picture."""
        generator, config = self.generator, self.config
        w = generator.mapping(self.latents(rng, count))
        with torch.no_grad():
            generator.mapping.w_avg.lerp_(w.detach().mean(dim=0), 0.002)
        num_ws = generator.synthesis.num_ws
        ws = w[:, None].expand(-1, num_ws, -1)
        if torch.rand([], generator=rng, device=self.device) < config.style_mixing:
            cut = torch.randint(1, num_ws, [], generator=rng, device=self.device)
            other = generator.mapping(self.latents(rng, count))[:, None]
            ws = torch.where((torch.arange(num_ws, device=self.device) < cut)[None, :, None], ws, other)
        return ws

    def fakes(self, rng: torch.Generator) -> Tensor:
        ws = self.styles(rng, self.config.batch)
        fakes = self.synthesise(ws, self.generator.synthesis.random_noises(len(ws), rng))
        return self.augmentation(fakes, rng)

    def train_step(self, reals: Tensor) -> dict[str, float]:
        """One update of each network.  reals (batch, 3, R, R) in [-1, 1]."""
        config = self.config
        rng = torch.Generator(self.device).manual_seed((config.seed << 40) + self.step)
        reals = self.augmentation(reals.contiguous(memory_format=torch.channels_last), rng)
        with torch.no_grad():
            fakes = self.fakes(rng)
        real_logits, fake_logits = self.discriminate(reals), self.discriminate(fakes)
        d_loss = discriminator_loss(real_logits, fake_logits)
        self.update(self.d_optimiser, d_loss)
        report = {"d_loss": d_loss.item(), "real": real_logits.mean().item(), "fake": fake_logits.mean().item()}
        if self.step % config.r1_interval == 0:
            penalty = r1_penalty(self.discriminator, reals)
            self.update(self.d_optimiser, penalty * (config.r1_gamma / 2 * config.r1_interval))
            report["r1"] = penalty.item()
        if self.features:
            report |= self.features_step(self.features, reals, fakes)

        judges = [self.discriminator, *([self.features] if self.features else [])]
        for judge in judges:
            judge.requires_grad_(False)
        fakes = self.fakes(rng)
        g_loss = generator_loss(self.discriminate(fakes))
        report["g_loss"] = g_loss.item()
        if self.features:
            g_loss = g_loss + config.features * generator_loss(self.features(fakes))
        self.update(self.g_optimiser, g_loss)
        for judge in judges:
            judge.requires_grad_(True)
        if config.path_length and self.step % PATH_INTERVAL == 0:
            report["path"] = self.path_step(rng)
        if config.ada:
            self.augmentation.adapt(real_logits)
            report["p"] = self.augmentation.p
        self.step += 1
        self.average()
        return report

    def features_step(self, features: FeatureDiscriminator, reals: Tensor, fakes: Tensor) -> dict[str, float]:
        """One update of the feature discriminator, with a lazy R1 penalty of its own."""
        real_logits, fake_logits = features(reals), features(fakes)
        self.update(self.f_optimiser, discriminator_loss(real_logits, fake_logits))
        if self.step % self.config.r1_interval == 0:
            penalty = r1_penalty(features, reals) * (R1_GAMMA / 2 * self.config.r1_interval)
            self.update(self.f_optimiser, penalty)
        return {"f_real": real_logits.mean().item(), "f_fake": fake_logits.mean().item()}

    def path_step(self, rng: torch.Generator) -> float:
        """Pull the lengths of half a batch to their running mean.  returns their mean"""
        ws = self.styles(rng, max(1, self.config.batch // 2))
        synthesis = self.generator.synthesis
        lengths = path_lengths(synthesis(ws, synthesis.random_noises(len(ws), rng)), ws, rng)
        self.path_mean.lerp_(lengths.detach().mean(), PATH_DECAY)
        penalty = (lengths - self.path_mean).square().mean()
        self.update(self.g_optimiser, penalty * (self.config.path_length * PATH_INTERVAL))
        return lengths.mean().item()

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


def usable(device: str) -> torch.device:
    """The device, if it can hold a tensor here; BackendError otherwise."""
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA raises the second
        reason = str(error).strip().splitlines()[0]
        raise BackendError(f"cannot use the device {device!r}: {reason}; expected cpu, cuda or cuda:N") from error
    return torch.device(device)


def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's and the number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
