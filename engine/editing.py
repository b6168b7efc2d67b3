"""What an edit adds to the new condition: what it holds on to.

Nie, Vahdat, Anandkumar, NeurIPS 2021, section on sequential editing.
"""

from collections.abc import Sequence
from functools import reduce
from operator import and_

from engine.condition import And, Condition, Keep, Near, keep, near


def holding(names: Sequence[str] | None, keep_weight: float, near_weight: float | None) -> list[Condition]:
    """``keep`` and ``near``, those of them that are asked for."""
    return [*([keep(*names, weight=keep_weight)] if names else []), *([near(near_weight)] if near_weight else [])]


def kept_terms(old: Condition | None, new: Condition) -> list[Condition]:
    """The AND-ed terms of ``old`` whose attributes ``new`` does not mention."""
    terms = old.parts if isinstance(old, And) else () if old is None else (old,)
    mentioned = set(new.attributes())
    return [t for t in terms if not isinstance(t, Near | Keep) and not mentioned & set(t.attributes())]


def conjunction(terms: Sequence[Condition]) -> Condition:
    """All of ``terms``, at least one."""
    return reduce(and_, terms)
