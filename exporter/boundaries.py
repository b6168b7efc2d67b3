"""InterFaceGAN's boundaries: the normal of a plane that separates latents with an attribute from those without.

Shen et al., "Interpreting the Latent Space of GANs for Semantic Face Editing", CVPR 2020.
"""

import re

import numpy as np
from numpy import ndarray as Array

from engine.errors import CheckpointError

GENERATORS = r"^(stylegan2?|stylegan3|pggan)_(ffhq|celebahq|celeba|bedroom|car|cat|church)_"


def plane(normal: Array, name: str, *, scale: float, offset: float | None,
          centre: Array | None) -> tuple[tuple[Array, Array], float]:
    """A linear layer with the logits -k d (no) and +k d (yes) at the signed distance d = n . x + b from the plane.

    normal   (1, dim) or (dim,), towards 'yes'; its length is divided out
    scale    k; the probability of 'yes' is 1 / (1 + exp(-2 k d))
    offset   b. The files hold none: None lays the plane through ``centre`` (dim,), or through the origin without one

    Returns ((weight (2, dim), bias (2,)), b). Raises CheckpointError for what is no plane.
    """
    rows = np.asarray(normal, np.float64).reshape(-1, normal.shape[-1] if normal.ndim else 1)
    if len(rows) != 1 or rows.size < 2:
        raise CheckpointError(f"it holds an array of the shape {normal.shape}; the boundary of one attribute was "
                              "expected, (1, dim) or (dim,)")
    length = float(np.linalg.norm(rows))
    if not 0 < length < np.inf:
        raise CheckpointError("the boundary's normal has no length, or holds NaN or infinite numbers")
    if not 0 < scale < np.inf:
        raise CheckpointError(f"the scale of {name!r} is {scale}; expected a positive number")
    unit = rows[0] / length
    if offset is None:
        # A boundary of another width is refused later, where it is said what the generator has.
        fits = centre is not None and np.shape(centre) == unit.shape
        offset = -float(unit @ np.asarray(centre, np.float64)) if fits else 0.0
    if not np.isfinite(offset):
        raise CheckpointError(f"the offset of {name!r} is {offset}; expected a number")
    signs = scale * np.array([-1.0, 1.0])
    weight, bias = signs[:, None] * unit, signs * offset
    return (weight.astype(np.float32), bias.astype(np.float32)), float(offset)


def boundary_name(stem: str) -> str:
    """'stylegan_ffhq_smile_w_boundary', 'boundary_Smiling', 'age_boundary' -> smile, Smiling, age."""
    name = re.sub(r"(_[wz])?_boundary$|^boundary_", "", re.sub(GENERATORS, "", stem))
    name = re.sub(r"[^A-Za-z0-9_]", "_", name)
    return f"_{name}" if name[:1].isdigit() else name
