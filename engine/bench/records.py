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
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from engine import origin
from engine.errors import LaceError
from engine.folders import append_lines
from engine.origin import processor
from engine.text import to_json

PEERS = ("torchdiffeq", "torchode", "jax", "diffrax")
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
        append_lines(path, "")  # a place that cannot be written to is told before anything is measured
        lines = read(path)
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
        text = "".join(to_json(rounded(line), indent=None) + "\n" for line in whole)
        append_lines(self.path, text)
        self.finished |= {name(line) for line in whole if "unavailable" not in line}


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
    """With the instructions of the processor that matter here."""
    flags = processor().get("flags", "").split()
    return {**origin.machine(), **({"features": [flag for flag in FEATURES if flag in flags]} if flags else {})}


def versions() -> dict[str, str]:
    return origin.versions((*origin.PACKAGES, *PEERS))


def figures(value: float, digits: int = 4) -> str:
    """With so many digits that count and no exponent: 20,620 and not 2.062e+04."""
    return f"{float(f'{value:.{digits}g}'):,.10g}"


def counted(number: object, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def is_ours(line: Mapping) -> bool:
    return line["contestant"].partition(",")[0].partition(" ")[0] == "ours"


def is_valid(line: Mapping) -> bool:
    return line.get("check") == "passed" and line.get("median") is not None


def fastest(lines: Sequence[Mapping]) -> Mapping | None:
    return min((line for line in lines if is_valid(line)), key=lambda line: line["median"], default=None)


def some(lines: Sequence[Mapping], **wanted: object) -> list[Mapping]:
    return [line for line in lines if all(line.get(key) == value for key, value in wanted.items())]
