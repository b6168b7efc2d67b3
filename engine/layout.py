"""The structs of layout.cuh as numpy dtypes, tapes as integers, and arrays as operands of a matrix product."""

import re
from collections.abc import Mapping

import numpy as np
from numpy import ndarray as Array

from engine import sources
from engine.reference.probability import CRISP
from engine.reference.tape import JOINS, LEAVES

PRECISIONS = ("fp32", "tf32", "fp16")
ALIGNMENT = 32  # padded widths are multiples of it: one step along k of the widest operand, and the widest tile
OPCODES = (*LEAVES, *CRISP, *JOINS, "weight", "not")
SCALARS = {"int": np.int32, "double": np.float64, "unsigned long long": np.uint64}
POINTER = np.uint64


def structs(source: str) -> dict[str, np.dtype]:
    """The structs in a C source as dtypes with C's alignment. Pointers are unsigned 64-bit numbers."""
    source = re.sub(r"//.*", "", source)
    found = {}
    for name, body in re.findall(r"struct (\w+) \{(.*?)\};", source, re.DOTALL):
        fields = []
        for kind, names in re.findall(r"([\w ]+[\w*]) ([\w, \n]+);", body):
            dtype = POINTER if kind.endswith("*") else SCALARS[kind.strip()]
            fields += [(field.strip(), dtype) for field in names.split(",")]
        found[name] = np.dtype(fields, align=True)
    return found


DTYPES: Mapping[str, np.dtype] = structs((sources.folder() / "layout.cuh").read_text())


def padded(width: int) -> int:
    """The next multiple of ALIGNMENT."""
    return -(-width // ALIGNMENT) * ALIGNMENT


def pack(program: tuple) -> Array:
    """A tape's program as (nodes, 4) int32: opcode, first column or left operand, count of columns, parameter.

    A leaf of one column has the count 1. The right operand of a join and the only one of others is the node before.
    """
    packed = np.zeros((len(program), 4), np.int32)
    stack: list[int] = []
    for i, (name, *places) in enumerate(program):
        left = count = position = 0
        if name in LEAVES or name in CRISP:
            left, *between, position = places
            count = between[0] if between else 1
        elif name in JOINS:
            stack.pop()
            left = stack.pop()
        else:
            stack.pop()
            position = places[0] if places else 0
        stack.append(i)
        packed[i] = OPCODES.index(name), left, count, position
    return packed


def to_operand(values: Array, precision: str) -> Array:
    """float32 values as a matrix product reads them: float32, float32 rounded to 11 digits (tf32), or float16."""
    values = np.ascontiguousarray(values, np.float32)
    if precision == "fp16":
        return values.astype(np.float16)
    if precision == "tf32":
        # Half of the last kept digit is added to the magnitude, as cvt.rna does.
        return ((values.view(np.uint32) + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32)
    return values
