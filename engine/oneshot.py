"""One-pass maps: what they grant, and the solver that measures and polishes what they make.

A map turns noise of the prior into a latent of one condition, in one pass of a small network, where the posterior draws
many candidates. It is a proposal: near the posterior and not the posterior itself, by distances that its record states.
Steps of preconditioned Crank-Nicolson, which leave the posterior as it is, bring its rows nearer.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import reduce
from operator import and_

import numpy as np
from numpy import ndarray as Array

from engine.batch import Batch, Status
from engine.condition import And, Condition, Is
from engine.errors import ConditionError, RequestError
from engine.flow import Flow
from engine.grammar import parse
from engine.manifest import Oneshot
from engine.reference.posterior import Settings, polish
from engine.solvers.posterior import FieldWorld

OPEN = re.compile(r"([\w-]+)\s*=\s*\?")


@dataclass(frozen=True, slots=True)
class Wish:
    """A condition of which some targets may be open: 'smile & age=?' asks for smiles of an age that is said later.

    text      with its question marks
    targets   the range of each open target, by attribute
    even      class attributes whose classes are to be equally frequent; the text may then be empty
    Raises ConditionError for a text that cannot be read, or an open target that is not joined to the rest by and.
    """

    text: str
    targets: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    even: tuple[str, ...] = ()

    def __post_init__(self):
        if open_names(self.text) != tuple(self.targets):
            raise ConditionError(f"{self.text!r} leaves the targets of {', '.join(open_names(self.text)) or 'nothing'} "
                                 f"open; expected those of {', '.join(self.targets) or 'nothing'}")

    @property
    def names(self) -> tuple[str, ...]:
        """The attributes that it asks for."""
        asked = [name for part in conjuncts(self.text) for name in part.attributes()]
        return tuple(dict.fromkeys([*asked, *self.even]))

    def rest(self) -> Condition | None:
        """What is not open; None if that is nothing."""
        parts = [part for part in conjuncts(self.text) if not (isinstance(part, Is) and part.name in self.targets)]
        return reduce(and_, parts) if parts else None

    def condition(self, targets: Mapping[str, float]) -> Condition | None:
        """The condition with these targets, which every sample is to satisfy; None if that is nothing.

        RequestError for a target that is missing, too much, or out of its range.
        """
        if set(targets) != set(self.targets):
            known = ", ".join(f"{name} ({low:g} to {high:g})" for name, (low, high) in self.targets.items())
            raise RequestError(f"the targets are {', '.join(targets) or 'none'}; {self.text!r} needs: "
                               f"{known or 'none'}")
        for name, (low, high) in self.targets.items():
            if not low <= targets[name] <= high:
                raise RequestError(f"the target {name}={targets[name]!r} is out of range: {self.text!r} was learnt "
                                   f"from {low:g} to {high:g}")
        filled = [Is(part.name, float(targets[part.name])) if isinstance(part, Is) and part.name in self.targets
                  else part for part in conjuncts(self.text)]
        return reduce(and_, filled) if filled else None


def open_names(text: str) -> tuple[str, ...]:
    """Attributes whose targets are open. ConditionError unless each is one whole statement of a conjunction."""
    names = tuple(OPEN.findall(text))
    found = [part.name for part in conjuncts(text) if isinstance(part, Is)]
    for name in names:
        if found.count(name) != 1 or names.count(name) != 1:
            raise ConditionError(f"the open target {name}=? of {text!r} must be joined to everything else by &, once: "
                                 "such as (hat | beard) & age=?")
    return names


def conjuncts(text: str) -> tuple[Condition, ...]:
    """The parts that a condition joins by and, none of an empty text; open targets have any number."""
    if not text.strip():
        return ()
    condition = parse(OPEN.sub(r"\1=0.5", text))
    return condition.parts if isinstance(condition, And) else (condition,)


def wish_of(record: Oneshot) -> Wish:
    return Wish(record.condition, dict(record.targets), record.even)


@dataclass(frozen=True, slots=True)
class Polish:
    """Measures where the rows of a map are, after ``steps`` of preconditioned Crank-Nicolson.

    A step leaves the posterior as it is, whatever it was called on. Rows outside of the restricted set are pulled in.
    """

    confidence: float | None
    guidance: float | None
    steps: int = 0

    def begin(self, flow: Flow, batch: Batch, rows: Array) -> None:
        """Nothing: a row is polished in the step that ends it."""

    def step(self, flow: Flow, batch: Batch, rows: Array) -> None:
        """Take all rows to their end."""
        world = FieldWorld(flow, batch, rows)
        settings = Settings(self.confidence, self.guidance)
        x = flow.prior.pull(batch.z[rows], batch.truncation[rows])
        ends = polish(world, [batch.seeds[row] for row in rows.tolist()], settings, x, self.steps)
        batch.keep(rows, ends.log_p, *world.read(ends.x))
        batch.z[rows] = flow.prior.push(ends.x, batch.truncation[rows])
        batch.steps[rows], batch.status[rows] = ends.corrections, Status.DONE
        batch.walks[rows] = np.stack([ends.exact, ends.candidates, ends.corrections, ends.accepted], axis=1)
        batch.evaluations[rows] += ends.candidates + ends.corrections
