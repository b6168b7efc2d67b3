"""lace-train: train a small generator, image classifiers and attribute heads."""

import argparse
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.logging import RichHandler
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from engine.cli.console import EXIT_CODES, OK, Parser, Terminal, guarded, new_table, parse, require, write_json
from engine.cli.options import UsageError, flag, from_zero, not_negative, positive, seed, threads, tolerance
from lace_trainer.gan.cli import Report, add_gan, add_score, score_gan, train_gan

if TYPE_CHECKING:
    from rich.table import Table

    from exporter.heads import HeadStack
    from lace_trainer.heads.calibration import Calibration
    from lace_trainer.heads.labelled import Labelled
    from lace_trainer.heads.pairs import Pairs

    Stacks = Sequence[HeadStack]

log = logging.getLogger(__name__)

EXAMPLE = f"""the demonstration bundle from nothing:
  lace-train gan        --data render:40000 --size 64 --pictures 2_000_000 --out runs/gan
  lace-train classifier --role labeller --out runs/labeller.safetensors
  lace-train heads      --gan runs/gan/generator.safetensors --labeller runs/labeller.safetensors --out runs/heads
  lace-export           --gan runs/gan/checkpoint.pt --heads runs/heads/*.safetensors --out demo.lace

{EXIT_CODES}"""


def build_parser() -> argparse.ArgumentParser:
    layout = {"formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = Parser(prog="lace-train", description="Train the demonstration world, or heads.", epilog=EXAMPLE, **layout)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--seed", type=seed, help="of everything random")
    common.add_argument("--threads", type=threads, default=os.cpu_count(), metavar="N",
                        help="processor threads (%(default)s)")
    common.add_argument("--json", action="store_true", help="write the result as JSON")
    commands = parser.add_subparsers(dest="command", required=True, metavar="{gan,score,classifier,identity,heads}")
    for name, help_text, add_options in (
        ("gan", "train a StyleGAN2", add_gan),
        ("score", "Fréchet distance, precision and recall of a generator", add_score),
        ("classifier", "train an image classifier on rendered faces", add_classifier),
        ("identity", "train an embedding that tells rendered people apart", add_identity),
        ("heads", "train attribute heads on w", add_heads),
    ):
        add_options(commands.add_parser(name, parents=[common], help=help_text, **layout))
    return parser


def add_classifier(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--role", required=True, choices=("labeller", "judge"), help="labels samples for the heads, or measures ACC")
    add("--out", required=True, type=Path, metavar="FILE", help="the .safetensors file to write")
    add("--pictures", type=positive, default=40_000, help="rendered faces to train on (40000)")
    add("--validation", type=positive, default=4000, help="rendered faces to validate on (4000)")
    add("--epochs", type=positive, default=7, help="(7)")
    add("--precision", choices=("fp32", "bf16"), default="bf16", help="(bf16)")
    add("--cache", type=Path, metavar="DIR", help="where rendered faces are kept (the folder of --out)")
    add("--device", default="cpu", help="cpu, cuda or cuda:N (cpu)")


def add_identity(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--out", required=True, type=Path, metavar="FILE", help="the .safetensors file to write")
    add("--people", type=positive, default=6000, help="rendered people to learn from (6000)")
    add("--views", type=positive, default=6, help="pictures of each (6)")
    add("--held-out", type=positive, default=500, help="people to be judged by (500)")
    add("--steps", type=positive, default=1200, help="(1200)")
    add("--precision", choices=("fp32", "bf16"), default="bf16", help="(bf16)")
    add("--cache", type=Path, metavar="DIR", help="where rendered people are kept (the folder of --out)")
    add("--device", default="cpu", help="cpu, cuda or cuda:N (cpu)")


def add_heads(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--gan", type=Path, metavar="FILE", help="checkpoint of the generator; needs --labeller")
    source.add_argument("--bundle", metavar="BUNDLE", help="a bundle, of which the generator is used; needs --labeller")
    source.add_argument("--lace-data", type=Path, metavar="DIR", help="LACE's data files; needs --dataset")
    add("--labeller", type=Path, nargs="+", metavar="FILE", help="classifiers that label the samples")
    add("--dataset", choices=("ffhq", "metfaces", "afhq"), help="which of LACE's data sets --lace-data holds")
    add("--out", required=True, type=Path, metavar="DIR", help="folder for one head per attribute")
    add("--attributes", nargs="+", metavar="NAME", help="only these (all)")
    add("--samples", type=positive, default=40_000, help="samples of the generator (40000)")
    add("--smooth", action=argparse.BooleanOptionalAction, default=True, help="train heads for the flow (yes)")
    add("--sharp", action=argparse.BooleanOptionalAction, default=True,
        help="train calibrated heads for the posterior (yes)")
    add("--hidden", type=positive, nargs="+", default=[96, 96, 96], metavar="N", help="widths, sharp (96 96 96)")
    add("--sharp-epochs", type=positive, default=25, help="the best on held-out pairs is kept (25)")
    add("--sought", type=positive, metavar="COUNT",
        help="with --bundle: then train sharp heads again, with as many samples of the posterior of random conditions")
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


def train_classifier(options: argparse.Namespace, report: Report) -> dict:
    from lace_trainer.faces import ATTRIBUTES
    from lace_trainer.faces.pictures import rendered
    from lace_trainer.judges import classifier

    role, cache = classifier.ROLES[options.role], options.cache or options.out.parent
    size, seed = role.shape.size, role.seed if options.seed is None else options.seed
    validation = rendered(options.validation, size, classifier.VALIDATION_SEED, cache)
    data = rendered(options.pictures, size, role.pictures_seed, cache)
    config = classifier.ClassifierConfig(epochs=options.epochs, seed=seed, precision=options.precision,
                                         device=options.device)
    model = classifier.train(role.shape, ATTRIBUTES, data, config, validation=validation, progress=report)
    model.metadata |= {"role": options.role, "data": f"render:{options.pictures}",
                       "pictures_seed": role.pictures_seed, "validation_seed": classifier.VALIDATION_SEED}
    classifier.save(model, options.out)
    return {"classifier": str(options.out), **model.metadata}


def train_identity(options: argparse.Namespace, report: Report) -> dict:
    from lace_trainer.faces.pictures import portraits
    from lace_trainer.judges import identity

    cache, size = options.cache or options.out.parent, identity.SHAPE.size
    held_out = portraits(options.held_out, options.views, size, identity.HELD_OUT_SEED, cache)
    people = portraits(options.people, options.views, size, identity.PEOPLE_SEED, cache)
    config = identity.IdentityConfig(steps=options.steps, seed=options.seed or 0, precision=options.precision,
                                     device=options.device)
    model = identity.train(people, config, held_out=held_out, progress=report)
    model.metadata |= {"people_seed": identity.PEOPLE_SEED, "held_out_seed": identity.HELD_OUT_SEED}
    identity.save(model, options.out)
    return {"identity": str(options.out), **model.metadata["verification"], "seconds": model.metadata["seconds"]}


def check_heads_options(options: argparse.Namespace) -> None:
    for given, needed in (("gan", "labeller"), ("bundle", "labeller"), ("lace_data", "dataset")):
        if getattr(options, given) and not getattr(options, needed):
            raise UsageError(f"{flag(given)} needs --{needed}")
    if options.steered and not options.gan:
        raise UsageError("--steered draws samples of a generator: it needs --gan and --labeller")
    if options.sought and not (options.bundle and options.sharp):
        raise UsageError("--sought samples the posterior of sharp heads in a bundle: it needs --bundle and --sharp")
    if options.start and not options.steered:
        raise UsageError("--start names heads that steer: it needs --steered")
    if not (options.smooth or options.sharp):
        raise UsageError("--no-smooth and --no-sharp leave nothing to train: leave one of them out")
    if not 0 <= options.dropout < 1:
        raise UsageError(f"--dropout is {options.dropout}: expected a number from 0 to below 1")


def train_heads(options: argparse.Namespace, report: Report) -> dict:
    from lace_trainer.heads.sharp import join
    from lace_trainer.heads.training import save_heads

    check_heads_options(options)
    check_wanted(options)
    facts: dict = {}
    sharp = smooth = None
    if options.sharp:
        sharp, found = train_sharp_heads(options, report)
        facts |= found
    if options.smooth:
        smooth, found = train_smooth_heads(options, report)
        facts |= found
    stacks = join(smooth, sharp) if smooth and sharp else smooth or sharp or []
    return {"heads": [str(path) for path in save_heads(options.out, stacks)], **facts}


def check_wanted(options: argparse.Namespace) -> None:
    """Attributes that nobody labels are refused before the samples, which take long."""
    from lace_trainer.heads.pairs import Labellers, check_names

    if options.labeller:
        check_names(options.attributes or [], [attribute.name for attribute in Labellers(options.labeller).attributes])


def train_smooth_heads(options: argparse.Namespace, report: Report) -> tuple["Stacks", dict]:
    from exporter.heads import load_heads
    from lace_trainer.heads import training as heads
    from lace_trainer.heads.pairs import Labellers
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


PACKAGES = ("torch",)


def pairs_of(options: argparse.Namespace, report: Report) -> "Pairs":
    """What smooth heads learn: labels."""
    from lace_trainer.heads.lace_data import lace_pairs
    from lace_trainer.heads.pairs import Labellers, sampled_pairs

    if options.lace_data:
        return lace_pairs(options.lace_data, options.dataset)
    if options.bundle:
        return labelled_of(options, report).pairs(options.seed or 0)
    return sampled_pairs(options.gan, Labellers(options.labeller), count=options.samples, seed=options.seed or 0,
                         precision=options.precision, directory=options.cache or options.out / "pairs",
                         progress=report)


def labelled_of(options: argparse.Namespace, report: Report) -> "Labelled":
    """What sharp heads learn: votes, at truncations between 1/2 and 1 where a generator is at hand."""
    from lace_trainer.heads import labelled
    from lace_trainer.heads.pairs import Labellers

    if options.lace_data:
        return labelled.from_pairs(pairs_of(options, report))
    source = (labelled.BundleSource(options.bundle, threads=options.threads) if options.bundle else
              labelled.CheckpointSource(options.gan, precision=options.precision))
    return labelled.labelled_samples(source, Labellers(options.labeller), count=options.samples,
                                     seed=options.seed or 0, directory=options.cache or options.out / "pairs",
                                     progress=report)


def train_sharp_heads(options: argparse.Namespace, report: Report) -> tuple["Stacks", dict]:
    from lace_trainer.heads import calibration, labelled, sharp
    from lace_trainer.heads.pairs import Labellers

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
    calibration.plot(options.out / "reliability.png", found)
    for head in found:
        if head.is_overconfident:
            log.warning("%s promised too much (temperature %.2f): its labels are noisy; try --dropout 0.3 or fewer "
                        "--sharp-epochs", head.name, head.temperature)
    return trained.stacks, {"calibration": {c.name: summary(c) for c in found}, "sharp_pairs": len(data.w),
                            "sharp_seconds": trained.seconds}


def summary(found: "Calibration") -> dict:
    if found.kind == "value":
        return {"error": dict(found.error), "tolerance": found.tolerance}
    return {"temperature": found.temperature, "ece": dict(found.ece), "accuracy": dict(found.accuracy),
            "log_loss": dict(found.log_loss)}


RUNS = {"gan": train_gan, "score": score_gan, "classifier": train_classifier, "identity": train_identity,
        "heads": train_heads}


def run(options: argparse.Namespace) -> int:
    require("train", *PACKAGES)
    import torch

    torch.set_num_threads(options.threads or os.cpu_count() or 1)
    # Tiny activations and moments are common in training, and denormal arithmetic is many times slower.
    torch.set_flush_denormal(True)
    console = Terminal(stderr=True)
    handler = RichHandler(console=console, show_path=False, markup=False)
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[handler])
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn(), TimeElapsedColumn(),
               TimeRemainingColumn(), TextColumn("{task.fields[text]}", markup=False))
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(options.command, total=None, text="")
        facts = RUNS[options.command](options, lambda done, total, text: bar.update(
            task, completed=done, total=total, text=text))
    if options.json:
        write_json(facts)
    else:
        show(facts, Terminal())
    return OK


def show(facts: dict, console: Terminal) -> None:
    """Accuracies as a table, the rest as lines."""
    if "accuracy" in facts:
        tested = facts.get("test_accuracy")
        table = new_table("accuracy", "attribute", "validation>", *(["test>"] if tested else []))
        for name, value in facts["accuracy"].items():
            table.add_row(name, f"{value:.4f}", *([f"{tested[name]:.4f}"] if tested else []))
        console.print(table)
        console.print("accuracy: hit rate of a class, 1 - mean absolute error of a value", style="dim")
    if "calibration" in facts:
        console.print(calibration_table(facts["calibration"]))
    for name, value in facts.items():
        if isinstance(value, str | int | float):
            console.say(f"{name}: {value}")
        elif isinstance(value, list):
            console.say(f"{name}: {', '.join(value)}")


def calibration_table(found: dict) -> "Table":
    """Sharp heads on held-out pairs, at each truncation."""
    table = new_table("calibration", "sharp head", "temperature>", "psi>", "calibration error>", "accuracy>",
                      "mean error>", "tolerance>")
    for name, facts in found.items():
        for psi in facts.get("ece", facts.get("error", {})):
            cells = ([f"{facts['temperature']:.2f}", psi, f"{facts['ece'][psi]:.4f}", f"{facts['accuracy'][psi]:.4f}",
                      "", ""] if "ece" in facts else
                     ["", psi, "", "", f"{facts['error'][psi]:.4f}", f"{facts['tolerance']:.3f}"])
            table.add_row(name, *cells)
    return table


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(build_parser(), arguments)
    return guarded(lambda: run(options), options.out)


if __name__ == "__main__":
    raise SystemExit(main())
