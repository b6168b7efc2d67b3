"""The posterior by its definition in numpy, with sharp heads from files: for bundles and engines that have none."""

import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy import ndarray as Array

from engine.batch import Status
from engine.bundle import Attribute, Bundle
from engine.errors import LaceError
from engine.reference import field
from engine.reference.evidence import Evidence, evidence
from engine.reference.posterior import Ends, Settings, sample
from engine.reference.worlds import BundleWorld, Stack, Wish
from engine.requests import Request, Sample
from engine.sampler import Sampler
from engine.solvers import GaussNewton
from engine.tape import Tape, lower, lower_crisp
from exporter.heads import load_heads

NEWTON, NEARER = 6, 4.0  # steps of ``approach``, and their guidance
LEAST_TOLERANCE = 0.03


@dataclass(frozen=True, slots=True, eq=False)
class SharpHeads:
    """Of every attribute its calibrated stack and, of a value, the tolerance within which it is met."""

    stacks: Mapping[str, Stack]
    tolerances: Mapping[str, float]

    def digest(self) -> str:
        """Of all numbers, for what is kept by them."""
        hashed = hashlib.sha256()
        for name, stack in sorted(self.stacks.items()):
            hashed.update(f"{name} {stack.columns} {stack.space} {self.tolerances[name]}".encode())
            for layer in stack.layers:
                for array in layer:
                    hashed.update(array.tobytes())
        return hashed.hexdigest()


def read_sharp(paths: Sequence[Path], attributes: Mapping[str, Attribute]) -> SharpHeads:
    """Head files of ``lace-train heads``; LaceError where one is not calibrated or an attribute is missing."""
    stacks, tolerances = {}, {}
    for path in paths:
        head = load_heads(path)
        if head.sharp is None or not head.sharp.calibrated:
            raise LaceError(f"{path} holds no calibrated sharp stack: give files that lace-train heads --sharp wrote")
        for attribute in head.attributes:
            stacks[attribute.name] = Stack(head.sharp.layers, attribute.columns, head.space)
            tolerances[attribute.name] = attribute.tolerance or LEAST_TOLERANCE
    if missing := [name for name in attributes if name not in stacks]:
        raise LaceError(f"there is no sharp head of {', '.join(missing)}: give a file of each attribute of the bundle")
    return SharpHeads(stacks, tolerances)


def sharp_of(bundle: Bundle) -> SharpHeads | None:
    """The bundle's own; None where one of its attributes has no calibrated sharp stack."""
    heads = bundle.heads
    if not all((sharp := heads[a.head].sharp) and sharp.calibrated for a in bundle.attributes.values()):
        return None
    stacks = {name: Stack(field.layers(bundle.field, f"head.{a.head}.sharp"), a.columns, heads[a.head].space)
              for name, a in bundle.attributes.items()}
    return SharpHeads(stacks, {name: a.tolerance or LEAST_TOLERANCE for name, a in bundle.attributes.items()})


class PosteriorSampler:
    """Requests that are drawn, by the posterior; a row that does not enter its set ends as the flow leaves it.

    flow   gives the bundle, the start of a row and what a row falls back to
    near   another sampler of the bundle, which takes the Gauss-Newton steps
    """

    def __init__(self, flow: Sampler, near: Sampler, heads: SharpHeads, settings: Settings | None = None):
        self.flow, self.near, self.heads, self.settings = flow, near, heads, settings or Settings()
        self.tapes: dict[object, Tape] = {}

    @classmethod
    def open(cls, open_sampler, heads: SharpHeads, settings: Settings | None = None) -> "PosteriorSampler":
        return cls(open_sampler(), open_sampler(solver=GaussNewton(steps=NEWTON), guidance=NEARER), heads, settings)

    def lower(self, condition) -> Tape:
        attributes = self.flow.bundle.attributes
        if condition not in self.tapes:
            self.tapes[condition] = (lower(condition, attributes) if self.settings.confidence is None else
                                     lower_crisp(condition, attributes, self.heads.tolerances))
        return self.tapes[condition]

    def world(self, requests: Sequence[Request]) -> BundleWorld:
        g = self.flow.bundle.generator

        def towards(rows: Array, z: Array) -> Array:
            near = [Request(requests[row].condition, seed=requests[row].seed, z=start, label=requests[row].label,
                            truncation=requests[row].truncation) for row, start in zip(rows, z, strict=True)]
            ends = np.stack([end.z for end in self.near.solve(near) if end.z is not None])
            # The mapping does not see the length of z, which long steps stretch and the prior does not like.
            return (ends * np.linalg.norm(z, axis=1, keepdims=True)
                    / np.linalg.norm(ends, axis=1, keepdims=True)).astype(np.float32)

        truncations = map(self.flow.starts.truncations, requests)
        wishes = [Wish(self.lower(r.expression), psi, r.label or 0, draw)
                  for r, (draw, psi) in zip(requests, truncations, strict=True)]
        return BundleWorld(self.flow.bundle.field, self.heads.stacks, wishes, g.z_dim, normalise=g.normalise,
                           prior=self.flow.flows.prior, towards=towards)

    def solve(self, requests: Sequence[Request]) -> tuple[list[Sample], Ends, float]:
        """Samples, what became of the rows, and the seconds that it took."""
        began = time.perf_counter()
        world = self.world(requests)
        ends = sample(world, [r.seed for r in requests], self.settings)
        lost = np.flatnonzero(~ends.entered)
        if len(lost):
            flown = self.flow.solve([requests[row] for row in lost])
            ends.x[lost] = np.stack([s.z for s in flown if s.z is not None])
        seconds = time.perf_counter() - began
        w = world.map(np.arange(len(requests)), ends.x)
        samples = [
            Sample(request, ends.x[i], w[i], {}, float(-ends.log_p[i]), Status.DONE, int(ends.corrections[i]),
                   int(ends.candidates[i] + ends.corrections[i]), int(ends.corrections[i] - ends.accepted[i]), 0)
            for i, request in enumerate(requests)
        ]
        return samples, ends, seconds

    def evidence(self, request: Request, error: float = 0.1) -> Evidence:
        return evidence(self.world([request]), self.settings, error=error)
