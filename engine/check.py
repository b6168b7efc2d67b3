"""A picture classifier confirms what the heads accepted: delayed acceptance.

A candidate that the sharp heads accept is drawn, and an image classifier looks at it. What it denies sends the row on
to its next candidate, up to ``max_decodes`` pictures a row. What is accepted by both is an exact sample of the prior
where the heads are sure and the picture shows it.

Christen, Fox, "Markov chain Monte Carlo using an approximation", J. Comput. Graph. Stat. 2005 (delayed acceptance).
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy import ndarray as Array

from engine.batch import Status
from engine.bundle import Attribute
from engine.condition import And, Condition, Is, Keep, Near, Not, Or, Weighted, Within
from engine.drive import Ticket
from engine.errors import ClassifierError, SolveError
from engine.requests import Sample
from engine.tape import satisfied

if TYPE_CHECKING:  # late: whoever checks nothing need not wait for it
    from engine.classifier import ImageClassifier

MAX_DECODES = 32
VALUE = 0.1  # within which a picture meets a value whose attribute has no tolerance


@dataclass(frozen=True, slots=True, eq=False)
class Check:
    """Confirms pictures of one bundle.

    attributes    of the bundle
    max_decodes   pictures of a row at most
    """

    classifier: "ImageClassifier"
    attributes: Mapping[str, Attribute]
    max_decodes: int = MAX_DECODES

    def __post_init__(self):
        if not isinstance(self.max_decodes, int) or not 1 <= self.max_decodes <= 1000:
            raise SolveError(f"max_decodes is {self.max_decodes!r}: expected a whole number from 1 to 1000")

    def require(self, condition: Condition) -> None:
        """Raises ClassifierError unless the classifier can tell something of what a condition asks."""
        from engine.classifier import check_fits, names

        known = {a.name: a for a in self.classifier.attributes}
        shared = [name for name in condition.attributes() if name in known and name in self.attributes]
        for name in shared:
            check_fits(known[name], self.attributes[name], self.classifier.path)
        if not shared:
            raise ClassifierError(f"{self.classifier.path} can tell nothing of {condition}: it knows "
                                  f"{names(self.classifier.attributes)}")

    def denies(self, conditions: Sequence[Condition], pictures: Array) -> Array:
        """Whether pictures (n, H, W, C) uint8 cannot show what is asked of each (n,). One at a time, so that no verdict
        depends on a picture's neighbours."""
        seen = self.see(pictures)
        denied = np.zeros(len(pictures), bool)
        for condition in dict.fromkeys(conditions):
            rows = np.array([other == condition for other in conditions])
            part = {name: values[rows] for name, values in seen.items()}
            denied[rows] = ~self.truth(condition, part, int(rows.sum()))[1]
        return denied

    def see(self, pictures: Array) -> dict[str, Array]:
        """What the classifier sees as logits of the bundle's attributes (n, C), classes in the bundle's order."""
        read, found = self.classifier.read(pictures, alone=True), {}
        for attribute, (low, high) in zip(self.classifier.attributes, self.classifier.spans, strict=True):
            ours = self.attributes.get(attribute.name)
            if ours is None or (ours.kind, set(ours.classes)) != (attribute.kind, set(attribute.classes)):
                continue
            order = [attribute.classes.index(name) for name in ours.classes] or [0]
            found[attribute.name] = read[:, low:high][:, order]
        return found

    def truth(self, condition: Condition, seen: Mapping[str, Array], count: int) -> tuple[Array, Array]:
        """Whether a condition certainly holds, and whether it may hold, (count,) each: what the classifier does not
        know may be either."""
        match condition:
            case Is(name) | Within(name):
                if name not in seen:
                    return np.zeros(count, bool), np.ones(count, bool)
                holds = satisfied(condition, self.attributes, seen, tolerance=self.tolerance(name))
                return holds, holds
            case Not(inner):
                certain, possible = self.truth(inner, seen, count)
                return ~possible, ~certain
            case Weighted(_, inner):
                return self.truth(inner, seen, count)
            case And(parts) | Or(parts):
                join = np.logical_and if isinstance(condition, And) else np.logical_or
                found = [self.truth(part, seen, count) for part in parts]
                return join.reduce([certain for certain, _ in found]), join.reduce([possible for _, possible in found])
            case Near() | Keep():
                return np.ones(count, bool), np.ones(count, bool)
        raise AssertionError(condition)

    def tolerance(self, name: str) -> float:
        attribute = self.attributes[name]
        return max(VALUE, attribute.tolerance or 0.0) if attribute.kind == "value" else VALUE


def open_check(path: str | os.PathLike, attributes: Mapping[str, Attribute], max_decodes: int | None) -> Check:
    """Raises ClassifierError."""
    from engine.classifier import ImageClassifier

    return Check(ImageClassifier(path), attributes, MAX_DECODES if max_decodes is None else max_decodes)


def confirm(tickets: Sequence[Ticket], samples: Sequence[Sample]) -> list[Ticket]:
    """Give tickets their samples, unless a check denies the picture: those tickets begin again at their next candidate,
    and are returned.

    samples   of the tickets, with pictures
    """
    for ticket, sample in zip(tickets, samples, strict=True):
        ticket.sample = add_up(ticket.past, sample)
    again = []
    for check in {ticket.check: None for ticket in tickets if ticket.check is not None}:
        some = [ticket for ticket in tickets if ticket.check is check and has_arrived(ticket)]
        if some:
            pictures = np.stack([ticket.sample.image for ticket in some])  # type: ignore[union-attr]
            denied = check.denies([ticket.request.expression for ticket in some], pictures)  # type: ignore[arg-type]
            again += [ticket for ticket, no in zip(some, denied.tolist(), strict=True) if goes_on(ticket, check, no)]
    return again


def has_arrived(ticket: Ticket) -> bool:
    """Rows that the heads never accepted say so by their status, and no picture of theirs is confirmed."""
    return ticket.sample is not None and ticket.sample.status == Status.DONE


def add_up(past: Sample | None, sample: Sample) -> Sample:
    """A sample with what its row cost in all of its attempts."""
    if past is None:
        return sample
    corrections = past.corrections + sample.corrections
    moved = sum((part.acceptance or 0.0) * part.corrections for part in (past, sample))
    return replace(
        sample, decodes=past.decodes, candidates=past.candidates + sample.candidates, corrections=corrections,
        evaluations=past.evaluations + sample.evaluations, acceptance=moved / corrections if corrections else None)


def goes_on(ticket: Ticket, check: Check, is_denied: bool) -> bool:
    """Count a picture that was looked at, and send a denied ticket on to its next candidate; or let it end, as DENIED
    if it was drawn too often."""
    sample = ticket.sample
    assert sample is not None
    sample = replace(sample, decodes=sample.decodes + 1)
    if is_denied and sample.decodes < check.max_decodes:
        ticket.past, ticket.sample = replace(sample, image=None), None
        ticket.start = replace(ticket.start, candidate=ticket.request.candidate + sample.candidates)
        return True
    ticket.sample = replace(sample, status=Status.DENIED) if is_denied else sample
    return False
