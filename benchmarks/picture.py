"""The README's picture: the same seeds under several conditions.   python benchmarks/picture.py docs/demo.png"""

import sys
from pathlib import Path

from engine import Sampler
from engine.pictures import save_png, table, to_image

CONDITIONS = (
    None,
    "smile & ~glasses & haircolor=blond",
    "gender=male & glasses & ~smile",
    "hat | beard",
    "age>0.75",
    "smile & yaw=0.7",
)
ROWS, CELL = 4, 128


def main(path: str) -> None:
    sampler = Sampler("demo")
    columns = [[to_image(sample.image) for sample in sampler.sample(c, range(ROWS))] for c in CONDITIONS]
    captions = ["no condition" if c is None else c for c in CONDITIONS]
    rows = [[column[i] for column in columns] for i in range(ROWS)]
    save_png(Path(path), table(rows, CELL, captions), {"Bundle": sampler.bundle.hash})


if __name__ == "__main__":
    main(*sys.argv[1:])
