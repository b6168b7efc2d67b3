"""ONNX operators that are written in other words when a graph is rewritten (onnx_rows.py).

Each function takes (rewriting, inputs, attributes, number of results) and gives our names of the results, or None: the
node is kept as it is. It raises Malformed for what does not fit.
"""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from engine.onnx_file import Malformed
from engine.operators import Dim, Shape, size
from exporter.generators.onnx_folding import ROWS, evaluate, is_constant

if TYPE_CHECKING:
    from exporter.generators.onnx_rows import Rewriting

MOST_COPIES = 64
Results = list[str] | None


def reshape(r: "Rewriting", inputs: list[str], attributes: Mapping, _: int) -> Results:
    data, wanted = r.our(inputs[0]), r.sizes(inputs[1], "Reshape")
    dims = r.rows.shape(data)
    if not attributes.get("allowzero", 0):
        wanted = [dims[i] if n == 0 else n for i, n in enumerate(wanted)]
    return [r.rows.reshape(data, free_sizes(dims, wanted, r.rows.frozen))]


def free_sizes(dims: Shape, wanted: list[Dim], frozen: int | None) -> list[Dim]:
    """The sizes of a Reshape of ``dims``, for any number of rows. Raises Malformed where the batch is frozen for good.

    frozen   the batch that the file was exported for: sizes that were written with it are freed
    """
    if sum(n == -1 for n in wanted) > 1:
        raise Malformed("it leaves more than one size open")
    fixed = math.prod(n for n in wanted if isinstance(n, int) and n != -1)
    is_open, has_rows = any(isinstance(n, str) for n in dims), any(isinstance(n, str) for n in wanted)
    if is_open and not has_rows and frozen and wanted[0] != -1:
        first = wanted[0]
        assert isinstance(first, int)
        if first % frozen or (-1 not in wanted and fixed != frozen * size(dims)):
            raise Malformed(f"it makes {wanted} of {dims}: the batch of {frozen} is frozen in it; export the model "
                            "with a batch that is free")
        wanted, fixed, has_rows = [multiple(first // frozen), *wanted[1:]], fixed // first, True
    if not has_rows:
        return wanted
    if -1 in wanted:  # the rows are what stays open, so the other size has to be a number
        whole = evaluated(dims)
        rest = whole // (fixed * evaluated([n for n in wanted if isinstance(n, str)]))
        wanted = [rest if n == -1 else n for n in wanted]
    if sum(isinstance(n, str) for n in wanted) > 1 or evaluated(wanted) != evaluated(dims):
        raise Malformed(f"it makes {wanted} of {dims}")
    return wanted


def multiple(factor: int) -> Dim:
    return ROWS if factor == 1 else f"{factor}*{ROWS}"


def evaluated(dims: Sequence[Dim]) -> int:
    """Numbers of a result of so many rows that no other size is mistaken for them."""
    return math.prod(evaluate(dim, 1009) for dim in dims)


def flatten(r: "Rewriting", inputs: list[str], attributes: Mapping, _: int) -> Results:
    data = r.our(inputs[0])
    dims, axis = r.rows.shape(data), attributes.get("axis", 1)
    axis += len(dims) if axis < 0 else 0
    before, after = dims[:axis], dims[axis:]
    if any(isinstance(dim, str) for dim in after):
        raise Malformed("Flatten joins the rows with what is in them")
    return [r.rows.emit("Reshape", data, r.rows.integers(-1 if any(isinstance(dim, str) for dim in before) else
                                                         size(before), size(after)))]


def squeeze(r: "Rewriting", inputs: list[str], _: Mapping, __: int) -> Results:
    data = r.our(inputs[0])
    dims = r.rows.shape(data)
    is_given = len(inputs) > 1 and inputs[1]
    given = r.numbers(inputs[1], "Squeeze") if is_given else [i for i, n in enumerate(dims) if n == 1]
    axes = {axis % len(dims) for axis in given}
    if any(dims[axis] != 1 for axis in axes):
        raise Malformed(f"Squeeze takes away sizes of {dims} that are not 1")
    return [r.rows.reshape(data, [dim for i, dim in enumerate(dims) if i not in axes])]


def split(r: "Rewriting", inputs: list[str], attributes: Mapping, count: int) -> Results:
    data = r.our(inputs[0])
    dims = r.rows.shape(data)
    axis = attributes.get("axis", 0) % len(dims)
    whole = dims[axis]
    if not isinstance(whole, int):
        raise Malformed("Split divides the rows")
    if len(inputs) > 1 and inputs[1]:
        parts = r.numbers(inputs[1], "Split")
    else:
        each = -(-whole // count)
        parts = [min(each, whole - i * each) for i in range(count)]
    if sum(parts) != whole or min(parts) < 1 or len(parts) != count:
        raise Malformed(f"Split makes {parts[:8]} of {whole}")
    ends = np.cumsum([0, *parts]).tolist()
    return [r.rows.slice(data, ends[i], ends[i + 1], axis) for i in range(count)]


def pool_all(r: "Rewriting", inputs: list[str], _: Mapping, __: int) -> Results:
    data = r.our(inputs[0])
    axes = range(2, len(r.rows.shape(data)))
    return [r.rows.emit("ReduceMean", data, r.rows.integers(*axes), keepdims=1)]


def expand(r: "Rewriting", inputs: list[str], _: Mapping, __: int) -> Results:
    data, wanted = r.our(inputs[0]), r.sizes(inputs[1], "Expand")
    return [r.rows.expand(data, for_each_row(r, data, wanted))]


def for_each_row(r: "Rewriting", data: str, wanted: list[Dim]) -> list[Dim]:
    """How often a result is repeated; what a frozen batch has of something that is there once, it has for each row."""
    dims = r.rows.shape(data)
    is_once = len(dims) < len(wanted) or dims[0] == 1
    is_of_batch = bool(wanted) and wanted[0] == r.rows.frozen and r.rows.frozen != 1
    return [ROWS, *wanted[1:]] if is_of_batch and is_once else wanted


def fill(r: "Rewriting", inputs: list[str], attributes: Mapping, _: int) -> Results:
    value = np.ravel(attributes.get("value", np.zeros(1, np.float32)))[0]
    return [r.rows.expand(r.rows.weight(np.asarray(value)), r.sizes(inputs[0], "ConstantOfShape"))]


def tile(r: "Rewriting", inputs: list[str], _: Mapping, __: int) -> Results:
    data = r.our(inputs[0])
    repeats = for_each_row(r, data, r.sizes(inputs[1], "Tile"))
    for axis, times in enumerate(repeats):
        dims = r.rows.shape(data)
        if times == 1:
            continue
        if dims[axis] == 1:
            data = r.rows.expand(data, [times if i == axis else dim for i, dim in enumerate(dims)])
        elif isinstance(times, int) and 1 < times <= MOST_COPIES:
            data = r.rows.emit("Concat", *[data] * times, axis=axis)
        else:
            raise Malformed(f"Tile repeats a size of {dims[axis]} {times} times")
    return [data]


def add_up(r: "Rewriting", inputs: list[str], _: Mapping, __: int) -> Results:
    total = r.our(inputs[0])
    for name in inputs[1:]:
        total = r.rows.emit("Add", total, r.our(name))
    return [total]


def resize(r: "Rewriting", inputs: list[str], attributes: Mapping, _: int) -> Results:
    """By scales, whatever says how large: the sizes of a frozen batch, or of rows, do not matter."""
    data = r.our(inputs[0])
    dims = r.rows.shape(data)
    if len(dims) != 4:
        raise Malformed(f"Resize of a result with the sizes {dims}; expected rows of pictures")
    if len(inputs) > 3 and inputs[3]:
        wanted = r.sizes(inputs[3], "Resize")
        if len(wanted) != 4 or not all(isinstance(n, int) for n in (*dims[1:], *wanted[1:])):
            raise Malformed(f"Resize makes {wanted} of {dims}")
        scales = [1.0, *(new / old for new, old in zip(wanted[1:], dims[1:], strict=True))]  # type: ignore[operator]
    else:
        pair = r.known.get(inputs[2] if len(inputs) > 2 else "")
        if pair is None or not is_constant(pair):
            raise Malformed("Resize takes scales that are not constant")
        scales = pair[0].ravel().tolist()
    kept = {name: value for name, value in attributes.items()
            if not (name == "antialias" and not value) and (name, value) != ("keep_aspect_ratio_policy", b"stretch")}
    return [r.rows.emit("Resize", data, "", r.rows.weight(np.array(scales, np.float32)), **kept)]


def convolve(op: str):
    """Convolutions with the padding written out."""

    def write(r: "Rewriting", inputs: list[str], attributes: Mapping, _: int) -> Results:
        names = list(map(r.our, inputs))
        kept = {name: list(value) if isinstance(value, tuple) else value for name, value in attributes.items()
                if name not in ("auto_pad", "output_shape")}
        mode = attributes.get("auto_pad", b"NOTSET")
        if mode not in (b"NOTSET", b"VALID") or "output_shape" in attributes:
            kept["pads"] = explicit_pads(op, r.rows.shape(names[0]), r.rows.shape(names[1]), attributes, mode)
        return [r.rows.emit(op, *names, **kept)]

    return write


def explicit_pads(op: str, data: Shape, kernel: Shape, attributes: Mapping, mode: bytes) -> list[int]:
    """Of auto_pad SAME_UPPER and SAME_LOWER, or of the output_shape of a transposed convolution."""
    before, after = [], []
    for i, n in enumerate(data[2:]):
        stride = attributes.get("strides", (1, 1))[i]
        extent = (kernel[2 + i] - 1) * attributes.get("dilations", (1, 1))[i] + 1  # type: ignore[operator]
        if op == "Conv":
            total = max(0, (-(-n // stride) - 1) * stride + extent - n)  # type: ignore[operator]
        else:
            out = attributes["output_shape"][-2:][i] if "output_shape" in attributes else n * stride
            more = attributes.get("output_padding", (0, 0))[i]
            total = (n - 1) * stride + extent + more - out  # type: ignore[operator]
        if total < 0:
            raise Malformed("its padding is negative")
        small, large = total // 2, total - total // 2
        # The odd pixel: at the end for SAME_UPPER of a Conv; transposed convolutions without a mode take it at the end.
        is_late = mode == b"SAME_UPPER" if op == "Conv" else mode != b"SAME_LOWER"
        before.append(small if is_late else large)
        after.append(large if is_late else small)
    return [*before, *after]


def gather(r: "Rewriting", inputs: list[str], attributes: Mapping, _: int) -> Results:
    """Constant places count from the front."""
    dims = r.dims_of(inputs[0])
    if dims is None or inputs[1] not in r.known or not is_constant(r.known[inputs[1]]):
        return None
    axis, places = attributes.get("axis", 0), r.known[inputs[1]][0]
    if not isinstance(dims[axis], int) or (places >= 0).all():
        return None
    return [r.rows.emit("Gather", r.our(inputs[0]), r.rows.weight(places % dims[axis]), axis=axis)]


def normalise(r: "Rewriting", inputs: list[str], attributes: Mapping, _: int) -> Results:
    """BatchNormalization as at inference; the one result that this has."""
    if attributes.get("training_mode", 0):
        raise Malformed("BatchNormalization trains: export the model in evaluation mode")
    kept = {name: value for name, value in attributes.items() if name == "epsilon"}
    return [r.rows.emit("BatchNormalization", *map(r.our, inputs), **kept)]


SPECIAL = {
    "BatchNormalization": normalise, "ConstantOfShape": fill, "Conv": convolve("Conv"),
    "ConvTranspose": convolve("ConvTranspose"), "Expand": expand, "Flatten": flatten, "Gather": gather,
    "GlobalAveragePool": pool_all, "Reshape": reshape, "Resize": resize, "Split": split, "Squeeze": squeeze,
    "Sum": add_up, "Tile": tile,
}
