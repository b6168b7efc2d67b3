"""One-pass maps: are their samples those of the posterior, and what do they cost?

A cell is a condition. A map is trained for it, and its rows, the same after four steps of polish, exact samples and the
flow's are compared with other exact samples, by heads and by the judge, who sees the pictures.

    exact     the posterior's samples: the truth, from other seeds than those that it is compared with
    map, map + polish
    flow      the default of bundles without sharp heads
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from numpy import ndarray as Array

from engine.condition import Condition
from engine.grammar import parse
from engine.oneshot import Wish
from engine.reference.field import head, layers
from engine.reference.noise import normals_many
from engine.requests import Request, Sample
from engine.sampler import Sampler
from engine.solvers import GaussNewton
from exporter.exporting import add_parts
from lace_evaluation import likeness
from lace_evaluation.goal_report import percent, rows
from lace_evaluation.posterior import branches, true
from lace_evaluation.store import Cell
from lace_evaluation.study import Seen, Study
from lace_trainer.oneshot.making import make_oneshot
from lace_trainer.oneshot.training import MapConfig

CONFIG = MapConfig()
SAMPLES = 20_000
NAME, POLISH = "map", 4
EXACT, MAP, POLISHED, FLOW = "exact", "map", "map + polish", "flow"
METHODS = (EXACT, MAP, POLISHED, FLOW)
TIMES = 8  # rows of a cell for every row of ``study.count``
TRUTH_SEED = 2**41  # added to the seed: the truth shares no sample with what is compared with it
BATCHES = 256, 1  # rows of a call whose time is taken
REPEATS = 5

# Common, 1 in 14, AND of three with a value, OR, rare, and an exclusive one.
CONDITIONS = ("smile", "beard", "smile & ~glasses & age=0.7", "hat | beard", "glasses & haircolor=grey & age=0.75",
              "(hat & glasses) | (beard & bald)")
TEXT = """
Each map was fitted to at most {samples} exact samples of its condition; the truth are {rows} others. Holds: share of
rows for which the condition is true, by the sharp heads and by the judge. Others: mean distance of the attributes that
nobody asked for, by the judge (total variation of a class, Kolmogorov-Smirnov of a value), and by chance. Coverage of
the truth by the judge's features, in brackets between parts of the truth. us: of one latent in a call of {batch} rows
and alone, best of {repeats}, without a look at where the map's end. Pays from: how rare a wish must be for one pass to
cost less than an exact sample."""

# What must hold, against exact samples.
HOLDS, HOLDS_RARE, RARE, JUDGE, OTHERS, NOISE = 0.02, 0.03, 1 / 500, 0.03, 0.03, 0.01
BRANCH, COVERAGE, SECONDS = 0.03, 0.02, 300.0


def cells(study: Study) -> dict[str, Callable[[], Cell]]:
    known = [text for text in CONDITIONS if set(parse(text).attributes()) <= set(study.attributes)]
    return {f"oneshot/{text}": partial(cell, study, parse(text)) for text in known}


def cell(study: Study, condition: Condition) -> Cell:
    count, bundle, psi = TIMES * study.count, study.sampler.bundle, study.sampler.starts.truncation
    with TemporaryDirectory(prefix="lace-oneshot-") as folder:
        part, began = Path(folder) / "map.safetensors", time.process_time()
        record = make_oneshot(bundle, Wish(str(condition)), part, name=NAME, config=CONFIG, truncation=psi,
                              label=study.label, samples=SAMPLES)
        spent = time.process_time() - began
        sampler = Sampler(add_parts(bundle, [part], out=Path(folder) / "map.lace"), threads=1)
        drawn = draw(study, sampler, condition, count)
        times = {str(batch): timed(study, sampler, condition, batch) for batch in BATCHES}
    truth = drawn.pop("truth")
    against = study.look(truth)
    facts = {method: compared(study, condition, samples, against) for method, samples in drawn.items()}
    provenance = dict(record.provenance)
    return Cell({"rows": count, "rate": provenance["rate"], "samples": provenance["samples"], "cpu_seconds": spent,
                 "measured": dict(record.measured), "times": times, "methods": facts,
                 "branches": branches(study, condition, against.labels)})


def draw(study: Study, sampler: Sampler, condition: Condition, count: int) -> dict[str, list[Sample]]:
    """Of each method, and the truth, ``count`` samples; the condition is each method's own way."""
    posterior = study.open_sampler(solver="posterior")
    flow = study.open_sampler(solver=GaussNewton())

    def requests(first: int) -> list[Request]:
        return [Request(condition, seed=study.seed + first + i, label=study.label) for i in range(count)]

    def mapped(polish: int) -> list[Sample]:
        seeds = range(study.seed, study.seed + count)
        return sampler.solve(oneshot=NAME, seeds=seeds, polish=polish)

    return {EXACT: posterior.solve(requests(0)), MAP: mapped(0), POLISHED: mapped(POLISH),
            FLOW: flow.solve(requests(0)), "truth": posterior.solve(requests(TRUTH_SEED))}


def compared(study: Study, condition: Condition, samples: Sequence[Sample], truth: Seen) -> dict:
    """A method's samples against the truth."""
    seen = study.look(samples)
    names = [name for name in study.attributes if name not in condition.attributes()]
    others = likeness.labels_likeness(truth.labels, seen.labels, study.attributes, names).values()
    near = likeness.features_likeness(truth.features, seen.features)
    return {
        "holds": float(true(study, condition, sharp_labels(study, samples)).mean()),
        "judge": float(true(study, condition, seen.labels).mean()),
        "others": float(np.mean([o["distance"] for o in others])),
        "chance": float(np.mean([o["chance"] for o in others])),
        "branches": branches(study, condition, seen.labels), **near,
    }


def sharp_labels(study: Study, samples: Sequence[Sample]) -> Array:
    """What the sharp heads read at the samples' latents, as labels (n, attributes)."""
    bundle, labels = study.sampler.bundle, []
    for attribute in study.attributes.values():
        x = np.stack([s.w if bundle.heads[attribute.head].space == "w" else s.latent for s in samples])
        logits = head(layers(bundle.field, f"head.{attribute.head}.sharp"), x)[0][:, slice(*attribute.columns)]
        labels.append(logits.argmax(axis=1) if attribute.kind == "class" else logits[:, 0])
    return np.stack(labels, axis=1).astype(np.float32)


def timed(study: Study, sampler: Sampler, condition: Condition, batch: int) -> dict[str, float]:
    """Microseconds of one latent, in calls of ``batch``: of the map alone, of the posterior and of the flow."""
    width, solving = sampler.bundle.generator.z_dim, sampler.runtime.solving
    noise = normals_many(range(batch), [0] * batch, width).astype(solving.dtype)
    flow = Sampler(sampler.bundle, threads=1, solver="gauss-newton", capacity=max(batch, 1))
    exact = Sampler(sampler.bundle, threads=1, solver="posterior", capacity=max(batch, 1))
    wanted = [Request(condition, seed=seed, label=study.label) for seed in range(batch)]
    runs: dict[str, Callable[[], object]] = {
        MAP: lambda: solving.oneshot(NAME, noise, None), EXACT: lambda: exact.solve(wanted),
        FLOW: lambda: flow.solve(wanted)}
    return {name: 1e6 * min(seconds(run) for _ in range(REPEATS)) / batch for name, run in runs.items()}


def seconds(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def facts(study: Study, found: Mapping[str, Cell]) -> dict:
    """JSON: of every condition the map's cost, and what each method makes of it."""
    return {"conditions": [{"condition": name.partition("/")[2], **cell.facts} for name, cell in found.items()]}


# --- as text --------------------------------------------------------------------------------------------------------


def section(facts: Mapping) -> list[str]:
    conditions = facts["conditions"]
    shown = TEXT.strip().format(samples=SAMPLES, rows=conditions[0]["rows"] if conditions else 0, batch=BATCHES[0],
                                repeats=REPEATS)
    lines = ["## One-pass maps", "", shown, "", *rows(
        ("condition", "1 in", "method", "holds", "judge", "others (chance)", "coverage (floor)", "branches",
         f"us at {BATCHES[0]}", "us at 1"), [row for c in conditions for row in condition_rows(c)]), ""]
    return [*lines, *rows(("condition", "exact samples", "CPU seconds", "pays from 1 in"),
                          [cost_row(c) for c in conditions]), ""]


def condition_rows(c: Mapping) -> Iterator[list[str]]:
    for method in METHODS:
        m = c["methods"][method]
        times = [f"{c['times'][str(batch)][method]:.0f}" if method in c["times"][str(batch)] else ""
                 for batch in BATCHES]
        yield [f"`{c['condition']}`", f"{1 / c['rate']:.0f}", method, f"{m['holds']:.3f}", f"{m['judge']:.3f}",
               f"{m['others']:.3f} ({m['chance']:.3f})", f"{m['coverage']:.2f} ({m['coverage_floor']:.2f})",
               " / ".join(percent(share) for share in m["branches"].values()), *times]


def cost_row(c: Mapping) -> list[str]:
    return [f"`{c['condition']}`", f"{c['samples']:,}", f"{c['cpu_seconds']:.0f}", f"{break_even(c):.1f}"]


def break_even(c: Mapping) -> float:
    """The rarity at which exact samples cost as much as one pass, if their cost is that of their candidates."""
    times = c["times"][str(BATCHES[0])]
    return times[MAP] * (1 / c["rate"]) / times[EXACT]


def plot(facts: Mapping, folder: Path) -> None:
    """None: the table says it all."""


def goals(facts: Mapping) -> Iterator[tuple[str, str, bool | None]]:
    """(text, found, met) of what maps promise, of every condition."""
    for c in facts["conditions"]:
        methods, where = c["methods"], f"one-pass map of {c['condition']}: "
        exact, made, polished = methods[EXACT], methods[MAP], methods[POLISHED]
        holds = HOLDS_RARE if c["rate"] < RARE else HOLDS
        yield of(where, f"heads within {100 * holds:.0f} points of exact", exact["holds"] - made["holds"], holds)
        yield of(where, f"judge within {100 * JUDGE:.0f} points", exact["judge"] - made["judge"], JUDGE)
        yield of(where, f"others at most {OTHERS:g} above chance", made["others"] - made["chance"], OTHERS)
        gap = polished["others"] - exact["others"]
        yield of(where, f"others, polished, at most {NOISE:g} above exact samples'", gap, NOISE)
        yield of(where, "coverage within 2 points of exact", exact["coverage"] - made["coverage"], COVERAGE)
        yield of(where, f"at most {SECONDS:.0f} CPU seconds", c["cpu_seconds"], SECONDS)
        if made["branches"]:
            gap = max(abs(made["branches"][b] - share) for b, share in exact["branches"].items())
            yield of(where, "branches within 3 points", gap, BRANCH)


def of(where: str, text: str, value: float, most: float) -> tuple[str, str, bool | None]:
    return where + text, f"{value:.3f}", value <= most
