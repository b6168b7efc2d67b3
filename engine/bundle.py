"""The bundle: an immutable folder with a generator, its heads, and its own exam. Format 2.0; 1.x is read too.

::

    ffhq.lace/
      manifest.json        what is inside, with size, sha256 and kind of every other file; written last
      synthesis.onnx       ws -> image
      mapping.onnx         z, psi -> w                                }
      head.{name}.onnx     w or z -> logits and rows of Jacobian      } weights are external data
      head.{name}.sharp.onnx   the same of its second stack           } that lie in
      pullback.onnx        z, psi, cotangent on w -> dz               } field.safetensors
      linearise.onnx       mapping, heads and pullback in one call    }
      oneshot.{name}.onnx  noise [, targets] -> latents of a condition }
      field.safetensors    mapping and heads, gains folded in
      golden.safetensors   answers of the original network, recorded at export
      README.md, LICENSE   for people: not hashed, and never opened

Nothing in a bundle is executable Python, and nothing that the manifest does not name is opened. A bundle is written
into a hidden sibling folder and renamed into place: it is there whole or not at all. docs/bundles.md has the format.
"""

import hashlib
import os
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from safetensors.numpy import save

from engine.components import Components, measure_components
from engine.errors import BundleError
from engine.folders import recover, writing_folder
from engine.manifest import (
    FIELD,
    FORMAT,
    GOLDEN,
    MANIFEST,
    NAME,
    Attribute,
    GeneratorFacts,
    Head,
    Manifest,
    Oneshot,
    Sharp,
    kind_of,
    read_manifest,
)
from engine.spaces import Space, spaces_of
from engine.validation import load_tensors, name_as_in_2, validate

__all__ = [
    "FIELD", "FORMAT", "FOR_PEOPLE", "GOLDEN", "MANIFEST", "NAME", "Attribute", "Bundle", "GeneratorFacts",
    "Head", "Manifest", "Oneshot", "Sharp", "Stack", "save_tensors", "sha256", "write_manifest", "writing",
]

FOR_PEOPLE = ("README.md", "LICENSE")
LONGEST_MANIFEST = 1 << 26


@dataclass(frozen=True, slots=True)
class Stack:
    """Dense layers from ``space`` ('w' or 'z') to logits; tensors and graph are called head.{its name}."""

    space: str
    widths: tuple[int, ...]


class Bundle:
    """An open bundle. Opening checks the version, every file's size and hash, and all content (engine/validation.py).

    Raises BundleError. ``hash`` is the sha256 of the manifest, which names the content of all files.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        text = read_text(self.path)
        self.hash = hashlib.sha256(text).hexdigest()
        manifest, self.files = read_manifest(text, str(self.path / MANIFEST))
        self.places = {name: locate(self.path, name) for name in self.files}
        check_files(self.path, self.places, self.files)
        self.manifest, self.field = validate(self.path, manifest, self.places)
        self.attributes = {a.name: a for a in self.manifest.attributes}
        self.heads = {h.name: h for h in self.manifest.heads}
        self.oneshots = {entry.name: entry for entry in self.manifest.oneshots}

    @cached_property
    def stacks(self) -> dict[str, Stack]:
        """Every stack of the heads by name: '{head}', and after them '{head}.sharp'."""
        stacks = {head.name: Stack(head.space, head.widths) for head in self.heads.values()}
        sharp = {f"{h.name}.sharp": Stack(h.space, h.sharp.widths) for h in self.heads.values() if h.sharp}
        return stacks | sharp

    @property
    def generator(self) -> GeneratorFacts:
        return self.manifest.generator

    @cached_property
    def spaces(self) -> Mapping[str, Space]:
        """The spaces in which a flow may run, by name."""
        return spaces_of(self.generator)

    @cached_property
    def components(self) -> Components:
        """The principal components of W, measured at the first use."""
        return measure_components(self.field, self.generator)

    @property
    def is_linked(self) -> bool:
        """Whether its weights are reached through a symbolic link, as in the cache of the Hugging Face Hub."""
        return (self.path / FIELD).is_symlink()

    @cached_property
    def golden(self) -> dict[str, np.ndarray]:
        """Answers that the original network gave at export, by the names of format 2.0."""
        golden = load_tensors(self.places[GOLDEN])
        return golden if self.manifest.format[0] >= 2 else name_as_in_2(self.manifest, golden)

    def graph(self, name: str) -> Path:
        """Path of an ONNX graph: 'synthesis', 'mapping', 'pullback', 'linearise', 'head.{name}[.sharp]',
        'oneshot.{name}'."""
        if name not in self.manifest.graphs:
            raise BundleError(f"{self.path} has no graph {name!r}; it has: {', '.join(self.manifest.graphs)}")
        return self.path / self.manifest.graphs[name]["file"]

    def __repr__(self) -> str:
        g = self.generator
        return (f"Bundle({g.name!r}, {g.architecture} {g.resolution}px, "
                f"{len(self.attributes)} attributes, hash={self.hash[:12]})")


def read_text(path: Path) -> bytes:
    if not (path / MANIFEST).exists():
        recover(path, MANIFEST)
    if not path.exists():
        raise BundleError(f"no bundle at {path}: expected a folder made by lace-export")
    if not path.is_dir():
        raise BundleError(f"{path} is a file; a bundle is a folder. Make one with: lace-export --gan {path}")
    if not (path / MANIFEST).exists():
        raise BundleError(f"{path} has no {MANIFEST}: it is not a bundle, or its export was not finished")
    file = locate(path, MANIFEST)
    if file.stat().st_size > LONGEST_MANIFEST:
        raise BundleError(f"{path / MANIFEST} has {file.stat().st_size} bytes; expected at most {LONGEST_MANIFEST}")
    return file.read_bytes()


def locate(path: Path, name: str) -> Path:
    """Where a file of the bundle really is. Links may lead elsewhere in the bundle, or into the Hub's blobs.

    In the cache of the Hugging Face Hub a bundle is snapshots/REVISION[/FOLDER], and its files are links to blobs/HASH
    beside ``snapshots``.
    """
    try:
        folder, file = path.resolve(strict=True), (path / name).resolve(strict=True)
    except (OSError, RuntimeError) as error:  # a link that leads nowhere, or in a circle
        raise BundleError(f"{path} lacks {name}: copy the bundle again, or export it again") from error
    if not file.is_file():
        raise BundleError(f"{path} lacks {name}: copy the bundle again, or export it again")
    if file.parent != folder and file.parent not in blobs_of(folder):
        raise BundleError(f"{path / name} is a symbolic link that leaves the bundle: replace it by the file itself")
    return file


def blobs_of(folder: Path) -> list[Path]:
    return [above.parent / "blobs" for above in folder.parents if above.name == "snapshots"]


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_files(path: Path, places: Mapping[str, Path], files: Mapping[str, Mapping]) -> None:
    for name, facts in files.items():
        if places[name].stat().st_size != facts["bytes"] or sha256(places[name]) != facts["sha256"]:
            raise BundleError(f"{path / name} is damaged (its hash is not the manifest's): copy or export the bundle "
                              "again")


def save_tensors(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    # Not safetensors' save_file: it makes files that only their owner may read.
    # Nor does it heed strides: of a view it writes the memory, which are other numbers.
    path.write_bytes(save({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}))


def writing(target: str | os.PathLike, *, overwrite: bool = False) -> AbstractContextManager[Path]:
    """A hidden folder that becomes the bundle ``target``; call ``write_manifest`` in it last."""
    return writing_folder(target, marker=MANIFEST, overwrite=overwrite, error=BundleError)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Hash the files that the manifest names and write it, flushed to disk, as the last file of a bundle."""
    names = [*(graph["file"] for graph in manifest.graphs.values()), FIELD, GOLDEN]
    facts = {name: {"kind": kind_of(name), "bytes": (folder / name).stat().st_size, "sha256": sha256(folder / name)}
             for name in names}
    with open(folder / MANIFEST, "w", encoding="utf-8") as file:
        file.write(manifest.to_json(facts))
        file.flush()
        os.fsync(file.fileno())
