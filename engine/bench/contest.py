"""A contest: contestants in one setting, raced, judged, written down."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from numpy import ndarray as Array

from engine.bench.problem import Judge, Problem
from engine.bench.records import Log
from engine.bench.timing import race
from engine.bundle import Bundle
from engine.errors import LaceError
from engine.runtimes import RUNTIMES, MissingRuntime, open_runtime

ROUNDS, ROUNDS_QUICK = 5, 2
Run = Callable[[], Any]
# Opens a contestant: loads, compiles, and returns what is timed. Raises Unavailable with the reason if it cannot.
Openers = dict[str, Callable[[], Run]]
# What a contestant's answer is worth: fields of its line, with "check".
Examine = Callable[[Any], Mapping[str, Any]]


class Unavailable(LaceError):
    """A contestant cannot take part: a package or a compiler is missing, or it would take minutes a run."""


@dataclass(frozen=True, slots=True)
class Answer:
    """The end of a solve: z (rows, z_dim), each row's evaluations (rows,) or the batch's, rows that did not arrive."""

    z: Array
    evaluations: Array | int
    failed: int = 0
    note: str = ""


def nobody(*_: object) -> Openers:
    return {}


@dataclass(frozen=True, slots=True)
class Peers:
    """Others that are compared with: the contestants of each suite. A user's own bundle is measured without any."""

    solvers: Callable[[Problem], Openers] = nobody
    fields: Callable[[Problem], Openers] = nobody
    decoders: Callable[[Bundle, Array], Openers] = nobody
    pictures: Callable[[Bundle, Problem], Openers] = nobody


@dataclass(frozen=True, slots=True)
class Bench:
    """What a run of suites shares. ``say`` is told what goes on; ``judge`` keeps converged solves in its folder."""

    bundle: Bundle
    pictured: tuple[Bundle, ...]  # the bundles that can draw, which decode and end-to-end measure
    log: Log
    judge: Judge
    peers: Peers
    threads: int
    quick: bool
    say: Callable[[str], None]
    only: str = ""  # contestants whose name contains it

    def contest(self, setting: Mapping, openers: Openers, examine: Examine, *, rounds: int | None = None) -> None:
        """Race the contestants that are not measured yet, and write all their lines at once."""
        wanted = {name: opener for name, opener in openers.items()
                  if self.only in name and not self.log.has({**setting, "contestant": name})}
        if not wanted:
            return
        self.say(f"{told(setting)}: {', '.join(wanted)}")
        runs, lines = {}, []
        for name, opener in wanted.items():
            try:
                runs[name] = opener()
            except Exception as error:  # a peer may raise anything; what cannot run is told, never left out
                lines.append({"contestant": name, "unavailable": reason(error)})
        times, answers, errors = race(runs, rounds or (ROUNDS_QUICK if self.quick else ROUNDS))
        lines += [{"contestant": name, "unavailable": reason(error)} for name, error in errors.items()]
        for name, answer in answers.items():
            lines.append({"contestant": name, "unit": "ms", **asdict(times[name]), **examined(examine, answer)})
        self.log.write({**setting, **line} for line in lines)

    def ours(self, *, pictures: bool = False) -> dict[str, dict[str, str | None]]:
        """Our contestants with their settings: the default, and every other runtime and precision that is installed.

        Each solver and each decoder takes part once: some runtimes differ in one of the two only.
        """
        chosen, found = open_runtime(self.bundle, "auto").name, {"ours": {}}
        if not pictures:
            _, *others = RUNTIMES[chosen].precisions.get("cpu", (None,))
            found |= {f"ours, {precision}": {"precision": precision} for precision in others}
        # numpy is the judge's; openvino solves as the default does, and these two draw as it does.
        left_out = {chosen, "numpy", *(("native", "onnxruntime") if pictures else ("openvino",))}
        for runtime, entry in RUNTIMES.items():
            if "cpu" in entry.extras and runtime not in left_out and self.has(runtime):
                for precision in entry.precisions.get("cpu", (None,)):
                    name = f"ours on {runtime}{f' {precision}' if precision else ''}"
                    found[name] = {"runtime": runtime, "precision": precision}
        return found

    def has(self, runtime: str) -> bool:
        try:
            open_runtime(self.bundle, runtime)
        except MissingRuntime:
            return False
        return True


def examined(examine: Examine, answer: Any) -> Mapping[str, Any]:
    try:
        return examine(answer)
    except LaceError as error:
        return {"check": f"cannot be judged: {reason(error)}"}


def told(setting: Mapping) -> str:
    return ", ".join(str(value) if key == "suite" else f"{key} {value}" for key, value in setting.items())


def reason(error: Exception) -> str:
    """One line for the record."""
    first = (str(error).strip() or "no message").splitlines()[0][:300]
    return first if isinstance(error, LaceError) else f"{type(error).__name__}: {first}"
