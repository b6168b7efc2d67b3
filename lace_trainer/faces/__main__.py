"""Write a contact sheet:  python -m lace_trainer.faces --count 64 --seed 0 --out FILE.png [--size 128]"""

import argparse

import numpy as np
from PIL import Image

from lace_trainer.faces import contact_sheet, render, sample_factors


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a contact sheet of cartoon faces.")
    parser.add_argument("--count", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--size", type=int, default=64, help="side of one face in pixels")
    parser.add_argument("--out", required=True, help="picture file to write")
    args = parser.parse_args()
    faces = render(sample_factors(np.random.default_rng(args.seed), args.count), size=args.size)
    Image.fromarray(contact_sheet(faces)).save(args.out)


if __name__ == "__main__":
    main()
