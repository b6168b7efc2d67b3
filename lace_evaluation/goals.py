"""The goals of the evaluation, and what the suites found of them."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass

from engine.text import code
from lace_evaluation import OURS, oneshot, posterior_report
from lace_evaluation.conditional import RENDERS
from lace_evaluation.exceptions import BASELINES, shortfalls
from lace_evaluation.logic import PRODUCT

SINGLE, THREE, ALL, TRUE, COST = 0.97, 0.95, 0.9, 0.95, 1.1


@dataclass(frozen=True, slots=True)
class Goal:
    """``met`` is None where the measurement cannot tell; ``notes`` name what falls short, and where known why."""

    text: str
    found: str
    met: bool | None
    notes: tuple[str, ...] = ()


def goals(suites: Mapping[str, dict]) -> list[dict]:
    """Of the suites that were run, ready for JSON."""
    judges = {"conditional": conditional, "editing": editing, "logic": logic, "solvers": solvers,
              "posterior": posterior, "oneshot": one_pass}
    return [asdict(goal) for name, judge in judges.items() if suites.get(name) for goal in judge(suites[name])]


def conditional(facts: dict) -> Iterator[Goal]:
    sets = facts["sets"]
    single = {n: acc for n, acc in sets["one"]["uniform"][OURS]["attributes"].items() if n in facts["classes"]}
    truth = sets["one"]["uniform"].get(RENDERS, {}).get("attributes", {})
    if single:
        low = {name: acc for name, acc in single.items() if acc < SINGLE}
        notes = tuple(f"{n} {acc:.3f}" + (f"; the judge gives real renders {truth[n]:.3f}" if n in truth else "")
                      for n, acc in low.items())
        yield Goal(f"ACC of each single class attribute, uniform targets, at least {SINGLE:g}",
                   f"least {min(single.values()):.3f}", not low, notes)
    for size, least, sources in (("three", THREE, ("uniform", "training")), ("all", ALL, ("training",))):
        for source in sources if size in sets else ():
            ours, real = sets[size][source][OURS], sets[size][source].get(RENDERS)
            met = ours["acc"] >= least
            notes = () if met else (
                f"the heads call {ours['heads']:.0%} of the rows true, the judge {ours['holds']:.0%}",
                *([f"the judge gives real renders of these labels {real['acc']:.3f}"] if real else []))
            what = "three attributes" if size == "three" else "all attributes at once"
            yield Goal(f"mean ACC of {what}, {source} targets, at least {least:g}",
                       f"{ours['acc']:.3f} ± {ours['acc_half_width']:.3f}", met, notes)
    yield ahead(facts)


def ahead(facts: dict) -> Goal:
    """The issue asks for a lead everywhere, or for a report that says where there is none and why."""
    sets = facts["sets"]
    behind = [found for size in sets for found in shortfalls(size, sets[size]["training"], facts["renders"])]
    open_, certain = sum(not found.why for found in behind), sum(found.certain for found in behind)
    total = 2 * len(sets) * len(BASELINES)  # ACC, and distance
    told = f"{open_} of them without a reason" if open_ else "each with its reason below"
    return Goal(
        "ACC ahead of every baseline at equal or better Fréchet distance, training targets, or the report says where "
        "not and why",
        f"{len(behind)} of {total} comparisons fall short, {certain} by more than chance, {told}" if behind
        else "everywhere", not open_, tuple(map(str, behind)),
    )


def editing(facts: dict) -> Iterator[Goal]:
    ours = facts["methods"][OURS]
    cost = ours["cost"]
    found = "no single edit changed the identity" if cost is None else (
        f"{cost:.2f} times: 1 - cosine {1 - ours['step_identity']:.3f} a step, {1 - ours['single_identity']:.3f} a "
        "single edit")
    yield Goal("a step of the sequence costs at most 10 % more identity than a single edit", found,
               None if cost is None else cost <= COST)


def logic(facts: dict) -> Iterator[Goal]:
    rates = {f["formula"]: f["methods"][PRODUCT] for f in facts["formulas"]}
    low = {text: found for text, found in rates.items() if found["true"] < TRUE}
    notes = tuple(f"{code(text)} {found['true']:.1%}, by the heads {found['heads']:.1%}" for text, found in low.items())
    if rates:
        least = min(found["true"] for found in rates.values())
        yield Goal(f"every formula true of at least {TRUE:.0%} of the pictures, product logic",
                   f"least {least:.1%}; {len(rates) - len(low)} of {len(rates)} formulas", not low, notes)


def solvers(facts: dict) -> Iterator[Goal]:
    for name, found in facts["sets"].items():
        v = found["verdict"]
        near, cheap = v["near"], v["cheap"]
        notes = [
            *([] if v["telling"] else ["the reference's own doubt is greater than the error of the paper's solver"]),
            *(["the difference may be chance"] if near is None and v["telling"] else []),
            *(["the default ends farther off"] if near is False else []),
            *([] if cheap else ["the default takes more than a tenth of the evaluations"]),
        ]
        yield Goal(
            f"trajectory error on the set `{name}` at most that of dopri5 at 1e-3, at a tenth of its evaluations",
            f"{v['ours']['rms']:.3f} with {v['ours_evaluations']:.0f}, dopri5 {v['paper']['rms']:.3f} with "
            f"{v['paper_evaluations']:.0f}; difference, 95 %: {v['low']:+.3f} to {v['high']:+.3f}; nearer in "
            f"{v['nearer']:.0%} of {found['reference']['determined']} rows",
            False if not cheap else near, tuple(notes),
        )


def one_pass(facts: dict) -> Iterator[Goal]:
    for text, found, met in oneshot.goals(facts):
        yield Goal(text, found, met)


def posterior(facts: dict) -> Iterator[Goal]:
    for text, found, met in posterior_report.goals(facts):
        yield Goal(text, found, met)
