"""The posterior: are samples under a condition those plain samples that satisfy it?

The truth of a condition are the pictures of a judged pool of plain samples that satisfy it, values to within the
tolerance of their sharp head. A cell is a condition and a method.

    posterior     sharp, calibrated heads; what ``Sampler`` does by default where a bundle has them
    flow          the default of bundles without
    and baselines of methods.py; langevin (true temperature): with the noise that samples p(z) p(c | z)
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import sqrt

import numpy as np
from numpy import ndarray as Array

from engine.batch import Status
from engine.condition import And, Condition, Is, Not, Or, Within
from engine.grammar import parse
from engine.requests import Request
from engine.solvers import GaussNewton, Langevin
from engine.tape import satisfied
from lace_evaluation import likeness
from lace_evaluation.goal import as_logits
from lace_evaluation.methods import METHODS as BASELINES
from lace_evaluation.methods import Outcome, solved, solved_by
from lace_evaluation.questions import SHOWN, statements
from lace_evaluation.statistics import wilson
from lace_evaluation.store import Cell
from lace_evaluation.study import CHUNK, POOL_SEED, Seen, Study

POOL = 40_000  # plain pictures of the truth
POOL_FIRST = POOL_SEED + 2**32  # added to the seed: another pool than that of the baselines
OURS, FLOW = "posterior", "flow"
TIMES = 4  # rows of OURS and FLOW for every row of ``study.count``
GRID = 36  # pictures of OURS and FLOW that are kept
RATE = Langevin().rate
AT_ONCE, REPEATS = (16, 64), 5  # rows, and how often, for the cost of a row
ENOUGH = 300  # pictures of the truth from which on the least ACC counts

# Singles, pairs, triples, OR, NOT, intervals, targets of values; and what is rarer than 1 in 1,000.
CONDITIONS = {
    "single": ("smile", "~smile", "glasses", "beard", "bald", "hat", "gender=male", "haircolor=blond",
               "haircolor=red", "haircolor=grey"),
    "pair": ("hat & smile", "smile & glasses", "gender=male & beard", "~smile & haircolor=red", "bald & glasses"),
    "triple": ("gender=male & beard & glasses", "smile & ~glasses & haircolor=blond", "gender=female & hat & smile",
               "gender=male & bald & ~smile", "glasses & haircolor=grey & smile"),
    "or": ("hat | beard", "glasses | hat", "haircolor=blond | haircolor=red", "smile & (hat | glasses)"),
    "not": ("~haircolor=black", "~(smile | glasses)"),
    "rare": ("hat & glasses", "gender=female & hat & glasses", "haircolor=red & glasses & gender=male"),
    "interval": ("age>0.7", "0.4<age<0.6", "yaw<0.3", "gender=female & hat & age>0.5"),
    "value": ("age=0.7", "yaw=0.25", "light=0.75", "width=0.3", "smile & age=0.3", "hat & yaw=0.7",
              "glasses & haircolor=grey & age=0.75"),
}
CLASSES = ("single", "pair", "triple", "or", "not", "rare")


@dataclass(frozen=True, slots=True, eq=False)
class Truth:
    """Plain samples: judge's labels (m, attributes) and features (m, d)."""

    labels: Array
    features: Array


def listed(study: Study) -> list[tuple[str, str]]:
    """(kind, text) of the conditions that the bundle can serve."""
    return [(kind, text) for kind, texts in CONDITIONS.items() for text in texts
            if set(parse(text).attributes()) <= set(study.attributes)]


def pool(study: Study) -> Truth:
    cell = study.store.cell("posterior/pool", partial(make_pool, study))
    return Truth(cell.other["labels"], cell.other["features"].astype(np.float32))


def make_pool(study: Study) -> Cell:
    """POOL plain samples (fewer for few rows a cell), judged; pictures are not kept."""
    count = min(POOL, 100 * TIMES * study.count)
    labels, features = [], []
    for first in range(0, count, CHUNK):
        requests = [Request(None, seed=study.seed + POOL_FIRST + first + i, label=study.label)
                    for i in range(min(CHUNK, count - first))]
        seen = study.look(study.sampler.solve(requests))
        labels.append(seen.labels)
        features.append(seen.features.astype(np.float16))
    return Cell({"count": count}, other={"labels": np.concatenate(labels), "features": np.concatenate(features)})


def draw_posterior(study: Study, requests: Sequence[Request]) -> Outcome:
    found = solved(study.open_sampler(solver=OURS), requests)
    return replace(found, reached=np.array([s.status == Status.DONE for s in found.samples]))


METHODS: dict[str, Callable[[Study, Sequence[Request]], Outcome]] = {
    OURS: draw_posterior,
    FLOW: solved_by(GaussNewton()),
    "dopri5 (paper)": BASELINES["dopri5 (paper)"],
    "langevin": BASELINES["langevin"],
    "langevin (true temperature)": solved_by(Langevin(steps=400, rate=RATE, noise=sqrt(2 * RATE))),
    "predictor-corrector": BASELINES["predictor-corrector"],
    "arithmetic": BASELINES["arithmetic"],
}


def serves(method: str, condition: Condition) -> bool:
    """Arithmetic knows conjunctions of classes and values only."""
    return method != "arithmetic" or all(isinstance(leaf, Is) for leaf in statements(condition))


def cells(study: Study) -> dict[str, Callable[[], Cell]]:
    return {
        f"posterior/{i}/{method}": partial(cell, study, method, parse(text))
        for i, (_, text) in enumerate(listed(study)) for method in METHODS if serves(method, parse(text))
    }


def cell(study: Study, method: str, condition: Condition) -> Cell:
    count = study.count * (TIMES if method in (OURS, FLOW) else 1)
    outcome = METHODS[method](study, study.requests([condition] * count))
    seen = study.look(outcome.samples, shown=GRID if method in (OURS, FLOW) else SHOWN)
    holds = true(study, condition, seen.labels)
    rows = {
        "holds": holds, "entered": outcome.reached,
        "evaluations": np.array([s.evaluations for s in outcome.samples]),
        "exact": np.array([s.exact for s in outcome.samples]),
    }
    facts = {
        "rows": count, **{name: float(np.mean(values)) for name, values in rows.items()},
        "interval": wilson(int(holds.sum()), count), "errors": errors(study, condition, seen.labels),
        "branches": branches(study, condition, seen.labels),
        "seconds": {"solve": outcome.seconds, **seen.seconds}, **against_truth(study, condition, seen),
    }
    if method in (OURS, FLOW):
        facts["ms"] = milliseconds(study, method, condition)
    return Cell(facts, {n: np.asarray(v, np.float32) for n, v in rows.items()}, {"pictures": seen.pictures})


def milliseconds(study: Study, method: str, condition: Condition) -> dict[str, float]:
    """Of solving one row, by how many rows are asked for at once; the median of REPEATS."""
    sampler, found = study.open_sampler(solver=method if method == OURS else GaussNewton()), {}
    for count in AT_ONCE:
        spent = []
        for repeat in range(REPEATS + 1):  # the first one warms up
            began = time.perf_counter()
            sampler.solve(study.requests([condition] * count, first=repeat * count))
            spent.append(time.perf_counter() - began)
        found[str(count)] = 1000 * float(np.median(spent[1:])) / count
    return found


def true(study: Study, condition: Condition, labels: Array) -> Array:
    """Whether the judge says that a condition holds (n,); a value to within its head's tolerance."""
    seen = as_logits(study.attributes.values(), labels)

    def truth(part: Condition) -> Array:
        match part:
            case And(parts):
                return np.logical_and.reduce([truth(inner) for inner in parts])
            case Or(parts):
                return np.logical_or.reduce([truth(inner) for inner in parts])
            case Not(inner):
                return ~truth(inner)
            case Is(name) | Within(name):
                return satisfied(part, study.attributes, seen, tolerance=study.attributes[name].tolerance)
        return satisfied(part, study.attributes, seen)

    return truth(condition)


def errors(study: Study, condition: Condition, labels: Array) -> dict[str, float]:
    """Mean absolute error of each value that is asked for as a target."""
    order = list(study.attributes)
    return {
        leaf.name: float(np.abs(labels[:, order.index(leaf.name)] - float(leaf.choice)).mean())
        for leaf in statements(condition)
        if isinstance(leaf, Is) and study.attributes[leaf.name].kind == "value" and leaf.choice is not None
    }


def branches(study: Study, condition: Condition, labels: Array) -> dict[str, float]:
    """Of the pictures for which an OR holds: the share of each of its branches."""
    if not isinstance(condition, Or):
        return {}
    part = labels[true(study, condition, labels)]
    return {str(branch): float(true(study, branch, part).mean()) if len(part) else 0.0 for branch in condition.parts}


def against_truth(study: Study, condition: Condition, seen: Seen) -> dict:
    """Distances of all samples, whether they obey or not, from the truth; {} where that has too few pictures."""
    plain = pool(study)
    part = true(study, condition, plain.labels)
    hits = int(part.sum())
    if hits < likeness.LEAST:
        return {"truth": hits, "others": {}, "likeness": {}}
    asked = condition.attributes()
    names = [name for name in study.attributes if name not in asked]
    others = likeness.labels_likeness(plain.labels[part], seen.labels, study.attributes, names)
    return {"truth": hits, "others": others, "likeness": likeness.features_likeness(plain.features[part],
                                                                                   seen.features)}


def facts(study: Study, found: Mapping[str, Cell]) -> dict:
    """JSON: every condition with its truth, and what each method makes of it; a summary of each method."""
    plain, conditions = pool(study), []
    for i, (kind, text) in enumerate(listed(study)):
        condition = parse(text)
        rate = float(true(study, condition, plain.labels).mean())
        conditions.append({
            "kind": kind, "condition": text, "rate": rate, "branches": branches(study, condition, plain.labels),
            "methods": {m: found[f"posterior/{i}/{m}"].facts for m in METHODS if f"posterior/{i}/{m}" in found},
        })
    summaries = {group: {method: summary([c for c in conditions if c["kind"] in kinds], method) for method in METHODS}
                 for group, kinds in (("classes", CLASSES), ("values", ("interval", "value")))}
    return {"pool": len(plain.labels), "conditions": conditions, "summaries": summaries}


def summary(conditions: Sequence[Mapping], method: str) -> dict:
    """Means of a method over conditions; those of distances over the conditions whose truth is known.

    above, recall, coverage   Fréchet distance above its floor; the other two as they are
    others, chance            mean distance of attributes that were not asked for, and by chance
    branch                    the greatest difference of an OR's branch from the truth
    """
    made = [(c, c["methods"][method]) for c in conditions if method in c["methods"]]
    known = [(c, m) for c, m in made if m["likeness"]]
    others = [v for _, m in known for v in m["others"].values()]
    gaps = [abs(m["branches"][b] - share) for c, m in made for b, share in c["branches"].items()]
    values = [e for _, m in made for e in m["errors"].values()]

    def mean(numbers: Sequence[float]) -> float | None:
        return float(np.mean(numbers)) if numbers else None

    return {
        "conditions": len(made), "acc": mean([m["holds"] for _, m in made]),
        "least_acc": min((m["holds"] for _, m in made if m["truth"] >= ENOUGH), default=None),
        "above": mean([m["likeness"]["fid"] - m["likeness"]["fid_floor"] for _, m in known]),
        **{name: mean([m["likeness"][name] for _, m in known])
           for part in ("fid", "precision", "recall", "density", "coverage") for name in (part, f"{part}_floor")},
        "others": mean([v["distance"] for v in others]), "chance": mean([v["chance"] for v in others]),
        "branch": max(gaps, default=None), "error": mean(values), "most_error": max(values, default=None),
        "evaluations": mean([m["evaluations"] for _, m in made]), "exact": mean([m["exact"] for _, m in made]),
        "entered": mean([m["entered"] for _, m in made]),
        **{f"ms_{count}": mean([m["ms"][str(count)] for _, m in made if "ms" in m]) for count in AT_ONCE},
    }
