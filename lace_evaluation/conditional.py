"""Conditional sampling: targets of one, two, three and all attributes, ours beside the baselines.

A cell is one set of groups of attributes, one source of targets and one method. Its rows are the same seeds and the
same targets in every method's cell.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np
from numpy import ndarray as Array

from lace_evaluation import OURS
from lace_evaluation.methods import METHODS, Outcome, converged
from lace_evaluation.nearness import EQUAL, frechet_change
from lace_evaluation.questions import SHOWN
from lace_evaluation.statistics import bootstrap, half_width
from lace_evaluation.store import Cell
from lace_evaluation.study import Study
from lace_evaluation.targets import SOURCES, Targets, draw, generator, holds, scores, sets
from lace_evaluation.world import PLAIN, features
from lace_evaluation.world import RENDERS as FRESH_RENDERS
from lace_trainer.faces import ATTRIBUTES, Factors, render, sample_factors

# Real pictures with the wanted labels: how often the judge agrees with the truth, and the least Fréchet distance that
# as many pictures can have.
RENDERS = "renders"
# Where the flow itself leads, without any solver's error; for training targets only, of which the goals ask why.
CONVERGED = "converged"
NOTHING = 240  # the grey of a row without an answer


def cells(study: Study) -> dict[str, Callable[[], Cell]]:
    """Name -> what makes the cell, in the order of the tables."""
    groups = sets(study.attributes)
    return {
        f"conditional/{size}/{source}/{method}": partial(cell, study, method, source, groups[size])
        for size in groups for source in SOURCES for method in rows_of(source)
        if method != RENDERS or study.is_rendered
    }


def rows_of(source: str) -> tuple[str, ...]:
    """The rows of a table: the truth, then the methods."""
    return (RENDERS, *((CONVERGED,) if source == "training" else ()), *METHODS)


def cell(study: Study, method: str, source: str, groups: Sequence[tuple[str, ...]]) -> Cell:
    """A set of one group gets twice the rows, so that its Fréchet distance rests on enough pictures."""
    count = study.count * (2 if len(groups) == 1 else 1)
    parts = []
    for k, names in enumerate(groups):
        targets = draw(source, names, study.attributes, count, study.seed, first=k * count, law=study.law)
        parts.append(rendered(study, targets, source) if method == RENDERS else asked(study, method, targets))
    return joined(study, source, parts, keep_features=source == "training")


def asked(study: Study, method: str, targets: Targets) -> Cell:
    """What a method makes of the targets of one group."""
    solve = converged if method == CONVERGED else METHODS[method]
    outcome = solve(study, study.requests(targets.conditions(study.attributes), targets.first))
    return measured(study, targets, outcome)


def measured(study: Study, targets: Targets, outcome: Outcome) -> Cell:
    """Decode, judge and count one group.

    acc       mean ACC of the row's attributes; 0 where the method gave up
    holds     every statement is true, values to within 0.1;  heads: the same by the bundle's heads
    moved     distance in w from the plain sample of the seed, in units of the spread of plain samples
    """
    samples, reached = outcome.samples, outcome.reached
    seen = study.look(samples)
    score = scores(targets, seen.labels, study.attributes) * reached[:, None]
    by_heads = scores(targets, study.heads(samples), study.attributes) * reached[:, None]
    moved = np.linalg.norm(np.stack([s.w for s in samples]) - plain_w(study, len(samples), targets.first), axis=1)
    rows = {
        "acc": score.mean(axis=1),
        "holds": holds(targets, score, study.attributes),
        "heads": holds(targets, by_heads, study.attributes),
        "energy": np.array([s.energy for s in samples]),
        "evaluations": np.array([s.evaluations for s in samples]),
        "moved": moved / spread(study),
        "reached": reached,
    }
    facts = {"attributes": by_attribute(targets, score), "seconds": {"solve": outcome.seconds, **seen.seconds}}
    pictures = seen.pictures.copy()
    pictures[~reached[: len(pictures)]] = NOTHING
    return Cell(facts, as_floats(rows), {"features": seen.features, "pictures": pictures})


def rendered(study: Study, targets: Targets, source: str) -> Cell:
    """Real faces with the wanted labels: those that training targets were taken from; uniform ones are put in."""
    drawn = sample_factors(generator(source, targets.names, study.seed), len(targets.values))
    labels = drawn.labels.copy()
    order = [attribute.name for attribute in ATTRIBUTES]
    labels[:, [order.index(name) for name in targets.names]] = targets.values
    pictures = render(Factors(labels, drawn.identity, drawn.scene), size=study.sampler.bundle.generator.resolution)
    seen = study.judge.predict(pictures)[:, study.columns]
    score = scores(targets, seen, study.attributes)
    rows = {"acc": score.mean(axis=1), "holds": holds(targets, score, study.attributes)}
    facts = {"attributes": by_attribute(targets, score), "seconds": {}}
    other = {"features": features(study.judge, pictures), "pictures": pictures[:SHOWN]}
    return Cell(facts, as_floats(rows), other)


def by_attribute(targets: Targets, score: Array) -> dict[str, float]:
    return dict(zip(targets.names, score.mean(axis=0).tolist(), strict=True))


def as_floats(rows: Mapping[str, Array]) -> dict[str, Array]:
    return {name: np.asarray(values, np.float32) for name, values in rows.items()}


def plain_w(study: Study, count: int, first: int = 0) -> Array:
    """w (count, w_dim) of the rows' seeds without a condition."""
    return np.stack([sample.w for sample in study.sampler.solve(study.requests([None] * count, first))])


def spread(study: Study) -> float:
    """Root mean square distance of plain samples from their mean in w."""
    return float(np.sqrt(np.square(study.pool.w - study.pool.w.mean(axis=0)).sum(axis=1).mean()))


def joined(study: Study, source: str, parts: Sequence[Cell], *, keep_features: bool) -> Cell:
    """One cell of its groups: rows one after another, ACC of an attribute averaged over the groups that ask for it."""
    rows = {name: np.concatenate([part.rows[name] for part in parts]) for name in parts[0].rows}
    features = np.concatenate([part.other["features"] for part in parts])
    shown = -(-SHOWN // len(parts))
    pictures = np.concatenate([part.other["pictures"][:shown] for part in parts])[:SHOWN]
    found: dict[str, list[float]] = {}
    for part in parts:
        for name, acc in part.facts["attributes"].items():
            found.setdefault(name, []).append(acc)
    attributes = {name: float(np.mean(values)) for name, values in found.items()}
    facts = {
        "rows": len(features), **{name: float(values.mean()) for name, values in rows.items()},
        "acc_half_width": half_width(rows["acc"]), "attributes": attributes,
        "groups": [float(part.rows["acc"].mean()) for part in parts], **kinds(study, attributes),
        "seconds": {k: sum(part.facts["seconds"][k] for part in parts) for k in parts[0].facts["seconds"]},
        **({"most_evaluations": float(rows["evaluations"].max())} if "evaluations" in rows else {}),
    }
    if source == "training":  # uniform targets have another law than the renders: their distance would measure that
        facts |= study.near_renders(features[rows["reached"] > 0] if "reached" in rows else features)
    other = {"pictures": pictures, **({"features": features.astype(np.float16)} if keep_features else {})}
    return Cell(facts, rows, other)


def kinds(study: Study, attributes: Mapping[str, float]) -> dict[str, float | None]:
    """Mean hit rate of the classes, and mean error of the values; None where there are none."""
    hits = [acc for name, acc in attributes.items() if study.attributes[name].kind == "class"]
    errors = [1 - acc for name, acc in attributes.items() if study.attributes[name].kind == "value"]
    return {"classes": float(np.mean(hits)) if hits else None, "error": float(np.mean(errors)) if errors else None}


def facts(study: Study, found: Mapping[str, Cell]) -> dict:
    """JSON: {set: {source: {method: facts}}} and the groups of attributes.

    ahead     in every method's facts: ACC of ours minus its own with a 95 % interval, paired by rows
    farther   of methods that are nearer to the renders: Fréchet distance of ours minus their own, likewise
    renders   what of them decides a Fréchet distance: the share of their variance along the widest direction, and the
              share of them that are far out in it
    """
    tree: dict = {}
    for name, made in found.items():
        _, size, source, method = name.split("/")
        ours = found[f"conditional/{size}/{source}/{OURS}"]
        difference = ours.rows["acc"].astype(float) - made.rows["acc"]
        ahead = dict(zip(("low", "high"), bootstrap(difference), strict=False), mean=float(difference.mean()))
        own = tree.setdefault(size, {}).setdefault(source, {})[method] = {**made.facts, "ahead": ahead}
        if method in METHODS and is_farther(ours.facts, made.facts):
            own["farther"] = farther(study, ours, made)
    groups = {size: [list(names) for names in members] for size, members in sets(study.attributes).items()}
    classes = [name for name, attribute in study.attributes.items() if attribute.kind == "class"]
    renders = {"share": study.widest.share, "far": study.widest.far(study.reference)}
    return {"groups": groups, "classes": classes, "sets": tree, "fid_from": len(study.reference), "renders": renders,
            "reference": FRESH_RENDERS if study.is_rendered else PLAIN}


def is_farther(ours: Mapping, other: Mapping) -> bool:
    """Is ours farther from the renders than the other method, of the facts of both?"""
    known = ours.get("fid") is not None and other.get("fid") is not None
    return known and ours["fid"] > EQUAL * other["fid"]


def farther(study: Study, ours: Cell, other: Cell) -> dict[str, float]:
    counted = [cell.rows["reached"] > 0 for cell in (other, ours)]
    low, high, _ = frechet_change(study.reference_moments, other.other["features"], ours.other["features"], counted)
    return {"mean": ours.facts["fid"] - other.facts["fid"], "low": low, "high": high}
