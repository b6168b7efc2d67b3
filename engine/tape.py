"""Lowering: from a condition and a bundle's attributes to a tape, the numbers that a solver works with.

The tape's program is interpreted by engine/reference/tape.py, whose docstring lists the nodes. Product logic is
lowered to negation normal form by De Morgan, which is exact in this logic: only leaves are negated. LACE logic is
lowered as written.
"""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NoReturn, Protocol

import numpy as np

from engine.condition import (
    EVERY_OTHER,
    MAX_DEPTH,
    And,
    Condition,
    Is,
    Keep,
    Near,
    Not,
    Or,
    Weighted,
    Within,
    is_too_deep,
)
from engine.errors import ConditionError

LOGICS = ("product", "lace")
# 40 attributes of two classes, as CelebA has, are 79 logits in an edit that keeps all that it does not mention. A row's
# memory in a compiled solve grows with the square: 5 MB at 256.
MAX_LEAVES = 256
MAX_COLUMNS = 256


class Attribute(Protocol):
    """What lowering needs to know of an attribute (engine.bundle.Attribute has it)."""

    @property
    def name(self) -> str: ...
    @property
    def kind(self) -> str: ...
    @property
    def classes(self) -> tuple[str, ...]: ...
    @property
    def sigma(self) -> float: ...
    @property
    def range(self) -> tuple[float, float]: ...


@dataclass(frozen=True, slots=True)
class Column:
    """One input of a tape: a raw logit, or with index None the logit difference [1] - [0] of a two-class attribute."""

    attribute: str
    index: int | None

    def read(self, logits: Mapping[str, np.ndarray]) -> np.ndarray:
        """The input (...) from raw logits, name -> (..., classes)."""
        found = logits[self.attribute]
        return found[..., 1] - found[..., 0] if self.index is None else found[..., self.index]


@dataclass(frozen=True, slots=True, eq=False)
class Tape:
    """A condition lowered against one bundle. Rows with equal `program` are evaluated together.

    program     nested tuple of words and ints: structure and local column numbers, no targets
    parameters  (P,) float64, read-only: targets, scales, weights, anchors (NaN until `anchored`)
    columns     the r inputs, without duplicates
    near        total weight of near(...), 0 for none; not part of the program
    anchors     (position in parameters, attribute, logit index) that `anchored` fills
    """

    program: tuple
    parameters: np.ndarray
    columns: tuple[Column, ...]
    near: float
    anchors: tuple[tuple[int, str, int], ...]
    logic: str

    def anchored(self, logits: Mapping[str, np.ndarray]) -> "Tape":
        """This tape with the anchors of its keep(...) terms, from one row's raw logits: name -> (classes,)."""
        if missing := {name for _, name, _ in self.anchors} - set(logits):
            raise ConditionError(f"keep needs the anchor's logits of {', '.join(sorted(missing))}")
        parameters = self.parameters.copy()
        for position, name, index in self.anchors:
            parameters[position] = np.ravel(logits[name])[index]
        parameters.flags.writeable = False
        return replace(self, parameters=parameters)


# The tape of no condition.
EMPTY = Tape((), np.empty(0), (), 0.0, (), "product")


def by_tape(tapes: Sequence[Tape]) -> list[tuple[Tape, list[int]]]:
    """Each tape with the rows that have it; most calls have one for all rows."""
    rows: dict[int, list[int]] = {}
    for i, tape in enumerate(tapes):
        rows.setdefault(id(tape), []).append(i)
    return [(tapes[some[0]], some) for some in rows.values()]


@dataclass(slots=True)
class Draft:
    """A tape that is being written. `raw` names the attributes whose single logits are needed, not the difference."""

    attributes: Mapping[str, Attribute]
    logic: str
    temperature: float
    raw: frozenset[str] = frozenset()
    tolerances: Mapping[str, float] | None = None
    program: list[tuple] = field(default_factory=list)
    parameters: list[float] = field(default_factory=list)
    columns: dict[Column, int] = field(default_factory=dict)
    anchors: list[tuple[int, str, int]] = field(default_factory=list)
    leaves: int = 0


def lower(
    condition: Condition | None,
    attributes: Mapping[str, Attribute],
    *,
    logic: str = "product",
    temperature: float = 1.0,
    guidance: float = 1.0,
) -> Tape:
    """The tape of a condition; None gives the empty tape, whose log-truth-value is 0 everywhere.

    logic        "product", or "lace" for the constants of Nie, Vahdat, Anandkumar, NeurIPS 2021
    temperature  LACE's: divides the chosen class logit but not the normaliser; "lace" only
    guidance     factor of the log-truth-value, but for ``near`` and ``keep``, whose weights are their own: the scale of
                 classifier guidance (Dhariwal, Nichol, NeurIPS 2021, section 4), p(c | z) to this power
    """
    if logic not in LOGICS:
        raise ConditionError(f"there is no logic {logic!r}; it is one of: {', '.join(LOGICS)}")
    if not 0 < temperature < float("inf"):
        raise ConditionError(f"the temperature must be a finite number greater than 0, not {temperature!r}")
    if logic == "product" and temperature != 1:
        raise ConditionError('a temperature other than 1 would break v <= 0 in product logic: use logic="lace"')
    if not 0 < guidance < float("inf"):
        raise ConditionError(f"the guidance must be a finite number greater than 0, not {guidance!r}")
    draft = Draft(attributes, logic, temperature)
    terms = [] if condition is None else list(_terms(_check(condition), 1.0))
    mentioned = _names_of(terms)
    keeps = [(scale * part.weight, _names_to_keep(part, attributes, mentioned))
             for scale, part in terms if isinstance(part, Keep)]
    draft.raw = frozenset(name for _, names in keeps for name in names)
    count = 0
    for scale, part in terms:
        if not isinstance(part, Near | Keep):
            factor = guidance * scale
            _emit(draft, part if factor == 1 else Weighted(factor, part))
            count = _join(draft, "and", count)
    for weight, names in keeps:
        for name in names:
            _keep(draft, attributes[name], weight)
            count = _join(draft, "and", count)
    if len(draft.columns) > MAX_COLUMNS:
        raise ConditionError(f"the condition reads {len(draft.columns)} logits, more than {MAX_COLUMNS}: split it")
    return _finish(draft, sum((scale * part.weight for scale, part in terms if isinstance(part, Near)), 0.0))


def is_statement(condition: Condition) -> bool:
    """Whether it can be true or false of a picture by itself, without ``near`` and ``keep``."""
    return not any(isinstance(part, Near | Keep) for _, part in _terms(_check(condition), 1.0))


def lower_crisp(
    condition: Condition | None, attributes: Mapping[str, Attribute], tolerances: Mapping[str, float]
) -> Tape:
    """The tape of a condition in which statements on values are true or false, for engine.reference.probability.

    Product logic. A value that is asked for is met within its tolerance, by name; weights, which are shares of an
    energy, have no place in a probability and are left out. ConditionError for ``near`` and ``keep``.
    """
    draft = Draft(attributes, "product", 1.0, tolerances=tolerances)
    if condition is not None:
        if not is_statement(condition):
            raise ConditionError(f"{condition} holds on to an anchor, which is no statement that could be true or "
                                 "false: leave near and keep out, or choose a solver of the flow")
        _emit(draft, condition)
    if len(draft.columns) > MAX_COLUMNS:
        raise ConditionError(f"the condition reads {len(draft.columns)} logits, more than {MAX_COLUMNS}: split it")
    return _finish(draft, 0.0)


def satisfied(
    condition: Condition | None,
    attributes: Mapping[str, Attribute],
    logits: Mapping[str, np.ndarray],
    *,
    tolerance: float = 0.1,
) -> np.ndarray:
    """Crisp truth of the formula, (rows,) bool, from raw logits: name -> (rows, classes).

    A class holds where it has the highest logit, a value within `tolerance`, a bound strictly. Weights do not matter;
    near and keep always hold.
    """
    rows = len(next(iter(logits.values())))

    def truth(part: Condition) -> np.ndarray:
        match part:
            case Is(name, choice):
                attribute = _find(name, attributes)
                if attribute.kind == "class":
                    return np.argmax(logits[name], axis=1) == class_index(attribute, choice)
                return np.abs(logits[name][:, 0] - _target(attribute, choice)) <= tolerance
            case Within(name, low, high):
                _require_value(_find(name, attributes), part)
                u = logits[name][:, 0]
                return (u > (-np.inf if low is None else low)) & (u < (np.inf if high is None else high))
            case Not(inner):
                return ~truth(inner)
            case Weighted(_, inner):
                return truth(inner)
            case And(parts):
                return np.logical_and.reduce([truth(inner) for inner in parts])
            case Or(parts):
                return np.logical_or.reduce([truth(inner) for inner in parts])
        return np.ones(rows, dtype=bool)

    return np.ones(rows, dtype=bool) if condition is None else truth(_check(condition))


def _check(condition: object) -> Condition:
    """The condition, if it is one and not too deep for the recursions below (this walk has no recursion)."""
    if not isinstance(condition, Condition):
        raise ConditionError(f"expected a condition, not {type(condition).__name__}: read a text with parse(text)")
    if is_too_deep(condition):  # one that was unpickled, as others cannot be built
        raise ConditionError(f"the condition is nested deeper than {MAX_DEPTH} levels: simplify it")
    return condition


def _terms(condition: Condition, scale: float) -> Iterable[tuple[float, Condition]]:
    """The conjunction at the top as (weight, term): the only place where near and keep may stand."""
    match condition:
        case And(parts):
            for part in parts:
                yield from _terms(part, scale)
        case Weighted(weight, part) if isinstance(part, And | Near | Keep):
            yield from _terms(part, scale * weight)
        case _:
            yield scale, condition


def _names_of(terms: Iterable[tuple[float, Condition]]) -> set[str]:
    return {name for _, part in terms for name in part.attributes()}


def _names_to_keep(part: Keep, attributes: Mapping[str, Attribute], mentioned: set[str]) -> tuple[str, ...]:
    if part.names == (EVERY_OTHER,):
        return tuple(name for name in attributes if name not in mentioned)
    return tuple(_find(name, attributes).name for name in part.names)


def _emit(draft: Draft, condition: Condition, negated: bool = False) -> None:
    match condition:
        case Is(name):
            _is(draft, _find(name, draft.attributes), condition, negated)
        case Within(name):
            _within(draft, _find(name, draft.attributes), condition, negated)
        case Weighted(weight, part):
            # Under a product-logic NOT the weight stays as it is: ~(k * a) = k * ~a, a weight is importance.
            _emit(draft, part, negated)
            if draft.tolerances is None:
                draft.program.append(("weight", _parameters(draft, weight)))
        case Not(part) if draft.logic == "lace":
            _emit(draft, part)
            draft.program.append(("not",))
        case Not(part):
            _emit(draft, part, not negated)
        case And(parts) | Or(parts):
            both = isinstance(condition, And) != negated
            for count, part in enumerate(parts):
                _emit(draft, part, negated)
                _join(draft, "and" if both else "lace_or" if draft.logic == "lace" else "or", count)
        case Near() | Keep():
            raise ConditionError(
                f"{condition} may only be joined with & at the top, as in smile & {condition}: it belongs to the whole "
                "condition, so it cannot stand under ~, | or inside a weighted alternative"
            )


def _join(draft: Draft, kind: str, count: int) -> int:
    """After the (count + 1)-th part of a chain: join it with the ones before, left to right."""
    if count:
        draft.program.append((kind,))
    return count + 1


def _is(draft: Draft, attribute: Attribute, leaf: Is, negated: bool) -> None:
    if attribute.kind == "value":
        target = _target(attribute, leaf.choice)
        if draft.tolerances is not None:
            slack = draft.tolerances[attribute.name]
            return _crisp(draft, attribute, target - slack, target + slack, negated)
        column = _column(draft, attribute, 0)
        _leaf(draft, "not_value" if negated else "value", column, values=(target, 1.0 / attribute.sigma))
        return
    index, count = class_index(attribute, leaf.choice), len(attribute.classes)
    if count == 2 and negated:  # not one class of two is the other, exactly
        index, negated = 1 - index, False
    if count == 2 and attribute.name not in draft.raw and draft.temperature == 1:
        _leaf(draft, "difference", _column(draft, attribute, None), values=(2.0 * index - 1.0,))
        return
    first = _raw_columns(draft, attribute)
    if draft.temperature != 1:
        _leaf(draft, "tempered", first, count, values=(index, 1.0 / draft.temperature - 1.0))
    else:
        _leaf(draft, "not_class" if negated else "class", first, count, values=(index,))


def _within(draft: Draft, attribute: Attribute, leaf: Within, negated: bool) -> None:
    _require_value(attribute, leaf)
    if draft.tolerances is not None:
        low = float("-inf") if leaf.low is None else leaf.low
        return _crisp(draft, attribute, low, float("inf") if leaf.high is None else leaf.high, negated)
    column = _column(draft, attribute, 0)
    count = 0
    for bound, sign in ((leaf.low, 1.0), (leaf.high, -1.0)):
        if bound is not None:
            _leaf(draft, "side", column, values=(bound, (-sign if negated else sign) / attribute.sigma))
            count = _join(draft, "or" if negated else "and", count)


def _crisp(draft: Draft, attribute: Attribute, low: float, high: float, negated: bool) -> None:
    column = _column(draft, attribute, 0)
    _leaf(draft, "outside" if negated else "inside", column, values=(low, high, 1.0 / attribute.sigma))


def _keep(draft: Draft, attribute: Attribute, weight: float) -> None:
    first, count = _raw_columns(draft, attribute), _width(attribute)
    anchor = len(draft.parameters) + 1
    _leaf(draft, "keep", first, count, values=(weight, *[float("nan")] * count))
    draft.anchors += [(anchor + index, attribute.name, index) for index in range(count)]


def _leaf(draft: Draft, kind: str, *places: int, values: tuple[float, ...]) -> None:
    draft.leaves += 1
    if draft.leaves > MAX_LEAVES:
        raise ConditionError(f"the condition has more than {MAX_LEAVES} terms (an interval counts as two): simplify it")
    draft.program.append((kind, *places, _parameters(draft, *values)))


def _parameters(draft: Draft, *values: float) -> int:
    draft.parameters += values
    return len(draft.parameters) - len(values)


def _column(draft: Draft, attribute: Attribute, index: int | None) -> int:
    return draft.columns.setdefault(Column(attribute.name, index), len(draft.columns))


def _raw_columns(draft: Draft, attribute: Attribute) -> int:
    """First of the attribute's raw logits; they are always requested together, hence contiguous."""
    first, *_ = [_column(draft, attribute, index) for index in range(_width(attribute))]
    return first


def _finish(draft: Draft, near: float) -> Tape:
    parameters = np.array(draft.parameters, dtype=np.float64)
    parameters.flags.writeable = False
    return Tape(tuple(draft.program), parameters, tuple(draft.columns), near, tuple(draft.anchors), draft.logic)


def _width(attribute: Attribute) -> int:
    return 1 if attribute.kind == "value" else len(attribute.classes)


def _find(name: str, attributes: Mapping[str, Attribute]) -> Attribute:
    if name not in attributes:
        _unknown(f"there is no attribute {name!r}", name, attributes)
    return attributes[name]


def class_index(attribute: Attribute, choice: str | float | None) -> int:
    """Of a class by its name or number; None is the last one. Raises ConditionError for one that is not there."""
    name, classes = attribute.name, attribute.classes
    if choice is None:
        return len(classes) - 1
    if isinstance(choice, str):
        if choice not in classes:
            _unknown(f"{name!r} has no class {choice!r}", choice, classes)
        return classes.index(choice)
    if not isinstance(choice, int) or not 0 <= choice < len(classes):
        listed = ", ".join(f"{index} {word}" for index, word in enumerate(classes))
        raise ConditionError(f"{name!r} has no class number {choice!r}; its classes are: {listed}")
    return choice


def _target(attribute: Attribute, choice: str | float | None) -> float:
    if choice is None or isinstance(choice, str):
        name, (low, high) = attribute.name, attribute.range
        given = "" if choice is None else f", not {choice!r}"
        raise ConditionError(
            f"{name!r} is a value from about {low:g} to {high:g}{given}: write {name}={0.5 * (low + high):g} or "
            f"{name}>{0.5 * (low + high):g}"
        )
    return float(choice)


def _require_value(attribute: Attribute, leaf: Within) -> None:
    if attribute.kind == "class":
        listed = ", ".join(attribute.classes)
        raise ConditionError(
            f"{leaf} compares {attribute.name!r}, which has classes and no value: write {attribute.name}="
            f"{attribute.classes[-1]}; its classes are: {listed}"
        )


def _unknown(problem: str, name: str, known: Iterable[str]) -> NoReturn:
    # Compared without case, reported as the bundle writes it.
    folded = {word.lower(): word for word in known}
    close = difflib.get_close_matches(name.lower(), folded, n=1)
    advice = f"; did you mean {folded[close[0]]!r}?" if close else ""
    raise ConditionError(f"{problem}; this bundle has: {', '.join(folded.values())}{advice}")
