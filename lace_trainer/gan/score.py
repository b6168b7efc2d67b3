"""The score of a generator: Fréchet distance, precision and recall of its samples against real pictures."""

import time
from collections.abc import Callable

import numpy as np
import torch
from numpy import ndarray as Array
from torch import Tensor

from engine.errors import LaceError
from exporter.generators.stylegan2 import Mapping, Synthesis
from lace_trainer.judges.classifier import Classifier
from lace_trainer.judges.metrics import REFERENCE_SEED, digest, features, frechet_distance, moments, precision_recall

Progress = Callable[[int, int, str], None]

COUNT = 10_000  # samples and references of a score that is published
SAMPLE_SEED = 0


def to_pixels(images: Tensor) -> Array:
    """(n, 3, R, R) in about [-1, 1] -> (n, R, R, 3) uint8, as StyleGAN defines it: x 127.5 + 128, cut off."""
    return (images * 127.5 + 128).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


@torch.inference_mode()
def sampled_features(
    judge: Classifier, mapping: Mapping, synthesis: Synthesis, count: int, *, seed: int = SAMPLE_SEED,
    batch: int = 64, progress: Progress | None = None,
) -> Array:
    """Features (count, d) of samples at truncation 1 with constant noise; LaceError for a generator with classes."""
    if mapping.c_dim:
        raise LaceError("the generator has classes; expected one without: its score would hang on the classes drawn")
    rng, device, found = torch.Generator().manual_seed(seed), mapping.w_avg.device, []
    for start in range(0, count, batch):
        # Always a full batch of latents, so that a sample does not depend on `count`.
        z = torch.randn(batch, mapping.z_dim, generator=rng)[: count - start].to(device)
        ws = mapping(z)[:, None].expand(-1, synthesis.num_ws, -1)
        found.append(features(judge, to_pixels(synthesis(ws))))
        if progress:
            progress(min(start + batch, count), count, "sampling")
    return np.concatenate(found)


def data_features(judge: Classifier, pictures: Array, count: int = COUNT) -> Array:
    """Features of a data set (n, R, R, 3) uint8, of ``count`` of its pictures drawn at random if it has more."""
    if len(pictures) > count:
        rows = np.random.default_rng(REFERENCE_SEED).choice(len(pictures), count, replace=False)
        pictures = pictures[np.sort(rows)]
    return features(judge, pictures)


def score(
    judge: Classifier, mapping: Mapping, synthesis: Synthesis, reference: Array, *, count: int = COUNT,
    seed: int = SAMPLE_SEED, progress: Progress | None = None,
) -> dict[str, float | int | str]:
    """What the record of a generator says about its samples.  reference (n, d): features of real pictures"""
    began = time.perf_counter()
    sampled = sampled_features(judge, mapping, synthesis, count, seed=seed, progress=progress)
    precision, recall = precision_recall(reference, sampled)
    return {
        "fid": round(frechet_distance(moments(reference), moments(sampled)), 5), "precision": round(precision, 4),
        "recall": round(recall, 4), "samples": count, "reference_pictures": len(reference),
        "judge": digest(judge), "score_seconds": round(time.perf_counter() - began, 1),
    }
