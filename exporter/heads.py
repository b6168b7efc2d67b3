"""Attribute heads from files: LACE's, our own trainer's and InterFaceGAN's boundaries -> HeadStack."""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from engine.errors import CheckpointError
from engine.folders import write_atomically
from exporter.archives import read_archive, safetensors_metadata
from exporter.boundaries import boundary_name, plane
from exporter.generators.state import named_list
from exporter.unpickle import guarded

# LACE's training writes the best, the last and every tenth checkpoint of NAME; of CIFAR-10, without a NAME.
PREFIX = re.compile(r"(best_valid_ckpt|last_ckpt|ckpt_\d+)(_|$)")
METADATA = "lace_head"
NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
NO_YES = ("no", "yes")
MAX_CLASS = 200  # letters


def codes(n: int) -> tuple[str, ...]:
    """Names for classes of which only the number is known."""
    return tuple(str(i) for i in range(n))


# What LACE's data sets predict: the classes of an attribute, () for a number. The class codes of FFHQ are
# undocumented; that gender 0 is female and glasses 0 none is reported by users of the same data.
FFHQ = {
    "width": (), "height": (), "smile": NO_YES, "pitch": (), "roll": (), "yaw": (), "gender": ("female", "male"),
    "age": (), "beard": NO_YES, "glasses": NO_YES, "bald": (), "haircolor": codes(5),
    **{f"light{i}": () for i in range(9)},
}
AFHQ_CATS = {
    "breeds": ("egyptian", "himalayan", "bombay", "snowshoe", "maine_coon", "norwegian_forest", "calico",
               "scottish_fold", "singapura", "bengal", "savannah", "siberian", "siamese", "persian", "ragdoll",
               "british_shorthair"),
    "haircolor": ("white", "ginger", "black", "grey", "brown", "cream", "cinnamon"),
    "moods": ("grumpy", "playful", "bored", "fearful", "happy"),
    "age": ("kitten", "old"),
}
DATASETS = (FFHQ, AFHQ_CATS)
CIFAR_NAME = "category"
CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
# First and last style layer that an edit touches, for generators with 18 of them; other attributes touch all.
FFHQ_LAYERS = {
    "light0": (7, 11), "light3": (7, 11), "smile": (4, 5), "yaw": (0, 3), "pitch": (0, 3), "age": (4, 7),
    "gender": (0, 7), "glasses": (0, 5), "bald": (0, 5), "beard": (5, 9),
}


@dataclass(frozen=True, slots=True)
class HeadAttribute:
    """One attribute of a stack: ``columns`` = (first, past-last) of its logits. See engine.bundle.Attribute.

    ``layers``: style layers that an edit may touch, or None. Those of LACE's own heads hold for generators with
    18 layers: drop them for others.
    """

    name: str
    kind: str
    classes: tuple[str, ...]
    columns: tuple[int, int]
    sigma: float = 0.1
    range: tuple[float, float] = (0.0, 1.0)
    layers: tuple[int, ...] | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)
    tolerance: float | None = None


Layers = tuple[tuple[np.ndarray, np.ndarray], ...]


@dataclass(frozen=True, slots=True, eq=False)
class SharpStack:
    """A head's stack for probabilities, with the facts of its calibration. See engine.bundle.Sharp.

    layers        as in HeadStack; temperatures are contained in the last one
    calibrated    whether temperatures and errors come from held-out latents
    temperature   by attribute: what its logits were divided by
    ece           by attribute and psi ("0.7"): expected calibration error
    """

    layers: Layers
    calibrated: bool = False
    temperature: Mapping[str, float] = field(default_factory=dict)
    ece: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, eq=False)
class HeadStack:
    """Dense layers from a latent ('w' or 'z') to logits: leaky ReLU 0.2 between them, none behind the last.

    layers   (weight (out, in), bias (out,)) float32, first layer first: smooth, for flows. Empty where the stack only
             brings a sharp one to a head that a bundle has already
    sharp    a second stack with the same inputs and logits, for probabilities
    """

    name: str
    space: str
    layers: Layers
    attributes: tuple[HeadAttribute, ...]
    sharp: SharpStack | None = None

    def __post_init__(self):
        check(self.space in ("w", "z"), f"the head {self.name!r} is on the space {self.space!r}; expected w or z")
        stacks = [layers for layers in (self.layers, self.sharp and self.sharp.layers) if layers]
        check(bool(stacks), f"the head {self.name!r} has no layers")
        ends = {check_layers(self.name, layers) for layers in stacks}
        check(len(ends) == 1, f"the two stacks of the head {self.name!r} differ in their inputs or logits: {ends}")
        ((_, before),) = ends
        names = [attribute.name for attribute in self.attributes]
        check(len(set(names)) == len(names) > 0, f"the head {self.name!r} has no attributes, or two of one name")
        end = 0
        for attribute in self.attributes:
            check_attribute(attribute)
            check(attribute.columns[0] == end, f"the attribute {attribute.name!r} does not start at logit {end}")
            end = attribute.columns[1]
        check(end == before, f"the head {self.name!r} gives {before} logits; its attributes take {end}")


def check_layers(name: str, layers: Layers) -> tuple[int, int]:
    """Layers fit each other and are finite; the widths of the input and of the logits."""
    before = None
    for i, (weight, bias) in enumerate(layers):
        fits = weight.ndim == 2 and bias.shape == weight.shape[:1] and before in (None, weight.shape[1])
        check(fits, f"layer {i} of the head {name!r} has weights {weight.shape} and biases {bias.shape}, "
                    f"which do not fit what comes before")
        finite = np.isfinite(weight).all() and np.isfinite(bias).all()
        check(bool(finite), f"layer {i} of the head {name!r} holds NaN or infinite numbers")
        before = weight.shape[0]
    assert before is not None
    return layers[0][0].shape[1], before


def check(condition: bool, message: str) -> None:
    if not condition:
        raise CheckpointError(message)


def check_attribute(attribute: HeadAttribute) -> None:
    name, width = attribute.name, attribute.columns[1] - attribute.columns[0]
    check(bool(NAME.fullmatch(name)), f"the attribute name {name!r:.60} is not an identifier; rename the file or entry")
    for text in attribute.classes:
        check(bool(text) and text.isprintable() and len(text) <= MAX_CLASS,
              f"the class {text[:MAX_CLASS]!r} of {name!r} is not a printable text of 1 to {MAX_CLASS} letters")
    check(attribute.kind in ("class", "value"), f"the attribute {name!r} is of the unknown kind {attribute.kind!r:.20}")
    if attribute.kind == "value":
        check(width == 1 and not attribute.classes, f"the attribute {name!r} is a number, but takes {width} logits")
        check(attribute.sigma > 0, f"the attribute {name!r} has sigma {attribute.sigma}; expected a positive number")
        is_positive = attribute.tolerance is None or 0 < attribute.tolerance < float("inf")
        check(is_positive, f"the attribute {name!r} has the tolerance {attribute.tolerance}; expected a positive one")
        check(attribute.range[0] < attribute.range[1], f"the attribute {name!r} has an empty range {attribute.range}")
    else:
        check(width == len(attribute.classes) >= 2,
              f"the attribute {name!r} takes {width} logits for the classes "
              f"{', '.join(attribute.classes)[:200] or 'none'}; "
              f"say what they are with --labels")
    check(attribute.layers is None or bool(attribute.layers), f"the attribute {name!r} has an empty list of layers")


def load_heads(path: str | Path, *, labels: str | Path | Mapping | None = None, space: str | None = None,
               centre: np.ndarray | None = None) -> HeadStack:
    """The heads of one file.

    labels   a JSON file (or its content) that says what the logits are, where the file itself does not:
             {"smile": ["no", "yes"], "age": "value", "yaw": {"kind": "value", "range": [-1, 1], "sigma": 0.1}}
    space    'w' or 'z' for files that do not say; by default 'z' in a folder named ..._z, else 'w'
    centre   the mean of w (w_dim,), through which boundaries on w without an offset are laid; the origin by default

    Raises CheckpointError for what is no head, without having executed anything of the file.
    """
    path, wishes = Path(path), read_labels(labels)
    archive = read_archive(path)
    try:
        if archive.container == "safetensors":
            return guarded("the head", lambda: from_safetensors(archive.content, wishes))
        space = space or ("z" if path.absolute().parent.name.endswith("_z") else "w")
        if isinstance(archive.content, np.ndarray):
            middle = centre if space == "w" else None
            return guarded("the boundary", lambda: from_boundary(archive.content, path.stem, wishes, space, middle))
        return guarded("the head", lambda: from_lace(archive.content, path.name, wishes, space))
    except CheckpointError as error:
        raise CheckpointError(f"cannot use {path}: {error}") from error


# --- what the user says about the logits --------------------------------------------------------------------------


def read_labels(labels: str | Path | Mapping | None) -> dict[str, dict[str, Any]]:
    """{attribute: {kind, classes, sigma, range, layers}}, with only the entries that were given."""
    if labels is None:
        return {}
    if isinstance(labels, (str, Path)):
        try:
            labels = json.loads(Path(labels).read_text(encoding="utf-8"))
        except OSError as error:
            raise CheckpointError(f"cannot read the labels file {labels}: {error.strerror}") from error
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"the labels file {labels} is no JSON that can be read: {error}") from error
    if not isinstance(labels, Mapping):
        raise CheckpointError('the labels file must be a JSON object such as {"smile": ["no", "yes"], "age": "value"}')
    return {str(name): read_label(str(name), value) for name, value in labels.items()}


def read_label(name: str, value: Any) -> dict[str, Any]:
    if value == "value":
        return {"kind": "value", "classes": ()}
    if isinstance(value, (list, tuple)):
        value = {"kind": "class", "classes": value}
    known = {"kind", "classes", "sigma", "range", "layers", "scale", "offset"}
    check(isinstance(value, Mapping) and set(value) <= known and value.get("kind", "class") in ("class", "value"),
          f'the label of {name!r} must be "value", a list of class names, or an object with some of: '
          f"{', '.join(sorted(known))}")
    entry = dict(value)
    if "classes" in entry:
        check(isinstance(entry["classes"], (list, tuple)), f"the classes of {name!r} must be a list of names")
        entry["classes"] = tuple(str(text) for text in entry["classes"])
        check(len(set(entry["classes"])) == len(entry["classes"]), f"the classes of {name!r} repeat a name")
        entry.setdefault("kind", "class")
    if entry.get("kind") == "value":
        entry.setdefault("classes", ())
    try:
        return entry | {key: read(entry[key]) for key, read in FIELDS.items() if entry.get(key) is not None}
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"the label of {name!r} has a wrong sigma, range, layers, scale or offset: {error}"
        ) from error


def _range(value: Any) -> tuple[float, float]:
    low, high = value
    return float(low), float(high)


FIELDS = {"sigma": float, "range": _range, "layers": lambda value: tuple(int(i) for i in value), "scale": float,
          "offset": float}


# --- LACE ---------------------------------------------------------------------------------------------------------


def from_lace(content: Any, file: str, wishes: dict[str, dict], space: str) -> HeadStack:
    state, conditions = lace_state(content), "net.0.weight, net.0.bias, ... and heads.weight (or linear.weight)"
    last = next((name for name in ("heads", "linear") if f"{name}.weight" in state), None)
    numbers = sorted(int(m[1]) for key in state if (m := re.fullmatch(r"net\.(\d{1,3})\.weight", key)))
    if last is None or not numbers:
        raise CheckpointError(f"its tensors are {named_list(list(state)) or 'none'}; expected those of a head: "
                              f"{conditions}")
    names = [f"net.{i}" for i in numbers] + [last]
    extra = sorted(set(state) - {f"{name}.{leaf}" for name in names for leaf in ("weight", "bias")})
    if extra or any(state[f"{name}.weight"].ndim not in (2, 4) for name in names):
        shown = named_list(extra or [n for n in names if state[f"{n}.weight"].ndim not in (2, 4)])
        raise CheckpointError(f"the head has further layers ({shown}), probably normalisation; only plain heads "
                              f"(LACE's default, norm none) are supported: train it without")
    layers = tuple(dense(state, name) for name in names)
    logits = layers[-1][0].shape[0]
    attributes = split(file_attributes(file, logits), logits, wishes, is_cifar=last == "linear")
    provenance = {"source": "LACE checkpoint", "file": file}
    attributes = tuple(replace(attribute, provenance=provenance) for attribute in attributes)
    return HeadStack("_".join(attribute.name for attribute in attributes), space, layers, attributes)


def lace_state(content: Any) -> dict[str, np.ndarray]:
    """The state_dict of the bare classifier, whichever of its two copies is there."""
    if not isinstance(content, dict):
        raise CheckpointError(f"it holds a {type(content).__name__}; expected a dict with 'state_dict'")
    state = content.get("state_dict")
    if not isinstance(state, dict):
        state = content.get("model_state_dict")
        if isinstance(state, dict):
            state = {str(key).removeprefix("f."): value for key, value in state.items()}
    if not isinstance(state, dict):
        raise CheckpointError(f"its keys are {named_list([str(key)[:40] for key in content]) or 'none'}; expected "
                              f"'state_dict' or 'model_state_dict'")
    if not all(isinstance(key, str) and isinstance(value, np.ndarray) for key, value in state.items()):
        raise CheckpointError("its state_dict holds other things than named tensors")
    if any(key.startswith("backbone.") for key in state):
        raise CheckpointError("it is LACE's image classifier; heads on latents are needed (dense_embedder_w/...)")
    return state


def dense(state: Mapping[str, np.ndarray], name: str) -> tuple[np.ndarray, np.ndarray]:
    weight = state[f"{name}.weight"]
    if weight.ndim == 4:
        check(weight.shape[2:] == (1, 1), f"the layer {name} is a {weight.shape[2:]} convolution; expected 1x1")
        weight = weight[:, :, 0, 0]
    bias = state.get(f"{name}.bias")
    bias = np.zeros(len(weight)) if bias is None else bias
    return np.array(weight, np.float32), np.array(bias, np.float32)


def file_attributes(file: str, logits: int) -> list[str]:
    """'best_valid_ckpt_yaw-age.pt' -> yaw, age. CIFAR-10's files name nothing: there is one attribute."""
    name = PREFIX.sub("", Path(file).stem, count=1)
    if not name and logits == len(CIFAR10):
        return [CIFAR_NAME]
    check(bool(name), f"the name of the file does not say what its {logits} logits are; rename it to, for example, "
                      "best_valid_ckpt_NAME.pt")
    return name.split("-")


def split(names: list[str], logits: int, wishes: dict[str, dict], *, is_cifar: bool) -> list[HeadAttribute]:
    """Which logits belong to which attribute, and what they mean."""
    classes = next((found for table in DATASETS if (found := tabled(names, logits, wishes, table))), None)
    if classes is None:
        known = {name: wishes[name]["classes"] for name in names if "classes" in wishes.get(name, {})}
        open_names = [name for name in names if name not in known]
        left = logits - sum(len(c) or 1 for c in known.values())
        if known and (left < len(open_names) or (not open_names and left)):
            given = ", ".join(f"{name} {len(classes) or 1}" for name, classes in known.items())
            raise CheckpointError(f"the head gives {logits} logits for {', '.join(names)}, but --labels shares out: "
                                  f"{given} (1 is a value, more are classes); correct it")
        if len(open_names) > 1:
            raise CheckpointError(
                f"the head gives {logits} logits, and it is not known how they belong to {', '.join(names)}; say so "
                f'with --labels FILE, a JSON file such as {{"{names[0]}": ["no", "yes"], "{names[-1]}": "value"}}'
            )
        guess = CIFAR10 if (is_cifar or names == [CIFAR_NAME]) and left == len(CIFAR10) else codes(left)
        classes = {name: known.get(name, guess if left > 1 else ()) for name in names}
    attributes, start = [], 0
    for name in names:
        end = start + (len(classes[name]) or 1)
        ends = FFHQ_LAYERS.get(name) if FFHQ.get(name) == classes[name] else None
        layers = None if ends is None else tuple(range(ends[0], ends[1] + 1))
        kind = "class" if classes[name] else "value"
        attribute = HeadAttribute(name, kind, classes[name], (start, end), layers=layers)
        attributes.append(wished(attribute, wishes))
        start = end
    return attributes


def wished(attribute: HeadAttribute, wishes: dict[str, dict]) -> HeadAttribute:
    """What the user says of it wins; scale and offset are those of a boundary, and used there."""
    wish = {key: value for key, value in wishes.get(attribute.name, {}).items() if key not in ("scale", "offset")}
    return replace(attribute, **wish)


def tabled(names: list[str], logits: int, wishes: dict[str, dict], table: Mapping) -> dict[str, tuple] | None:
    """The classes by one data set's table, wishes first, if all names are known and the logits add up."""
    known = {**table, **{name: wish["classes"] for name, wish in wishes.items() if "classes" in wish}}
    if not all(name in known for name in names):
        return None
    return {name: known[name] for name in names} if sum(len(known[n]) or 1 for n in names) == logits else None


# --- InterFaceGAN -------------------------------------------------------------------------------------------------


def from_boundary(normal: np.ndarray, stem: str, wishes: dict[str, dict], space: str,
                  centre: np.ndarray | None) -> HeadStack:
    name = boundary_name(stem)
    wish = {key: value for key, value in wishes.get(name, {}).items() if value is not None}
    scale = wish.get("scale", 1.0)
    layer, offset = plane(normal, name, scale=scale, offset=wish.get("offset"), centre=centre)
    provenance = {"source": "InterFaceGAN boundary", "file": stem, "scale": scale, "offset": offset}
    attribute = HeadAttribute(name, "class", NO_YES, (0, 2), provenance=provenance)
    return HeadStack(name, space, (layer,), (wished(attribute, wishes),))


# --- our own files ------------------------------------------------------------------------------------------------


def from_safetensors(data: bytes, wishes: dict[str, dict]) -> HeadStack:
    """Tensors {i}.weight, {i}.bias, and sharp.{i}.weight, sharp.{i}.bias of a second stack.

    Metadata ``lace_head``: JSON of name, space, attributes and, with a second stack, ``sharp``.
    """
    text = safetensors_metadata(data).get(METADATA)
    if not isinstance(text, str):
        raise CheckpointError(f"the file has no {METADATA!r} in its metadata: it is no head of lace-train")
    tensors = safetensors.numpy.load(data)
    header = json.loads(text)
    smooth, sharp = take_layers(tensors, ""), take_layers(tensors, "sharp.")
    if tensors or not (smooth or sharp):
        raise CheckpointError(f"its tensors are not 0.weight, 0.bias, ... alone: {named_list(list(tensors)) or 'none'}")
    attributes = tuple(read_attribute(entry, wishes) for entry in header["attributes"])
    facts = read_sharp(header.get("sharp") or {}, sharp) if sharp else None
    return HeadStack(str(header["name"]), header["space"], smooth, attributes, facts)


def take_layers(tensors: dict[str, np.ndarray], prefix: str) -> Layers:
    """Remove the layers of one stack from the tensors of a file."""
    layers = []
    while (weight := tensors.pop(f"{prefix}{len(layers)}.weight", None)) is not None:
        bias = tensors.pop(f"{prefix}{len(layers)}.bias", None)
        if bias is None:
            raise CheckpointError(f"the tensor {prefix}{len(layers)}.bias is missing")
        layers.append((np.array(weight, np.float32), np.array(bias, np.float32)))
    return tuple(layers)


def read_sharp(entry: dict, layers: Layers) -> SharpStack:
    temperature = {str(name): float(value) for name, value in entry.get("temperature", {}).items()}
    ece = {str(name): {str(psi): float(value) for psi, value in table.items()}
           for name, table in entry.get("ece", {}).items()}
    return SharpStack(layers, bool(entry.get("calibrated", False)), temperature, ece)


def read_attribute(entry: dict, wishes: dict[str, dict]) -> HeadAttribute:
    first, last = entry["columns"]
    layers = entry.get("layers")
    attribute = HeadAttribute(
        str(entry["name"]), entry["kind"], tuple(str(text) for text in entry.get("classes", ())),
        (int(first), int(last)), float(entry.get("sigma", 0.1)), _range(entry.get("range", (0.0, 1.0))),
        None if layers is None else tuple(int(i) for i in layers), dict(entry.get("provenance", {})),
        None if entry.get("tolerance") is None else float(entry["tolerance"]),
    )
    return wished(attribute, wishes)


def save_head(path: str | Path, stack: HeadStack) -> None:
    """Write a head as safetensors; the file appears whole or not at all. Raises WriteError."""
    header = {"name": stack.name, "space": stack.space, "attributes": [asdict(a) for a in stack.attributes]}
    stacks, tensors = {"": stack.layers}, {}
    if stack.sharp:
        stacks["sharp."] = stack.sharp.layers
        header["sharp"] = {"calibrated": stack.sharp.calibrated, "temperature": dict(stack.sharp.temperature),
                           "ece": {name: dict(table) for name, table in stack.sharp.ece.items()}}
    for prefix, layers in stacks.items():
        for i, (weight, bias) in enumerate(layers):
            tensors[f"{prefix}{i}.weight"] = np.ascontiguousarray(weight, np.float32)
            tensors[f"{prefix}{i}.bias"] = np.ascontiguousarray(bias, np.float32)
    write_atomically(path, safetensors.numpy.save(tensors, metadata={METADATA: json.dumps(header, sort_keys=True)}))
