"""What the names inside a checkpoint stand for here: passive records, numpy arrays and plain containers.

``TABLE`` is the whole vocabulary. A handler sees only data that was already read, checks it, and returns
data; none of them imports, calls or looks up anything that the file names.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from engine.errors import CheckpointError

PRIMITIVES = (str, int, float, bool, bytes, type(None))
MAX_DIMENSIONS = 8


@dataclass(frozen=True, slots=True)
class Global:
    """A name of the table, as it lies on the unpickler's stack. ``storage`` is the numpy type of a torch storage."""

    name: str
    make: Callable[["Budget", tuple[Any, ...]], Any] | None = None
    storage: str | None = None


@dataclass(frozen=True, slots=True)
class Module:
    """A pickled torch module of NVIDIA's persistence scheme: its class name and its ``__dict__``."""

    class_name: str
    state: dict


@dataclass(slots=True)
class Network:
    """A pickled network of NVIDIA's TensorFlow code; ``state`` has static_kwargs, components and variables."""

    state: dict = field(default_factory=dict)


@dataclass(slots=True)
class Namespace:
    """An argparse.Namespace."""

    state: dict = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Storage:
    """The memory behind torch tensors. ``data`` is None while only the structure of a file is read."""

    dtype: str
    numel: int
    data: bytes | memoryview | None


@dataclass(slots=True)
class PendingArray:
    """A numpy array between REDUCE and BUILD; the unpickler notes where it was memoised."""

    memo_keys: list[int] = field(default_factory=list)


@dataclass(slots=True)
class PendingDtype:
    """A numpy dtype between REDUCE and BUILD."""

    code: str
    memo_keys: list[int] = field(default_factory=list)


@dataclass(slots=True)
class Budget:
    """How many bytes the handlers may still allocate: a short file must not fill the memory."""

    left: int

    def charge(self, n: int) -> None:
        self.left -= n
        if self.left < 0:
            raise CheckpointError("the checkpoint unpacks to far more data than the file holds; it was refused")


def need(condition: object, what: str) -> None:
    if not condition:
        raise CheckpointError(f"the checkpoint is damaged or was tampered with: {what}; nothing was executed")


def is_a(value: Any, *kinds: type) -> bool:
    """Exactly one of these types, no subclass."""
    return type(value) in kinds


def is_count(value: Any) -> bool:
    return is_a(value, int) and 0 <= value < 2**48


def shape_of(value: Any) -> tuple[int, ...]:
    need(is_a(value, tuple) and len(value) <= MAX_DIMENSIONS and all(map(is_count, value)), "an impossible shape")
    return value


def as_bytes(value: Any) -> bytes:
    # Protocol 2 written by Python 2 has text where bytes are meant.
    if is_a(value, str):
        return value.encode("latin-1")
    need(is_a(value, bytes, bytearray), "bytes were expected")
    return value


# --- torch --------------------------------------------------------------------------------------------------------

STORAGES = {
    "FloatStorage": "<f4", "DoubleStorage": "<f8", "HalfStorage": "<f2", "BFloat16Storage": "bf16",
    "LongStorage": "<i8", "IntStorage": "<i4", "ShortStorage": "<i2", "CharStorage": "<i1", "ByteStorage": "<u1",
    "BoolStorage": "|b1",
}


def itemsize(storage_dtype: str) -> int:
    return 2 if storage_dtype == "bf16" else np.dtype(storage_dtype).itemsize


def rebuild_tensor(budget: Budget, args: tuple[Any, ...]) -> np.ndarray | None:
    """(storage, offset, size, stride, requires_grad, hooks[, metadata]) -> an array of its own."""
    need(len(args) in (6, 7) and is_a(args[0], Storage), "a tensor without a storage")
    storage, offset, size, stride = args[:4]
    size, stride = shape_of(size), shape_of(stride)
    need(is_count(offset) and len(size) == len(stride), "impossible strides of a tensor")
    numel = math.prod(size)
    last = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True)) if numel else -1
    need(numel <= storage.numel and last < storage.numel, "a tensor reaches beyond its storage")
    if storage.data is None:
        return None
    unit = itemsize(storage.dtype)
    need(len(storage.data) == storage.numel * unit, "a storage has the wrong number of bytes")
    dtype = "<u2" if storage.dtype == "bf16" else storage.dtype
    # as_strided checks nothing, so everything was checked above: offset, counts and the last index.
    flat = np.frombuffer(storage.data, dtype=dtype)[offset:]
    view = np.lib.stride_tricks.as_strided(flat, size, tuple(s * unit for s in stride), writeable=False)
    budget.charge(2 * view.nbytes if storage.dtype == "bf16" else view.nbytes)
    if storage.dtype == "bf16":
        return (view.astype("<u4") << 16).view("<f4").reshape(size)
    return np.array(view)


def rebuild_parameter(budget: Budget, args: tuple[Any, ...]) -> object:
    need(len(args) == 3 and (args[0] is None or is_a(args[0], np.ndarray)), "a parameter without a tensor")
    return args[0]


def reconstruct_module(budget: Budget, args: tuple[Any, ...]) -> Module:
    need(len(args) == 1 and is_a(args[0], dict), "a module without its record")
    meta = args[0]
    need(meta.get("type") == "class", f"a module of type {meta.get('type')!r:.40}")
    # The reference insists on version 6. Versions 1-5 never left NVIDIA; a later one keeps `state` or fails below.
    need(is_count(meta.get("version")) and meta["version"] >= 6, "a module record of an unknown version")
    need(is_a(meta.get("class_name"), str) and is_a(meta.get("state"), dict), "a module without class or state")
    return Module(meta["class_name"], meta["state"])


# --- numpy --------------------------------------------------------------------------------------------------------


def numpy_dtype(budget: Budget, args: tuple[Any, ...]) -> PendingDtype:
    need(args and is_a(args[0], str), "a numpy dtype without a name")
    # Objects, records, strings and dates have no place in a generator, and objects would hide further pickles.
    need(re.fullmatch(r"[<>=|]?(b1|[iu][1248]|f[248])", args[0]), f"the numpy dtype {args[0]!r:.40}")
    return PendingDtype(args[0].lstrip("<>=|"))


def build_dtype(pending: PendingDtype, state: Any) -> np.dtype:
    need(is_a(state, tuple) and len(state) in (8, 9) and state[1] in ("<", ">", "|", "="), "a numpy dtype's state")
    need(state[2:5] == (None, None, None), "a structured numpy dtype")
    return np.dtype(pending.code).newbyteorder(state[1])


def to_dtype(value: Any) -> np.dtype:
    need(isinstance(value, np.dtype) and value.kind in "biuf", "a numpy dtype was expected")
    return value


def numpy_scalar(budget: Budget, args: tuple[Any, ...]) -> object:
    need(len(args) == 2, "a numpy scalar")
    dtype, data = to_dtype(args[0]), as_bytes(args[1])
    need(len(data) == dtype.itemsize, "a numpy scalar of the wrong length")
    return np.frombuffer(data, dtype=dtype)[0]


def numpy_array(budget: Budget, dtype: Any, shape: Any, data: Any, order: Any) -> np.ndarray:
    dtype, shape, data = to_dtype(dtype), shape_of(shape), as_bytes(data)
    need(math.prod(shape) * dtype.itemsize == len(data), "a numpy array whose shape does not fit its bytes")
    budget.charge(len(data))
    array = np.frombuffer(data, dtype=dtype).reshape(shape, order=order)
    return np.array(array, dtype=dtype.newbyteorder("="), order="C")


def numpy_reconstruct(budget: Budget, args: tuple[Any, ...]) -> PendingArray:
    # The shape given here is a stand-in; the real one comes with BUILD and is checked there.
    need(len(args) == 3 and is_a(args[0], Global) and args[0].name == "numpy.ndarray", "a numpy array's class")
    return PendingArray()


def build_array(budget: Budget, state: Any) -> np.ndarray:
    need(is_a(state, tuple) and len(state) == 5 and state[0] == 1, "a numpy array's state")
    _, shape, dtype, is_fortran, data = state
    return numpy_array(budget, dtype, shape, data, "F" if is_fortran else "C")


def numpy_frombuffer(budget: Budget, args: tuple[Any, ...]) -> np.ndarray:
    """Protocol 5: (buffer, dtype, shape, order[, axes]); order 'K' with axes since numpy 2.3."""
    need(len(args) in (4, 5) and is_a(args[3], str), "a numpy array's buffer")
    axes = args[4] if len(args) == 5 else None
    if axes is None:
        need(args[3] in ("C", "F"), "a numpy array's order")
        return numpy_array(budget, args[1], args[2], args[0], args[3])
    need(sorted(shape_of(axes)) == list(range(len(shape_of(args[2])))), "a numpy array's axes")
    return np.ascontiguousarray(numpy_array(budget, args[1], args[2], args[0], "C").transpose(axes))


# --- containers and small things ----------------------------------------------------------------------------------


def ordered_dict(budget: Budget, args: tuple[Any, ...]) -> dict:
    if not args:
        return {}
    need(len(args) == 1 and is_a(args[0], list), "an OrderedDict's items")
    items = [pair for pair in args[0] if is_a(pair, list, tuple) and len(pair) == 2]
    need(len(items) == len(args[0]) and all(is_a(k, *PRIMITIVES) for k, _ in items), "an OrderedDict's items")
    budget.charge(64 * len(items))
    return dict(items)


def empty(kind: Callable[[], Any]) -> Callable[[Budget, tuple[Any, ...]], Any]:
    def make(budget: Budget, args: tuple[Any, ...]) -> Any:
        need(args == (), "arguments where none belong")
        return kind()

    return make


def plain_set(budget: Budget, args: tuple[Any, ...]) -> set:
    need(len(args) == 1 and is_a(args[0], list) and all(is_a(v, *PRIMITIVES) for v in args[0]), "a set's items")
    budget.charge(64 * len(args[0]))
    return set(args[0])


def latin1(budget: Budget, args: tuple[Any, ...]) -> bytes:
    need(len(args) == 2 and is_a(args[0], str) and args[1] in ("latin1", "latin-1"), "an encoding other than latin-1")
    budget.charge(len(args[0]))
    return args[0].encode("latin-1")


def vocabulary() -> dict[tuple[str, str], Global]:
    handlers = {
        "torch_utils.persistence._reconstruct_persistent_obj": reconstruct_module,
        "dnnlib.tflib.network.Network": empty(Network),
        "dnnlib.util.EasyDict": empty(dict),
        "argparse.Namespace": empty(Namespace),
        "collections.OrderedDict": ordered_dict,
        "builtins.set": plain_set,
        "__builtin__.set": plain_set,
        "__builtin__.bytes": empty(bytes),
        "_codecs.encode": latin1,
        "torch._utils._rebuild_parameter": rebuild_parameter,
        "torch._utils._rebuild_tensor_v2": rebuild_tensor,
        "numpy.dtype": numpy_dtype,
        "numpy.ndarray": None,
    }
    for core in ("numpy.core", "numpy._core"):
        handlers[f"{core}.multiarray.scalar"] = numpy_scalar
        handlers[f"{core}.multiarray._reconstruct"] = numpy_reconstruct
        handlers[f"{core}.numeric._frombuffer"] = numpy_frombuffer
    table = {}
    for name, make in handlers.items():
        module, _, attribute = name.rpartition(".")
        table[module, attribute] = Global(name, make)
    for name, dtype in STORAGES.items():
        table["torch", name] = Global(f"torch.{name}", None, dtype)
    return table


TABLE = vocabulary()
