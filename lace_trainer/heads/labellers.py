"""Who labels samples: classifiers of ``lace-train`` (.safetensors) and of anybody (.onnx with a spec), in any mix."""

import hashlib
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy import ndarray as Array
from torch import Tensor

from engine.bundle import sha256
from engine.classifier import ImageClassifier
from engine.classifier_spec import spec_path
from engine.errors import LaceError
from engine.runtimes import to_pixels
from lace_trainer.attributes import Attribute

SURE = 0.75  # probability of the likeliest class below which several labellers give no label
ONNX = ".onnx"
# uint8 (n, R, R, 3), or floats (n, 3, R, R) in about [-1, 1]
Pictures = Tensor | Array


class Member(Protocol):
    """One labeller.

    hashes     of what decides its labels, and of files with the same network
    accuracy   by attribute, where it is known
    size       side of the pictures that it reads, None: of any
    """

    attributes: tuple[Attribute, ...]
    hashes: tuple[str, ...]
    accuracy: Mapping[str, float]
    size: int | None

    def opinions(self, pictures: Pictures) -> Array:
        """(n, columns): probabilities of the classes, and the values, one attribute after another."""
        ...


class OurMember:
    """A classifier that ``lace-train classifier`` wrote."""

    def __init__(self, path: Path):
        from lace_trainer.judges.classifier import load

        self.model = load(path)
        self.attributes, self.size = self.model.attributes, self.model.shape.size
        self.hashes, self.accuracy = (sha256(path),), self.model.metadata.get("accuracy", {})

    def opinions(self, pictures: Pictures) -> Array:
        output = self.model.outputs(pictures).double()
        for attribute, (low, high) in zip(self.attributes, self.model.spans, strict=True):
            if attribute.kind == "class":
                output[:, low:high] = output[:, low:high].softmax(dim=1)
        return output.cpu().numpy()


class OnnxMember:
    """Anybody's classifier."""

    size = None

    def __init__(self, path: Path):
        self.model = ImageClassifier(path, threads=0)
        self.attributes = tuple(Attribute(a.name, a.kind, a.classes) for a in self.model.attributes)
        spec = hashlib.sha256(spec_path(path).read_bytes()).hexdigest()
        self.hashes = (*self.model.hashes, spec)
        self.accuracy = self.model.spec.facts.get("accuracy", {})

    def opinions(self, pictures: Pictures) -> Array:
        return self.model.read(as_bytes(pictures))


def as_bytes(pictures: Pictures) -> Array:
    """uint8 (n, R, R, 3), as a bundle draws."""
    if isinstance(pictures, Tensor):
        pictures = pictures.float().cpu().numpy()
    return pictures if pictures.dtype == np.uint8 else to_pixels(np.ascontiguousarray(pictures, np.float32))


def mirrored(pictures: Pictures) -> Pictures:
    """Left and right exchanged."""
    if isinstance(pictures, Tensor):
        return pictures.flip(3 if pictures.is_floating_point() else 2)
    return np.ascontiguousarray(pictures[:, :, ::-1])


def open_member(path: Path) -> Member:
    return OnnxMember(path) if path.suffix == ONNX else OurMember(path)


class Labellers:
    """One image classifier, or several whose opinions are joined, each about the attributes that it knows.

    One gives its likeliest class, as in the paper. Several give a class drawn from the mean of their probabilities, so
    that a head learns doubt where they disagree instead of one network's mistake; and no class at all where they are
    not SURE of any, as of the colour of hair under a hat: otherwise a hat becomes a way to every colour. Values are
    their mean.

    attributes   of all members, in the order in which they first come
    """

    def __init__(self, paths: Sequence[Path]):
        self.members = [open_member(Path(path)) for path in paths]
        self.hashes = [text for member in self.members for text in member.hashes]
        known: dict[str, Attribute] = {}
        for path, member in zip(paths, self.members, strict=True):
            for attribute in member.attributes:
                ours = known.setdefault(attribute.name, attribute)
                if ours != attribute:
                    raise LaceError(
                        f"{path} knows {attribute.name!r} as {attribute.kind} ({', '.join(attribute.classes)}), "
                        f"another labeller as {ours.kind} ({', '.join(ours.classes)}): use the same classes in the "
                        "same order, or rename one of them in its spec")
        self.attributes = tuple(known.values())

    @cached_property
    def voters(self) -> list[list[int]]:
        """Of every attribute, the members that know it."""
        return [[i for i, member in enumerate(self.members) if attribute in member.attributes]
                for attribute in self.attributes]

    @property
    def accuracy(self) -> dict[str, float]:
        """By attribute, as the labellers' own files say; the mean of those that know it."""
        found = {}
        for attribute, voters in zip(self.attributes, self.voters, strict=True):
            said = [self.members[i].accuracy.get(attribute.name) for i in voters]
            if said and None not in said:
                found[attribute.name] = float(np.mean(said))  # type: ignore[arg-type]
        return found

    @property
    def spans(self) -> list[tuple[int, int]]:
        """(first, past-last) column of every attribute among ``opinions``."""
        return spans_of(self.attributes)

    def opinions(self, pictures: Pictures) -> Array:
        """How likely each member finds each class, and the values: (members, n, columns) float64; NaN of what a member
        does not know."""
        places = {a.name: span for a, span in zip(self.attributes, self.spans, strict=True)}
        found = np.full((len(self.members), len(pictures), self.spans[-1][1]), np.nan)
        for i, member in enumerate(self.members):
            said = member.opinions(pictures)
            for attribute, (low, high) in zip(member.attributes, spans_of(member.attributes), strict=True):
                found[i, :, slice(*places[attribute.name])] = said[:, low:high]
        return found

    def label(self, pictures: Pictures, rng: np.random.Generator) -> Array:
        """Labels (n, attributes) float32 of pictures: class index or value; NaN where they are not sure."""
        return self.labels_of(self.opinions(pictures), rng)

    def labels_of(self, opinions: Array, rng: np.random.Generator) -> Array:
        likely, votes = self.likely(opinions), self.votes(opinions)
        return draw_labels(chosen(likely, votes, self.spans, list(map(len, self.voters))), self.attributes, self.spans,
                           rng)

    def likely(self, opinions: Array) -> Array:
        """(members, n, columns) -> (n, columns) float32: the mean of those that know."""
        return self.joined(opinions, lambda part, _: part.mean(axis=0))

    def votes(self, opinions: Array) -> Array:
        """The share of the votes that each class has, and the mean of a value, (n, columns) float32."""

        def count(part: Array, attribute: Attribute) -> Array:
            if attribute.kind == "class":
                part = np.eye(part.shape[2])[part.argmax(axis=2)]
            return part.mean(axis=0)

        return self.joined(opinions, count)

    def joined(self, opinions: Array, join) -> Array:
        parts = [join(opinions[voters, :, low:high], attribute) for attribute, voters, (low, high)
                 in zip(self.attributes, self.voters, self.spans, strict=True)]
        return np.concatenate(parts, axis=1).astype(np.float32)

    def check_size(self, resolution: int) -> None:
        """Raises LaceError if a labeller cannot read a generator's pictures."""
        for member in self.members:
            if member.size not in (None, resolution):
                raise LaceError(f"the generator draws {resolution} px, the labeller reads {member.size} px; train a "
                                "labeller of the generator's size, or take its .onnx, which reads any")


def spans_of(attributes: Sequence[Attribute]) -> list[tuple[int, int]]:
    """(first, past-last) of the columns that attributes take, one for each class or value."""
    ends = np.cumsum([len(a.classes) or 1 for a in attributes]).tolist()
    return list(zip([0, *ends], ends, strict=False))


def chosen(likely: Array, votes: Array, spans: Sequence[tuple[int, int]], voters: Sequence[int]) -> Array:
    """What labels are drawn from: the vote of a single labeller, the mean probabilities of several."""
    found = likely.copy()
    for (low, high), count in zip(spans, voters, strict=True):
        if count == 1:
            found[:, low:high] = votes[:, low:high]
    return found


def draw_labels(likely: Array, attributes: Sequence[Attribute], spans: Sequence[tuple[int, int]],
                rng: np.random.Generator) -> Array:
    """How likely each class is (n, columns), as labels (n, attributes) float32: drawn as likely, if one is SURE.
    Nothing known (NaN) is no label."""
    columns = []
    for attribute, (low, high) in zip(attributes, spans, strict=True):
        part = likely[:, low:high].astype(np.float64)
        if attribute.kind == "class":
            unknown = np.isnan(part).any(axis=1)
            drawn = (part.cumsum(axis=1) < rng.random((len(part), 1))).sum(axis=1).clip(max=high - low - 1)
            columns.append(np.where(unknown | ~(part.max(axis=1) >= SURE), np.nan, drawn))
        else:
            columns.append(part[:, 0])
    return np.stack(columns, axis=1).astype(np.float32)
