"""An image classifier of anybody's: an ONNX file and its spec, run by ONNX Runtime on the CPU.

It labels samples for heads, judges results, and confirms what heads accepted. The file is read and bounded before it
runs (``engine.foreign_onnx``, ``engine.foreign_operators``); nothing in it or in the spec can execute.
"""

import hashlib
import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy import ndarray as Array
from PIL import Image

from engine.classifier_spec import (
    COLOURS,
    AttributeSpec,
    InputSpec,
    read_spec,
    spec_path,
    template,
    write_template,
)
from engine.errors import BackendError, ClassifierError
from engine.foreign_onnx import UINT8, has_files_beside, read_foreign
from engine.foreign_operators import ForeignShapes
from engine.onnx_file import FLOAT, HALF, Malformed, Model
from engine.operators import Shape, size
from engine.text import visible

BATCH = 16  # pictures of one call
ROWS = "rows"
INPUT_TYPES = {FLOAT: np.float32, HALF: np.float16, UINT8: np.uint8}
# Weights of Rec. 601, with which Pillow makes grey pictures.
GREY = np.array([0.299, 0.587, 0.114], np.float32)


class ImageClassifier:
    """What an image classifier says of pictures.

    path      MODEL.onnx; its spec MODEL.spec.json lies beside it. Without one a template is written and ClassifierError
              names it
    threads   of ONNX Runtime; 0: its own choice

    attributes   ``AttributeSpec``s: name, kind, classes
    hashes       of the file, and of others with the same network

    Raises ClassifierError for files that are missing, unsafe or do not fit their spec, BackendError where ONNX Runtime
    is missing.
    """

    def __init__(self, path: str | os.PathLike, *, threads: int = 1):
        self.path, self.threads = Path(path), threads
        if not self.path.is_file():
            raise ClassifierError(f"there is no classifier {self.path}; expected an ONNX file")
        place = spec_path(self.path)
        try:
            model, metadata = read_foreign(self.path)
            self.inputs = real_inputs(model)
            if not place.exists():
                raise self.without_spec(model, place, metadata)
            self.spec = read_spec(place)
            self.check_input(place)
            self.widths = self.bounded(model)
        except Malformed as error:
            raise ClassifierError(f"{self.path} is no image classifier that can be trusted to run: "
                                  f"{visible(str(error)[:300])}") from error
        self.check_outputs(place)
        self.content = self.path if has_files_beside(model) else model.data
        self.hash = file_hash(self.path)

    def without_spec(self, model: Model, place: Path, metadata: Mapping[str, str]) -> ClassifierError:
        """Writes a template, with sides of 224 where the file leaves them open."""
        dims = {name: tuple(224 if isinstance(dim, str) else dim for dim in shape)
                for name, (_, shape) in self.inputs.items()}
        shapes = ForeignShapes(model, {name: (1, *shape[1:]) for name, shape in dims.items()}, 1).shapes
        widths = {output.name: size(shapes[output.name][1:]) for output in model.graph.outputs}
        said = write_template(place, template({name: (ROWS, *shape[1:]) for name, shape in dims.items()}, widths,
                                              metadata))
        return ClassifierError(f"{self.path} has no spec {place.name}, which says what goes in and what comes out; "
                               f"{said}")

    def check_input(self, place: Path) -> None:
        spec = self.spec.input
        if list(self.inputs) != [spec.name]:
            raise ClassifierError(f"{place}: the model's inputs are {', '.join(self.inputs)}; the spec says "
                                  f"{spec.name!r} alone")
        kind, shape = self.inputs[spec.name]
        fits = len(shape) == 4 and all(isinstance(dim, str) or dim == n
                                       for dim, n in zip(shape[1:], self.picture_shape, strict=True))
        if not fits or kind not in INPUT_TYPES:
            raise ClassifierError(f"{place}: the model reads {shape} of element type {kind}; the spec gives "
                                  f"{self.picture_shape} numbers (float32, float16 or uint8)")

    @property
    def picture_shape(self) -> tuple[int, int, int]:
        """Of what the model reads for one picture."""
        channels, (height, width) = COLOURS[self.spec.input.colour], self.spec.input.size
        return (channels, height, width) if self.spec.input.layout == "NCHW" else (height, width, channels)

    def bounded(self, model: Model) -> dict[str, int]:
        """Every shape is known and bounded, at each number of rows that is ever run; numbers a picture of the outputs.
        """
        name, widths = self.spec.input.name, {}
        for rows in self.rows:
            shapes = ForeignShapes(model, {name: (rows, *self.picture_shape)}, rows).shapes
            for output in model.graph.outputs:
                shape = shapes.get(output.name, ())
                if not shape or shape[0] != rows:
                    raise Malformed(f"its output {output.name!r} has the shape {shape}; expected {rows} rows")
                widths[output.name] = size(shape[1:])
        return widths

    def check_outputs(self, place: Path) -> None:
        for attribute in self.attributes:
            if attribute.output not in self.widths:
                raise ClassifierError(f"{place}: there is no output {attribute.output!r}; there are: "
                                      f"{', '.join(self.widths)}")
            attribute.check_width(self.widths[attribute.output], str(place))
        if self.spec.features is not None and self.spec.features not in self.widths:
            raise ClassifierError(f"{place}: there is no output {self.spec.features!r} for the features")

    @property
    def rows(self) -> tuple[int, ...]:
        """Pictures of a call: the number that the file fixes, or one and BATCH. No other number is ever run."""
        fixed = self.inputs[self.spec.input.name][1][0]
        return (fixed,) if isinstance(fixed, int) else (1, BATCH)

    @property
    def attributes(self) -> tuple[AttributeSpec, ...]:
        return self.spec.attributes

    @property
    def spans(self) -> list[tuple[int, int]]:
        """(first, past-last) column of every attribute in ``read``."""
        ends = np.cumsum([len(a.classes) or 1 for a in self.attributes]).tolist()
        return list(zip([0, *ends], ends, strict=False))

    @property
    def hashes(self) -> tuple[str, ...]:
        return (self.hash, *self.spec.same_as)

    @cached_property
    def session(self) -> Any:
        from engine.runtimes.onnxruntime import open_session

        content = self.content if isinstance(self.content, Path) else bytes(self.content)
        return open_session(content, self.threads, name=str(self.path))

    def run(self, pictures: Array, *, alone: bool = False) -> dict[str, Array]:
        """Every output (n, numbers) float32 of pictures (n, H, W, 3 or 1) uint8.

        alone   one picture a call where the file allows it, so that no bit depends on a picture's neighbours
        """
        kind, rows = INPUT_TYPES[self.inputs[self.spec.input.name][0]], self.rows[0 if alone else -1]
        found = {name: [np.empty((0, width), np.float32)] for name, width in self.widths.items()}
        for first in range(0, len(pictures), rows):
            x = prepare(pictures[first : first + rows], self.spec.input)
            x = np.clip(np.rint(x), 0, 255) if kind is np.uint8 else x
            count, lacking = len(x), rows - len(x)
            x = np.concatenate([x, np.repeat(x[-1:], lacking, axis=0)]) if lacking else x
            for name, numbers in self.call(x.astype(kind), list(found)).items():
                found[name].append(numbers.reshape(rows, -1)[:count].astype(np.float32))
        return {name: np.concatenate(parts) for name, parts in found.items()}

    def call(self, x: Array, names: list[str]) -> dict[str, Array]:
        try:
            return dict(zip(names, self.session.run(names, {self.spec.input.name: x}), strict=True))
        except BackendError:
            raise
        except Exception as error:  # onnxruntime raises many private types
            raise ClassifierError(f"{self.path} cannot be run: {' '.join(str(error).split())[:400]}") from error

    def read(self, pictures: Array, *, alone: bool = False) -> Array:
        """Probabilities of classes and values (n, columns) float64, see ``spans``; raises ClassifierError for NaN."""
        outputs = self.run(pictures, alone=alone)
        found = np.concatenate([a.read(outputs[a.output]) for a in self.attributes], axis=1)
        if not np.isfinite(found).all():
            raise ClassifierError(f"{self.path} gives numbers that are not finite: is the range or the layout in "
                                  f"{spec_path(self.path).name} right?")
        return found

    def predict(self, pictures: Array) -> Array:
        """Labels (n, attributes) float32: index of the likeliest class, or the value."""
        read = self.read(pictures)
        columns = [read[:, low:high].argmax(axis=1) if a.kind == "class" else read[:, low]
                   for a, (low, high) in zip(self.attributes, self.spans, strict=True)]
        return np.stack(columns, axis=1).astype(np.float32)

    def features(self, pictures: Array) -> Array:
        """What stands for a picture where pictures are compared, (n, d) float32: the spec's features, else all outputs.
        """
        outputs = self.run(pictures)
        chosen = [self.spec.features] if self.spec.features else list(outputs)
        return np.concatenate([outputs[name] for name in chosen], axis=1)


def file_hash(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def real_inputs(model: Model) -> dict[str, tuple[int, Shape]]:
    """Type and dimensions of what is not a weight (old files list those too); the first dimension may stay open."""
    weights = {tensor.name for tensor in model.graph.initialisers}
    return {value.name: (value.kind, tuple(ROWS if i == 0 and isinstance(dim, str) else dim
                                           for i, dim in enumerate(value.dims)))
            for value in model.graph.inputs if value.name not in weights}


def prepare(pictures: Array, spec: InputSpec) -> Array:
    """Pictures (n, H, W, 3 or 1) uint8 -> what the model reads, float32."""
    if pictures.shape[-1] == 1:
        pictures = np.repeat(pictures, 3, axis=-1)
    x = np.stack([framed(picture, spec) for picture in pictures]).astype(np.float32)
    if spec.colour == "grey":
        x = (x @ GREY)[..., None]
    elif spec.colour == "BGR":
        x = x[..., ::-1]
    low, high = spec.range
    x = (low + x / 255 * (high - low) - np.array(spec.mean, np.float32)) / np.array(spec.std, np.float32)
    return np.ascontiguousarray(x.transpose(0, 3, 1, 2) if spec.layout == "NCHW" else x, np.float32)


def framed(picture: Array, spec: InputSpec) -> Array:
    """A picture's crop at the model's size, (height, width, 3) uint8."""
    height, width = picture.shape[:2]
    if spec.crop == (0.0, 0.0, 1.0, 1.0) and (height, width) == spec.size:
        return picture
    left, top, right, bottom = (part * side for part, side in zip(spec.crop, (width, height) * 2, strict=True))
    margin = int(np.ceil(max(0, -left, -top, right - width, bottom - height)))
    if margin:
        picture = np.pad(picture, ((margin, margin), (margin, margin), (0, 0)), constant_values=spec.fill)
    box = (left + margin, top + margin, right + margin, bottom + margin)
    high, wide = spec.size
    resized = Image.fromarray(picture).resize((wide, high), Image.Resampling.BILINEAR, box=box)
    return np.asarray(resized)


def check_fits(attribute: AttributeSpec, ours: Any, where: object) -> None:
    """Raises ClassifierError unless an attribute of a bundle means the same to a classifier."""
    if (attribute.kind, set(attribute.classes)) != (ours.kind, set(ours.classes)):
        raise ClassifierError(f"{where} knows {attribute.name!r} as {attribute.kind} ({', '.join(attribute.classes)}), "
                              f"the bundle as {ours.kind} ({', '.join(ours.classes)}): rename it or its classes in the "
                              "spec")


def names(attributes: Sequence[AttributeSpec]) -> str:
    return ", ".join(attribute.name for attribute in attributes)
