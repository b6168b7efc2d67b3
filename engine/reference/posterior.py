"""Samples of the posterior: the definition of the solver ``posterior``, in numpy.

A condition restricts or weighs the prior of noise x:

    confidence c   the prior where P(condition | x) > c, statements on values being true or false
    guidance g     the prior times P(condition | x)^g, values having their Gaussian energies

P is at most 1, so a candidate of the prior can be accepted or rejected by itself, and what is accepted is an exact
sample. Candidate k of a row is a function of (seed, k) alone: candidates may be evaluated in any number at a time, and
the first one accepted, in order, is the sample.

A row of which no candidate is accepted goes on from its best one (after a few Gauss-Newton steps, if all were far) by
preconditioned Crank-Nicolson, x' = sqrt(1 - b^2) x + b e, which leaves the prior invariant whatever b is: b is drawn
from a mixture, because nobody knows which one suits. Until the row has entered the restricted set it targets the prior
times P^g with g rising; from then on a proposal outside is refused, ``steps`` times. A row that has not entered within
``patience`` steps is given up.

What decides is in small functions of numbers; who evaluates is a ``World``. A row's result does not depend on the other
rows.

Cotter, Roberts, Stuart, White, "MCMC methods for functions", Statistical Science 2013 (preconditioned Crank-Nicolson).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, repeat
from typing import Protocol

import numpy as np
from numpy import ndarray as Array

from engine.errors import ConditionError, SolveError
from engine.reference.noise import normals_many, philox_many

# Streams of a seed. Candidates have those from 0 on, so that candidate 0 is where the flow would begin.
STEP_STREAM = 2**61  # + t: the noise of step t
STEP_BITS = 32  # of a stream that count the steps; those above them are the candidate that the row began with
CHANCE_STREAM = 2**62  # + k: the chance of candidate k; + STEP_STREAM + t: the two of step t
# Step sizes b, which a step draws with equal chance. The longest forgets half of where it was, for wide sets; the
# shortest is accepted where only one in thousands of candidates would be.
SIZES = np.array([0.7, 0.4, 0.25, 0.15, 0.08])
FAR = -3.0  # log P of the best candidate below which Gauss-Newton steps lead nearer
# A row that is outside after so many steps takes Gauss-Newton steps again. Of a wish that 1 in 2,900 plain pictures of
# the demo satisfy 2 % of the rows entered without, and 80 % with them.
STUCK = 24
HIGHEST = 16.0  # the power of P that pulls a row into its set
RISE = 16  # steps in which it gets there


@dataclass(frozen=True, slots=True)
class Settings:
    """What a row may spend.

    confidence   least P(condition | x), in (0, 1); None: ``guidance`` counts
    guidance     power of P; None: ``confidence`` counts
    fresh        candidates of the prior
    steps        of preconditioned Crank-Nicolson inside the set, or at the full guidance
    patience     steps in which a row must enter its set
    """

    confidence: float | None = 0.9
    guidance: float | None = None
    fresh: int = 64
    steps: int = 32
    patience: int = 96

    def __post_init__(self):
        if (self.confidence is None) == (self.guidance is None):
            raise SolveError(f"the posterior has a confidence or a guidance: give one of them, not confidence="
                             f"{self.confidence} and guidance={self.guidance}")
        if self.confidence is not None and not 0 < self.confidence < 1:
            raise SolveError(f"the confidence is {self.confidence}: expected a number between 0 and 1, as 0.9")
        if self.guidance is not None and not 0 < self.guidance < np.inf:
            raise ConditionError(f"the guidance must be a finite number greater than 0, not {self.guidance!r}")
        for name, least in (("fresh", 1), ("steps", 0), ("patience", 0)):
            if getattr(self, name) < least:
                raise SolveError(f"{name} is {getattr(self, name)}: expected an integer of at least {least}")


class World(Protocol):
    """What evaluates conditions, each row's own, at noise x."""

    noise_dim: int

    def log_p(self, rows: Array, x: Array) -> tuple[Array, Array]:
        """log P (n,) of the conditions of ``rows`` (n,) at x (n, noise_dim), float64: relaxed and crisp, as in
        engine.reference.probability. With a guidance both are the same."""
        ...

    def approach(self, rows: Array, x: Array) -> Array:
        """Nearer to where the conditions hold, by a few Gauss-Newton steps: (n, noise_dim)."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Ends:
    """What became of n rows.

    x (n, noise_dim)       where they are
    log_p (n,)             log P there, crisp where the rows have a confidence
    exact (n,)             whether a candidate was accepted: an exact, independent sample
    entered (n,)           whether the row is a sample at all; else the caller has something better than x
    candidates (n,)        up to the one accepted, or all
    corrections (n,)       steps of preconditioned Crank-Nicolson
    accepted (n,)          how many of the steps moved the row
    """

    x: Array
    log_p: Array
    exact: Array
    entered: Array
    candidates: Array
    corrections: Array
    accepted: Array


# --- what decides -------------------------------------------------------------------------------------------------


def chances(seeds: Sequence[int], streams: Sequence[int], count: int = 1) -> Array:
    """Uniform numbers in (0, 1), (n, count), count <= 4: a function of (seed, stream)."""
    words = philox_many(seeds, [CHANCE_STREAM + stream for stream in streams], 1)[:, 0, :count]
    return (words.astype(np.float64) + 0.5) * 2.0**-32


def accepts(settings: Settings, log_p: Array, chance: Array) -> Array:
    """Whether candidates are samples (n,): exact rejection, for log P <= 0."""
    if settings.confidence is not None:
        return log_p > np.log(settings.confidence)
    assert settings.guidance is not None
    return np.log(chance) < settings.guidance * log_p


def sizes(chance: Array) -> Array:
    """The step sizes b (n,) that these chances draw."""
    return SIZES[(chance * len(SIZES)).astype(int)]


def proposal(x: Array, noise: Array, size: Array) -> Array:
    """Preconditioned Crank-Nicolson: x, noise (n, d), size (n,)."""
    b = size[:, None].astype(x.dtype)
    return np.sqrt(1 - b * b) * x + b * noise


def moves(power: Array, before: Array, after: Array, chance: Array) -> Array:
    """Metropolis (n,) for the prior times P^power. The proposal leaves the prior alone, so that only P is asked."""
    return np.log(chance) < power * (after - before)


def heat(step: Array, highest: float) -> Array:
    """The power of P at a row's step, counted from 0: from a small one up to the highest."""
    return highest * np.minimum((step + 1) / RISE, 1.0)


# --- the rows -----------------------------------------------------------------------------------------------------


def sample(world: World, seeds: Sequence[int], settings: Settings, *, first: Sequence[int] | None = None,
           waves: Sequence[int] = (16,)) -> Ends:
    """One sample for each seed; row i asks what ``world`` knows as its row i.

    first   candidate that each row begins with (0): a row whose sample was refused by others goes on behind it, and is
            as independent of what it was as if its seed were another
    waves   candidates of a row that are evaluated at a time, first, then, and so on; the last number comes again. They
            decide the cost and nothing else
    """
    n, d = len(seeds), world.noise_dim
    ends = Ends(np.zeros((n, d), np.float32), np.full(n, -np.inf), np.zeros(n, bool), np.zeros(n, bool),
                np.zeros(n, np.int64), np.zeros(n, np.int64), np.zeros(n, np.int64))
    best, first = np.full(n, -np.inf), [0] * n if first is None else [int(number) for number in first]
    for numbers in in_waves(settings.fresh, waves):
        rows = np.flatnonzero(~ends.exact)
        if not len(rows):
            return ends
        draw(world, seeds, settings, rows, numbers, ends, best, first)
    rows = np.flatnonzero(~ends.exact)
    if len(rows):
        far = rows[best[rows] < FAR]
        if len(far):
            ends.x[far] = world.approach(far, ends.x[far])
        correct(world, seeds, settings, rows, ends, first)
    return ends


def in_waves(count: int, waves: Sequence[int]) -> Iterator[range]:
    """0 to count - 1 in ranges of these lengths, the last of which comes again."""
    first = 0
    for length in chain(waves, repeat(waves[-1])):
        if first >= count:
            return
        yield range(first, min(first + length, count))
        first += length


def draw(world: World, seeds: Sequence[int], settings: Settings, rows: Array, numbers: range, ends: Ends,
         best: Array, first: Sequence[int]) -> None:
    """Candidates ``numbers`` of the rows, counted from where each began: the first one accepted ends a row, else the
    best one is kept."""
    m = len(numbers)
    pairs = [(int(seeds[row]), first[row] + k) for row in rows for k in numbers]
    own, streams = [seed for seed, _ in pairs], [k for _, k in pairs]
    x = normals_many(own, streams, world.noise_dim)
    many = np.repeat(rows, m)
    relaxed, log_p = world.log_p(many, x)
    good = accepts(settings, log_p, chances(own, streams)[:, 0]).reshape(-1, m)
    hit, place = good.any(axis=1), good.argmax(axis=1)
    nearest = relaxed.reshape(-1, m).argmax(axis=1)
    ends.candidates[rows] += np.where(hit, place + 1, m)
    chosen = np.arange(len(rows)) * m + np.where(hit, place, nearest)
    better = hit | (relaxed[chosen] > best[rows])
    ends.x[rows[better]] = x[chosen[better]]
    ends.log_p[rows[better]] = log_p[chosen[better]]
    best[rows] = np.maximum(best[rows], relaxed[chosen])
    ends.exact[rows[hit]], ends.entered[rows[hit]] = True, True


def correct(world: World, seeds: Sequence[int], settings: Settings, rows: Array, ends: Ends,
            first: Sequence[int]) -> None:
    """Preconditioned Crank-Nicolson for rows without an accepted candidate, from where they are."""
    walk = into_set if settings.confidence is not None else under_guidance
    streams = [STEP_STREAM + (first[row] << STEP_BITS) for row in rows.tolist()]
    walk(world, [int(seeds[row]) for row in rows.tolist()], settings, rows, ends, streams)


def into_set(world: World, seeds: Sequence[int], settings: Settings, rows: Array, ends: Ends,
             streams: Sequence[int]) -> None:
    """Into the restricted set, and then ``steps`` inside. streams: of each row's step 0."""
    assert settings.confidence is not None
    x, least = ends.x[rows], np.log(settings.confidence)
    here, hard = world.log_p(rows, x)
    inside, since = hard > least, np.zeros(len(rows), int)
    running = np.ones(len(rows), bool)
    for step in range(settings.patience + settings.steps):
        running &= np.where(inside, since < settings.steps, step < settings.patience)
        part = np.flatnonzero(running)
        if not len(part):
            break
        stuck = part[~inside[part]]
        if step and step % STUCK == 0 and len(stuck):
            x[stuck] = world.approach(rows[stuck], x[stuck])
            here[stuck], hard[stuck] = world.log_p(rows[stuck], x[stuck])
            inside[stuck] = hard[stuck] > least
        own = [seeds[i] for i in part.tolist()]
        now = [streams[i] + step for i in part.tolist()]
        chance = chances(own, now, 2)
        noise = normals_many(own, now, world.noise_dim)
        trial = proposal(x[part], noise, sizes(chance[:, 1]))
        soft, crisp = world.log_p(rows[part], trial)
        good = np.where(inside[part], crisp > least,
                        moves(heat(np.full(len(part), step), HIGHEST), here[part], soft, chance[:, 0]))
        moved = part[good]
        x[moved], here[moved], hard[moved] = trial[good], soft[good], crisp[good]
        since[part] += inside[part]
        inside[moved] |= crisp[good] > least
        ends.corrections[rows[part]] += 1
        ends.accepted[rows[moved]] += 1
    ends.x[rows], ends.log_p[rows], ends.entered[rows] = x, hard, inside


def under_guidance(world: World, seeds: Sequence[int], settings: Settings, rows: Array, ends: Ends,
                   streams: Sequence[int]) -> None:
    """Towards the prior times P^guidance, and then ``steps`` of it."""
    assert settings.guidance is not None
    x = ends.x[rows]
    here, _ = world.log_p(rows, x)
    for step in range(RISE + settings.steps):
        now = [stream + step for stream in streams]
        chance = chances(seeds, now, 2)
        trial = proposal(x, normals_many(seeds, now, world.noise_dim), sizes(chance[:, 1]))
        there, _ = world.log_p(rows, trial)
        good = moves(heat(np.full(len(rows), step), settings.guidance), here, there, chance[:, 0])
        x[good], here[good] = trial[good], there[good]
        ends.corrections[rows] += 1
        ends.accepted[rows[good]] += 1
    ends.x[rows], ends.log_p[rows], ends.entered[rows] = x, here, True


# --- rows that begin near ------------------------------------------------------------------------------------------


def polish(world: World, seeds: Sequence[int], settings: Settings, x: Array, steps: int) -> Ends:
    """``steps`` of preconditioned Crank-Nicolson from x (n, noise_dim), each of which leaves the posterior as it is.

    A row outside of its restricted set targets the prior times P^HIGHEST until it enters. ``Ends.log_p`` is crisp
    inside, and relaxed outside.
    """
    n = len(seeds)
    rows, x = np.arange(n), np.array(x)
    least = -np.inf if settings.confidence is None else np.log(settings.confidence)
    power = np.full(n, settings.guidance if settings.confidence is None else HIGHEST)
    soft, hard = world.log_p(rows, x)
    corrections, accepted = np.zeros(n, np.int64), np.zeros(n, np.int64)
    for step in range(steps):
        streams = [STEP_STREAM + step] * n
        chance = chances(seeds, streams, 2)
        trial = proposal(x, normals_many(seeds, streams, world.noise_dim), sizes(chance[:, 1]))
        relaxed, crisp = world.log_p(rows, trial)
        good = moves(power, soft, relaxed, chance[:, 0])
        if settings.confidence is not None:
            good = (crisp > least) | (good & (hard <= least))
        x[good], soft[good], hard[good] = trial[good], relaxed[good], crisp[good]
        corrections += 1
        accepted += good
    inside = hard > least
    return Ends(x, np.where(inside, hard, soft), np.zeros(n, bool), inside, np.ones(n, np.int64), corrections, accepted)
