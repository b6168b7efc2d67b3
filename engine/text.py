"""Text from files and arguments, made safe to show: in a terminal or a picture, on a Markdown page, and as JSON.

Names of classes, paths and manifests come from strangers. Every command and report passes what it shows through here.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

# What Markdown reads as more than itself: marks of emphasis, code, links, tables and HTML; a quotation's mark at the
# start of a word; entities; bare addresses; an underscore beside something that is no letter or digit.
MARKDOWN = re.compile(r"[\\`*<\[\]|~]|(?<!\S)>|&(?=#?\w+;)|:(?=//)|(?<=www)\.|@|(?<![^\W_])_|_(?![^\W_])")
BAR = re.compile(r"(\\*)\|")


def visible(text: object, *, lines: bool = False) -> str:
    """The text with escapes (``\\x1b``) in the place of all that is not printable: control characters, terminal
    sequences, marks that turn the direction of writing, lone surrogates.

    lines   keep line breaks, as in a message of several lines
    """
    text = str(text)
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or (lines and c == "\n") else escape(c) for c in text)


def escape(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def markdown(text: object) -> str:
    """The text as words of a Markdown page, also in the cell of a table: it reads as it is and marks nothing up."""
    return MARKDOWN.sub(lambda found: f"\\{found[0]}", visible(text))


def code(text: object) -> str:
    """The text as a code span of Markdown. In the cell of a table its bars need a backslash: see ``table_row``."""
    text = visible(text)
    fence = "`" * (1 + max((len(run) for run in re.findall(r"`+", text)), default=0))
    pad = " " if text.startswith("`") or text.endswith("`") or not text.strip() else ""
    return f"{fence}{pad}{text}{pad}{fence}"


def table_row(cells: Sequence[str]) -> str:
    """Cells, which are Markdown already, as a row of a table: no bar of theirs ends a cell."""
    return f"| {' | '.join(BAR.sub(escaped_bar, cell) for cell in cells)} |"


def escaped_bar(found: re.Match[str]) -> str:
    """A bar behind an odd number of backslashes, which is none that ends a cell."""
    return found[0] if len(found[1]) % 2 else f"{found[1]}\\|"


def to_json(value: Any, *, indent: int | None = 1) -> str:
    """JSON that every reader accepts: ASCII only, and null where a number is not finite."""
    return json.dumps(finite(value), indent=indent, allow_nan=False)


def finite(value: Any) -> Any:
    """The value with None in the place of numbers that JSON has no form for."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [finite(part) for part in value]
    return value
