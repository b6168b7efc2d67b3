"""Sequential editing, by the paper's protocol.

All rows begin with pictures that show START. Then one edit after another is asked for, each from the picture before it,
which is the anchor of the distances; the targets of earlier edits are held (the paper's Method1). The same edits are
also made singly, each from the first picture.

Nie, Vahdat, Anandkumar, NeurIPS 2021: yaw, smile, gender, age, glasses, with weights 0.04 for the distance in z and w
and 0.01 for the logits of what was not asked for; the defaults of ``Sampler.edit``.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial, reduce
from operator import and_

import numpy as np
from numpy import ndarray as Array

from engine.condition import Condition, attr
from engine.requests import Sample
from engine.tape import class_index
from lace_evaluation import OURS
from lace_evaluation.baselines import arithmetic
from lace_evaluation.methods import planes_of
from lace_evaluation.paper import BATCH, SharedDopri5
from lace_evaluation.questions import SHOWN
from lace_evaluation.statistics import half_width
from lace_evaluation.store import Cell
from lace_evaluation.study import Seen, Study
from lace_evaluation.targets import Targets, scores
from lace_evaluation.world import edits

Edit = Callable[[Study, Sequence[Sample], Condition], list[Sample]]
Choice = str | float

# attribute: at the start, after its edit
STEPS: dict[str, tuple[Choice, Choice]] = {
    "yaw": (0.5, 0.75), "smile": ("no", "yes"), "gender": ("female", "male"), "age": (0.3, 0.75),
    "glasses": ("no", "yes"),
}
FREE, PAPER = "ours, nothing kept", "dopri5 (paper)"
# Rows of the paper's solver: with the weights of editing a batch takes it thousands of evaluations an edit.
PAPER_ROWS = 2 * BATCH


def keeping(study: Study, samples: Sequence[Sample], condition: Condition) -> list[Sample]:
    return study.sampler.edit(samples, condition)


def free(study: Study, samples: Sequence[Sample], condition: Condition) -> list[Sample]:
    """Earlier targets are held; no other attribute is, and no distance counts."""
    return study.sampler.edit(samples, condition, method="flow", keep=None, near=None)


def paper(study: Study, samples: Sequence[Sample], condition: Condition) -> list[Sample]:
    return study.open_sampler(solver=SharedDopri5(), capacity=BATCH).edit(samples, condition, method="flow")


def linear(study: Study, samples: Sequence[Sample], condition: Condition, *, conditional: bool) -> list[Sample]:
    """conditional: orthogonal to the normals of the protocol's other attributes, InterFaceGAN's way to hold them."""
    stay = list(steps(study)) if conditional else ()
    return arithmetic(study.sampler, planes_of(study), samples, [condition] * len(samples), stay=stay)


METHODS: dict[str, Edit] = {
    "arithmetic": partial(linear, conditional=False),
    "arithmetic, conditional": partial(linear, conditional=True),
    PAPER: paper,
    FREE: free,
    OURS: keeping,
}


def steps(study: Study) -> dict[str, tuple[Choice, Choice]]:
    """STEPS as far as the bundle has the attributes; of a bundle that is not of the demonstration world, its own."""
    if not study.is_rendered:
        return edits(study.attributes, study.pool.labels)
    return {name: choices for name, choices in STEPS.items() if name in study.attributes}


def cells(study: Study) -> dict[str, Callable[[], Cell]]:
    return {f"editing/{method}": partial(cell, study, method) for method in METHODS} if steps(study) else {}


def cell(study: Study, method: str) -> Cell:
    """All stages of one method, and the same edits made singly.

    rows   acc (the whole target after the last edit); means over the edits: step_identity and single_identity (cosine
           of a stage with the one before it, of a single edit with the first picture), kept_classes and moved_values
           (what the edit did not mention); first_identity (last stage and first picture), energy, evaluations
    """
    edit, asked = METHODS[method], steps(study)
    beginning = reduce(and_, (attr(name, choices[0]) for name, choices in asked.items()))
    count = min(study.count, PAPER_ROWS) if method == PAPER else study.count
    first = study.sampler.sample(study.requests([beginning] * count))
    sequence, singles = [first], []
    for name, choices in asked.items():
        sequence.append(edit(study, sequence[-1], attr(name, choices[1])))
        singles.append(edit(study, first, attr(name, choices[1])))
    seen = [study.look(samples, embed=True) for samples in sequence]
    stages = [stage(study, seen, i) for i in range(len(seen))]
    single = np.stack([cosines(seen[0], study.look(samples, embed=True)) for samples in singles])
    rows = {
        "acc": stages[-1]["acc"], "first_identity": stages[-1]["first_identity"],
        "single_identity": single.mean(axis=0),
        **{name: np.mean([s[name] for s in stages[1:]], axis=0)
           for name in ("step_identity", "kept_classes", "moved_values")},
        **{name: np.mean([[getattr(s, name) for s in samples] for samples in sequence[1:]], axis=0)
           for name in ("energy", "evaluations")},
    }
    facts = {
        "rows": count, "stages": [{name: float(values.mean()) for name, values in s.items()} for s in stages],
        "singles": single.mean(axis=1).tolist(), "fid": study.near_renders(seen[-1].features)["fid"],
        **{name: float(values.mean()) for name, values in rows.items()},
        "step_half_width": half_width(1 - rows["step_identity"]),
        "single_half_width": half_width(1 - rows["single_identity"]),
    }
    strip = np.stack([found.pictures for found in seen], axis=1)[:SHOWN]
    return Cell(facts, {name: np.asarray(v, np.float32) for name, v in rows.items()}, {"strip": strip})


def stage(study: Study, seen: Sequence[Seen], number: int) -> dict[str, Array]:
    """What is true (n,) of the pictures after ``number`` edits; 0: of the first."""
    asked = steps(study)
    goal = [choices[i < number] for i, choices in enumerate(asked.values())]
    values = [index_of(study, name, choice) for name, choice in zip(asked, goal, strict=True)]
    now = seen[number]
    targets = Targets(tuple(asked), np.tile(values, (len(now.labels), 1)))
    found = {"acc": scores(targets, now.labels, study.attributes).mean(axis=1)}
    if not number:
        return found
    kept, moved = untouched(study, seen[number - 1].labels, now.labels, list(asked)[number - 1])
    return {**found, "step_identity": cosines(seen[number - 1], now), "first_identity": cosines(seen[0], now),
            "kept_classes": kept, "moved_values": moved}


def index_of(study: Study, name: str, choice: Choice) -> float:
    attribute = study.attributes[name]
    return float(class_index(attribute, choice) if attribute.kind == "class" else choice)


def untouched(study: Study, before: Array, after: Array, name: str) -> tuple[Array, Array]:
    """Of all attributes but ``name``: share of classes that did not change, mean change of the values; each (n,)."""
    others = [(i, a.kind) for i, (other, a) in enumerate(study.attributes.items()) if other != name]
    classes, values = ([i for i, kind in others if kind == wanted] for wanted in ("class", "value"))
    kept = (before[:, classes] == after[:, classes]).mean(axis=1) if classes else np.ones(len(before))
    moved = np.abs(before[:, values] - after[:, values]).mean(axis=1) if values else np.zeros(len(before))
    return kept, moved


def cosines(a: Seen, b: Seen) -> Array:
    return (a.embedded * b.embedded).sum(axis=1)


def facts(study: Study, found: Mapping[str, Cell]) -> dict:
    """JSON. cost: 1 - cosine of one step of the sequence, over that of one single edit."""
    methods = {}
    for name, made in found.items():
        per_step, per_single = 1 - made.facts["step_identity"], 1 - made.facts["single_identity"]
        methods[name.split("/")[1]] = {**made.facts, "cost": per_step / per_single if per_single > 0 else None}
    asked = {name: list(choices) for name, choices in steps(study).items()}
    return {"steps": asked, "methods": methods}
