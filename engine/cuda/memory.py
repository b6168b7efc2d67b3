"""Named arrays in one block of device memory, and their mirror on the host."""

from collections.abc import Mapping

import numpy as np
from numpy import ndarray as Array

from engine.cuda.driver import Block, Device, Pinned

ALIGNMENT = 256
# name: (shape, dtype)
Fields = Mapping[str, tuple[tuple[int, ...], np.dtype | type]]


class Region:
    """``fields`` side by side, each at a multiple of 256 bytes, so that one copy moves them all.

    host           {name: array} in page-locked memory, if ``mirrored``
    region[x]      device address of the array x
    nbytes         {name: bytes}
    """

    def __init__(self, device: Device, fields: Fields, *, mirrored: bool = False):
        self.device, self.fields = device, dict(fields)
        self.nbytes = {name: int(np.prod(shape)) * np.dtype(dtype).itemsize for name, (shape, dtype) in fields.items()}
        self.offsets: dict[str, int] = {}
        nbytes = 0
        for name, size in self.nbytes.items():
            self.offsets[name] = nbytes
            nbytes += -(-size // ALIGNMENT) * ALIGNMENT
        self.block: Block = device.allocate(nbytes)
        device.fill(self.block.address, self.block.nbytes)
        self.host: dict[str, Array] = {}
        if mirrored:
            self.mirror = Pinned(device, nbytes)
            self.mirror.bytes[:] = 0
            for name, (shape, dtype) in fields.items():
                first = self.offsets[name]
                part = self.mirror.bytes[first : first + self.nbytes[name]]
                self.host[name] = part.view(dtype).reshape(shape)

    def __getitem__(self, name: str) -> int:
        return self.block.address + self.offsets[name]

    def read(self, name: str) -> Array:
        """A copy of an array, after all that is on the stream."""
        shape, dtype = self.fields[name]
        array = np.empty(shape, dtype)
        self.device.download(array, self[name])
        self.device.synchronize()
        return array

    def write(self, name: str, array: Array) -> None:
        self.device.upload(self[name], np.ascontiguousarray(array, self.fields[name][1]))
        self.device.synchronize()

    def upload(self, end: str | None = None) -> None:
        """The mirror, or what lies in front of the array ``end``."""
        self.device.upload(self.block.address, self.mirror.bytes[: None if end is None else self.offsets[end]])

    def download(self) -> None:
        """Into the mirror, which holds it after ``synchronize``."""
        self.device.download(self.mirror.bytes, self.block.address)
