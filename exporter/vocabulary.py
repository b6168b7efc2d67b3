"""The names inside a checkpoint that stand for something here: numpy arrays, plain containers and passive records.

``TABLE`` is the whole vocabulary. A handler sees only data that was already read, checks it, and returns
data; none of them imports, calls or looks up anything that the file names. A name outside the table stands for a
``Foreign`` record, which keeps its name and its state and does nothing.
"""

import math
import re
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from exporter.passive import (
    PRIMITIVES,
    Budget,
    Foreign,
    Global,
    Module,
    Namespace,
    Network,
    PendingArray,
    PendingDtype,
    Storage,
    is_a,
    is_count,
    need,
)

MAX_DIMENSIONS = 8


def shape_of(value: Any) -> tuple[int, ...]:
    need(is_a(value, tuple) and len(value) <= MAX_DIMENSIONS and all(map(is_count, value)), "an impossible shape")
    return value


def as_bytes(budget: Budget, value: Any) -> bytes:
    # Protocol 2 written by Python 2 has text where bytes are meant.
    if is_a(value, str):
        budget.charge(len(value))
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


def rebuild_tensor(budget: Budget, args: tuple[Any, ...]) -> np.ndarray | Foreign | None:
    """(storage, offset, size, stride, requires_grad, hooks[, metadata]) -> an array of its own."""
    if args and is_a(args[0], Foreign):
        return Foreign("torch.Tensor")  # of a type that numpy does not have: quantised, complex, float8
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
    budget.charge(128 + (2 * view.nbytes if storage.dtype == "bf16" else view.nbytes))
    if storage.dtype == "bf16":
        return (view.astype("<u4") << 16).view("<f4").reshape(size)
    return np.array(view)


def rebuild_parameter(budget: Budget, args: tuple[Any, ...]) -> object:
    need(len(args) == 3 and (args[0] is None or is_a(args[0], np.ndarray, Foreign)), "a parameter without a tensor")
    return args[0]


def reconstruct_module(budget: Budget, args: tuple[Any, ...]) -> Module:
    need(len(args) == 1 and is_a(args[0], dict), "a module without its record")
    meta = args[0]
    need(meta.get("type") == "class", "a module record that is not one of a class")
    # The reference insists on version 6. Versions 1-5 never left NVIDIA; a later one keeps `state` or fails below.
    need(is_count(meta.get("version")) and meta["version"] >= 6, "a module record of an unknown version")
    need(is_a(meta.get("class_name"), str) and is_a(meta.get("state"), dict), "a module without class or state")
    return Module(meta["class_name"], meta["state"])


# --- numpy --------------------------------------------------------------------------------------------------------


def numpy_dtype(budget: Budget, args: tuple[Any, ...]) -> PendingDtype | Foreign:
    need(args and is_a(args[0], str), "a numpy dtype without a name")
    # Arrays of objects, records, strings and dates have no place in a generator: they stay inert.
    if not re.fullmatch(r"[<>=|]?(b1|[iu][1248]|f[248])", args[0]):
        return Foreign("numpy.dtype")
    return PendingDtype(args[0].lstrip("<>=|"))


def build_dtype(pending: PendingDtype, state: Any) -> np.dtype:
    need(is_a(state, tuple) and len(state) in (8, 9) and state[1] in ("<", ">", "|", "="), "a numpy dtype's state")
    need(state[2:5] == (None, None, None), "a structured numpy dtype")
    return np.dtype(pending.code).newbyteorder(state[1])


def to_dtype(value: Any) -> np.dtype | None:
    """None for a type of other things than numbers."""
    if is_a(value, Foreign):
        return None
    need(isinstance(value, np.dtype) and value.kind in "biuf", "a numpy dtype was expected")
    return value


def numpy_scalar(budget: Budget, args: tuple[Any, ...]) -> object:
    need(len(args) == 2, "a numpy scalar")
    dtype = to_dtype(args[0])
    if dtype is None:
        return Foreign("numpy.generic")
    data = as_bytes(budget, args[1])
    need(len(data) == dtype.itemsize, "a numpy scalar of the wrong length")
    return np.frombuffer(data, dtype=dtype)[0]


def numpy_array(budget: Budget, dtype: Any, shape: Any, data: Any, order: Any) -> np.ndarray | Foreign:
    dtype, shape = to_dtype(dtype), shape_of(shape)
    if dtype is None:
        return Foreign("numpy.ndarray")
    data = as_bytes(budget, data)
    need(math.prod(shape) * dtype.itemsize == len(data), "a numpy array whose shape does not fit its bytes")
    budget.charge(len(data))
    array = np.frombuffer(data, dtype=dtype).reshape(shape, order=order)
    return np.array(array, dtype=dtype.newbyteorder("="), order="C")


def numpy_reconstruct(budget: Budget, args: tuple[Any, ...]) -> PendingArray:
    # The shape given here is a stand-in; the real one comes with BUILD and is checked there.
    need(len(args) == 3 and is_a(args[0], Global) and args[0].name == "numpy.ndarray", "a numpy array's class")
    return PendingArray()


def build_array(budget: Budget, state: Any) -> np.ndarray | Foreign:
    need(is_a(state, tuple) and len(state) == 5 and state[0] == 1, "a numpy array's state")
    _, shape, dtype, is_fortran, data = state
    return numpy_array(budget, dtype, shape, data, "F" if is_fortran else "C")


def numpy_frombuffer(budget: Budget, args: tuple[Any, ...]) -> np.ndarray | Foreign:
    """Protocol 5: (buffer, dtype, shape, order[, axes]); order 'K' with axes since numpy 2.3."""
    need(len(args) in (4, 5) and is_a(args[3], str), "a numpy array's buffer")
    axes = args[4] if len(args) == 5 else None
    if axes is None:
        need(args[3] in ("C", "F"), "a numpy array's order")
        return numpy_array(budget, args[1], args[2], args[0], args[3])
    need(sorted(shape_of(axes)) == list(range(len(shape_of(args[2])))), "a numpy array's axes")
    array = numpy_array(budget, args[1], args[2], args[0], "C")
    return array if is_a(array, Foreign) else np.ascontiguousarray(array.transpose(axes))  # type: ignore[union-attr]


# --- containers and small things ----------------------------------------------------------------------------------


def ordered_dict(budget: Budget, args: tuple[Any, ...]) -> dict:
    if not args:
        return {}
    need(len(args) == 1 and is_a(args[0], list), "an OrderedDict's items")
    budget.spend(len(args[0]))
    need(all(is_a(pair, list, tuple) and len(pair) == 2 for pair in args[0]), "an OrderedDict's items")
    return plain_dict(budget, args[0])


def plain_dict(budget: Budget, pairs: Iterable[Any]) -> dict:
    """The pairs whose keys are text or numbers; of what has other keys, nothing here could make use."""
    kept = [(key, value) for key, value in pairs if is_a(key, *PRIMITIVES)]
    budget.admit(key for key, _ in kept)
    budget.charge(64 * len(kept))
    return dict(kept)


def counter(budget: Budget, args: tuple[Any, ...]) -> dict:
    need(len(args) <= 1 and (not args or is_a(args[0], dict)), "a Counter's counts")
    budget.spend(len(args[0]) if args else 0)
    return dict(args[0]) if args else {}


def default_dict(budget: Budget, args: tuple[Any, ...]) -> dict:
    need(len(args) <= 1, "a defaultdict's items")  # they follow as SETITEMS; what it makes by default is not needed
    return {}


def empty(kind: Callable[[], Any]) -> Callable[[Budget, tuple[Any, ...]], Any]:
    def make(budget: Budget, args: tuple[Any, ...]) -> Any:
        need(args == (), "arguments where none belong")
        return kind()

    return make


def plain_set(budget: Budget, args: tuple[Any, ...]) -> set:
    need(len(args) <= 1 and all(is_a(items, list, tuple) for items in args), "a set's items")
    return items_of_set(budget, args[0] if args else ())


def items_of_set(budget: Budget, items: Iterable[Any]) -> set:
    """Those that are text or numbers."""
    items = list(items)
    budget.spend(len(items))
    kept = [item for item in items if is_a(item, *PRIMITIVES)]
    budget.admit(kept)
    budget.charge(64 * len(kept))
    return set(kept)


def plain_list(budget: Budget, args: tuple[Any, ...]) -> list:
    """A deque, which is written as its items and its bound."""
    need(len(args) <= 2 and (not args or is_a(args[0], list, tuple)), "a deque's items")
    budget.spend(len(args[0]) if args else 0)
    return list(args[0]) if args else []


def path_text(budget: Budget, args: tuple[Any, ...]) -> str:
    """A pathlib path as text."""
    need(all(is_a(part, str) for part in args), "the parts of a path")
    budget.spend(len(args))
    budget.charge(sum(map(len, args)))
    return "/".join(args).replace("//", "/")


def size_tuple(budget: Budget, args: tuple[Any, ...]) -> tuple[int, ...]:
    need(len(args) <= 1, "a torch.Size")
    return shape_of(args[0] if args else ())


def device_text(budget: Budget, args: tuple[Any, ...]) -> str:
    is_device = 1 <= len(args) <= 2 and is_a(args[0], str) and all(is_count(n) for n in args[1:])
    need(is_device and len(args[0]) <= 40, "a torch.device")
    return ":".join(str(part) for part in args)


def latin1(budget: Budget, args: tuple[Any, ...]) -> bytes:
    need(len(args) == 2 and is_a(args[0], str) and args[1] in ("latin1", "latin-1"), "an encoding other than latin-1")
    budget.charge(len(args[0]))
    return args[0].encode("latin-1")


TORCH_TYPES = ("float16", "float32", "float64", "bfloat16", "int8", "int16", "int32", "int64", "uint8", "bool")
PATHS = ("Path", "PosixPath", "WindowsPath", "PurePath", "PurePosixPath", "PureWindowsPath")


def vocabulary() -> dict[tuple[str, str], Global]:
    handlers = {
        "torch_utils.persistence._reconstruct_persistent_obj": reconstruct_module,
        "dnnlib.tflib.network.Network": empty(Network),
        "dnnlib.util.EasyDict": empty(dict),
        "easydict.EasyDict": empty(dict),
        "argparse.Namespace": empty(Namespace),
        "collections.OrderedDict": ordered_dict,
        "collections.defaultdict": default_dict,
        "collections.Counter": counter,
        "collections.deque": plain_list,
        "builtins.set": plain_set,
        "builtins.frozenset": plain_set,
        "__builtin__.set": plain_set,
        "__builtin__.frozenset": plain_set,
        "__builtin__.bytes": empty(bytes),
        "_codecs.encode": latin1,
        "torch._utils._rebuild_parameter": rebuild_parameter,
        "torch._utils._rebuild_tensor_v2": rebuild_tensor,
        "torch.Size": size_tuple,
        "torch.device": device_text,
        "numpy.dtype": numpy_dtype,
        "numpy.ndarray": None,
        **{f"torch.{name}": None for name in TORCH_TYPES},
        **{f"{home}.{name}": path_text for home in ("pathlib", "pathlib._local") for name in PATHS},
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
