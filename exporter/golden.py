"""Golden answers: what the original modules say, before anything is folded or rewritten.

The mapping and the heads are evaluated in float64, their gradients by torch's autograd; the pictures in float32.
They travel in the bundle, so that any runtime can be examined without the checkpoint and without torch.
"""

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy import ndarray as Array
from torch import Tensor
from torch.nn import functional as F

from engine.verify import small
from exporter.synthesis_graph import Synthesis, Traced

# One row at each end of the truncation that people use, and one at the usual value. A plain generator has it in the
# draw, and its class must not be scaled.
PSI, PLAIN_PSI = (1.0, 0.7, 0.5, 1.0), (1.0, 1.0, 1.0, 1.0)
SEED = 20_211_206


def latents(z_dim: int, labels: int, rows: int = len(PSI), *, psi: Sequence[float] = PSI) -> dict[str, Array]:
    """z (n, z_dim), psi (n, 1) and, for a conditional generator, label (n,)."""
    found = {
        "z": np.random.default_rng(SEED).standard_normal((rows, z_dim)).astype(np.float32),
        "psi": np.resize(np.array(psi, np.float32), (rows, 1)),
    }
    if labels:
        found["label"] = (np.arange(rows) * 7 + labels - 1) % labels
    return found


def stack_logits(layers: Sequence[tuple], x: Tensor) -> Tensor:
    """The logits of a head's dense layers: leaky ReLU 0.2 between them, the last one linear."""
    for i, (weight, bias) in enumerate(layers):
        weight, bias = (torch.as_tensor(np.asarray(t), dtype=x.dtype) for t in (weight, bias))
        x = F.linear(F.leaky_relu(x, 0.2) if i else x, weight, bias)
    return x


def stack_answers(name: str, logits: Tensor, z: Tensor) -> dict[str, Array]:
    """``{name}.logits`` (n, C) and ``{name}.gradient`` (n, C, z_dim) of one stack."""
    # Rows do not see each other, so the gradient of the sum over rows holds every row's own gradient.
    rows = [torch.autograd.grad(column.sum(), z, retain_graph=True)[0] for column in logits.unbind(dim=1)]
    return {f"{name}.logits": logits.detach().float().numpy(), f"{name}.gradient": torch.stack(rows, 1).float().numpy()}


def field_answers(mapping: Any, heads: Sequence, given: dict[str, Array]) -> dict[str, Array]:
    """mapping.w (n, w_dim) and the answers of every stack, head.{stack}.logits and .gradient, in float64."""
    mapping = copy.deepcopy(mapping).double().eval().requires_grad_(False)
    z = torch.from_numpy(given["z"]).double().requires_grad_()
    psi = torch.from_numpy(given["psi"]).double()
    label = torch.from_numpy(given["label"]) if "label" in given else None
    average = mapping.w_avg
    w = average + psi * (mapping(z, label) - average)
    answers = {"mapping.w": w.detach().float().numpy()}
    for head in heads:
        x, name = w if head.space == "w" else z, f"head.{head.name}"
        answers |= stack_answers(name, stack_logits(head.layers, x), z)
        if head.sharp:
            answers |= stack_answers(f"{name}.sharp", stack_logits(head.sharp.layers, x), z)
    return answers


@torch.no_grad()
def image_answers(synthesis: Synthesis, w: Array, noise: str) -> dict[str, Array]:
    """``synthesis.images`` (n, C, s, s), box-averaged, and ``synthesis.image`` (1, C, R, R), the first in full.

    With noise mode 'input' the answers are for noise inputs of zero.
    """
    model = Traced(synthesis, "none" if noise == "input" else noise).eval()
    averaged, full = [], None
    for row in torch.from_numpy(w):  # one at a time: four rows of 1024 px need gigabytes
        image = model(row[None, None].expand(-1, synthesis.num_ws, -1), []).float().numpy()
        full = image if full is None else full
        averaged.append(small(image))
    assert full is not None
    return {"synthesis.image": full, "synthesis.images": np.concatenate(averaged)}


def golden_answers(mapping: Any, synthesis: Synthesis, heads: Sequence, *, noise: str) -> dict[str, Array]:
    """Everything that golden.safetensors holds, the answers of a graph under its name; float32 except the labels."""
    given = latents(mapping.z_dim, mapping.c_dim, psi=PSI if len(mapping.layers) else PLAIN_PSI)
    answers = given | field_answers(mapping, heads, given)
    return answers | image_answers(synthesis, answers["mapping.w"], noise)
