"""What the operating system is asked for when something is written: errors that say so, locks, syncs, renames."""

import contextlib
import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from engine.errors import LaceError, WriteError

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None

MANY = 256  # files, from which one sync of the whole file system is faster than one of each
# Of renameat2(2).
AT_FDCWD, NOREPLACE, EXCHANGE = -100, 1, 2
UNSUPPORTED = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP)
ADVICE = {
    errno.ENOSPC: "free some space on that disk, or choose another place",
    errno.EDQUOT: "free some of your quota, or choose another place",
    errno.EFBIG: "the file system or the process's limit (ulimit -f) allows no file of that size: raise it, or choose "
                 "another place",
    errno.EROFS: "choose a place that is not read-only",
    errno.EACCES: "choose a place that you may write to, or change its permissions",
    errno.EPERM: "choose a place that you may write to, or change its permissions",
    errno.ENOTDIR: "a part of the path is a file: choose another place",
    errno.EEXIST: "a part of the path is a file: choose another place",
    errno.EISDIR: "there is a folder of that name: choose another name",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.EMFILE: "the process may open too few files (ulimit -n): raise the limit",
    errno.EIO: "the disk or its connection fails: look at the system's log",
}


# --- errors -------------------------------------------------------------------------------------------------------


def write_error(what: object, error: OSError) -> WriteError:
    reason = os.strerror(error.errno) if error.errno else str(error)
    advice = ADVICE.get(error.errno or 0, "make sure that there is space and that you may write there")
    found = WriteError(f"cannot write {what}: {reason}; {advice}")
    found.errno = error.errno
    return found


@contextmanager
def explaining(what: object) -> Iterator[None]:
    """Turn an error of the operating system into a WriteError that says what was written and what to do."""
    try:
        yield
    except OSError as error:
        if isinstance(error, LaceError):
            raise
        raise write_error(what, error) from error


# --- locks --------------------------------------------------------------------------------------------------------


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def try_lock(handle: int) -> bool:
    """Lock an open file without waiting; False while another open file has the lock.

    The kernel lets go when the process ends, however it ends. Where a file system has no locks, True.
    """
    if fcntl is None:
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def open_locked(path: Path, flags: int = os.O_CREAT) -> int | None:
    """Open ``path`` for reading and writing and lock it; its descriptor, or None while another process has it.

    Raises OSError if it cannot be opened.
    """
    while True:
        handle = os.open(path, os.O_RDWR | flags | getattr(os, "O_CLOEXEC", 0), 0o666)
        try:
            if not try_lock(handle):
                os.close(handle)
                return None
            # Its last owner may have removed it between our two calls: then it keeps nobody away.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.stat(path), os.fstat(handle)):
                    return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)


# --- to the disk --------------------------------------------------------------------------------------------------


def sync(path: Path) -> None:
    """Wait until a file's content, or the names in a folder, are on the disk."""
    if os.name == "nt":  # opens no folder, and syncs no file that is open for reading
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems have no sync of a folder
            raise
    finally:
        os.close(handle)


def sync_tree(folder: Path) -> None:
    """Wait until a folder is on the disk with all that it holds."""
    paths = [path for path in folder.rglob("*") if not path.is_symlink()]
    if len(paths) > MANY and (syncfs := system_call("syncfs")):
        handle = os.open(folder, os.O_RDONLY)
        try:
            if syncfs(handle) == 0:
                return
        finally:
            os.close(handle)
    for path in (*paths, folder):
        sync(path)


def system_call(name: str) -> Callable | None:
    """A function of the C library, which sets ``ctypes.get_errno()``; None where there is none of that name."""
    import ctypes

    try:
        return getattr(ctypes.CDLL(None, use_errno=True), name)
    except (AttributeError, OSError, TypeError):
        return None


# --- renames ------------------------------------------------------------------------------------------------------


def rename(source: Path, target: Path, flag: int) -> None:
    """renameat2(2), with NOREPLACE or EXCHANGE. Without it, a folder is not renamed over what is not empty either."""
    import ctypes

    renameat2 = system_call("renameat2")
    if renameat2 is not None:
        if renameat2(AT_FDCWD, os.fsencode(source), AT_FDCWD, os.fsencode(target), flag) == 0:
            return
        number = ctypes.get_errno()
    else:
        number = errno.ENOSYS
    if number not in UNSUPPORTED or flag == EXCHANGE:
        raise OSError(number, os.strerror(number), str(source), None, str(target))
    os.rename(source, target)
