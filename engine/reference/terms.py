"""A program of engine/reference/tape.py as the terms of its conjunction.

Conditions that differ as a whole mostly consist of equal terms, so that rows with different programs can be evaluated
together, term by term.
"""

from functools import lru_cache
from typing import NamedTuple

from engine.reference.tape import JOINS, LEAVES


class Term(NamedTuple):
    """A part of a conjunction as a program of its own.

    columns, parameters   those of the whole that are its column 0, 1, ... and its parameters
    """

    program: tuple
    columns: tuple[int, ...]
    parameters: slice


@lru_cache(maxsize=1024)
def terms(program: tuple) -> tuple[Term, ...]:
    """The terms of a program's conjunction: its v, g and c are the sums of theirs."""
    stack: list[list[tuple[int, int]]] = []  # of each operand its terms, as nodes from .. to
    for end, (name, *_) in enumerate(program, 1):
        if name in LEAVES:
            stack.append([(end - 1, end)])
        elif name == "and":
            right = stack.pop()
            stack[-1] += right
        else:
            operands = [stack.pop() for _ in range(2 if name in JOINS else 1)]
            stack.append([(operands[-1][0][0], end)])
    if not stack:
        return ()
    parts = [program[first:end] for first, end in stack[0]]
    starts = [next(node[-1] for node in part if len(node) > 1) for part in parts]
    return tuple(_isolate(*given) for given in zip(parts, starts, [*starts[1:], None], strict=True))


def _isolate(nodes: tuple, first: int, end: int | None) -> Term:
    """A term of its own from nodes that read parameters [first, end): columns and positions then count from 0."""
    columns = sorted({column for node in nodes for column in _columns(node)})
    return Term(tuple(_move(node, columns, first) for node in nodes), tuple(columns), slice(first, end))


def _columns(node: tuple) -> range:
    match node:
        case (_, first, count, _):
            return range(first, first + count)
        case (_, column, _):
            return range(column, column + 1)
    return range(0)


def _move(node: tuple, columns: list[int], first: int) -> tuple:
    match node:
        case (name, column, *count, position):
            return name, columns.index(column), *count, position - first
        case (name, position):
            return name, position - first
    return node
