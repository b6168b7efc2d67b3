"""The kernels' sources compiled for the host: the same functions of a row, one thread in a loop over rows."""

import ctypes
import shutil
import subprocess
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
from numpy import ndarray as Array

from engine.constants import Phase
from engine.cuda.compile import sources
from engine.layout import DTYPES
from engine.native.build import compiler

# Contraction is off and no sum is reordered: the numpy twins do neither.
OPTIONS = ("-std=c++17", "-O1", "-ffp-contract=off", "-fPIC", "-shared", "-pthread", "-Wall", "-Wextra", "-Werror",
           "-Wno-unused-parameter", "-Wno-unknown-pragmas", "-Wno-unused-function", "-x", "c++")
IDLE, FRESH = Phase.IDLE, Phase.FRESH
PARTS = ("network", "solve", "wide")


@cache
def library(real: str = "double", precision: str = "fp32", extra: str = "", parts: tuple[str, ...] = PARTS,
            change: tuple[str, str, str] | None = None) -> ctypes.CDLL:
    """The kernels as functions ``host_{kernel}`` and ``block_{kernel}`` of an address.

    extra    C++ to go behind them
    parts    sources that are compiled
    change   (file, text, other text): a fault to be found
    """
    folder = Path(mkdtemp(prefix="lace-host-"))
    try:
        for name, text in sources().items():
            if change and name == change[0]:
                assert change[1] in text
                text = text.replace(*change[1:])
            (folder / name).write_text(text)
        (folder / "host.cpp").write_text("".join(f'#include "{name}.cu"\n' for name in parts) + extra)
        definitions = [f"-DREAL={real}", f"-DPRECISION={precision.upper()}"]
        command = [compiler() or "c++", *OPTIONS, *definitions, "host.cpp", "-o", "host.so"]
        subprocess.run(command, cwd=folder, check=True)
        return ctypes.CDLL(str(folder / "host.so"))
    finally:
        shutil.rmtree(folder)


def address(array: Array) -> int:
    return array.ctypes.data


KNOWN: dict[int, Array] = {}  # by address: the arrays that records point at, which keeps them alive


def struct(name: str, **values: Any) -> Array:
    """A record of kernels/layout.cuh; an array stands for its address."""
    record = np.zeros((), DTYPES[name])
    for field, value in values.items():
        if isinstance(value, np.ndarray):
            KNOWN[address(value)] = value
            value = address(value)
        record[field] = value
    return record


def call(kernel: str, argument: Array, *numbers: int, real: type = np.float64, precision: str = "fp32") -> None:
    """One thread for all rows; or with ``numbers`` = (x, y, lanes, warps) the threads of one block."""
    kernels = library("double" if real is np.float64 else "float", precision)
    getattr(kernels, f"{'block' if numbers else 'host'}_{kernel}")(ctypes.c_void_p(address(argument)), *numbers)


class HostSolve:
    """A Solve in host memory: its arrays are attributes, ``run`` calls a kernel on it."""

    def __init__(self, real: type = np.float64, precision: str = "fp32", **numbers: Any):
        self.build = {"real": real, "precision": precision}
        self.numbers, self.arrays = {"layers": 1, "normalised": 1} | numbers, {}

    def __getattr__(self, name: str) -> Array:
        return self.arrays[name]

    def put(self, **arrays: Array) -> None:
        self.arrays |= {name: np.ascontiguousarray(array) for name, array in arrays.items()}

    def run(self, kernel: str) -> None:
        call(kernel, struct("Solve", **self.numbers, **self.arrays), **self.build)


class BlockSolve(HostSolve):
    """The same, block by block, with as many threads as a small block could have."""

    lanes, warps = 4, 2

    def run(self, kernel: str) -> None:
        record = struct("Solve", **self.numbers, **self.arrays)
        rows = 1 if kernel == "turnover" else int(record["capacity"])
        slots = int(record["slots"]) if kernel in ("cotangents", "pullback") else 1
        for x, y in np.ndindex(rows, slots):
            call(kernel, record, x, y, self.lanes, self.warps, **self.build)
