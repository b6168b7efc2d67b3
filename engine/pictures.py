"""Pictures as files: PNGs with their origin inside, grids, film strips."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy import ndarray as Array
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from engine.text import visible

GAP = 2
PAPER, INK = (255, 255, 255), (40, 40, 40)


def to_image(pixels: Array | None) -> Image.Image:
    """(H, W, C) uint8 with 1 or 3 channels."""
    if pixels is None:
        raise ValueError("the sample has no picture: call sampler.render first")
    return Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)


def save_png(path: Path | BinaryIO, image: Image.Image, text: Mapping[str, str]) -> None:
    """Write a PNG with ``text`` in its text chunks, to a path or an open file."""
    chunks = PngInfo()
    for key, value in text.items():
        chunks.add_itxt(key, visible(value, lines=True))
    image.save(path, format="PNG", pnginfo=chunks)


def enlarge(image: Image.Image, least: int) -> Image.Image:
    """Enlarge a small picture by a whole factor, so that it is at least ``least`` pixels wide."""
    factor = -(-least // image.width)
    if factor <= 1:
        return image
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.BICUBIC)


def shrunk(image: Image.Image, most: int) -> Image.Image:
    """Large pictures by a whole factor, so that no side has more than ``most`` pixels."""
    factor = -(-max(image.size) // most)
    return image if factor <= 1 else image.reduce(factor)


def grid(images: Sequence[Array | None], *, columns: int | None = None, cell: int = 128) -> Image.Image:
    """Pictures in rows, nearly square unless ``columns`` is given; a cell is at least ``cell`` pixels wide."""
    return sheet([to_image(image) for image in images], columns or int(np.ceil(np.sqrt(len(images)))), cell)


def sheet(images: Sequence[Image.Image], columns: int, cell: int = 128) -> Image.Image:
    """Pictures in rows of ``columns``; a cell is at least ``cell`` pixels wide."""
    return table([images[k : k + columns] for k in range(0, len(images), columns)], cell)


def table(rows: Sequence[Sequence[Image.Image]], cell: int, captions: Sequence[str] = ()) -> Image.Image:
    """Rows of pictures on white; ``captions`` stand above the columns."""
    rows = [[enlarge(image, cell) for image in row] for row in rows]
    width, height = rows[0][0].size
    columns = max(len(row) for row in rows)
    size = max(11, width // 11)
    font = ImageFont.load_default(size=size)
    lines = [wrap(caption, font, width - 2 * GAP) for caption in captions]
    line_height = int(size * 1.3)
    head = (max((len(line) for line in lines), default=0)) * line_height + (GAP if lines else 0)
    sheet = Image.new("RGB", (columns * (width + GAP) - GAP, head + len(rows) * (height + GAP) - GAP), PAPER)
    draw = ImageDraw.Draw(sheet)
    for column, block in enumerate(lines):
        for i, line in enumerate(block):
            draw.text((column * (width + GAP) + GAP, i * line_height), line, fill=INK, font=font)
    for i, row in enumerate(rows):
        for column, image in enumerate(row):
            sheet.paste(image.convert("RGB"), (column * (width + GAP), head + i * (height + GAP)))
    return sheet


def wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """Break at spaces so that no line is wider than ``width`` pixels, where a single word allows it."""
    lines = [""]
    for word in visible(text).split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines
