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

from benchmarks import config_f, readme
from engine.grammar import parse

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
COMMANDS = {
    "lace-sample": "engine.cli.sample",
    "lace-edit": "engine.cli.edit",
    "lace-verify": "engine.cli.verify",
    "lace-bench": "engine.cli.bench",
    "lace-export": "exporter.cli",
    "lace-train": "lace_trainer.cli",
    "lace-eval": "lace_evaluation.cli",
}
# Of `python -m lace_trainer.faces`, of argparse itself, and of pip.
OTHER_OPTIONS = {"--help"}


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


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=named)
def test_python_of_the_pages_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for i, block in enumerate(blocks(page, "python")):
        exec(compile(block, f"{page.name}, block {i + 1}", "exec"), {"__name__": "page"})


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
    parsers = [*map(build_parser, COMMANDS), config_f.build_parser(), readme.build_parser()]
    known = OTHER_OPTIONS.union(*map(options, parsers))
    found = set(re.findall(r"(?<![\w<-])--[a-z][a-z0-9-]*", page.read_text(encoding="utf-8")))
    assert found <= known


def test_files_that_are_named_exist():
    """Paths like `engine/verify.py` in the pages, so that a renamed file is noticed."""
    for page in PAGES:
        for path in re.findall(r"`((?:engine|kernels|exporter|trainer|tests|benchmarks)/[\w/.]+)", page.read_text()):
            assert (ROOT / path).exists(), f"{page.name} names {path}"


def test_numbers_of_the_readme_are_those_of_the_results():
    assert readme.main(["--check"]) == 0


def test_numbers_are_written_between_the_markers(tmp_path):
    page = tmp_path / "README.md"
    page.write_text(f"before\n{readme.BEGIN}\nOUTDATED\n{readme.END}\nafter\n")
    line = {"attributes": 1, "conditions": 4, "least_acc": 0.96, "mean_acc": 0.98, "mean_error": None,
            "most_error": None, "mean_whole": 0.98, "missed": []}
    body = {"summary": [line], "judge": {}, "goal": {"class": 0.95, "value_error": 0.1, "tolerance": 0.1}, "count": 256,
            "bundle": "0" * 64, "commit": None, "seconds": 9.0, "machine": {"cores": 2}}
    (tmp_path / "eval.json").write_text(json.dumps(body))
    counts = dict.fromkeys(("submitted", "refused", "ended", "finished", "late", "cancelled"), 7)
    soak = {"benchmark": "soak", "seconds": 1200.0, "threads": 8, "counts": counts, "solved_again": 500, "commit": None,
            "memory": {"warm_mib": 134.0, "end_mib": 141.0}, "checks": {"memory is flat": False}}
    (tmp_path / "soak.json").write_text(json.dumps(soak))
    arguments = ["--readme", str(page), "--results", str(tmp_path)]
    assert readme.main([*arguments, "--check"]) == 1
    assert readme.main(arguments) == 0
    assert readme.main([*arguments, "--check"]) == 0
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "96.0 %" in text
    assert "- memory is flat: **no**" in text
    assert "OUTDATED" not in text
