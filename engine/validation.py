"""The one check of a bundle's content, whatever runs it: exactly the tensors and graphs that its manifest promises.

A bundle may come from a stranger, who can make any hash. So everything that a runtime will read is compared with what
the manifest's sizes demand, before anything is computed: names, shapes, types and finiteness of all tensors; inputs,
outputs, operators, shapes and places of weights of all graphs. Announced sizes are compared with the files' own sizes
before anything is allocated.
"""

import json
import os
import re
from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy import ndarray as Array
from safetensors.numpy import load_file

from engine.errors import BundleError
from engine.graphs import check_graph, signatures
from engine.manifest import FIELD, GOLDEN, MOST_LAYERS, GeneratorFacts, Manifest
from engine.text import visible

# A header lists a tensor in about 100 bytes; 1,000 heads of 60 layers are 12 MB.
MOST_HEADER = 1 << 24
MOST_ROWS = 64  # of golden answers
MOST_SIDE = 64  # pixels of a box-averaged golden picture
TYPES = {"F32": np.dtype(np.float32), "I64": np.dtype(np.int64)}

Shape = tuple[int, ...]
# Shape and type by name of a tensor.
Layout = dict[str, tuple[Shape, str]]


def averaged_side(resolution: int) -> int:
    """Pixels a side of the box-averaged golden pictures: the largest divisor up to MOST_SIDE."""
    return max(side for side in range(1, min(resolution, MOST_SIDE) + 1) if resolution % side == 0)


# --- what the manifest promises ---------------------------------------------------------------------------------------


def stack_layout(prefix: str, widths: Shape) -> Layout:
    """Layers of ``x W^T + b``."""
    layout: Layout = {}
    for i, (n_in, n_out) in enumerate(pairwise(widths)):
        layout |= {f"{prefix}.{i}.weight": ((n_out, n_in), "F32"), f"{prefix}.{i}.bias": ((n_out,), "F32")}
    return layout


def field_layout(manifest: Manifest) -> Layout:
    g = manifest.generator
    layout = stack_layout("mapping", (g.z_dim + g.embedded, *(g.w_dim,) * g.mapping_layers))
    layout["mapping.w_avg"] = (g.w_dim,), "F32"
    if g.labels:
        layout["mapping.embedding"] = (g.labels, g.embedded), "F32"
    for head in manifest.heads:
        layout |= stack_layout(f"head.{head.name}", head.widths)
        if head.sharp:
            layout |= stack_layout(f"head.{head.name}.sharp", head.sharp.widths)
    for entry in manifest.oneshots:
        for i, widths in enumerate(entry.blocks):
            layout |= stack_layout(f"oneshot.{entry.name}.{i}", widths)
    return layout


def golden_layout(manifest: Manifest, rows: int) -> Layout:
    """Format 2.0: the answers of a graph begin with its name."""
    g = manifest.generator
    layout: Layout = {"z": ((rows, g.z_dim), "F32"), "psi": ((rows, 1), "F32"), "mapping.w": ((rows, g.w_dim), "F32")}
    if g.labels:
        layout["label"] = (rows,), "I64"
    for head in manifest.heads:
        for name in (f"head.{head.name}", *([f"head.{head.name}.sharp"] if head.sharp else ())):
            logits = head.widths[-1]
            layout[f"{name}.logits"] = (rows, logits), "F32"
            layout[f"{name}.gradient"] = (rows, logits, g.z_dim), "F32"
    for entry in manifest.oneshots:
        layout[f"oneshot.{entry.name}.latent"] = (rows, g.z_dim), "F32"
        if entry.targets:
            layout[f"oneshot.{entry.name}.targets"] = (rows, len(entry.targets)), "F32"
    return layout | picture_layout(manifest, rows, "synthesis.")


def golden_layout_1(manifest: Manifest, rows: int) -> Layout:
    """Format 1.x: the answers of heads are named by attribute."""
    g = manifest.generator
    layout: Layout = {"z": ((rows, g.z_dim), "F32"), "psi": ((rows, 1), "F32"), "w": ((rows, g.w_dim), "F32")}
    if g.labels:
        layout["label"] = (rows,), "I64"
    for a in manifest.attributes:
        layout[f"{a.name}.logits"] = (rows, a.width), "F32"
        layout[f"{a.name}.gradient"] = (rows, a.width, g.z_dim), "F32"
    return layout | picture_layout(manifest, rows, "")


def picture_layout(manifest: Manifest, rows: int, prefix: str) -> Layout:
    if "synthesis" not in manifest.graphs:
        return {}
    g = manifest.generator
    side = averaged_side(g.resolution)
    return {f"{prefix}image": ((1, g.img_channels, g.resolution, g.resolution), "F32"),
            f"{prefix}images": ((rows, g.img_channels, side, side), "F32")}


# --- files of tensors -------------------------------------------------------------------------------------------------


def read_header(path: Path) -> Layout:
    """What a safetensors file says of itself; its tensors fill it exactly, one after the other."""
    size = path.stat().st_size
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(size - 8, MOST_HEADER):
                raise ValueError("its header is longer than the file")
            header = json.loads(file.read(length))
        if type(header) is not dict:
            raise ValueError("its header is no table")
        header.pop("__metadata__", None)
        return read_entries(header, size - 8 - length)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise BundleError(f"{path} cannot be read as safetensors: {visible(str(error)[:120])}") from error


def read_entries(header: Mapping, space: int) -> Layout:
    layout, spans = {}, []
    for name, entry in header.items():
        dims, (first, last) = entry["shape"], entry["data_offsets"]
        numbers = (*dims, first, last)
        if not isinstance(dims, list) or any(type(n) is not int or not 0 <= n <= 1 << 48 for n in numbers):
            raise ValueError(f"the entry of {name!r:.80} is wrong")
        layout[name] = tuple(dims), str(entry["dtype"])
        spans.append((first, last))
    end = 0
    for first, last in sorted(spans):
        if first != end or last < first:
            raise ValueError("its tensors overlap, or leave gaps")
        end = last
    if end != space:
        raise ValueError(f"its tensors take {end} bytes; it holds {space}")
    return layout


def check_layout(path: Path, found: Layout, expected: Layout) -> None:
    for name, (shape, kind) in expected.items():
        if found.get(name) != (shape, kind):
            what = "missing" if name not in found else visible(f"{found[name][1]:.10} {found[name][0]!s:.80}")
            raise BundleError(f"{path}: tensor {name} is {what}; expected {kind} {shape}: get the bundle from its "
                              "authors again, or export it again")
    if extra := sorted(set(found) - set(expected)):
        raise BundleError(f"{path}: tensor {extra[0]!r:.80} is none that the manifest promises ({len(extra)} such)")


def load_tensors(path: Path) -> dict[str, Array]:
    """The tensors of a file whose header has been checked; all are finite."""
    try:
        tensors = load_file(path)
    except Exception as error:  # safetensors raises its own type, plain OSError and ValueError
        raise BundleError(f"{path} cannot be read as safetensors: {error}") from error
    for name, tensor in tensors.items():
        if tensor.dtype.kind == "f" and not is_finite(tensor):
            raise BundleError(f"{path}: tensor {name} holds numbers that are infinite or not a number")
    return tensors


def is_finite(tensor: Array) -> bool:
    # A sum is finite only if all of its terms are, and takes a tenth of the time; it may itself overflow.
    with np.errstate(over="ignore", invalid="ignore"):
        return bool(np.isfinite(tensor.sum(dtype=np.float64)) or np.isfinite(tensor).all())


# --- the whole --------------------------------------------------------------------------------------------------------


def validate(path: Path, manifest: Manifest, files: Mapping[str, os.PathLike]) -> tuple[Manifest, dict[str, Array]]:
    """Check all files of a bundle; the manifest, with what format 1.x leaves to be counted, and the field's tensors.

    files   where each file is, by name; their hashes have been checked
    Raises BundleError.
    """
    found = read_header(Path(files[FIELD]))
    if manifest.format[0] == 1:
        manifest = replace(manifest, generator=count_layers(manifest.generator, found))
    check_layout(path / FIELD, found, field_layout(manifest))
    field = load_tensors(Path(files[FIELD]))
    golden = read_header(Path(files[GOLDEN]))
    check_layout(path / GOLDEN, golden, expected_golden(path, manifest, golden))
    check_answers(path, manifest.generator, load_tensors(Path(files[GOLDEN])))
    known = signatures(manifest)
    weights = Path(files[FIELD]).stat().st_size
    for name, graph in manifest.graphs.items():
        check_graph(Path(files[graph["file"]]), known[name](), manifest.generator, weights)
    return manifest, field


def count_layers(facts: GeneratorFacts, found: Layout) -> GeneratorFacts:
    """Format 1.x does not say how many layers its mapping has, and always normalises."""
    layers = sum(re.fullmatch(r"mapping\.\d{1,3}\.weight", name) is not None for name in found)
    if not 0 < layers <= MOST_LAYERS:
        raise BundleError(f"the mapping has {layers} layers; expected 1 to {MOST_LAYERS}")
    return replace(facts, mapping_layers=layers, normalise=True)


def expected_golden(path: Path, manifest: Manifest, found: Layout) -> Layout:
    shape, _ = found.get("z", ((), ""))
    if len(shape) != 2 or not 1 <= shape[0] <= MOST_ROWS:
        raise BundleError(f"{path / GOLDEN}: z has the shape {shape!s:.80}; expected 1 to {MOST_ROWS} rows")
    return (golden_layout if manifest.format[0] >= 2 else golden_layout_1)(manifest, shape[0])


def check_answers(path: Path, facts: GeneratorFacts, golden: Mapping[str, Array]) -> None:
    label = golden.get("label")
    if label is not None and not ((label >= 0) & (label < facts.labels)).all():
        raise BundleError(f"{path / GOLDEN}: a label is out of range; expected 0 to {facts.labels - 1}")


def name_as_in_2(manifest: Manifest, golden: Mapping[str, Array]) -> dict[str, Array]:
    """Answers of format 1.x by the names of 2.0; logits that belong to no attribute are zero and not compared."""
    kept = {name: golden[name] for name in ("z", "psi", "label") if name in golden}
    kept["mapping.w"] = golden["w"]
    kept |= {f"synthesis.{name}": golden[name] for name in ("image", "images") if name in golden}
    rows, width = golden["z"].shape
    for head in manifest.heads:
        logits = np.zeros((rows, head.widths[-1]), np.float32)
        gradient = np.zeros((rows, head.widths[-1], width), np.float32)
        for a in (a for a in manifest.attributes if a.head == head.name):
            columns = slice(*a.columns)
            logits[:, columns], gradient[:, columns] = golden[f"{a.name}.logits"], golden[f"{a.name}.gradient"]
        kept |= {f"head.{head.name}.logits": logits, f"head.{head.name}.gradient": gradient}
    return kept
