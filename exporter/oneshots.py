"""One-pass maps from files: what ``lace-train oneshot`` wrote, to be added to the bundle that it was fitted to."""

import hashlib
import json
from collections.abc import Mapping, Sequence, Set
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import safetensors.numpy
from numpy import ndarray as Array

from engine.bundle import Bundle, Oneshot
from engine.errors import BundleError, CheckpointError
from engine.folders import write_atomically
from engine.manifest import ONESHOT, record
from engine.oneshot import wish_of
from engine.solvers.posterior import stack_names
from engine.validation import stack_layout
from exporter.archives import safetensors_metadata

METADATA = "lace_oneshot"
LARGEST = 1 << 30  # bytes


@dataclass(frozen=True, slots=True, eq=False)
class OneshotPart:
    """A map's record and its tensors, '{block}.{layer}.weight' and '.bias'.

    fitted_to   ``fingerprint`` of the bundle whose posterior it makes
    """

    record: Oneshot
    tensors: Mapping[str, Array]
    fitted_to: str

    def __post_init__(self):
        expected = {name: shape for i, widths in enumerate(self.record.blocks)
                    for name, (shape, _) in stack_layout(str(i), widths).items()}
        found = {name: tensor.shape for name, tensor in self.tensors.items()}
        if found != expected:
            wrong = next(name for name in sorted({*found, *expected}) if found.get(name) != expected.get(name))
            raise CheckpointError(f"tensor {wrong} of the one-pass map {self.record.name!r} has the shape "
                                  f"{found.get(wrong)}; its record demands {expected.get(wrong)}")
        if not all(t.dtype == np.float32 and np.isfinite(t).all() for t in self.tensors.values()):
            raise CheckpointError(f"the one-pass map {self.record.name!r} holds numbers that are not finite float32")

    @property
    def field(self) -> dict[str, Array]:
        """Its tensors by their names in a bundle's field."""
        return {f"oneshot.{self.record.name}.{key}": tensor for key, tensor in self.tensors.items()}


def fingerprint(bundle: Bundle, names: Sequence[str]) -> str:
    """sha256 of what a map depends on: the mapping, and the sharp heads of the attributes of its condition."""
    stacks, hashed = stack_names(bundle), hashlib.sha256()
    prefixes = ("mapping.", *(f"head.{stacks[name]}." for name in sorted(names)))
    for key in sorted(key for key in bundle.field if key.startswith(prefixes)):
        hashed.update(key.encode())
        hashed.update(np.ascontiguousarray(bundle.field[key]).tobytes())
    return hashed.hexdigest()


def save_oneshot(path: str | Path, part: OneshotPart) -> None:
    about = json.dumps({"record": asdict(part.record), "fitted_to": part.fitted_to})
    write_atomically(Path(path), safetensors.numpy.save(dict(part.tensors), metadata={METADATA: about}))


def load_oneshot(path: Path) -> OneshotPart:
    """Raises CheckpointError for a file that holds no whole map."""
    if path.stat().st_size > LARGEST:
        raise CheckpointError(f"{path} has {path.stat().st_size:,} bytes; a one-pass map has at most {LARGEST:,}")
    data = path.read_bytes()
    try:
        about = json.loads(safetensors_metadata(data)[METADATA])
        entry = record(Oneshot, ONESHOT, ("name", "condition", "blocks", "truncation"))(about["record"], "its record")
        return OneshotPart(entry, safetensors.numpy.load(data), str(about["fitted_to"]))
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except Exception as error:  # of safetensors, json, and of a record that does not fit
        raise CheckpointError(f"{path} holds no one-pass map that can be read: {str(error)[:200]}; train it again with "
                              "lace-train oneshot") from error


def check_oneshots(parts: Sequence[OneshotPart], bundle: Bundle) -> None:
    """BundleError for a map that belongs to another bundle, or whose name is taken."""
    taken = set(bundle.oneshots)
    for part in parts:
        entry = part.record
        if entry.name in taken:
            raise BundleError(f"two one-pass maps are called {entry.name!r}: train it with another --name")
        taken.add(entry.name)
        names = set(wish_of(entry).names)
        if not names <= set(bundle.attributes) or part.fitted_to != fingerprint(bundle, sorted(names)):
            raise BundleError(f"the one-pass map {entry.name!r} was fitted to another generator or to other heads than "
                              f"{bundle.path} has: train it for this bundle, with lace-train oneshot")


def refuse_stale(bundle: Bundle, sharpened: Set[str]) -> None:
    """BundleError where sharp heads are replaced that a map of the bundle was fitted to. ``sharpened``: attributes."""
    for entry in bundle.oneshots.values():
        if changed := sorted(sharpened & {*wish_of(entry).names}):
            raise BundleError(f"the one-pass map {entry.name!r} of {bundle.path} was fitted to the sharp head of "
                              f"{changed[0]!r}, which a part replaces: add the head to a bundle without the map, and "
                              "train the map for that")
