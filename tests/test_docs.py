"""What the documents say: conditions parse, code runs, links lead somewhere, options exist."""

import argparse
import importlib
import json
import re
import runpy
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks import config_f, kills, readme, report, run, soak
from engine.grammar import parse

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
# Pages whose blocks build on each other, commands included.
TUTORIALS = [ROOT / "docs/your-own-generator.md"]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
COMMANDS = {
    "lace-sample": "engine.cli.sample",
    "lace-edit": "engine.cli.edit",
    "lace-info": "engine.cli.info",
    "lace-verify": "engine.cli.verify",
    "lace-bench": "engine.cli.bench",
    "lace-export": "exporter.cli",
    "lace-train": "lace_trainer.cli",
    "lace-eval": "lace_evaluation.cli",
}
# Of argparse itself, and of pip.
OTHER_OPTIONS = {"--help", "--force-reinstall", "--no-deps", "--extra-index-url", "--sanitize"}


def blocks(page: Path, kind: str) -> list[str]:
    """Contents of the page's fenced blocks of one kind."""
    return re.findall(rf"^```{re.escape(kind)}\n(.*?)^```$", page.read_text(encoding="utf-8"), re.M | re.S)


def command_lines(page: Path) -> Iterator[list[str]]:
    """Words of each lace command in the page's shell blocks and in its tables of examples."""
    for block in blocks(page, "sh"):
        yield from (
            shlex.split(line, comments=True)
            for line in block.replace("\\\n", " ").splitlines()
            if line.startswith("lace-")
        )
    for line in page.read_text(encoding="utf-8").splitlines():
        if re.match(r"\| `lace-\w+` \|", line):
            yield from (shlex.split(code) for code in re.findall(r"`(lace-\w+ [^`]*)`", line))


def build_parser(command: str) -> argparse.ArgumentParser:
    return importlib.import_module(COMMANDS[command]).build_parser()


def options(parser: argparse.ArgumentParser) -> Iterator[str]:
    """Option names of a parser and of its commands."""
    for action in parser._actions:
        yield from action.option_strings
        if isinstance(action, argparse._SubParsersAction):
            for inner in action.choices.values():
                yield from options(inner)


def named(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def test_conditions_of_the_language_reference_parse():
    (block,) = blocks(ROOT / "docs/conditions.md", "text conditions")
    for line in block.splitlines():
        assert parse(str(parse(line))) == parse(line)


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python") and p not in TUTORIALS], ids=named)
def test_python_of_the_pages_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for i, block in enumerate(blocks(page, "python")):
        exec(compile(block, f"{page.name}, block {i + 1}", "exec"), {"__name__": "page"})


@pytest.mark.parametrize("page", TUTORIALS, ids=named)
def test_a_tutorial_runs_word_by_word(page, tmp_path, monkeypatch):
    """Its blocks in their order: what begins with # NAME.py is that file, python runs, and so does each command."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    text, files = page.read_text(encoding="utf-8"), []
    for i, (kind, block) in enumerate(re.findall(r"^```(python|sh)\n(.*?)^```$", text, re.M | re.S)):
        if name := re.match(r"# (\w+)\.py\n", block):
            (tmp_path / f"{name[1]}.py").write_text(block, encoding="utf-8")
            files.append(name[1])
        elif kind == "python":
            exec(compile(block, f"{page.name}, block {i + 1}", "exec"), {"__name__": "page"})
        else:
            for program, *arguments in map(shlex.split, block.splitlines()):
                assert importlib.import_module(COMMANDS[program]).main(arguments) == 0, block
    for name in files:
        sys.modules.pop(name, None)


@pytest.mark.parametrize("example", EXAMPLES, ids=named)
def test_examples_run_and_are_short(example, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert len(example.read_text(encoding="utf-8").splitlines()) <= 30
    monkeypatch.setattr(sys, "argv", [str(example)])
    runpy.run_path(str(example), run_name="__main__")
    assert Path(f"{example.stem}.png").is_file()


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if not re.match(r"[a-z]+:", target):
            assert (page.parent / target.partition("#")[0]).exists(), target


@pytest.mark.parametrize("page", [page for page in PAGES if list(command_lines(page))], ids=named)
def test_command_lines_are_understood(page):
    for program, *arguments in command_lines(page):
        extra = build_parser(program).parse_known_args(arguments)[1]
        assert not extra, f"{program} does not know {extra}"


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_options_that_are_named_exist(page):
    scripts = (config_f, kills, readme, report, run, soak)
    parsers = [*map(build_parser, COMMANDS), *(script.build_parser() for script in scripts)]
    known = OTHER_OPTIONS.union(*map(options, parsers))
    found = set(re.findall(r"(?<![\w<-])--[a-z][a-z0-9-]*", page.read_text(encoding="utf-8")))
    assert found <= known


def test_files_that_are_named_exist():
    """Paths like `engine/verify.py` in the pages, so that a renamed file is noticed."""
    for page in PAGES:
        for path in re.findall(r"`((?:engine|kernels|exporter|lace_\w+|tests|benchmarks)/[\w/.]+)", page.read_text()):
            assert (ROOT / path).exists(), f"{page.name} names {path}"


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 120


def test_the_citation_is_valid():
    """The fields that version 1.2 of the format demands."""
    yaml = pytest.importorskip("yaml")
    body = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "title", "message", "authors"} <= set(body)
    for work in (body["preferred-citation"], *body["references"]):
        assert {"type", "title", "authors"} <= set(work)
        assert all({"family-names", "given-names"} <= set(author) for author in work["authors"])


# --- generated numbers --------------------------------------------------------------------------------------------


def test_numbers_of_the_pages_are_those_of_the_results():
    assert readme.main(["--check"]) == 0


@pytest.fixture
def results(tmp_path) -> Path:
    """A folder of results in which only the evaluation, a failed soak and kills are there."""
    folder = tmp_path / "results"
    folder.mkdir()
    line = {"attributes": 1, "conditions": 4, "least_acc": 0.96, "mean_acc": 0.98, "mean_error": None,
            "most_error": None, "mean_whole": 0.98, "missed": []}
    body = {"summary": [line], "judge": {}, "goal": {"class": 0.95, "value_error": 0.1, "tolerance": 0.1}, "count": 256,
            "bundle": "0" * 64, "commit": None, "seconds": 9.0, "machine": {"cores": 2}}
    (folder / "eval.json").write_text(json.dumps(body))
    counts = dict.fromkeys(("submitted", "refused", "ended", "finished", "late", "cancelled"), 7)
    body = {"benchmark": "soak", "seconds": 1200.0, "threads": 8, "counts": counts, "solved_again": 500, "commit": None,
            "memory": {"warm_mib": 134.0, "end_mib": 141.0}, "checks": {"memory is flat": False},
            "machine": {"cores": 2}}
    (folder / "soak.json").write_text(json.dumps(body))
    found = {"kills": 50, "old": 30, "new": 19, "torn": 1, "left_behind": 0, "failed": 0}
    body = {"benchmark": "kills", "kills": 50, "actions": {"overwrite": found}, "machine": {"cores": 2}, "commit": None}
    (folder / "kills.json").write_text(json.dumps(body))
    return folder


def test_numbers_are_written_between_the_markers(tmp_path, results):
    for name in readme.PAGES:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"before\n{readme.BEGIN}\nOUTDATED\n{readme.END}\nafter\n")
    arguments = ["--root", str(tmp_path), "--results", str(results)]
    assert readme.main([*arguments, "--check"]) == 1
    assert readme.main(arguments) == 0
    assert readme.main([*arguments, "--check"]) == 0
    text = {name: (tmp_path / name).read_text() for name in readme.PAGES}
    assert all(page.startswith("before\n") and page.endswith("after\n") for page in text.values())
    assert "OUTDATED" not in "".join(text.values())
    assert "98.0 % with one" in text["README.md"]
    assert "**failed**: memory is flat" in text["README.md"]
    assert "96.0 %" in text[readme.OBEDIENCE]
    assert "| memory is flat | **no** |" in text[readme.RELIABILITY]
    assert "| overwrite | 50 | 30 | 19 | 1 | 0 | 0 |" in text[readme.RELIABILITY]
    assert readme.NOTHING in text[readme.CONFIG_F]


def test_a_page_without_markers_and_a_foreign_result_are_errors(tmp_path, results, capsys):
    (tmp_path / "README.md").write_text("no markers")
    assert readme.main(["--root", str(tmp_path), "--results", str(results)]) == 2
    assert "lacks" in capsys.readouterr().err
    (results / "other.json").write_text("{}")
    assert readme.main(["--results", str(results), "--check"]) == 2
    assert "is of none of" in capsys.readouterr().err


def speed_line(contestant: str, median: float, **facts) -> dict:
    return {"suite": "solve", "world": "ffhq", "attributes": 3, "rows": 16, "contestant": contestant, "median": median,
            "check": "passed", "energy": 0.01, "trajectory_error": 0.1, **facts}


def test_A8_the_readme_gives_the_defaults_number_and_says_where_it_is_less_accurate():
    lines = [speed_line("paper", 3000.0), speed_line("diffrax heun", 100.0), speed_line("ours, 6 steps", 1.0),
             speed_line("ours, bf16-jacobian", 5.0), speed_line("ours", 10.0)]
    _, found, _ = readme.solve_line(lines)
    assert found.startswith("10 ms: 300 times as fast as the paper's method, 10 times as fast as `diffrax heun`")
    assert "no less accurate" in found
    _, found, _ = readme.solve_line([*lines[:-1], speed_line("ours", 10.0, trajectory_error=0.2)])
    assert "; less accurate than the paper's method in trajectory_error" in found
