"""What all suites share: the sampler, the eyes that judge, plain samples, and how pictures are looked at."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol

import numpy as np
from numpy import ndarray as Array

from engine.bundle import Attribute, Bundle
from engine.condition import Condition
from engine.errors import LaceError
from engine.reference.noise import SEED_LIMIT
from engine.reference.tape import evaluate as interpret
from engine.requests import Request, Sample
from engine.sampler import Sampler
from engine.solvers import GaussNewton
from lace_evaluation.nearness import Widest, widest
from lace_evaluation.questions import SHOWN
from lace_evaluation.store import Cell, Store
from lace_evaluation.world import Judge, Law, features, is_rendered, judged, plain_law, rendered_law
from lace_trainer.faces.pictures import reference_features, renders
from lace_trainer.judges import metrics
from lace_trainer.judges.classifier import Classifier

CHUNK = 256  # pictures in memory at once
POOL, MOST_POOL = 80, 20_000  # plain samples for every row of a cell, and at most
POOL_SEED = 2**40  # added to the seed: the pool shares no sample with the rows of the cells
REFERENCE, MOST_REFERENCE = 40, 10_000  # renders, or plain samples, for every row of a cell, and at most
REFERENCE_SEED = 2**41  # added to the seed, where plain samples are the reference


class Embedding(Protocol):
    """A ``lace_trainer.judges.identity.Identity``."""

    def embed(self, pictures: Array) -> Array: ...


@dataclass(frozen=True, slots=True, eq=False)
class Seen:
    """What the judge sees in n pictures.

    labels     (n, attributes of the bundle) class index or value
    features   (n, d) for the Fréchet distance;  embedded: (n, e) unit rows of the identity network, or (n, 0)
    pictures   the first ``shown`` of them, uint8;  seconds: of decoding and of judging
    """

    labels: Array
    features: Array
    embedded: Array
    pictures: Array
    seconds: dict[str, float]


@dataclass(frozen=True, slots=True, eq=False)
class Pool:
    """Plain samples: the proposals of rejection sampling, what linear models are fitted to, how rare things are.

    seeds (m,), w (m, w_dim), logits {attribute: (m, C)} of the bundle's heads, labels (m, attributes) of the judge
    seconds   of one proposal, without decoding
    """

    seeds: Array
    w: Array
    logits: dict[str, Array]
    labels: Array
    seconds: float


class Study:
    """One bundle under one judge.

    open_sampler   a sampler on the bundle; with a solver, logic or capacity other than the command line's
    count   rows of a group of attributes; row i has seed ``seed`` + i whatever the method
    label   class of a conditional generator;  identity: None where the suite ``editing`` is not asked for
    """

    def __init__(self, open_sampler: Callable[..., Sampler], judge: Judge, store: Store, *, count: int,
                 seed: int = 0, label: int | None = None, identity: Embedding | None = None):
        sampler = open_sampler()
        check_world(sampler.bundle)
        if seed + REFERENCE_SEED + MOST_REFERENCE > SEED_LIMIT:
            raise LaceError(f"seed {seed} is too great for the suites: choose one below 2**63")
        self.open_sampler, self.sampler, self.judge = open_sampler, sampler, judge
        self.store, self.identity = store, identity
        self.count, self.seed, self.label = count, seed, label
        self.attributes: Mapping[str, Attribute] = judged(sampler.bundle.attributes, judge)
        self.is_rendered = is_rendered(sampler.bundle.attributes)
        known = [a.name for a in judge.attributes]
        self.columns = [known.index(name) for name in self.attributes]

    def requests(self, conditions: Sequence[Condition | None], first: int = 0) -> list[Request]:
        """Of rows ``first``, ``first`` + 1, ...: row i asks for ``conditions``[i - first] from seed ``seed`` + i."""
        return [Request(c, seed=self.seed + i, label=self.label) for i, c in enumerate(conditions, first)]

    def look(self, samples: Sequence[Sample], *, embed: bool = False, shown: int = SHOWN) -> Seen:
        """Decode what has no picture yet, and judge; never more than CHUNK pictures at once."""
        labels, feature_rows, embedded, pictures, spent = [], [], [], [], np.zeros(2)
        for first in range(0, len(samples), CHUNK):
            times = [time.perf_counter()]
            part = samples[first : first + CHUNK]
            images = np.stack([s.image for s in (self.sampler.render(part) if part[0].image is None else part)])
            times.append(time.perf_counter())
            labels.append(self.judge.predict(images)[:, self.columns])
            feature_rows.append(features(self.judge, images))
            embedded.append(self.identity.embed(images) if embed and self.identity else np.empty((len(images), 0)))
            pictures.append(images[: max(0, shown - first)])
            times.append(time.perf_counter())
            spent += np.diff(times)
        seconds = dict(zip(("decode", "judge"), spent.tolist(), strict=True))
        return Seen(*map(np.concatenate, (labels, feature_rows, embedded, pictures)), seconds)

    def heads(self, samples: Sequence[Sample]) -> Array:
        """What the bundle's heads read at the samples' latents, as labels (n, attributes)."""
        return as_labels(stacked(self.sampler.measure(samples)), self.attributes)

    @cached_property
    def flow(self) -> Sampler:
        """The sampler, or one that takes the flow where that takes the posterior."""
        has_posterior = self.sampler.starts.posterior is not None
        return self.open_sampler(solver=GaussNewton()) if has_posterior else self.sampler

    @cached_property
    def pool(self) -> Pool:
        cell = self.store.cell("pool", self.make_pool)
        logits = {name: cell.other[f"logits/{name}"] for name in self.attributes}
        return Pool(cell.other["seeds"], cell.other["w"], logits, cell.other["labels"], cell.facts["seconds"])

    def make_pool(self) -> Cell:
        seeds = self.seed + POOL_SEED + np.arange(min(MOST_POOL, POOL * self.count), dtype=np.uint64)
        w, logits, labels, seconds = [], [], [], 0.0
        for first in range(0, len(seeds), CHUNK):
            began = time.perf_counter()
            requests = [Request(None, seed=int(seed), label=self.label) for seed in seeds[first : first + CHUNK]]
            samples = self.sampler.solve(requests)
            logits.append(stacked(self.sampler.measure(samples)))
            seconds += time.perf_counter() - began
            labels.append(self.look(samples).labels)
            w.append(np.stack([sample.w for sample in samples]))
        arrays = {f"logits/{name}": np.concatenate([part[name] for part in logits]) for name in self.attributes}
        other = {"seeds": seeds, "w": np.concatenate(w), "labels": np.concatenate(labels), **arrays}
        return Cell({"seconds": seconds / len(seeds), "count": len(seeds)}, other=other)

    @cached_property
    def reference(self) -> Array:
        """Features of fresh renders, or of fresh plain samples: what the Fréchet distance is measured from."""
        make = self.make_reference if self.is_rendered else self.make_plain_reference
        return self.store.cell("reference", make).other["features"]

    def make_reference(self) -> Cell:
        count = min(MOST_REFERENCE, REFERENCE * self.count)
        if isinstance(self.judge, Classifier):
            return Cell({}, other={"features": reference_features(self.judge, count)})
        parts = [features(self.judge, part) for part in renders(count, self.sampler.bundle.generator.resolution)]
        return Cell({}, other={"features": np.concatenate(parts)})

    def make_plain_reference(self) -> Cell:
        count, found = min(MOST_REFERENCE, REFERENCE * self.count), []
        for first in range(0, count, CHUNK):
            requests = [Request(None, seed=self.seed + REFERENCE_SEED + i, label=self.label)
                        for i in range(first, min(first + CHUNK, count))]
            found.append(self.look(self.sampler.solve(requests)).features)
        return Cell({}, other={"features": np.concatenate(found)})

    @cached_property
    def law(self) -> Law:
        """Of training targets."""
        return rendered_law if self.is_rendered else plain_law(list(self.attributes), self.pool.labels)

    @cached_property
    def reference_moments(self) -> metrics.Moments:
        return metrics.moments(self.reference)

    @cached_property
    def widest(self) -> Widest:
        return widest(self.reference_moments)

    def near_renders(self, features: Array) -> dict[str, float | None]:
        """Fréchet distance, precision and recall of features (n, d) against renders; None for too few pictures.

        Precision and recall are taken with as many renders as pictures.
        widest   the distance along the direction in which renders vary most;  far: share of pictures far out in it
        """
        if len(features) < 5:
            return dict.fromkeys(("fid", "precision", "recall", "widest", "far"))
        fid = metrics.frechet_distance(self.reference_moments, metrics.moments(features))
        precision, recall = metrics.precision_recall(self.reference[: len(features)], features)
        return {"fid": fid, "precision": precision, "recall": recall, "widest": self.widest.distance(features),
                "far": self.widest.far(features)}


def check_world(bundle: Bundle) -> None:
    """Methods are compared in w."""
    for name, attribute in bundle.attributes.items():
        if bundle.heads[attribute.head].space == "z":
            raise LaceError(f"the head of {name!r} reads z: the suites compare methods in w, and need heads on w")


def stacked(logits: Sequence[Mapping[str, Array]]) -> dict[str, Array]:
    """One dictionary a row -> one array (n, C) an attribute."""
    return {name: np.stack([row[name] for row in logits]) for name in logits[0]}


def as_labels(logits: Mapping[str, Array], attributes: Mapping[str, Attribute]) -> Array:
    """(n, attributes): index of the likeliest class, or the value."""
    columns = [logits[n].argmax(axis=1) if a.kind == "class" else logits[n][:, 0] for n, a in attributes.items()]
    return np.stack(columns, axis=1).astype(np.float32)


def at_end(sampler: Sampler, samples: Sequence[Sample]) -> list[Sample]:
    """The samples with the logits of all heads and the energy of their own request's condition where they are.

    For latents that no solver of ours brought there. A distance (near, keep) has no anchor here and counts nothing.
    """
    logits = sampler.measure(samples)
    found = []
    for sample, read in zip(samples, logits, strict=True):
        tape = sampler.starts.lower(sample.condition, sampler.bundle.spaces[sample.space])
        u = [column.read(read) for column in tape.columns]
        logp = interpret(tape.program, tape.parameters[None], np.array([u]))[0] if u else np.zeros(1)
        found.append(replace(sample, energy=0.0 - float(logp[0]), logits=read))
    return found
