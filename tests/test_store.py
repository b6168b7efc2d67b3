"""Which files make a finished cell of an evaluation stale (a fault that house.md lists: rows.h was forgotten)."""

import pytest

from engine import sources
from lace_evaluation import store


@pytest.fixture
def code(tmp_path, monkeypatch):
    """The code of the evaluation, by name; ``change`` gives a file another content for the hash alone."""
    files = store.code_files()

    def change(name):
        other = tmp_path / "changed"
        other.write_bytes(files[name].read_bytes() + b"\n// changed")
        monkeypatch.setattr(store, "code_files", lambda: {**files, name: other})

    files_of = dict(files)
    return files_of, change


@pytest.mark.parametrize("name", [
    "kernels/cpu/rows.h", "kernels/gauss_newton.cuh", "engine/cuda/solve.py", "engine/native/library.py",
    "engine/solvers/gauss_newton.py", "lace_trainer/faces/render.py", "lace_evaluation/baselines.py",
])
def test_a_change_of_what_decides_a_cell_makes_it_stale(code, name):
    files, change = code
    assert name in files
    before = store.code_hash()
    change(name)
    assert store.code_hash() != before


@pytest.mark.parametrize("name", ["lace_evaluation/plots.py", "lace_evaluation/report.py", "engine/cli/sample.py",
                                  "engine/bench/report.py"])
def test_what_only_shows_results_makes_nothing_stale(code, name):
    assert (store.ROOT / name).is_file()
    assert name not in code[0]


def test_every_source_of_the_kernels_counts(code):
    names = {f"kernels/{path.relative_to(sources.folder()).as_posix()}" for path in sources.folder().rglob("*")
             if path.suffix in (".h", ".cpp", ".cuh", ".cu")}
    assert len(names) > 10
    assert names <= set(code[0])


def test_a_file_that_is_added_counts_by_itself(tmp_path, monkeypatch):
    for package in store.PACKAGES:
        (tmp_path / package).mkdir()
    (tmp_path / "engine" / "new.py").write_text("")
    monkeypatch.setattr(store, "ROOT", tmp_path)
    assert "engine/new.py" in store.code_files()


def test_a_cell_of_other_code_is_made_again(tmp_path):
    made = []

    def make():
        made.append(1)
        return store.Cell({})

    for code in ("a", "a", "b"):
        store.Store(tmp_path, {"code": code}).cell("cell", make)
    assert len(made) == 2
