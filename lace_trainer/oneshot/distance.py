"""The distance that a map is fitted by: the energy distance, between its rows and exact samples, in what they show.

ED(a, b) = 2 E|a - b| - E|a - a'| - E|b - b'| is zero only between equal distributions, whatever is measured, so that
any features may be compared: those that follow say what a condition asks for, what pictures show otherwise, and where
latents are.

Szekely and Rizzo, "Energy statistics: a class of statistics based on distances", Journal of Statistical Planning and
Inference 2013.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.tape import Tape
from lace_trainer.oneshot.world import World, log_probability, read_columns

FLOOR = -4.0  # log P below which rows are alike: nowhere near
DEEPEST = -12.0  # log P below which a row is not pulled any more: it would be pulled to the wrong place
SURE = 3.0  # weight of P: near the boundary of a confidence log P hardly moves
# Weights of the terms.
ASKED, OTHERS, LATENT_W, LATENT_Z, MOVED, OUTSIDE = 3.0, 1.0, 0.5, 0.5, 1e-3, 0.5


def energy_distance(a: Tensor, b: Tensor) -> Tensor:
    """Between rows a (n, d) and b (m, d), with gradients by a, but for E|b - b'|, which no map can change."""
    n = len(a)
    return 2 * distances(a, b).mean() - distances(a, a).sum() / (n * (n - 1))


def distances(a: Tensor, b: Tensor) -> Tensor:
    """|a_i - b_j| (n, m), of products: cdist keeps differences (n, m, d), which is twenty times dearer."""
    squares = torch.addmm(a.square().sum(dim=1)[:, None] + b.square().sum(dim=1), a, b.T, alpha=-2)
    return squares.clamp(min=1e-6).sqrt()


@dataclass(frozen=True, slots=True, eq=False)
class Shown:
    """What rows show: log_p (n,), and on scales of their own asked (n, r), sure (n, 2), others (n, k), w (n, w_dim),
    z (n, z_dim)."""

    log_p: Tensor
    asked: Tensor
    sure: Tensor
    others: Tensor
    w: Tensor
    z: Tensor

    def rows(self, some: Tensor) -> "Shown":
        return Shown(*(getattr(self, name)[some] for name in self.__slots__))


class Features:
    """What is compared, with the scales of exact samples.

    tapes     of what is not open: a row is to satisfy one of them
    targets   attributes of the open ones
    """

    def __init__(self, world: World, tapes: Sequence[Tape], targets: Sequence[str], truth: Tensor):
        self.world, self.tapes, self.targets = world, tapes, targets
        self.columns = list(dict.fromkeys(column for tape in tapes for column in tape.columns))
        self.names = list(world.attributes)
        with torch.no_grad():
            w = world.map(truth)
            self.centre, self.spread = w.mean(dim=0), w.std(dim=0) + 1e-6
            logits = world.logits(truth, w, self.names)
        self.scales = {name: float(logits[name].std()) + 1e-6 for name in self.names}

    def __call__(self, z: Tensor, targets: Tensor) -> Shown:
        """z (n, z_dim), targets (n, T), which are part of all but the latents."""
        w = self.world.map(z)
        logits = self.world.logits(z, w, self.names)
        each = [log_probability(tape, read_columns(tape.columns, logits, len(z)), relaxed=True) for tape in self.tapes]
        log_p, columns = torch.stack(each).amax(dim=0), read_columns(self.columns, logits, len(z))
        sure = torch.stack([SURE * log_p.exp(), log_p.clamp(min=FLOOR)], dim=1)
        own = [targets[:, i : i + 1] / self.scales[name] for i, name in enumerate(self.targets)]
        gaps = [(logits[name] - targets[:, i : i + 1]) / 0.05 for i, name in enumerate(self.targets)]
        asked = torch.cat([columns / self.column_scales(), *gaps, *own], dim=1)
        others = torch.cat([self.look(name, logits[name]) for name in self.names] + own, dim=1)
        return Shown(log_p, asked, sure, others, (w - self.centre) / self.spread, z)

    def column_scales(self) -> Tensor:
        return torch.tensor([self.scales[column.attribute] for column in self.columns])

    def look(self, name: str, logits: Tensor) -> Tensor:
        """A value on the scale of its spread; of a class its probabilities, and their logarithms down to FLOOR."""
        if self.world.attributes[name].kind == "value":
            return logits / self.scales[name]
        log_p = logits.log_softmax(dim=1)
        return torch.cat([log_p.exp(), 0.5 * log_p.clamp(min=FLOOR)], dim=1)


def distance(made: Shown, true: Shown) -> Tensor:
    """The weighted sum over what is compared."""
    asked = energy_distance(made.sure, true.sure)
    if made.asked.shape[1]:
        asked = asked + energy_distance(made.asked, true.asked)
    return (ASKED * asked + OTHERS * energy_distance(made.others, true.others)
            + LATENT_W * energy_distance(made.w, true.w) + LATENT_Z * energy_distance(made.z, true.z))


def outside(made: Shown, least: float) -> Tensor:
    """Mean of how much log P lacks of ``least``: what a distance forgives, because so few rows are outside."""
    return OUTSIDE * (least - made.log_p).clamp(min=0, max=-DEEPEST).mean()
