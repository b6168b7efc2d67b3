"""Conditions: expressions over attributes. Frozen, hashable values that do not depend on a bundle.

    attr("smile") & ~attr("glasses") & attr("haircolor", "blond") | 2 * attr("hat")
    attr("age", 0.75)    attr("age") > 0.7    attr("age").between(0.3, 0.6)    near(0.04)    keep("smile", weight=0.01)

`str` gives the text form that `engine.grammar.parse` reads back to an equal value, `repr` the Python form. Names and
classes are resolved when the condition is lowered against a bundle (engine/tape.py).
"""

import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from numbers import Real
from typing import Any

from engine.errors import ConditionError

WORD = re.compile(r"\w[\w-]*")
NUMBER = re.compile(r"-?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")
RESERVED = frozenset({"and", "or", "not", "near", "keep"})  # as names they are written in quotes
EVERY_OTHER = "*"  # keep("*"): all attributes that the condition does not mention otherwise
# Nesting of & | ~ and weights, and of parentheses in the text form. Printing, hashing and lowering recurse, and the
# stack of a tape's interpreter is never deeper than this plus 2.
MAX_DEPTH = 16


class Condition:
    """What all nodes share: the operators. Structure is compared with ==, so `==` is never a condition itself."""

    __slots__ = ()
    __dataclass_fields__: dict[str, Any]  # of the nodes below
    __array_ufunc__ = None  # numpy.float64(2) * condition must call __rmul__, not build an object array

    def __and__(self, other: "Condition") -> "Condition":
        return And(_parts(And, self) + _parts(And, _require_condition(other, "&")))

    def __or__(self, other: "Condition") -> "Condition":
        # Only the left side is flattened: a | (b | c) stays nested, because LACE's OR is not associative.
        return Or((*_parts(Or, self), _require_condition(other, "|")))

    def __invert__(self) -> "Condition":
        return Not(self)

    def __rmul__(self, weight: float) -> "Condition":
        weight = _weight(weight, "a weight")
        if isinstance(self, Weighted):  # 2 * 3 * a is 6 * a, as Python reads it
            return Weighted(_weight(weight * self.weight, "a weight"), self.part)
        return Weighted(weight, self)

    def __mul__(self, other: object) -> "Condition":
        raise ConditionError(f"cannot multiply {self} from the right: a weight comes first, 2 * condition; or is |")

    def __eq__(self, other: object) -> bool:
        """Whether both are the same expression. A number or a text on the other side is a slip of the pen."""
        if isinstance(other, Real | str):
            raise ConditionError(f"{self} == {other!r} compares expressions and asks for nothing: write "
                                 f"attr(name, {other!r}) for an attribute that is to be {other!r}")
        return isinstance(other, Condition) and type(self) is type(other) and self._values() == other._values()

    def __hash__(self) -> int:
        return hash((type(self), self._values()))

    def _values(self) -> tuple:
        return tuple(getattr(self, name) for name in self.__dataclass_fields__)

    def __bool__(self) -> bool:
        raise ConditionError(
            f"the condition {self} has no truth value of its own: write & for and, | for or, ~ for not, "
            'and attr("age").between(0.3, 0.6) for 0.3 < age < 0.6'
        )

    def __gt__(self, other: object) -> "Condition":
        raise ConditionError(
            f"cannot compare {self} with {other!r}: only a bare attribute has a value, and comparisons bind loosest "
            'in Python, so put them in parentheses: attr("smile") & (attr("age") > 0.7)'
        )

    __lt__ = __ge__ = __le__ = __gt__

    def attributes(self) -> tuple[str, ...]:
        """Names of the attributes mentioned, in order, without duplicates; the * of keep("*") is not one."""
        return tuple(dict.fromkeys(name for name in _names(self) if name != EVERY_OTHER))

    def __str__(self) -> str:
        return _text(self)[0]

    def __repr__(self) -> str:
        return _python(self)[0]


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class Is(Condition):
    """An attribute equals a choice: None (the last class), a class name, a class index or value (int), a value."""

    name: str
    choice: str | int | float | None = None

    def __gt__(self, bound: object) -> Condition:
        return _within(self, bound, None)

    def __lt__(self, bound: object) -> Condition:
        return _within(self, None, bound)

    def __ge__(self, bound: object) -> Condition:
        raise ConditionError(f"{self}: values are continuous, write > instead of >= and < instead of <=")

    __le__ = __ge__

    def between(self, low: float, high: float) -> Condition:
        """low < attribute < high."""
        return _within(self, low, high)


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class Within(Condition):
    """A value attribute lies above `low`, below `high`, or between the two. None is an open side."""

    name: str
    low: float | None
    high: float | None


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class Near(Condition):
    """Stay near the anchor: weight (||w - w_a||^2 + ||z - z_a||^2) is subtracted from the log-truth-value."""

    weight: float


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class Keep(Condition):
    """Keep the raw logits of these attributes near the anchor's."""

    names: tuple[str, ...]
    weight: float


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class Weighted(Condition):
    """weight * part, weight > 0."""

    weight: float
    part: Condition

    def __post_init__(self):
        _check_depth(self)


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class Not(Condition):
    part: Condition

    def __post_init__(self):
        _check_depth(self)


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class And(Condition):
    parts: tuple[Condition, ...]

    def __post_init__(self):
        _check_depth(self)


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class Or(Condition):
    parts: tuple[Condition, ...]

    def __post_init__(self):
        _check_depth(self)


def attr(name: str, choice: str | float | None = None) -> Is:
    """An attribute. Without a choice: its last class, or the start of a comparison, attr("age") > 0.7."""
    _check_name(name, "an attribute's name")
    if isinstance(choice, str):
        return Is(name, _check_name(choice, "a class name"))
    if choice is None:
        return Is(name)
    number = _finite(choice, f"the choice for {name!r}")
    # 1 and 1.0 are equal in Python, so both must have the same meaning: a whole number is a class index for a class
    # attribute and a value for a value attribute, however it was typed.
    return Is(name, int(number) if number.is_integer() and abs(number) < 2**53 else number)


def near(weight: float = 0.04) -> Near:
    """Stay near the row's anchor in z and w. The default is the weight of LACE's editing scripts (reg_z)."""
    return Near(_weight(weight, "the weight of near"))


def keep(*names: str, weight: float = 0.01) -> Keep:
    """Keep attributes as they are at the row's anchor. keep("*"): all that are not otherwise mentioned.

    The default is the weight of LACE's editing scripts (reg_logits).
    """
    if not names:
        raise ConditionError('keep() names no attribute: write keep("smile", "gender") or keep("*")')
    if EVERY_OTHER in names and len(names) > 1:
        raise ConditionError('keep("*") already means all attributes not mentioned: give "*" alone or names alone')
    if names != (EVERY_OTHER,):
        names = tuple(dict.fromkeys(_check_name(name, "an attribute's name") for name in names))
    return Keep(names, _weight(weight, "the weight of keep"))


def _within(leaf: Is, low: object, high: object) -> Within:
    if leaf.choice is not None:
        raise ConditionError(f"{leaf} is already a complete condition: compare the bare attribute, {leaf.name}>0.7")
    low = None if low is None else _finite(low, f"the bound of {leaf.name!r}") + 0.0  # + 0.0 turns -0.0 into 0.0
    high = None if high is None else _finite(high, f"the bound of {leaf.name!r}") + 0.0
    if low is not None and high is not None and not low < high:
        raise ConditionError(f"{leaf.name!r} cannot lie between {low} and {high}: the lower bound comes first")
    return Within(leaf.name, low, high)


def children(condition: Condition) -> tuple[Condition, ...]:
    match condition:
        case Not(part) | Weighted(_, part):
            return (part,)
        case And(parts) | Or(parts):
            return parts
    return ()


def is_too_deep(condition: Condition) -> bool:
    """Whether it is nested deeper than MAX_DEPTH; found without recursion."""
    level = [condition]
    for _ in range(MAX_DEPTH):
        level = list({id(child): child for part in level for child in children(part)}.values())
    return bool(level)


def _check_depth(condition: Condition) -> None:
    if is_too_deep(condition):
        raise ConditionError(f"the condition is nested deeper than {MAX_DEPTH} levels: simplify it")


def _parts(kind: "type[And] | type[Or]", condition: Condition) -> tuple[Condition, ...]:
    return condition.parts if isinstance(condition, kind) else (condition,)


def _require_condition(other: object, operator: str) -> Condition:
    if isinstance(other, Condition):
        return other
    raise ConditionError(
        f'{operator} joins two conditions, but one side is {other!r}: an attribute is written attr("smile"), a value '
        'attr("age", 0.75) (not ==), a text parse("...")'
    )


def _check_name(name: object, what: str) -> str:
    if isinstance(name, str) and name and name.isprintable() and '"' not in name and name != EVERY_OTHER:
        return name
    raise ConditionError(f'{what} must be a printable text without ", not {name!r}')


def _finite(number: object, what: str) -> float:
    if not isinstance(number, Real) or isinstance(number, bool) or not math.isfinite(number):
        raise ConditionError(f"{what} must be a finite number, not {number!r}")
    return float(number)


def _weight(weight: object, what: str) -> float:
    number = _finite(weight, what)
    if number <= 0:
        raise ConditionError(f"{what} must be greater than 0, not {weight!r}; for the opposite of a condition write ~")
    return number


def _names(condition: Condition) -> Iterator[str]:
    match condition:
        case Is(name) | Within(name):
            yield name
        case Keep(names):
            yield from names
        case Not(part) | Weighted(_, part):
            yield from _names(part)
        case And(parts) | Or(parts):
            for part in parts:
                yield from _names(part)


# Printing. Both forms share one recursion; a printer returns the text and how tightly it binds. Order of binding:
COMPARE, OR, AND, LOOSE, TIMES, INVERT, ATOM = range(7)
Printer = Callable[[Condition], tuple[str, int]]


def _text(condition: Condition) -> tuple[str, int]:
    match condition:
        case Is(name, None):
            return _word(name), ATOM
        case Is(name, choice):
            return f"{_word(name)}={_word(choice) if isinstance(choice, str) else _number(choice)}", ATOM
        # LOOSE: the grammar reads 2*0.3<age<0.6, but a person stumbles over it, so ~ and * get parentheses here.
        case Within(name, low, None):
            return f"{_word(name)}>{_number(low)}", LOOSE
        case Within(name, None, high):
            return f"{_word(name)}<{_number(high)}", LOOSE
        case Within(name, low, high):
            return f"{_number(low)}<{_word(name)}<{_number(high)}", LOOSE
        case Near(weight):
            return f"near({_number(weight)})", ATOM
        case Keep(names, weight):
            listed = ", ".join(name if name == EVERY_OTHER else _word(name) for name in names)
            return f"keep({listed}, weight={_number(weight)})", ATOM
    return _join(condition, _text, "*")


def _python(condition: Condition) -> tuple[str, int]:
    match condition:
        case Is(name, None):
            return f"attr({_quote(name)})", ATOM
        case Is(name, choice):
            return f"attr({_quote(name)}, {_quote(choice) if isinstance(choice, str) else _number(choice)})", ATOM
        case Within(name, low, None):
            return f"attr({_quote(name)}) > {_number(low)}", COMPARE
        case Within(name, None, high):
            return f"attr({_quote(name)}) < {_number(high)}", COMPARE
        case Within(name, low, high):
            return f"attr({_quote(name)}).between({_number(low)}, {_number(high)})", ATOM
        case Near(weight):
            return f"near({_number(weight)})", ATOM
        case Keep(names, weight):
            return f"keep({', '.join(map(_quote, names))}, weight={_number(weight)})", ATOM
    return _join(condition, _python, " * ")


def _join(condition: Condition, form: Printer, times: str) -> tuple[str, int]:
    def part(child: Condition, least: int) -> str:
        text, binding = form(child)
        return text if binding >= least else f"({text})"

    match condition:
        case Not(child):
            return f"~{part(child, INVERT)}", INVERT
        case Weighted(weight, child):
            return f"{_number(weight)}{times}{part(child, TIMES)}", TIMES
        case And(parts):
            return " & ".join(part(child, LOOSE) for child in parts), AND
        case Or(parts):
            return " | ".join(part(child, AND) for child in parts), OR
    raise TypeError(f"not a condition: {type(condition).__name__}")


def _number(number: float | None) -> str:
    assert number is not None
    return str(int(number)) if number == int(number) and abs(number) < 2**53 else repr(float(number))


def _word(name: str) -> str:
    plain = WORD.fullmatch(name) and not NUMBER.fullmatch(name) and name.lower() not in RESERVED
    return name if plain else f'"{name}"'


def _quote(name: str) -> str:
    return json.dumps(name, ensure_ascii=False)
