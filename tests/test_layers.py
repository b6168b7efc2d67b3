"""The arrows between files point down: no circles, and nothing below knows what lies above."""

import pytest

from tests.following_imports import circles, graph, reached

# What a user needs who brings a generator of his own: export, heads, scores, the evaluation of conditions.
OWN_GENERATOR = ("engine", "exporter", "lace_trainer.heads", "lace_trainer.gan", "lace_trainer.data",
                 "lace_trainer.weights", "lace_trainer.judges", "lace_evaluation.goal", "lace_evaluation.goal_report",
                 "lace_evaluation.questions")
# These import the cartoon world where it is asked for: commands by name (--data render:COUNT, or no pictures at all),
# the evaluation where a bundle's attributes are those of that world.
CHOOSING = {"lace_trainer.gan.cli", "lace_trainer.judges.cli", "lace_evaluation.world"}


def is_part_of(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def test_no_file_imports_itself_by_others_when_it_is_imported():
    assert circles(graph()) == []


def test_no_file_imports_itself_by_others_within_its_functions():
    assert circles(graph(late=True)) == []


def test_nothing_below_imports_the_evaluation():
    found = {name: others for name, others in graph(late=True).items() if not is_part_of(name, "lace_evaluation")}
    assert [name for name, others in found.items() if any(is_part_of(o, "lace_evaluation") for o in others)] == []


@pytest.mark.parametrize(("package", "above"), [
    ("engine", ("exporter", "lace_trainer", "lace_evaluation")), ("exporter", ("lace_trainer", "lace_evaluation")),
])
def test_a_package_imports_none_above_it(package, above):
    edges = graph(late=True)
    for name in edges:
        if is_part_of(name, package):
            assert [other for other in edges[name] if any(is_part_of(other, one) for one in above)] == [], name


def test_the_cartoon_world_is_imported_by_nothing_that_another_generator_needs():
    edges = {name: [] if name in CHOOSING else others for name, others in graph(late=True).items()}
    starts = [n for n in edges if any(is_part_of(n, package) for package in OWN_GENERATOR)]
    assert len(starts) > 100
    assert {name for name in reached(edges, *starts) if is_part_of(name, "lace_trainer.faces")} == set()


def test_the_reader_of_imports_finds_what_is_there(tmp_path):
    """A circle at once, one that is closed within a function, one that only a type checker sees."""
    for name, text in {
        "__init__": "", "a": "from p import b\n", "b": "import p.a\n", "c": "from p.d import x\n",
        "d": "def f():\n    from . import c\n", "e": "if TYPE_CHECKING:\n    from p.f import y\n",
        "f": "from p import e",
    }.items():
        (tmp_path / "p").mkdir(exist_ok=True)
        (tmp_path / "p" / f"{name}.py").write_text(text)
    at_once, late = (graph(late=late, root=tmp_path, packages=("p",)) for late in (False, True))
    assert circles(at_once) == [["p.a", "p.b"]]
    assert circles(late) == [["p.a", "p.b"], ["p.c", "p.d"]]
    assert reached(late, "p.f") == {"p.e", "p.f"}
