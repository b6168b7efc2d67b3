"""Combinations that plain samples hardly ever show: fewer than one in a thousand of them, by the judge."""

from collections.abc import Callable, Mapping
from functools import partial

import numpy as np

from engine.condition import Condition
from engine.grammar import parse
from engine.tape import satisfied
from lace_evaluation.conditional import joined, measured
from lace_evaluation.goal import as_logits
from lace_evaluation.methods import METHODS
from lace_evaluation.questions import TOLERANCE
from lace_evaluation.statistics import wilson
from lace_evaluation.store import Cell
from lace_evaluation.study import Study
from lace_evaluation.targets import fixed

RARE = 1e-3
MOST = 6  # combinations that are asked for
# First the paper's two; then what is rare because much is asked for; then what the renderer hardly ever draws: 0.3 % of
# its women have a beard, 0.3 % are bald, and the young are next to never grey.
CANDIDATES = (
    "smile=no & age=0.22 & glasses=yes & beard=yes",
    "gender=male & smile=no & glasses=yes & age=0.14",
    "hat=yes & glasses=yes & haircolor=blond & yaw=0.75 & smile=no",
    "haircolor=red & glasses=yes & age=0.7 & yaw=0.25 & gender=female",
    "gender=female & beard=yes & glasses=yes",
    "haircolor=grey & age=0.2 & hat=no & glasses=yes",
    "gender=female & bald=yes & smile=yes",
    "beard=yes & bald=yes & age=0.2 & smile=yes",
    "hat=yes & glasses=yes & beard=yes & haircolor=red",
)


def rates(study: Study) -> dict[str, int]:
    """How many plain samples show each candidate that the bundle can serve."""
    conditions = {text: parse(text) for text in CANDIDATES}
    seen = as_logits(study.attributes.values(), study.pool.labels)
    return {
        text: int(satisfied(condition, study.attributes, seen, tolerance=TOLERANCE).sum())
        for text, condition in conditions.items() if set(condition.attributes()) <= set(study.attributes)
    }


def rare(study: Study) -> list[str]:
    return [text for text, hits in rates(study).items() if hits < RARE * len(study.pool.seeds)][:MOST]


def cells(study: Study) -> dict[str, Callable[[], Cell]]:
    return {
        f"zero-shot/{i}/{method}": partial(cell, study, method, parse(text))
        for i, text in enumerate(rare(study)) for method in METHODS
    }


def cell(study: Study, method: str, condition: Condition) -> Cell:
    """As in the suite ``conditional``; no Fréchet distance, for the renders hardly show the combination either."""
    count = -(-study.count // 2)
    targets = fixed(condition, study.attributes, count)
    outcome = METHODS[method](study, study.requests([condition] * count))
    return joined(study, "fixed", [measured(study, targets, outcome)], keep_features=False)


def facts(study: Study, found: Mapping[str, Cell]) -> dict:
    """JSON: the combinations with their rate among plain samples, and what each method makes of them."""
    hits, count = rates(study), len(study.pool.seeds)
    combinations = [
        {"condition": text, "plain_hits": hits[text], "plain_interval": wilson(hits[text], count),
         "methods": {method: found[f"zero-shot/{i}/{method}"].facts for method in METHODS}}
        for i, text in enumerate(rare(study))
    ]
    methods = {
        method: {key: float(np.mean([c["methods"][method][key] for c in combinations]))
                 for key in ("acc", "holds", "heads", "reached", "energy", "evaluations", "moved")}
        for method in METHODS
    } if combinations else {}
    common = {text: n for text, n in hits.items() if n >= RARE * count}
    return {"plain": count, "combinations": combinations, "methods": methods, "too_common": common}
