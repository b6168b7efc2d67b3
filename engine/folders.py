"""Files and folders that appear whole or not at all, and are on the disk when they do.

A file or a folder is written beside its place, synced, and renamed into it; a folder that is replaced changes places
with the new one in a single step. A process that is killed leaves at most hidden entries beside the target, whose
names start with the target's; the next run with the same target removes them.
"""

import contextlib
import errno
import itertools
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from engine.disk import (
    EXCHANGE,
    NOREPLACE,
    UNSUPPORTED,
    explaining,
    is_running,
    open_locked,
    rename,
    sync,
    sync_tree,
    write_error,
)
from engine.errors import LaceError, WriteError

Content = bytes | str | Callable[[BinaryIO], object]
PARTIAL = ".partial-"  # then the number of the process
OLD, LOCK, WHOLE = "-old", ".lock", ".whole"
WITHIN = ".lace"  # begins the names of hidden entries within a target that cannot be renamed
LOST_AND_FOUND = "lost+found"  # of a fresh volume
MOUNTED = (errno.EBUSY, errno.EXDEV)  # what a rename over a mount point ends with
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)  # errors of a write, which name no file


# --- files --------------------------------------------------------------------------------------------------------


def write_atomically(path: str | os.PathLike, content: Content) -> None:
    """Write a file that others find whole or not at all, also when several processes write it: the last one stays.

    content   bytes, text (UTF-8), or a function that writes into the open file (readable too) that it is given

    Raises WriteError, an OSError too.
    """
    path = Path(os.path.realpath(path))
    with explaining(path):
        if path.exists() and not path.is_file():  # /dev/stdout is never replaced
            with open(path, "wb") as file:
                return write_into(file, content)
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_partial_files(path)
        partial, handle = new_partial_file(path)
        with os.fdopen(handle, "w+b") as file:  # whose lock says that it is not left behind
            try:
                write_into(file, content)
                os.fsync(file.fileno())
                os.replace(partial, path)
            except BaseException:
                partial.unlink(missing_ok=True)
                raise
        sync(path.parent)


def write_into(file: BinaryIO, content: Content) -> None:
    if callable(content):
        content(file)
    else:
        file.write(content.encode() if isinstance(content, str) else content)
    file.flush()


def new_partial_file(path: Path) -> tuple[Path, int]:
    """An empty file beside ``path``, open and locked. Other threads, and other containers, may have our number."""
    for number in itertools.count():
        partial = beside(path, f"{PARTIAL}{os.getpid()}-{number}")
        with contextlib.suppress(FileExistsError):
            handle = open_locked(partial, os.O_CREAT | os.O_EXCL)
            if handle is not None:
                return partial, handle
    raise AssertionError


def remove_partial_files(path: Path) -> None:
    """Remove what killed processes left of ``path``. Those that are still being written are locked."""
    for partial in beginning_with(beside(path, PARTIAL)):
        with contextlib.suppress(OSError):
            if is_left_behind(partial) and (handle := open_locked(partial, 0)) is not None:
                partial.unlink(missing_ok=True)
                os.close(handle)


def append_lines(path: Path, text: str) -> None:
    """Append whole lines in one write; what a killed process left behind the last whole line is cut off first."""
    with explaining(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "ab+") as file:
            file.seek(0)
            end = file.read().rfind(b"\n") + 1
            file.truncate(end)
            try:
                file.write(text.encode())
                file.flush()
                os.fsync(file.fileno())
            except OSError:
                os.truncate(path, end)
                raise


# --- folders ------------------------------------------------------------------------------------------------------


@contextmanager
def locked(target: str | os.PathLike, error: type[LaceError] = LaceError) -> Iterator[None]:
    """Be the only process that writes ``target``. Raises ``error`` at once while another one writes it.

    The lock is a hidden file beside the target, and is removed at the end.
    """
    target = Path(os.path.realpath(target))
    path = target / f"{WITHIN}{LOCK}" if is_fixed(target) else beside(target, LOCK)
    with explaining(target):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = open_locked(path)
    if handle is None:
        raise error(f"another process{owner(path)} is writing {target}: wait for its end, or choose another --out")
    try:
        with contextlib.suppress(OSError):  # on a full disk the lock holds without its owner's number too
            os.truncate(handle, 0)
            os.write(handle, str(os.getpid()).encode())
        yield
    finally:
        path.unlink(missing_ok=True)  # before the lock ends, or it could be somebody else's
        os.close(handle)


def owner(lock: Path) -> str:
    """The number of the process that holds a lock, as a part of a sentence."""
    with contextlib.suppress(OSError, ValueError):
        return f" (number {int(lock.read_text())})"
    return ""


@contextmanager
def writing_folder(
    target: str | os.PathLike, *, marker: str, overwrite: bool, error: type[LaceError]
) -> Iterator[Path]:
    """A hidden folder beside ``target`` that becomes ``target`` when the block ends without an error.

    target   may be an empty folder; one that cannot be renamed (a mounted volume) is written into
    marker   the file that makes a folder one of ours: it must be there at the end, and only a folder that has
             it is ever replaced

    Raises ``error``, also while another process writes the same target; WriteError if the system cannot write.
    """
    target = Path(os.path.realpath(target))
    with locked(target, error):
        with explaining(target):
            settle(target, marker)
            check_free(target, marker, overwrite, error)
            partial = partial_folder(target)
            partial.mkdir()
        try:
            with explaining_within(partial, target):
                yield partial
            if not (partial / marker).is_file():
                raise error(f"internal error: {marker} of {target} was not written")
            with explaining(target):
                sync_tree(partial)
                put_in_place(partial, target, marker, overwrite, error)
        finally:
            remove(partial)


def check_free(target: Path, marker: str, overwrite: bool, error: type[LaceError]) -> None:
    if not target.exists() or is_empty(target):
        return
    if not (target / marker).is_file():
        raise error(f"{target} exists already and has no {marker}: it is never overwritten; choose another --out")
    if not overwrite:
        raise error(f"{target} exists already: choose another --out, or pass --overwrite")


@contextmanager
def explaining_within(partial: Path, target: Path) -> Iterator[None]:
    """As ``explaining``, but only what concerns the files of ``partial``: a block reads other files too."""
    try:
        yield
    except OSError as error:
        name = error.filename if isinstance(error.filename, str) else ""
        if isinstance(error, LaceError) or not (name.startswith(str(partial)) or (not name and error.errno in FULL)):
            raise
        raise write_error(str(target) + name.removeprefix(str(partial)), error) from error


def put_in_place(partial: Path, target: Path, marker: str, overwrite: bool, error: type[LaceError]) -> None:
    """Make the whole folder ``partial`` the target, in one step where the target can be renamed."""
    if partial.parent == target:
        return pour(partial, target, marker)
    try:
        if not os.path.lexists(target):
            rename(partial, target, NOREPLACE)
        elif is_empty(target):
            shutil.copymode(target, partial)
            os.rename(partial, target)
        else:
            check_free(target, marker, overwrite, error)
            shutil.copymode(target, partial)
            exchange(partial, target)
    except OSError as reason:
        if reason.errno in MOUNTED:
            return pour(partial, target, marker)
        if reason.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
            raise
        raise error(f"{target} appeared while it was being written: it was left as it is; choose another --out"
                    ) from reason
    sync(target.parent)


def exchange(partial: Path, target: Path) -> None:
    """Let both change places. In two renames where there is no single step; ``settle`` mends what lies between."""
    try:
        rename(partial, target, EXCHANGE)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        old = partial.with_name(partial.name + OLD)
        os.rename(target, old)
        os.rename(partial, target)
        sync(target.parent)
        remove(old)


def pour(partial: Path, target: Path, marker: str) -> None:
    """Fill a target that cannot be renamed. From the rename to WHOLE on, ``settle`` completes what was begun."""
    inner = partial
    if partial.parent != target:
        inner = target / f"{WITHIN}{PARTIAL}{os.getpid()}"
        shutil.copytree(partial, inner)
        sync_tree(inner)
    whole = target / f"{WITHIN}{WHOLE}"
    os.rename(inner, whole)
    sync(target)
    pour_out(whole, target, marker)


def pour_out(whole: Path, target: Path, marker: str) -> None:
    """Replace the target's content by that of ``whole``, the marker first to go and last to come; may be repeated."""
    (target / marker).unlink(missing_ok=True)
    for path in entries(target):
        remove(path)
    for path in sorted(whole.iterdir(), key=lambda path: path.name == marker):
        if path.name == marker:
            sync_tree(target)
        if path.is_dir():
            shutil.copytree(path, target / path.name, copy_function=link)
        else:
            link(path, target / path.name)
    sync(target / marker)
    sync(target)
    remove(whole)


def link(source: str | os.PathLike, target: str | os.PathLike) -> None:
    """A second name for a file; a copy where the file system has no links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def recover(target: str | os.PathLike, marker: str) -> None:
    """Bring back a folder that a run left aside which was killed while it replaced it; for its readers.

    Raises WriteError, which names the place, if it cannot be brought back.
    """
    target = Path(os.path.realpath(target))
    left = [path for path in (*put_aside(target), target / f"{WITHIN}{WHOLE}") if path.is_dir()]
    if not left:
        return
    try:
        with locked(target, WriteError):
            settle(target, marker)
    except OSError as error:
        if not error.errno:  # somebody else is writing it
            raise
        raise WriteError(f"a killed run left the content of {target} in {left[0]}, and it cannot be moved back "
                         f"({os.strerror(error.errno)}): move it there yourself") from error


def settle(target: Path, marker: str) -> None:
    """End what a killed run with the same target began; the caller holds the target's lock."""
    whole = target / f"{WITHIN}{WHOLE}"
    if whole.is_dir():
        pour_out(whole, target, marker)
    for old in put_aside(target):
        if not target.exists():
            os.rename(old, target)
            sync(target.parent)
    for path in (*beginning_with(beside(target, PARTIAL)), *beginning_with(target / f"{WITHIN}{PARTIAL}")):
        if is_left_behind(path):
            remove(path)


def put_aside(target: Path) -> list[Path]:
    return [path for path in beginning_with(beside(target, PARTIAL)) if path.name.endswith(OLD)]


def is_left_behind(path: Path) -> bool:
    """Does the process that made a partial file or folder no longer run?

    One with our own number is not ours: the caller has made none yet, and in a container each run may have the same.
    """
    pid = path.name.rpartition(PARTIAL)[2].partition("-")[0]
    return not pid.isdigit() or int(pid) == os.getpid() or not is_running(int(pid))


# --- names --------------------------------------------------------------------------------------------------------


def beside(target: Path, ending: str) -> Path:
    return target.parent / f".{target.name}{ending}"


def is_fixed(target: Path) -> bool:
    """Is it a folder that cannot be renamed: a mounted volume, or one in a folder that we may not write to?"""
    return target.is_dir() and (os.path.ismount(target) or not os.access(target.parent, os.W_OK))


def partial_folder(target: Path) -> Path:
    """Where a folder lies until it is whole: within a target that is fixed, or that a shell may stand in; or beside."""
    ending = f"{PARTIAL}{os.getpid()}"
    within = is_fixed(target) or (target.is_dir() and Path.cwd().is_relative_to(target))
    return target / f"{WITHIN}{ending}" if within else beside(target, ending)


def beginning_with(path: Path) -> list[Path]:
    """The entries of a folder whose names begin with that of ``path``."""
    if not path.parent.is_dir():
        return []
    return sorted(entry for entry in path.parent.iterdir() if entry.name.startswith(path.name))


def entries(folder: Path) -> list[Path]:
    """The entries of a folder that are neither ours to hide nor the file system's."""
    return [entry for entry in folder.iterdir()
            if entry.name != LOST_AND_FOUND and not entry.name.startswith(f"{WITHIN}.")]


def is_empty(path: Path) -> bool:
    return path.is_dir() and not entries(path)


def remove(path: Path) -> None:
    """Remove a file or a folder with all that it holds, as far as possible."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()
