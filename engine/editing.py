"""Edits: from samples towards a new condition, holding on to the rest.

Two methods. ``ladder`` (engine/ladder.py) holds classes and values where they are, by the sharp heads of bundles that
have them. ``flow`` adds the paper's terms ``keep`` and ``near`` to the condition and follows the flow: Nie, Vahdat,
Anandkumar, NeurIPS 2021, section on sequential editing.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from operator import and_
from typing import TypedDict

import numpy as np
from numpy import ndarray as Array

from engine.aims import Aims, Held, wish
from engine.batch import Status
from engine.bundle import Attribute
from engine.condition import EVERY_OTHER, And, Condition, Keep, Near, keep, near
from engine.drive import Ticket
from engine.errors import RequestError
from engine.ladder import Ends, Ladder, Reader, Reading, Rows
from engine.reference.tape import evaluate
from engine.requests import Sample, checked_latent
from engine.starts import Anchor, Starts
from engine.tape import is_statement, lower, satisfied

LADDER, FLOW = "ladder", "flow"
METHODS = (LADDER, FLOW)
ROWS = 256  # of one call of the ladder


class FlowSettings(TypedDict, total=False):
    """Arguments of an edit by the flow; the weights are the paper's.

    keep_weight   of the distance of the kept logits (0.01)
    near          weight of the distance to the sample in z and w (0.04); None leaves it out
    hold          keep the sample's former targets too, unless the new condition mentions their attributes (True)
    """

    keep_weight: float
    near: float | None
    hold: bool


def holding(names: Sequence[str] | None, keep_weight: float, near_weight: float | None) -> list[Condition]:
    """``keep`` and ``near``, those of them that are asked for."""
    return [*([keep(*names, weight=keep_weight)] if names else []), *([near(near_weight)] if near_weight else [])]


def terms_of(condition: Condition | None) -> list[Condition]:
    """Its AND-ed terms."""
    return list(condition.parts) if isinstance(condition, And) else [] if condition is None else [condition]


def kept_terms(old: Condition | None, new: Condition) -> list[Condition]:
    """The AND-ed terms of ``old`` whose attributes ``new`` does not mention."""
    mentioned = set(new.attributes())
    return [t for t in terms_of(old) if not isinstance(t, Near | Keep) and not mentioned & set(t.attributes())]


def conjunction(terms: Sequence[Condition]) -> Condition:
    """All of ``terms``, at least one."""
    return reduce(and_, terms)


class Editor:
    """Edits samples of one bundle; their pictures are not drawn.

    solve     tickets -> samples, in the same order
    measure   samples -> raw logits of every attribute
    """

    def __init__(self, starts: Starts, solve: Callable[[Sequence[Ticket]], list[Sample]],
                 measure: Callable[[Sequence[Sample]], list[dict[str, Array]]]):
        self.bundle, self.flows, self.starts = starts.bundle, starts.flows, starts
        self.solve, self.measure = solve, measure

    def edit(self, samples: Sequence[Sample], wanted: Condition, method: str | None, names: Sequence[str] | None,
             settings: FlowSettings) -> list[Sample]:
        """See ``Sampler.edit``. Raises RequestError and ConditionError."""
        if method not in (None, *METHODS):
            raise RequestError(f"there is no method {method!r} of an edit: choose one of {', '.join(METHODS)}")
        if unknown := set(settings) - set(FlowSettings.__annotations__):
            raise TypeError(f"edit() got an unexpected keyword argument {min(unknown)!r}")
        self.starts.lower(wanted)  # what is wrong with it is said before all else
        tasks = tasks_of(samples, wanted)
        lack = None if method == FLOW else self.lack(tasks, names)
        if method == FLOW or (method is None and lack):
            return self.follow_flow(samples, wanted, names, **settings)
        if lack:
            raise RequestError(f"the ladder cannot serve this edit, because {lack}: choose method='flow'")
        if settings:
            raise RequestError(f"{' and '.join(settings)} can be given to the flow only, because the ladder weighs "
                               "nothing: leave out, or choose method='flow'")
        if not is_statement(wanted):
            raise RequestError(f"near and keep, as in {wanted}, are terms of the flow: leave them out, because the "
                               "ladder holds what is not asked for, or choose method='flow'")
        return self.climb(samples, tasks, names)

    def matters(self, target: Condition, names: Sequence[str] | None) -> list[Attribute]:
        """The attributes that a target mentions or an edit holds. Raises ConditionError for names that do not exist."""
        if names:
            self.starts.lower(keep(*names))
        known = self.bundle.attributes
        held = [] if not names else list(known) if EVERY_OTHER in names else names
        return [known[name] for name in dict.fromkeys((*target.attributes(), *held))]

    def lack(self, tasks: Iterable["Task"], names: Sequence[str] | None) -> str | None:
        """Why the ladder cannot serve the tasks."""
        if self.starts.logic != "product":
            return f"probabilities need product logic, not {self.starts.logic!r}"
        if self.flows.solving.device != "cpu":
            return f"runtime {self.flows.solving.name!r} does not run sharp heads yet"
        for attribute in {a.name: a for task in tasks for a in self.matters(task.target, names)}.values():
            head = self.bundle.heads[attribute.head]
            if head.space != "w":
                return f"the head of {attribute.name!r} reads z"
            if not head.sharp or not head.sharp.calibrated:
                return f"the attribute {attribute.name!r} has no calibrated sharp head (lace-train heads --sharp)"
        return None

    # --- the flow -------------------------------------------------------------------------------------------------

    def follow_flow(self, samples: Sequence[Sample], wanted: Condition, names: Sequence[str] | None, *,
                    keep_weight: float = 0.01, near: float | None = 0.04, hold: bool = True) -> list[Sample]:
        holders = holding(names, keep_weight, near)
        tickets = []
        for sample, logits in zip(samples, self.measure(samples), strict=True):
            target = conjunction([wanted, *(kept_terms(sample.condition, wanted) if hold else [])])
            request = replace(sample.request, condition=target, z=sample.z, w=sample.w if sample.z is None else None)
            anchor = Anchor(sample.latent, sample.w, logits)
            (latent,) = self.starts.draw([request])
            start = self.starts.begin(request, conjunction([target, *holders]), latent, anchor)
            tickets.append(Ticket(request, start))
        return self.solve(tickets)

    # --- the ladder -----------------------------------------------------------------------------------------------

    def climb(self, samples: Sequence[Sample], tasks: Mapping["Task", Sequence[int]],
              names: Sequence[str] | None) -> list[Sample]:
        ends: dict[int, Sample] = {}
        for task, places in tasks.items():
            for first in range(0, len(places), ROWS):
                part = places[first : first + ROWS]
                ends |= dict(zip(part, self.climb_together(task, [samples[i] for i in part], names), strict=True))
        return [ends[i] for i in range(len(samples))]

    def climb_together(self, task: "Task", samples: Sequence[Sample], names: Sequence[str] | None) -> list[Sample]:
        """Samples of one task."""
        attributes, rows = self.matters(task.target, names), self.rows_of(samples)
        reader = Reader(self.bundle, attributes)

        def follow(some: Array) -> tuple[Array, Array]:
            found = self.follow_flow([samples[i] for i in some.tolist()], task.wanted, names)
            return np.stack([s.w for s in found]), np.array([s.evaluations for s in found])

        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):  # a row that overflows gets a status
            first, here = (self.read(reader, rows, w) for w in (rows.anchor_w, rows.w))
            kept = self.kept(task, names)
            held = [self.hold(a, task, reader, first, here) for a in attributes if a.name in kept]
            aims = Aims(wish(task.asked, self.bundle.attributes), reader.layout, held)
            ends = Ladder(self.bundle, self.flows, reader, aims, rows, follow).climb(first, here)
            moved = {h.attribute.name: h.has_moved(ends.sharp[h.attribute.name]) for h in held}
            energies = self.energies(task, ends)
        return [sample_of(task, sample, ends, i, float(energies[i]), tuple(name for name in moved if moved[name][i]))
                for i, sample in enumerate(samples)]

    def kept(self, task: "Task", names: Sequence[str] | None) -> set[str]:
        """The attributes that are held: of those that are to be kept, what is not asked for now."""
        kept = set() if not names else set(self.bundle.attributes) if EVERY_OTHER in names else set(names)
        return kept - set(task.wanted.attributes())

    def hold(self, attribute: Attribute, task: "Task", reader: Reader, first: Reading, here: Reading) -> Held:
        """An attribute where the chain began; one that an earlier edit asked for where it is, if it arrived there."""
        name = attribute.name
        part, counts = reader.layout[name], np.ones(len(first.u), bool)
        if not task.is_former(name):
            return Held.at(attribute, first.sharp[name], first.u[:, part], counts)
        for term in (term for term in task.former if name in term.attributes()):
            counts &= satisfied(term, self.bundle.attributes, here.sharp)
        return Held.at(attribute, here.sharp[name], here.u[:, part], counts)

    def read(self, reader: Reader, rows: Rows, w: Array) -> Reading:
        with self.flows.borrow(self.bundle.spaces["w"]) as flow:
            latents = np.ascontiguousarray(w, self.flows.solving.dtype)
            return reader.read(flow, latents, rows.psi, rows.label, slopes=False)

    def rows_of(self, samples: Sequence[Sample]) -> Rows:
        def stack(found: Iterable[Sample]) -> Array:
            width = self.bundle.generator.w_dim
            return np.stack([checked_latent(sample.w, width, "w", finite=False) for sample in found]).astype(dtype)

        dtype = self.flows.solving.dtype
        psi = np.array([[self.starts.psi(sample.request)] for sample in samples], dtype)
        return Rows(stack(samples), stack(sample.anchor or sample for sample in samples), psi,
                    np.zeros(len(samples), np.int64))

    def energies(self, task: "Task", ends: Ends) -> Array:
        """-log p (n,) of the target, by the sharp heads."""
        tape = lower(task.target, self.bundle.attributes)
        u = np.stack([column.read(ends.sharp) for column in tape.columns], axis=1)
        return 0.0 - evaluate(tape.program, np.broadcast_to(tape.parameters, (len(u), len(tape.parameters))), u)[0]


@dataclass(frozen=True, slots=True)
class Task:
    """What an edit asks of a sample, as far as samples share it.

    wanted   what is asked for now;  former: the terms that earlier edits of the chain asked for, and that still count
    target   these, and what the chain's first picture was asked for: the condition of the result
    """

    wanted: Condition
    former: tuple[Condition, ...]
    target: Condition

    @classmethod
    def of(cls, sample: Sample, wanted: Condition) -> "Task":
        anchor = sample.anchor or sample
        terms, first = kept_terms(sample.condition, wanted), terms_of(anchor.condition)
        former = tuple(term for term in terms if term not in first)
        return cls(wanted, former, conjunction([wanted, *terms]))

    @property
    def asked(self) -> Condition:
        return conjunction([self.wanted, *self.former])

    def is_former(self, name: str) -> bool:
        """Whether an earlier edit asked for the attribute."""
        return any(name in term.attributes() for term in self.former)


def tasks_of(samples: Sequence[Sample], wanted: Condition) -> dict[Task, list[int]]:
    """The tasks, each with the places of its samples."""
    found: dict[Task, list[int]] = {}
    for i, sample in enumerate(samples):
        found.setdefault(Task.of(sample, wanted), []).append(i)
    return found


def sample_of(task: Task, sample: Sample, ends: Ends, i: int, energy: float, changed: tuple[str, ...]) -> Sample:
    """The result of row ``i``: in w, unless it stayed where it was."""
    request = replace(sample.request, condition=task.target, z=sample.z, w=sample.w if sample.z is None else None)
    is_whole = np.isfinite(energy) and np.isfinite(ends.w[i]).all()
    steps, evaluations, rejected = ends.spent[i].tolist()
    return Sample(
        request=request, z=sample.z if ends.stayed[i] else None, w=sample.w if ends.stayed[i] else ends.w[i].copy(),
        logits={name: ends.sharp[name][i].copy() for name in task.target.attributes()}, energy=energy,
        status=Status.DONE if is_whole else Status.NONFINITE, steps=steps, evaluations=evaluations, rejected=rejected,
        forced=0, anchor=sample.anchor or sample, changed=changed,
    )
