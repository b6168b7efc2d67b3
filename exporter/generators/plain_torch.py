"""Plain generators as modules of torch: how they take a latent, how they answer, and their graph."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy import ndarray as Array
from torch import Tensor, nn

from engine.errors import CheckpointError
from exporter.generators.onnx_reading import all_tensors, bring_inside, check, renew
from exporter.generators.plain import INTEGER, ONE_HOT, Latent, Network
from exporter.synthesis_graph import trace_rows


def network_of_module(module: nn.Module, *, latent: int | Sequence[int], classes: int | None = None) -> Network:
    """The network of a module in memory: forward(z), or forward(z, label) with ``classes``. Raises CheckpointError.

    latent    d: its rows are (n, d), or (n, d, 1, 1) where the module takes only that; or the sizes behind the rows
    """
    module = copy.deepcopy(module).cpu().float().eval().requires_grad_(False)
    found = takes(module, latent, classes or 0)

    @torch.no_grad()
    def original(z: Array, labels: Array | None) -> Array:
        return picture_of(module(*inputs_for(found, torch.from_numpy(z), labels))).float().numpy()

    model = trace_module(module, found)
    names = [value.name for value in model.graph.input]
    return Network(model, found, (names[0], names[1] if found.classes else None), original, "torch")


def inputs_for(latent: Latent, z: Tensor, labels: Array | None) -> tuple[Tensor, ...]:
    z = z.reshape(-1, *latent.shape)
    if not latent.classes:
        return (z,)
    label = torch.as_tensor(np.zeros(len(z), np.int64) if labels is None else np.asarray(labels, np.int64))
    return (z, label if latent.class_input == INTEGER else torch.eye(latent.classes)[label])


def picture_of(output: Any) -> Tensor:
    """A module's picture; of several results the first, as diffusers and VAEs give them."""
    if isinstance(output, tuple | list) and output:
        output = output[0]
    if not isinstance(output, Tensor):
        raise CheckpointError(f"the module gives a {type(output).__name__}; expected a tensor of pictures")
    return output


@torch.no_grad()
def takes(module: nn.Module, latent: int | Sequence[int], classes: int) -> Latent:
    """In which of the known ways the module takes its inputs: the first that it does not refuse."""
    shapes = [(latent,), (latent, 1, 1)] if isinstance(latent, int) else [tuple(latent)]
    reasons = []
    for shape in shapes:
        for class_input in (INTEGER, ONE_HOT) if classes else (INTEGER,):
            found = Latent(shape, classes, class_input)
            try:
                output = picture_of(module(*inputs_for(found, torch.zeros(2, shape[0]), None)))
                if output.ndim in (3, 4) and len(output) == 2:
                    return found
                reasons.append(f"{shape}: gives the sizes {tuple(output.shape)}")
            except CheckpointError:
                raise
            except Exception as error:  # whatever a stranger's forward raises
                reasons.append(f"{shape}: {' '.join(str(error).split())[:120]}")
    raise CheckpointError(f"the module takes no latent of {latent}{f' with {classes} classes' if classes else ''} "
                          f"({'; '.join(reasons[:2])}): say its sizes with --latent, such as 128 or 100,1,1")


class Alone(nn.Module):
    """A module whose result is its picture."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, z: Tensor, label: Tensor | None = None) -> Tensor:
        return picture_of(self.module(z) if label is None else self.module(z, label))


def trace_module(module: nn.Module, latent: Latent) -> onnx.ModelProto:
    """The module's graph, with free rows. Raises CheckpointError."""
    arguments = inputs_for(latent, torch.zeros(3, latent.width), None)
    try:
        model = trace_rows(Alone(module).eval(), arguments)
    except Exception as error:  # torch raises many private types
        raise CheckpointError(f"torch cannot trace this module ({' '.join(str(error).split())[:200]}): export it to "
                              "ONNX yourself, and give the file") from error
    for node in model.graph.node:
        node.domain = "" if node.domain == "ai.onnx" else node.domain
    model.functions.clear()
    check(model)
    for tensor in all_tensors(model):
        bring_inside(tensor, Path())
    return renew(model)
