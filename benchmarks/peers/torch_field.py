"""log p(condition | z) as a torch module on the bundle's tensors, and its gradient by autograd."""

import shutil

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engine.bench.contest import Unavailable
from engine.bench.problem import Problem
from engine.reference import field as twin

Layers = list[tuple[Tensor, Tensor]]


def tensors(layers: list[tuple[np.ndarray, np.ndarray]]) -> Layers:
    return [(torch.from_numpy(weight), torch.from_numpy(bias)) for weight, bias in layers]


def dense(layers: Layers, x: Tensor, *, last_is_linear: bool) -> Tensor:
    for i, (weight, bias) in enumerate(layers):
        x = F.linear(x, weight, bias)
        x = x if last_is_linear and i == len(layers) - 1 else F.leaky_relu(x, 0.2)
    return x


class LogP(nn.Module):
    """z (rows, z_dim) -> log p (rows,). The mapping once, each head once, gains folded into the weights."""

    def __init__(self, problem: Problem):
        super().__init__()
        bundle = problem.bundle
        self.mapping, self.average = tensors(twin.layers(bundle.field, "mapping")), average(problem)
        self.psi = bundle.generator.truncation
        names = dict.fromkeys(bundle.attributes[target.attribute].head for target in problem.targets)
        self.heads = {name: tensors(twin.layers(bundle.field, f"head.{name}")) for name in names}
        self.terms = [(bundle.attributes[target.attribute], target.wanted) for target in problem.targets]

    def w(self, z: Tensor) -> Tensor:
        """After truncation: (rows, w_dim)."""
        x = z / (z.square().mean(dim=1, keepdim=True) + 1e-8).sqrt()
        return self.average + self.psi * (dense(self.mapping, x, last_is_linear=False) - self.average)

    def forward(self, z: Tensor) -> Tensor:
        w = self.w(z)
        logits = {name: dense(layers, w, last_is_linear=True) for name, layers in self.heads.items()}
        return sum(term(logits[a.head][:, slice(*a.columns)], a, wanted) for a, wanted in self.terms)


def average(problem: Problem) -> Tensor:
    return torch.from_numpy(problem.bundle.field["mapping.w_avg"])


def term(logits: Tensor, attribute, wanted: float) -> Tensor:
    """log p of one target: log softmax of a class, or -(u - y)^2 / (2 sigma^2)."""
    if attribute.kind == "class":
        return logits.log_softmax(dim=1)[:, int(wanted)]
    return -((logits[:, 0] - wanted) / attribute.sigma).square() / 2


class Velocity(nn.Module):
    """dz/dtau = grad log p on the flow's clock, for torchdiffeq's ``func(t, z)``; counts its calls."""

    def __init__(self, logp: nn.Module):
        super().__init__()
        self.logp, self.evaluations = logp, 0

    def forward(self, _: Tensor, z: Tensor) -> Tensor:
        self.evaluations += 1
        return gradient(self.logp, z)


def gradient(logp: nn.Module, z: Tensor) -> Tensor:
    with torch.enable_grad():
        z = z.detach().requires_grad_(True)
        return torch.autograd.grad(logp(z).sum(), z)[0]


def open_gradient(problem: Problem):
    """z (rows, z_dim) -> grad log p (rows, z_dim)."""
    logp = LogP(problem)
    return lambda z: gradient(logp, torch.from_numpy(z)).numpy()


def check_compiler() -> None:
    if shutil.which("g++") is None and shutil.which("clang++") is None:
        raise Unavailable("torch.compile needs a C++ compiler: neither g++ nor clang++ is here")
