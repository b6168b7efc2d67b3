"""Training pictures: rendered faces with their exact labels, or a folder of pictures."""

import logging
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from engine.errors import LaceError

log = logging.getLogger(__name__)

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
CHUNK = 2000  # faces between two lines of the log


def save_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Call ``write(temporary path)`` and move the result into place in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_array(path: Path, array: np.ndarray) -> None:
    """``np.save``, atomically."""

    def write(temporary: Path) -> None:
        # An open file, because np.save would append .npy to the temporary name.
        with open(temporary, "wb") as file:
            np.save(file, array)

    save_atomically(path, write)


def rendered(count: int, size: int, seed: int, directory: Path) -> tuple[Tensor, np.ndarray]:
    """Pictures of the procedural renderer, kept in ``directory``, and their exact labels.

    returns   pictures (count, size, size, 3) uint8, labels (count, 12) float32 in the order of ATTRIBUTES
    """
    from trainer.faces import render, sample_factors

    factors = sample_factors(np.random.default_rng(seed), count)
    path = Path(directory) / f"faces-{size}-{count}-{seed}.npy"
    if not path.exists():
        log.info("rendering %d faces at %d px", count, size)
        pictures = np.empty((count, size, size, 3), np.uint8)
        for start in range(0, count, CHUNK):
            pictures[start : start + CHUNK] = render(factors[start : start + CHUNK], size=size)
            log.info("rendered %d of %d faces", min(start + CHUNK, count), count)
        save_array(path, pictures)
    return torch.from_numpy(np.load(path, mmap_mode="c")), factors.labels


def folder(directory: Path, size: int) -> Tensor:
    """All pictures of a folder, centre-cropped and resized: (n, size, size, 3) uint8."""
    files = sorted(p for p in Path(directory).rglob("*") if p.suffix.lower() in SUFFIXES)
    if not files:
        raise LaceError(f"no picture ({', '.join(SUFFIXES)}) under {directory}; give a folder that holds some")
    return torch.from_numpy(np.stack([_square(file, size) for file in files]))


def _square(file: Path, size: int) -> np.ndarray:
    with Image.open(file) as image:
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        box = (left, top, left + side, top + side)
        return np.asarray(image.convert("RGB").resize((size, size), Image.Resampling.LANCZOS, box=box))


def source(spec: str, size: int, seed: int, directory: Path) -> Tensor:
    """``render:COUNT`` or a folder -> pictures (n, size, size, 3) uint8."""
    if not spec.startswith("render:"):
        return folder(Path(spec), size)
    count = spec.removeprefix("render:").replace("_", "")
    if not count.isdigit() or int(count) < 1:
        raise LaceError(f"cannot read --data {spec!r}; expected render:COUNT (render:40000) or a folder of pictures")
    return rendered(int(count), size, seed, directory)[0]
