"""Labels by hand, or by whatever is no classifier: numbered samples of a bundle to be looked at, and the table of what
was seen.

    lace-train draw BUNDLE --count 2000 --out DIR       pictures, latents, and a table to be filled in
    lace-train heads --bundle BUNDLE --table DIR/labels.csv
"""

import csv
import io
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy import ndarray as Array
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as to_bytes

from engine.bundle import sha256
from engine.cli.latents import read_latents
from engine.errors import LaceError
from engine.folders import writing_folder
from engine.pictures import save_png, to_image
from engine.reference.noise import SEED_LIMIT
from engine.requests import Request, Sample
from engine.sampler import Sampler
from lace_trainer.tables import Table, labels_of

TABLE, LATENTS = "labels.csv", "latents.safetensors"
# Truncations of pictures that are drawn to be labelled, evenly; and those at which heads are checked afterwards.
LEAST_PSI = 0.5
PSIS = (0.5, 0.7, 1.0)
CHUNK = 64
HELD_OUT, FEWEST = 0.2, 50  # part of a table that is not for training; rows without which nothing can be said
Progress = Callable[[int, int, str], None]


def draw(sampler: Sampler, out: Path, *, count: int, first: int = 0, attributes: Sequence[str] = (),
         overwrite: bool = False, progress: Progress | None = None) -> None:
    """Write numbered pictures of plain samples with their latents (w, z, psi), and a table with a row for each.

    first        seed of the first picture; the others follow
    attributes   names of the columns to be filled in

    The folder appears whole or not at all. Raises LaceError.
    """
    if first + count > SEED_LIMIT:
        raise LaceError("seed + count goes beyond 2**64: choose a smaller seed")
    digits = max(4, len(str(count - 1)))
    psi = np.random.default_rng(first).uniform(LEAST_PSI, 1.0, count).round(4)
    with writing_folder(out, marker=LATENTS, overwrite=overwrite, error=LaceError) as folder:
        latents: dict[str, list[Array]] = {"w": [], "z": []}
        for start in range(0, count, CHUNK):
            numbers = range(start, min(start + CHUNK, count))
            for number, sample in zip(numbers, plain(sampler, [first + n for n in numbers], psi[start:]), strict=True):
                save_png(folder / f"{number:0{digits}}.png", to_image(sample.image),
                         {"Seed": str(first + number), "Truncation": str(psi[number]), "Bundle": sampler.bundle.hash})
                latents["w"].append(sample.w)
                latents["z"].append(sample.z if sample.z is not None else sample.w)
            if progress:
                progress(numbers[-1] + 1, count, "drawing")
        arrays = {name: np.stack(rows).astype(np.float32) for name, rows in latents.items()}
        (folder / LATENTS).write_bytes(to_bytes({**arrays, "psi": psi.astype(np.float32)},
                                                metadata={"bundle": sampler.bundle.hash}))
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["file", "seed", "truncation", *attributes])
        writer.writerows([f"{n:0{digits}}.png", first + n, psi[n], *("" for _ in attributes)] for n in range(count))
        (folder / TABLE).write_text(text.getvalue(), encoding="utf-8")


def plain(sampler: Sampler, seeds: Sequence[int], psi: Sequence[float] | Array, *, labels: Sequence[int] | None = None,
          pictures: bool = True) -> list[Sample]:
    """Samples without a condition. Of a conditional generator the classes take turns, unless ``labels`` say."""
    known = sampler.bundle.generator.labels
    requests = [Request(None, seed=seed, truncation=float(p),
                        label=(labels[i] if labels is not None else seed % known) if known else None)
                for i, (seed, p) in enumerate(zip(seeds, psi, strict=False))]
    return sampler.sample(requests) if pictures else sampler.solve(requests)


def labelled_table(sampler: Sampler, table: Table, *, latents: Path | None = None,
                   attributes: Sequence[str] | None = None, scales: dict[str, tuple[float, float]] | None = None,
                   seed: int = 0):
    """What a table says of a bundle's samples, as a ``lace_trainer.heads.labelled.Labelled``.

    latents   a file of w, of which the table's rows speak in their order, or by the number in a column ``latent``;
              else the table has a column ``seed``, and ``truncation`` unless it is the bundle's
    seed      decides which rows are held out

    Raises LaceError.
    """
    from lace_trainer.heads.labelled import Labelled

    bundle = sampler.bundle
    check_origin(table, bundle.hash)
    known, labels = labels_of(table, attributes, scales or {})
    if table.count < FEWEST:
        raise LaceError(f"the table {table.path} has {table.count} rows; heads need at least {FEWEST}, and some "
                        "thousands to be worth anything")
    psi = np.array(table.numbers("truncation") if "truncation" in table.columns
                   else [1.0 if latents else sampler.starts.truncation] * table.count, np.float32)
    w = latents_of(table, latents, bundle.generator.w_dim) if latents else seeds_of(sampler, table, psi)
    votes = np.concatenate([one_hot(labels[:, i], len(a.classes)) for i, a in enumerate(known)], axis=1)
    order = np.random.default_rng(seed).permutation(table.count)
    held = int(HELD_OUT * table.count)
    psi = psi[order]
    # What is held out is told apart by the nearest of the truncations that heads are checked at.
    psi[-held:] = np.array(PSIS, np.float32)[np.abs(psi[-held:, None] - np.array(PSIS)).argmin(axis=1)]
    source = {"kind": "table", "table": sha256(table.path), "bundle": bundle.hash, "count": table.count}
    return Labelled(w[order], psi, votes[order], votes[order], known, held, source=source)


def one_hot(labels: Array, classes: int) -> Array:
    """Labels (n,) as columns: (n, classes), or (n, 1) of a value; NaN stays."""
    if not classes:
        return labels[:, None].astype(np.float32)
    hot = np.eye(classes, dtype=np.float32)[np.nan_to_num(labels).astype(int)]
    return np.where(np.isnan(labels)[:, None], np.float32(np.nan), hot)


def check_origin(table: Table, bundle: str) -> None:
    """Refuse a table whose pictures another bundle drew, where the folder says so."""
    path = table.path.parent / LATENTS
    if not path.is_file():
        return
    try:
        with safe_open(str(path), framework="numpy") as file:
            drawn = (file.metadata() or {}).get("bundle", bundle)
    except (OSError, SafetensorError):
        return
    if drawn != bundle:
        raise LaceError(f"the pictures of {table.path} were drawn by a bundle with the hash {drawn[:12]}, not by this "
                        f"one ({bundle[:12]}): give the bundle that drew them")


def latents_of(table: Table, path: Path, w_dim: int) -> Array:
    """w (rows, w_dim) of a table's rows from a file."""
    found = read_latents(path, "w", w_dim)
    rows = table.numbers("latent", whole=True) if "latent" in table.columns else list(range(table.count))
    if min(rows) < 0 or max(rows) >= len(found) or ("latent" not in table.columns and len(found) != table.count):
        raise LaceError(f"{path} holds {len(found)} latents, and {table.path} speaks of {table.count}, up to number "
                        f"{max(rows)}: give one row for each, or a column 'latent' with their numbers from 0")
    return found[rows]


def seeds_of(sampler: Sampler, table: Table, psi: Array) -> Array:
    """w (rows, w_dim) of the seeds that a table names."""
    if "seed" not in table.columns:
        raise LaceError(f"the table {table.path} has no column 'seed' (it has: {', '.join(table.columns)[:200]}): add "
                        "it, or give the pictures' latents with --latents FILE")
    seeds = table.numbers("seed", whole=True)
    labels = table.numbers("label", whole=True) if "label" in table.columns else None
    found = []
    for start in range(0, len(seeds), 1024):
        part = slice(start, start + 1024)
        samples = plain(sampler, seeds[part], psi[part], labels=labels[part] if labels else None, pictures=False)
        found += [sample.w for sample in samples]
    return np.stack(found)
