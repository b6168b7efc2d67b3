"""Chunks of factors -> pictures."""

from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as nnf

from lace_trainer.faces.factors import Factors
from lace_trainer.faces.layers import LAYERS
from lace_trainer.faces.layout import layout
from lace_trainer.faces.shapes import Canvas

CHUNK_PIXELS = 16 * 128 * 128  # one chunk of working arrays fits in the second-level cache


def render(factors: Factors, size: int = 64, supersample: int = 2) -> np.ndarray:
    """Draw every face.

    factors       n rows
    supersample   samples per pixel and axis; edges are antialiased even with 1
    returns       (n, size, size, 3) uint8, a pure function of each row
    """
    if size < 8 or supersample < 1:
        raise ValueError(f"size is {size}, supersample is {supersample}; expected at least 8 and 1")
    pictures = np.empty((len(factors), size, size, 3), np.uint8)
    # Faces with the same accessories share a chunk, so that a chunk skips the layers that none of its faces has.
    order = np.lexsort(factors.labels[:, [3, 4, 7, 5, 8]].T)
    step = max(1, CHUNK_PIXELS // (size * supersample) ** 2)
    with torch.inference_mode(), _one_thread():
        for start in range(0, len(order), step):
            rows = order[start : start + step]
            pictures[rows] = _render_chunk(factors[rows], size, supersample)
    return pictures


@contextmanager
def _one_thread():
    """The operations are so short that sharing one between threads costs more than it saves, twenty times more when
    the cores are busy.  To use several cores, render in several processes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _render_chunk(factors: Factors, size: int, supersample: int) -> np.ndarray:
    """Draw a few faces at once.  returns (n, size, size, 3) uint8"""
    canvas = Canvas.blank(len(factors), size * supersample)
    face = layout(factors)
    for draw in LAYERS:
        draw(canvas, face)
    rgb = nnf.avg_pool2d(canvas.rgb, supersample) if supersample > 1 else canvas.rgb
    return rgb.clamp_(0, 1).mul_(255).round_().to(torch.uint8).permute(0, 2, 3, 1).numpy()


def contact_sheet(pictures: np.ndarray, columns: int | None = None) -> np.ndarray:
    """Tile pictures (n, size, size, 3) into one, row by row, nearly square unless `columns` is given."""
    n, size = pictures.shape[:2]
    columns = columns or int(np.ceil(np.sqrt(n)))
    rows = -(-n // columns)
    sheet = np.full((rows * size, columns * size, 3), 255, np.uint8)
    for i, picture in enumerate(pictures):
        top, left = i // columns * size, i % columns * size
        sheet[top : top + size, left : left + size] = picture
    return sheet
