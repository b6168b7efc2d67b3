"""The goals of the evaluation, and what the suites found of them."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass

from trainer.evaluation import OURS
from trainer.evaluation.conditional import RENDERS
from trainer.evaluation.logic import PRODUCT
from trainer.evaluation.methods import METHODS

SINGLE, THREE, ALL, TRUE, COST = 0.97, 0.95, 0.9, 0.95, 1.1
EQUAL = 1.05  # Fréchet distances of which one is at most this many times the other count as equal


@dataclass(frozen=True, slots=True)
class Goal:
    """``met`` is None where the measurement cannot tell; ``notes`` name what falls short, and where known why."""

    text: str
    found: str
    met: bool | None
    notes: tuple[str, ...] = ()


def goals(suites: Mapping[str, dict]) -> list[dict]:
    """Of the suites that were run, ready for JSON."""
    judges = {"conditional": conditional, "editing": editing, "logic": logic, "solvers": solvers}
    return [asdict(goal) for name, judge in judges.items() if suites.get(name) for goal in judge(suites[name])]


def conditional(facts: dict) -> Iterator[Goal]:
    sets = facts["sets"]
    single = {n: acc for n, acc in sets["one"]["uniform"][OURS]["attributes"].items() if n in facts["classes"]}
    truth = sets["one"]["uniform"][RENDERS]["attributes"]
    if single:
        low = {name: acc for name, acc in single.items() if acc < SINGLE}
        notes = tuple(f"{n} {acc:.3f}; the judge gives real renders {truth[n]:.3f}" for n, acc in low.items())
        yield Goal(f"ACC of each single class attribute, uniform targets, at least {SINGLE:g}",
                   f"least {min(single.values()):.3f}", not low, notes)  # fmt: skip
    for size, least, sources in (("three", THREE, ("uniform", "training")), ("all", ALL, ("training",))):
        for source in sources if size in sets else ():
            ours, real = sets[size][source][OURS], sets[size][source][RENDERS]
            met = ours["acc"] >= least
            notes = () if met else (
                f"the heads call {ours['heads']:.0%} of the rows true, the judge {ours['holds']:.0%}",
                f"the judge gives real renders of these labels {real['acc']:.3f}")  # fmt: skip
            what = "three attributes" if size == "three" else "all attributes at once"
            yield Goal(f"mean ACC of {what}, {source} targets, at least {least:g}",
                       f"{ours['acc']:.3f} ± {ours['acc_half_width']:.3f}", met, notes)  # fmt: skip
    behind = [text for size in sets for text in exceptions(size, sets[size]["training"])]
    yield Goal("ACC ahead of every baseline at equal or better Fréchet distance, training targets",
               "everywhere" if not behind else f"{len(behind)} exceptions", not behind, tuple(behind))  # fmt: skip


def exceptions(size: str, methods: Mapping[str, dict]) -> Iterator[str]:
    """Baselines that ours does not leave behind in both, in a sentence with what the data show."""
    ours = methods[OURS]
    for name in METHODS:
        other = methods[name]
        if name == OURS:
            continue
        ahead, farther = other["ahead"], other["fid"] is not None and ours["fid"] > EQUAL * other["fid"]
        if ahead["high"] < 0 or (ahead["mean"] < 0 and not farther):
            certain = "ahead" if ahead["high"] < 0 else "ahead within chance"
            yield (f"{size}: {name} is {certain} in ACC ({other['acc']:.3f}, ours {ours['acc']:.3f}) with "
                   f"{other['evaluations']:.0f} evaluations for ours {ours['evaluations']:.0f}, energy "
                   f"{other['energy']:.3g} for {ours['energy']:.3g}")  # fmt: skip
        elif farther:
            yield (f"{size}: {name} is nearer to the renders ({other['fid']:.3f}, ours {ours['fid']:.3f}) at ACC "
                   f"{other['acc']:.3f} for ours {ours['acc']:.3f}; its rows moved {other['moved']:.2f} spreads in w, "
                   f"ours {ours['moved']:.2f}")  # fmt: skip


def editing(facts: dict) -> Iterator[Goal]:
    ours = facts["methods"][OURS]
    cost = ours["cost"]
    found = "no single edit changed the identity" if cost is None else (
        f"{cost:.2f} times: 1 - cosine {1 - ours['step_identity']:.3f} a step, {1 - ours['single_identity']:.3f} a "
        "single edit")  # fmt: skip
    yield Goal("a step of the sequence costs at most 10 % more identity than a single edit", found,
               None if cost is None else cost <= COST)  # fmt: skip


def logic(facts: dict) -> Iterator[Goal]:
    rates = {f["formula"]: f["methods"][PRODUCT] for f in facts["formulas"]}
    low = {text: found for text, found in rates.items() if found["true"] < TRUE}
    notes = tuple(f"`{text}` {found['true']:.1%}, by the heads {found['heads']:.1%}" for text, found in low.items())
    if rates:
        least = min(found["true"] for found in rates.values())
        yield Goal(f"every formula true of at least {TRUE:.0%} of the pictures, product logic",
                   f"least {least:.1%}; {len(rates) - len(low)} of {len(rates)} formulas", not low, notes)  # fmt: skip


def solvers(facts: dict) -> Iterator[Goal]:
    for name, found in facts["sets"].items():
        v = found["verdict"]
        near, cheap = v["near"], v["cheap"]
        notes = [
            *(["the reference's own doubt is greater than the error of the paper's solver"] if near is None else []),
            *(["the default ends farther off"] if near is False else []),
            *([] if cheap else ["the default takes more than a tenth of the evaluations"]),
        ]
        yield Goal(
            f"trajectory error on the set `{name}` at most that of dopri5 at 1e-3, at a tenth of its evaluations",
            f"{v['ours']['rms']:.3f} with {v['ours_evaluations']:.0f}, dopri5 {v['paper']['rms']:.3f} with "
            f"{v['paper_evaluations']:.0f}", None if near is None else near and cheap, tuple(notes),
        )  # fmt: skip
