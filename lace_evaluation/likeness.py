"""Are samples those of the truth? Distances of samples from plain pictures that satisfy a condition, each with the
value that it has by chance, between two halves of the truth of the same sizes.

Kynkäänniemi et al., NeurIPS 2019 (precision, recall); Naeem et al., ICML 2020 (density, coverage).
"""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy import ndarray as Array

from engine.bundle import Attribute
from lace_trainer.judges.metrics import distance, frechet_distance, moments, neighbours

SPLITS = 4  # halves of the truth that are drawn for the floors
RESAMPLES = 200
LEAST = 40  # pictures of the truth below which nothing is said


def features_likeness(truth: Array, samples: Array, seed: int = 0) -> dict[str, float]:
    """Fréchet distance, precision, recall, density and coverage of samples (m, d), and the same ``_floor`` for a part
    of the truth (n, d) in their place. Each split gives both measures the same sizes and the same other part."""
    rng = np.random.default_rng(seed)
    size = min(len(samples), len(truth) // 2)
    found: dict[str, list[float]] = {}
    for _ in range(SPLITS):
        order = rng.permutation(len(truth))
        own, other = truth[order[:size]], truth[order[size:]]
        drawn = samples[rng.permutation(len(samples))[:size]]
        rest = moments(other)
        for suffix, part in (("", drawn), ("_floor", own)):
            near = neighbours(other[:size], part)
            values = {"fid": frechet_distance(rest, moments(part)), "precision": near.precision,
                      "recall": near.recall, "density": near.density, "coverage": near.coverage}
            for name, value in values.items():
                found.setdefault(name + suffix, []).append(value)
    return {name: float(np.mean(values)) for name, values in found.items()}


def labels_likeness(truth: Array, samples: Array, attributes: Mapping[str, Attribute], names: Sequence[str],
                    seed: int = 0) -> dict[str, dict[str, float]]:
    """Of each of the attributes ``names``, the distance of samples' labels (m, attributes) from the truth's, and its
    ``chance``: the mean distance of as many rows drawn from the truth from another draw of the truth's size."""
    rng, order = np.random.default_rng(seed), list(attributes)
    found = {}
    for name in names:
        column, attribute = order.index(name), attributes[name]
        own, drawn = truth[:, column], samples[:, column]
        count = len(attribute.classes)
        by_chance = [distance(attribute.kind, rng.choice(own, len(own)), rng.choice(own, len(drawn)), count)
                     for _ in range(RESAMPLES)]
        found[name] = {"distance": distance(attribute.kind, own, drawn, count), "chance": float(np.mean(by_chance))}
    return found
