"""How far what a map makes is from exact samples that it was not fitted to, and whether that is too far."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import log

import numpy as np
import torch
from numpy import ndarray as Array
from torch import Tensor

from engine.condition import Condition, Or
from engine.errors import LaceError
from engine.oneshot import Wish
from engine.reference.posterior import Settings
from engine.reference.posterior import polish as polished_rows
from lace_trainer.judges.metrics import distance, neighbours, reaches
from lace_trainer.oneshot.training import ResidualMap
from lace_trainer.oneshot.truth import Truth, tape_of, tapes_of, tolerances_of
from lace_trainer.oneshot.world import World

ROWS = 8000  # that a map makes to be judged
NEAR = 2000  # of them, and of exact samples, whose neighbours are looked at: the cost is the square
POLISH = 4  # steps after which the distances are measured too
# More than a map of the demo is off by where its training worked (see docs/oneshot.md), and less than one that has lost
# a branch, or has not learnt its condition.
LEAST_HOLDS, MOST_OTHERS, MOST_BRANCH, LEAST_COVERAGE, MOST_DUPLICATES = -0.05, 0.05, 0.05, -0.10, 0.10
MOST_UNEVEN = 0.02  # nats


class TooFar(LaceError):
    """A map that is not worth writing."""


@dataclass(frozen=True, slots=True, eq=False)
class Judged:
    """What n latents show: labels (n, attributes), standardised w (n, w_dim), whether the condition holds and whether
    the heads are sure enough (n,), of each branch of an OR the share, and the mean error of open targets."""

    labels: Array
    w: Array
    holds: Array
    sure: Array
    branches: tuple[float, ...]
    error: float


class Judge:
    """Compares rows with held-out exact samples."""

    def __init__(self, world: World, wish: Wish, settings: Settings, truth: Truth):
        self.world, self.wish, self.settings, self.truth = world, wish, settings, truth
        self.tapes = tapes_of(world, wish, settings)
        rest = wish.rest()
        self.branches: tuple[Condition, ...] = rest.parts if isinstance(rest, Or) else ()
        with torch.no_grad():
            w = world.map(truth.z)
        self.centre, self.spread = w.mean(dim=0), w.std(dim=0) + 1e-6
        self.true = self.look(truth.z, truth.targets)

    @torch.no_grad()
    def look(self, z: Tensor, targets: Tensor) -> Judged:
        world, names = self.world, list(self.world.attributes)
        w = world.map(z)
        logits = world.logits(z, w, names)
        labels = [(logits[n].argmax(dim=1) if world.attributes[n].kind == "class" else logits[n][:, 0]) for n in names]
        log_p, error, met = world.log_p(z, self.tapes).amax(dim=0), 0.0, torch.ones(len(z), dtype=torch.bool)
        for i, name in enumerate(self.wish.targets):
            off = (logits[name][:, 0] - targets[:, i]).abs()
            met &= off <= tolerances_of(world)[name]
            error = max(error, float(off.mean()))
        sure = met & (log_p > log(self.settings.confidence)) if self.settings.confidence is not None else met
        parts = [tape_of(world, part, self.settings) for part in self.branches]
        branches = [float(share) for share in (world.log_p(z, parts) > log(0.5)).float().mean(dim=1)] if parts else []
        return Judged(torch.stack([label.float() for label in labels], dim=1).numpy(),
                      ((w - self.centre) / self.spread).numpy(), (met & (log_p > log(0.5))).numpy(), sure.numpy(),
                      tuple(branches), error)

    def measure(self, found: Judged) -> dict[str, float]:
        """Distances of rows from the truth, each beside its value for exact samples (``_exact``) or by chance."""
        names, others = list(self.world.attributes), []
        half = len(self.true.labels) // 2
        order = np.random.default_rng(0).permutation(len(self.true.labels))
        for i, name in enumerate(names):
            if name in self.wish.names:
                continue
            kind, count = self.world.attributes[name].kind, len(self.world.attributes[name].classes)
            own = self.true.labels[:, i]
            others.append((distance(kind, own, found.labels[:, i], count),
                           distance(kind, own[order[:half]], own[order[half:]], count)))
        distances, chance = np.array(others).reshape(-1, 2).T
        near = min(NEAR, half)
        base, exact, made = self.true.w[order[:near]], self.true.w[order[-near:]], found.w[:near]
        against, floor = neighbours(base, made), neighbours(base, exact)
        closest = np.quantile(reaches(exact, 1), 0.01)
        facts = {
            "holds": found.holds.mean(), "holds_exact": self.true.holds.mean(), "sure": found.sure.mean(),
            "others": distances.mean(), "others_chance": chance.mean(), "others_most": distances.max(),
            "others_most_chance": chance.max(), "precision": against.precision, "precision_exact": floor.precision,
            "coverage": against.coverage, "coverage_exact": floor.coverage,
            # By chance one in a hundred, of rows whose nearest neighbour is as near as that of few exact samples.
            "duplicates": (reaches(made, 1) < closest).mean(),
        }
        if self.branches:
            facts["branch"] = max(abs(a - b) for a, b in zip(found.branches, self.true.branches, strict=True))
        if self.wish.even:
            facts["uneven"] = self.uneven(found.labels)
        if self.wish.targets:
            facts |= {"error": found.error, "error_exact": self.true.error}
        return {name: round(float(value), 5) for name, value in facts.items()}

    def uneven(self, labels: Array) -> float:
        """Kullback-Leibler divergence of the joint classes of labels (n, attributes) from even ones, in nats."""
        names, sizes = list(self.world.attributes), [len(self.world.attributes[n].classes) for n in self.wish.even]
        cell = np.ravel_multi_index([labels[:, names.index(name)].astype(int) for name in self.wish.even], sizes)
        share = np.bincount(cell, minlength=int(np.prod(sizes))) / len(cell)
        return float(np.sum(share[share > 0] * np.log(share[share > 0] * len(share))))


def judge(judge: Judge, network: ResidualMap, *, seed: int = 0) -> dict[str, float]:
    """Of what a map makes, and of the same after POLISH steps (polished_...)."""
    rng, truth = torch.Generator().manual_seed(seed), judge.truth
    some = torch.randint(len(truth.z), (ROWS,), generator=rng)
    targets = truth.targets[some]
    with torch.no_grad():
        z = network(torch.randn(ROWS, network.world.width, generator=rng), targets)
    facts = judge.measure(judge.look(z, targets))
    if judge.wish.even:
        plain = torch.randn(ROWS, network.world.width, generator=rng)
        return facts | {"uneven_plain": round(judge.uneven(judge.look(plain, targets).labels), 5)}
    better = torch.from_numpy(polish(judge, z, targets))
    after = judge.measure(judge.look(better, targets))
    return facts | {f"polished_{name}": after[name] for name in ("holds", "sure", "others", "others_most", "branch",
                                                                "coverage", "error") if name in after}


def polish(judge: Judge, z: Tensor, targets: Tensor) -> Array:
    """Rows after POLISH steps of preconditioned Crank-Nicolson, each towards its own targets."""

    class Rows:
        noise_dim = judge.world.width

        def log_p(self, rows: Array, x: Array) -> tuple[Array, Array]:
            at = torch.from_numpy(np.ascontiguousarray(x, np.float32))
            log_p = judge.world.log_p(at, judge.tapes)[0].double().numpy()
            off = missed_targets(judge, at, targets[torch.from_numpy(rows)])
            return log_p - 0.5 * np.square(off / 0.1), np.where(off > 0, -1e4, log_p)

        def approach(self, rows: Array, x: Array) -> Array:
            return x

    return polished_rows(Rows(), list(range(len(z))), judge.settings, z.numpy(), POLISH).x


@torch.no_grad()
def missed_targets(judge: Judge, z: Tensor, targets: Tensor) -> Array:
    """How far (n,) open targets are from being met, 0 where they are."""
    names = list(judge.wish.targets)
    if not names:
        return np.zeros(len(z))
    logits, tolerances = judge.world.logits(z, judge.world.map(z), names), tolerances_of(judge.world)
    off = torch.stack([((logits[name][:, 0] - targets[:, i]).abs() - tolerances[name]).clamp(min=0)
                       for i, name in enumerate(names)])
    return off.sum(dim=0).double().numpy()


def refuse(measured: Mapping[str, float]) -> None:
    """Raises TooFar for a map that is too far from the truth, and says by how much."""
    limits = (
        ("the condition holds of", measured["holds"], measured["holds_exact"] + LEAST_HOLDS, True),
        ("the mean distance of other attributes is", measured["others"], MOST_OTHERS + measured["others_chance"],
         False),
        ("a branch of the OR is off by", measured.get("branch", 0.0), MOST_BRANCH, False),
        ("the divergence from even classes is", measured.get("uneven", 0.0), MOST_UNEVEN, False),
        ("its coverage is", measured["coverage"], measured["coverage_exact"] + LEAST_COVERAGE, True),
        ("the share of near duplicates is", measured["duplicates"], MOST_DUPLICATES, False),
    )
    far = [f"{what} {value:.3f}, expected at {'least' if is_least else 'most'} {limit:.3f}"
           for what, value, limit, is_least in limits if (value < limit if is_least else value > limit)]
    if far:
        raise TooFar(f"the map is too far from exact samples, and nothing was written: {'; '.join(far)}. Train it with "
                     "more --steps or --samples, or take the posterior, which needs no training")


