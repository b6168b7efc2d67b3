"""lace-train: train a small generator, image classifiers and attribute heads."""

import argparse
import logging
import os
from collections.abc import Sequence

from rich.logging import RichHandler
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from engine.cli.console import EXIT_CODES, OK, Parser, Terminal, guarded, new_table, parse, require, write_json
from engine.cli.options import seed, threads
from lace_trainer.gan.cli import add_gan, add_score, score_gan, train_gan
from lace_trainer.heads import cli as heads
from lace_trainer.judges import cli as judges
from lace_trainer.oneshot.cli import add_oneshot, train_oneshot

EXAMPLE = f"""the demonstration bundle from nothing:
  lace-train gan        --data render:40000 --size 64 --pictures 2_000_000 --out runs/gan
  lace-train classifier --role labeller --out runs/labeller.safetensors
  lace-train heads      --gan runs/gan/generator.safetensors --labeller runs/labeller.safetensors --out runs/heads
  lace-export           --gan runs/gan/checkpoint.pt --heads runs/heads/*.safetensors --out demo.lace

heads for a bundle of yours, labelled by a classifier of yours (my.onnx, with my.spec.json beside it) or by hand:
  lace-train heads      --bundle my.lace --labeller my.onnx --out heads
  lace-train draw       my.lace --count 2000 --attributes smile --out drawn      (then fill in drawn/labels.csv)
  lace-train heads      --bundle my.lace --table drawn/labels.csv --out heads
  lace-export           --bundle my.lace --add heads/*.safetensors --out new.lace

{EXIT_CODES}"""


def build_parser() -> argparse.ArgumentParser:
    layout = {"formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = Parser(prog="lace-train", description="Train the demonstration world, or heads.", epilog=EXAMPLE, **layout)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--seed", type=seed, help="of everything random")
    common.add_argument("--threads", type=threads, default=os.cpu_count(), metavar="N",
                        help="processor threads (%(default)s)")
    common.add_argument("--json", action="store_true", help="write the result as JSON")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, help_text, add_options in (
        ("gan", "train a StyleGAN2", add_gan),
        ("score", "Fréchet distance, precision and recall of a generator", add_score),
        ("classifier", "train an image classifier on rendered faces or on photographs", judges.add_classifier),
        ("identity", "train an embedding that tells rendered people apart", judges.add_identity),
        ("draw", "draw numbered samples of a bundle, to be labelled", heads.add_draw),
        ("heads", "train attribute heads on w", heads.add_heads),
        ("oneshot", "fit a one-pass map to a condition's exact samples", add_oneshot),
    ):
        add_options(commands.add_parser(name, parents=[common], help=help_text, **layout))
    return parser


RUNS = {"gan": train_gan, "score": score_gan, "classifier": judges.train_classifier,
        "identity": judges.train_identity, "draw": heads.draw_samples, "heads": heads.train_heads,
        "oneshot": train_oneshot}
WITHOUT_TORCH = ("draw",)


def prepare_torch(threads: int) -> None:
    require("train", "torch")
    import torch

    torch.set_num_threads(threads or os.cpu_count() or 1)
    # Tiny activations and moments are common in training, and denormal arithmetic is many times slower.
    torch.set_flush_denormal(True)


def run(options: argparse.Namespace) -> int:
    if options.command not in WITHOUT_TORCH:
        prepare_torch(options.threads)
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
    heads.show(facts, console)
    judges.show(facts, console)
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
