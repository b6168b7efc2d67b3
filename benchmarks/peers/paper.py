"""The paper's own way, from its description: eager torch, the mapping computed again for every attribute.

Equalised layers scale their weights at every call, heads are 1x1 convolutions, the gradient is autograd's, and
torchdiffeq's dopri5 runs through odeint_adjoint over t from 1 to 1e-3 at tolerances of 1e-3, with one step size for the
batch. Nie, Vahdat, Anandkumar, NeurIPS 2021.
"""

import torch
from numpy import ndarray as Array
from torch import Tensor, nn
from torchdiffeq import odeint_adjoint

from benchmarks.peers.torch_field import average, gradient, tensors, term
from engine.bench.problem import Problem
from engine.clock import T_END, T_START, beta
from engine.reference import field as twin
from exporter.generators.stylegan2 import SQRT2, Mapping

TOLERANCE = 1e-3


class Energy(nn.Module):
    """z (rows, z_dim) -> sum of the targets' log p (rows,)."""

    def __init__(self, problem: Problem):
        super().__init__()
        bundle = problem.bundle
        self.mapping, self.average, self.psi = equalised(problem), average(problem), bundle.generator.truncation
        self.terms = [(bundle.attributes[target.attribute], target.wanted) for target in problem.targets]
        self.heads = nn.ModuleList(convolutions(problem, attribute.head) for attribute, _ in self.terms)
        self.requires_grad_(False)

    def forward(self, z: Tensor) -> Tensor:
        total = torch.zeros(len(z), device=z.device)
        for (attribute, wanted), head in zip(self.terms, self.heads, strict=True):
            w = self.average + self.psi * (self.mapping(z) - self.average)
            logits = head(w[:, :, None, None])[:, :, 0, 0]
            total = total + term(logits[:, slice(*attribute.columns)], attribute, wanted)
        return total


def equalised(problem: Problem) -> Mapping:
    """The mapping with its learning-rate gains not folded, as checkpoints store it."""
    layers = tensors(twin.layers(problem.bundle.field, "mapping"))
    g = problem.bundle.generator
    mapping = Mapping(g.z_dim, g.w_dim, num_layers=len(layers))
    for layer, (weight, bias) in zip(mapping.layers, layers, strict=True):
        gain = layer.lr_multiplier / layer.weight.shape[1] ** 0.5
        layer.weight.data, layer.bias.data = weight / (SQRT2 * gain), bias / (SQRT2 * layer.lr_multiplier)
    return mapping


def convolutions(problem: Problem, head: str) -> nn.Sequential:
    layers = tensors(twin.layers(problem.bundle.field, f"head.{head}"))
    stack = nn.Sequential()
    for i, (weight, bias) in enumerate(layers):
        convolution = nn.Conv2d(weight.shape[1], weight.shape[0], 1)
        convolution.weight.data, convolution.bias.data = weight[:, :, None, None], bias  # type: ignore[union-attr]
        stack.extend([convolution, nn.LeakyReLU(0.2)] if i < len(layers) - 1 else [convolution])
    return stack


class PaperClock(nn.Module):
    """dz/dt = -1/2 beta(t) grad log p, the state a tuple of one tensor."""

    def __init__(self, energy: Energy):
        super().__init__()
        self.energy, self.evaluations = energy, 0

    def forward(self, t: Tensor, state: tuple[Tensor]) -> tuple[Tensor]:
        self.evaluations += 1
        return (-0.5 * beta(t) * gradient(self.energy, state[0]),)  # type: ignore[operator]


def open_gradient(problem: Problem):
    """z (rows, z_dim) -> grad log p (rows, z_dim)."""
    energy = Energy(problem)
    return lambda z: gradient(energy, torch.from_numpy(z)).numpy()


def open_solver(problem: Problem):
    """z0 -> the end of the flow and the number of evaluations."""
    func = PaperClock(Energy(problem))
    span = torch.tensor([T_START, T_END])

    def solve(z0: Array) -> tuple[Array, int]:
        func.evaluations = 0
        (ends,) = odeint_adjoint(func, (torch.from_numpy(z0),), span, method="dopri5", rtol=TOLERANCE, atol=TOLERANCE)
        return ends[-1].detach().numpy(), func.evaluations

    return solve
