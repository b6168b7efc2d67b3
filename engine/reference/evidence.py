"""How rare a wish is: log of the prior's share that a condition leaves, log P(x in set) or log E[P(x)^g].

Common wishes are counted. For rare ones that would take a hundred latents for each hit, so the set is approached in
levels of the relaxed log P, each holding a tenth of the one before (subset simulation): P is the product of the shares.
The crisp set lies in all levels, because a relaxed log P is never below the crisp one.

With a guidance, E[P^g] is what is averaged, and in place of levels come powers of P that rise to g (annealed
importance sampling with resampling).

Au and Beck, "Estimation of small failure probabilities in high dimensions by subset simulation", Probabilistic
Engineering Mechanics 2001; Neal, "Annealed importance sampling", Statistics and Computing 2001.
"""

from dataclasses import dataclass

import numpy as np
from numpy import ndarray as Array

from engine.errors import SolveError
from engine.reference.noise import normals_many
from engine.reference.posterior import STEP_STREAM, Settings, World, chances, moves, proposal, sizes

BLOCK = 4096  # latents at a time
MOST_COUNTED = 400_000  # what 1 in 1,000 takes to be known within 0.1
CHAINS = 4096  # of the levels
SHARE = 0.1  # of a level that the next one keeps
SWEEPS = 12  # steps of each chain in a level
MOST_LEVELS = 24
# Seeds of the latents, far from those of requests.
FIRST_SEED = 2**60


@dataclass(frozen=True, slots=True)
class Evidence:
    """log_p   log of the share; ``error``: twice its standard error, as far as it can tell
    evaluations   of the heads;  counted: whether by counting alone
    """

    log_p: float
    error: float
    evaluations: int
    counted: bool

    @property
    def one_in(self) -> float:
        return float(np.exp(-self.log_p))


def evidence(world: World, settings: Settings, *, error: float = 0.1, seed: int = 0) -> Evidence:
    """Of the condition of row 0 of ``world``; the logarithm is within ``error`` 19 times in 20.

    Raises SolveError for an error that is not above 0, and for a wish that no latent comes near.
    """
    if not error > 0:
        raise SolveError(f"the error is {error}: expected a number greater than 0")
    found = count(world, settings, error, seed)
    return found if found.error <= error else in_levels(world, settings, error, seed, found)


def weights(settings: Settings, crisp: Array) -> Array:
    """What each latent contributes (n,): whether it is in the set, or P^g."""
    if settings.confidence is not None:
        return (crisp > np.log(settings.confidence)).astype(float)
    assert settings.guidance is not None
    return np.exp(settings.guidance * crisp)


def count(world: World, settings: Settings, error: float, seed: int) -> Evidence:
    """The mean of the weights, until it is known well enough or MOST_COUNTED latents are spent."""
    total = square = 0.0
    n = 0
    while n < MOST_COUNTED:
        seeds = [FIRST_SEED + seed * MOST_COUNTED + n + i for i in range(min(BLOCK, MOST_COUNTED - n))]
        x = normals_many(seeds, [0] * len(seeds), world.noise_dim)
        found = weights(settings, world.log_p(np.zeros(len(x), int), x)[1])
        total, square, n = total + found.sum(), square + np.square(found).sum(), n + len(x)
        if total > 0 and relative_error(total, square, n) <= error:
            break
        # It will not do: stop before all is spent.
        if n >= 8 * BLOCK and total * error**2 * MOST_COUNTED < 2 * n:
            break
    if not total:
        return Evidence(-np.inf, np.inf, n, True)
    return Evidence(float(np.log(total / n)), relative_error(total, square, n), n, True)


def relative_error(total: float, square: float, n: int) -> float:
    """Twice the standard error of a mean of n numbers, over the mean, from their sum and the sum of their squares."""
    mean = total / n
    return 2 * float(np.sqrt(max(square / n - mean * mean, 0.0) / n) / mean)


def in_levels(world: World, settings: Settings, error: float, seed: int, counted: Evidence) -> Evidence:
    """Repeat subset simulation until the runs' mean is known to ``error``; three runs to eight."""
    runs, spent = [], counted.evaluations
    run = levels if settings.confidence is not None else powers
    for number in range(8):
        log_p, evaluations = run(world, settings, seed * 8 + number)
        runs.append(log_p)
        spent += evaluations
        if number >= 2 and (doubt := spread(runs)) <= error:
            return Evidence(log_mean(runs), doubt, spent, False)
    return Evidence(log_mean(runs), spread(runs), spent, False)


def log_mean(runs: list[float]) -> float:
    top = max(runs)
    return top + float(np.log(np.mean(np.exp(np.array(runs) - top))))


def spread(runs: list[float]) -> float:
    """Twice the standard error of ``log_mean``, by the delta method."""
    relative = np.exp(np.array(runs) - log_mean(runs))
    return 2 * float(relative.std(ddof=1) / np.sqrt(len(runs)))


class Chains:
    """CHAINS latents that move by preconditioned Crank-Nicolson, each with its own seed."""

    def __init__(self, world: World, seed: int):
        self.world, self.row = world, np.zeros(CHAINS, int)
        self.seeds = [FIRST_SEED + 2**50 + seed * CHAINS + i for i in range(CHAINS)]
        self.x = normals_many(self.seeds, [0] * CHAINS, world.noise_dim)
        self.relaxed, self.crisp = world.log_p(self.row, self.x)
        self.step, self.evaluations = 0, CHAINS

    def resample(self, weight: Array) -> None:
        """Chains in proportion to weights (CHAINS,), systematically."""
        edges = np.cumsum(weight) / weight.sum()
        start = chances([self.seeds[0]], [STEP_STREAM // 2 + self.step])[0, 0]
        chosen = np.searchsorted(edges, (np.arange(CHAINS) + start) / CHAINS).clip(max=CHAINS - 1)
        self.x, self.relaxed, self.crisp = self.x[chosen], self.relaxed[chosen], self.crisp[chosen]

    def sweep(self, level: float = -np.inf, power: float = 0.0) -> None:
        """SWEEPS steps for the prior times P^power where relaxed log P > level."""
        for _ in range(SWEEPS):
            streams = [STEP_STREAM + self.step] * CHAINS
            chance = chances(self.seeds, streams, 2)
            noise = normals_many(self.seeds, streams, self.world.noise_dim)
            trial = proposal(self.x, noise, sizes(chance[:, 1]))
            relaxed, crisp = self.world.log_p(self.row, trial)
            good = (relaxed > level) & moves(np.full(CHAINS, power), self.relaxed, relaxed, chance[:, 0])
            self.x[good], self.relaxed[good], self.crisp[good] = trial[good], relaxed[good], crisp[good]
            self.step += 1
            self.evaluations += CHAINS


def levels(world: World, settings: Settings, seed: int) -> tuple[float, int]:
    """log P of the restricted set by one subset simulation, and what it took."""
    assert settings.confidence is not None
    chains, last, log_p, level = Chains(world, seed), float(np.log(settings.confidence)), 0.0, -np.inf
    for _ in range(MOST_LEVELS):
        share = float((chains.crisp > last).mean())
        if share >= SHARE or (share > 0 and level == last):  # beyond the last level there is only the set itself
            return log_p + float(np.log(share)), chains.evaluations
        level = min(float(np.quantile(chains.relaxed, 1 - SHARE)), last)
        inside = chains.relaxed > level
        if not inside.any():
            break
        log_p += float(np.log(inside.mean()))
        chains.resample(inside.astype(float))
        chains.sweep(level)
    raise SolveError(f"the wish is rarer than e^{log_p:.0f}, or no latent can grant it: ask for less")


def powers(world: World, settings: Settings, seed: int) -> tuple[float, int]:
    """log E[P^g] by one annealed run; each power is as far from the one before as halves the effective size."""
    assert settings.guidance is not None
    chains, power, log_p = Chains(world, seed), 0.0, 0.0
    while power < settings.guidance:
        ahead = next_power(chains.relaxed, power, settings.guidance)
        weight = np.exp((ahead - power) * chains.relaxed)
        log_p += float(np.log(weight.mean()))
        chains.resample(weight)
        chains.sweep(power=ahead)
        power = ahead
    return log_p, chains.evaluations


def next_power(log_p: Array, power: float, highest: float) -> float:
    """The greatest power up to ``highest`` whose weights have an effective size of half of the rows."""

    def effective(ahead: float) -> float:
        weight = np.exp((ahead - power) * (log_p - log_p.max()))
        return float(weight.sum() ** 2 / np.square(weight).sum() / len(weight))

    if effective(highest) >= 0.5:
        return highest
    low, high = power, highest
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if effective(middle) >= 0.5 else (low, middle)
    return high
