"""What kills at all moments leave (B3): a few in every run, 500 with the slow tests, by ``benchmarks.kills``."""

import json
import subprocess
import sys

import pytest

QUICK = ("replace a folder", "replace without renameat2", "replace within a volume", "replace a file",
         "sample into a folder")


def kills(tmp_path, *arguments):
    out = tmp_path / "kills.json"
    done = subprocess.run([sys.executable, "-m", "benchmarks.kills", "--out", out, *arguments], capture_output=True,
                          text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text())


def test_what_a_few_kills_leave_is_whole_and_cleaned_by_the_next_run(tmp_path):
    found = kills(tmp_path, "--kills", "15", "--only", *QUICK)
    assert found["kills"] == 15
    assert set(found["actions"]) == set(QUICK)


@pytest.mark.slow
def test_what_500_kills_leave_is_whole_and_cleaned_by_the_next_run(tmp_path):
    assert kills(tmp_path, "--seed", "1")["kills"] == 500


def test_a_torn_state_would_be_counted(tmp_path):
    """The harness itself, on an action that writes without care."""
    program = """
import sys
from benchmarks import kills
def careless(folder, text=kills.NEW):
    for name in ("a", "b", "marker"):
        (folder / "out").mkdir(exist_ok=True)
        (folder / "out" / name).write_text(text)
kills.ACTIONS = {"careless": kills.Action(lambda f: careless(f, kills.OLD), careless, kills.replaced_state, ("out",))}
sys.exit(kills.main(["--kills", "12"]))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert json.loads(done.stdout)["actions"]["careless"]["torn"] > 0
