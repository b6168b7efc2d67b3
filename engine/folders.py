"""Folders and files that appear whole or not at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from glob import escape
from pathlib import Path

from engine.errors import LaceError

PARTIAL = ".partial-"


@contextmanager
def writing_folder(
    target: str | os.PathLike, *, marker: str, overwrite: bool, error: type[LaceError]
) -> Iterator[Path]:
    """A hidden folder beside ``target`` that becomes ``target`` when the block ends without an error.

    marker   the file that makes a folder one of ours: it must be there at the end, and only a folder that has
             it is ever replaced
    An interrupted run leaves at most the hidden folder, which the next run with the same target removes.
    """
    target = Path(target).absolute()
    remove_stale(target)  # first: it may bring back a target that a killed run had put aside
    if target.exists() and not overwrite:
        raise error(f"{target} exists already: choose another --out, or pass --overwrite")
    if target.exists() and not (target / marker).is_file():
        raise error(f"{target} exists and has no {marker}: it is never overwritten; choose another --out")
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}{PARTIAL}{os.getpid()}")
    partial.mkdir()
    try:
        yield partial
        if not (partial / marker).is_file():
            raise error(f"internal error: {marker} of {target} was not written")
        old = target.with_name(f".{target.name}{PARTIAL}{os.getpid()}-old")
        if target.exists():
            os.rename(target, old)
        os.rename(partial, target)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def remove_stale(target: Path) -> None:
    """Remove what a killed run with the same target left, unless its process still runs."""
    for folder in target.parent.glob(f".{escape(target.name)}{PARTIAL}*"):
        pid = folder.name.rpartition(PARTIAL)[2].partition("-")[0]
        if folder.name.endswith("-old") and not target.exists():
            os.rename(folder, target)  # killed between two renames: the old folder is whole, bring it back
        elif not (pid.isdigit() and int(pid) != os.getpid() and is_running(int(pid))):
            # Our own number: in a container each run may have the same.
            shutil.rmtree(folder, ignore_errors=True)


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file that others find whole or not at all, also when several processes write it."""
    partial = path.with_name(f".{path.name}{PARTIAL}{os.getpid()}")
    try:
        partial.write_bytes(content)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
