"""The memory of the simulated driver: blocks at host addresses, and copies that run when their stream comes to them."""

import ctypes
from bisect import bisect_right, insort
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from cuda.bindings import driver as real

POISON = 0xFF  # NaN in every floating-point type, -1 in every integer
Code = real.CUresult


class Violation(AssertionError):
    """The driver was used in a way that a GPU would punish, or worse, would not."""


@dataclass(slots=True)
class Memory:
    """An allocation; its bytes outlive it, as poison, so that a late access hits nothing else."""

    bytes: np.ndarray
    address: int
    pinned: bool
    is_live: bool = True


def viewed(address: int, nbytes: int) -> np.ndarray:
    """Host bytes at an address."""
    return np.frombuffer((ctypes.c_uint8 * nbytes).from_address(int(address)), np.uint8)


class FakeMemory:
    """The memory of a driver. The driver itself (fake_cuda.py) says what ``add`` to a stream and ``drain`` do."""

    def __init__(self):
        self.memory: list[Memory] = []

    def add(self, stream: Any, kind: str, run: Callable[[], None], name: str = "") -> tuple:
        raise NotImplementedError

    def drain(self) -> None:
        raise NotImplementedError

    def block(self, address: int, nbytes: int = 1) -> Memory:
        """The live memory that holds these bytes."""
        memory = self.around(address)
        if memory is None or address + nbytes > memory.address + len(memory.bytes):
            raise Violation(f"{nbytes} bytes at {address:#x} were never allocated, or run over the end of a block")
        if not memory.is_live:
            raise Violation(f"{nbytes} bytes at {address:#x} were freed")
        return memory

    def around(self, address: int) -> Memory | None:
        """The memory, live or not, that holds this byte."""
        place = bisect_right(self.memory, address, key=lambda memory: memory.address) - 1
        memory = self.memory[place] if place >= 0 else None
        return memory if memory and address < memory.address + len(memory.bytes) else None

    def allocated(self, nbytes: int, pinned: bool) -> Memory:
        if nbytes <= 0:
            raise Violation(f"{nbytes} bytes cannot be allocated")
        whole = np.full(nbytes + 256, POISON, np.uint8)
        aligned = whole[-whole.ctypes.data % 256 :][:nbytes]
        memory = Memory(aligned, aligned.ctypes.data, pinned)
        insort(self.memory, memory, key=lambda memory: memory.address)
        return memory

    def freed(self, address: int, pinned: bool):
        memory = self.block(int(address))
        if memory.address != int(address) or memory.pinned != pinned:
            raise Violation("this is not the address, or the kind of memory, that was allocated")
        self.drain()  # freeing waits for the device
        memory.is_live = False
        memory.bytes[:] = POISON
        return (Code.CUDA_SUCCESS,)

    def cuMemAlloc(self, nbytes: int):
        return Code.CUDA_SUCCESS, real.CUdeviceptr(self.allocated(nbytes, pinned=False).address)

    def cuMemFree(self, address):
        return self.freed(address, pinned=False)

    def cuMemHostAlloc(self, nbytes: int, flags: int):
        return Code.CUDA_SUCCESS, self.allocated(nbytes, pinned=True).address

    def cuMemFreeHost(self, address):
        return self.freed(address, pinned=True)

    def cuMemcpyHtoDAsync(self, target, source, nbytes, stream):
        self.on_device(target, nbytes)
        memory = self.around(source)
        if memory is None or not memory.pinned:
            copy = np.array(viewed(source, nbytes))  # ordinary memory is copied before the call returns
            return self.add(stream, "memcpy", lambda: self.copied(target, copy.ctypes.data, nbytes))
        return self.add(stream, "memcpy", lambda: self.copied(target, source, nbytes))

    def cuMemcpyDtoHAsync(self, target, source, nbytes, stream):
        self.on_device(source, nbytes)
        viewed(target, nbytes)[:] = POISON
        return self.add(stream, "memcpy", lambda: self.copied(target, source, nbytes))

    def cuMemcpyDtoDAsync(self, target, source, nbytes, stream):
        self.on_device(target, nbytes)
        return self.add(stream, "memcpy", lambda: self.copied(target, source, nbytes))

    def cuMemcpy2DAsync(self, copy, stream):
        pairs = [(int(copy.dstDevice) + i * copy.dstPitch, int(copy.srcDevice) + i * copy.srcPitch)
                 for i in range(copy.Height)]
        if copy.WidthInBytes > min(copy.srcPitch, copy.dstPitch):
            raise Violation("rows of a copy overlap")

        def run() -> None:
            for target, source in pairs:
                self.copied(target, source, copy.WidthInBytes)

        return self.add(stream, "memcpy", run)

    def cuMemsetD8Async(self, target, byte, nbytes, stream):
        self.on_device(target, nbytes)

        def run() -> None:
            self.on_device(target, nbytes)
            viewed(target, nbytes)[:] = byte

        return self.add(stream, "memset", run)

    def on_device(self, address: int, nbytes: int) -> None:
        if self.block(int(address), nbytes).pinned:
            raise Violation(f"{address:#x} is host memory: a copy expected a device address")

    def copied(self, target: int, source: int, nbytes: int) -> None:
        for address in (target, source):
            if self.around(address):  # else it is ordinary memory, or somebody else's
                self.block(address, nbytes)
        viewed(target, nbytes)[:] = viewed(source, nbytes)
