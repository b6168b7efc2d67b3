"""The twins' constants as C, so that a number is written down once."""

import numpy as np

from engine.layout import JOINS, LEAVES, OPCODES
from engine.reference import field, tape

FAST_COLUMNS = 16  # up to so many columns the small matrices of Gauss-Newton are in a GPU's shared memory


def constants() -> str:
    """The text of constants.cuh."""
    numbers = {
        "SLOPE": field.SLOPE, "MOMENT_EPSILON": field.MOMENT_EPSILON, "PI": np.pi, "EPSILON": np.finfo(float).eps,
        "NOT_STRENGTH": tape.NOT_STRENGTH, "OR_LEFT_WEIGHT": tape.OR_LEFT_WEIGHT, "HIGHEST_VALUE": tape.HIGHEST_VALUE,
        "ERFC_CENTRE": tape.ERFC_CENTRE, "FAR_TAIL": tape.FAR_TAIL,
    }
    lines = [f"#define {name} {float(value)!r}" for name, value in numbers.items()]
    lines.append(f"#define SCALED_ERFC {', '.join(repr(float(x)) for x in tape.SCALED_ERFC)}")
    lines += [f"#define OP_{name.upper()} {i}" for i, name in enumerate(OPCODES)]
    counts = {"LEAVES": len(LEAVES), "JOINS": len(JOINS), "FAST_COLUMNS": FAST_COLUMNS}
    return "\n".join([*lines, *(f"#define {name} {n}" for name, n in counts.items())]) + "\n"
