"""Arrays on the device that torch, cupy and others share with us without a copy, by DLPack.

https://dmlc.github.io/dlpack/latest/c_api.html (the layout of version 0.8, which all of them still accept), and
https://dmlc.github.io/dlpack/latest/python_spec.html (who waits for whose stream).
"""

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np

from engine.cuda.driver import Block, Device
from engine.errors import RequestError

CODES = {"i": 0, "u": 1, "f": 2}


class DLTensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32), ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)), ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    ]


class Managed(ctypes.Structure):
    pass


Deleter = ctypes.CFUNCTYPE(None, ctypes.POINTER(Managed))
Managed._fields_ = [("tensor", DLTensor), ("context", ctypes.c_void_p), ("deleter", Deleter)]
Destructor = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


def function(name: str, result: Any, *arguments: Any) -> Any:
    return ctypes.PYFUNCTYPE(result, *arguments)((name, ctypes.pythonapi))


new_capsule = function("PyCapsule_New", ctypes.py_object, ctypes.c_void_p, ctypes.c_char_p, Destructor)
# A capsule goes by its address: in its destructor it must not be counted as an object again.
is_valid = function("PyCapsule_IsValid", ctypes.c_int, ctypes.c_void_p, ctypes.c_char_p)
pointer = function("PyCapsule_GetPointer", ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p)
rename = function("PyCapsule_SetName", ctypes.c_int, ctypes.c_void_p, ctypes.c_char_p)
NAME, USED = b"dltensor", b"used_dltensor"
# What others still hold: the tensor and the owner of its memory, by the address of the structure that they have.
lent: dict[int, tuple] = {}


@Deleter
def give_back(managed: Any) -> None:
    lent.pop(ctypes.addressof(managed.contents), None)


@Destructor
def drop(capsule: int) -> None:
    """Free the tensor of a capsule that no consumer took (a consumer renames the capsule)."""
    if is_valid(capsule, NAME):
        lent.pop(pointer(capsule, NAME), None)


class DeviceArray:
    """``shape`` elements of ``dtype`` in C order at ``address``, in memory that ``owner`` keeps.

    torch.from_dlpack(array) and cupy.from_dlpack(array) give a view of the same memory.
    """

    def __init__(self, device: Device, address: int, shape: Sequence[int], dtype: np.dtype | type, owner: Any):
        self.device, self.address, self.shape = device, address, tuple(shape)
        self.dtype, self.owner = np.dtype(dtype), owner

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape)) * self.dtype.itemsize

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.device.kind, self.device.ordinal

    def __dlpack__(self, *, stream: int | None = None, max_version=None, dl_device=None, copy: bool | None = None):
        """A capsule. Our work is finished when it is made, so no stream of the taker has to wait."""
        if copy:
            raise BufferError("this array shares its memory: copy it on the taker's side")
        self.device.activate()
        self.device.synchronize()
        shape = (ctypes.c_int64 * len(self.shape))(*self.shape)
        managed = Managed(deleter=give_back)
        managed.tensor = DLTensor(
            self.address, *self.__dlpack_device__(), len(self.shape), CODES[self.dtype.kind],
            8 * self.dtype.itemsize, 1, ctypes.cast(shape, ctypes.POINTER(ctypes.c_int64)), None, 0,
        )
        address = ctypes.addressof(managed)
        lent[address] = managed, shape, self
        return new_capsule(address, NAME, drop)

    def __repr__(self) -> str:
        return f"DeviceArray(shape={self.shape}, dtype={self.dtype}, cuda:{self.device.ordinal})"


def empty(device: Device, shape: Sequence[int], dtype: np.dtype | type) -> DeviceArray:
    block: Block = device.allocate(int(np.prod(shape)) * np.dtype(dtype).itemsize)
    return DeviceArray(device, block.address, shape, dtype, block)


class Borrowed:
    """A tensor of another library, released with the last reference to this object."""

    def __init__(self, capsule: Any):
        self.managed = Managed.from_address(pointer(id(capsule), NAME))
        rename(id(capsule), USED)

    def __del__(self):
        if self.managed.deleter:
            self.managed.deleter(ctypes.byref(self.managed))


def borrow(device: Device, tensor: Any, width: int, name: str) -> DeviceArray:
    """A view of a tensor (rows, width) float32 of torch, cupy or another that speaks DLPack.

    Raises RequestError if it is elsewhere, or has another shape, type or order of its elements.
    """
    kind, ordinal = (int(part) for part in tensor.__dlpack_device__())
    if (kind, ordinal) != (device.kind, device.ordinal):
        raise RequestError(f"{name} is on another device than cuda:{device.ordinal}: move it there, or give numpy")
    # The owner makes our stream wait for what it has yet to write.
    owner = Borrowed(tensor.__dlpack__(**({"stream": device.stream} if kind == 2 else {})))
    found: DLTensor = owner.managed.tensor
    shape = tuple(found.shape[i] for i in range(found.ndim))
    strides = tuple(found.strides[i] for i in range(found.ndim)) if found.strides else None
    is_float = (found.code, found.bits, found.lanes) == (CODES["f"], 32, 1)
    if not is_float or len(shape) != 2 or shape[1] != width or (strides not in (None, (width, 1)) and shape[0] > 1):
        raise RequestError(f"{name} has shape {shape}: expected (rows, {width}) float32 in C order")
    return DeviceArray(device, (found.data or 0) + found.byte_offset, shape, np.float32, owner)
