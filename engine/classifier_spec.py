"""The spec of an image classifier: what its ONNX file cannot say. ``MODEL.spec.json`` lies beside ``MODEL.onnx``.

    {"format": "lace-engine classifier", "version": 1, "ready": true,
     "input": {"name": "x", "size": [64, 64], "layout": "NCHW", "colour": "RGB", "crop": [0, 0, 1, 1],
               "range": [0, 1], "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]},
     "attributes": {"smile": {"output": "y", "columns": [31, 32], "activation": "sigmoid"},
                    "mood": {"output": "e", "activation": "softmax", "classes": {"happy": 3, "other": [0, 1, 2]}},
                    "age": {"output": "years", "kind": "value", "scale": 0.01}}}

A file without a spec gets a template with what it tells of itself; ``_help`` in it explains every entry.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy import ndarray as Array

from engine.errors import ClassifierError, WriteError
from engine.folders import write_atomically
from engine.text import to_json

FORMAT, VERSION = "lace-engine classifier", 1
SUFFIX = ".spec.json"
NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
LAYOUTS, COLOURS = ("NCHW", "NHWC"), {"RGB": 3, "BGR": 3, "grey": 1}
ACTIVATIONS = ("softmax", "sigmoid", "none")
NO_YES = ("no", "yes")
MOST_BYTES, MOST_SIDE, MOST_COLUMNS = 2**20, 4096, 65_536

HELP = {
    "ready": "set it to true when all entries below are right",
    "input.size": "[height, width] of the pictures that the model reads; others are resized",
    "input.layout": "NCHW or NHWC",
    "input.colour": "RGB, BGR or grey",
    "input.crop": "[left, top, right, bottom] of the part of a picture that is read, in parts of its sides; beyond 0 "
                  "and 1 there is a margin: [-0.14, -0.14, 1.14, 1.14] is a picture of 150 in a frame of 192 pixels",
    "input.fill": "the grey of that margin, 0 to 255",
    "input.range": "[low, high]: what black and white are before mean and std: [0, 1], [-1, 1] or [0, 255]",
    "input.mean": "subtracted then: one number, or one a channel in the model's colour order",
    "input.std": "divided by then, likewise",
    "attributes": "name (letters, digits, _): {output, columns, ...}; take out what you do not want, rename the others",
    "attributes.NAME.output": "name of the model's output",
    "attributes.NAME.columns": "[first, past the last] of its numbers (all)",
    "attributes.NAME.activation": "softmax (logits that exclude each other), sigmoid (one logit: no, yes), or none "
                                  "(the numbers are probabilities already, or values)",
    "attributes.NAME.classes": 'names in the order of the columns, or {"name": column or [columns, ...]} to join some; '
                               "columns count from the first one of `columns`",
    "attributes.NAME.kind": "class or value; a value is offset + scale * number and should lie in 0..1: age in years "
                            "with a scale of 0.01",
    "attributes.NAME.bins": "of a value that is given as probabilities (or logits) of numbers: these numbers; their "
                            "mean is taken",
    "features": "output whose numbers stand for a picture where pictures are compared (all outputs); optional",
}


@dataclass(frozen=True, slots=True)
class InputSpec:
    """How a picture becomes numbers: crop, resize, colours, range, (x - mean) / std, layout."""

    name: str
    size: tuple[int, int]
    layout: str = "NCHW"
    colour: str = "RGB"
    crop: tuple[float, float, float, float] = (0.0, 0.0, 1.0, 1.0)
    fill: int = 0
    range: tuple[float, float] = (0.0, 1.0)
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)


@dataclass(frozen=True, slots=True)
class AttributeSpec:
    """One attribute of a picture, and the numbers of an output that say it.

    kind      'class' with ``classes``, or 'value'
    output, columns   (first, past the last); None: all of the output
    groups    of each class its columns, counted from the first; empty: column i is class i, one column is no / yes
    scale, offset     value = offset + scale * number
    bins      of a value: the numbers of which the columns are probabilities
    """

    name: str
    kind: str
    classes: tuple[str, ...]
    output: str
    columns: tuple[int, int] | None = None
    activation: str = "softmax"
    groups: tuple[tuple[int, ...], ...] = ()
    scale: float = 1.0
    offset: float = 0.0
    bins: tuple[float, ...] = ()

    def read(self, numbers: Array) -> Array:
        """An output (n, C) -> probabilities (n, classes), or values (n, 1)."""
        x = numbers[:, slice(*self.columns)] if self.columns else numbers
        x = activate(x.astype(np.float64), self.activation)
        if self.kind == "value":
            x = normalised(x) @ np.array(self.bins)[:, None] if self.bins else x
            return self.offset + self.scale * x
        if self.groups:
            return normalised(np.stack([x[:, list(group)].sum(axis=1) for group in self.groups], axis=1))
        return np.concatenate([1 - x, x], axis=1) if x.shape[1] == 1 else normalised(x)

    def check_width(self, width: int, where: str) -> None:
        """Raises ClassifierError unless an output of so many columns can be read."""
        first, last = self.columns or (0, width)
        count = last - first
        need(0 <= first < last <= width, f"{where}: the columns {first} to {last} of {self.name!r} are not among the "
                                         f"{width} of the output {self.output!r}")
        if self.kind == "value":
            need(count == (len(self.bins) or 1), f"{where}: the value {self.name!r} has {count} columns; expected "
                 f"{len(self.bins) or '1, or as many bins'}")
        elif self.groups:
            need(max(map(max, self.groups)) < count, f"{where}: a class of {self.name!r} has a column beyond {count}")
        else:
            expected = 1 if len(self.classes) == 2 and count == 1 else len(self.classes)
            need(count == expected, f"{where}: {self.name!r} has {len(self.classes)} classes and {count} columns")
        need(self.kind == "value" or self.activation != "softmax" or count > 1,
             f"{where}: {self.name!r} has one column, of which a softmax is always 1: say sigmoid or none")


def activate(x: Array, activation: str) -> Array:
    if activation == "sigmoid":
        return 1 / (1 + np.exp(-np.clip(x, -80, 80)))
    if activation == "softmax":
        x = np.exp(x - x.max(axis=1, keepdims=True))
        return x / x.sum(axis=1, keepdims=True)
    return x


def normalised(x: Array) -> Array:
    """Rows that add up to 1; what is nothing but zeros is evenly unsure."""
    x = np.clip(x, 0, None) + 1e-12
    return x / x.sum(axis=1, keepdims=True)


@dataclass(frozen=True, slots=True)
class Spec:
    """same_as: hashes of other files with the same network, for those who must not judge what it labelled."""

    input: InputSpec
    attributes: tuple[AttributeSpec, ...]
    features: str | None = None
    same_as: tuple[str, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)


def spec_path(model: Path) -> Path:
    """'x/age.onnx' -> 'x/age.spec.json'."""
    return model.with_name(model.name.removesuffix(".onnx") + SUFFIX)


def need(holds: bool, problem: str) -> None:
    if not holds:
        raise ClassifierError(problem)


# --- reading ----------------------------------------------------------------------------------------------------------


def read_spec(path: Path) -> Spec:
    """Raises ClassifierError with what is wrong, what was expected and where."""
    try:
        need(path.stat().st_size <= MOST_BYTES, f"{path} has more than {MOST_BYTES:,} bytes: it is no spec")
        document = json.loads(path.read_bytes())
    except OSError as error:
        raise ClassifierError(f"cannot read the spec {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ClassifierError(f"the spec {path} is no JSON: {error}") from error
    try:
        return build_spec(document)
    except ClassifierError as error:
        raise ClassifierError(f"the spec {path}: {error}") from error
    except (TypeError, ValueError, KeyError, AttributeError, OverflowError) as error:
        raise ClassifierError(f"the spec {path} has an entry of a wrong kind ({error}); see the docs on classifiers"
                              ) from error


def build_spec(document: Any) -> Spec:
    need(isinstance(document, dict) and document.get("format") == FORMAT,
         f'its "format" is not {FORMAT!r}; remove it to get a template')
    need(document.get("version") == VERSION, f'its "version" is {document.get("version")!r}; expected {VERSION}')
    need(document.get("ready", True) is True, 'it is a template that was not filled in: correct its entries and set '
                                              '"ready" to true')
    check_keys(document, ("format", "version", "ready", "input", "attributes", "features", "same_as", "facts"), "spec")
    entries = document.get("attributes")
    need(isinstance(entries, dict) and bool(entries), 'its "attributes" name nothing')
    assert isinstance(entries, dict)
    attributes = tuple(build_attribute(name, entry) for name, entry in entries.items())
    same_as = document.get("same_as", [])
    need(isinstance(same_as, list) and all(isinstance(text, str) for text in same_as), 'its "same_as" is no list')
    features = document.get("features")
    need(features is None or isinstance(features, str), 'its "features" is no name of an output')
    return Spec(build_input(document.get("input")), attributes, features, tuple(same_as),
                dict(document.get("facts") or {}))


def check_keys(entry: Any, known: Sequence[str], what: str) -> None:
    need(isinstance(entry, dict), f"{what} is no JSON object")
    for key in entry:
        need(key in known or key[:1] == "_", f"{what} has the unknown entry {key!r:.60}; it may have: "
                                             f"{', '.join(known)} (and remarks that begin with _)")


def build_input(entry: Any) -> InputSpec:
    need(isinstance(entry, dict), '"input" is missing')
    check_keys(entry, ("name", "size", "layout", "colour", "crop", "fill", "range", "mean", "std"), '"input"')
    size = entry.get("size")
    size = (size, size) if isinstance(size, int) else tuple(size or ())
    need(len(size) == 2 and all(type(n) is int and 0 < n <= MOST_SIDE for n in size),
         f'"input.size" is {entry.get("size")!r}; expected [height, width] of at most {MOST_SIDE}')
    need(isinstance(entry.get("name"), str), '"input.name" is missing')
    layout, colour = entry.get("layout", "NCHW"), entry.get("colour", "RGB")
    need(layout in LAYOUTS, f'"input.layout" is {layout!r}; expected one of {", ".join(LAYOUTS)}')
    need(colour in COLOURS, f'"input.colour" is {colour!r}; expected one of {", ".join(COLOURS)}')
    channels = COLOURS[colour]
    crop, span = numbers(entry, "crop", (0, 0, 1, 1), (4,)), numbers(entry, "range", (0, 1), (2,))
    need(crop[0] < crop[2] and crop[1] < crop[3] and all(-4 <= n <= 5 for n in crop),
         f'"input.crop" is {list(crop)}; expected left < right and top < bottom, from -4 to 5')
    fill = entry.get("fill", 0)
    need(type(fill) is int and 0 <= fill <= 255, f'"input.fill" is {fill!r}; expected a whole number from 0 to 255')
    mean, std = numbers(entry, "mean", (0,), (1, channels)), numbers(entry, "std", (1,), (1, channels))
    need(all(std), '"input.std" contains 0')
    return InputSpec(entry["name"], size, layout, colour, crop, fill, span, mean, std)  # type: ignore[arg-type]


def numbers(entry: Mapping, name: str, default: tuple, counts: Sequence[int]) -> Any:
    found = entry.get(name, default)
    found = tuple(found) if isinstance(found, list | tuple) else (found,)
    wanted = " or ".join(str(count) for count in dict.fromkeys(counts[:3]))
    need(len(found) in counts and all(map(is_number, found)),
         f'"{name}" is {entry.get(name)!r:.80}; expected {wanted} numbers')
    return tuple(map(float, found))


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def build_attribute(name: str, entry: Any) -> AttributeSpec:
    what = f'attribute {name!r:.60}'
    need(bool(NAME.fullmatch(name)), f"{what}: a name has letters, digits and _ and begins with a letter")
    check_keys(entry, ("output", "columns", "activation", "classes", "kind", "scale", "offset", "bins"), what)
    classes, bins = entry.get("classes"), numbers(entry, "bins", (), range(MOST_COLUMNS))
    kind = entry.get("kind", "value" if bins else "class")
    need(kind in ("class", "value"), f"{what}: its kind is {kind!r}; expected class or value")
    need(isinstance(entry.get("output"), str), f'{what} does not say its "output"')
    activation = entry.get("activation", "none" if kind == "value" and not bins else "softmax")
    need(activation in ACTIVATIONS, f"{what}: its activation is {activation!r}; expected {', '.join(ACTIVATIONS)}")
    columns = entry.get("columns")
    need(columns is None or (len(columns) == 2 and all(type(n) is int for n in columns)),
         f"{what}: its columns are {columns!r}; expected [first, past the last]")
    rest = entry["output"], None if columns is None else tuple(columns), activation
    if kind == "value":
        need(not classes, f"{what} is a value and has no classes")
        (scale,), (offset,) = numbers(entry, "scale", (1,), (1,)), numbers(entry, "offset", (0,), (1,))
        need(scale != 0, f"{what}: its scale is 0")
        return AttributeSpec(name, kind, (), *rest, scale=scale, offset=offset, bins=bins)
    names, groups = class_names(classes, what)
    return AttributeSpec(name, kind, names, *rest, groups=groups)


def class_names(classes: Any, what: str) -> tuple[tuple[str, ...], tuple[tuple[int, ...], ...]]:
    """Names of classes, and their columns where they are not in order."""
    groups: tuple = ()
    if isinstance(classes, dict):
        groups = tuple((columns,) if isinstance(columns, int) else tuple(columns) for columns in classes.values())
        need(all(group and all(type(n) is int and 0 <= n < MOST_COLUMNS for n in group) for group in groups),
             f"{what}: its classes need a column or a list of columns each")
    names = NO_YES if classes is None else tuple(classes)
    need(len(set(names)) == len(names) > 1 and all(
        isinstance(text, str) and text.isprintable() and 0 < len(text) <= 200 for text in names),
        f"{what}: its classes are {names!r:.80}; expected two or more different names")
    return names, groups


# --- writing ----------------------------------------------------------------------------------------------------------


def document_of(spec: Spec) -> dict:
    """A spec as JSON."""
    attributes = {}
    for a in spec.attributes:
        entry: dict[str, Any] = {"output": a.output, "columns": list(a.columns) if a.columns else None,
                                 "activation": a.activation, "kind": a.kind}
        if a.kind == "class":
            groups = {name: list(group) for name, group in zip(a.classes, a.groups, strict=True)} if a.groups else None
            entry["classes"] = groups or list(a.classes)
        else:
            entry |= {"scale": a.scale, "offset": a.offset, **({"bins": list(a.bins)} if a.bins else {})}
        attributes[a.name] = {key: value for key, value in entry.items() if value is not None}
    i = spec.input
    return {
        "format": FORMAT, "version": VERSION, "ready": True,
        "input": {"name": i.name, "size": list(i.size), "layout": i.layout, "colour": i.colour, "crop": list(i.crop),
                  "fill": i.fill, "range": list(i.range), "mean": list(i.mean), "std": list(i.std)},
        "attributes": attributes, **({"features": spec.features} if spec.features else {}),
        **({"same_as": list(spec.same_as)} if spec.same_as else {}),
        **({"facts": dict(spec.facts)} if spec.facts else {}),
    }


def write_spec(path: Path, spec: Spec) -> None:
    write_atomically(path, to_json(document_of(spec)) + "\n")


def template(inputs: Mapping[str, Sequence[int | str]], outputs: Mapping[str, int],
             metadata: Mapping[str, str]) -> dict:
    """A spec to be filled in, with what a file tells of itself.

    inputs (name -> dimensions), outputs (name -> numbers a picture), metadata (the file's own texts)
    """
    name, dims = next(((name, dims) for name, dims in inputs.items() if len(dims) == 4), ("", ("", 3, 224, 224)))
    layout = "NHWC" if dims[3] in (1, 3) and dims[1] not in (1, 3) else "NCHW"
    channels, *size = (dims[1], dims[2], dims[3]) if layout == "NCHW" else (dims[3], dims[1], dims[2])
    attributes = {}
    for output, width in outputs.items():
        label = (NAME.fullmatch(output) and output) or f"attribute{len(attributes)}"
        attributes[label] = {"output": output, "kind": "value", "scale": 1, "offset": 0} if width == 1 else {
            "output": output, "activation": "softmax", "classes": [f"class{i}" for i in range(min(width, 1000))]}
    return {
        "format": FORMAT, "version": VERSION, "ready": False, "_help": HELP,
        "_file": {"inputs": {k: list(v) for k, v in inputs.items()}, "outputs": dict(outputs),
                  "metadata": {key[:200]: text[:2000] for key, text in list(metadata.items())[:50]}},
        "input": {"name": name, "size": [n if isinstance(n, int) else 224 for n in size], "layout": layout,
                  "colour": "grey" if channels == 1 else "RGB", "crop": [0, 0, 1, 1], "range": [0, 1], "mean": [0],
                  "std": [1]},
        "attributes": attributes,
    }


def write_template(path: Path, document: dict) -> str:
    """Writes a template where there is none; returns where it is, or why it could not be written."""
    try:
        write_atomically(path, to_json(document) + "\n")
    except WriteError as error:
        return f"a template could not be written ({error})"
    return f"a template was written to {path}: correct its entries, set \"ready\" to true and run again"
