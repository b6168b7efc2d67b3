"""Training pictures: rendered faces with their exact labels, or a folder of pictures."""

import hashlib
import logging
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from engine.errors import LaceError
from engine.folders import write_atomically

log = logging.getLogger(__name__)

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
CHUNK = 2000  # pictures made at once, and between two lines of the log


def pictures_file(path: Path, count: int, size: int, make: Callable[[slice], np.ndarray]) -> Tensor:
    """Pictures (count, size, size, 3) uint8, mapped into memory from ``path``; made first if the file is not there.

    make   rows -> their pictures; called for at most CHUNK rows, so that all of them never lie in memory
    """

    def write(file: BinaryIO) -> None:
        shape = (count, size, size, 3)
        np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
        file.flush()
        # A full disk is an error here; in the middle of what is mapped into memory it would end the process.
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, file.tell() + math.prod(shape))
        array = np.memmap(file, np.uint8, "r+", file.tell(), shape)
        for start in range(0, count, CHUNK):
            end = min(start + CHUNK, count)
            array[start:end] = make(slice(start, end))
            log.info("%d of %d pictures at %d px", end, count, size)
        array.flush()

    if not path.exists():
        write_atomically(path, write)
    return torch.from_numpy(np.load(path, mmap_mode="c"))


def folder(directory: Path, size: int, cache: Path) -> Tensor:
    """All pictures under a folder, centre-cropped and resized: (n, size, size, 3) uint8, in the order of their names.

    Files without the suffix of a picture are left alone; a picture that cannot be read is an error that names it.
    The result is kept in ``cache``, under a name made of the files' names, sizes and times.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise LaceError(f"there is no folder {directory}; expected render:COUNT (render:40000) or a folder of pictures")
    return these(directory, picture_files(directory), size, cache)


def picture_files(directory: Path) -> list[Path]:
    """All pictures under a folder, in the order of their names. Raises LaceError if there are none."""
    if not directory.is_dir():
        raise LaceError(f"there is no folder {directory}; give a folder that holds pictures")
    files = sorted(p for p in directory.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
    if not files:
        raise LaceError(f"no picture ({', '.join(SUFFIXES)}) under {directory}; give a folder that holds some")
    return files


def these(directory: Path, files: Sequence[Path], size: int, cache: Path) -> Tensor:
    """Some pictures of a folder, as ``folder`` gives them, in the order of ``files``."""
    key = hashlib.sha256()
    for file in files:
        facts = file.stat()
        key.update(f"{file.relative_to(directory)}\0{facts.st_size}\0{facts.st_mtime_ns}\n".encode())
    path = Path(cache) / f"pictures-{size}-{len(files)}-{key.hexdigest()[:12]}.npy"
    return pictures_file(path, len(files), size, lambda rows: np.stack([square(file, size) for file in files[rows]]))


def square(file: Path, size: int) -> np.ndarray:
    """The centre of a picture (size, size, 3) uint8, upright; what is transparent becomes white."""
    try:
        with Image.open(file) as opened:
            if opened.mode.startswith(("I", "F")):
                raise LaceError(f"{file} has {opened.mode} pixels; expected 8 bits a channel: convert it")
            image = ImageOps.exif_transpose(opened)
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return np.asarray(ImageOps.fit(image.convert("RGB"), (size, size), Image.Resampling.LANCZOS))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise LaceError(f"cannot read the picture {file}: {error}; mend it or take it out of the folder") from error
