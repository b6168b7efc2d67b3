"""lace-train: train a small generator, image classifiers and attribute heads."""

import argparse
import json
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from engine.cli.console import EXIT_CODES, OK, guarded, parse, write_json
from engine.errors import LaceError

Report = Callable[[int, int, str], None]

EXAMPLE = f"""the demonstration bundle from nothing:
  lace-train gan        --data render:40000 --size 64 --pictures 2_000_000 --out runs/gan
  lace-train classifier --role labeller --out runs/labeller.safetensors
  lace-train heads      --gan runs/gan/generator.safetensors --labeller runs/labeller.safetensors --out runs/heads
  lace-export           --gan runs/gan/checkpoint.pt --heads runs/heads/*.safetensors --out demo.lace

{EXIT_CODES}"""


def natural(text: str) -> int:
    """A positive whole number; 2_000_000 and 2000000 are the same."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return value


def widths(text: str) -> tuple[int, ...]:
    return tuple(natural(part) for part in text.split(","))


def build_parser() -> argparse.ArgumentParser:
    layout = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
    parser = argparse.ArgumentParser(
        prog="lace-train", description="Train the demonstration world, or heads.", epilog=EXAMPLE, **layout
    )
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--seed", type=int, help="of everything random")
    common.add_argument("--threads", type=natural, default=os.cpu_count(), help="processor threads (%(default)s)")
    common.add_argument("--json", action="store_true", help="write the result as JSON")
    commands = parser.add_subparsers(dest="command", required=True, metavar="{gan,classifier,heads}")
    help_of = {"gan": "train a StyleGAN2", "classifier": "train an image classifier on rendered faces",
               "heads": "train attribute heads on w"}  # fmt: skip
    for name, add_options in (("gan", add_gan), ("classifier", add_classifier), ("heads", add_heads)):
        add_options(commands.add_parser(name, parents=[common], help=help_of[name], epilog=EXIT_CODES, **layout))
    return parser


def add_gan(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--data", required=True, metavar="SOURCE", help="render:COUNT (procedural faces) or a folder of pictures")
    add("--out", required=True, type=Path, metavar="DIR", help="the run; a run that is there is resumed")
    add("--size", type=natural, default=64, help="side of the pictures in pixels, a power of two (64)")
    add("--pictures", type=natural, default=2_000_000, help="how many pictures to train on (2000000)")
    add("--batch", type=natural, default=32, help="pictures per step (32)")
    add("--channels", type=widths, metavar="N,N,...", help="widths at 4, 8, 16, ... pixels (128,128,96,64,32 for 64)")
    add("--gamma", type=float, default=0.1, help="weight of the R1 penalty (0.1)")
    add("--rate", type=float, default=2.5e-3, help="learning rate of Adam; a resumed run may lower it (2.5e-3)")
    add("--noise", action="store_true", help="per-pixel noise in the generator, for pictures with random detail")
    add("--precision", choices=("fp32", "bf16"), default="bf16", help="from 8x8 upwards (bf16)")
    add("--device", default="cpu", help="cpu, cuda or cuda:N (cpu)")
    add("--every", type=natural, default=250, help="steps between checkpoints (250)")


def add_classifier(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--role", required=True, choices=("labeller", "judge"), help="labels samples for the heads, or measures ACC")
    add("--out", required=True, type=Path, metavar="FILE", help="the .safetensors file to write")
    add("--pictures", type=natural, default=40_000, help="rendered faces to train on (40000)")
    add("--validation", type=natural, default=4000, help="rendered faces to validate on (4000)")
    add("--epochs", type=natural, default=7, help="(7)")
    add("--precision", choices=("fp32", "bf16"), default="bf16", help="(bf16)")
    add("--cache", type=Path, metavar="DIR", help="where rendered faces are kept (the folder of --out)")
    add("--device", default="cpu", help="cpu, cuda or cuda:N (cpu)")


def add_heads(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--gan", type=Path, metavar="FILE", help="checkpoint of the generator; needs --labeller")
    source.add_argument("--lace-data", type=Path, metavar="DIR", help="LACE's data files; needs --dataset")
    add("--labeller", type=Path, metavar="FILE", help="classifier that labels the samples of --gan")
    add("--dataset", choices=("ffhq", "metfaces", "afhq"), help="which of LACE's data sets --lace-data holds")
    add("--out", required=True, type=Path, metavar="DIR", help="folder for one head per attribute")
    add("--attributes", nargs="+", metavar="NAME", help="only these (all)")
    add("--samples", type=natural, default=40_000, help="samples of the generator (40000)")
    add("--up-dim", type=natural, help="width of the last hidden layer (half of w, at most 128)")
    add("--epochs", type=natural, default=50, help="(50)")
    add("--batch", type=natural, default=128, help="pairs per step (128)")
    add("--rate", type=float, default=1e-4, help="learning rate of Adam (1e-4)")
    add("--warmup", type=int, default=1000, help="iterations of linear warm-up (1000)")
    add("--precision", choices=("fp32", "bf16"), default="bf16", help="of the synthesis (bf16)")
    add("--cache", type=Path, metavar="DIR", help="where labelled samples are kept (--out/pairs)")


# Widths of the demonstration generator.
CHANNELS = {4: 128, 8: 128, 16: 96, 32: 64, 64: 32, 128: 24, 256: 16}


def default_channels(sizes: list[int]) -> tuple[int, ...]:
    return tuple(CHANNELS.get(size, 16) for size in sizes)


def powers(size: int) -> list[int]:
    """4, 8, ..., size."""
    found = [2**k for k in range(2, size.bit_length())]
    if len(found) < 2 or found[-1] != size:
        raise LaceError(f"--size is {size}; expected a power of two from 8 up")
    return found


def train_gan(options: argparse.Namespace, report: Report) -> dict:
    from trainer.data import source
    from trainer.gan import GanConfig, train
    from trainer.generator_file import export_generator

    sizes = powers(options.size)
    channels = options.channels or default_channels(sizes)
    if len(channels) != len(sizes):
        raise LaceError(f"--channels gives {len(channels)} widths; expected {len(sizes)}, for {sizes} pixels")
    seed = options.seed or 0
    config = GanConfig(
        channels=dict(zip(sizes, channels, strict=True)), batch=options.batch, r1_gamma=options.gamma,
        learning_rate=options.rate, noise=options.noise, precision=options.precision, seed=seed,
    )  # fmt: skip
    data = source(options.data, options.size, seed + 1, options.out)
    training = train(config, data, options.out, pictures=options.pictures, device=options.device,
                     every=options.every, progress=report)  # fmt: skip
    path = export_generator(options.out / "checkpoint.pt", options.out / "generator.safetensors")
    return {"generator": str(path), "pictures": training.pictures, "seconds": round(training.seconds, 1)}


def train_classifier(options: argparse.Namespace, report: Report) -> dict:
    from trainer import classifier
    from trainer.data import rendered

    role, cache = classifier.ROLES[options.role], options.cache or options.out.parent
    size, seed = role.shape.size, role.seed if options.seed is None else options.seed
    validation = rendered(options.validation, size, classifier.VALIDATION_SEED, cache)
    data = rendered(options.pictures, size, role.pictures_seed, cache)
    config = classifier.ClassifierConfig(epochs=options.epochs, seed=seed, precision=options.precision,
                                         device=options.device)  # fmt: skip
    model = classifier.train(role.shape, data, config, validation=validation, progress=report)
    model.metadata |= {"role": options.role, "data": f"render:{options.pictures}",
                       "pictures_seed": role.pictures_seed, "validation_seed": classifier.VALIDATION_SEED}  # fmt: skip
    classifier.save(model, options.out)
    return {"classifier": str(options.out), **model.metadata}


def train_heads(options: argparse.Namespace, report: Report) -> dict:
    from trainer import heads
    from trainer.lace_data import lace_pairs
    from trainer.pairs import sampled_pairs

    for given, needed in (("gan", "labeller"), ("lace_data", "dataset")):
        if getattr(options, given) and not getattr(options, needed):
            raise LaceError(f"--{given.replace('_', '-')} needs --{needed}")
    if options.gan:
        pairs = sampled_pairs(options.gan, options.labeller, count=options.samples, seed=options.seed or 0,
                              directory=options.cache or options.out / "pairs", precision=options.precision,
                              progress=report)  # fmt: skip
    else:
        pairs = lace_pairs(options.lace_data, options.dataset)
    pairs = pairs.select(options.attributes) if options.attributes else pairs
    up_dim = options.up_dim or min(128, pairs.w.shape[1] // 2)
    config = heads.HeadsConfig(up_dim, options.batch, options.epochs, options.rate, options.warmup, options.seed or 0)
    trained = heads.train_heads(pairs, config, progress=report)
    paths = heads.save_heads(options.out, trained)
    return {"heads": [str(path) for path in paths], "pairs": len(pairs.w), "accuracy": trained.validation,
            "test_accuracy": trained.test, "best_epoch": trained.best_epoch, "seconds": trained.seconds}  # fmt: skip


RUNS = {"gan": train_gan, "classifier": train_classifier, "heads": train_heads}


def run(options: argparse.Namespace) -> int:
    import torch

    torch.set_num_threads(options.threads)
    # Tiny activations and moments are common in training, and denormal arithmetic is many times slower.
    torch.set_flush_denormal(True)
    console = Console(stderr=True)
    handler = RichHandler(console=console, show_path=False)
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[handler])
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn(),
               TimeRemainingColumn(), TextColumn("{task.fields[text]}"))  # fmt: skip
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(options.command, total=None, text="")
        facts = RUNS[options.command](options, lambda done, total, text: bar.update(
            task, completed=done, total=total, text=text))  # fmt: skip
    if options.json:
        write_json(json.dumps(facts, indent=1))
    else:
        show(facts, Console())
    return OK


def show(facts: dict, console: Console) -> None:
    """Accuracies as a table, the rest as lines."""
    if "accuracy" in facts:
        table = Table("attribute", "validation", *(["test"] if facts.get("test_accuracy") else []))
        for name, value in facts["accuracy"].items():
            tested = [f"{facts['test_accuracy'][name]:.4f}"] if facts.get("test_accuracy") else []
            table.add_row(name, f"{value:.4f}", *tested)
        console.print(table)
        console.print("accuracy: hit rate of a class, 1 - mean absolute error of a value", style="dim")
    for name, value in facts.items():
        if isinstance(value, str | int | float):
            console.print(f"{name}: {value}", markup=False, highlight=False, soft_wrap=True)
        elif isinstance(value, list):
            console.print(f"{name}: {', '.join(value)}", markup=False, highlight=False, soft_wrap=True)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(build_parser(), arguments)
    return guarded(lambda: run(options))


if __name__ == "__main__":
    raise SystemExit(main())
