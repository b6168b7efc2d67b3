"""One evaluation of the flow for all rows of a batch: its memory, its launches, and what changes from solve to solve.

The launches are those of kernels/*.cuh, in order: normalise, a dense kernel for every level of the mapping and of the
heads, tape, the heads' levels backwards, cotangents, the mapping's levels backwards, pullback. They hold nothing but
addresses of structs, so that another condition is other contents of the structs and no other graph.
"""

import ctypes
import logging
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from engine.cuda.compile import SOURCE_OF, TILES, WGMMA, has_wgmma
from engine.cuda.driver import Device, Launch
from engine.cuda.memory import Region
from engine.cuda.network import Network, Stack
from engine.cuda.tables import Shape, Tables
from engine.errors import BackendError
from engine.layout import padded

log = logging.getLogger(__name__)
REAL, INT, DOUBLE = np.dtype(np.float32), np.dtype(np.int32), np.dtype(np.float64)
# Rows that share weights, up to which a dense kernel is used; where there is wgmma, more take its kernel.
DENSE = ((16, "dense_16x8"), (64, "dense_32x16"), (256, "dense_64x32"))


class Kernels:
    """The compiled kernels of one precision. ``build`` is engine.cuda.compile.build, or what stands in for it.

    overlaps   a kernel may start before its predecessor has ended; it waits itself for what it reads
    """

    def __init__(self, device: Device, precision: str, build: Callable[..., Any], blocks: Mapping[str, int]):
        self.blocks, self.overlaps = blocks, device.capability >= (9, 0)

        def load(source: str, architecture: str = device.architecture) -> None:
            built = build(source, architecture=architecture, precision=precision)
            self.modules[source] = device.load(built.cubin)

        self.modules: dict[str, Callable[[str], Any]] = {}
        load("network")
        load("solve")
        try:
            load("loop")
        except BackendError as error:  # its symbol is the driver's
            log.warning("this driver does not load the loop over rounds (%s): it runs on the host", error)
        self.has_loop = "loop" in self.modules
        if has_wgmma(device.capability, precision):
            load("wide", WGMMA)
        self.widest = "dense_64x64" if "wide" in self.modules else "dense_64x32"

    def find(self, name: str) -> Any:
        return self.modules[SOURCE_OF[name]](name)

    def dense(self, rows: int) -> str:
        """The dense kernel for so many rows that share weights."""
        return next((name for most, name in DENSE if rows <= most), self.widest)

    def launch(self, name: str, grid: tuple[int, ...], address: int) -> Launch:
        """All kernels of a solve take one address, of a Solve or of a Level."""
        return Launch(name, self.find(name), grid, self.blocks[name], (ctypes.c_void_p(address),), self.overlaps)


class Evaluation:
    """Memory and launches for one shape. ``tables.connect`` says which heads are read, before the launches run."""

    def __init__(self, network: Network, kernels: Kernels, shape: Shape):
        self.network, self.kernels, self.shape = network, kernels, shape
        g, device = network.bundle.generator, network.device
        self.width = shape.space.width
        self.mapping = network.mapping if shape.space.is_mapped else ()
        self.state_stride, self.w_stride = padded(self.width), padded(g.w_dim)
        # Without layers the mapping's input is what the heads read, after truncation.
        self.input_stride = padded(g.z_dim + network.embedded) if shape.space.is_mapped else 0
        self.depth = network.depth
        self.buffers = Region(device, self.fields(g.w_dim))
        self.tables = Tables(network, shape, self.buffers)

    def fields(self, w_dim: int) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        c, r, s, operand = self.shape.capacity, self.shape.columns, self.shape.slots, self.network.operand
        cotangents, w = (self.shape.heads, c * self.shape.each), self.w_stride
        hidden = [self.network.widest(i) for i in range(self.depth)]
        wide = max([layer.into for layer in self.mapping], default=0)
        fields = {
            "input": ((c, self.input_stride), operand), "state": ((c, self.state_stride), operand),
            "truncated": ((c, w), operand), "trial_w": ((c, w), REAL), "trial": ((c, self.width), REAL),
            **{f"mapped.{i}": ((c, layer.out), operand) for i, layer in enumerate(self.mapping)},
            **{f"hidden.{i}": ((self.shape.heads, c, width), operand) for i, width in enumerate(hidden)},
            **{f"back.{i}": ((*cotangents, max(hidden, default=0)), operand) for i in range(2)},
            "head_jacobian": ((*cotangents, max(w, self.state_stride)), REAL),
            "cotangent": ((c * s, w), operand), "unit": ((c, s), REAL),
            **{f"mapping_back.{i}": ((c * s, wide), operand) for i in range(2)},
            "pulled": ((c * s, self.input_stride), REAL), "moment": ((c,), REAL),
            "trial_logits": ((c, self.network.outputs), REAL), "trial_logp": ((c,), DOUBLE),
            "weights": ((c, r), DOUBLE), "curvature": ((c, r, r), DOUBLE),
            "trial_jacobian": ((c, s, self.width), REAL), "velocity": ((c, self.width), REAL),
            "psi": ((c,), REAL),
        }
        return fields

    # --- launches ------------------------------------------------------------------------------------------------

    def forward(self, solve: int) -> list[Launch]:
        """Up to the logits and what the tapes say of them."""
        c = self.shape.capacity
        heads, hidden = self.shape.heads, [self.network.widest(i) for i in range(self.depth)]
        return [
            self.kernels.launch("normalise", (c,), solve),
            *(self.dense(i, layer.out, c) for i, layer in enumerate(self.mapping)),
            *(self.dense(len(self.mapping) + i, width, c, heads) for i, width in enumerate(hidden)),
            self.kernels.launch("tape", (c,), solve),
        ]

    def head_jacobians(self) -> list[Launch]:
        """The rows of the Jacobian of the heads."""
        first, rows = len(self.mapping) + self.depth, self.shape.capacity * self.shape.each
        widest = [max((self.into(s, i) for s in self.network.heads.values()), default=0) for i in range(self.depth)]
        return [self.dense(first + i, width, rows, self.shape.heads) for i, width in enumerate(widest)]

    def backward(self, solve: int) -> list[Launch]:
        """From the heads' inputs to the state."""
        first, grid = len(self.mapping) + 2 * self.depth, (self.shape.capacity, self.shape.slots)
        rows = self.shape.capacity * self.shape.slots
        back = [self.dense(first + i, layer.into, rows) for i, layer in enumerate(reversed(self.mapping))]
        cotangents = [self.kernels.launch("cotangents", grid, solve)] if self.shape.space.is_mapped else []
        return [*cotangents, *back, self.kernels.launch("pullback", grid, solve)]

    def dense(self, level: int, columns: int, rows: int, layers: int = 1) -> Launch:
        """A level of at most so many ``layers``, each with at most so many columns."""
        name = self.kernels.dense(rows)
        tile = TILES[name]
        grid = layers * -(-columns // tile[1]), -(-rows // tile[0])
        return self.kernels.launch(name, grid, self.tables.level(level))

    def into(self, stack: Stack, level: int) -> int:
        """Width that a head's backward level gives; the first level belongs to its last hidden layer."""
        return stack.hidden[-1 - level].into if level < len(stack.hidden) else 0
