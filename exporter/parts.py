"""Parts: what a training wrote, to be added to a bundle. ``lace-export --bundle B --add PART... --out B2``.

A part is one file. Its kind is told by the key of its safetensors' metadata; LACE's own checkpoints are heads. A new
kind is one entry in KINDS, with what reads it; exporter/exporting.py merges what was read.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from numpy import ndarray as Array

from engine.bundle import Attribute, Bundle, Head
from engine.errors import BundleError, CheckpointError
from exporter import oneshots
from exporter.archives import safetensors_metadata
from exporter.contents import rename, sharp_record
from exporter.heads import METADATA, HeadStack, load_heads
from exporter.oneshots import OneshotPart, load_oneshot


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of part: the metadata key that its files have, and what reads one (path, labels, mean w)."""

    title: str
    key: str
    read: Callable[[Path, Any, Array], Any]


def read_heads(path: Path, labels: Any, centre: Array) -> HeadStack:
    return load_heads(path, labels=labels, centre=centre)


def read_oneshot(path: Path, labels: Any, centre: Array) -> OneshotPart:
    return load_oneshot(path)


KINDS = {
    "heads": Kind("heads of lace-train, or a head checkpoint of LACE", METADATA, read_heads),
    "oneshot": Kind("a one-pass map of lace-train", oneshots.METADATA, read_oneshot),
}


def kind_of(path: Path) -> Kind:
    """Raises CheckpointError for a file that is no part."""
    if path.suffix != ".safetensors":
        return KINDS["heads"]
    if not path.is_file():
        raise CheckpointError(f"there is no file {path}")
    keys = set(safetensors_metadata(path.read_bytes()))
    for kind in KINDS.values():
        if kind.key in keys:
            return kind
    known = "; ".join(f"{kind.title} ({kind.key})" for kind in KINDS.values())
    raise CheckpointError(f"{path} is no part that can be added to a bundle: its metadata names none of: {known}")


def read_part(path: str | Path, *, labels: Any, centre: Array) -> HeadStack | OneshotPart:
    """labels   what the user says of the logits;  centre: the generator's mean w, which boundaries are measured from"""
    return kind_of(Path(path)).read(Path(path), labels, centre)


# --- heads ----------------------------------------------------------------------------------------------------------


def split_stacks(stacks: Sequence[HeadStack], bundle: Bundle) -> tuple[list[HeadStack], dict[str, HeadStack]]:
    """New heads, with names of their own, and sharp stacks by the head of the bundle that they belong to."""
    added, sharpened = [], {}
    for stack in stacks:
        if stack.layers:
            added.append(stack)
            continue
        head = head_of(stack, bundle)
        if head in sharpened:
            raise BundleError(f"two parts bring a sharp stack for the head {head!r}: leave one out")
        sharpened[head] = stack
    return rename(added, set(bundle.heads)), sharpened


def head_of(stack: HeadStack, bundle: Bundle) -> str:
    """The head whose attributes are the stack's, column by column."""
    wanted = {(a.name, a.kind, tuple(a.columns), tuple(a.classes)) for a in stack.attributes}
    for head in bundle.heads.values():
        own = {(a.name, a.kind, a.columns, a.classes) for a in bundle.attributes.values() if a.head == head.name}
        if own == wanted and head.space == stack.space:
            return head.name
    names = ", ".join(a.name for a in stack.attributes)
    raise BundleError(f"the part {stack.name!r} has only a sharp stack, and no head of {bundle.path} has exactly its "
                      f"attributes ({names}), classes and space: train a smooth stack too, or add it first")


def sharpen(heads: Sequence[Head], attributes: Sequence[Attribute],
            sharpened: dict[str, HeadStack]) -> tuple[tuple[Head, ...], tuple[Attribute, ...]]:
    """The records with the sharp stacks, and the tolerances and the origin that came with them."""
    came = {a.name: a for stack in sharpened.values() for a in stack.attributes}
    heads = tuple(replace(head, sharp=sharp_record(sharpened[head.name].sharp)) if head.name in sharpened else head
                  for head in heads)
    return heads, tuple(
        replace(a, tolerance=came[a.name].tolerance or a.tolerance,
                provenance={**a.provenance, **came[a.name].provenance}) if a.name in came else a for a in attributes)
