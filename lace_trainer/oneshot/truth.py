"""Exact samples of a condition: plain noise that the heads accept. What maps are fitted to, and judged by.

Where a condition has statements with open targets (age=?), a sample's own value makes its target: a latent whose age
is u belongs to all targets within the tolerance of u, so that (latent, u + even noise within the tolerance) is an exact
pair, and pairs are kept so that targets are spread evenly over their range.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from itertools import product
from operator import and_

import numpy as np
import torch
from torch import Tensor

from engine.condition import Condition, Is
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


def tapes_of(world: World, wish: Wish, settings: Settings) -> list[Tape]:
    """What is not open; where attributes are to be even, once with each combination of their classes."""
    rest, tapes = wish.rest(), []
    for classes in product(*(world.attributes[name].classes for name in wish.even)):
        cell = [Is(name, choice) for name, choice in zip(wish.even, classes, strict=True)]
        parts = cell if rest is None else [rest, *cell]
        tapes.append(tape_of(world, reduce(and_, parts) if parts else None, settings))
    return tapes


@torch.no_grad()
def draw_truth(world: World, wish: Wish, settings: Settings, *, least: int = LEAST, most: int = MOST,
               budget: int = BUDGET, seed: int = 0, progress: Progress | None = None) -> Truth:
    """As many exact samples as the budget gives, up to ``most``. LaceError where it does not give ``least``."""
    tapes = tapes_of(world, wish, settings)
    rng, picked, drawn = torch.Generator().manual_seed(seed), Picked(wish, most, len(tapes)), 0
    while not picked.is_full and drawn < budget:
        x = torch.randn(BLOCK, world.width, generator=rng)
        chance = torch.rand(BLOCK, generator=rng, dtype=torch.float64).numpy()
        for cell, log_p in enumerate(world.log_p(x, tapes)):
            good = torch.from_numpy(accepts(settings, log_p.double().numpy(), chance))
            if bool(good.any()):
                picked.add(*open_targets(world, wish, x[good], rng), cell)
        drawn += BLOCK
        if drawn == PILOT and picked.foreseen(budget / drawn) < least:
            raise too_rare(wish, picked.foreseen(budget / drawn), least, budget)
        if progress:
            progress(picked.count, most, f"exact samples, 1 of {drawn / max(1, picked.count):.0f} plain ones")
    z, targets = picked.joined()
    if len(z) < least:
        raise too_rare(wish, len(z), least, budget)
    return Truth(z, targets, drawn)


def too_rare(wish: Wish, found: int, least: int, budget: int) -> LaceError:
    what = f"{wish.text!r}{f', even in {chr(32).join(wish.even)},' if wish.even else ''}"
    return LaceError(f"{what} is too rare for a map: {budget:,} plain latents hold about {found:,} exact samples, and "
                     f"{least:,} are needed; ask for less, lower --confidence, or take the posterior, which needs no "
                     "training")


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
    """Samples that are kept: of every class that is to be even, and of all parts of targets' ranges, as many."""

    def __init__(self, wish: Wish, most: int, cells: int = 1):
        self.ranges = np.array(list(wish.targets.values())).reshape(-1, 2)
        self.bins = max(2, int(BINS ** (1 / max(1, len(self.ranges))) + 0.5)) if len(self.ranges) else 1
        each = self.bins ** len(self.ranges)
        self.most = np.full((cells, each), max(1, most // (cells * each)))
        self.held = np.zeros_like(self.most)
        self.z: list[list[Tensor]] = [[] for _ in range(cells)]
        self.targets: list[list[Tensor]] = [[] for _ in range(cells)]

    @property
    def is_full(self) -> bool:
        return bool((self.held == self.most).all())

    @property
    def count(self) -> int:
        return int(self.held.sum())

    def foreseen(self, times: float) -> int:
        """Samples after so many times as many latents: of every class as many as of the rarest."""
        return int(len(self.held) * self.held.sum(axis=1).min() * times)

    def add(self, z: Tensor, targets: Tensor, cell: int = 0) -> None:
        place = np.zeros(len(z), int)
        for column, (low, high) in zip(targets.T.numpy(), self.ranges, strict=True):
            place = place * self.bins + np.minimum((column - low) / (high - low) * self.bins, self.bins - 1).astype(int)
        keep = np.zeros(len(z), bool)
        for number in np.unique(place):
            room = self.most[cell, number] - self.held[cell, number]
            some = np.flatnonzero(place == number)[:room]
            keep[some] = True
            self.held[cell, number] += len(some)
        chosen = torch.from_numpy(keep)
        self.z[cell].append(z[chosen])
        self.targets[cell].append(targets[chosen])

    def joined(self) -> tuple[Tensor, Tensor]:
        """z (n, z_dim), targets (n, T), in no order, of every class as many as of the rarest."""
        if not all(self.z):
            return torch.zeros(0, 0), torch.zeros(0, 0)
        z, targets = ([torch.cat(parts) for parts in own] for own in (self.z, self.targets))
        size = min(map(len, z))
        order = torch.randperm(size * len(z), generator=torch.Generator().manual_seed(0))
        return torch.cat([part[:size] for part in z])[order], torch.cat([part[:size] for part in targets])[order]
