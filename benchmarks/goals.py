"""The goals that this engine sets itself on a CPU, compared with a run's measurements."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from engine.bench.records import counted, fastest, figures, is_ours, is_valid, some
from engine.bench.report import markdown
from engine.bench.streaming import LEAVING, STATIC
from engine.text import code

Lines = Sequence[Mapping]
WORLD = "ffhq"  # the benchmark's own bundle
PAPER = "paper"
TIMES_PAPER, TIMES_PEER = 150, {1: 8, 16: 15, 64: 15}
BUDGET, ENERGY_SHARE = 32, 0.05
# Energies near zero cannot be compared by their share: the log of a probability of 0.99 is 0.01.
ENERGY_EXTRA = 0.01
TIMES_EAGER = {1024: 6, 256: 7}
TIMES_STATIC = 1.8
COLD = {"demo": 1.0, "ffhq-1024": 4.0}  # seconds
VERDICT = {True: "met", False: "**not met**", None: "not measured"}


@dataclass(frozen=True, slots=True)
class Goal:
    """``met`` is None where something it needs was not measured."""

    text: str
    needed: str
    found: str
    met: bool | None


def is_adaptive(line: Mapping) -> bool:
    """Fixed steps are left out of the goals: on trained heads they end less accurately than the paper's method."""
    return not line["contestant"].endswith(" steps")


def find_goals(lines: Lines) -> list[Goal]:
    """All goals for a run of the benchmark's own world; for another bundle those that can be told."""
    goals = all_goals(lines)
    return goals if some(lines, world=WORLD) else [goal for goal in goals if goal.met is not None]


def all_goals(lines: Lines) -> list[Goal]:
    return [
        *(against_paper(lines, attributes, rows) for attributes in (3, 12) for rows in (1, 16)),
        *(against_peers(lines, rows) for rows in TIMES_PEER),
        *hard_targets(lines),
        *(decoding(lines, resolution) for resolution in TIMES_EAGER),
        *streaming(lines),
        *(cold_start(lines, world) for world in COLD),
    ]


def as_good(ours: Lines, paper: Mapping | None) -> list[Mapping]:
    """Those with at most the paper's energy and trajectory error, where the paper's method was measured."""
    facts = ("energy", "trajectory_error")
    return [line for line in ours if is_valid(line) and (not paper or all(line[f] <= paper[f] for f in facts))]


def solves(lines: Lines, attributes: int, rows: int) -> tuple[list[Mapping], Mapping | None]:
    """All contestants of a solve without fixed steps, and the paper's line among them."""
    found = some(lines, suite="solve", world=WORLD, attributes=attributes, rows=rows)
    found = [line for line in found if is_adaptive(line)]
    return found, next((line for line in some(found, contestant=PAPER) if line.get("median") is not None), None)


def ratio(text: str, needed: float, entered: Lines, good: Lines, other: Mapping | None, lacks: str) -> Goal:
    """How many times faster than ``other`` the fastest of ours is.

    entered, good   our lines, and those of them whose answer is good enough; ``lacks`` is told if none of them is
    """
    ours, wanted = fastest(good), f"{needed:g} times"
    if other is None or not entered:
        return Goal(text, wanted, "", None)
    if ours is None:
        return Goal(text, wanted, lacks, False)
    factor = other["median"] / ours["median"]
    times = [f"{code(line['contestant'])} {figures(line['median'])} ms" for line in (ours, other)]
    return Goal(text, wanted, f"{figures(factor, 3)} times: {', '.join(times)}", factor >= needed)


def against_paper(lines: Lines, attributes: int, rows: int) -> Goal:
    found, paper = solves(lines, attributes, rows)
    ours = [line for line in found if is_ours(line)]
    text = f"{attributes} attributes, {counted(rows, 'row')}: against the paper's method, no less accurate"
    return ratio(text, TIMES_PAPER, ours, as_good(ours, paper), paper, "none of ours is as accurate as the paper's")


def against_peers(lines: Lines, rows: int) -> Goal:
    """Where the paper's method was left out, to bound the time, ours needs to pass the check only."""
    found, paper = solves(lines, 3, rows)
    ours = [line for line in found if is_ours(line)]
    best = fastest([line for line in found if not is_ours(line)])
    text = f"3 attributes, {counted(rows, 'row')}: against the best peer, no less accurate than the paper's method"
    return ratio(text, TIMES_PEER[rows], ours, as_good(ours, paper), best, "none of ours is accurate enough")


def hard_targets(lines: Lines) -> list[Goal]:
    found = some(lines, suite="hard")
    needed = f"{BUDGET} evaluations, {ENERGY_SHARE:.0%}"
    goals = []
    for world, kind in dict.fromkeys((line["world"], line["targets"]) for line in found):
        here = some(found, world=world, targets=kind)
        ours, dopri5 = (next(iter(some(here, contestant=name)), {}) for name in ("ours", "our dopri5"))
        text = f"{kind} targets, {world}: the budget; the energy near the converged flow's and dopri5's"
        if "energy" not in ours or "energy" not in dopri5:
            goals.append(Goal(text, needed, "", None))
            continue
        limits = [(1 + ENERGY_SHARE) * energy + ENERGY_EXTRA for energy in (ours["floor_energy"], dopri5["energy"])]
        most = ours["evaluations"]["most"]
        told = (f"{most} evaluations, energy {figures(ours['energy'])}; converged {figures(ours['floor_energy'])}, "
                f"dopri5 {figures(dopri5['energy'])}")
        goals.append(Goal(text, needed, told, most <= BUDGET and ours["energy"] <= min(limits)))
    return goals or [Goal("hard targets", needed, "", None)]


def decoding(lines: Lines, resolution: int) -> Goal:
    found = some(lines, suite="decode", world=f"{WORLD}-{resolution}", rows=1)
    ours, eager = [line for line in found if is_ours(line)], fastest(some(found, contestant="torch"))
    text = f"decode at {resolution} pixels: against eager torch"
    return ratio(text, TIMES_EAGER[resolution], ours, ours, eager, "no picture of ours passes its check")


def streaming(lines: Lines) -> list[Goal]:
    """Told against both kinds of static batches; met against those that are computed to their last row."""
    found = some(lines, suite="stream")
    goals = []
    for world, pictures in dict.fromkeys((line["world"], line["pictures"]) for line in found):
        here = some(found, world=world, pictures=pictures)
        ours = [line for line in here if line["contestant"] not in (STATIC, LEAVING)]
        text = f"mixed stream, {world}, {'with' if pictures else 'without'} pictures: against static batches"
        both = [ratio(text, TIMES_STATIC, ours, ours, fastest(some(here, contestant=static)),
                      "requests do not have their own results") for static in (STATIC, LEAVING)]
        goals.append(replace(both[0], found="; ".join(dict.fromkeys(goal.found for goal in both if goal.found))))
    return goals or [Goal("mixed stream: against static batches", f"{TIMES_STATIC} times", "", None)]


def cold_start(lines: Lines, world: str) -> Goal:
    line = fastest(some(lines, suite="cold", world=world))
    text, needed = f"cold start to the first picture, {world}", f"{COLD[world]:g} s"
    if line is None:
        return Goal(text, needed, "", None)
    return Goal(text, needed, f"{line['median'] / 1e3:.2f} s", line["median"] / 1e3 < COLD[world])


def goals_table(lines: Lines) -> str:
    """Markdown."""
    rows = [[goal.text, goal.needed, goal.found, VERDICT[goal.met]] for goal in find_goals(lines)]
    return markdown(["goal", "needed", "found", ""], rows) if rows else ""
