"""Contact sheets: uncurated first rows, with captions."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from numpy import ndarray as Array
from PIL import Image, ImageDraw, ImageFont

from engine.folders import write_atomically
from engine.pictures import GAP, INK, PAPER, save_png, to_image, wrap
from engine.text import visible
from lace_evaluation import OURS, conditional, logic, posterior_report
from lace_evaluation.store import Cell

CELL, MARGIN, SIZE = 80, 200, 13  # pixels: a picture, the captions on the left, their letters
# Compared on the sheet of conditional samples.
SHOWN = (conditional.RENDERS, "plain", "rejection", "arithmetic", "langevin", "dopri5 (paper)", OURS)


def sheet(rows: Sequence[tuple[str, Sequence[Array]]], heads: Sequence[str] = ()) -> Image.Image:
    """Rows of pictures (H, W, C) uint8 with a caption on the left; ``heads`` stand above the columns."""
    size = (CELL, CELL)
    lines = [(caption, [to_image(p).resize(size, Image.Resampling.BICUBIC) for p in pictures])
             for caption, pictures in rows]
    width, height = size
    font = ImageFont.load_default(size=SIZE)
    top = int(SIZE * 1.6) if heads else 0
    columns = max(len(pictures) for _, pictures in lines)
    whole = Image.new("RGB", (MARGIN + columns * (width + GAP), top + len(lines) * (height + GAP) - GAP), PAPER)
    draw = ImageDraw.Draw(whole)
    small = ImageFont.load_default(size=SIZE - 3)
    for column, head in enumerate(heads):
        draw.text((MARGIN + column * (width + GAP) + GAP, 2), visible(head), fill=INK, font=small)
    for i, (caption, pictures) in enumerate(lines):
        y = top + i * (height + GAP)
        block = wrap(caption, font, MARGIN - 12)
        for k, text in enumerate(block):
            middle = y + height // 2 - int(0.65 * SIZE * len(block)) + int(1.3 * SIZE * k)
            draw.text((4, middle), text, fill=INK, font=font)
        for column, picture in enumerate(pictures):
            whole.paste(picture.convert("RGB"), (MARGIN + column * (width + GAP), y))
    return whole


def conditional_sheet(facts: Mapping, cells: Mapping[str, Cell], seed: int) -> Image.Image:
    """The same rows by every method: all attributes at once if the bundle has several, else the largest set."""
    size = list(facts["sets"])[-1]
    found = {name: cells.get(f"conditional/{size}/training/{name}") for name in SHOWN}
    rows = [(name, cell.other["pictures"]) for name, cell in found.items() if cell is not None]
    return sheet(rows, [f"row {i}" for i in range(len(rows[0][1]))])


def editing_sheet(facts: Mapping, cells: Mapping[str, Cell], seed: int) -> Image.Image:
    """One row of pictures by every method, and two more by ours."""
    strips = {name: cells[f"editing/{name}"].other["strip"] for name in facts["methods"]}
    rows = [(f"{name}, seed {seed}", strip[0]) for name, strip in strips.items()]
    rows += [(f"{OURS}, seed {seed + i}", strips[OURS][i]) for i in range(1, min(3, len(strips[OURS])))]
    return sheet(rows, ["start", *(f"{name}={choices[1]}" for name, choices in facts["steps"].items())])


def zero_shot_sheet(facts: Mapping, cells: Mapping[str, Cell], seed: int) -> Image.Image | None:
    rows = [
        (f"{c['condition'].replace('=yes', '')} ({c['methods'][OURS]['holds']:.0%})",
         cells[f"zero-shot/{i}/{OURS}"].other["pictures"])
        for i, c in enumerate(facts["combinations"])
    ]
    return sheet(rows) if rows else None


def logic_sheet(facts: Mapping, cells: Mapping[str, Cell], seed: int) -> Image.Image:
    rows = [
        (f"{f['formula']} ({f['methods'][logic.PRODUCT]['true']:.0%})",
         cells[f"logic/{i}/{logic.PRODUCT}"].other["pictures"])
        for i, f in enumerate(facts["formulas"])
    ]
    return sheet(rows)


SHEETS = {
    "conditional": ("conditional-samples.png", conditional_sheet), "editing": ("editing-strip.png", editing_sheet),
    "posterior": ("posterior-grids.png", posterior_report.grids),
    "zero-shot": ("zero-shot-samples.png", zero_shot_sheet), "logic": ("logic-samples.png", logic_sheet),
}


def draw(suite: str, facts: Mapping, cells: Mapping[str, Cell], folder: Path, origin: Mapping[str, str]) -> None:
    """Write the sheet of a suite, if it has one; ``origin`` goes into its text chunks."""
    if suite in SHEETS:
        name, make = SHEETS[suite]
        if (image := make(facts, cells, int(origin["Seed"]))) is not None:
            write_atomically(folder / name, lambda file, image=image: save_png(file, image, origin))
