"""InterFaceGAN's boundaries as heads of a bundle: a normal says a direction and neither a place nor a scale.

With labels of the attribute (a labeller, a table) place and scale are those with the least log loss, and the head is
sharp and calibrated; without, the plane goes through the mean latent, one spread of the latents is a log-odds of 4, and
the head serves the flow only.

Shen et al., "Interpreting the Latent Space of GANs for Semantic Face Editing", CVPR 2020.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy import ndarray as Array

from engine.bundle import sha256
from engine.cli.latents import read_arrays
from engine.errors import LaceError
from engine.sampler import Sampler
from exporter.boundaries import plane
from exporter.heads import NO_YES, HeadAttribute, HeadStack, SharpStack
from lace_trainer.attributes import Attribute
from lace_trainer.heads import calibration
from lace_trainer.heads.calibration import Calibration
from lace_trainer.heads.drawn import plain
from lace_trainer.heads.labelled import Labelled

PLAIN, ODDS = 2000, 4.0  # samples for the spread; log-odds of one spread without labels
STEPS = 50


def read_normal(path: Path, w_dim: int) -> Array:
    """(w_dim,) from a .npy file. Raises LaceError."""
    try:
        arrays = list(read_arrays(path).values())
    except OSError as error:
        raise LaceError(f"cannot read the boundary {path}: {error.strerror}") from error
    except Exception as error:  # the parsers of numpy and zipfile raise many types
        raise LaceError(f"{path} is no boundary ({error}); expected a .npy file with (1, {w_dim}) numbers") from error
    if len(arrays) != 1 or arrays[0].size != w_dim:
        raise LaceError(f"{path} holds {', '.join(str(a.shape) for a in arrays) or 'nothing'}; this bundle's "
                        f"boundaries have (1, {w_dim}) numbers")
    return arrays[0].reshape(1, -1)


def boundary_head(sampler: Sampler, name: str, path: Path, labelled: Labelled | None
                  ) -> tuple[HeadStack, Calibration | None]:
    """The head of one boundary, and its calibration where ``labelled`` knows the attribute, as (no, yes)."""
    bundle = sampler.bundle
    normal = read_normal(path, bundle.generator.w_dim)
    known = labelled is not None and name in [a.name for a in labelled.attributes]
    facts = {"source": "InterFaceGAN boundary", "file": path.name, "hash": sha256(path)}
    if not known:
        w = np.stack([sample.w for sample in plain(sampler, range(PLAIN), [1.0] * PLAIN, pictures=False)])
        distances = w @ (normal[0] / np.linalg.norm(normal))
        scale, centre = ODDS / 2 / float(distances.std() + 1e-12), w.mean(axis=0)
        layer, offset = plane(normal, name, scale=scale, offset=None, centre=centre)
        attribute = HeadAttribute(name, "class", NO_YES, (0, 2), provenance={**facts, "scale": scale, "offset": offset})
        return HeadStack(name, "w", (layer,), (attribute,)), None
    assert labelled is not None
    data = labelled.select([name])
    check_two_classes(data.attributes[0], path)
    rows = np.arange(len(data.w) - data.held_out, len(data.w))
    rows = rows[~np.isnan(data.votes[rows, 0])]
    training = np.flatnonzero(~np.isnan(data.votes[: len(data.w) - data.held_out, 0]))
    unit = normal[0] / np.linalg.norm(normal)
    slope, place = logistic(data.w[training] @ unit, data.votes[training, 1])
    if slope <= 0:
        raise LaceError(f"the boundary {path} points away from {data.attributes[0].classes[1]!r} by the labels of "
                        f"{name!r}: turn its sign, or check its name")
    layer, offset = plane(normal, name, scale=slope / 2, offset=place / slope, centre=None)
    parts = {f"{psi:g}": (head_logits(layer, data.w[some]), data.votes[some])
             for psi in np.unique(data.psi[rows]).tolist() for some in [rows[data.psi[rows] == psi]]}
    found = calibration.of_classes(name, parts, 1.0)
    trained_on = {key: value for key, value in data.source.items() if key != "labeller_accuracy"}
    facts |= {"scale": slope / 2, "offset": offset, "trained_on": trained_on}
    attribute = HeadAttribute(name, "class", data.attributes[0].classes, (0, 2), provenance=facts)
    sharp = SharpStack((layer,), True, {name: 1.0}, {name: dict(found.ece)})
    return HeadStack(name, "w", (layer,), (attribute,), sharp), found


def check_two_classes(attribute: Attribute, path: Path) -> None:
    if len(attribute.classes) != 2:
        raise LaceError(f"{path} separates two classes; {attribute.name!r} has {len(attribute.classes) or 'none'}")


def head_logits(layer: tuple[Array, Array], w: Array) -> Array:
    return w @ layer[0].T + layer[1]


def logistic(x: Array, p: Array) -> tuple[float, float]:
    """Slope and intercept of the log-odds of probabilities p (n,) at x (n,): Newton's method on the log loss, with a
    weak pull that keeps separable labels finite."""
    x, theta = np.stack([x, np.ones_like(x)], axis=1).astype(np.float64), np.zeros(2)
    pull = np.diag([1e-5, 1e-8]) * np.array([x[:, 0].var(), 1.0])
    for _ in range(STEPS):
        q = 1 / (1 + np.exp(-np.clip(x @ theta, -60, 60)))
        curvature = (x * (q * (1 - q))[:, None]).T @ x / len(x) + pull
        step = np.linalg.solve(curvature, x.T @ (p - q) / len(x) - pull @ theta)
        theta = theta + step * min(1.0, 5.0 / (np.abs(step).max() + 1e-12))
        if np.abs(step).max() < 1e-9:
            break
    return float(theta[0]), float(theta[1])


def parse_boundaries(texts: Sequence[str]) -> dict[str, Path]:
    """NAME=FILE.npy of the command line. Raises LaceError."""
    found = {}
    for text in texts:
        name, mark, file = text.partition("=")
        if not mark or not name.isidentifier() or not file:
            raise LaceError(f"--boundary {text!r:.80}: expected NAME=FILE.npy")
        found[name] = Path(file)
    return found
