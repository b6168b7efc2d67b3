"""Measurements as JSON lines: appended whole, never changed, skipped when they are there already.

A line holds one contestant's result in one setting::

    suite, contestant      'solve', 'ours'                        } with the setting,
    world, rows, ...       what was measured: the setting         } the name of the measurement
    median, q1, q3         milliseconds, of ``repeats`` runs; or another ``unit``
    check                  'passed', or what is wrong with the answer; no time counts without one
    unavailable            instead of the above: why there is nothing to measure
    machine, versions, commit, threads, quick
"""

import json
import os
import platform
from collections.abc import Iterable, Mapping
from pathlib import Path

from engine import origin
from engine.errors import LaceError
from engine.origin import git, processor
from engine.text import to_json

PACKAGES = ("numpy", "onnxruntime", "openvino", "torch", "torchdiffeq", "torchode", "jax", "diffrax")
FEATURES = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "amx_tile")
# What a line's name does not depend on: two lines that agree in everything else are the same measurement.
RESULTS = frozenset({
    "median", "q1", "q3", "repeats", "unit", "evaluations", "energy", "floor_energy", "trajectory_error", "psnr",
    "check", "unavailable", "note", "machine", "versions", "details",
})


class RecordError(LaceError):
    """A file of measurements cannot be read."""


class Log:
    """A file of JSON lines. ``common`` goes into every line: commit, threads, machine."""

    def __init__(self, path: Path, common: Mapping):
        self.path, self.common = path, dict(common)
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            drop_partial_line(path)
        lines = read(path) if path.exists() else []
        self.finished = {name(line) for line in lines if "unavailable" not in line}
        self.missing = {(name(line), line["unavailable"]) for line in lines if "unavailable" in line}

    def has(self, setting: Mapping) -> bool:
        """Is this measurement there, of the same commit, machine and number of threads?"""
        return name(self.common | dict(setting)) in self.finished

    def write(self, lines: Iterable[Mapping]) -> None:
        """Append all ``lines`` in one write, so that a killed run leaves no half of a comparison.

        What could not be measured is tried again by the next run, but told only once.
        """
        whole = [dict(line) | self.common for line in lines]
        whole = [line for line in whole if (name(line), line.get("unavailable")) not in self.missing]
        text = "".join(to_json(rounded(line), indent=None) + "\n" for line in whole).encode()
        handle = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            os.write(handle, text)
            os.fsync(handle)
        finally:
            os.close(handle)
        self.finished |= {name(line) for line in whole if "unavailable" not in line}


def drop_partial_line(path: Path) -> None:
    """Cut off what a killed run left behind the last whole line: the next line must not continue it."""
    with open(path, "rb+") as file:
        file.truncate(file.read().rfind(b"\n") + 1)


def name(line: Mapping) -> str:
    """What a measurement is known by."""
    cpu = line.get("machine", {}).get("cpu")
    return json.dumps({"cpu": cpu, **{k: v for k, v in line.items() if k not in RESULTS}}, sort_keys=True)


def read(path: Path) -> list[dict]:
    """The lines of a file, the last where a name comes twice. Raises RecordError, which names the bad line."""
    lines: dict[str, dict] = {}
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecordError(f"cannot read {path}: {error}; expected a file that lace-bench run wrote") from error
    for number, part in enumerate(text.splitlines(keepends=True), start=1):
        if not part.endswith("\n"):
            break  # cut off by a killed run
        try:
            line = json.loads(part)
            suite, contestant = line["suite"], line["contestant"]
        except (ValueError, TypeError, KeyError) as error:
            raise RecordError(f"{path}, line {number} is no measurement ({error!r}): remove it") from error
        if not isinstance(suite, str) or not isinstance(contestant, str):
            raise RecordError(f"{path}, line {number} has no suite or contestant: remove it")
        lines[name(line)] = line
    return list(lines.values())


def rounded(value):
    """Five digits are more than a clock is worth."""
    if isinstance(value, dict):
        return {key: rounded(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(part) for part in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def machine() -> dict:
    """The processor, how many cores this process may use, and what instructions it has that matter here."""
    facts: dict = {"system": f"{platform.system()} {platform.machine()}", "cpu": platform.processor() or "unknown"}
    facts["cores"] = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if first := processor():
        facts["cpu"] = f"{first.get('model name', facts['cpu'])} (model {first.get('model', '?')})"
        facts["features"] = [flag for flag in FEATURES if flag in first.get("flags", "").split()]
    return facts


def versions() -> dict[str, str]:
    return origin.versions(PACKAGES)


def commit() -> str:
    """The commit of the code beside this file with a + where files were changed since; or 'installed'."""
    root = Path(__file__).resolve().parent.parent.parent
    # An installed copy may lie below somebody else's repository.
    if git(root, "ls-files", "engine/bench/records.py") == "":
        return "installed"
    changed = git(root, "status", "--porcelain", "--untracked-files=no")
    return git(root, "rev-parse", "--short=12", "HEAD") + ("+" if changed else "")


def figures(value: float, digits: int = 4) -> str:
    """With so many digits that count and no exponent: 20,620 and not 2.062e+04."""
    return f"{float(f'{value:.{digits}g}'):,.10g}"
