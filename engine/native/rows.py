"""Rows that take their steps in the compiled library: rows.h as Python sees it."""

import ctypes
from collections.abc import Mapping, Sequence
from ctypes import byref, c_int64, c_void_p
from dataclasses import dataclass
from weakref import finalize

import numpy as np
from numpy import ndarray as Array

from engine.layout import DTYPES
from engine.native.library import CpuField, address, close, contiguous, members


class Readable(ctypes.Structure):
    _fields_ = [("heads", c_int64), *members("stack first head column", c_void_p)]


# Arrays of a batch with a row for each slot.
SLOTS = ("z", "w", "logits", "psi", "origin", "anchor_z", "anchor_w", "label", "near", "logp", "clock", "step", "error",
         "reach", "status", "counters")


class Slots(ctypes.Structure):
    _fields_ = [(name, c_void_p) for name in SLOTS]


class Says(ctypes.Structure):
    _fields_ = [*members("columns nodes parameters", c_int64), *members("column code parameter", c_void_p)]


@dataclass(frozen=True, slots=True, eq=False)
class Columns:
    """What rows may read, numbered in the order of heads.

    heads          their names
    first          (heads,) the place of each one's logits among all;  count: of all
    head           (columns,) the head of each column
    plus, minus    (columns,) a column is logits[plus] - logits[minus] of all; minus is -1 for a logit alone
    """

    heads: Sequence[str]
    first: Array
    count: int
    head: Array
    plus: Array
    minus: Array


class CpuRows:
    """Rows of a batch on their way along the flow. One call at a time; raises MemoryError.

    settings   fields of ``Solve`` (kernels/layout.cuh) that belong to the solver
    """

    def __init__(self, field: CpuField, columns: Columns, settings: Mapping[str, float], *, is_w: bool):
        self.field, self.network, self.columns = field, field.network, columns
        record, heads = self.network.record, self.network.heads
        self.first, self.head = (contiguous(x, np.int64) for x in (columns.first, columns.head))
        self.table = np.zeros(len(columns.head), DTYPES["Column"])
        self.table["plus"], self.table["minus"] = columns.plus, columns.minus
        self.table["direct"] = [is_w or heads[columns.heads[head]] for head in columns.head]
        self.stacks = (c_void_p * max(len(columns.heads), 1))()
        self.readable = Readable(len(columns.heads), ctypes.addressof(self.stacks), address(self.first),
                                 address(self.head), address(self.table))
        like = np.zeros((), DTYPES["Solve"])
        width = record.w_dim if is_w else record.z_dim
        sizes = {"capacity": 1, "width": width, "w_dim": record.w_dim, "w_stride": record.w_dim, "in_w": is_w,
                 "outputs": columns.count}
        for name, value in (settings | sizes).items():
            like[name] = value
        library = self.network.library
        self.handle = library.lace_open_rows(field.handle, byref(self.readable), address(like))
        finalize(self, close, library.lace_close_rows, self.handle, field).atexit = False
        self.slots, self.held = Slots(), ()

    def hold(self, **arrays: Array) -> None:
        """The batch whose rows come next: its arrays by the names of ``Slots``, a row for each slot.

        They are read and written until its last row has come to its end: status (slots,) int32, and counters (slots, 4)
        int32: steps, evaluations, rejected, forced.
        """
        self.slots = Slots(**{name: address(array) for name, array in arrays.items()})
        self.held = tuple(arrays.values())

    def admit(self, slots: Sequence[int], column: Array, code: Array, parameter: Array) -> None:
        """Rows that begin, with one tape: numbers of its columns, its program as engine.layout.pack gives it."""
        column, code, parameter = (contiguous(column, np.int32), contiguous(code, np.int32),
                                   contiguous(parameter, np.float64))
        for head in set(self.head[column].tolist()):
            if not self.stacks[head]:
                self.stacks[head] = ctypes.addressof(self.network.head(self.columns.heads[head]))
        says = Says(len(column), len(code), len(parameter), address(column), address(code), address(parameter))
        for slot in slots:
            self.check(self.network.library.lace_admit(self.handle, byref(self.slots), slot, byref(says)))

    def advance(self, slots: Array, rounds: int) -> None:
        """Up to so many rounds of these rows, less as soon as one has come to its end."""
        slots = contiguous(slots, np.int64)
        self.check(self.network.library.lace_advance(self.handle, address(slots), len(slots), rounds,
                                                     self.network.half))

    def check(self, failed: int) -> None:
        if failed:
            raise MemoryError("there is no memory for the rows of a solve")
