"""Files and folders appear whole, stay, and belong to one writer at a time; errors of the system say what to do.

Findings B3 (kills between two renames), B5 (errors of the operating system), B12 (two writers of one folder) and
C12 (an empty folder as --out). The folder's everyday cases are in test_bundle.py, kills at random in test_kills.py.
"""

import errno
import os
import resource
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from engine import disk, folders
from engine.bundle import Bundle
from engine.errors import LaceError, WriteError
from engine.folders import LOCK, OLD, PARTIAL, WHOLE, append_lines, locked, recover, write_atomically, writing_folder
from tests.worlds import linear_world

MARKER = "marker.json"


class Refused(LaceError):
    """As a command would name its own error."""


def write(target, text="new", *, overwrite=False, files=("content",)):
    with writing_folder(target, marker=MARKER, overwrite=overwrite, error=Refused) as folder:
        for name in files:
            (folder / name).write_text(text)
        (folder / MARKER).write_text(text)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def text_of(folder):
    return (folder / "content").read_text()


def run(program, *arguments):
    return subprocess.run([sys.executable, "-c", program, *map(str, arguments)], capture_output=True, text=True,
                          check=False)


def finished_process():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


# --- files --------------------------------------------------------------------------------------------------------


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "array.npy"
    write_atomically(path, lambda file: np.save(file, np.arange(3)))

    def fail(file):
        file.write(b"half")
        raise OSError("8192 requested and 0 written")  # numpy's error of a full disk has no number

    with pytest.raises(WriteError, match=r"cannot write .*array\.npy: 8192 requested and 0 written; make sure"):
        write_atomically(path, fail)
    assert np.array_equal(np.load(path), np.arange(3))
    assert names(tmp_path) == ["array.npy"]


def test_text_and_bytes_are_written_as_they_are_and_folders_are_made(tmp_path):
    write_atomically(tmp_path / "a" / "b", "ä\n")
    write_atomically(tmp_path / "a" / "b", b"\0")
    assert (tmp_path / "a" / "b").read_bytes() == b"\0"


def test_what_dead_processes_left_of_a_file_is_removed_and_what_living_ones_write_is_not(tmp_path):
    program = """
import os, sys, time
from engine.folders import write_atomically
def wait(file):
    file.write(b"half"); file.flush(); print("begun", flush=True); time.sleep(60)
write_atomically(sys.argv[1], wait)
"""
    path = tmp_path / "checkpoint.pt"
    start = partial(subprocess.Popen, [sys.executable, "-c", program, path], stdout=subprocess.PIPE)
    with start() as living, start() as killed:
        for process in (living, killed):
            assert process.stdout
            assert process.stdout.readline()
        killed.kill()
        killed.wait()
        assert len(names(tmp_path)) == 2
        write_atomically(path, b"whole")
        left = names(tmp_path)
        living.kill()
    assert left == [f".checkpoint.pt{PARTIAL}{living.pid}-0", "checkpoint.pt"]
    write_atomically(path, b"whole")
    assert names(tmp_path) == ["checkpoint.pt"]


def test_threads_that_write_one_file_do_not_mix(tmp_path):
    path, wrong = tmp_path / "file", []

    def writer(letter):
        for _ in range(20):
            write_atomically(path, letter * 10_000)
            if len(set(path.read_text())) != 1:
                wrong.append(letter)

    threads = [threading.Thread(target=writer, args=(letter,)) for letter in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert names(tmp_path) == ["file"]


def test_a_device_is_written_to_and_never_replaced(tmp_path):
    link = tmp_path / "null"
    link.symlink_to("/dev/null")
    write_atomically(link, b"gone")
    assert Path("/dev/null").is_char_device()
    assert link.is_symlink()


def test_lines_are_appended_whole_behind_the_last_whole_one(tmp_path):
    path = tmp_path / "log.jsonl"
    append_lines(path, "one\n")
    path.write_text("one\ntw")  # as a killed process leaves it
    append_lines(path, "two\n")
    assert path.read_text() == "one\ntwo\n"


# --- errors of the system -----------------------------------------------------------------------------------------


def test_B5_a_full_disk_is_an_error_that_says_what_was_written_and_what_to_do():
    with pytest.raises(WriteError, match=r"cannot write /dev/full: No space left on device; free some space") as caught:
        write_atomically("/dev/full", b"x" * 100_000)
    assert caught.value.errno == errno.ENOSPC
    assert isinstance(caught.value, OSError)


@pytest.mark.parametrize(("number", "words"), [
    (errno.EROFS, "Read-only file system; choose a place that is not read-only"),
    (errno.EACCES, "Permission denied; choose a place that you may write to"),
    (errno.EDQUOT, "Disk quota exceeded; free some of your quota"),
])
def test_B5_what_the_system_refuses_is_named(tmp_path, monkeypatch, number, words):
    real = os.open

    def refuse(path, flags, *arguments, **options):
        if flags & os.O_CREAT:
            raise OSError(number, os.strerror(number), str(path))
        return real(path, flags, *arguments, **options)

    monkeypatch.setattr(os, "open", refuse)
    for attempt in (lambda: write(tmp_path / "out"), lambda: write_atomically(tmp_path / "out", b"")):
        with pytest.raises(WriteError, match=f"cannot write .*out: {words}"):
            attempt()
    assert names(tmp_path) == []


def test_B5_a_file_in_the_way_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    for attempt in (write, lambda target: write_atomically(target, b"")):
        with pytest.raises(WriteError, match=r"cannot write .*a part of the path is a file"):
            attempt(tmp_path / "file" / "out")


def test_B5_a_file_that_is_too_large_is_named_and_leaves_nothing(tmp_path):
    program = f"""
import resource, signal, sys
from pathlib import Path
from engine.errors import WriteError
from engine.folders import write_atomically, writing_folder
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, {resource.getrlimit(resource.RLIMIT_FSIZE)[1]}))
def folder():
    with writing_folder(Path(sys.argv[1]) / "out", marker="m", overwrite=False, error=WriteError) as partial:
        (partial / "picture.png").write_bytes(b"x" * 10_000)
for attempt in (folder, lambda: write_atomically(Path(sys.argv[1]) / "file", b"x" * 10_000)):
    try:
        attempt()
    except WriteError as error:
        print(error)
"""
    done = run(program, tmp_path)
    first, second = done.stdout.splitlines()
    assert first.startswith(f"cannot write {tmp_path}/out: File too large; "), done.stderr
    assert "ulimit -f" in first
    assert second.startswith(f"cannot write {tmp_path}/file: File too large; ")
    assert names(tmp_path) == []


def test_B5_errors_that_do_not_concern_the_folder_pass(tmp_path):
    def read_another():
        with writing_folder(tmp_path / "out", marker=MARKER, overwrite=False, error=Refused):
            (tmp_path / "missing").read_text()

    with pytest.raises(FileNotFoundError, match="missing"):
        read_another()
    assert names(tmp_path) == []


# --- one writer ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("overwrite", [False, True])
def test_B12_the_second_writer_of_a_folder_ends_with_an_error_at_once(tmp_path, overwrite):
    if overwrite:
        write(tmp_path / "out", "old")
    with writing_folder(tmp_path / "out", marker=MARKER, overwrite=overwrite, error=Refused) as folder:
        (folder / MARKER).write_text("")
        (folder / "content").write_text("first")
        program = """
import sys
from engine.errors import LaceError
from engine.folders import writing_folder
try:
    with writing_folder(sys.argv[1], marker="marker.json", overwrite=True, error=LaceError):
        pass
except LaceError as error:
    print(error)
"""
        said = run(program, tmp_path / "out").stdout
        assert said.startswith(f"another process (number {os.getpid()}) is writing {tmp_path}/out: wait for its end")
        with pytest.raises(Refused, match="another process"):
            write(tmp_path / "out", overwrite=True)  # a second thread is no better
    assert text_of(tmp_path / "out") == "first"
    assert names(tmp_path) == ["out"]


def test_B12_of_many_writers_at_once_one_wins(tmp_path):
    ends = []

    def writer(number):
        try:
            write(tmp_path / "out", str(number))
            ends.append(number)
        except Refused:
            pass

    threads = [threading.Thread(target=writer, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (winner,) = ends
    assert text_of(tmp_path / "out") == str(winner)
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_appears_while_a_folder_is_written_is_left_as_it_is(tmp_path, overwrite):
    def lose_the_race():
        with writing_folder(tmp_path / "out", marker=MARKER, overwrite=overwrite, error=Refused) as folder:
            (folder / MARKER).write_text("")
            (tmp_path / "out").mkdir()
            (tmp_path / "out" / "theirs").write_text("kept")

    with pytest.raises(Refused, match=r"exists already and has no|appeared while"):
        lose_the_race()
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == ["theirs"]


def test_a_lock_that_a_killed_process_left_keeps_nobody_away(tmp_path):
    (tmp_path / f".out{LOCK}").write_text(str(os.getppid()))
    with locked(tmp_path / "out", Refused):
        assert names(tmp_path) == [f".out{LOCK}"]
    assert names(tmp_path) == []


def test_a_lock_is_never_given_twice(tmp_path):
    """The owner removes the file: who had opened it before must not take its lock for the target's."""
    inside, worst = [], []

    def taker():
        for _ in range(200):
            try:
                with locked(tmp_path / "out", Refused):
                    inside.append(1)
                    worst.append(len(inside))
                    inside.pop()
            except Refused:
                pass

    threads = [threading.Thread(target=taker) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert worst
    assert max(worst) == 1


# --- whole --------------------------------------------------------------------------------------------------------


def test_B3_an_overwritten_folder_is_there_at_every_moment(tmp_path):
    write(tmp_path / "out", "0")
    stop, missing, seen = threading.Event(), [], set()

    def reader():
        while not stop.is_set():
            try:
                handle = os.open(tmp_path / "out", os.O_RDONLY)
                seen.add(sorted(os.listdir(handle)) == ["content", MARKER])
                os.close(handle)
            except FileNotFoundError as error:
                missing.append(error)

    thread = threading.Thread(target=reader)
    thread.start()
    for number in range(100):
        write(tmp_path / "out", str(number), overwrite=True)
    stop.set()
    thread.join()
    assert not missing
    assert True in seen


@pytest.mark.parametrize("parts", ["new", "overwritten"])
def test_B3_all_is_on_the_disk_before_the_rename_and_the_name_after_it(tmp_path, monkeypatch, parts):
    if parts == "overwritten":
        write(tmp_path / "out", "old")
    events, fsync, rename = [], os.fsync, disk.rename
    monkeypatch.setattr(os, "fsync", lambda handle: (events.append(os.readlink(f"/proc/self/fd/{handle}")),
                                                     fsync(handle))[1])
    monkeypatch.setattr(folders, "rename", lambda *arguments: (events.append("rename"), rename(*arguments))[1])
    write(tmp_path / "out", files=("content", "picture"), overwrite=True)
    at = events.index("rename")
    synced = {Path(event).name for event in events[:at]}
    assert {"content", "picture", MARKER} <= synced
    assert any(name.startswith(f".out{PARTIAL}") for name in synced)
    assert events[at + 1 :] == [str(tmp_path)]


def test_a_folder_with_many_files_is_synced_with_its_file_system(tmp_path, monkeypatch):
    calls, system_call = [], disk.system_call
    monkeypatch.setattr(disk, "system_call", lambda name: (calls.append(name), system_call(name))[1])
    write(tmp_path / "out", files=[str(i) for i in range(disk.MANY)])
    assert "syncfs" in calls
    assert len(names(tmp_path / "out")) == disk.MANY + 1


@pytest.fixture
def without_exchange(monkeypatch):
    """As on a system that has no renameat2."""
    monkeypatch.setattr(disk, "system_call", lambda name: None)


@pytest.mark.usefixtures("without_exchange")
def test_without_an_exchange_two_renames_do(tmp_path):
    write(tmp_path / "out", "old")
    write(tmp_path / "out", "new", overwrite=True)
    assert text_of(tmp_path / "out") == "new"
    assert names(tmp_path) == ["out"]
    with pytest.raises(Refused, match="exists already"):
        write(tmp_path / "out")


def put_aside(target):
    """What a process leaves that is killed between its two renames."""
    old = target.with_name(f".{target.name}{PARTIAL}{finished_process()}{OLD}")
    target.rename(old)
    return old


def test_B3_a_bundle_that_a_killed_run_put_aside_is_there_at_the_next_opening(tmp_path):
    made = linear_world(tmp_path / "world.lace")
    put_aside(made.path)
    assert Bundle(made.path).hash == made.hash
    assert names(tmp_path) == ["world.lace"]


def test_B3_a_bundle_that_cannot_be_brought_back_is_found(tmp_path, monkeypatch):
    made = linear_world(tmp_path / "world.lace")
    old = put_aside(made.path)

    def refuse(*arguments):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(WriteError, match=f"a killed run left the content of .*world.lace in {old}.*move it there"):
        Bundle(made.path)


def test_a_target_that_a_living_process_replaces_is_not_brought_back(tmp_path):
    write(tmp_path / "out", "old")
    old = put_aside(tmp_path / "out")
    with locked(tmp_path / "out"), pytest.raises(WriteError, match="another process"):
        recover(tmp_path / "out", MARKER)
    assert old.is_dir()


# --- targets that are there ---------------------------------------------------------------------------------------


def test_C12_an_empty_folder_is_accepted_with_its_permissions(tmp_path):
    (tmp_path / "out").mkdir(mode=0o700)
    write(tmp_path / "out")
    assert text_of(tmp_path / "out") == "new"
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o700
    assert names(tmp_path) == ["out"]


def test_a_link_to_a_folder_stays_a_link(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "out").symlink_to("there")
    write(tmp_path / "out", "one")
    write(tmp_path / "out", "two", overwrite=True)
    assert (tmp_path / "out").is_symlink()
    assert text_of(tmp_path / "there") == "two"
    assert names(tmp_path) == ["out", "there"]


def test_the_folder_that_one_stands_in_is_written_into(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = tmp_path.stat().st_ino
    write(".", "one")
    write(".", "two", overwrite=True)
    assert text_of(Path(".")) == "two"
    assert tmp_path.stat().st_ino == before
    assert names(tmp_path) == ["content", MARKER]


@pytest.fixture
def volume(tmp_path, monkeypatch):
    """A folder that is taken for a mounted volume, fresh from mkfs."""
    path = tmp_path / "volume"
    (path / "lost+found").mkdir(parents=True)
    real = os.path.ismount
    monkeypatch.setattr(os.path, "ismount", lambda p: os.fspath(p) == str(path) or real(p))
    return path


def test_C12_a_mounted_volume_is_written_into(volume):
    write(volume, "one", files=("content", "more"))
    assert names(volume) == ["content", "lost+found", MARKER, "more"]
    with pytest.raises(Refused, match="exists already"):
        write(volume)
    write(volume, "two", overwrite=True)
    assert text_of(volume) == "two"
    assert names(volume) == ["content", "lost+found", MARKER]
    assert names(volume.parent) == ["volume"]


def test_a_mounted_volume_has_one_writer(volume):
    with writing_folder(volume, marker=MARKER, overwrite=False, error=Refused) as folder:
        assert folder.parent == volume
        (folder / MARKER).write_text("")
        with pytest.raises(Refused, match="another process"):
            write(volume)


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("kill_at", range(3))
def test_a_volume_whose_filling_was_killed_is_completed_at_the_next_opening(volume, monkeypatch, overwrite, kill_at):
    files = ("content", "more")
    if overwrite:
        write(volume, "old", files=("content", "gone"))
    calls, link = [], folders.link

    def killed(source, target):
        calls.append(target)
        if len(calls) > kill_at:
            raise KeyboardInterrupt
        link(source, target)

    monkeypatch.setattr(folders, "link", killed)
    with pytest.raises(KeyboardInterrupt):
        write(volume, "new", files=files, overwrite=overwrite)
    assert not (volume / MARKER).exists()  # no reader takes a mixture for whole
    assert (volume / f".lace{WHOLE}").is_dir()
    monkeypatch.setattr(folders, "link", link)
    recover(volume, MARKER)
    assert text_of(volume) == "new"
    assert names(volume) == ["content", "lost+found", MARKER, "more"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_mount_that_only_the_rename_notices_is_written_into(tmp_path, monkeypatch, overwrite):
    """A bind mount on its own file system looks like any other folder."""
    (tmp_path / "out").mkdir()
    if overwrite:
        write(tmp_path / "out", "old")

    def busy(*arguments):
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))

    def rename(source, target, **options):
        return busy() if os.fspath(target) == str(tmp_path / "out") else real(source, target, **options)

    real = os.rename
    monkeypatch.setattr(folders, "rename", busy)
    monkeypatch.setattr(os, "rename", rename)
    write(tmp_path / "out", "new", overwrite=overwrite)
    assert text_of(tmp_path / "out") == "new"
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == ["content", MARKER]


@pytest.mark.slow
def test_real_mounts_are_written_into(tmp_path):
    program = """
import os, subprocess, sys
from pathlib import Path
from engine.errors import LaceError
from engine.folders import writing_folder
def write(target, text, overwrite=False):
    with writing_folder(target, marker="m", overwrite=overwrite, error=LaceError) as folder:
        (folder / "m").write_text(text)
for kind, source in (("tmpfs", ["-t", "tmpfs", "none"]), ("bind", ["--bind", sys.argv[1] + "/source"])):
    target = Path(sys.argv[1]) / kind
    target.mkdir()
    subprocess.run(["mount", *source, target], check=True)
    write(target, "one")
    write(target, "two", True)
    assert (target / "m").read_text() == "two"
    assert [path.name for path in target.iterdir()] == ["m"], list(target.iterdir())
print("done")
"""
    (tmp_path / "source").mkdir()
    try:
        done = subprocess.run(["unshare", "--mount", sys.executable, "-c", program, tmp_path], capture_output=True,
                              text=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no unshare(1) here")
    if "Operation not permitted" in done.stderr:
        pytest.skip("this user may not mount")
    assert done.stdout == "done\n", done.stderr
    assert names(tmp_path) == ["bind", "source", "tmpfs"]
