"""The definition of a one-pass map: residual blocks of dense layers that see the latent, its w, and the targets.

Between the layers of a block is x sigmoid(x): Elfwing, Uchibe, Doya, "Sigmoid-weighted linear units", Neural Networks
2018.
"""

from collections.abc import Mapping

import numpy as np
from numpy import ndarray as Array

from engine.manifest import Oneshot
from engine.reference import field


def push(tensors: Mapping[str, Array], entry: Oneshot, noise: Array, targets: Array | None = None, *,
         normalise: bool = True) -> Array:
    """noise (rows, z_dim), targets (rows, T) where the record has some -> latents (rows, z_dim)."""
    z, psi = noise, np.full((len(noise), 1), entry.truncation, noise.dtype)
    label = np.full(len(noise), entry.label, np.int64)
    for i in range(len(entry.blocks)):
        w, _ = field.mapping(tensors, z, psi, label, normalise=normalise)
        x = np.concatenate([z, w, *([] if targets is None else [targets])], axis=1)
        for j, (weight, bias) in enumerate(field.layers(tensors, f"oneshot.{entry.name}.{i}")):
            x = (swish(x) if j else x) @ weight.T + bias
        z = z + x
    return z


def swish(x: Array) -> Array:
    # Of tanh, which does not overflow.
    return x * (0.5 + 0.5 * np.tanh(0.5 * x))


def golden_answers(tensors: Mapping[str, Array], entry: Oneshot, noise: Array, *,
                   normalise: bool = True) -> dict[str, Array]:
    """oneshot.{name}.latent of the stored noise and, of open targets, the .targets across their ranges; in float64."""
    name, answers = f"oneshot.{entry.name}", {}
    exact = {key: tensor.astype(np.float64) for key, tensor in tensors.items()}
    targets = None
    if entry.targets:
        low, high = np.array(list(entry.targets.values())).T
        answers[f"{name}.targets"] = (low + np.linspace(0, 1, len(noise))[:, None] * (high - low)).astype(np.float32)
        targets = answers[f"{name}.targets"].astype(np.float64)
    answers[f"{name}.latent"] = push(exact, entry, noise.astype(np.float64), targets, normalise=normalise)
    return {key: np.ascontiguousarray(answer, np.float32) for key, answer in answers.items()}
