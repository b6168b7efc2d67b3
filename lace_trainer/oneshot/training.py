"""Fit a residual map to exact samples, by energy distance.

z -> z' in blocks, z <- z + dense([z, w(z), targets]). That a block sees w is what makes it good; its inputs pass on no
gradient, so that the way back is through the frozen heads and the sum alone.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from math import log

import torch
from numpy import ndarray as Array
from torch import Tensor, nn
from torch.nn import functional as F

from lace_trainer.judges.classifier import one_cycle
from lace_trainer.oneshot.distance import MOVED, Features, distance, outside
from lace_trainer.oneshot.truth import Truth
from lace_trainer.oneshot.world import World

Progress = Callable[[int, int, str], None]

LEAST = log(0.7)  # log P from which on a row counts as inside: above what makes a statement hold


@dataclass(frozen=True, slots=True)
class MapConfig:
    """``steps`` of ``rows`` against ``truth_rows`` exact samples. average: decay of the mean of the weights, which is
    kept."""

    hidden: tuple[int, ...] = (256, 256, 256)
    blocks: int = 2
    steps: int = 1500
    rows: int = 384
    truth_rows: int = 1024
    learning_rate: float = 2e-3
    average: float = 0.99
    seed: int = 0


class ResidualMap(nn.Module):
    """noise (n, z_dim), targets (n, T) -> z (n, z_dim), at the world's truncation."""

    def __init__(self, world: World, config: MapConfig, truth: Truth):
        super().__init__()
        self.world = world
        with torch.no_grad():
            w = world.map(truth.z)
            self.centre = torch.cat([torch.zeros(world.width), w.mean(dim=0), truth.targets.mean(dim=0)])
            spread = truth.targets.std(dim=0) if truth.targets.shape[1] else truth.targets[0]
            self.spread = torch.cat([torch.ones(world.width), w.std(dim=0), spread]) + 1e-6
        torch.manual_seed(config.seed)
        widths = (len(self.centre), *config.hidden, world.width)
        self.blocks = nn.ModuleList(
            nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))
            for _ in range(config.blocks))
        for block in self.blocks:
            nn.init.zeros_(block[-1].weight)  # type: ignore[index]
            nn.init.zeros_(block[-1].bias)  # type: ignore[index]

    def forward(self, noise: Tensor, targets: Tensor) -> Tensor:
        z = noise
        for block in self.blocks:
            with torch.no_grad():
                x = (torch.cat([z, self.world.map(z), targets], dim=1) - self.centre) / self.spread
            for i, layer in enumerate(block):  # type: ignore[arg-type]
                x = layer(F.silu(x) if i else x)
            z = z + x
        return z

    @torch.no_grad()
    def layers(self) -> list[list[tuple[Array, Array]]]:
        """Weights and biases of each block for inputs that are not standardised."""
        found = []
        for block in self.blocks:
            stack = [(layer.weight.clone(), layer.bias.clone()) for layer in block]  # type: ignore[union-attr]
            weight = stack[0][0] / self.spread
            stack[0] = weight, stack[0][1] - weight @ self.centre
            found.append([(weight.numpy(), bias.numpy()) for weight, bias in stack])
        return found


def fit(world: World, features: Features, truth: Truth, config: MapConfig, *,
        progress: Progress | None = None) -> tuple[ResidualMap, float]:
    """The map, and the seconds that it took."""
    began = time.perf_counter()
    network, rng = ResidualMap(world, config, truth), torch.Generator().manual_seed(config.seed)
    optimiser = torch.optim.AdamW(network.parameters(), lr=config.learning_rate)
    mean = [p.detach().clone() for p in network.parameters()]
    with torch.no_grad():
        true = features(truth.z, truth.targets)
    size = min(config.truth_rows, len(truth.z))
    for step in range(config.steps):
        optimiser.param_groups[0]["lr"] = config.learning_rate * one_cycle(step, config.steps)
        # With open targets both sides have the same ones, or their spread would count as distance.
        some = torch.randperm(len(truth.z), generator=rng)[:size]
        own = some[torch.randperm(size, generator=rng)[: config.rows]]
        noise = torch.randn(len(own), world.width, generator=rng)
        z = network(noise, truth.targets[own])
        made = features(z, truth.targets[own])
        loss = distance(made, true.rows(some)) + outside(made, LEAST) + MOVED * (z - noise).square().sum(dim=1).mean()
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimiser.step()
        decay = min(config.average, (1 + step) / (10 + step))
        for kept, parameter in zip(mean, network.parameters(), strict=True):
            kept.lerp_(parameter.detach(), 1 - decay)
        if progress and step % 20 == 19:
            progress(step + 1, config.steps, f"distance {float(loss.detach()):.4f}")
    with torch.no_grad():
        for parameter, kept in zip(network.parameters(), mean, strict=True):
            parameter.copy_(kept)
    return network, round(time.perf_counter() - began, 1)
