"""Decoding on a GPU, whoever does it: the memory of a decoder, and pictures in calls of the sizes that it takes."""

import ctypes
import math
from collections.abc import Callable, Mapping
from functools import cached_property
from threading import Lock
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy import ndarray as Array

from engine.bundle import Bundle
from engine.errors import BackendError
from engine.runtimes import Drawing

if TYPE_CHECKING:
    from engine.cuda.driver import Block, Device

# Fewest, preferred and most rows of a call. More than 8 megapixels keep a GPU no busier, and cost gigabytes.
ROWS = (1, 4, 8)
IMAGE = "image"


class Decoder(Protocol):
    """The synthesis on a GPU: reads and writes memory of fixed addresses, in the order of the device's stream.

    rows        numbers of rows that a call may have, the largest first
    addresses   of "ws" (rows[0], num_ws, w_dim), of the noise inputs and of "image" (rows[0], channels, R, R), float32
    """

    name: str
    version: str
    precision: str
    rows: tuple[int, ...]
    addresses: dict[str, int]

    def enqueue(self, rows: int) -> None:
        """Decode the first ``rows`` rows. It does not wait for the device, except in the first call of each size,
        which prepares and captures a graph. It cannot itself be captured."""
        ...


def sizes(fewest: int, most: int) -> tuple[int, ...]:
    """Numbers of rows between the two, falling: ``most``, powers of two, ``fewest``.

    Each gets a graph of its own, so there are few of them, and any number of pictures is a sum of few calls.
    """
    powers = (2**k for k in range(most.bit_length()))
    return tuple(sorted({fewest, most, *(n for n in powers if fewest < n < most)}, reverse=True))


def noise_sides(bundle: Bundle) -> dict[str, int]:
    """The synthesis' noise inputs and their sides in pixels, from the manifest."""
    graph = bundle.manifest.graphs.get("synthesis", {})
    return {name: shape[-1] for name, shape in graph.get("noises", {}).items()}


def row_shapes(bundle: Bundle) -> dict[str, tuple[int, ...]]:
    """One row of every input and of the image."""
    g = bundle.generator
    noises = {name: (1, side, side) for name, side in noise_sides(bundle).items()}
    return {"ws": (g.num_ws, g.w_dim), **noises, IMAGE: (g.img_channels, g.resolution, g.resolution)}


def pictures_in(bundle: Bundle, precision: str | None) -> str | None:
    """What a precision that was chosen for a solve means for the pictures: TF32, where their graph is float32."""
    return precision if precision == "tf32" and picture_precision(bundle, None) == "fp32" else None


def picture_precision(bundle: Bundle, wanted: str | None) -> str:
    """That of the graph's types; 'tf32' where it was asked for, which only float32 graphs can follow."""
    typed = bundle.manifest.graphs.get("synthesis", {}).get("precision", "fp32")
    if wanted == "tf32" and typed != "fp32":
        raise BackendError(f"precision 'tf32': the synthesis of {bundle.path} is typed {typed}: leave precision out")
    return wanted or typed


class Buffers:
    """Device memory for ``rows`` rows of every input and of the image."""

    def __init__(self, bundle: Bundle, device: "Device", rows: int):
        self.shapes = row_shapes(bundle)
        self.blocks = {name: device.allocate(4 * rows * math.prod(shape)) for name, shape in self.shapes.items()}
        self.addresses = {name: block.address for name, block in self.blocks.items()}


class Pictures(Drawing):
    """Pictures by a decoder on a GPU, which is made at the first one.

    kernel   pixels_f32 of kernels/pixels.cuh, compiled, and the threads of its blocks: then pictures are rounded there
    """

    def __init__(self, bundle: Bundle, device: "Device", make: Callable[["Device"], Decoder],
                 kernel: tuple[Any, int] | None = None, *, name: str, version: str, precision: str):
        self.name, self.version, self.precision = name, version, precision
        self.bundle, self.device, self.make, self.kernel = bundle, device, make, kernel
        # The decoder's memory serves one call at a time.
        self.lock = Lock()

    @cached_property
    def decoder(self) -> Decoder:
        return self.make(self.device)

    @cached_property
    def bytes(self) -> "Block":
        """Device memory for the pixels of the largest call."""
        return self.device.allocate(self.decoder.rows[0] * math.prod(row_shapes(self.bundle)[IMAGE]))

    def noise_inputs(self) -> dict[str, int]:
        return noise_sides(self.bundle)

    def on_device(self) -> "Pictures":
        return self

    def close(self) -> None:
        self.device.close()

    def synthesize(self, ws: Array, noises: Mapping[str, Array] | None = None) -> Array:
        """See engine.runtimes.Drawing.synthesize."""
        images = np.empty((len(ws), *row_shapes(self.bundle)[IMAGE]), np.float32)
        self.decode(ws, noises, lambda part: self.device.download(images[part], self.decoder.addresses[IMAGE]))
        return images

    def pixels(self, ws: Array, noises: Mapping[str, Array] | None = None) -> Array:
        """Bit for bit ``to_pixels`` of ``synthesize``.

        With a kernel they are rounded on the device, which spares the host that work and three quarters of the copy.
        """
        if self.kernel is None:
            return super().pixels(ws, noises)
        channels, *sides = row_shapes(self.bundle)[IMAGE]
        pictures = np.empty((len(ws), *sides, channels), np.uint8)

        def fetch(part: slice) -> None:
            self.round(len(pictures[part]), channels, math.prod(sides))
            self.device.download(pictures[part], self.bytes.address)

        self.decode(ws, noises, fetch)
        return pictures

    def round(self, rows: int, channels: int, area: int) -> None:
        from engine.cuda.driver import Launch

        assert self.kernel is not None, "pixels needs its kernel"
        kernel, threads = self.kernel
        arguments = (ctypes.c_void_p(self.decoder.addresses[IMAGE]), ctypes.c_void_p(self.bytes.address),
                     ctypes.c_int(rows), ctypes.c_int(channels), ctypes.c_int(area))
        self.device.launch(Launch("pixels_f32", kernel, (-(-rows * area // threads),), threads, arguments))

    def decode(self, ws: Array, noises: Mapping[str, Array] | None, fetch: Callable[[slice], None]) -> None:
        """Decode in calls of the decoder's sizes; ``fetch`` puts the copy of a call's rows on the stream."""
        given = {"ws": ws, **(noises or {})}
        with self.lock:
            self.device.activate()
            first = 0
            while first < len(ws):
                left = len(ws) - first
                # A decoder of one fixed size also decodes rows that nobody asked for: what lies there from before.
                rows = next((n for n in self.decoder.rows if n <= left), self.decoder.rows[-1])
                part = slice(first, first + min(rows, left))
                self.upload({name: array[part] for name, array in given.items()}, min(rows, left))
                self.decoder.enqueue(rows)
                fetch(part)
                first += rows
            self.device.synchronize()

    def upload(self, given: Mapping[str, Array], rows: int) -> None:
        """Inputs of one call. (Ordinary memory is read before this returns, so copies of it may go.)"""
        for name, shape in row_shapes(self.bundle).items():
            if name != IMAGE:
                source = given[name] if name in given else np.zeros((rows, *shape), np.float32)
                self.device.upload(self.decoder.addresses[name], np.ascontiguousarray(source, np.float32))
