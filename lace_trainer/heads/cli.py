"""The commands of lace-train about heads: draw and heads."""

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from engine.cli.console import Terminal, new_table
from engine.cli.options import UsageError, flag, from_zero, not_negative, positive, real, tolerance
from lace_trainer.gan.cli import Report

if TYPE_CHECKING:
    from engine.sampler import Sampler
    from exporter.heads import HeadStack
    from lace_trainer.heads.calibration import Calibration
    from lace_trainer.heads.labelled import Labelled
    from lace_trainer.heads.pairs import Pairs

    Stacks = Sequence[HeadStack]

log = logging.getLogger(__name__)


def scale(text: str) -> tuple[str, tuple[float, float]]:
    """NAME=FACTOR or NAME=FACTOR,OFFSET."""
    name, mark, numbers = text.partition("=")
    parts = [real(part) for part in numbers.split(",")] if mark else []
    if not name or len(parts) not in (1, 2) or not parts[0]:
        raise argparse.ArgumentTypeError(f"{text!r} is no NAME=FACTOR or NAME=FACTOR,OFFSET, as age=0.01")
    return name, (parts[0], parts[1] if len(parts) == 2 else 0.0)


def add_draw(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("bundle", metavar="BUNDLE", help="a folder made by lace-export, or demo")
    add("--count", required=True, type=positive, metavar="N", help="number of pictures")
    add("--out", required=True, type=Path, metavar="DIR", help="folder for pictures, latents, labels.csv")
    add("--attributes", nargs="+", default=[], metavar="NAME", help="columns of labels.csv that are to be filled in")
    add("--overwrite", action="store_true", help="replace DIR if it is an earlier result")


def add_heads(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--gan", type=Path, metavar="FILE", help="checkpoint of the generator; needs --labeller")
    source.add_argument("--bundle", metavar="BUNDLE",
                        help="a bundle, of which the generator is used; needs --labeller, --table or --boundary")
    source.add_argument("--lace-data", type=Path, metavar="DIR", help="LACE's data files; needs --dataset")
    add("--labeller", type=Path, nargs="+", action="extend", metavar="FILE",
        help="classifiers that label the samples: .safetensors of lace-train, or .onnx with a spec beside it")
    add("--table", type=Path, metavar="FILE", help="with --bundle: labels of samples, by seed (lace-train draw) or for "
        "--latents")
    add("--latents", type=Path, metavar="FILE", help="with --table: the latents w that its rows speak of")
    add("--scale", type=scale, nargs="+", action="extend", default=[], metavar="NAME=X",
        help="with --table: value = X * number, as age=0.01 of years")
    add("--boundary", nargs="+", action="extend", default=[], metavar="NAME=FILE",
        help="with --bundle: boundaries of InterFaceGAN (.npy); calibrated where a labeller or a table knows NAME")
    add("--dataset", choices=("ffhq", "metfaces", "afhq"), help="which of LACE's data sets --lace-data holds")
    add("--out", required=True, type=Path, metavar="DIR", help="folder for one head per attribute")
    add("--attributes", nargs="+", metavar="NAME", help="only these (all)")
    add("--samples", type=positive, default=40_000, help="samples of the generator (40000)")
    add("--smooth", action=argparse.BooleanOptionalAction, default=True, help="train heads for the flow (yes)")
    add("--sharp", action=argparse.BooleanOptionalAction, default=True,
        help="train calibrated heads for the posterior (yes)")
    add("--hidden", type=positive, nargs="+", default=[96, 96, 96], metavar="N", help="widths, sharp (96 96 96)")
    add("--sharp-epochs", type=positive, default=25, help="the best on held-out pairs is kept (25)")
    add("--sought", type=positive, metavar="COUNT", help="with --bundle and --labeller: then train sharp heads again, "
        "with as many samples of the posterior of random conditions")
    add("--dropout", type=float, default=0.0, help="of sharp heads in training, where labels are noisy (0)")
    add("--steered", type=positive, metavar="COUNT", help="with --gan: then train again, with as many steered samples")
    add("--start", type=Path, nargs="+", metavar="FILE", help="heads that steer first (new ones, from plain samples)")
    add("--rounds", type=positive, default=1, help="how often to steer and train again (1)")
    add("--up-dim", type=positive, help="width of the last hidden layer (half of w, at most 128)")
    add("--epochs", type=positive, default=50, help="(50)")
    add("--batch", type=positive, default=128, help="pairs per step (128)")
    add("--rate", type=tolerance, default=1e-4, help="learning rate of Adam (1e-4)")
    add("--warmup", type=from_zero, default=1000, help="iterations of linear warm-up (1000)")
    add("--noise", type=not_negative, default=0.0, help="on w in training, in spreads of w: smooths the heads (0)")
    add("--precision", choices=("fp32", "bf16"), default="bf16", help="of the synthesis (bf16)")
    add("--cache", type=Path, metavar="DIR", help="where labelled samples are kept (--out/pairs)")


def check_options(options: argparse.Namespace) -> None:
    if options.bundle and not (options.labeller or options.table or options.boundary):
        raise UsageError("--bundle needs --labeller, --table or --boundary: who says what the samples show?")
    for given, needed in (("gan", "labeller"), ("lace_data", "dataset")):
        if getattr(options, given) and not getattr(options, needed):
            raise UsageError(f"{flag(given)} needs --{needed}")
    for name in ("table", "boundary"):
        if getattr(options, name) and not options.bundle:
            raise UsageError(f"{flag(name)} speaks of the samples of a bundle: it needs --bundle")
    if options.table and options.labeller:
        raise UsageError("--table and --labeller label other samples: train their heads one after the other (a head is "
                         "one file, and lace-export adds them all)")
    for name in ("latents", "scale"):
        if getattr(options, name) and not options.table:
            raise UsageError(f"{flag(name)} belongs to --table")
    if options.steered and not options.gan:
        raise UsageError("--steered draws samples of a generator: it needs --gan and --labeller")
    if options.sought and not (options.bundle and options.labeller and options.sharp):
        raise UsageError("--sought labels samples of the posterior of sharp heads in a bundle: it needs --bundle, "
                         "--labeller and --sharp")
    if options.start and not options.steered:
        raise UsageError("--start names heads that steer: it needs --steered")
    if not (options.smooth or options.sharp):
        raise UsageError("--no-smooth and --no-sharp leave nothing to train: leave one of them out")
    if not 0 <= options.dropout < 1:
        raise UsageError(f"--dropout is {options.dropout}: expected a number from 0 to below 1")


def draw_samples(options: argparse.Namespace, report: Report) -> dict:
    from engine.sampler import Sampler
    from lace_trainer.heads import drawn

    sampler = Sampler(options.bundle, threads=options.threads)
    drawn.draw(sampler, options.out, count=options.count, first=options.seed or 0, attributes=options.attributes,
               overwrite=options.overwrite, progress=report)
    return {"pictures": options.count, "table": str(options.out / drawn.TABLE),
            "latents": str(options.out / drawn.LATENTS)}


def train_heads(options: argparse.Namespace, report: Report) -> dict:
    from lace_trainer.heads.sharp import join
    from lace_trainer.heads.training import save_heads

    check_options(options)
    check_wanted(options)
    facts: dict = {}
    sharp = smooth = None
    boundaries: list[HeadStack] = []
    if options.boundary:
        boundaries, facts = make_boundaries(options, report)
    if options.labeller or options.table or options.lace_data:
        if options.sharp:
            sharp, found = train_sharp_heads(options, report)
            facts = merged(facts, found)
        if options.smooth:
            smooth, found = train_smooth_heads(options, report)
            facts = merged(facts, found)
    stacks = join(smooth, sharp) if smooth and sharp else smooth or sharp or []
    own = {stack.name for stack in boundaries}
    stacks = [*boundaries, *(stack for stack in stacks if stack.name not in own)]
    return {"heads": [str(path) for path in save_heads(options.out, stacks)], **facts}


def merged(facts: dict, more: dict) -> dict:
    """Both; tables of the same name become one."""
    return facts | {name: {**facts[name], **value} if isinstance(value, dict) and name in facts else value
                    for name, value in more.items()}


def check_wanted(options: argparse.Namespace) -> None:
    """Attributes that nobody labels are refused before the samples, which take long."""
    from lace_trainer.heads.labellers import Labellers
    from lace_trainer.heads.pairs import check_names

    if options.labeller:
        check_names(options.attributes or [], [attribute.name for attribute in Labellers(options.labeller).attributes])


def make_boundaries(options: argparse.Namespace, report: Report) -> tuple[list["HeadStack"], dict]:
    from lace_trainer.heads.boundaries import boundary_head, parse_boundaries

    sampler, wanted = open_sampler(options), parse_boundaries(options.boundary)
    data = labelled_of(options, report) if options.labeller or options.table else None
    made = [boundary_head(sampler, name, path, data) for name, path in wanted.items()]
    for stack, found in made:
        if found is None:
            log.warning("%s: nobody labels it, so its probabilities are not calibrated and the flow alone can use it: "
                        "give --labeller or --table", stack.name)
    calibrations = {found.name: summary(found) for _, found in made if found is not None}
    return [stack for stack, _ in made], {"calibration": calibrations} if calibrations else {}


def train_smooth_heads(options: argparse.Namespace, report: Report) -> tuple["Stacks", dict]:
    from exporter.heads import load_heads
    from lace_trainer.heads import training as heads
    from lace_trainer.heads.labellers import Labellers
    from lace_trainer.heads.steered import joined, steered_pairs

    seed, first_stacks = options.seed or 0, [load_heads(path) for path in options.start or ()]
    pairs = pairs_of(options, report)
    pairs = pairs.select(options.attributes) if options.attributes else pairs
    up_dim = options.up_dim or min(128, pairs.w.shape[1] // 2)
    config = heads.HeadsConfig(up_dim, options.batch, options.epochs, options.rate, options.warmup, seed,
                               options.noise)
    if options.start:
        stacks = first_stacks
    else:
        trained = heads.train_heads(pairs, config, progress=report)
        stacks = trained.stacks
    for number in range(options.rounds if options.steered else 0):
        steered = steered_pairs(options.gan, stacks, Labellers(options.labeller), count=options.steered,
                                seed=(seed << 8) + number, progress=report)
        pairs = joined(pairs, steered)
        trained = heads.train_heads(pairs, config, progress=report)
        stacks = trained.stacks
    return trained.stacks, {"pairs": len(pairs.w), "accuracy": trained.validation, "test_accuracy": trained.test,
                            "best_epoch": trained.best_epoch, "seconds": trained.seconds}


def pairs_of(options: argparse.Namespace, report: Report) -> "Pairs":
    """What smooth heads learn: labels."""
    from lace_trainer.heads.labellers import Labellers
    from lace_trainer.heads.lace_data import lace_pairs
    from lace_trainer.heads.pairs import sampled_pairs

    if options.lace_data:
        return lace_pairs(options.lace_data, options.dataset)
    if options.bundle:
        return labelled_of(options, report).pairs(options.seed or 0)
    return sampled_pairs(options.gan, Labellers(options.labeller), count=options.samples, seed=options.seed or 0,
                         precision=options.precision, directory=options.cache or options.out / "pairs",
                         progress=report)


def open_sampler(options: argparse.Namespace) -> "Sampler":
    from engine.sampler import Sampler

    return Sampler(options.bundle, threads=options.threads)


def labelled_of(options: argparse.Namespace, report: Report) -> "Labelled":
    """What sharp heads learn: votes, at truncations between 1/2 and 1 where a generator is at hand."""
    from lace_trainer.heads import labelled
    from lace_trainer.heads.drawn import labelled_table
    from lace_trainer.heads.labellers import Labellers
    from lace_trainer.tables import read_table

    if options.lace_data:
        return labelled.from_pairs(pairs_of(options, report))
    if options.table:
        return labelled_table(open_sampler(options), read_table(options.table), latents=options.latents,
                              attributes=options.attributes, scales=dict(options.scale), seed=options.seed or 0)
    source = (labelled.BundleSource(options.bundle, threads=options.threads) if options.bundle else
              labelled.CheckpointSource(options.gan, precision=options.precision))
    return labelled.labelled_samples(source, Labellers(options.labeller), count=options.samples,
                                     seed=options.seed or 0, directory=options.cache or options.out / "pairs",
                                     progress=report)


def train_sharp_heads(options: argparse.Namespace, report: Report) -> tuple["Stacks", dict]:
    from lace_trainer.heads import advice, calibration, labelled, sharp
    from lace_trainer.heads.labellers import Labellers

    data = labelled_of(options, report)
    data = data.select(options.attributes) if options.attributes else data
    config = sharp.SharpConfig(hidden=tuple(options.hidden), epochs=options.sharp_epochs, dropout=options.dropout,
                               seed=options.seed or 0)
    trained = sharp.train_sharp(data, config, progress=report)
    if options.sought:
        sought = labelled.sought_samples(options.bundle, trained.stacks, Labellers(options.labeller),
                                         count=options.sought, seed=options.seed or 0, threads=options.threads,
                                         progress=report)
        data = labelled.joined(data, sought)
        trained = sharp.train_sharp(data, config, progress=report)
    found = list(trained.calibration.values())
    made = advice.reports(data, trained.stacks, found)
    calibration.plot(options.out / "reliability.png", found)
    advice.plot_confusion(options.out / "confusion.png", made)
    for attribute in made:
        for said in attribute.warnings:
            log.warning("%s: %s", attribute.name, said)
    return advice.noted(trained.stacks, made), {
        "calibration": {c.name: summary(c) for c in found}, "worth": {r.name: advice.document(r) for r in made},
        "sharp_pairs": len(data.w), "sharp_seconds": trained.seconds}


def summary(found: "Calibration") -> dict:
    if found.kind == "value":
        return {"error": dict(found.error), "tolerance": found.tolerance}
    return {"temperature": found.temperature, "ece": dict(found.ece), "accuracy": dict(found.accuracy),
            "log_loss": dict(found.log_loss)}


def show(facts: dict, console: Terminal) -> None:
    """The tables of heads."""
    if "calibration" in facts:
        show_calibration(facts["calibration"], console)
    if "worth" in facts:
        show_worth(facts["worth"], console)


def show_calibration(found: dict, console: Terminal) -> None:
    """Sharp heads on held-out pairs, at each truncation."""
    table = new_table("calibration", "sharp head", "temperature>", "psi>", "calibration error>", "accuracy>",
                      "mean error>", "tolerance>")
    for name, facts in found.items():
        for psi in facts.get("ece", facts.get("error", {})):
            cells = ([f"{facts['temperature']:.2f}", psi, f"{facts['ece'][psi]:.4f}", f"{facts['accuracy'][psi]:.4f}",
                      "", ""] if "ece" in facts else
                     ["", psi, "", "", f"{facts['error'][psi]:.4f}", f"{facts['tolerance']:.3f}"])
            table.add_row(name, *cells)
    console.print(table)


def show_worth(found: dict, console: Terminal) -> None:
    """Of each attribute, what decides whether it is worth offering."""

    def number(value: float | None, digits: int = 3) -> str:
        return "" if value is None else f"{value:.{digits}f}"

    table = new_table("worth offering", "attribute", "head>", "a guess>", "labeller, mirrored>", "calibration error>",
                      "temperature>", "sure of", "worth offering")
    for name, facts in found.items():
        sure = ", ".join(f"{key} {share:.1%}" for key, share in facts["sure"].items())
        table.add_row(name, number(facts["accuracy"]), number(facts["guess"]), number(facts["mirrored"]),
                      number(facts["ece"]), number(facts["temperature"], 2), sure, facts["worth"])
    console.print(table)
    console.print("rates on held-out samples: hit rate of a class, 1 - mean absolute error of a value; sure: samples "
                  "of which the head says more than 0.9", style="dim")
