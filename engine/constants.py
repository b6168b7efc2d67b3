"""What Python and C++ share beside the structs of layout.cuh: numbers and enumerations, each written down once."""

from enum import IntEnum

import numpy as np

from engine.batch import Status
from engine.layout import CRISP, JOINS, LEAVES, OPCODES, PRECISIONS
from engine.reference import field, posterior, probability, tape

FAST_COLUMNS = 16  # up to so many columns the small matrices of Gauss-Newton are in a GPU's shared memory

MOST_THREADS = 1024  # of a pool


class Phase(IntEnum):
    """Of a row's place in a compiled solve."""

    IDLE = 0
    FRESH = 1
    RUNNING = 2
    FINAL = 3


class Counter(IntEnum):
    """Of a row: the columns of engine.batch.Batch.counters."""

    STEPS = 0
    EVALUATIONS = 1
    REJECTED = 2
    FORCED = 3


class Queue(IntEnum):
    """The fields of ``Solve.queue``, the loop over rounds on a device."""

    COUNT = 0
    NEXT = 1
    ROWS_RUNNING = 2
    ITERATIONS = 3
    LIMIT = 4
    GOES_ON = 5


class Walk(IntEnum):
    """Of a row's place in the posterior.

    FAR   it waits for Gauss-Newton steps;  BROUGHT   it has had them, and nobody has looked where it is now
    """

    DRAWING = 0
    FAR = 1
    BROUGHT = 2
    WALKING = 3
    ENTERED = 4
    LEFT_OUT = 5


class Refusal(IntEnum):
    """Why the compiled library did nothing: the first wrong thing in what it was given."""

    NONE = 0
    MEMORY = 1
    MISSING = 2
    COUNT = 3
    WIDTH = 4
    LABEL = 5
    POSITION = 6
    PROGRAM = 7
    ORDER = 8
    PRECISION = 9


# With what the enumeration's names begin in C++.
PREFIXES: dict[type[IntEnum], str] = {Status: "STATUS_", Phase: "", Counter: "", Queue: "", Walk: "WALK_",
                                        Refusal: "REFUSED_"}


def constants() -> str:
    """The text of constants.cuh."""
    numbers = {
        "SLOPE": field.SLOPE, "MOMENT_EPSILON": field.MOMENT_EPSILON, "PI": np.pi, "EPSILON": np.finfo(float).eps,
        "NOT_STRENGTH": tape.NOT_STRENGTH, "OR_LEFT_WEIGHT": tape.OR_LEFT_WEIGHT, "HIGHEST_VALUE": tape.HIGHEST_VALUE,
        "ERFC_CENTRE": tape.ERFC_CENTRE, "FAR_TAIL": tape.FAR_TAIL, "LOG_FALSE": probability.FALSE,
        "FAR_FROM_SET": posterior.FAR, "HIGHEST_POWER": posterior.HIGHEST,
    }
    lines = ["#pragma once"]
    lines += [f"#define {name} {float(value)!r}" for name, value in numbers.items()]
    lines.append(f"#define SCALED_ERFC {', '.join(repr(float(x)) for x in tape.SCALED_ERFC)}")
    lines.append(f"#define STEP_SIZES {', '.join(repr(float(x)) for x in posterior.SIZES)}")
    lines += [f"#define OP_{name.upper()} {i}" for i, name in enumerate(OPCODES)]
    lines += [f"#define {name.upper()} {i}" for i, name in enumerate(PRECISIONS)]
    counts = {"LEAVES": len(LEAVES) + len(CRISP), "JOINS": len(JOINS), "FAST_COLUMNS": FAST_COLUMNS,
              "MOST_THREADS": MOST_THREADS, "STUCK_STEPS": posterior.STUCK, "RISE_STEPS": posterior.RISE,
              "STEP_STREAM": posterior.STEP_STREAM, "CHANCE_STREAM": posterior.CHANCE_STREAM}
    lines += [f"#define {name} {n}" for name, n in counts.items()]
    return "\n".join([*lines, *(enumeration(kind, prefix) for kind, prefix in PREFIXES.items())]) + "\n"


def enumeration(kind: type[IntEnum], prefix: str) -> str:
    members = ", ".join(f"{prefix}{member.name} = {member.value}" for member in kind)
    return f"enum {kind.__name__} {{ {members} }};"
