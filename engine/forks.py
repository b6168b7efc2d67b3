"""What a forked child must make anew: threads of the parent are not there, and locks may be held by them."""

import os
import weakref
from typing import Protocol


class Forked(Protocol):
    def after_fork(self) -> None:
        """Called in a forked child, before anything else runs there."""


REMEMBERED: "weakref.WeakSet[Forked]" = weakref.WeakSet()
ABANDONED: list[object] = []


def remember(owner: Forked) -> None:
    """Call the owner's ``after_fork`` in forked children, as long as it lives."""
    REMEMBERED.add(owner)


def abandon(value: object) -> None:
    """Keep in a child what belongs to the parent's threads: its destructor would wait for them."""
    ABANDONED.append(value)


def call_all() -> None:
    for owner in list(REMEMBERED):
        owner.after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=call_all)
