"""Rows that take their steps in the compiled library: rows.h as Python sees it."""

import ctypes
from collections.abc import Mapping, Sequence
from ctypes import byref, c_int64, c_void_p
from dataclasses import dataclass
from weakref import finalize

import numpy as np
from numpy import ndarray as Array

from engine.constants import Counter
from engine.errors import RequestError
from engine.layout import DTYPES
from engine.native.library import CpuField, CpuNetwork, address, check, close, fitted, members, open_handle


class ColumnTable(ctypes.Structure):
    _fields_ = [*members("heads columns", c_int64), *members("stack first head column", c_void_p)]


# Arrays of a batch with a row for each slot.
SLOTS = ("z", "w", "logits", "psi", "origin", "anchor_z", "anchor_w", "label", "near", "logp", "clock", "step", "error",
         "reach", "status", "counters")


class Slots(ctypes.Structure):
    _fields_ = [("count", c_int64), *members(" ".join(SLOTS), c_void_p)]


class TapeRecord(ctypes.Structure):
    _fields_ = [*members("columns nodes parameters", c_int64), *members("column code parameter", c_void_p)]


@dataclass(frozen=True, slots=True, eq=False)
class Columns:
    """The columns that tapes may read, numbered in the order of heads.

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


class Table:
    """The columns that tapes may read, as the library knows them; a head is packed when a tape first reads it."""

    def __init__(self, network: CpuNetwork, columns: Columns, *, is_w: bool):
        self.network, count = network, len(columns.head)
        self.first = fitted("first", columns.first, np.int64, len(columns.heads))
        self.head = fitted("head", columns.head, np.int64, count)
        self.column = np.zeros(count, DTYPES["Column"])
        self.column["plus"], self.column["minus"] = columns.plus, columns.minus
        self.names = [columns.heads[int(head)] for head in self.head]  # of each column's head
        self.column["direct"] = [is_w or network.heads[name] for name in self.names]
        self.stacks = (c_void_p * max(len(columns.heads), 1))()
        self.record = ColumnTable(len(columns.heads), count, ctypes.addressof(self.stacks), address(self.first),
                                  address(self.head), address(self.column))

    def tape(self, column: Array, code: Array, parameter: Array) -> TapeRecord:
        """Of numbers of columns, int32, a program (nodes, 4) and parameters; they must live as long as the record."""
        for number in column.tolist():
            if 0 <= number < len(self.names) and not self.stacks[head := int(self.head[number])]:
                self.stacks[head] = ctypes.addressof(self.network.head(self.names[number]))
        return TapeRecord(len(column), len(code), len(parameter), address(column), address(code), address(parameter))


class CpuRows:
    """Rows of a batch on their way along the flow. One call at a time.

    Raises MemoryError; RequestError for tapes and labels that do not fit the network.

    settings   fields of ``Solve`` (kernels/layout.cuh) that belong to the solver
    """

    def __init__(self, field: CpuField, columns: Columns, settings: Mapping[str, float], *, is_w: bool):
        self.field, self.network, self.columns = field, field.network, columns
        record, self.table = self.network.record, Table(self.network, columns, is_w=is_w)
        like = np.zeros((), DTYPES["Solve"])
        self.width = record.w_dim if is_w else record.z_dim
        sizes = {"capacity": 1, "width": self.width, "w_dim": record.w_dim, "w_stride": record.w_dim, "in_w": is_w,
                 "outputs": columns.count}
        for name, value in {**settings, **sizes}.items():
            like[name] = value
        library = self.network.library
        self.handle = open_handle(library.lace_open_rows, "the rows of a solve", field.handle, byref(self.table.record),
                                  address(like))
        finalize(self, close, library.lace_close_rows, self.handle, field).atexit = False
        self.slots, self.held = Slots(), ()

    def hold(self, **arrays: Array) -> None:
        """The batch whose rows come next: its arrays by the names of ``Slots``, a row for each slot.

        They are read and written until its last row has come to its end: status (slots,) int32, and counters (slots, 4)
        int32: steps, evaluations, rejected, forced.
        """
        count, record = len(arrays["z"]), self.network.record
        widths = {"w": record.w_dim, "anchor_w": record.w_dim, "logits": self.columns.count, "counters": len(Counter),
                  **dict.fromkeys(("z", "origin", "anchor_z"), self.width)}
        for name, array in arrays.items():
            width = widths.get(name, 1)
            if array.size != count * width or not array.flags.c_contiguous:
                raise RequestError(f"a batch's {name} has shape {array.shape}: expected ({count}, {width}) in C order")
        self.slots = Slots(count=count, **{name: address(array) for name, array in arrays.items()})
        self.held = tuple(arrays.values())

    def admit(self, slots: Sequence[int], column: Array, code: Array, parameter: Array) -> None:
        """Rows that begin, with one tape: numbers of its columns, its program as engine.layout.pack gives it."""
        column, parameter = np.ascontiguousarray(column, np.int32), np.ascontiguousarray(parameter, np.float64)
        code = fitted("code", code, np.int32, len(code), 4)
        tape = self.table.tape(column, code, parameter)
        for slot in slots:
            self.check(self.network.library.lace_admit(self.handle, byref(self.slots), slot, byref(tape)))

    def advance(self, slots: Array, rounds: int) -> None:
        """Up to so many rounds of these rows, less as soon as one has come to its end."""
        slots = np.ascontiguousarray(slots, np.int64)
        self.check(self.network.library.lace_advance(self.handle, address(slots), len(slots), rounds,
                                                     self.network.half))

    def check(self, refusal: int) -> None:
        check(refusal, "the rows of a solve")
