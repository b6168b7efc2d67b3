"""The compiled field as Python sees it: records, packed weights, threads. One ``CpuNetwork`` serves many fields."""

import ctypes
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from ctypes import POINTER, byref, c_float, c_int64, c_void_p
from functools import cache
from pathlib import Path
from threading import Lock
from typing import overload
from weakref import finalize

import numpy as np
from numpy import ndarray as Array

from engine.constants import MOST_THREADS, Refusal
from engine.errors import BundleError, RequestError
from engine.native.build import VARIANTS, library_path, variants
from engine.reference import field as twin


class NotBuilt(ImportError):
    """There is no compiled library here: why, and what to do."""


# --- the records of records.h -------------------------------------------------------------------------------------


def members(names: str, kind: type) -> list[tuple[str, type]]:
    return [(name, kind) for name in names.split()]


class Layer(ctypes.Structure):
    _fields_ = [*members("into out", c_int64), *members("weight bias back", c_void_p)]


class Stack(ctypes.Structure):
    _fields_ = [*members("into depth outputs reads_z", c_int64), *members("layer last last_bias", c_void_p)]


class Network(ctypes.Structure):
    _fields_ = [*members("z_dim w_dim embedded labels normalised", c_int64), *members("embedding average", c_void_p),
                ("mapping", Stack), *members("slope epsilon", c_float)]


class Use(ctypes.Structure):
    _fields_ = [("stack", c_void_p), *members("rows wanted", c_int64), *members("row seeds logits slopes", c_void_p)]


class Call(ctypes.Structure):
    _fields_ = [
        *members("rows is_w uses pairs near", c_int64),
        *members("z psi label use pair_row source near_row near_anchor cotangent w jacobian", c_void_p),
    ]


# --- the library --------------------------------------------------------------------------------------------------


def instructions() -> set[str] | None:
    """What the processor knows; None where nobody tells."""
    told = Path("/proc/cpuinfo")
    return set(told.read_text().split()) if told.exists() else None


def chosen() -> str:
    """$LACE_CPU, or the fastest variant that this processor runs and that was built. Raises ValueError or NotBuilt."""
    known = instructions()
    fitting = [name for name in variants() if not VARIANTS[name][0] or (known and known.issuperset(VARIANTS[name][0]))]
    built = [name for name in fitting if library_path(name).exists()]
    if not built:
        raise NotBuilt(f"{' or '.join(fitting)} was not built when lace-engine was installed: install a C++ compiler "
                       "(g++ or clang++), then run: python -m engine.native.build")
    wanted = os.environ.get("LACE_CPU", built[0])
    if wanted not in built:
        raise ValueError(f"LACE_CPU={wanted!r} does not run here; these were built and do: {', '.join(built)}")
    return wanted


@cache
def library(variant: str) -> ctypes.CDLL:
    """Raises NotBuilt for one that the system does not load, such as one that was built for a newer glibc."""
    path = library_path(variant)
    try:
        found = ctypes.CDLL(str(path))
    except OSError as error:
        raise NotBuilt(f"{path.name} cannot be loaded here ({error}): build it anew on this machine with: "
                       "python -m engine.native.build --again") from error
    opened = POINTER(c_void_p)
    for name, result, arguments in (
        ("panel", c_int64, []),
        ("has_half", c_int64, []),
        ("open_pool", c_int64, [c_int64, opened]),
        ("close_pool", None, [c_void_p]),
        ("open_field", c_int64, [POINTER(Network), c_void_p, opened]),
        ("close_field", None, [c_void_p]),
        ("evaluate", c_int64, [c_void_p, POINTER(Call), c_int64]),
        ("open_rows", c_int64, [c_void_p, c_void_p, c_void_p, opened]),
        ("close_rows", None, [c_void_p]),
        ("admit", c_int64, [c_void_p, c_void_p, c_int64, c_void_p]),
        ("advance", c_int64, [c_void_p, c_void_p, c_int64, c_int64, c_int64]),
        ("open_posterior", c_int64, [c_void_p, c_void_p, c_void_p, opened]),
        ("close_posterior", None, [c_void_p]),
        ("walk", c_int64, [c_void_p, c_void_p, c_int64]),
    ):
        function = getattr(found, f"lace_{name}")
        function.restype, function.argtypes = result, arguments
    return found


REASONS = {
    Refusal.MISSING: "an array is missing", Refusal.COUNT: "a number of rows, columns or threads is out of range",
    Refusal.WIDTH: "a width is not the network's", Refusal.LABEL: "a label is not one of the generator's classes",
    Refusal.POSITION: "a position is outside its array", Refusal.PROGRAM: "a condition's program is not well formed",
    Refusal.ORDER: "it continues what was not begun", Refusal.PRECISION: "it has no bfloat16 instructions",
}


def check(refusal: int, what: str) -> None:
    """``refusal`` is what the library returned. Raises MemoryError, or RequestError with the reason."""
    if refusal == Refusal.MEMORY:
        raise MemoryError(f"there is no memory for {what}")
    if refusal:
        raise RequestError(f"the compiled library refused {what}: {REASONS[Refusal(refusal)]}; what it was given "
                           "belongs to another bundle, or is damaged")


def open_handle(function: Callable[..., int], what: str, *arguments: object) -> int:
    """The address of what a function of the library opens; raises as ``check``."""
    handle = c_void_p()
    check(function(*arguments, byref(handle)), what)
    assert handle.value is not None
    return handle.value


def default_threads() -> int:
    """One for each core that this process may use: two threads of a core would share its arithmetic."""
    if not hasattr(os, "sched_getaffinity"):
        return os.cpu_count() or 1
    return len({siblings(processor) for processor in os.sched_getaffinity(0)})


def siblings(processor: int) -> str:
    """The processors of the same core, as the kernel lists them."""
    told = Path(f"/sys/devices/system/cpu/cpu{processor}/topology/thread_siblings_list")
    return told.read_text() if told.exists() else str(processor)


# Of each head that is read: who reads it, and the combinations of its logits.
Heads = Mapping[str, tuple[Array | None, Array]]
# pair_row, source, near_row, near_anchor.
Pairs = tuple[Array, Array, Array, Array]
REAL, INTEGER = np.float32, np.int64


def fitted(name: str, array: object, dtype: type, *shape: int) -> Array:
    """The array in C order; raises RequestError unless it has this shape."""
    found = np.ascontiguousarray(array, dtype)
    if found.shape != shape:
        raise RequestError(f"{name} has shape {found.shape}: expected {shape}")
    return found


# --- weights ------------------------------------------------------------------------------------------------------


@overload
def address(array: Array) -> int: ...
@overload
def address(array: Array | None) -> int | None: ...
def address(array: Array | None) -> int | None:
    # Not by __array_interface__, whose keys are interned anew in each call: some day Python then makes another table
    # of all interned strings, 1 MB, and malloc's arenas fill with the holes of the old ones.
    return None if array is None else array.ctypes.data


def aligned(shape: tuple[int, ...], dtype: type | np.dtype) -> Array:
    """Zeros whose rows of registers begin where lines of the cache do."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    space = np.zeros(size + 64, np.uint8)
    return space[-address(space) % 64 :][:size].view(dtype).reshape(shape)


def to_half(x: Array) -> Array:
    """float32 -> the bits of the nearest bfloat16, uint16."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def packed(weight: Array, panel: int, *, half: bool = False) -> Array:
    """weight (K, N) -> (panels, K, panel) float32, or (panels, K/2, panel, 2) bfloat16; zeros fill up both."""
    depth = 2 if half else 1
    (k, n), values = weight.shape, to_half(weight) if half else weight
    groups, panels = -(-k // depth), -(-n // panel)
    full = np.zeros((groups * depth, panels * panel), values.dtype)
    full[:k, :n] = values
    found = aligned((panels, groups, panel, depth), values.dtype)
    found[:] = full.reshape(groups, depth, panels, panel).transpose(2, 0, 3, 1)
    return found


def check_layers(layers: Sequence[tuple[Array, Array]], into: int) -> None:
    """Raises BundleError unless each layer reads what the one before gives, and the first one ``into`` numbers."""
    for i, (weight, bias) in enumerate(layers):
        if weight.ndim != 2 or weight.shape[1] != into or bias.shape != weight.shape[:1]:
            raise BundleError(f"layer {i} has a weight of shape {weight.shape} and a bias of {bias.shape}: expected "
                              f"(n, {into}) and (n,); the bundle is damaged, export it again")
        into = len(weight)


class CpuNetwork:
    """A bundle's mapping and heads, packed, with the threads that run them. Heads are packed at their first use.

    tensors     of field.safetensors
    heads       name -> whether it reads z
    threads     0: all cores
    half        cotangents go back in bfloat16
    normalise   whether the mapping divides z by its root mean square

    Raises NotBuilt; ValueError for ``half`` without such instructions, or too many threads; BundleError for layers that
    do not fit each other.
    """

    def __init__(self, tensors: Mapping[str, Array], heads: Mapping[str, bool], z_dim: int, w_dim: int, *,
                 threads: int = 0, half: bool = False, normalise: bool = True):
        self.variant = chosen()
        self.library, self.half = library(self.variant), half
        if half and not self.library.lace_has_half():
            raise ValueError(f"there are no bfloat16 instructions in {self.variant!r}: leave precision out")
        if not 0 <= threads <= MOST_THREADS:
            raise ValueError(f"threads={threads} is out of range: expected 0, for all cores, to {MOST_THREADS}")
        self.tensors, self.heads, self.panel = tensors, heads, self.library.lace_panel()
        self.kept: list[object] = []  # what records point at
        self.stacks: dict[str, Stack] = {}
        self.lock = Lock()
        embedding = self.take(tensors.get("mapping.embedding"))
        average = self.take(tensors["mapping.w_avg"].reshape(-1))
        labels, embedded = (0, 0) if embedding is None else embedding.shape
        into = z_dim + embedded
        self.record = Network(z_dim, w_dim, embedded, labels, normalise, address(embedding), address(average),
                              self.stack(twin.layers(tensors, "mapping"), into, last=False),
                              twin.SLOPE, twin.MOMENT_EPSILON)
        self.pool = open_handle(self.library.lace_open_pool, "its threads", threads or default_threads())
        # Not at the interpreter's exit: other threads may be inside, and the process ends anyway.
        finalize(self, self.library.lace_close_pool, self.pool).atexit = False

    @overload
    def take(self, array: Array) -> Array: ...
    @overload
    def take(self, array: Array | None) -> Array | None: ...
    def take(self, array: Array | None) -> Array | None:
        """float32 in C order, and kept."""
        if array is not None:
            array = np.ascontiguousarray(array, np.float32)
            self.kept.append(array)
        return array

    def stack(self, layers: Sequence[tuple[Array, Array]], into: int, *, last: bool, reads_z: bool = False):
        """A record of layers (weight (out, into), bias), all of them hidden or the last one linear."""
        check_layers(layers, into)
        hidden, final = (layers[:-1], layers[-1]) if last else (layers, (None, None))
        records = (Layer * max(len(hidden), 1))()
        for i, (weight, bias) in enumerate(hidden):
            out = len(weight)
            padded_bias = aligned((-(-out // self.panel) * self.panel,), np.float32)
            padded_bias[:out] = bias
            forth, back = packed(weight.T, self.panel), packed(weight, self.panel, half=self.half)
            self.kept += [padded_bias, forth, back]
            records[i] = Layer(weight.shape[1], out, address(forth), address(padded_bias), address(back))
        weight, bias = self.take(final[0]), self.take(final[1])
        self.kept.append(records)
        return Stack(into, len(hidden), 0 if weight is None else len(weight), reads_z, ctypes.addressof(records),
                     address(weight), address(bias))

    def head(self, name: str) -> Stack:
        with self.lock:
            if name not in self.stacks:
                layers = twin.layers(self.tensors, f"head.{name}")
                into = layers[0][0].shape[1]
                self.stacks[name] = self.stack(layers, into, last=True, reads_z=self.heads[name])
            return self.stacks[name]


class CpuField:
    """One evaluation at a time; keeps what ``back`` needs. Raises MemoryError; RequestError for what does not fit."""

    def __init__(self, network: CpuNetwork):
        self.network = network
        self.handle = open_handle(network.library.lace_open_field, "the network", byref(network.record), network.pool)
        finalize(self, close, network.library.lace_close_field, self.handle, network).atexit = False

    def forward(self, z: Array, psi: Array | None, label: Array | None, heads: Heads, *, is_w: bool = False,
                slopes: bool = False, pairs: Pairs | None = None):
        """z (rows, z_dim), or with ``is_w`` w (rows, w_dim) in its place; psi (rows, 1), label (rows,).

        heads     {name: (positions (m,) or None for all rows, seeds (k, C))}
        slopes    whether to give those of each head
        pairs     the cotangents to bring back to z in the same call: see ``Call`` in records.h
        returns   w (rows, w_dim), {name: (logits (m, C), slopes (m, k, into) or None)}, jacobian (pairs, z_dim)
        """
        record, rows = self.network.record, len(z)
        z = fitted("w" if is_w else "z", z, REAL, rows, record.w_dim if is_w else record.z_dim)
        kept: list[Array | None] = [None if psi is None else fitted("psi", psi, REAL, rows, 1),
                                    None if label is None else fitted("label", label, INTEGER, rows)]
        w = z if is_w else np.empty((rows, record.w_dim), REAL)
        call = Call(rows=rows, is_w=is_w, uses=len(heads), z=address(z), psi=address(kept[0]), label=address(kept[1]),
                    w=address(w))
        found, uses = {}, (Use * max(len(heads), 1))()
        for i, (name, (row, seeds)) in enumerate(heads.items()):
            stack = self.network.head(name)
            row = None if row is None else fitted(f"the rows of {name!r}", row, INTEGER, len(row))
            seeds = fitted(f"the seeds of {name!r}", seeds, REAL, len(seeds), stack.outputs)
            m = rows if row is None else len(row)
            logits = np.empty((m, stack.outputs), REAL)
            slope = np.empty((m, len(seeds), stack.into), REAL) if slopes else None
            uses[i] = Use(ctypes.addressof(stack), m, len(seeds), address(row), address(seeds), address(logits),
                          address(slope))
            kept += [row, seeds]
            found[name] = logits, slope
        call.use = ctypes.addressof(uses)
        if pairs is None:
            self.evaluate(call)
            return w, found, np.empty((0, record.z_dim), REAL)
        pair_row, source, near_row, anchor = pairs
        count, near = len(pair_row), len(near_row)
        source = fitted("source", source, INTEGER, count)
        pair_row, near_row = (np.ascontiguousarray(x, INTEGER) for x in (pair_row, near_row))
        anchor = fitted("the anchors", anchor, REAL, near, record.w_dim)
        jacobian = np.empty((count, record.z_dim), REAL)
        call.pairs, call.near, call.jacobian = count, near, address(jacobian)
        call.pair_row, call.source = address(pair_row), address(source)
        call.near_row, call.near_anchor = address(near_row), address(anchor)
        self.evaluate(call)
        return w, found, jacobian

    def back(self, cotangent: Array, pair_row: Array) -> Array:
        """cotangent (pairs, w_dim) on w, pair_row (pairs,) its row in the last ``forward`` -> (pairs, z_dim) on z."""
        record, count = self.network.record, len(pair_row)
        cotangent = fitted("the cotangent", cotangent, REAL, count, record.w_dim)
        pair_row = fitted("its rows", pair_row, INTEGER, count)
        jacobian = np.empty((count, record.z_dim), REAL)
        self.evaluate(Call(pairs=count, pair_row=address(pair_row), cotangent=address(cotangent),
                           jacobian=address(jacobian)))
        return jacobian

    def evaluate(self, call: Call) -> None:
        check(self.network.library.lace_evaluate(self.handle, byref(call), self.network.half),
              "an evaluation of the field")


def close(function: Callable[[int], None], handle: int, owner: object) -> None:
    """``owner`` is given so that it lives as long as what the handle stands for."""
    function(handle)


if sys.byteorder != "little":
    raise NotBuilt("the compiled field is for little-endian processors")
