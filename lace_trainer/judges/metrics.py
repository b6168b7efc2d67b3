"""How near generated pictures are to real ones: Fréchet distance, precision and recall.

The features are those of the judge, the image classifier that ships with the package: the spatial mean of the output
of its last residual stage, 112 numbers a picture. They are fixed, and they know what matters in the demonstration
world; distances by them cannot be compared with distances by the features of an Inception network.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy import ndarray as Array
from torch import Tensor
from torch.nn import functional as F

from engine.errors import LaceError
from lace_trainer.judges.classifier import Classifier, as_input

REFERENCE_SEED = 7_700_001  # no training draws its pictures from this seed
NEIGHBOURS = 5  # of density and coverage, and of precision and recall, so that one set of balls serves all
BLOCK = 1000  # rows of distances held at once


@torch.inference_mode()
def features(judge: Classifier, pictures: Array, *, batch: int = 256) -> Array:
    """Spatial mean of the judge's last stage, (n, widths[-1]) float32.

    pictures   (n, R, R, 3) uint8; resized to what the judge reads if they have another size
    """
    judge.eval()
    found = [np.empty((0, judge.shape.widths[-1]), np.float32)]
    for x in inputs(pictures, judge.shape.size, judge.out.weight.device, batch):
        found.append(judge.maps(x).float().mean(dim=(2, 3)).cpu().numpy())
    return np.concatenate(found)


def inputs(pictures: Array, size: int, device: torch.device, batch: int) -> Iterator[Tensor]:
    """Batches (at most ``batch``, 3, size, size) in [-1, 1] of pictures (n, R, R, 3) uint8, resized if R != size."""
    for start in range(0, len(pictures), batch):
        x = as_input(torch.from_numpy(np.ascontiguousarray(pictures[start : start + batch])).to(device))
        yield x if x.shape[-1] == size else F.interpolate(x, size=(size, size), mode="bilinear", antialias=True)


@dataclass(frozen=True, slots=True, eq=False)
class Moments:
    """Mean (d,), covariance (d, d) and number of features; float64."""

    mean: Array
    covariance: Array
    count: int


def moments(features: Array) -> Moments:
    """Moments of features (n, d); LaceError if there are fewer than two or one is not finite."""
    if features.ndim != 2 or len(features) < 2 or not np.isfinite(features).all():
        raise LaceError(f"features {features.shape} have no covariance; expected two or more finite rows")
    rows = features.astype(np.float64)
    return Moments(rows.mean(axis=0), np.cov(rows, rowvar=False).reshape(rows.shape[1], rows.shape[1]), len(rows))


def frechet_distance(a: Moments, b: Moments) -> float:
    """|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)); Heusel et al., NeurIPS 2017, equation 6.

    The trace of the root is the sum of the singular values of C_a^(1/2) C_b^(1/2), which stays real and exact where
    a covariance is nearly singular and the root of the product is not.
    """
    trace = np.trace(a.covariance) + np.trace(b.covariance)
    overlap = np.linalg.norm(root(a.covariance) @ root(b.covariance), "nuc")
    return max(0.0, float(np.square(a.mean - b.mean).sum() + trace - 2 * overlap))


def root(covariance: Array) -> Array:
    """The symmetric square root of a positive semi-definite matrix."""
    values, vectors = np.linalg.eigh(covariance)
    return vectors * np.sqrt(values.clip(min=0)) @ vectors.T


def precision_recall(real_features: Array, fake_features: Array, k: int = 3) -> tuple[float, float]:
    """Precision and recall of Kynkäänniemi et al., NeurIPS 2019.

    A set's manifold is the union of balls around its members, each of which reaches to the member's k-th nearest
    neighbour. Precision is the share of fakes on the manifold of the reals, recall that of reals on the fakes'.
    Takes (n, d) and (m, d) float32; uses memory for BLOCK x max(n, m) distances.
    """
    if min(len(real_features), len(fake_features)) <= k:
        raise LaceError(f"{len(real_features)} and {len(fake_features)} features; expected more than k = {k} of each")
    centre = real_features.mean(axis=0)  # squares of centred numbers cancel less
    real, fake = real_features - centre, fake_features - centre
    reach_real, reach_fake = reaches(real, k), reaches(fake, k)
    held, covered = 0, np.zeros(len(real), bool)
    for start in range(0, len(fake), BLOCK):
        rows = slice(start, start + BLOCK)
        distances = squared_distances(fake[rows], real)
        held += int((distances <= reach_real).any(axis=1).sum())
        covered |= (distances <= reach_fake[rows, None]).any(axis=0)
    return held / len(fake), float(covered.mean())


def reaches(points: Array, k: int) -> Array:
    """Squared distance of every point to its k-th nearest neighbour among the others, (n,)."""
    found = np.empty(len(points), np.float32)
    for start in range(0, len(points), BLOCK):
        distances = squared_distances(points[start : start + BLOCK], points)
        own = np.arange(len(distances))
        distances[own, start + own] = np.inf
        found[start : start + BLOCK] = np.partition(distances, k - 1, axis=1)[:, k - 1]
    return found


def squared_distances(a: Array, b: Array) -> Array:
    """(n, d), (m, d) -> (n, m), through one matrix product."""
    distances = a @ (-2 * b.T)
    distances += np.square(a).sum(axis=1)[:, None]
    distances += np.square(b).sum(axis=1)
    return distances.clip(min=0, out=distances)


@dataclass(frozen=True, slots=True)
class Neighbours:
    """precision, recall, density, coverage of samples against a truth."""

    precision: float
    recall: float
    density: float
    coverage: float


def neighbours(truth: Array, samples: Array, k: int = NEIGHBOURS) -> Neighbours:
    """Of features (n, d) and (m, d), by balls that reach to the k-th nearest neighbour of the same set."""
    centre = truth.mean(axis=0)
    real, fake = (truth - centre).astype(np.float32), (samples - centre).astype(np.float32)
    distances = squared_distances(real, fake)
    in_real = distances <= reaches(real, k)[:, None]
    in_fake = distances <= reaches(fake, k)[None]
    return Neighbours(float(in_real.any(axis=0).mean()), float(in_fake.any(axis=1).mean()),
                      float(in_real.sum(axis=0).mean() / k), float(in_real.any(axis=1).mean()))


def distance(kind: str, truth: Array, samples: Array, classes: int) -> float:
    """Of one attribute's labels: total variation of a class, Kolmogorov-Smirnov of a value."""
    if kind == "class":
        shares = [np.bincount(part.astype(int), minlength=classes) / len(part) for part in (truth, samples)]
        return float(0.5 * np.abs(shares[0] - shares[1]).sum())
    both = np.sort(np.concatenate([truth, samples]))
    steps = [np.searchsorted(np.sort(part), both, side="right") / len(part) for part in (truth, samples)]
    return float(np.abs(steps[0] - steps[1]).max())


def digest(judge: Classifier) -> str:
    """Twelve characters that tell one judge's features from another's."""
    hashed = hashlib.sha256()
    for name, value in judge.state_dict().items():
        if "num_batches" not in name and not name.startswith("out."):
            hashed.update(name.encode() + value.cpu().numpy().tobytes())
    return hashed.hexdigest()[:12]
