"""Golden answers by the numpy definition of the field, for stacks whose original network is not at hand."""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy import ndarray as Array

from engine.manifest import Head
from engine.reference import field as twin


def twin_answers(tensors: Mapping[str, Array], heads: Sequence[Head], stacks: Iterable[str],
                 given: Mapping[str, Array], *, normalise: bool = True) -> dict[str, Array]:
    """head.{stack}.logits and .gradient, float32, at the stored latents ``given``: z, psi, label. Computed in float64.

    stacks   '{head}' or '{head}.sharp'
    """
    tensors = {name: tensor.astype(np.float64) for name, tensor in tensors.items()}
    z, psi = given["z"].astype(np.float64), given["psi"].astype(np.float64)
    w, hidden = twin.mapping(tensors, z, psi, given.get("label"), normalise=normalise)
    spaces = {head.name: head.space for head in heads}
    answers = {}
    for stack in sorted(stacks):
        in_w = spaces[stack.partition(".")[0]] == "w"
        layers = twin.layers(tensors, f"head.{stack}")
        logits, activations = twin.head(layers, w if in_w else z)
        gradient = twin.head_rows(layers, activations, np.eye(logits.shape[1]), rows=len(z))
        if in_w:
            gradient = twin.pullback(tensors, z, psi, hidden, gradient, normalise=normalise)
        answers |= {f"head.{stack}.logits": logits, f"head.{stack}.gradient": gradient}
    return {name: np.ascontiguousarray(answer, np.float32) for name, answer in answers.items()}
