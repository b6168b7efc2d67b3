"""The bundle: an immutable folder with a generator, its heads, and its own exam.

::

    ffhq.lace/
      manifest.json        what is inside, and the sha256 of every other file; written last
      synthesis.onnx       ws -> image
      mapping.onnx         z, psi -> w                              } weights are external data
      head.{name}.onnx     w or z -> logits and rows of Jacobian    } that lie in
      pullback.onnx        z, psi, cotangent on w -> dz             } field.safetensors
      field.safetensors    mapping and heads, gains folded in
      golden.safetensors   answers of the original network, recorded at export

Reader and writer live in this one file so that they cannot drift apart. Nothing in a bundle is executable
Python. A bundle is written into a hidden sibling folder and renamed into place: it is there whole or not at all.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath

import numpy as np
from safetensors.numpy import load_file, save

from engine.errors import BundleError
from engine.folders import recover, writing_folder
from engine.spaces import Space, spaces_of

FORMAT = (1, 0)
MANIFEST = "manifest.json"
FIELD, GOLDEN = "field.safetensors", "golden.safetensors"
NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\Z")


@dataclass(frozen=True, slots=True)
class GeneratorFacts:
    """Sizes of the generator.

    ``labels``: number of classes (0: unconditional). ``truncation``: the default psi of a request. ``guidance``: the
    default factor of a condition's log p. ``mapping_layers``: of the mapping, 0 if w is its input. ``normalise``:
    whether the mapping divides z by its root mean square.
    """

    name: str
    architecture: str
    z_dim: int
    w_dim: int
    num_ws: int
    resolution: int
    img_channels: int = 3
    labels: int = 0
    truncation: float = 0.7
    guidance: float = 1.0
    mapping_layers: int = 8
    normalise: bool = True


@dataclass(frozen=True, slots=True)
class Attribute:
    """One thing that a condition can ask for.

    kind       'class' (``classes`` names its values) or 'value' (a number, wanted within ``sigma``)
    head       the stack of layers whose logits ``columns`` = (first, past-last) are this attribute's
    range      values that the training data covers, for 'value'
    layers     style layers that an edit of this attribute may touch, or None for all
    """

    name: str
    kind: str
    head: str
    columns: tuple[int, int]
    classes: tuple[str, ...] = ()
    sigma: float = 0.1
    range: tuple[float, float] = (0.0, 1.0)
    layers: tuple[int, ...] | None = None
    provenance: Mapping = field(default_factory=dict)

    def __post_init__(self):
        if not NAME.match(self.name):
            raise BundleError(f"attribute name {self.name!r} is not an identifier (letters, digits, _)")
        first, last = self.columns
        width = last - first
        if self.kind == "class":
            if width != len(self.classes) or width < 2:
                raise BundleError(f"attribute {self.name!r} has {width} logits for {len(self.classes)} classes")
        elif self.kind == "value":
            if width != 1 or not self.sigma > 0:
                raise BundleError(f"value attribute {self.name!r} needs one logit and sigma > 0")
        else:
            raise BundleError(f"attribute {self.name!r} has the unknown kind {self.kind!r}: expected class or value")

    @property
    def width(self) -> int:
        return self.columns[1] - self.columns[0]


@dataclass(frozen=True, slots=True)
class Head:
    """A stack of dense layers from a latent ('w' or 'z') to logits. ``widths``: input, hidden ..., logits."""

    name: str
    space: str
    widths: tuple[int, ...]

    def __post_init__(self):
        if not NAME.match(self.name):
            raise BundleError(f"head name {self.name!r} is not an identifier (letters, digits, _)")


@dataclass(frozen=True, slots=True)
class Manifest:
    """What manifest.json says."""

    generator: GeneratorFacts
    heads: tuple[Head, ...]
    attributes: tuple[Attribute, ...]
    graphs: Mapping[str, Mapping]
    provenance: Mapping = field(default_factory=dict)

    def to_json(self, files: Mapping[str, Mapping]) -> str:
        body = {"format": f"{FORMAT[0]}.{FORMAT[1]}", **asdict(self), "files": dict(files)}
        return json.dumps(body, indent=1, sort_keys=False) + "\n"


class Bundle:
    """An open bundle. Opening checks the version, every file's size and hash, and every tensor's shape.

    Raises BundleError. ``hash`` is the sha256 of the manifest, which names the content of all files.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        text = read_manifest(self.path)
        self.hash = hashlib.sha256(text).hexdigest()
        body = parse_manifest(text, self.path)
        self.manifest = build_manifest(body, self.path)
        self.files: dict[str, dict] = body["files"]
        check_files(self.path, self.files)
        self.attributes = {a.name: a for a in self.manifest.attributes}
        self.heads = {h.name: h for h in self.manifest.heads}
        check_tensors(self)

    @property
    def generator(self) -> GeneratorFacts:
        return self.manifest.generator

    @cached_property
    def spaces(self) -> Mapping[str, Space]:
        """The spaces in which a flow may run, by name."""
        return spaces_of(self.generator)

    @cached_property
    def field(self) -> dict[str, np.ndarray]:
        """The tensors of mapping and heads, float32."""
        return load_tensors(self.path / FIELD)

    @cached_property
    def golden(self) -> dict[str, np.ndarray]:
        """Answers that the original network gave at export."""
        return load_tensors(self.path / GOLDEN)

    def graph(self, name: str) -> Path:
        """Path of an ONNX graph: 'synthesis', 'mapping', 'pullback' or 'head.{name}'."""
        if name not in self.manifest.graphs:
            raise BundleError(f"{self.path} has no graph {name!r}; it has: {', '.join(self.manifest.graphs)}")
        return self.path / self.manifest.graphs[name]["file"]

    def __repr__(self) -> str:
        g = self.generator
        return (f"Bundle({g.name!r}, {g.architecture} {g.resolution}px, "
                f"{len(self.attributes)} attributes, hash={self.hash[:12]})")


def read_manifest(path: Path) -> bytes:
    if not (path / MANIFEST).exists():
        recover(path, MANIFEST)
    if not path.exists():
        raise BundleError(f"no bundle at {path}: expected a folder made by lace-export")
    if not path.is_dir():
        raise BundleError(f"{path} is a file; a bundle is a folder. Make one with: lace-export --gan {path}")
    try:
        return (path / MANIFEST).read_bytes()
    except FileNotFoundError:
        raise BundleError(f"{path} has no {MANIFEST}: it is not a bundle, or its export was not finished") from None


def parse_manifest(text: bytes, path: Path) -> dict:
    try:
        body = json.loads(text)
        major, minor = (int(part) for part in body["format"].split("."))
        files = body["files"]
        if not is_table_of_tables(files):
            raise TypeError("files is not a table of sizes and hashes")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BundleError(f"{path / MANIFEST} cannot be read ({error}): export the bundle again") from error
    if major != FORMAT[0]:
        raise BundleError(f"{path} has bundle format {major}.{minor}; this version of lace-engine reads "
                          f"{FORMAT[0]}.x: export it again, or install the matching version")
    for name in files:
        parts = PurePosixPath(name).parts
        if len(parts) != 1 or name in (".", "..", MANIFEST) or "\\" in name:
            raise BundleError(f"{path / MANIFEST} names the file {name!r}, which is not a plain file name")
    return body


def is_table_of_tables(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(entry, dict) for entry in value.values())


def known(cls: type, values: Mapping) -> dict:
    """The entries that this version knows: unknown keys of a newer minor version are ignored."""
    names = cls.__dataclass_fields__
    return {k: tuple(v) if isinstance(v, list) else v for k, v in values.items() if k in names}


def build_manifest(body: dict, path: Path) -> Manifest:
    try:
        manifest = Manifest(
            generator=GeneratorFacts(**known(GeneratorFacts, body["generator"])),
            heads=tuple(Head(**known(Head, h)) for h in body["heads"]),
            attributes=tuple(Attribute(**known(Attribute, a)) for a in body["attributes"]),
            graphs=body["graphs"],
            provenance=body.get("provenance", {}),
        )
        if not is_table_of_tables(manifest.graphs):
            raise TypeError("graphs is not a table of tables")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BundleError(f"{path / MANIFEST} is incomplete ({error}): export the bundle again") from error
    named = {h.name for h in manifest.heads}
    for attribute in manifest.attributes:
        if attribute.head not in named:
            raise BundleError(f"{path}: attribute {attribute.name!r} names the missing head {attribute.head!r}")
    for name, graph in manifest.graphs.items():
        if graph.get("file") not in body["files"]:
            raise BundleError(f"{path}: the file of graph {name!r} is not listed in the manifest")
    for file in (FIELD, GOLDEN):
        if file not in body["files"]:
            raise BundleError(f"{path}: {file} is not listed in the manifest")
    return manifest


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_files(path: Path, files: Mapping[str, Mapping]) -> None:
    for name, facts in files.items():
        file = path / name
        if not file.is_file():
            raise BundleError(f"{path} lacks {name}: copy the bundle again, or export it again")
        if file.stat().st_size != facts.get("bytes") or sha256(file) != facts.get("sha256"):
            raise BundleError(f"{file} is damaged (its hash is not the manifest's): copy or export the bundle again")


def load_tensors(path: Path) -> dict[str, np.ndarray]:
    try:
        return load_file(path)
    except Exception as error:  # safetensors raises its own type, plain OSError and ValueError
        raise BundleError(f"{path} cannot be read as safetensors: {error}") from error


def save_tensors(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    # Not safetensors' save_file: it makes files that only their owner may read.
    path.write_bytes(save(dict(tensors)))


def field_shapes(bundle: Bundle) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The tensors that the manifest promises, in the layout of ``x W^T + b``."""
    g = bundle.generator
    layers = sum(name.startswith("mapping.") and name.endswith(".weight") for name in bundle.field)
    for i in range(layers):
        n_in = g.w_dim if i else g.z_dim + (g.w_dim if g.labels else 0)
        yield f"mapping.{i}.weight", (g.w_dim, n_in)
        yield f"mapping.{i}.bias", (g.w_dim,)
    yield "mapping.w_avg", (g.w_dim,)
    if g.labels:
        yield "mapping.embedding", (g.labels, g.w_dim)
    for head in bundle.heads.values():
        for i, (n_in, n_out) in enumerate(zip(head.widths[:-1], head.widths[1:], strict=True)):
            yield f"head.{head.name}.{i}.weight", (n_out, n_in)
            yield f"head.{head.name}.{i}.bias", (n_out,)


def check_tensors(bundle: Bundle) -> None:
    """Every tensor that the manifest promises is there, and heads and attributes fit into each other."""
    for name, shape in field_shapes(bundle):
        tensor = bundle.field.get(name)
        if tensor is None or tensor.shape != shape or tensor.dtype != np.float32:
            found = "missing" if tensor is None else f"{tensor.dtype} {tensor.shape}"
            raise BundleError(f"{bundle.path / FIELD}: tensor {name} is {found}; expected float32 {shape}")
    inputs = {"w": bundle.generator.w_dim, "z": bundle.generator.z_dim}
    for head in bundle.heads.values():
        if len(head.widths) < 2 or head.widths[0] != inputs.get(head.space):
            raise BundleError(f"{bundle.path}: head {head.name!r} with widths {head.widths} does not read from w or z")
    for attribute in bundle.attributes.values():
        head = bundle.heads[attribute.head]
        if not 0 <= attribute.columns[0] < attribute.columns[1] <= head.widths[-1]:
            raise BundleError(f"{bundle.path}: attribute {attribute.name!r} does not fit its head {head.name!r}")


def writing(target: str | os.PathLike, *, overwrite: bool = False) -> AbstractContextManager[Path]:
    """A hidden folder that becomes the bundle ``target``; call ``write_manifest`` in it last."""
    return writing_folder(target, marker=MANIFEST, overwrite=overwrite, error=BundleError)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Hash the files that the manifest names and write it, flushed to disk, as the last file of a bundle."""
    names = [*(graph["file"] for graph in manifest.graphs.values()), FIELD, GOLDEN]
    facts = {name: {"bytes": (folder / name).stat().st_size, "sha256": sha256(folder / name)} for name in names}
    with open(folder / MANIFEST, "w", encoding="utf-8") as file:
        file.write(manifest.to_json(facts))
        file.flush()
        os.fsync(file.fileno())
