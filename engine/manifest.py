"""manifest.json: the records that say what is inside a bundle, and how they are read from a file of a stranger.

Every value is checked for its type and range as it is read; what does not fit is one sentence that names it.
"""

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from engine.errors import BundleError

FORMAT = (2, 0)
READABLE = (1, 2)  # major versions
MANIFEST = "manifest.json"
FIELD, GOLDEN = "field.safetensors", "golden.safetensors"
NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,99}\Z")
NOISE = re.compile(r"noise\.\d{1,3}\Z")
HASH = re.compile(r"[0-9a-f]{64}\Z")

# Kinds of files. ``prior``, ``oneshot`` and ``flow`` are followed by a name, ``head`` by a name and perhaps "sharp".
# Those that no part of this version writes are reserved, and not opened.
SINGLE = ("synthesis", "mapping", "pullback", "linearise")
GRAPHS = (*SINGLE, "head", "oneshot")
RESERVED = ("vjp", "moments", "prior", "flow", "encoder")

WIDEST, LARGEST, MOST_LAYERS = 1 << 16, 1 << 12, 64
MOST_HEADS, MOST_CLASSES, MOST_LABELS = 1 << 10, 1 << 12, 1 << 17
MOST_ONESHOTS, MOST_BLOCKS, MOST_EVEN, MOST_CONDITION = 1 << 10, 16, 16, 10_000


@dataclass(frozen=True, slots=True)
class GeneratorFacts:
    """Sizes of the generator.

    ``labels``: number of classes (0: unconditional). ``truncation``: the default psi of a request. ``guidance``: the
    default factor of a condition's log p. ``mapping_layers``: 0 for a generator whose w is its z, followed by the
    embedding of its label if it is conditional; ``normalise``: whether the mapping scales z to unit mean square first.
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

    @property
    def is_plain(self) -> bool:
        """Whether the generator takes its latent as it is, so that truncation is the draw's."""
        return not self.mapping_layers and not self.normalise

    @property
    def embedded(self) -> int:
        """Numbers that a label adds to the mapping's input: without layers they are the end of w."""
        if not self.labels:
            return 0
        return self.w_dim if self.mapping_layers else self.w_dim - self.z_dim


@dataclass(frozen=True, slots=True)
class Attribute:
    """One thing that a condition can ask for.

    kind       'class' (``classes`` names its values) or 'value' (a number, wanted within ``sigma``)
    head       the stack of layers whose logits ``columns`` = (first, past-last) are this attribute's
    range      values that the training data covers, for 'value'
    layers     style layers that an edit of this attribute may touch, or None for all
    tolerance  how far a 'value' may be off and still count as met, from held-out data; None: not measured
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
    tolerance: float | None = None

    def __post_init__(self):
        if not NAME.match(self.name):
            raise BundleError(f"attribute name {self.name!r:.120} is not an identifier (letters, digits, _)")
        first, last = self.columns
        width = last - first
        if self.kind == "class":
            if width != len(self.classes) or width < 2:
                raise BundleError(f"attribute {self.name!r} has {width} logits for {len(self.classes)} classes")
        elif self.kind == "value":
            if width != 1 or not self.sigma > 0:
                raise BundleError(f"value attribute {self.name!r} needs one logit and sigma > 0")
        else:
            raise BundleError(f"attribute {self.name!r} has the unknown kind {self.kind!r:.40}: expected class or "
                              "value")

    @property
    def width(self) -> int:
        return self.columns[1] - self.columns[0]


@dataclass(frozen=True, slots=True)
class Sharp:
    """A head's second stack, trained without noise, whose logits are log-probabilities up to a constant.

    widths        input, hidden ..., logits: the first and the last as in the head
    calibrated    whether temperatures were found, and errors measured, on held-out latents
    temperature   by attribute: what its logits were divided by, which the last layer already contains
    ece           by attribute and psi ("0.7"): expected calibration error of its probabilities
    """

    widths: tuple[int, ...]
    calibrated: bool = False
    temperature: Mapping[str, float] = field(default_factory=dict)
    ece: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Head:
    """A stack of dense layers from a latent ('w' or 'z') to logits. ``widths``: input, hidden ..., logits.

    ``sharp``: a second stack with the same inputs and logits, for probabilities; this one is smooth, for flows.
    """

    name: str
    space: str
    widths: tuple[int, ...]
    sharp: Sharp | None = None

    def __post_init__(self):
        if not NAME.match(self.name):
            raise BundleError(f"head name {self.name!r:.120} is not an identifier (letters, digits, _)")


@dataclass(frozen=True, slots=True)
class Oneshot:
    """A network that turns noise of the prior into latents of one condition, in one pass.

    condition      its text; a statement whose target is chosen at run time ends with '=?'
    targets        the ranges of these, by attribute, in the order of the network's inputs
    truncation, label      of the w that it reads, and so of all that it makes; label 0 where there are no classes
    even           class attributes whose classes, and combinations of these, it makes equally often
    confidence, guidance   of the posterior that it was fitted to: one of the two
    blocks         widths of each residual block's dense layers: z, w and targets ..., z
    measured       distances from exact samples that it was not fitted to, by name
    """

    name: str
    condition: str
    blocks: tuple[tuple[int, ...], ...]
    truncation: float
    targets: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    label: int = 0
    confidence: float | None = None
    guidance: float | None = None
    measured: Mapping[str, float] = field(default_factory=dict)
    provenance: Mapping = field(default_factory=dict)
    even: tuple[str, ...] = ()

    def __post_init__(self):
        if not NAME.match(self.name):
            raise BundleError(f"oneshot name {self.name!r:.120} is not an identifier (letters, digits, _)")


@dataclass(frozen=True, slots=True)
class Manifest:
    """What manifest.json says. ``format``: major and minor version of the file that it was read from."""

    generator: GeneratorFacts
    heads: tuple[Head, ...]
    attributes: tuple[Attribute, ...]
    graphs: Mapping[str, Mapping]
    provenance: Mapping = field(default_factory=dict)
    oneshots: tuple[Oneshot, ...] = ()
    format: tuple[int, int] = FORMAT

    def to_json(self, files: Mapping[str, Mapping]) -> str:
        """Always in the newest format."""
        body = {**asdict(self), "format": f"{FORMAT[0]}.{FORMAT[1]}", "files": dict(files)}
        return json.dumps({"format": body.pop("format"), **body}, indent=1, sort_keys=False) + "\n"


# --- values -------------------------------------------------------------------------------------------------------
# A reader takes a value and where it stands, and returns it or raises BundleError.

Reader = Callable[[Any, str], Any]


def wrong(where: str, value: Any, expected: str) -> BundleError:
    shown = f"{value!r}" if isinstance(value, (int, float, bool)) else f"{str(value)[:60]!r}"
    return BundleError(f"{where} is {shown:.80}; expected {expected}")


def whole(low: int, high: int) -> Reader:
    def read(value: Any, where: str) -> int:
        if type(value) is not int or not low <= value <= high:
            raise wrong(where, value, f"a whole number from {low} to {high}")
        return value

    return read


def real(low: float, high: float, *, above: bool = False) -> Reader:
    def read(value: Any, where: str) -> float:
        fits = type(value) in (int, float) and low <= value <= high and not (above and value == low)
        if not fits or not math.isfinite(value):
            raise wrong(where, value, f"a number {'above' if above else 'from'} {low:g} to {high:g}")
        return float(value)

    return read


def truth(value: Any, where: str) -> bool:
    if type(value) is not bool:
        raise wrong(where, value, "true or false")
    return value


def text(value: Any, where: str, most: int = 200) -> str:
    if type(value) is not str or len(value) > most or not value.isprintable():
        raise wrong(where, value, f"a text of at most {most} printable characters")
    return value


def sentence(value: Any, where: str) -> str:
    """A condition's text."""
    return text(value, where, MOST_CONDITION)


def table(value: Any, where: str) -> dict:
    if type(value) is not dict:
        raise wrong(where, value, "a table")
    return value


def many(read: Reader, fewest: int, most: int) -> Reader:
    def read_all(value: Any, where: str) -> tuple:
        if type(value) is not list or not fewest <= len(value) <= most:
            raise wrong(where, value, f"a list of {fewest} to {most} entries")
        return tuple(read(entry, f"{where}[{i}]") for i, entry in enumerate(value))

    return read_all


def optional(read: Reader) -> Reader:
    return lambda value, where: None if value is None else read(value, where)


def by_name(read: Reader) -> Reader:
    def read_all(value: Any, where: str) -> dict:
        return {text(key, where): read(entry, f"{where}.{key}") for key, entry in table(value, where).items()}

    return read_all


def one_of(*known: str) -> Reader:
    def read(value: Any, where: str) -> str:
        if type(value) is not str or value not in known:
            raise wrong(where, value, f"one of {', '.join(known)}")
        return value

    return read


def record(make: Callable[..., Any], readers: Mapping[str, Reader], required: tuple[str, ...]) -> Reader:
    """A table as a record; keys of a newer minor version are ignored."""

    def read(value: Any, where: str) -> Any:
        value = table(value, where)
        if missing := [key for key in required if key not in value]:
            raise BundleError(f"{where} lacks {', '.join(missing)}: it is incomplete, export the bundle again")
        return make(**{key: reader(value[key], f"{where}.{key}") for key, reader in readers.items() if key in value})

    return read


widths = many(whole(1, WIDEST), 2, MOST_LAYERS)
number = real(-1e9, 1e9)
GENERATOR: dict[str, Reader] = {
    "name": text, "architecture": text, "z_dim": whole(1, WIDEST), "w_dim": whole(1, WIDEST), "num_ws": whole(1, 1024),
    "resolution": whole(1, LARGEST), "img_channels": whole(1, 64), "labels": whole(0, MOST_LABELS),
    "truncation": real(-1e6, 1e6), "guidance": real(0, 1e9, above=True), "mapping_layers": whole(0, MOST_LAYERS),
    "normalise": truth,
}
SHARP: dict[str, Reader] = {
    "widths": widths, "calibrated": truth, "temperature": by_name(real(0, 1e6, above=True)),
    "ece": by_name(by_name(real(0, 1))),
}
HEAD: dict[str, Reader] = {
    "name": text, "space": one_of("w", "z"), "widths": widths, "sharp": optional(record(Sharp, SHARP, ("widths",))),
}
ATTRIBUTE: dict[str, Reader] = {
    "name": text, "kind": text, "head": text, "columns": many(whole(0, WIDEST), 2, 2),
    "classes": many(text, 0, MOST_CLASSES), "sigma": real(0, 1e9), "range": many(number, 2, 2),
    "layers": optional(many(whole(0, 1023), 0, 1024)), "provenance": table,
    "tolerance": optional(real(0, 1e9, above=True)),
}
ONESHOT: dict[str, Reader] = {
    "name": text, "condition": sentence, "blocks": many(widths, 1, MOST_BLOCKS), "truncation": real(-1e6, 1e6),
    "targets": by_name(many(number, 2, 2)), "label": whole(0, MOST_LABELS),
    "confidence": optional(real(0, 1, above=True)), "guidance": optional(real(0, 1e9, above=True)),
    "measured": by_name(number), "provenance": table, "even": many(text, 0, MOST_EVEN),
}
GRAPH: dict[str, Reader] = {
    "file": text, "precision": one_of("fp32", "fp16", "bf16"), "noise": one_of("const", "none", "input"),
    "lowering": text, "opset": whole(1, 1000), "nodes": whole(0, 1 << 32), "parameters": whole(0, 1 << 48),
    "noises": by_name(many(whole(1, LARGEST), 2, 2)),
}
FILE: dict[str, Reader] = {"bytes": whole(0, 1 << 48), "sha256": text, "kind": text}


# --- the whole ----------------------------------------------------------------------------------------------------


def read_manifest(data: bytes, where: str) -> tuple[Manifest, dict[str, dict]]:
    """The manifest and the records of its files. ``where`` begins every error. Raises BundleError."""
    try:
        body = json.loads(data)
        found = re.fullmatch(r"(\d{1,4})\.(\d{1,4})", body["format"])
        if found is None:
            raise ValueError("its format is no version such as 2.0")
        version = int(found[1]), int(found[2])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise BundleError(f"{where} cannot be read ({str(error)[:120]}): export the bundle again") from error
    if version[0] not in READABLE:
        raise BundleError(f"{where} is of bundle format {version[0]}.{version[1]}; this version of lace-engine reads "
                          f"{' and '.join(f'{major}.x' for major in READABLE)}: export it again, or install the "
                          "matching version")
    try:
        return build_manifest(body, version)
    except BundleError as error:
        raise BundleError(f"{where}: {error}") from error


def build_manifest(body: dict, version: tuple[int, int]) -> tuple[Manifest, dict[str, dict]]:
    is_new = version[0] >= 2
    required = ("name", "architecture", "z_dim", "w_dim", "num_ws", "resolution")
    required += ("mapping_layers", "normalise") if is_new else ()
    readers: dict[str, Reader] = {
        "generator": record(GeneratorFacts, GENERATOR, required),
        "heads": many(record(Head, HEAD, ("name", "space", "widths")), 0, MOST_HEADS),
        "attributes": many(record(Attribute, ATTRIBUTE, ("name", "kind", "head", "columns")), 0, MOST_HEADS),
        "graphs": by_name(record(dict, GRAPH, ("file",))),
        "oneshots": many(record(Oneshot, ONESHOT, ("name", "condition", "blocks", "truncation")), 0, MOST_ONESHOTS),
        "provenance": table,
        "files": by_name(record(dict, FILE, ("bytes", "sha256", "kind") if is_new else ("bytes", "sha256"))),
    }
    entire = record(dict, readers, ("generator", "heads", "attributes", "graphs", "files"))(body, "the manifest")
    files = entire.pop("files")
    manifest = drop_unknown(Manifest(**entire, format=version), files)
    check_files_named(manifest, files)
    check_records(manifest)
    return manifest, files


def kind_of(file: str) -> str:
    """'head' of head.smile.onnx, 'head.sharp' of head.smile.sharp.onnx, 'field' of field.safetensors."""
    stem = file.rpartition(".")[0].split(".")
    return "head.sharp" if stem[0] == "head" and len(stem) == 3 else stem[0]


def drop_unknown(manifest: Manifest, files: dict[str, dict]) -> Manifest:
    """Without the files of a newer minor version, which this one does not open."""
    if manifest.format <= FORMAT:
        return manifest
    graphs = {name: graph for name, graph in manifest.graphs.items() if name.partition(".")[0] in GRAPHS}
    for name in set(files) - {FIELD, GOLDEN, *(graph["file"] for graph in graphs.values())}:
        del files[name]
    return replace(manifest, graphs=graphs)


def check_files_named(manifest: Manifest, files: Mapping[str, Mapping]) -> None:
    """Every file is one that this version knows, under its own name, with one record."""
    named = {head.name for head in manifest.heads}
    sharp = {head.name for head in manifest.heads if head.sharp}
    graphs = {*SINGLE, *(f"head.{name}" for name in named), *(f"head.{name}.sharp" for name in sharp)}
    graphs |= {f"oneshot.{entry.name}" for entry in manifest.oneshots}
    for name, graph in manifest.graphs.items():
        if name not in graphs:
            why = "is reserved for a later version" if name.partition(".")[0] in RESERVED else "is unknown"
            raise BundleError(f"the graph {name!r} {why}: install a newer lace-engine, or export the bundle again")
        if graph["file"] != f"{name}.onnx":
            raise BundleError(f"the file of graph {name!r} is {graph['file']!r}; expected {name}.onnx")
    expected = {FIELD, GOLDEN, *(graph["file"] for graph in manifest.graphs.values())}
    for name in sorted(expected ^ set(files)):
        lack = "is not listed in the manifest" if name in expected else "is no file of a bundle"
        raise BundleError(f"{name!r:.80} {lack}: export the bundle again")
    for name, facts in files.items():
        if not HASH.match(facts["sha256"]) or facts.get("kind", kind_of(name)) != kind_of(name):
            raise BundleError(f"the record of {name} is wrong; expected its sha256 and the kind {kind_of(name)!r}")


def check_records(manifest: Manifest) -> None:
    """Generator, heads and attributes fit into each other."""
    g, heads = manifest.generator, {head.name: head for head in manifest.heads}
    for what, entries in (("heads", manifest.heads), ("attributes", manifest.attributes),
                          ("oneshots", manifest.oneshots)):
        if len({entry.name for entry in entries}) < len(entries):
            raise BundleError(f"two {what} have the same name")
    if manifest.format[0] >= 2 and not g.mapping_layers and (g.z_dim >= g.w_dim if g.labels else g.z_dim != g.w_dim):
        raise BundleError("a generator without a mapping has a w that is its z: expected z_dim equal to w_dim, or "
                          "below it where labels are embedded behind z")
    for head in manifest.heads:
        if head.widths[0] != (g.w_dim if head.space == "w" else g.z_dim):
            raise BundleError(f"head {head.name!r} with widths {head.widths} does not read from w or z")
        if head.sharp:
            check_sharp(head, {a.name for a in manifest.attributes if a.head == head.name})
    for attribute in manifest.attributes:
        head = heads.get(attribute.head)
        if head is None:
            raise BundleError(f"attribute {attribute.name!r} names the missing head {attribute.head!r:.60}")
        if not attribute.columns[1] <= head.widths[-1]:
            raise BundleError(f"attribute {attribute.name!r} does not fit its head {head.name!r}")
        if attribute.range[0] > attribute.range[1] or len(set(attribute.classes)) < len(attribute.classes):
            raise BundleError(f"attribute {attribute.name!r} has an empty range, or two classes of one name")
    for entry in manifest.oneshots:
        check_oneshot(entry, manifest)
    for name in manifest.graphs.get("synthesis", {}).get("noises", {}):
        if not NOISE.match(name):
            raise BundleError(f"the synthesis has the noise input {name!r}; expected names such as noise.3")


def check_oneshot(entry: Oneshot, manifest: Manifest) -> None:
    g, where = manifest.generator, f"oneshot {entry.name!r}"
    values = {a.name for a in manifest.attributes if a.kind == "value"}
    if not set(entry.targets) <= values or any(low > high for low, high in entry.targets.values()):
        raise BundleError(f"{where} has the targets {', '.join(entry.targets):.120}; expected attributes that are "
                          "values, with their ranges")
    if not set(entry.even) <= {a.name for a in manifest.attributes if a.kind == "class"}:
        raise BundleError(f"{where} is even in {', '.join(entry.even):.120}; expected attributes that are classes")
    ends = g.z_dim + g.w_dim + len(entry.targets), g.z_dim
    for block in entry.blocks:
        if (block[0], block[-1]) != ends:
            raise BundleError(f"a block of {where} leads from {block[0]} numbers to {block[-1]}; expected {ends[0]} "
                              f"and {ends[1]}")
    if (entry.confidence is None) == (entry.guidance is None):
        raise BundleError(f"{where} has the confidence {entry.confidence} and the guidance {entry.guidance}; expected "
                          "one of them")
    if entry.label >= max(g.labels, 1):
        raise BundleError(f"{where} has the label {entry.label}; expected 0 to {max(g.labels, 1) - 1}")
    if manifest.format[0] < 2 or f"oneshot.{entry.name}" not in manifest.graphs:
        raise BundleError(f"{where} has no graph: export the bundle again")


def check_sharp(head: Head, attributes: set[str]) -> None:
    assert head.sharp is not None
    ends = head.sharp.widths[0], head.sharp.widths[-1]
    if ends != (head.widths[0], head.widths[-1]):
        raise BundleError(f"the sharp stack of head {head.name!r} leads from {ends[0]} numbers to {ends[1]} logits; "
                          f"expected {head.widths[0]} and {head.widths[-1]}, as in the head")
    if not attributes.issuperset({*head.sharp.temperature, *head.sharp.ece}):
        raise BundleError(f"the sharp stack of head {head.name!r} was calibrated for attributes that it does not have")
