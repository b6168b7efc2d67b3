"""Golden answers by the numpy definition of the field, where the original network is not at hand."""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy import ndarray as Array

from engine.manifest import GeneratorFacts, Head
from engine.reference import field as twin


def golden_answers(tensors: Mapping[str, Array], heads: Sequence[Head], facts: GeneratorFacts) -> dict[str, Array]:
    """All that golden.safetensors holds of a bundle without synthesis: a row without truncation, and one with it."""
    rng = np.random.default_rng(1)
    given = {"z": rng.standard_normal((2, facts.z_dim)).astype(np.float32), "psi": np.array([[1], [0.7]], np.float32)}
    if facts.labels:
        given["label"] = np.array([0, facts.labels - 1])
    exact = {name: tensor.astype(np.float64) for name, tensor in tensors.items()}
    w, _ = twin.mapping(exact, given["z"], given["psi"], given.get("label"), normalise=facts.normalise)
    stacks = {name for head in heads for name in (head.name, *([f"{head.name}.sharp"] if head.sharp else ()))}
    answers = twin_answers(tensors, heads, stacks, given, normalise=facts.normalise)
    return given | {"mapping.w": w.astype(np.float32)} | answers


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
