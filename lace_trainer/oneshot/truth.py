"""Exact samples of a condition: plain noise that the heads accept. What maps are fitted to, and judged by.

Where a condition has statements with open targets (age=?), a sample's own value makes its target: a latent whose age
is u belongs to all targets within the tolerance of u, so that (latent, u + even noise within the tolerance) is an exact
pair, and pairs are kept so that targets are spread evenly over their range.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engine.condition import Condition
from engine.errors import LaceError
from engine.oneshot import Wish
from engine.reference.posterior import Settings, accepts
from engine.tape import Tape, lower, lower_crisp
from lace_trainer.oneshot.world import World

Progress = Callable[[int, int, str], None]

BLOCK = 4096
LEAST, MOST = 6_000, 40_000
# Plain latents that may be drawn for a truth: two minutes of one core on a small generator.
BUDGET = 16_000_000
# Of the latents that are drawn first to find how rare the wish is.
PILOT = 32_768
BINS = 8  # of an open target's range, which are to have as many pairs each


@dataclass(frozen=True, slots=True, eq=False)
class Truth:
    """n exact samples: z (n, z_dim), and targets (n, T) of the statements that are open.

    drawn   plain latents that it took
    """

    z: Tensor
    targets: Tensor
    drawn: int

    @property
    def rate(self) -> float:
        return len(self.z) / self.drawn


def tolerances_of(world: World) -> dict[str, float]:
    return {name: a.tolerance for name, a in world.attributes.items() if a.tolerance}


def tape_of(world: World, condition: Condition | None, settings: Settings) -> Tape:
    """The condition as a probability, as engine.starts lowers it."""
    if settings.confidence is None:
        return lower(condition, world.attributes)
    return lower_crisp(condition, world.attributes, tolerances_of(world))


@torch.no_grad()
def draw_truth(world: World, wish: Wish, settings: Settings, *, least: int = LEAST, most: int = MOST,
               budget: int = BUDGET, seed: int = 0, progress: Progress | None = None) -> Truth:
    """As many exact samples as the budget gives, up to ``most``. LaceError where it does not give ``least``."""
    rng, picked, drawn, kept = torch.Generator().manual_seed(seed), Picked(wish, most), 0, 0
    tape = tape_of(world, wish.rest(), settings)
    while not picked.is_full and drawn < budget:
        x = torch.randn(BLOCK, world.width, generator=rng)
        chance = torch.rand(BLOCK, generator=rng, dtype=torch.float64).numpy()
        good = torch.from_numpy(accepts(settings, world.log_p(x, tape).double().numpy(), chance))
        if bool(good.any()):
            picked.add(*open_targets(world, wish, x[good], rng))
        drawn += BLOCK
        if drawn == PILOT and picked.count * budget / drawn < least:
            kept = int(picked.count * budget / drawn)
            break
        if progress:
            progress(picked.count, most, f"exact samples, 1 of {drawn / max(1, picked.count):.0f} plain ones")
    if picked.count < least:
        raise LaceError(f"{wish.text} is too rare for a map: {budget:,} plain latents hold about "
                        f"{kept or picked.count} exact samples, and {least} are needed; ask for less, lower "
                        "--confidence, or take the posterior, which needs no training")
    z, targets = picked.joined()
    return Truth(z, targets, drawn)


def open_targets(world: World, wish: Wish, z: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Samples of what is not open, with targets (n, T) that they meet; only those whose targets are in range."""
    names = list(wish.targets)
    if not names:
        return z, z.new_zeros(len(z), 0)
    logits, tolerances = world.logits(z, world.map(z), names), tolerances_of(world)
    u = torch.cat([logits[name] for name in names], dim=1)
    width = torch.tensor([tolerances[name] for name in names])
    targets = u + width * (2 * torch.rand(u.shape, generator=rng) - 1)
    low, high = torch.tensor(list(wish.targets.values())).T
    inside = ((targets >= low) & (targets <= high)).all(dim=1)
    return z[inside], targets[inside]


class Picked:
    """Samples that are kept: of every cell of the targets' ranges as many as of the others."""

    def __init__(self, wish: Wish, most: int):
        self.ranges = np.array(list(wish.targets.values())).reshape(-1, 2)
        self.bins = max(2, int(BINS ** (1 / max(1, len(self.ranges))) + 0.5)) if len(self.ranges) else 1
        self.room = np.full(self.bins ** len(self.ranges), max(1, most // self.bins ** len(self.ranges)))
        self.z: list[Tensor] = []
        self.targets: list[Tensor] = []
        self.count = 0

    @property
    def is_full(self) -> bool:
        return not self.room.any()

    def add(self, z: Tensor, targets: Tensor) -> None:
        cell = np.zeros(len(z), int)
        for column, (low, high) in zip(targets.T.numpy(), self.ranges, strict=True):
            cell = cell * self.bins + np.minimum((column - low) / (high - low) * self.bins, self.bins - 1).astype(int)
        keep = np.zeros(len(z), bool)
        for number in np.unique(cell):
            some = np.flatnonzero(cell == number)[: self.room[number]]
            keep[some] = True
            self.room[number] -= len(some)
        chosen = torch.from_numpy(keep)
        self.z.append(z[chosen])
        self.targets.append(targets[chosen])
        self.count += int(keep.sum())

    def joined(self) -> tuple[Tensor, Tensor]:
        return torch.cat(self.z), torch.cat(self.targets)
