"""Logical operators: of how many pictures is the formula true, by the judge?

    product     product logic, the default;  lace: the paper's constants
    paper       the paper's constants under the paper's solver
    plain       no condition

For an OR the branches are counted too: only the first, only the second, both. Pictures drawn from the law of the plain
samples under the condition would take them as plain samples do that happen to fulfil the formula.
"""

from collections.abc import Callable, Mapping
from functools import partial

import numpy as np
from numpy import ndarray as Array

from engine.condition import Condition, Or
from engine.grammar import parse
from engine.requests import Sample
from engine.tape import satisfied
from lace_evaluation import world
from lace_evaluation.goal import as_logits
from lace_evaluation.paper import BATCH, SharedDopri5
from lace_evaluation.questions import TOLERANCE
from lace_evaluation.statistics import wilson
from lace_evaluation.store import Cell
from lace_evaluation.study import Study

PRODUCT = "product"
FORMULAS = (
    ("bound", "age>0.6"),
    ("bound", "yaw<0.4"),
    ("interval", "0.4<light<0.6"),
    ("not", "~smile"),
    ("not", "~haircolor=black"),
    ("not", "~yaw=0.5"),
    ("and", "smile & glasses"),
    ("and", "gender=female & hat & age>0.5"),
    ("or", "hat | glasses"),
    ("or", "beard | bald"),
    ("or", "haircolor=blond | haircolor=red"),
    ("or", "yaw<0.35 | yaw>0.65"),
    ("nested", "~(smile | glasses)"),
    ("nested", "smile & (hat | glasses)"),
    ("nested", "smile & ~glasses | hat & age>0.6"),
    ("nested", "(hat | glasses) & (yaw<0.35 | yaw>0.65)"),
    ("nested", "(smile | glasses) & ~(smile & glasses)"),
    ("nested", "gender=male & (beard | bald) & ~hat & 0.4<age<0.7"),
)


def draw_paper(study: Study, conditions: list[Condition]) -> list[Sample]:
    sampler = study.open_sampler(solver=SharedDopri5(), capacity=BATCH, logic="lace")
    return sampler.solve(study.requests(conditions))


def draw_logic(study: Study, conditions: list[Condition], *, logic: str) -> list[Sample]:
    return study.open_sampler(logic=logic).solve(study.requests(conditions))


METHODS: dict[str, Callable[[Study, list[Condition]], list[Sample]]] = {
    "paper": draw_paper,
    "lace": partial(draw_logic, logic="lace"),
    PRODUCT: partial(draw_logic, logic="product"),
}


def formulas(study: Study) -> list[tuple[str, str]]:
    """FORMULAS as far as the bundle has the attributes; of a bundle that is not of the demonstration world, its own."""
    if not study.is_rendered:
        return world.formulas(study.attributes, study.pool.labels)
    return [(kind, text) for kind, text in FORMULAS if set(parse(text).attributes()) <= set(study.attributes)]


def cells(study: Study) -> dict[str, Callable[[], Cell]]:
    return {
        f"logic/{i}/{method}": partial(cell, study, method, parse(text))
        for i, (_, text) in enumerate(formulas(study)) for method in METHODS
    }


def cell(study: Study, method: str, condition: Condition) -> Cell:
    samples = METHODS[method](study, [condition] * study.count)
    seen = study.look(samples)
    true, branches = truth(study, condition, seen.labels)
    heads = truth(study, condition, study.heads(samples))[0]
    rows = {
        "true": true, "heads": heads, "energy": np.array([s.energy for s in samples]),
        "evaluations": np.array([s.evaluations for s in samples]),
    }
    facts = {
        "rows": len(true), **{name: float(values.mean()) for name, values in rows.items()},
        "interval": wilson(int(true.sum()), len(true)), "branches": shares(branches),
    }
    return Cell(facts, {n: np.asarray(v, np.float32) for n, v in rows.items()}, {"pictures": seen.pictures})


def truth(study: Study, condition: Condition, labels: Array) -> tuple[Array, Array]:
    """Whether the formula holds (n,), and each branch of its OR (n, branches), (n, 0) if it is none."""
    seen = as_logits(study.attributes.values(), labels)

    def holds(part: Condition) -> Array:
        return satisfied(part, study.attributes, seen, tolerance=TOLERANCE)

    parts = condition.parts if isinstance(condition, Or) else ()
    return holds(condition), np.stack([holds(part) for part in parts], axis=1) if parts else np.empty((len(labels), 0))


def shares(branches: Array) -> dict[str, float] | None:
    """Of the pictures for which an OR of two is true: only the first branch, only the second, both. Else None."""
    held = branches[branches.any(axis=1)] if branches.shape[1] == 2 else branches[:0]
    if not len(held):
        return None
    first, second = held.T.astype(bool)
    return {"first": float((first & ~second).mean()), "second": float((second & ~first).mean()),
            "both": float((first & second).mean())}


def facts(study: Study, found: Mapping[str, Cell]) -> dict:
    """JSON: every formula with its rate among plain samples, and what each method makes of it."""
    listed = []
    for i, (kind, text) in enumerate(formulas(study)):
        true, branches = truth(study, parse(text), study.pool.labels)
        listed.append({
            "kind": kind, "formula": text, "plain": float(true.mean()), "plain_branches": shares(branches),
            "methods": {method: found[f"logic/{i}/{method}"].facts for method in METHODS},
        })
    return {"formulas": listed, "plain_count": len(study.pool.labels)}
