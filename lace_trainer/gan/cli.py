"""The commands of lace-train about generators: gan and score."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from engine.cli.options import from_zero, not_negative, positive, real, tolerance
from engine.errors import LaceError

if TYPE_CHECKING:
    from torch import Tensor

Report = Callable[[int, int, str], None]

# Widths of the demonstration generator.
CHANNELS = {4: 128, 8: 128, 16: 96, 32: 64, 64: 32, 128: 24, 256: 16}


def target(text: str) -> float:
    """A mean sign of logits that augmentation can hold."""
    value = real(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} does not lie between 0 and 1")
    return value


def widths(text: str) -> tuple[int, ...]:
    return tuple(positive(part) for part in text.split(","))


def add_gan(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--data", required=True, metavar="SOURCE", help="render:COUNT (procedural faces) or a folder of pictures")
    add("--out", required=True, type=Path, metavar="DIR", help="the run; a run that is there is resumed")
    add("--size", type=positive, default=64, help="side of the pictures in pixels, a power of two (64)")
    add("--pictures", type=positive, default=2_000_000, help="how many pictures to train on (2000000)")
    add("--batch", type=positive, default=32, help="pictures per step (32)")
    add("--channels", type=widths, metavar="N,N,...", help="widths at 4, 8, 16, ... pixels (128,128,96,64,32 for 64)")
    add("--gamma", type=not_negative, default=0.1, help="weight of the R1 penalty (0.1)")
    add("--path-length", type=not_negative, default=0.0, metavar="WEIGHT", help="of the path-length penalty (0: none)")
    add("--features", type=Path, metavar="FILE", help="classifier through whose eyes a second discriminator looks")
    add("--features-weight", type=not_negative, default=4.0, metavar="WEIGHT", help="of its opinion in the loss (4)")
    add("--rate", type=tolerance, default=2.5e-3, help="learning rate of Adam; a resumed run may lower it (2.5e-3)")
    add("--noise", action="store_true", help="per-pixel noise in the generator, for pictures with random detail")
    add("--ada", type=target, default=0.0, metavar="TARGET", help="augment adaptively, for few pictures; 0.6 is usual")
    add("--ada-flips", action="store_true", help="mirror, too: only where left and right mean nothing")
    add("--ada-turns", action="store_true", help="turn by 90 degrees, too")
    add("--precision", choices=("fp32", "bf16"), default="bf16", help="from 8x8 upwards (bf16)")
    add("--tf32", action="store_true", help="let float32 products use the TF32 units of a GPU")
    add("--compile", action="store_true", help="compile the networks with torch.compile")
    add("--device", default="cpu", help="cpu, cuda or cuda:N (cpu)")
    add("--every", type=positive, default=250, help="steps between checkpoints (250)")
    add("--fid-samples", type=from_zero, default=2000, metavar="N",
        help="samples per distance in training; 0: no scores")
    add("--fid-every", type=from_zero, default=0, metavar="N", help="pictures between two distances (every checkpoint)")
    add_judge(parser)


def add_score(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--gan", required=True, type=Path, metavar="FILE", help="a generator: any checkpoint that lace-export reads")
    add("--data", metavar="DIR", help="folder of real pictures (fresh faces of the renderer)")
    add("--samples", type=positive, default=10_000, help="samples of the generator, and real pictures at most (10000)")
    add("--cache", type=Path, metavar="DIR", help="where features of real pictures are kept (nowhere)")
    add("--out", type=Path, metavar="FILE", help="write the generator with this score in its record (.safetensors)")
    add("--device", default="cpu", help="cpu, cuda or cuda:N (cpu)")
    add_judge(parser)


def add_judge(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--judge", type=Path, metavar="FILE", help="classifier whose features count (the package's)")


def default_channels(sizes: list[int]) -> tuple[int, ...]:
    return tuple(CHANNELS.get(size, 16) for size in sizes)


def powers(size: int) -> list[int]:
    """4, 8, ..., size."""
    found = [2**k for k in range(2, size.bit_length())]
    if len(found) < 2 or found[-1] != size:
        raise LaceError(f"--size is {size}; expected a power of two from 8 up")
    return found


def gan_config(options: argparse.Namespace):
    from lace_trainer.gan.config import GanConfig

    sizes = powers(options.size)
    channels = options.channels or default_channels(sizes)
    if len(channels) != len(sizes):
        raise LaceError(f"--channels gives {len(channels)} widths; expected {len(sizes)}, for {sizes} pixels")
    if (options.ada_flips or options.ada_turns) and not options.ada:
        raise LaceError("--ada-flips and --ada-turns belong to augmentation; give --ada TARGET (0.6), too")
    return GanConfig(
        channels=dict(zip(sizes, channels, strict=True)), batch=options.batch, r1_gamma=options.gamma,
        learning_rate=options.rate, noise=options.noise, precision=options.precision, seed=options.seed or 0,
        path_length=options.path_length, ada=options.ada, ada_flips=options.ada_flips, ada_turns=options.ada_turns,
        features=options.features_weight if options.features else 0.0,
    )


def use_tf32(options: argparse.Namespace) -> None:
    """Whether a GPU may round the factors of float32 products to ten bits; torch allows it for convolutions."""
    import torch

    if options.tf32 and not options.device.startswith("cuda"):
        raise LaceError(f"--tf32 is of use on a GPU only, and --device is {options.device}; leave one of them out")
    torch.set_float32_matmul_precision("high" if options.tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = options.tf32


def train_gan(options: argparse.Namespace, report: Report) -> dict:
    from exporter.checkpoints import load_generator
    from lace_trainer.gan.generator_file import export_generator
    from lace_trainer.gan.loop import check_data, train
    from lace_trainer.gan.record import Fid
    from lace_trainer.gan.score import COUNT
    from lace_trainer.judges.classifier import load
    from lace_trainer.judges.metrics import moments

    config, out, fid, score = gan_config(options), options.out, None, None
    use_tf32(options)
    data = source(options.data, options.size, config.seed + 1, out)
    check_data(config, data)  # before the reference, which takes a while
    if options.fid_samples:
        judge = open_judge(options)
        folder = None if options.data.startswith("render:") else data.numpy()
        reference = reference_of(judge, folder, COUNT, out)
        fid = Fid(judge, moments(reference), options.fid_samples, options.fid_every)
    classifier = load(options.features) if options.features else None
    training = train(config, data, out, pictures=options.pictures, device=options.device, every=options.every,
                     classifier=classifier, fid=fid, compiled=options.compile, progress=report)
    best = out / ("best.pt" if fid and (out / "best.pt").exists() else "checkpoint.pt")
    if fid:
        score = score_of(load_generator(best), judge, reference, COUNT, options, report)
    path = export_generator(best, out / "generator.safetensors", score)
    return {"generator": str(path), "pictures": training.pictures, "seconds": round(training.seconds, 1),
            **({"of": best.name, **score} if score else {})}


def source(spec: str, size: int, seed: int, directory: Path) -> "Tensor":
    """``render:COUNT`` or a folder -> pictures (n, size, size, 3) uint8, kept in ``directory``."""
    if not spec.startswith("render:"):
        from lace_trainer.data import folder

        return folder(Path(spec), size, directory)
    count = spec.removeprefix("render:").replace("_", "")
    if not count.isdigit() or int(count) < 1:
        raise LaceError(f"cannot read --data {spec!r}; expected render:COUNT (render:40000) or a folder of pictures")
    from lace_trainer.faces.pictures import rendered

    return rendered(int(count), size, seed, directory)[0]


def score_gan(options: argparse.Namespace, report: Report) -> dict:
    from exporter.checkpoints import load_generator
    from lace_trainer.data import folder
    from lace_trainer.gan.generator_file import export_generator

    judge, parts, pictures = open_judge(options), load_generator(options.gan), None
    if options.data:
        cache = options.cache or options.gan.parent
        pictures = folder(Path(options.data), parts.facts.resolution, cache).numpy()
    reference = reference_of(judge, pictures, options.samples, options.cache)
    score = score_of(parts, judge, reference, options.samples, options, report)
    written = {"generator": str(export_generator(options.gan, options.out, score))} if options.out else {}
    return {**written, **score}


def open_judge(options: argparse.Namespace):
    from lace_trainer.gan.training import usable
    from lace_trainer.judges import JUDGE
    from lace_trainer.judges.classifier import load

    return load(options.judge or JUDGE).to(usable(options.device))


def reference_of(judge, pictures: np.ndarray | None, count: int, cache: Path | None) -> np.ndarray:
    """Features of a folder's pictures (n, R, R, 3), or of fresh faces of the renderer."""
    from lace_trainer.gan.score import data_features

    if pictures is not None:
        return data_features(judge, pictures, count)
    from lace_trainer.faces.pictures import reference_features

    return reference_features(judge, count, cache=cache)


def score_of(parts, judge, reference: np.ndarray, count: int, options: argparse.Namespace, report: Report) -> dict:
    import torch

    from lace_trainer.gan.score import score

    mapping, synthesis = parts.mapping.to(options.device), parts.synthesis.to(options.device)
    synthesis.to(memory_format=torch.channels_last)  # nearly twice as fast on a CPU
    return score(judge, mapping, synthesis, reference, count=count, seed=options.seed or 0, progress=report)
