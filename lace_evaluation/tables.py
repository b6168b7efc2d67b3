"""The suites as Markdown: methods as rows, what was measured as columns."""

from collections.abc import Mapping, Sequence

from engine.text import code, markdown
from lace_evaluation import OURS, oneshot, posterior_report
from lace_evaluation.baselines import TRIES
from lace_evaluation.conditional import RENDERS, rows_of
from lace_evaluation.goal_report import percent, rows
from lace_evaluation.methods import LEVELS, METHODS, REFERENCE, TIGHT
from lace_evaluation.nearness import FAR
from lace_evaluation.paper import BATCH
from lace_evaluation.solvers import DEFAULT, PAPER
from lace_evaluation.world import RENDERS as FRESH_RENDERS

CONDITIONAL = """
ACC: mean over the asked attributes of the hit rate (class) or 1 - mean absolute error (value), by the judge. Classes
and error: the two apart. All hold: every statement is true, values to within 0.1; by the heads: as the bundle's own
heads see it. FID, precision, recall: against {fid_from} {reference}, in the judge's features, for targets of the
training law only: uniform targets differ from those by intention. A distance from few rows is larger, so compare it
within one table. Reached: rows with an answer at all; rejection sampling gives up after {tries} proposals, and such a
row counts as ACC 0. Moved: distance in w from the plain sample, in spreads of w. `renders` are real pictures with the
wanted labels, where there is a renderer: what the judge makes of the truth. Evaluations: of the field with its
gradient; for rejection, proposals; for arithmetic, looks of the heads. ms: of solving one row, without decoding.

{share:.0%} of the variance of the features of {reference} lies along one direction, in which {far:.1%} of them are far
out: more than {spreads:g} standard deviations. So a distance depends much on a few pictures; far out: the share of a
method's pictures that are. The plot leaves out a method without an answer for most rows."""
METHODS_TEXT = """
All methods start from the same seeds. plain: no condition. rejection: plain samples until the heads accept one, values
within 0.1. arithmetic: steps in w along the normals of linear classifiers that were fitted to the heads' labels
(InterFaceGAN), each as long as the heads like best. langevin: the paper's Langevin dynamics with the settings of its
scripts. predictor-corrector: the paper's SDE in {levels} levels; sde: the same without the corrector. dopri5 (paper):
the paper's ODE solver through torchdiffeq, rtol = atol = 1e-3, {batch} rows to a shared step. ours: the sampler with
the settings under Origin. converged: no baseline but the flow that ours and dopri5 follow, solved by {reference} at
{tight:.0e}."""
EDITING = """
Each edit starts from the picture before it and holds the targets of the edits before. Cosine: of the identity
embedding, 1 is the same person, between a stage and the one before it; a single edit is the same edit made from the
first picture, and the cost compares 1 - cosine of the two. Classes kept and values moved: what the edit did not
mention, by the judge. `ours` keeps the logits of all other attributes and the distance in z and w, with the paper's
weights."""
LOGIC = """
Of how many pictures the formula is true, by the judge (values to within 0.1). Paper: its constants for NOT and OR under
its solver; paper's logic: the same constants under ours; product logic: the default."""
BRANCHES = """
Which branch of an OR the pictures take that fulfil it. A calibrated OR takes them as plain samples do:"""
SOLVERS = """
Error: distance in z from a converged solution, over the length of its way; root mean square over the rows, and median.
Doubt: the same between two converged solutions of different methods, below which an error means nothing. Rows on which
the two part have no known end and are left out of the errors. A few rows that end far off make most of an error, so
the default and the paper's solver are compared by the bootstrap, with the same rows drawn for both."""
SIZES = {"one": "One attribute", "two": "Two attributes", "three": "Three attributes", "all": "All attributes"}
SOURCES = {"training": "targets drawn as the training data", "uniform": "uniform targets"}


def number(value: float | None, digits: int = 3) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def count(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}"


def bold(cells: Sequence[str], method: str) -> list[str]:
    return [f"**{cell}**" if cell and method == OURS else cell for cell in cells]


def goal_table(found: Sequence[Mapping]) -> list[str]:
    words = {True: "met", False: "**not met**", None: "cannot tell"}
    lines = rows(("goal", "found", ""), [(g["text"], g["found"], words[g["met"]]) for g in found])
    short = [g for g in found if g["notes"]]
    notes = [line for g in short for line in (f"- {g['text']}:", *(f"  - {note}" for note in g["notes"]))]
    return [*lines, "", *(["What falls short, and what the data say of it:", "", *notes, ""] if notes else [])]


def conditional(facts: Mapping) -> list[str]:
    lines = [
        "## Conditional sampling", "",
        METHODS_TEXT.strip().format(levels=LEVELS, batch=BATCH, reference=REFERENCE, tight=TIGHT), "",
        CONDITIONAL.strip().format(fid_from=facts["fid_from"], tries=TRIES, spreads=FAR, **facts["renders"],
                                   reference=facts.get("reference", FRESH_RENDERS)), "",
        "![ACC against FID](conditional.png)", "",
    ]
    for size, sources in facts["sets"].items():
        listed = "; ".join(", ".join(map(markdown, names)) for names in facts["groups"][size])
        groups = "" if size in ("one", "all") else f" ({listed})"
        for source in ("training", "uniform"):
            methods = sources[source]
            lines += [f"### {SIZES[size]}{groups}, {SOURCES[source]}", "", f"{methods[OURS]['rows']} rows.", ""]
            near = ("FID", "far out", "precision", "recall") if source == "training" else ()
            lines += rows(
                ("method", "ACC", "classes", "error", "all hold", "by the heads", *near, "reached", "moved", "energy",
                 "evaluations", "ms"),
                [conditional_row(name, methods[name], source) for name in rows_of(source) if name in methods],
            )
            lines.append("")
    for size, source in (("one", "uniform"), ("all", "training")):
        if size in facts["sets"]:
            lines += attribute_table(size, source, facts["sets"][size][source])
    return [*lines, "![ACC of each attribute](attributes.png)", "", "![samples](conditional-samples.png)", ""]


def conditional_row(name: str, f: Mapping, source: str) -> list[str]:
    acc = f"{f['acc']:.3f} ± {f['acc_half_width']:.3f}"
    near = []
    if source == "training":
        near = [number(f["fid"]), percent(f["far"]), number(f["precision"]), number(f["recall"])]
    cells = [name, acc, percent(f["classes"]), number(f["error"]), percent(f["holds"])]
    if name == RENDERS:
        return [*cells, "", *near, "", "", "", "", ""]
    cost = f["seconds"]["solve"] / f["rows"] * 1e3
    return bold([*cells, percent(f["heads"]), *near, percent(f["reached"]), number(f["moved"], 2),
                 f"{f['energy']:.3g}", count(f["evaluations"]), count(cost)], name)


def attribute_table(size: str, source: str, methods: Mapping) -> list[str]:
    names = list(methods[OURS]["attributes"])
    return [
        f"### {SIZES[size]}, {SOURCES[source]}: ACC of each", "",
        *rows(("method", *map(markdown, names)), [
            bold([name, *(number(methods[name]["attributes"][n]) for n in names)], name)
            for name in (RENDERS, *METHODS) if name in methods
        ]), "",
    ]


def editing(facts: Mapping) -> list[str]:
    path = ", then ".join(markdown(f"{name} {old} → {new}") for name, (old, new) in facts["steps"].items())
    table = rows(
        ("method", "rows", "ACC at the end", "FID at the end", "cosine, a step", "cosine, a single edit",
         "cost of a step over a single edit", "cosine with the first", "classes kept", "values moved", "evaluations"),
        [bold([name, str(f["rows"]), number(f["acc"]), number(f["fid"]), number(f["step_identity"]),
               number(f["single_identity"]), number(f["cost"], 2), number(f["first_identity"]),
               percent(f["kept_classes"]), number(f["moved_values"]), count(f["evaluations"])], name)
         for name, f in facts["methods"].items()],
    )
    stages = rows(
        ("ACC after", "start", *map(markdown, facts["steps"])),
        [bold([name, *(number(stage["acc"]) for stage in f["stages"])], name) for name, f in facts["methods"].items()],
    )
    return [
        "## Sequential editing", "",
        f"{path}. {EDITING.strip()}", "",
        *table, "", *stages, "", "![stages](editing.png)", "", "![film strip](editing-strip.png)", "",
    ]


def zero_shot(facts: Mapping) -> list[str]:
    heading = ["## Zero-shot combinations", ""]
    if not facts["combinations"]:
        return [*heading, f"None of the candidates is rarer than 1 in 1,000 among {facts['plain']} plain samples.", ""]
    combinations = rows(
        ("", "combination", f"of {facts['plain']} plain samples", *METHODS),
        [(chr(65 + i), code(c["condition"]), f"{c['plain_hits']} (at most {c['plain_interval'][1]:.2%})",
          *(f"**{v:.0%}**" if m == OURS else f"{v:.0%}" for m, v in ((m, c["methods"][m]["holds"]) for m in METHODS)))
         for i, c in enumerate(facts["combinations"])],
    )
    summary = rows(
        ("method", "ACC", "all hold", "by the heads", "reached", "moved", "energy", "evaluations"),
        [bold([name, number(f["acc"]), percent(f["holds"]), percent(f["heads"]), percent(f["reached"]),
               number(f["moved"], 2), f"{f['energy']:.3g}", count(f["evaluations"])], name)
         for name, f in facts["methods"].items()],
    )
    common = [f"{code(text)} ({hits})" for text, hits in facts["too_common"].items()]
    return [
        *heading, "Combinations that fewer than 1 in 1,000 plain samples show, by the judge. In how many pictures all "
        "of it is true:", "", *combinations, "", "Mean over the combinations:", "", *summary, "",
        *([f"Left out, because plain samples show them more often: {', '.join(common)}.", ""] if common else []),
        "![combinations](zero-shot.png)", "", "![samples](zero-shot-samples.png)", "",
    ]


def logic(facts: Mapping) -> list[str]:
    table = rows(
        ("", "formula", "plain", "paper", "paper's logic", "product logic", "95 %", "product, by the heads",
         "evaluations"), [logic_row(f["kind"], f["formula"], f["plain"], f["methods"]) for f in facts["formulas"]],
    )

    def taken(shares: Mapping | None) -> str:
        return "" if shares is None else " / ".join(f"{shares[k]:.0%}" for k in ("first", "second", "both"))

    branches = rows(
        ("OR: first / second / both", "plain samples", "paper", "paper's logic", "product logic"),
        [(code(f["formula"]), taken(f["plain_branches"]),
          *(taken(f["methods"][m]["branches"]) for m in ("paper", "lace", "product")))
         for f in facts["formulas"] if f["kind"] == "or"],
    )
    return [
        "## Logic", "",
        LOGIC.strip(), "", *table, "", BRANCHES.strip(), "",
        *branches, "", "![formulas](logic.png)", "", "![samples](logic-samples.png)", "",
    ]


def logic_row(kind: str, formula: str, plain: float, methods: Mapping) -> list[str]:
    product = methods["product"]
    low, high = product["interval"]
    return [kind, code(formula), percent(plain), percent(methods["paper"]["true"]), percent(methods["lace"]["true"]),
            f"**{percent(product['true'])}**", f"{100 * low:.0f}–{100 * high:.0f}", percent(product["heads"]),
            count(product["evaluations"])]


def solvers(facts: Mapping) -> list[str]:
    lines = [
        "## Solvers", "",
        SOLVERS.strip(), "", "![accuracy, energy and error against evaluations](solvers.png)", "",
    ]
    for name, found in facts["sets"].items():
        exact = found["reference"]
        lines += [
            f"### Set `{name}`: {', '.join(map(markdown, found['asked']))}", "",
            f"{exact['rows']} rows. Reference: {exact['method']} at {exact['tolerance']:.0e}, ACC {exact['acc']:.3f}, "
            f"{exact['evaluations']:.0f} evaluations, energy {exact['energy']:.4g}; doubt {exact['doubt']['rms']:.3f} "
            f"(median {exact['doubt']['median']:.3f}); {exact['determined']} rows have a known end.", "",
            *rows(("solver", "ACC", "energy", "error", "median", "in w", "evaluations", "most"),
                  [solver_row(label, f) for label, f in sorted(found["solvers"].items(), key=by_evaluations)]), "",
        ]
    return lines


def by_evaluations(item: tuple[str, Mapping]) -> float:
    return item[1]["evaluations"]


def solver_row(label: str, f: Mapping) -> list[str]:
    late = "" if f["arrived"] == 1 else f" ({1 - f['arrived']:.0%} did not arrive)"
    cells = [f"{label}{late}", number(f["acc"]), f"{f['energy']:.4g}", number(f["error"]["rms"]),
             number(f["error"]["median"]), number(f["error_w"]["rms"]), count(f["evaluations"]),
             str(f["most_evaluations"])]
    return [f"**{cell}**" for cell in cells] if label in (DEFAULT, PAPER) else cells


SECTIONS = {
    "conditional": conditional, "editing": editing, "zero-shot": zero_shot, "logic": logic, "solvers": solvers,
    "posterior": posterior_report.section, "oneshot": oneshot.section,
}
