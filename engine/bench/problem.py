"""What is solved in a benchmark, and the judge of the answers.

The judge knows no solver: it evaluates the energy of an end state in float64 with engine/reference/field.py, and
compares the state with the end of a converged solve.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property, reduce
from itertools import chain, zip_longest
from operator import and_
from pathlib import Path

import numpy as np
from numpy import ndarray as Array

from engine.bundle import Attribute, Bundle
from engine.condition import Condition, attr
from engine.errors import RequestError
from engine.folders import write_atomically
from engine.reference import field as twin
from engine.reference.noise import normals_many
from engine.requests import Request
from engine.sampler import Sampler

# Rows that are judged; the others of a larger solve are timed only. A converged solve of 256 rows takes minutes.
JUDGED, JUDGED_QUICK = 16, 4
# Tolerances of the converged solve, which is bosh3 in float64. On networks of FFHQ's size 1e-4 ends within 2.5 % of the
# way of 1e-5. Hard targets chatter along kinks: there 1e-4 takes up to 20,000 evaluations, and 3e-4 has the same mean
# energy to 2 %.
CONVERGED, CONVERGED_HARD = 1e-4, 3e-4
MOST_EVALUATIONS = 20_000
# The paper's energy, whatever a bundle prefers: all contestants descend the same one.
GUIDANCE = 1.0


@dataclass(frozen=True, slots=True)
class Target:
    """A class by its index, or a value."""

    attribute: str
    wanted: int | float


@dataclass(frozen=True)
class Problem:
    """All ``targets`` at once, for the seeds 0 to rows - 1: the conjunctions that the paper's sampler knows too."""

    bundle: Bundle
    targets: tuple[Target, ...]
    rows: int

    @cached_property
    def condition(self) -> Condition:
        return reduce(and_, (attr(t.attribute, choice(self.bundle.attributes[t.attribute], t)) for t in self.targets))

    @cached_property
    def requests(self) -> list[Request]:
        label = 0 if self.bundle.generator.labels else None
        return [Request(self.condition, seed=seed, label=label) for seed in range(self.rows)]

    @cached_property
    def z0(self) -> Array:
        """Where every contestant starts: (rows, z_dim) float32."""
        return starts(self.bundle, self.rows)

    def energies(self, z: Array) -> Array:
        """Minus log p of the targets at z (n, z_dim), by the formulas of the paper: (n,) float64."""
        found = logits(self.bundle, z, [target.attribute for target in self.targets])
        total = np.zeros(len(z))
        for target in self.targets:
            attribute, u = self.bundle.attributes[target.attribute], found[target.attribute]
            if attribute.kind == "class":
                total += np.logaddexp.reduce(u, axis=1) - u[:, int(target.wanted)]
            else:
                total += np.square((u[:, 0] - target.wanted) / attribute.sigma) / 2
        return total


def choice(attribute: Attribute, target: Target) -> str | float:
    return attribute.classes[int(target.wanted)] if attribute.kind == "class" else float(target.wanted)


def starts(bundle: Bundle, rows: int) -> Array:
    return normals_many(range(rows), [0] * rows, bundle.generator.z_dim)


def logits(bundle: Bundle, z: Array, names: Iterable[str]) -> dict[str, Array]:
    """Logits (n, C) of the named attributes at z (n, z_dim), float64."""
    z = z.astype(float)
    psi, label = np.full((len(z), 1), bundle.generator.truncation), np.zeros(len(z), np.int64)
    w, _ = twin.mapping(bundle.field, z, psi, label, normalise=bundle.generator.normalise)
    found = {}
    for attribute in (bundle.attributes[name] for name in names):
        stack = twin.layers(bundle.field, f"head.{attribute.head}")
        u, _ = twin.head(stack, w if bundle.heads[attribute.head].space == "w" else z)
        found[attribute.name] = u[:, slice(*attribute.columns)]
    return found


# --- targets for any bundle ---------------------------------------------------------------------------------------


def ordinary(bundle: Bundle, count: int) -> tuple[Target, ...]:
    """``count`` attributes: two with classes, one value, and so on; the last class, the first, 70 % of a range.

    Raises RequestError if the bundle has fewer.
    """
    if count > len(bundle.attributes):
        raise RequestError(f"{bundle.path.name} has {len(bundle.attributes)} attributes, {count} were asked for")
    classes, values = of_kind(bundle, "class"), of_kind(bundle, "value")
    mixed = [a for a in chain.from_iterable(zip_longest(classes[::2], classes[1::2], values)) if a is not None]
    return tuple(usual(a, last=i % 3 == 0) for i, a in enumerate(mixed[:count]))


def of_kind(bundle: Bundle, kind: str) -> list[Attribute]:
    return [attribute for attribute in bundle.attributes.values() if attribute.kind == kind]


def usual(attribute: Attribute, *, last: bool) -> Target:
    if attribute.kind == "class":
        return Target(attribute.name, len(attribute.classes) - 1 if last else 0)
    low, high = attribute.range
    return Target(attribute.name, round(low + 0.7 * (high - low), 4))


def hard(bundle: Bundle) -> dict[str, tuple[Target, ...]]:
    """Targets that are rare, that contradict each other, and that lie outside what the training data covers.

    rare       up to six attributes, each at what the heads find least often in 256 plain samples
    conflict   two classes of one attribute at once, and a rare value
    outside    three values at one range beyond their range, and a class
    """
    found = logits(bundle, starts(bundle, 256), bundle.attributes)
    classes, values = of_kind(bundle, "class"), of_kind(bundle, "value")
    mixed = [a for pair in zip_longest(classes, values) for a in pair if a is not None]
    sets = {
        "rare": [rarest(a, found[a.name]) for a in mixed[:6]],
        "conflict": [*(Target(a.name, c) for a in classes[:1] for c in (0, 1)),
                     *(rarest(a, found[a.name]) for a in values[:1])],
        "outside": [*(Target(a.name, a.range[1] + (a.range[1] - a.range[0])) for a in values[:3]),
                    *(Target(a.name, 0) for a in classes[:1])],
    }
    return {name: tuple(targets) for name, targets in sets.items() if targets}


def rarest(attribute: Attribute, u: Array) -> Target:
    """The class that wins least often, or the end of the range that is farther from the median."""
    if attribute.kind == "class":
        return Target(attribute.name, int(np.bincount(u.argmax(axis=1), minlength=u.shape[1]).argmin()))
    return Target(attribute.name, max(attribute.range, key=lambda end: abs(end - np.median(u))))


# --- the judge ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Verdict:
    """Of the judged rows of one answer, and of the converged solve (``floor``).

    energy             mean of -log p
    trajectory_error   mean distance to the converged end, as a part of the way from start to end
    """

    energy: float
    floor: float
    trajectory_error: float


@dataclass(frozen=True, slots=True)
class Judge:
    """Converged ends of the first ``rows`` rows, computed once for a problem and kept in ``folder``."""

    folder: Path
    rows: int = JUDGED
    tolerance: float = CONVERGED

    def judge(self, problem: Problem, z: Array) -> Verdict:
        """z (rows, z_dim), the end that a contestant gave."""
        n = min(problem.rows, self.rows)
        end, z = self.converged(problem)[:n], z[:n].astype(float)
        way = np.linalg.norm(end - problem.z0[:n], axis=1)
        error = np.linalg.norm(z - end, axis=1) / np.maximum(way, 1e-12)
        return Verdict(*(float(np.mean(x)) for x in (problem.energies(z), problem.energies(end), error)))

    def converged(self, problem: Problem) -> Array:
        """The end of the flow for the judged rows, (n, z_dim) float64. Raises SolveError if they do not arrive."""
        full = Problem(problem.bundle, problem.targets, self.rows)
        key = f"{problem.bundle.hash} {problem.condition} {self.rows} {self.tolerance}"
        file = self.folder / f"converged-{hashlib.sha256(key.encode()).hexdigest()[:16]}.npy"
        if not file.exists():
            sampler = Sampler(problem.bundle, runtime="numpy", guidance=GUIDANCE, solver="bosh3", rtol=self.tolerance,
                              atol=self.tolerance, max_evaluations=MOST_EVALUATIONS)
            samples = sampler.solve(full.requests, strict=True)
            ends = np.stack([sample.z for sample in samples if sample.z is not None])
            write_atomically(file, lambda opened: np.save(opened, ends))
        return np.load(file)
