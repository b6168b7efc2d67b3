"""The text form of a condition: tokenizer and recursive-descent parser.

    expression  := conjunction ('|' conjunction)*
    conjunction := term ('&' term)*
    term        := NUMBER '*' term | unary
    unary       := '~' unary | primary
    primary     := '(' expression ')' | near | keep | NUMBER side name [side NUMBER] | name ['=' choice | side NUMBER]
    near        := 'near' '(' [NUMBER] ')'
    keep        := 'keep' '(' ('*' | name (',' name)*) [',' 'weight' '=' NUMBER] ')'
    side        := '<' | '>'            choice := name | NUMBER            name := WORD | '"' anything '"'

Precedence as in Python, except that a comparison belongs to its attribute: `smile & age>0.7` needs no parentheses.
The tree is built with the operators of engine.condition, so that the text and the Python form stay equal.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from operator import and_, invert, mul, or_
from typing import NoReturn

from engine.condition import EVERY_OTHER, MAX_DEPTH, NUMBER, RESERVED, WORD, Condition, attr, keep, near
from engine.errors import ConditionError

LONGEST = 500  # letters of a text that an error repeats
SYMBOLS = "&|~()*=<>,"
ADVICE = {
    "and": "write & for and",
    "or": "write | for or",
    "not": "write ~ for not",
    "&&": "write a single & for and",
    "||": "write a single | for or",
    "==": "write a single =",
    "!=": "write ~name=class for 'not equal'",
    "!": "write ~ for not",
    ">=": "values are continuous: write >",
    "<=": "values are continuous: write <",
    "+": "write & for and",
    "-": "write & ~ for 'and not'",
    "'": 'unusual names go in double quotes: "dark brown"',
    "*": "a weight comes first: 2*hat; for or write |",
    ",": "write & for and",
    "=": "only an attribute can be set: haircolor=blond, age=0.75",
    "(": "write & or | before the parenthesis",
    ")": "a parenthesis was closed that was never opened",
}
JOIN = "expected & or |"
LONG = frozenset(symbol for symbol in ADVICE if len(symbol) == 2 and not symbol.isalpha())


@dataclass(frozen=True, slots=True)
class Token:
    """kind: 'name', 'quoted', 'number', 'end', or the symbol itself."""

    kind: str
    text: str
    position: int


@dataclass(slots=True)
class Source:
    """The text, its tokens and how far the parser has come."""

    text: str
    tokens: list[Token]
    index: int = 0
    nesting: int = 0


def parse(text: str) -> Condition:
    """The condition that a text describes. parse(str(condition)) == condition."""
    if not isinstance(text, str):
        raise ConditionError(f"a condition in text form is a str, not {type(text).__name__}")
    if not text.strip():
        raise ConditionError("the condition is empty: write for example smile & ~glasses; for plain samples leave the "
                             "condition out (None in Python)")
    source = Source(text, _tokens(text))
    condition = _expression(source)
    if _next(source).kind != "end":
        _fail(source, f"{JOIN} or the end")
    return condition


def _tokens(text: str) -> list[Token]:
    tokens, position = [], 0
    while position < len(text):
        if text[position].isspace():
            position += 1
            continue
        token = _token(text, position)
        tokens.append(token)
        position += len(token.text)
    return [*tokens, Token("end", "", len(text))]


def _token(text: str, position: int) -> Token:
    number, word = NUMBER.match(text, position), WORD.match(text, position)
    # The longer match wins, so that 2-door and 3d are names while 1e-3 is a number.
    if number and (not word or number.end() >= word.end()):
        return Token("number", number.group(), position)
    if word:
        return Token("name", word.group(), position)
    if text[position] == '"':
        end = text.find('"', position + 1)
        if end < 0:
            raise _error(text, position, "expected a closing quote")
        return Token("quoted", text[position : end + 1], position)
    for symbol in (text[position : position + 2], text[position]):
        if symbol in LONG or (symbol not in SYMBOLS and symbol in ADVICE):
            raise _error(text, position, f"{symbol!r} is not part of a condition", ADVICE[symbol])
        if len(symbol) == 1 and symbol in SYMBOLS:
            return Token(symbol, symbol, position)
    raise _error(
        text, position, f"{text[position]!r} is not part of a condition", "names may hold letters, digits, _, -"
    )


def _expression(source: Source) -> Condition:
    return _chain(source, "|", or_, lambda: _chain(source, "&", and_, lambda: _term(source)))


def _chain(source: Source, symbol: str, join: Callable, part: Callable[[], Condition]) -> Condition:
    condition = part()
    while _accept(source, symbol):
        condition = join(condition, part())
    return condition


def _term(source: Source) -> Condition:
    if _next(source).kind == "number" and _next(source, 1).kind == "*":
        start, weight = _next(source), _number(source)
        _take(source, "*", "*")
        return _build(source, start, mul, weight, _nest(source, _term))
    return _unary(source)


def _unary(source: Source) -> Condition:
    if not _accept(source, "~"):
        return _primary(source)
    if _next(source).kind == "number" and _next(source, 1).kind == "*":
        _fail(source, "expected an attribute or a parenthesis after ~", "~ binds tighter than *: write ~(2*hat)")
    return invert(_nest(source, _unary))


def _primary(source: Source) -> Condition:
    token = _next(source)
    if token.kind == "(":
        source.index += 1
        condition = _nest(source, _expression)
        if _next(source).kind != ")":
            _fail(source, f"{JOIN} or )", f"the parenthesis opened at column {token.position + 1} is not closed")
        source.index += 1
        return condition
    if token.kind == "number":
        return _interval(source)
    if token.kind == "name" and token.text in ("near", "keep"):
        source.index += 1
        _take(source, "(", f"( after {token.text}")
        return _near(source) if token.text == "near" else _keep(source)
    return _attribute(source)


def _attribute(source: Source) -> Condition:
    start, name = _next(source), _name(source, "expected an attribute")
    if _accept(source, "="):
        if _next(source).kind == "number":
            return _build(source, start, attr, name, _number(source))
        return _build(source, start, attr, name, _name(source, "expected a class name or a number after ="))
    condition = _build(source, start, attr, name)
    if _next(source).kind in ("<", ">"):
        return _compare(source, condition)
    return condition


def _compare(source: Source, condition: Condition) -> Condition:
    above = _next(source).kind == ">"
    source.index += 1
    bound = _number(source)
    return condition > bound if above else condition < bound


def _interval(source: Source) -> Condition:
    """0.3<age, 0.3<age<0.6 or 0.6>age>0.3."""
    start, first = _next(source), _number(source)
    side = _next(source)
    if side.kind not in ("<", ">"):
        _fail(source, "expected *, < or > after a number", "a weight is 2*hat, an interval 0.3<age<0.6")
    source.index += 1
    condition = attr(_name(source, "expected an attribute"))
    if _next(source).kind not in ("<", ">"):
        return condition > first if side.kind == "<" else condition < first
    if _next(source).kind != side.kind:
        _fail(source, f"expected {side.kind}", "an interval is written 0.3<age<0.6 or 0.6>age>0.3")
    source.index += 1
    last = _number(source)
    return _build(source, start, condition.between, *((first, last) if side.kind == "<" else (last, first)))


def _near(source: Source) -> Condition:
    start = _next(source)
    weights = [_number(source)] if start.kind == "number" else []
    _take(source, ")", "), as in near(0.04)" if weights else "a weight, as in near(0.04)")
    return _build(source, start, near, *weights)


def _keep(source: Source) -> Condition:
    start, names, options = _next(source), [], {}
    while True:
        if _next(source).text == "weight" and _next(source, 1).kind == "=":
            source.index += 2
            options["weight"] = _number(source)
            break
        if _accept(source, "*"):
            names.append(EVERY_OTHER)
        else:
            names.append(_name(source, "expected an attribute, * or weight="))
        if not _accept(source, ","):
            break
    _take(source, ")", "), as in keep(smile, gender, weight=0.01)")
    return _build(source, start, partial(keep, **options), *names)


def _name(source: Source, expected: str) -> str:
    token = _next(source)
    if token.kind not in ("name", "quoted") or (token.kind == "name" and token.text.lower() in RESERVED):
        _fail(source, expected)
    source.index += 1
    return token.text[1:-1] if token.kind == "quoted" else token.text


def _number(source: Source) -> float:
    token = _next(source)
    if token.kind != "number":
        _fail(source, "expected a number")
    if not math.isfinite(float(token.text)):
        _fail(source, "expected a number that fits in double precision")
    source.index += 1
    return float(token.text)


def _nest(source: Source, part: Callable[[Source], Condition]) -> Condition:
    source.nesting += 1
    if source.nesting > MAX_DEPTH:
        _fail(source, f"nested deeper than {MAX_DEPTH} levels", "remove parentheses")
    condition = part(source)
    source.nesting -= 1
    return condition


def _next(source: Source, ahead: int = 0) -> Token:
    return source.tokens[min(source.index + ahead, len(source.tokens) - 1)]


def _accept(source: Source, kind: str) -> bool:
    if _next(source).kind != kind:
        return False
    source.index += 1
    return True


def _take(source: Source, kind: str, expected: str) -> None:
    if not _accept(source, kind):
        _fail(source, f"expected {expected}")


def _build(source: Source, start: Token, make: Callable[..., Condition], *arguments: object) -> Condition:
    """Call a constructor; what it refuses is reported with the place in the text."""
    try:
        return make(*arguments)
    except ConditionError as error:
        raise _error(source.text, start.position, str(error)) from None


def _fail(source: Source, expected: str, advice: str = "") -> NoReturn:
    token = _next(source)
    found = "the text ends here" if token.kind == "end" else f"found {token.text}"
    advice = advice or _advice(source, token, expected)
    raise _error(source.text, token.position, f"{expected}, but {found}", advice)


def _advice(source: Source, token: Token, expected: str) -> str:
    word = token.text.lower()
    if word in RESERVED and word not in ADVICE:
        return f'{word} is a function; an attribute of that name is written "{word}"'
    if word in ("and", "or", "not") or expected.startswith(JOIN):
        return ADVICE.get(word, "two conditions are joined with & or |" if token.kind != "end" else "")
    return ""


def _error(text: str, position: int, problem: str, advice: str = "") -> ConditionError:
    if len(text) > LONGEST:
        first = max(0, position - LONGEST // 2)
        text, position = text[first : first + LONGEST], position - first
    shown = "".join(" " if letter.isspace() else letter for letter in text)  # one line, so that the caret fits
    lines = [f"cannot read the condition: {problem}", f"    {shown}", f"    {' ' * position}^"]
    return ConditionError("\n".join([*lines, advice] if advice else lines))
