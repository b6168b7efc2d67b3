"""lace-train: train a small generator, image classifiers and attribute heads."""

import argparse
import logging
import os
from collections.abc import Sequence
from pathlib import Path

from rich.logging import RichHandler
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from engine.cli.console import EXIT_CODES, OK, Parser, Terminal, guarded, new_table, parse, require, write_json
from engine.cli.options import UsageError, flag, from_zero, not_negative, positive, seed, threads, tolerance
from lace_trainer.gan.cli import Report, add_gan, add_score, score_gan, train_gan

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
    source.add_argument("--lace-data", type=Path, metavar="DIR", help="LACE's data files; needs --dataset")
    add("--labeller", type=Path, nargs="+", metavar="FILE", help="classifiers that label the samples of --gan")
    add("--dataset", choices=("ffhq", "metfaces", "afhq"), help="which of LACE's data sets --lace-data holds")
    add("--out", required=True, type=Path, metavar="DIR", help="folder for one head per attribute")
    add("--attributes", nargs="+", metavar="NAME", help="only these (all)")
    add("--samples", type=positive, default=40_000, help="samples of the generator (40000)")
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
    for given, needed in (("gan", "labeller"), ("lace_data", "dataset")):
        if getattr(options, given) and not getattr(options, needed):
            raise UsageError(f"{flag(given)} needs --{needed}")
    if options.steered and not options.gan:
        raise UsageError("--steered draws samples of a generator: it needs --gan and --labeller")
    if options.start and not options.steered:
        raise UsageError("--start names heads that steer: it needs --steered")


def train_heads(options: argparse.Namespace, report: Report) -> dict:
    from exporter.heads import load_heads
    from lace_trainer.heads import training as heads
    from lace_trainer.heads.lace_data import lace_pairs
    from lace_trainer.heads.pairs import Labellers, check_names, sampled_pairs
    from lace_trainer.heads.steered import joined, steered_pairs

    check_heads_options(options)
    # Before the samples, which take long.
    wanted, first_stacks = options.attributes or [], [load_heads(path) for path in options.start or ()]
    seed = options.seed or 0
    if options.gan:
        labellers = Labellers(options.labeller)
        check_names(wanted, [attribute.name for attribute in labellers.attributes])
        pairs = sampled_pairs(options.gan, labellers, count=options.samples, seed=seed, precision=options.precision,
                              directory=options.cache or options.out / "pairs", progress=report)
    else:
        pairs = lace_pairs(options.lace_data, options.dataset)
    pairs = pairs.select(wanted) if wanted else pairs
    up_dim = options.up_dim or min(128, pairs.w.shape[1] // 2)
    config = heads.HeadsConfig(up_dim, options.batch, options.epochs, options.rate, options.warmup, seed,
                               options.noise)
    if options.start:
        stacks = first_stacks
    else:
        trained = heads.train_heads(pairs, config, progress=report)
        stacks = trained.stacks
    for number in range(options.rounds if options.steered else 0):
        steered = steered_pairs(options.gan, stacks, labellers, count=options.steered,
                                seed=(seed << 8) + number, progress=report)
        pairs = joined(pairs, steered)
        trained = heads.train_heads(pairs, config, progress=report)
        stacks = trained.stacks
    paths = heads.save_heads(options.out, trained)
    return {"heads": [str(path) for path in paths], "pairs": len(pairs.w), "accuracy": trained.validation,
            "test_accuracy": trained.test, "best_epoch": trained.best_epoch, "seconds": trained.seconds}


PACKAGES = ("torch",)
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
    for name, value in facts.items():
        if isinstance(value, str | int | float):
            console.say(f"{name}: {value}")
        elif isinstance(value, list):
            console.say(f"{name}: {', '.join(value)}")


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(build_parser(), arguments)
    return guarded(lambda: run(options), options.out)


if __name__ == "__main__":
    raise SystemExit(main())
