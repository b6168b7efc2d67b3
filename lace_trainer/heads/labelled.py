"""Latents of a generator with what image classifiers say of their pictures: what sharp heads are trained on.

Every labeller has a vote, its likeliest class. What a probability should be is the share of the votes: how likely a
classifier of this kind is to say so. Averaged probabilities are less sure: where that of two labellers is above 0.9, a
third classifier agrees in 99.9 % (red hair, the demo), and 31 % of the red-haired are below. But they say more of a
picture than a vote does. So heads learn probabilities, and votes choose the temperature.

The latents are those of seeds, as a sampler draws them, and some are held out at each truncation that the heads must be
right at.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

import numpy as np
import torch
from numpy import ndarray as Array
from safetensors.numpy import load_file
from safetensors.numpy import save as to_bytes

from engine.bundle import sha256
from engine.folders import write_atomically
from engine.reference.noise import normals_many
from engine.requests import Request
from engine.sampler import Sampler
from exporter.exporting import with_heads
from exporter.heads import HeadStack
from lace_trainer.attributes import Attribute
from lace_trainer.heads.agreement import Agreement, agreement
from lace_trainer.heads.labellers import Labellers, chosen, draw_labels, mirrored, spans_of
from lace_trainer.heads.pairs import DTYPES, Pairs, check_names, held_back
from lace_trainer.heads.steered import random_conditions

Progress = Callable[[int, int, str], None]

PSIS = (0.5, 0.7, 1.0)  # truncations at which pairs are held out
LEAST_PSI = 0.5  # training latents have one from here to 1, evenly
HELD_OUT = 4000  # pairs for each of PSIS, unless the samples are few
MIRRORED = 2000  # pictures of which the mirror image is labelled too, at most
BATCH = 64
SOUGHT = 0.5  # confidence of the samples that are sought: where the heads say yes, and may be wrong
# Seeds of the samples: far from those that users and evaluations choose. A training's own seed chooses the block.
FIRST_SEED, BLOCK = 2**50, 2**30


@dataclass(frozen=True, slots=True, eq=False)
class Labelled:
    """n latents and what the labellers say of them; of these the last ``held_out`` are not for training.

    w (n, w_dim), psi (n,)   float32
    votes (n, columns)       float32, one column for each class or value of the attributes, see ``spans``: the share of
                             the votes that a class has, or the value; NaN where nothing is known
    likely (n, columns)      the same by the labellers' mean probabilities
    voters                   of every attribute, how many labellers there were
    agreements               of every attribute, the labellers' with themselves on mirrored pictures, where it is known
    source                   where they come from, for the provenance of the heads
    """

    w: Array
    psi: Array
    votes: Array
    likely: Array
    attributes: tuple[Attribute, ...]
    held_out: int
    voters: tuple[int, ...] = ()
    agreements: tuple[Agreement | None, ...] = ()
    source: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        count = len(self.attributes)
        object.__setattr__(self, "voters", self.voters or (1,) * count)
        object.__setattr__(self, "agreements", self.agreements or (None,) * count)

    @property
    def spans(self) -> list[tuple[int, int]]:
        """(first, past-last) column of every attribute."""
        return spans_of(self.attributes)

    def select(self, names: Sequence[str]) -> "Labelled":
        """Only these attributes. Raises LaceError for one that is not labelled."""
        known = [a.name for a in self.attributes]
        check_names(names, known)
        places = [known.index(name) for name in names]
        columns = [column for place in places for column in range(*self.spans[place])]
        attributes, voters, agreements = (tuple(table[place] for place in places)
                                          for table in (self.attributes, self.voters, self.agreements))
        return replace(self, votes=self.votes[:, columns], likely=self.likely[:, columns], attributes=attributes,
                       voters=voters, agreements=agreements)

    def pairs(self, seed: int) -> Pairs:
        """The training rows with one label each, see ``draw_labels``: for heads that learn labels."""
        count = len(self.w) - self.held_out
        source = chosen(self.likely[:count], self.votes[:count], self.spans, self.voters)
        labels = draw_labels(source, self.attributes, self.spans, np.random.default_rng((seed, 1)))
        return Pairs(self.w[:count], labels, self.attributes, validation=held_back(count), source=self.source)


def from_pairs(pairs: Pairs) -> Labelled:
    """Pairs as unanimous votes; their validation rows are held out. Their truncation is taken as 1."""
    train, validation, _ = pairs.split()
    rows = np.concatenate([train, validation])
    columns = []
    for attribute, labels in zip(pairs.attributes, pairs.labels[rows].T, strict=True):
        if attribute.kind == "class":
            hot = np.eye(len(attribute.classes))[np.nan_to_num(labels).astype(int)]
            columns.append(np.where(np.isnan(labels)[:, None], np.nan, hot))
        else:
            columns.append(labels[:, None])
    votes = np.concatenate(columns, axis=1).astype(np.float32)
    psi = np.ones(len(rows), np.float32)
    return Labelled(pairs.w[rows], psi, votes, votes, pairs.attributes, len(validation), source=pairs.source)


class Source(Protocol):
    """A generator that draws."""

    resolution: int
    facts: dict[str, Any]

    def draw(self, seeds: Sequence[int], psi: Array) -> tuple[Array, Array | torch.Tensor]:
        """w (n, w_dim) of seeds at truncations psi (n,), and their pictures, as ``Labellers`` take them."""
        ...


class BundleSource:
    """The generator of a bundle, through its sampler. Of a conditional generator the classes take turns."""

    def __init__(self, path: str | Path, *, threads: int = 0):
        self.sampler = Sampler(path, threads=threads)
        self.resolution = self.sampler.bundle.generator.resolution
        self.facts = {"bundle": self.sampler.bundle.hash}

    def draw(self, seeds: Sequence[int], psi: Array) -> tuple[Array, Array]:
        labels = self.sampler.bundle.generator.labels
        requests = [Request(None, seed=seed, truncation=float(p), label=seed % labels if labels else None)
                    for seed, p in zip(seeds, psi, strict=True)]
        samples = self.sampler.sample(requests)
        return np.stack([s.w for s in samples]), np.stack([s.image for s in samples if s.image is not None])


class CheckpointSource:
    """The generator of a checkpoint, by torch."""

    def __init__(self, path: str | Path, *, precision: str = "fp32"):
        from exporter.checkpoints import load_generator

        parts = load_generator(path)
        self.mapping, self.synthesis = parts.mapping, parts.synthesis
        self.synthesis.set_precision(DTYPES[precision])
        self.resolution = self.synthesis.resolution
        self.facts = {"generator": sha256(Path(path)), "precision": precision}

    @torch.inference_mode()
    def draw(self, seeds: Sequence[int], psi: Array) -> tuple[Array, torch.Tensor]:
        z = torch.from_numpy(normals_many(seeds, [0] * len(seeds), self.mapping.z_dim))
        average = self.mapping.get_buffer("w_avg")
        w = average + torch.from_numpy(psi[:, None]) * (self.mapping(z) - average)
        return w.numpy(), self.synthesis(w[:, None].expand(-1, self.synthesis.num_ws, -1))


def labelled_samples(source: Source, labellers: Labellers, *, count: int, seed: int = 0, directory: Path,
                     progress: Progress | None = None) -> Labelled:
    """``count`` labelled samples for training, and some held out at each of PSIS.

    They are kept in ``directory``, under a name made of all that decides them.
    """
    labellers.check_size(source.resolution)
    held = min(HELD_OUT, max(1, count // 10))
    facts = {"kind": "votes, mirrored", **source.facts, "labellers": labellers.hashes, "count": count, "seed": seed}
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
    path = Path(directory) / f"votes-{key}.safetensors"
    psi = truncations(count, held, seed)
    if not path.exists():
        write_atomically(path, to_bytes(look(source, labellers, psi, FIRST_SEED + seed * BLOCK, progress)))
    found = load_file(path)
    facts["labeller_accuracy"] = labellers.accuracy
    opinions = found["opinions"]
    return Labelled(found["w"], psi, labellers.votes(opinions), labellers.likely(opinions), labellers.attributes,
                    held * len(PSIS), tuple(map(len, labellers.voters)),
                    agreements_of(labellers, opinions, found["mirrored"]), facts)


def agreements_of(labellers: Labellers, opinions: Array, mirrors: Array) -> tuple[Agreement, ...]:
    """mirrors (members, m, columns): opinions of the mirror images of the last m pictures."""
    plain, mirror = labellers.likely(opinions[:, -mirrors.shape[1] :]), labellers.likely(mirrors)
    return tuple(agreement(attribute, plain[:, low:high], mirror[:, low:high])
                 for attribute, (low, high) in zip(labellers.attributes, labellers.spans, strict=True))


def truncations(count: int, held: int, seed: int) -> Array:
    """psi (count + held * len(PSIS),) float32 of all samples."""
    drawn = np.random.default_rng((seed, 3)).uniform(LEAST_PSI, 1.0, count)
    return np.concatenate([drawn, np.repeat(PSIS, held)]).astype(np.float32)


def sought_samples(bundle: str | Path, stacks: Sequence[HeadStack], labellers: Labellers, *, count: int, seed: int = 0,
                   threads: int = 0, progress: Progress | None = None) -> Labelled:
    """``count`` labelled samples of the posterior of random conditions, by sharp ``stacks`` of ``bundle``'s generator.

    Plain samples hardly ever show what is rare, and of latents that they have not seen heads are sure too early. Where
    the posterior goes, they learn the most from labels (Lewis, Gale, SIGIR 1994; Ross, Gordon, Bagnell, AISTATS 2011).
    What a picture shows, given its latent, is the same wherever the latent comes from, so no probability is bent by it.
    """
    rng = np.random.default_rng((seed, 4))
    psi = rng.uniform(LEAST_PSI, 1.0, count).astype(np.float32)
    ws, opinions = [], []
    with TemporaryDirectory(prefix="lace-sought-") as folder:
        steering = with_heads(bundle, stacks, out=Path(folder) / "sought.lace")
        sampler = Sampler(steering, threads=threads, solver="posterior", confidence=SOUGHT)
        conditions = random_conditions(list(steering.attributes.values()), count, rng)
        for start in range(0, count, BATCH):
            requests = [Request(condition, seed=FIRST_SEED + (seed + 1) * BLOCK - 1 - start - i, truncation=float(p))
                        for i, (condition, p) in enumerate(zip(conditions[start : start + BATCH],
                                                               psi[start : start + BATCH], strict=True))]
            samples = sampler.sample(requests)
            ws.append(np.stack([s.w for s in samples]))
            opinions.append(labellers.opinions(np.stack([s.image for s in samples if s.image is not None])))
            if progress:
                progress(start + len(samples), count, "seeking and labelling")
    found = np.concatenate(opinions, axis=1).astype(np.float32)
    return Labelled(np.concatenate(ws), psi, labellers.votes(found), labellers.likely(found), labellers.attributes, 0,
                    tuple(map(len, labellers.voters)))


def joined(plain: Labelled, sought: Labelled) -> Labelled:
    """Both together; what is held out is of ``plain`` alone, so that heads are judged on what the prior draws."""
    sought = sought.select([attribute.name for attribute in plain.attributes])
    w, psi, votes, likely = (np.concatenate([getattr(sought, name), getattr(plain, name)])
                             for name in ("w", "psi", "votes", "likely"))
    return replace(plain, w=w, psi=psi, votes=votes, likely=likely,
                   source=plain.source | {"sought": plain.source.get("sought", 0) + len(sought.w)})


def look(source: Source, labellers: Labellers, psi: Array, first: int,
         progress: Progress | None) -> dict[str, Array]:
    """w (n, w_dim) and opinions (members, n, columns) of the samples with seeds ``first``, ``first`` + 1, ..., and of
    the mirror images of the last ones."""
    ws, opinions, mirrors = [], [], []
    last = len(psi) - min(MIRRORED, int((psi == psi[-1]).sum()))
    for start in range(0, len(psi), BATCH):
        part = psi[start : start + BATCH]
        w, pictures = source.draw(range(first + start, first + start + len(part)), part)
        ws.append(w.astype(np.float32))
        opinions.append(labellers.opinions(pictures).astype(np.float32))
        if start + len(part) > last:
            mirrors.append(labellers.opinions(mirrored(pictures[max(0, last - start) :])).astype(np.float32))
        if progress:
            progress(start + len(part), len(psi), "sampling and labelling")
    return {"w": np.concatenate(ws), "opinions": np.concatenate(opinions, axis=1),
            "mirrored": np.concatenate(mirrors, axis=1)}
