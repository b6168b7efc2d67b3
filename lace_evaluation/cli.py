"""lace-eval: do a bundle's pictures show what was asked for?"""

import argparse
import os
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from engine.bundle import sha256
from engine.classifier import ImageClassifier
from engine.cli.console import (
    CHECK_FAILED,
    EXIT_CODES,
    OK,
    Parser,
    Terminal,
    guarded,
    parse,
    progress_bar,
    require,
    write_json,
)
from engine.cli.options import (
    SOLVER_SETTINGS,
    UsageError,
    add_sampler_options,
    check_label,
    one_of,
    open_sampler,
    opened,
    positive,
    seed,
    whole,
)
from engine.folders import writing_folder
from engine.reference.noise import SEED_LIMIT
from engine.requests import Request
from engine.sampler import Sampler
from lace_evaluation import OURS, SUITES, show
from lace_evaluation import goal_report as report
from lace_evaluation.goal import evaluate, summarise
from lace_evaluation.questions import CONDITIONS, check_judge, conditions_for
from lace_evaluation.world import JudgedIdentity, is_rendered
from lace_trainer import judges

if TYPE_CHECKING:
    from lace_evaluation.runner import Eyes

GOAL, ALL, POSTERIOR, ONESHOT = "goal", "all", "posterior", "oneshot"
EVERYWHERE = ("conditional", "editing", "logic")  # suites that any bundle can be asked
MEAN_OF, MEAN_SEED = 256, 2**42  # plain samples that say what the mean picture is
COUNT, SUITE_COUNT = 256, 192
CHOICES = (GOAL, *SUITES, ALL)
EPILOG = f"""suites:
  goal         a fixed list of one, two and three attributes, or --condition; the default
  conditional  one, two, three and all attributes beside the baselines: ACC, FID, cost
  editing      the paper's sequential protocol: ACC, identity, what else changed
  zero-shot    combinations rarer than 1 in 1,000 among plain samples
  logic        AND, OR, NOT, nested, bounds: product logic and the paper's
  solvers      accuracy, energy and distance from a converged solution against evaluations
  posterior    samples against the plain samples that satisfy a condition; needs sharp heads
  oneshot      one-pass maps against exact samples and the flow; trains six, of minutes each
  all          all but goal and oneshot; posterior only with sharp heads
Of a bundle that is not of the demonstration world (with --judge MODEL.onnx): goal, conditional, editing, logic. There
targets and Fréchet distances are those of plain samples, and identity is the judge's features.
A run of the suites that was stopped goes on where it was when it is started again with the same options.
A missed goal is a result, not an error: it is told and the exit code is 0. With --compare the exit code is 1 if a
metric of the second report is worse by more than chance.

{EXIT_CODES}"""


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="lace-eval", epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Judge a bundle's pictures with an image classifier that had no part in training the heads.",
    )
    add = parser.add_argument
    add("bundle", metavar="BUNDLE", nargs="?", help="a folder made by lace-export, or demo")
    add("--suite", type=one_of("suite", CHOICES), default=GOAL, metavar="NAME", help=f"{', '.join(CHOICES)} ({GOAL})")
    add("--compare", nargs=2, type=Path, metavar="REPORT", help="two reports of the suites, and nothing else")
    add("--judge", type=Path, default=judges.JUDGE, metavar="FILE", help="a classifier of lace-train, or an "
        ".onnx with its spec beside it (the package's)")
    add("--identity", type=Path, default=judges.IDENTITY, metavar="FILE", help="an identity network (the package's)")
    add("--count", type=positive, metavar="N", help=f"pictures of every condition ({COUNT}; the suites {SUITE_COUNT})")
    add("--seed", type=seed, default=0, metavar="S", help="of the first; the others follow (0)")
    add("--label", type=whole, metavar="N", help="class of a conditional generator")
    add("--condition", nargs="+", action="extend", default=[], metavar="TEXT", help="ask this instead of the list")
    add("--out", metavar="DIR", help="folder for the report and its pictures (the suite goal needs none)")
    add("--overwrite", action="store_true", help="replace DIR if it is an earlier result")
    add("--json", action="store_true", help="write report.json to standard output instead of tables")
    add_sampler_options(parser)
    return parser


def open_judge(path: Path, sampler: Sampler) -> tuple:
    """The classifier, and its hash and facts for the report; refused where it could not be impartial."""
    from lace_trainer.judges.classifier import load

    if path.suffix == ".onnx":
        judge = ImageClassifier(path, threads=0)
        hashes, facts = judge.hashes, judge.spec.facts
    else:
        judge = load(path)
        hashes, facts = (sha256(path),), judge.metadata
        drawn, read = sampler.bundle.generator.resolution, judge.shape.size
        if drawn != read:
            raise UsageError(f"the generator draws {drawn} px, the judge {path} reads {read} px: give --judge a "
                             "classifier of the generator's pictures, or an .onnx, which reads any")
    for attribute in sampler.bundle.attributes.values():
        origins = attribute.provenance, attribute.provenance.get("sharp", {})
        if any(set(hashes) & set(origin.get("trained_on", {}).get("labellers", ())) for origin in origins):
            raise UsageError(
                f"{path} labelled the pictures on which the head of {attribute.name!r} was trained: it cannot judge "
                "it; give --judge a classifier of another --role"
            )
    return judge, {"hash": hashes[0], **{key: facts[key] for key in ("role", "data", "accuracy") if key in facts}}


def open_eyes(options: argparse.Namespace, sampler: Sampler) -> "Eyes":
    """Who judges the suites."""
    from lace_evaluation.runner import Eyes
    from lace_trainer.judges import identity

    judge, judge_facts = open_judge(options.judge, sampler)
    if not isinstance(judge, ImageClassifier):
        check_judge(judge, sampler.bundle.attributes, sampler.bundle.attributes)
    if options.identity == judges.IDENTITY and not is_rendered(sampler.bundle.attributes):
        return Eyes(judge, judged_identity(judge, sampler, options), judge_facts,
                    {"hash": judge_facts["hash"], "kind": "the judge's features"})
    network = identity.load(options.identity)
    facts = {key: network.metadata[key] for key in ("verification",) if key in network.metadata}
    return Eyes(judge, network, judge_facts, {"hash": sha256(options.identity), **facts})


def judged_identity(judge, sampler: Sampler, options: argparse.Namespace) -> JudgedIdentity:
    """The package's identity network knows cartoon faces only."""
    requests = [Request(None, seed=MEAN_SEED + i, label=options.label) for i in range(MEAN_OF)]
    return JudgedIdentity(judge, np.stack([sample.image for sample in sampler.sample(requests)]))


def run_goal(options: argparse.Namespace) -> int:
    began = time.perf_counter()
    target = nullcontext() if options.out is None else writing_folder(
        options.out, marker=report.REPORT, overwrite=options.overwrite, error=UsageError)
    with target as folder:
        check_label(opened(options), options.label)
        sampler = open_sampler(options)
        judge, judge_facts = open_judge(options.judge, sampler)
        conditions = conditions_for(sampler, judge, options.condition)
        with progress_bar("judging") as progress:
            results, pictures = evaluate(sampler, judge, conditions, count=options.count, seed=options.seed,
                                         label=options.label, progress=progress)
        summaries = summarise(results)
        asked = {result.condition for result in results}
        is_asked = options.condition or not is_rendered(sampler.bundle.attributes)
        left_out = [] if is_asked else [text for text in CONDITIONS if text not in asked]
        facts = report.document(sampler, judge_facts, results, summaries, left_out=left_out, count=options.count,
                                seed=options.seed, seconds=time.perf_counter() - began)
        if folder is not None:
            report.write(folder, facts, results, summaries, pictures)
    if options.json:
        write_json(facts)
        return OK
    show.conditions(results, summaries, facts, Terminal())
    if options.out:
        Terminal().say(f"written: {options.out}")
    return OK


def open_variant(options: argparse.Namespace, **changes) -> Sampler:
    """The sampler of the command line, with other settings for what is compared with it."""
    reset = dict.fromkeys(SOLVER_SETTINGS) if "solver" in changes else {}
    return open_sampler(argparse.Namespace(**{**vars(options), **reset, **changes}))


def run_suites(options: argparse.Namespace) -> int:
    from lace_evaluation import runner

    if options.condition:
        raise UsageError("--condition is asked by the suite goal only: leave it out, or choose --suite goal")
    if options.out is None:
        raise UsageError("the suites write a folder of tables and pictures: give --out DIR")
    runner.check_packages()
    from lace_evaluation import report as suites_report  # it imports the packages that were just looked for

    out = runner.prepare(options.out, overwrite=options.overwrite)
    check_label(opened(options), options.label)
    eyes = open_eyes(options, open_sampler(options))
    is_sharp = all(head.sharp and head.sharp.calibrated for head in opened(options).heads.values())
    if options.suite in (POSTERIOR, ONESHOT) and not is_sharp:
        raise UsageError(f"the suite {options.suite} needs sharp heads, which this bundle lacks: train them with "
                         "lace-train heads --bundle B --labeller ..., and add them with lace-export --bundle B --add")
    left_out = {ONESHOT} if is_sharp else {ONESHOT, POSTERIOR}
    names = [name for name in SUITES if name not in left_out] if options.suite == ALL else [options.suite]
    if not is_rendered(opened(options).attributes):
        names = names if options.suite != ALL else [name for name in names if name in EVERYWHERE]
        if lost := [name for name in names if name not in EVERYWHERE]:
            raise UsageError(f"the suite {lost[0]} asks for what faces of the demonstration world show; of other "
                             f"bundles there are: {', '.join(EVERYWHERE)}, and goal")
    with progress_bar("plain samples and renders") as progress:
        run = runner.run(names, lambda **changes: open_variant(options, **changes), eyes, out, count=options.count,
                         seed=options.seed, label=options.label, progress=progress)
        facts = suites_report.write(out, run, eyes)
    if options.json:
        write_json(facts)
        return OK
    show.goals(facts, Terminal())
    Terminal().say(f"written: {out / suites_report.PAGE}")
    return OK


def run_compare(options: argparse.Namespace) -> int:
    from lace_evaluation import compare

    found = compare.compare(*map(compare.load, options.compare))
    if options.json:
        write_json([{**asdict(c), "difference": c.difference, "worse": c.worse} for c in found])
    else:
        show.changes(compare.notable(found, OURS), len(found), Terminal())
    return CHECK_FAILED if any(change.worse for change in found) else OK


def run(options: argparse.Namespace) -> int:
    require("train", "torch")
    import torch

    if options.compare:
        if options.bundle or options.suite != GOAL:
            raise UsageError("--compare reads two reports that are there: leave BUNDLE and --suite out")
        return run_compare(options)
    if options.bundle is None:
        raise UsageError("give BUNDLE, a folder made by lace-export or demo; or --compare A.json B.json")
    options.count = options.count or (COUNT if options.suite == GOAL else SUITE_COUNT)
    if options.seed + options.count > SEED_LIMIT:
        raise UsageError("seed + count goes beyond 2**64: choose a smaller seed")
    torch.set_num_threads(options.threads or os.cpu_count() or 1)
    return run_goal(options) if options.suite == GOAL else run_suites(options)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(build_parser(), arguments)
    return guarded(lambda: run(options), options.out)


if __name__ == "__main__":
    raise SystemExit(main())
