"""Plain generators: networks of others that lead from a latent, and perhaps a class, to a picture.

A file or a module becomes what a bundle's synthesis is: ws (rows, 1, w_dim) -> pictures (rows, channels, R, R) in
[-1, 1]. Its w is the latent z, N(0, I), and behind it the class as numbers 0 and 1.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
import torch
from numpy import ndarray as Array
from onnx import TensorProto
from torch import Tensor, nn

from engine.errors import BackendError, CheckpointError
from engine.manifest import LARGEST, WIDEST
from engine.onnx_file import Malformed
from engine.operators import Shape
from exporter.generators import Facts, Parts
from exporter.generators.onnx_folding import ROWS
from exporter.generators.onnx_rows import Rewriting, Rows

# The values that a network gives its pictures: its name for --range, the factor and the offset to [-1, 1].
RANGES = {"signed": (1.0, 0.0), "unit": (2.0, -1.0), "byte": (1 / 127.5, -1.0)}
SAMPLES, SEED = 16, 0
# Found ranges may be missed by so much: sigmoids and tanhs in float16, pictures that are clipped only when drawn.
SLACK, MOST_SIGNED, MOST_BYTE = 0.01, 4.0, 270.0
# How much of the range rows of a batch may differ from rows alone: sums in another order, no more.
SAME = 1e-3
MOST_CLASSES = 4096
PASSED = {"Cast", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze", "Dropout", "Flatten"}
INTEGER, ONE_HOT = "integer", "onehot"

# z (n, d) float32, labels (n,) int64 or None -> the network's own output (n, ...), float32.
Original = Callable[[Array, Array | None], Array]


@dataclass(frozen=True, slots=True)
class Latent:
    """What a network takes: the latent's sizes behind the rows, (d,) or (d, 1, 1); classes, 0 without; and whether
    these come as an 'integer' or as 'onehot'."""

    shape: tuple[int, ...]
    classes: int = 0
    class_input: str = INTEGER

    def __post_init__(self):
        if not self.shape or not 1 <= self.shape[0] <= WIDEST or any(n != 1 for n in self.shape[1:]):
            raise CheckpointError(f"the latent has the sizes {self.shape}; expected (d,) or (d, 1, 1) with d up to "
                                  f"{WIDEST}")
        if not 0 <= self.classes <= MOST_CLASSES or self.classes == 1:
            raise CheckpointError(f"the generator has {self.classes} classes; expected 2 to {MOST_CLASSES}, or none")

    @property
    def width(self) -> int:
        return self.shape[0]


@dataclass(frozen=True, slots=True)
class Network:
    """A network of others: as a graph, what goes into it, and how it answers itself."""

    model: onnx.ModelProto
    latent: Latent
    names: tuple[str, str | None]
    original: Original
    source: str
    frozen: int | None = None
    output: str | None = None
    remarks: tuple[str, ...] = field(default=())


class PlainMapping(nn.Module):
    """z (n, d), label (n,) -> w: z, and behind it the class as numbers 0 and 1. No layers, nothing is normalised."""

    def __init__(self, latent: Latent):
        super().__init__()
        self.z_dim, self.c_dim, self.w_dim = latent.width, latent.classes, latent.width + latent.classes
        self.layers: list[nn.Module] = []
        self.w_avg: Tensor
        self.register_buffer("w_avg", torch.zeros(self.w_dim))

    def embedding(self) -> Tensor | None:
        return torch.eye(self.c_dim) if self.c_dim else None

    def forward(self, z: Tensor, label: Tensor | None = None) -> Tensor:
        table = self.embedding()
        return z if table is None else torch.cat([z, table[label].to(z.dtype)], dim=1)


class PlainSynthesis(nn.Module):
    """ws (n, 1, w_dim) -> pictures in [-1, 1], by the network itself; ``graph`` is the same for any number of rows."""

    num_ws = 1

    def __init__(self, network: Network, graph: onnx.ModelProto, picture: "Picture"):
        super().__init__()
        self.network, self.graph, self.picture = network, graph, picture
        self.w_dim = network.latent.width + network.latent.classes
        self.resolution, self.img_channels = picture.side, picture.channels

    def forward(self, ws: Tensor) -> Tensor:
        w, d = ws[:, 0].numpy(), self.network.latent.width
        labels = w[:, d:].argmax(axis=1).astype(np.int64) if self.network.latent.classes else None
        return torch.from_numpy(self.picture.normalise(self.network.original(w[:, :d], labels)))


@dataclass(frozen=True, slots=True)
class Picture:
    """How a network's output is a picture. ``axes``: where its rows, channels, height and width are; without channels
    (rows, height, width) it is grey. ``values``: one of RANGES."""

    channels: int
    side: int
    axes: tuple[int, ...]
    values: str

    def normalise(self, output: Array) -> Array:
        """(n, channels, side, side) float32 in [-1, 1]."""
        factor, offset = RANGES[self.values]
        output = output.transpose(self.axes) if len(self.axes) == 4 else output[:, None]
        return np.ascontiguousarray(output * np.float32(factor) + np.float32(offset), np.float32)


# --- from a network to parts ----------------------------------------------------------------------------------------


def parts_of(network: Network, name: str, values: str | None = None) -> Parts:
    """Raises CheckpointError.  values: one of RANGES, None to find out from samples."""
    rows = Rows(next(entry.version for entry in network.model.opset_import), network.frozen)
    try:
        raw = rewrite(network, rows)
        layout = layout_of(rows.shape(raw))
        found, remarks = sample(network, values)
        picture = Picture(*layout, found)
        synthesis = PlainSynthesis(network, finish(rows, raw, picture), picture)
    except (Malformed, BackendError) as error:
        raise CheckpointError(f"cannot use {name}: {error}") from error
    mapping, latent = PlainMapping(network.latent).eval(), network.latent
    facts = Facts(name, "plain", latent.width, mapping.w_dim, latent.classes, 1, picture.side, picture.channels,
                  network.source, normalise=False, truncation=1.0)
    return Parts(mapping, synthesis.eval(), facts, (*network.remarks, *remarks))


def rewrite(network: Network, rows: Rows) -> str:
    """ws into the network's inputs, and its nodes; returns our name of its output. Raises CheckpointError."""
    latent, (z_name, label_name) = network.latent, network.names
    w = rows.input("ws", (ROWS, 1, latent.width + latent.classes))
    w = rows.reshape(w, (ROWS, latent.width + latent.classes))
    kinds = {value.name: value.type.tensor_type.elem_type for value in network.model.graph.input}
    z = rows.slice(w, 0, latent.width, 1) if latent.classes else w
    z = rows.reshape(z, (ROWS, *latent.shape)) if len(latent.shape) > 1 else z
    given = {z_name: converted(rows, z, kinds[z_name])}
    if label_name is not None:
        label = rows.slice(w, latent.width, latent.width + latent.classes, 1)
        given[label_name] = converted(rows, integer(rows, label, latent.classes, network) if
                                      latent.class_input == INTEGER else label, kinds[label_name])
    rewriting = Rewriting(rows, network.model.graph, given)
    output = network.output or network.model.graph.output[0].name
    raw = rewriting.our(output)
    return converted(rows, raw, TensorProto.FLOAT, kind_of(network.model, output))


def converted(rows: Rows, name: str, to: int, kind: int = TensorProto.FLOAT) -> str:
    to = TensorProto.FLOAT if to == TensorProto.DOUBLE else to
    return name if to == kind else rows.emit("Cast", name, to=to)


def integer(rows: Rows, one_hot: str, classes: int, network: Network) -> str:
    """The class as a number: 0 and 1 times 0, 1, 2 ..., in the shape of the network's input."""
    number = rows.emit("MatMul", one_hot, rows.weight(np.arange(classes, dtype=np.float32)[:, None]))
    number = rows.emit("Add", number, rows.weight(np.float32(0.5)))  # Cast cuts off what is behind the point
    rank = next(len(value.type.tensor_type.shape.dim) for value in network.model.graph.input
                if value.name == network.names[1])
    return rows.reshape(number, (ROWS,)) if rank == 1 else number


def kind_of(model: onnx.ModelProto, output: str) -> int:
    kind = next(value.type.tensor_type.elem_type for value in model.graph.output if value.name == output)
    if kind not in (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE):
        raise CheckpointError(f"its output {output[:60]!r} is of the element type {kind}; expected a picture of floats"
                              ": export the model without its last conversion")
    return TensorProto.FLOAT if kind == TensorProto.DOUBLE else kind


def finish(rows: Rows, raw: str, picture: Picture) -> onnx.ModelProto:
    """The output as a bundle's picture, and the whole as a graph."""
    image = raw
    if len(picture.axes) == 3:
        image = rows.emit("Unsqueeze", image, rows.integers(1))
    elif picture.axes != (0, 1, 2, 3):
        image = rows.emit("Transpose", image, perm=list(picture.axes))
    factor, offset = RANGES[picture.values]
    if picture.values != "signed":
        image = rows.emit("Mul", image, rows.weight(np.float32(factor)))
        image = rows.emit("Add", image, rows.weight(np.float32(offset)))
    rows.rename(image, "image")
    return rows.model("synthesis", ["ws"], ["image"])


def layout_of(shape: Shape) -> tuple[int, int, tuple[int, ...]]:
    """(channels, side, axes) of an output of this shape. Raises CheckpointError."""
    where = f"its output has the sizes {shape}"
    if not shape or shape[0] != ROWS or not all(isinstance(n, int) for n in shape[1:]):
        raise CheckpointError(f"{where}; expected one picture for each row of latents")
    if len(shape) == 3:
        channels, height, width, axes = 1, shape[1], shape[2], (0, 1, 2)
    elif len(shape) == 4:
        is_first, is_last = shape[1] in (1, 3), shape[3] in (1, 3)
        if is_first == is_last:
            raise CheckpointError(f"{where}; expected pictures of 1 or 3 channels, (rows, channels, height, width) or "
                                  "(rows, height, width, channels)")
        channels, height, width = shape[1:] if is_first else (shape[3], shape[1], shape[2])
        axes = (0, 1, 2, 3) if is_first else (0, 3, 1, 2)
    else:
        raise CheckpointError(f"{where}, which are no pictures; expected (rows, channels, height, width), (rows, "
                              "height, width, channels) or (rows, height, width)")
    if height != width or height > LARGEST:  # type: ignore[operator]
        raise CheckpointError(f"its pictures are {height} x {width}; expected square ones of up to {LARGEST} pixels a "
                              "side")
    return channels, height, axes  # type: ignore[return-value]


# --- what samples tell ----------------------------------------------------------------------------------------------


def sample(network: Network, values: str | None) -> tuple[str, list[str]]:
    """The range of its values, and remarks, from pictures of random latents. Raises CheckpointError."""
    rng = np.random.default_rng(SEED)
    z = rng.standard_normal((SAMPLES, network.latent.width)).astype(np.float32)
    labels = np.arange(SAMPLES) % network.latent.classes if network.latent.classes else None
    pictures = network.original(z, labels)
    if not np.isfinite(pictures).all():
        raise CheckpointError("its pictures hold numbers that are infinite or not a number")
    span = max(1e-6, float(np.ptp(pictures)))
    alone = network.original(z[:1], None if labels is None else labels[:1])
    if np.abs(alone - pictures[:1]).max() > SAME * span:
        raise CheckpointError("a picture depends on the others of its batch, or on chance: export the model in "
                              "evaluation mode (model.eval()) and without noise of its own")
    remarks = []
    if np.abs(pictures[1:] - pictures[:1]).max() <= 1e-6 * span:
        remarks.append("all samples look alike: are these the weights of this network?")
    if values is None:
        values = RANGE_OF_LAST.get(last_operator(network)) or guess(float(pictures.min()), float(pictures.max()))
    low, high = (float(x) * RANGES[values][0] + RANGES[values][1] for x in (pictures.min(), pictures.max()))
    if min(low, -1) < -1 - 5 * SLACK or max(high, 1) > 1 + 5 * SLACK:
        remarks.append(f"values of samples reach from {pictures.min():.3g} to {pictures.max():.3g}; what lies outside "
                       f"the range ({values}) is clipped when pictures are drawn")
    return values, remarks


def guess(low: float, high: float) -> str:
    if low >= -SLACK and high <= 1 + SLACK:
        return "unit"
    if max(-low, high) <= MOST_SIGNED:
        return "signed"
    if low >= -1 and high <= MOST_BYTE:
        return "byte"
    raise CheckpointError(f"values of its pictures reach from {low:.3g} to {high:.3g}: say what they mean with --range "
                          "signed ([-1, 1]), unit ([0, 1]) or byte ([0, 255])")


RANGE_OF_LAST = {"Tanh": "signed", "Sigmoid": "unit"}


def last_operator(network: Network) -> str:
    """What the output comes from, beyond nodes that leave the numbers alone."""
    makers = {name: node for node in network.model.graph.node for name in node.output}
    name = network.output or network.model.graph.output[0].name
    for _ in range(len(makers)):
        node = makers.get(name)
        if node is None:
            return ""
        if node.op_type not in PASSED:
            return node.op_type
        name = node.input[0]
    return ""


def write_plain(synthesis: PlainSynthesis, path: Path, **_: object) -> tuple[dict, list[str]]:
    """Write ``path``; returns the graph's record for the manifest, and no remarks."""
    graph = synthesis.graph
    path.write_bytes(graph.SerializeToString())
    parameters = sum(math.prod(tensor.dims) for tensor in graph.graph.initializer)
    return {"file": path.name, "precision": "fp32", "noise": "none", "lowering": "none",
            "opset": graph.opset_import[0].version, "nodes": len(graph.graph.node), "parameters": parameters}, []
