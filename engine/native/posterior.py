"""Samples of the posterior in the compiled library: posterior.h as Python sees it."""

import ctypes
from collections.abc import Sequence
from ctypes import byref, c_double, c_int64, c_void_p
from dataclasses import dataclass
from weakref import finalize

import numpy as np
from numpy import ndarray as Array

from engine.constants import Walk
from engine.native.library import CpuField, address, check, close, fitted, members, open_handle
from engine.native.rows import Columns, Table, TapeRecord
from engine.reference.posterior import Settings

SPENT = 5


class SettingsRecord(ctypes.Structure):
    _fields_ = [*members("confidence guidance", c_double), *members("fresh steps patience outputs", c_int64)]


class WalksRecord(ctypes.Structure):
    _fields_ = [*members("rows tapes", c_int64),
                *members("tape wish label seed psi x w logits relaxed crisp phase spent", c_void_p)]


@dataclass(slots=True, eq=False)
class Walks:
    """n rows of the posterior, and where they are.

    x (n, z_dim), w (n, w_dim), logits (n, L)   not a number, of heads that the row does not read
    relaxed, crisp (n,)                         log P
    phase (n,)                                  Walk
    exact, candidates, corrections, accepted, inside (n,)   see engine.reference.posterior.Ends; corrections from inside
    """

    x: Array
    w: Array
    logits: Array
    relaxed: Array
    crisp: Array
    phase: Array
    spent: Array
    record: WalksRecord
    held: tuple  # what the record points at

    @property
    def far(self) -> Array:
        """The rows that wait to be brought nearer."""
        return np.flatnonzero(self.phase == Walk.FAR)

    def bring(self, rows: Array, x: Array) -> None:
        """Where they are now: x (m, z_dim)."""
        self.x[rows], self.phase[rows] = x, Walk.BROUGHT

    def is_running(self) -> bool:
        return bool(np.isin(self.phase, (Walk.DRAWING, Walk.BROUGHT, Walk.WALKING)).any())


class CpuPosterior:
    """What draws rows of the posterior and takes them on their walks. One call at a time.

    Raises MemoryError; RequestError for tapes and labels that do not fit the network.
    """

    def __init__(self, field: CpuField, columns: Columns, settings: Settings):
        self.field, self.columns, self.table = field, columns, Table(field.network, columns, is_w=False)
        record = SettingsRecord(settings.confidence or 0.0, settings.guidance or 0.0, settings.fresh, settings.steps,
                                settings.patience, columns.count)
        self.library = field.network.library
        self.handle = open_handle(self.library.lace_open_posterior, "the posterior", field.handle,
                                  byref(self.table.record), byref(record))
        finalize(self, close, self.library.lace_close_posterior, self.handle, field).atexit = False

    def begin(self, seeds: Sequence[int], wish: Array, tapes: Sequence[tuple[Array, Array, Array]], psi: Array,
              label: Array) -> Walks:
        """Rows that have drawn nothing yet.

        wish (n,)   the number of each row's tape
        tapes       of each the numbers of its columns, its program as engine.layout.pack gives it, and its parameters
        psi (n, 1), label (n,)
        """
        n, network = len(seeds), self.field.network.record
        kept = [(np.ascontiguousarray(column, np.int32), fitted("code", code, np.int32, len(code), 4),
                 np.ascontiguousarray(parameter, np.float64)) for column, code, parameter in tapes]
        records = (TapeRecord * max(len(tapes), 1))(*(self.table.tape(*own) for own in kept))
        given = (fitted("wish", wish, np.int64, n), fitted("label", label, np.int64, n),
                 np.array(seeds, np.uint64), fitted("psi", psi, np.float32, n, 1))
        found = (np.zeros((n, network.z_dim), np.float32), np.zeros((n, network.w_dim), np.float32),
                 np.full((n, self.columns.count), np.nan, np.float32), np.full(n, -np.inf), np.full(n, -np.inf),
                 np.full(n, int(Walk.DRAWING), np.int32), np.zeros((n, SPENT), np.int64))
        record = WalksRecord(n, len(tapes), ctypes.addressof(records), *map(address, given), *map(address, found))
        return Walks(*found, record, (records, kept, given))

    def advance(self, walks: Walks, waves: int) -> None:
        """Up to so many waves; less when no row goes on by itself."""
        check(self.library.lace_walk(self.handle, byref(walks.record), waves), "the rows of a posterior")
