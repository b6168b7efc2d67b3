"""Options that say where pictures begin: seeds, NVIDIA's seed numbers, latents of files; labels."""

import argparse
from collections.abc import Callable
from pathlib import Path

from engine.bundle import Bundle
from engine.cli.latents import NVIDIA_SEEDS, read_latents
from engine.cli.options import UsageError, between, check_label, seed, whole
from engine.cli.recipe import Beginning
from engine.reference.noise import SEED_LIMIT


def nvidia_seed(text: str) -> int:
    return between(text, 0, NVIDIA_SEEDS - 1, "2**32-1")


def add_start_options(parser: argparse.ArgumentParser, help_seed: str) -> None:
    add = parser.add_argument
    add("--seed", type=seed, metavar="S", help=help_seed)
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--nvidia-seed", type=nvidia_seed, metavar="N", help="begin at the z that NVIDIA's StyleGAN "
                       "scripts draw for the seed number N, instead of --seed")
    group.add_argument("--z", type=Path, metavar="FILE", help="begin at latents of a .npy, .npz or .safetensors file")
    group.add_argument("--w", type=Path, metavar="FILE", help="the same in W, as of an inverted photograph; the flow "
                       "then runs in W")
    add("--label", type=whole, metavar="N", help="class of a conditional generator")


class Beginnings:
    """Seeds and beginnings of pictures that are numbered from 0.

    count   how many pictures: those that were asked for, or as many as the file has latents. Raises UsageError
    """

    def __init__(self, options: argparse.Namespace, bundle: Bundle, count: int | None, default: int):
        self.label = options.label
        if options.nvidia_seed is not None and options.seed is not None:
            raise UsageError("--nvidia-seed and --seed: give one of them")
        self.first = next((n for n in (options.nvidia_seed, options.seed) if n is not None), 0)
        self.at: Callable[[int], Beginning] = lambda number: Beginning()
        self.count = default if count is None else count
        limit, shown = SEED_LIMIT, "2**64"
        if options.nvidia_seed is not None:
            limit, shown = NVIDIA_SEEDS, "2**32"
            self.at = lambda number: Beginning(nvidia_seed=self.first + number)
        elif options.z or options.w:
            self.read(options.w or options.z, "w" if options.w else "z", bundle, count)
        if getattr(options, "oneshot", None) is None:  # a one-pass map has a label of its own
            check_label(bundle, options.label, in_w=options.w is not None)
        if self.first + self.count > limit:
            raise UsageError(f"seed + count goes beyond {shown}: choose a smaller seed")

    def read(self, path: Path, space: str, bundle: Bundle, count: int | None) -> None:
        g = bundle.generator
        latents = read_latents(path, space, g.w_dim if space == "w" else g.z_dim)
        self.count = len(latents) if count is None else count
        if self.count > len(latents):
            raise UsageError(f"{path} holds {len(latents)} latents, fewer than the {count} pictures that are wanted")
        self.at = lambda number: Beginning(space=space, latent=latents[number])
