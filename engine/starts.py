"""A request becomes a start: its latent, its condition as a tape, and what ``near`` and ``keep`` hold on to."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy import ndarray as Array

from engine.batch import Start
from engine.bundle import Attribute, Bundle, Oneshot
from engine.condition import Condition
from engine.errors import ConditionError, RequestError
from engine.oneshot import Polish, wish_of
from engine.prior import split
from engine.reference.noise import normals_many
from engine.requests import Request, checked_latent
from engine.solvers import Solver, with_steps
from engine.solvers.posterior import Posterior
from engine.solving import Flows
from engine.spaces import Space
from engine.tape import EMPTY, Tape, is_statement, lower, lower_crisp

# Tapes that are kept for conditions that come again.
TAPES = 256
# Streams of a seed: 0 is the prior's noise, the next ones the solvers'.
PRIOR_STREAM = 0


@dataclass(frozen=True, slots=True, eq=False)
class Anchor:
    """What ``near`` and ``keep`` hold on to. z (width,), w (w_dim,), and the logits (C,) of every attribute."""

    z: Array
    w: Array
    logits: dict[str, Array]


class Starts:
    """Starts of requests, with the sampler's defaults for what they leave open.

    flows        read the anchors, and have the prior that latents are drawn from
    logic, temperature, guidance   of ``engine.tape.lower``;  truncation: psi
    posterior    for requests that it can serve; the others take the flow, or are refused with ``is_strict``. None: all
                 take the flow
    """

    def __init__(self, bundle: Bundle, flows: Flows, *, logic: str, temperature: float, guidance: float,
                 truncation: float, posterior: Posterior | None = None, is_strict: bool = False):
        self.bundle, self.flows, self.posterior, self.is_strict = bundle, flows, posterior, is_strict
        self.logic, self.temperature, self.guidance, self.truncation = logic, temperature, guidance, truncation
        self.tapes: dict[tuple[Condition | None, Space | None, float], Tape] = {}
        self.granted: dict[tuple, Condition | None] = {}  # by a map's name and its targets
        self.lower(None)  # refuse a bad logic at once

    def start(self, request: Request) -> Start:
        """Where a request begins. Raises RequestError and ConditionError."""
        return self.all([request])[0]

    def all(self, requests: Sequence[Request]) -> list[Start]:
        """Of several requests; a bad one is refused before anything is solved."""
        latents = self.draw(requests)
        return [self.begin(request, self.plain(request).expression, latent, solver=self.solver(request))
                for request, latent in zip(requests, latents, strict=True)]

    def draw(self, requests: Sequence[Request]) -> list[Array]:
        """Where requests begin: the latent they bring, what their map makes, else the prior's; both of their seed."""
        prior, unplaced = self.flows.prior, [r for r in requests if r.latent is None]
        noise = normals_many([r.seed for r in unplaced], [PRIOR_STREAM] * len(unplaced), prior.noise_dim)
        pushed = prior.push(noise, np.array([self.truncations(r)[0] for r in unplaced]))
        drawn = iter(self.push_through_maps(unplaced, noise, pushed))
        return [next(drawn) if r.latent is None else checked_latent(r.latent, self.space(r.space).width, r.space)
                for r in requests]

    def space(self, name: str) -> Space:
        """Where requests begin. Raises RequestError."""
        if name not in self.bundle.spaces:
            raise RequestError("this generator is plain and conditional: its w is z and the class, so that a request "
                               "begins with z= and label=, not with w=")
        return self.bundle.spaces[name]

    def push_through_maps(self, requests: Sequence[Request], noise: Array, latents: Array) -> Array:
        """The latents, with those of requests for a one-pass map made by it."""
        for name in dict.fromkeys(r.oneshot for r in requests if r.oneshot is not None):
            some = [i for i, r in enumerate(requests) if r.oneshot == name]
            order = self.oneshot(requests[some[0]]).targets
            for i in some:
                self.plain(requests[i])  # refuses targets that do not fit
            targets = np.array([[(requests[i].targets or {})[key] for key in order] for i in some], np.float32)
            made = self.flows.solving.oneshot(name, noise[some], targets if order else None)
            latents = np.array(latents, made.dtype)
            latents[some] = made
        return latents

    def oneshot(self, request: Request) -> Oneshot:
        """The record of the map that a request names."""
        if (found := self.bundle.oneshots.get(request.oneshot or "")) is not None:
            return found
        known = ", ".join(self.bundle.oneshots) or "none: lace-train oneshot makes them"
        raise RequestError(f"{self.bundle.path} has no one-pass map {request.oneshot!r}; it has: {known}")

    def plain(self, request: Request) -> Request:
        """The request for a posterior that a one-pass map stands for; another one as it is."""
        if request.oneshot is None:
            return request
        record = self.oneshot(request)
        key = record.name, tuple((request.targets or {}).items())
        condition = self.granted.get(key)
        if condition is None:  # reading a text takes longer than the map
            if len(self.granted) >= TAPES:
                self.granted.clear()
            condition = self.granted[key] = wish_of(record).condition(request.targets or {})
        label = record.label if self.bundle.generator.labels else None
        return Request(condition, seed=request.seed, truncation=record.truncation, label=label,
                       confidence=record.confidence, guidance=record.guidance)

    def begin(self, request: Request, condition: Condition | None, latent: Array,
              anchor: Anchor | None = None, *, solver: Solver | None = None) -> Start:
        """Without an anchor, ``near`` and ``keep`` hold on to the request's own start, as in the paper."""
        space = self.space(request.space)
        tape = self.lower(condition, space, request.guidance)
        if anchor is None and (tape.near or tape.anchors):
            anchor = self.anchor(request, latent)
        w_dim, (truncation, psi) = self.bundle.generator.w_dim, self.truncations(request)
        return Start(
            z=latent, space=space, tape=tape if anchor is None else tape.anchored(anchor.logits),
            psi=psi, truncation=truncation, label=self.label(request), seed=int(request.seed),
            solver=solver, wish=self.wish(condition, solver) if isinstance(solver, Posterior | Polish) else EMPTY,
            candidate=int(request.candidate),
            anchor_z=latent if anchor is None else anchor.z,
            anchor_w=np.zeros(w_dim, np.float32) if anchor is None else anchor.w,
        )

    def solver(self, request: Request) -> Solver | None:
        """What serves a request; None: the flow as it is. Raises RequestError for what the posterior cannot serve where
        it was named."""
        if request.oneshot is not None:
            return self.polish(request)
        why_not = "the sampler takes the flow" if self.posterior is None else self.refusal(request)
        if self.posterior is not None and why_not is None:
            return self.posterior.asked(request.confidence, request.guidance, request.steps)
        if self.is_strict or request.confidence is not None or request.candidate:
            raise RequestError(f"solver 'posterior' cannot serve this request, because {why_not}: choose a solver of "
                               "the flow, such as gauss-newton, which takes a guidance")
        return None if request.steps is None else with_steps(self.flows.solver, int(request.steps))

    def polish(self, request: Request) -> Polish:
        """What measures the rows of a one-pass map. Raises RequestError where its heads cannot be read."""
        record = self.oneshot(request)
        if record.even and request.polish:
            raise RequestError(f"the one-pass map {record.name!r} makes {' and '.join(record.even)} even, which the "
                               "posterior that polish leads to is not: leave polish out")
        if (why_not := self.refusal(self.plain(request))) is not None:
            raise RequestError(f"the one-pass map {record.name!r} cannot be used, because {why_not}")
        return Polish(record.confidence, record.guidance, int(request.polish or 0))

    def refusal(self, request: Request) -> str | None:
        """Why the posterior cannot serve a request."""
        condition, attributes = request.expression, self.bundle.attributes
        if request.latent is not None:
            return f"it brings its own start ({request.space})"
        if self.logic != "product":
            return f"probabilities need product logic, not {self.logic!r}"
        if self.flows.solving.device != "cpu":
            return f"runtime {self.flows.solving.name!r} does not run sharp heads yet"
        if condition is not None and not is_statement(condition):
            return "near and keep hold on to an anchor and are no statements"
        for name in condition.attributes() if condition is not None else ():
            if name in attributes and (lack := self.lack(attributes[name])):
                return f"the attribute {name!r} has no {lack}"
        return None

    def lack(self, attribute: Attribute) -> str | None:
        """What of an attribute the posterior misses in this bundle."""
        sharp = self.bundle.heads[attribute.head].sharp
        if attribute.kind == "class":
            return None if sharp and sharp.calibrated else "calibrated sharp head (lace-train heads --sharp makes one)"
        return None if attribute.tolerance else "tolerance (lace-train heads --sharp measures it)"

    def wish(self, condition: Condition | None, solver: Posterior | Polish) -> Tape:
        """The condition as a probability. With a guidance values have their Gaussian energies, else they are true or
        false."""
        if solver.confidence is None:
            return lower(condition, self.bundle.attributes)
        key = condition, None, 1.0
        if key not in self.tapes:
            tolerances = {name: a.tolerance for name, a in self.bundle.attributes.items() if a.tolerance}
            self.tapes[key] = lower_crisp(condition, self.bundle.attributes, tolerances)
        return self.tapes[key]

    def anchor(self, request: Request, latent: Array) -> Anchor:
        """The request's own start, by one reading of the field."""
        space = self.space(request.space)
        w, logits = self.flows.read(space, latent[None], [self.psi(request)], [self.label(request)])
        return Anchor(latent, w[0], {name: values[0] for name, values in logits.items()})

    def asked(self, request: Request) -> float:
        """The truncation that a request names, or the default."""
        if request.oneshot is not None:
            return self.oneshot(request).truncation
        return self.truncation if request.truncation is None else request.truncation

    def psi(self, request: Request) -> float:
        """Of the mapping."""
        return self.truncations(request)[1]

    def truncations(self, request: Request) -> tuple[float, float]:
        """Of the draw, and of the mapping (engine/prior.py). Raises RequestError."""
        psi = self.asked(request)
        if self.bundle.generator.is_plain and not 0 <= psi <= 1:
            raise RequestError(f"truncation {psi:g} is out of range: expected 0 to 1, because this generator takes its "
                               "latent as it is, and 1 is all of its prior")
        return split(self.bundle.generator, psi)

    def label(self, request: Request) -> int:
        labels = self.bundle.generator.labels
        if request.oneshot is not None:
            return self.oneshot(request).label
        if request.label is None:
            if labels and self.space(request.space).is_mapped:
                raise RequestError(f"this generator is conditional: give each Request a label in 0..{labels - 1}")
            return 0
        if not labels:
            raise RequestError(f"label {request.label} was given, but this generator is unconditional")
        if not 0 <= request.label < labels:
            raise RequestError(f"label {request.label} is out of range: expected 0..{labels - 1}")
        return int(request.label)

    def lower(self, condition: Condition | None, space: Space | None = None, guidance: float | None = None) -> Tape:
        """The condition's tape in a space (z). In w there is no z: heads on z are refused, and the * of keep leaves
        them out."""
        space = self.bundle.spaces["z"] if space is None else space
        key = condition, space, self.guidance if guidance is None else guidance
        if known := self.tapes.get(key):
            return known
        attributes = self.flows.readable(space)
        for name in condition.attributes() if condition is not None else ():
            if name in self.bundle.attributes and name not in attributes:
                raise ConditionError(f"attribute {name!r} is read from z, which a request that starts from w "
                                     "does not have: start from z, or leave the attribute out")
        if len(self.tapes) >= TAPES:
            self.tapes.clear()
        tape = lower(condition, attributes, logic=self.logic, temperature=self.temperature, guidance=key[2])
        return self.tapes.setdefault(key, tape)
