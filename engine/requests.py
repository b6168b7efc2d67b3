"""Requests in, samples out: the two records that cross the door."""

import math
import numbers
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy import ndarray as Array

from engine.batch import Status
from engine.condition import Condition
from engine.errors import ConditionError, RequestError
from engine.grammar import parse
from engine.reference.noise import SEED_LIMIT

MOST_POLISH = 10_000  # steps: more are asked for by mistake
MOST_CANDIDATES = 2**24


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """One picture that is wanted.

    condition    an expression, its text form, or None for a plain sample
    seed         draws the starting latent and any noise; the same seed gives the same start everywhere
    z            (z_dim,) a start instead of the seed's
    w            (w_dim,) a start in W, for latents of inverted photographs: the flow then runs in W
    label        class of a conditional generator
    truncation   psi
    guidance     the factor of the condition's log p, or of the posterior the power of P
    confidence   of the posterior: the least P(condition)
    steps        fixed steps of the flow, or of the posterior those inside the set
                 All four of this row; None: the sampler's
    oneshot      a one-pass map of the bundle in place of a condition: it has its own truncation, label and strength
    targets      by attribute, of the map's statements whose target is open
    polish       steps that bring what the map makes nearer to the posterior (none)
    candidate    of the posterior: number of the seed's candidate that it begins with, which is another start

    Raises RequestError, and ConditionError for a condition that cannot be read.
    """

    condition: Condition | str | None = None
    seed: int = 0
    z: Array | None = None
    w: Array | None = None
    truncation: float | None = None
    label: int | None = None
    guidance: float | None = None
    steps: int | None = None
    confidence: float | None = None
    oneshot: str | None = None
    targets: Mapping[str, float] | None = None
    polish: int | None = None
    candidate: int = 0

    def __post_init__(self):
        self.check_oneshot()
        if isinstance(self.condition, str):
            object.__setattr__(self, "condition", parse(self.condition))
        elif not isinstance(self.condition, Condition | None):
            raise ConditionError(f"a request's condition is an expression or a text, not {self.condition!r}")
        if not isinstance(self.seed, numbers.Integral) or not 0 <= self.seed < SEED_LIMIT:
            raise RequestError(f"seed {self.seed!r} is not an integer in [0, 2**64)")
        if self.z is not None and self.w is not None:
            raise RequestError("a request starts from z or from w, not from both")
        if self.truncation is not None and not is_finite(self.truncation):
            raise RequestError(f"truncation {self.truncation!r} is not a finite number")
        if self.label is not None and not isinstance(self.label, numbers.Integral):
            raise RequestError(f"label {self.label!r} is not the number of a class")
        if self.guidance is not None and not (is_finite(self.guidance) and self.guidance > 0):
            raise RequestError(f"guidance {self.guidance!r} is not a finite number above 0")
        if self.confidence is not None and not (is_finite(self.confidence) and 0 < self.confidence < 1):
            raise RequestError(f"confidence {self.confidence!r} is not a number between 0 and 1")
        if self.confidence is not None and self.guidance is not None:
            raise RequestError("confidence and guidance both say how sure the heads must be: give one of them")
        if not isinstance(self.candidate, numbers.Integral) or not 0 <= self.candidate < MOST_CANDIDATES:
            raise RequestError(f"candidate {self.candidate!r} is not an integer in [0, 2**24)")
        if self.steps is not None and not (isinstance(self.steps, numbers.Integral) and self.steps > 0):
            raise RequestError(f"steps {self.steps!r} is not a positive integer")

    def check_oneshot(self) -> None:
        if self.oneshot is None:
            if self.targets is not None or self.polish is not None:
                raise RequestError("targets and polish belong to a one-pass map: give oneshot=NAME too")
            return
        others = ("condition", "z", "w", "truncation", "label", "guidance", "steps", "confidence")
        if given := [name for name in others if getattr(self, name) is not None]:
            raise RequestError(f"the one-pass map {self.oneshot!r} has a {given[0]} of its own: leave {given[0]} out, "
                               "or leave out oneshot")
        if not isinstance(self.oneshot, str):
            raise RequestError(f"oneshot {self.oneshot!r} is not the name of a one-pass map")
        polish = 0 if self.polish is None else self.polish
        if not isinstance(polish, numbers.Integral) or not 0 <= polish <= MOST_POLISH:
            raise RequestError(f"polish {self.polish!r} is not a number of steps from 0 to {MOST_POLISH}")
        for name, target in (self.targets or {}).items():
            if not is_finite(target):
                raise RequestError(f"the target {name}={target!r} is not a finite number")

    @property
    def space(self) -> str:
        """The name of the space in which it starts."""
        return "z" if self.w is None else "w"

    @property
    def latent(self) -> Array | None:
        """The start that it brings."""
        return self.z if self.w is None else self.w

    @property
    def expression(self) -> Condition | None:
        """The condition, never as text: that was parsed when the request was made."""
        assert not isinstance(self.condition, str)
        return self.condition


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """One result.

    image         (H, W, C) uint8, or None before ``render``
    z             (z_dim,), or None when the flow ran in W
    w             (w_dim,), after truncation;  ws: (num_ws, w_dim) when layers differ, else None
    logits        raw logits of the attributes that the condition mentions
    energy        -log p of the condition at the end, times the guidance
    status        DONE, or why the row stopped
    steps, evaluations   accepted steps, and evaluations of the field
    forced        steps that the evaluation budget lengthened beyond what the tolerance asked for
    exact, candidates, corrections, acceptance   of the posterior: whether a candidate of the prior was accepted, which
                  is an exact and independent sample; how many were drawn; steps of preconditioned Crank-Nicolson for
                  rows without one, and the share of these that moved the row, None without steps
    candidate     the candidate that the row began with; more than 0 behind one whose picture was denied
    decodes       pictures that a check looked at, 0 without one
    anchor        of an edit by the ladder: the sample with which the chain of edits began
    changed       of such an edit: the attributes that nobody asked for and that have changed, by the sharp heads: from
                  what they were in the anchor, or after the edit that had asked for them
    """

    request: Request
    z: Array | None
    w: Array
    logits: Mapping[str, Array]
    energy: float
    status: Status
    steps: int
    evaluations: int
    rejected: int
    forced: int
    image: Array | None = None
    ws: Array | None = None
    exact: bool = False
    candidates: int = 0
    corrections: int = 0
    acceptance: float | None = None
    candidate: int = 0
    decodes: int = 0
    anchor: "Sample | None" = None
    changed: tuple[str, ...] = ()

    @property
    def condition(self) -> Condition | None:
        return self.request.expression

    @property
    def seed(self) -> int:
        return self.request.seed

    @property
    def space(self) -> str:
        """The name of the space in which the flow ran."""
        return "w" if self.z is None else "z"

    @property
    def latent(self) -> Array:
        """Where the flow ended, in ``space``."""
        return self.w if self.z is None else self.z

    def __repr__(self) -> str:
        return (f"Sample({str(self.condition)!r}, seed={self.seed}, energy={self.energy:.4g}, "
                f"{self.status.name}, evaluations={self.evaluations})")


def is_finite(number: object) -> bool:
    return isinstance(number, numbers.Real) and math.isfinite(number)


Wanted = Condition | str | None | Request | Sequence[Request]


def as_requests(wanted: Wanted, seeds: Iterable[int] | int | None, *, oneshot: str | None = None,
                targets: Mapping[str, float] | None = None, polish: int | None = None) -> list[Request]:
    """What ``sample`` was given, as a list: one condition or map for many seeds, or requests as they are."""
    if isinstance(wanted, Condition | str | None):
        condition = parse(wanted) if isinstance(wanted, str) else wanted
        return [Request(condition, seed=seed, oneshot=oneshot, targets=targets, polish=polish)
                for seed in listed(seeds)]
    if oneshot is not None or targets is not None or polish is not None:
        raise RequestError("oneshot, targets and polish belong to seeds; each Request has its own")
    requests = [wanted] if isinstance(wanted, Request) else list(wanted)
    if seeds is not None:
        raise RequestError("seeds belong to a single condition; each Request has its own seed")
    for request in requests:
        if not isinstance(request, Request):
            raise TypeError(f"expected a condition or Requests, found {type(request).__name__}")
    return requests


def listed(seeds: Iterable[int] | int | None) -> Iterable[int]:
    if seeds is None:
        return [0]
    if isinstance(seeds, Iterable):
        return seeds
    return [seeds]  # what is no integer is refused by its Request


def checked_latent(latent: object, shape: int | tuple[int, ...], name: str, *, finite: bool = True) -> Array:
    """The latent as numbers, if it has the shape; a sample's may be otherwise, if its bundle was another.

    finite   whether it must be: the latents of a sample that ended as NONFINITE need not
    """
    array = np.asarray(latent, np.float64 if np.asarray(latent).dtype == np.float64 else np.float32)
    shape = (shape,) if isinstance(shape, int) else shape
    if array.shape != shape:
        raise RequestError(f"{name} has shape {array.shape}: expected {shape} finite numbers; "
                           "one from another bundle does not fit this generator")
    if finite and not np.isfinite(array).all():
        raise RequestError(f"{name} holds infinity or not-a-number: expected {shape} finite numbers")
    return array
