"""A frozen bundle in torch: latents, sharp logits and how sure the heads are, with gradients by the latent.

The same as engine.reference.field and engine.reference.probability, which the tests compare it with.
"""

from collections.abc import Callable, Mapping, Sequence
from math import log

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from engine.bundle import Bundle
from engine.reference.field import MOMENT_EPSILON, SLOPE, layers
from engine.reference.probability import FALSE
from engine.reference.tape import HIGHEST_VALUE
from engine.solvers.posterior import stack_names
from engine.tape import Column, Tape

Layers = Sequence[tuple[Tensor, Tensor]]


def dense(stack: Layers, x: Tensor) -> Tensor:
    """Dense layers with leaky ReLUs between them."""
    for i, (weight, bias) in enumerate(stack):
        x = F.linear(F.leaky_relu(x, SLOPE) if i else x, weight, bias)
    return x


class World:
    """Generator and sharp heads of a bundle at one truncation.

    psi     truncation;  label: class of a conditional generator, else None
    """

    def __init__(self, bundle: Bundle, psi: float, label: int | None = None):
        self.bundle, self.psi, self.label = bundle, psi, label
        self.attributes = bundle.attributes
        self.width, self.w_dim = bundle.generator.z_dim, bundle.generator.w_dim
        self.mapping = self.read("mapping")
        self.average = torch.from_numpy(bundle.field["mapping.w_avg"].copy())
        self.stacks = stack_names(bundle)
        self.heads = {name: self.read(f"head.{name}") for name in set(self.stacks.values())}

    def read(self, prefix: str) -> Layers:
        return [(torch.from_numpy(weight.copy()), torch.from_numpy(bias.copy()))
                for weight, bias in layers(self.bundle.field, prefix)]

    def map(self, z: Tensor) -> Tensor:
        """z (n, z_dim) -> truncated w (n, w_dim)."""
        x = z
        if self.bundle.generator.normalise:
            x = z * (z.square().mean(dim=1, keepdim=True) + MOMENT_EPSILON).rsqrt()
        if self.label is not None:
            x = torch.cat([x, torch.from_numpy(self.bundle.field["mapping.embedding"])[self.label].expand(len(x), -1)],
                          dim=1)
        for weight, bias in self.mapping:
            x = F.leaky_relu(F.linear(x, weight, bias), SLOPE)
        return self.average + self.psi * (x - self.average)

    def logits(self, z: Tensor, w: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
        """Of each attribute that is named, (n, C)."""
        found: dict[str, Tensor] = {}
        for stack in dict.fromkeys(self.stacks[name] for name in names):
            found[stack] = dense(self.heads[stack], w if self.bundle.stacks[stack].space == "w" else z)
        return {name: found[self.stacks[name]][:, slice(*self.attributes[name].columns)] for name in names}

    @torch.no_grad()
    def log_p(self, z: Tensor, tapes: Sequence[Tape]) -> Tensor:
        """log P (tapes, n) of tapes at z (n, z_dim), statements on values true or false as they have them."""
        names = list(dict.fromkeys(column.attribute for tape in tapes for column in tape.columns))
        logits = self.logits(z, self.map(z), names)
        return torch.stack([log_probability(tape, read_columns(tape.columns, logits, len(z))) for tape in tapes])


def read_columns(columns: Sequence[Column], logits: Mapping[str, Tensor], n: int) -> Tensor:
    """What a tape reads (n, columns)."""
    found = []
    for column in columns:
        own = logits[column.attribute]
        found.append(own[:, 1] - own[:, 0] if column.index is None else own[:, column.index])
    return torch.stack(found, dim=1) if found else torch.zeros(n, 0)


# --- how sure the heads are -----------------------------------------------------------------------------------------


def log_probability(tape: Tape, u: Tensor, *, relaxed: bool = False) -> Tensor:
    """log P (n,) of a tape at its columns u (n, columns): engine.reference.probability, with gradients."""
    p, stack = tape.parameters, []
    for name, *places in tape.program:
        if name in LEAVES:
            stack.append(LEAVES[name](p, u, *places))
        elif name in ("inside", "outside"):
            stack.append(missed(interval(p, u, *places, inside=name == "inside"), float(p[places[1] + 2]), relaxed))
        elif name == "weight":
            stack.append(stack.pop() * float(p[places[0]]))
        else:
            right, left = stack.pop(), stack.pop()
            stack.append(left + right if name == "and" else either(left, right))
    return stack[0] if stack else u.new_zeros(len(u))


def others(p: np.ndarray, u: Tensor, first: int, count: int, position: int) -> Tensor:
    """The chosen class against the others."""
    logits, chosen = u[:, first : first + count], int(p[position])
    rest = torch.cat([logits[:, :chosen], logits[:, chosen + 1 :]], dim=1)
    return logits[:, chosen] - rest.logsumexp(dim=1)


def difference(p: np.ndarray, u: Tensor, column: int, position: int) -> Tensor:
    return F.logsigmoid(float(p[position]) * u[:, column])


def value(p: np.ndarray, u: Tensor, column: int, position: int) -> Tensor:
    return -0.5 * ((u[:, column] - float(p[position])) * float(p[position + 1])).square()


def side(p: np.ndarray, u: Tensor, column: int, position: int) -> Tensor:
    return torch.special.log_ndtr((u[:, column] - float(p[position])) * float(p[position + 1]))


LEAVES: dict[str, Callable[..., Tensor]] = {
    "class": lambda *a: F.logsigmoid(others(*a)), "not_class": lambda *a: F.logsigmoid(-others(*a)),
    "difference": difference, "value": value, "side": side,
    "not_value": lambda *a: (-value(*a).clamp(max=HIGHEST_VALUE).expm1()).log(),
}


def interval(p: np.ndarray, u: Tensor, column: int, position: int, *, inside: bool) -> Tensor:
    """Distance (n,) to where a statement on a value is true, 0 there."""
    below, above = float(p[position]) - u[:, column], u[:, column] - float(p[position + 1])
    return (torch.maximum(below, above) if inside else torch.minimum(-below, -above)).clamp(min=0)


def missed(distance: Tensor, scale: float, relaxed: bool) -> Tensor:
    if relaxed:
        return (-0.5 * (distance * scale).square()).clamp(min=FALSE)
    return torch.where(distance > 0, FALSE, 0.0)


def either(a: Tensor, b: Tensor) -> Tensor:
    """log(P + Q - P Q)."""
    high, low = torch.maximum(a, b), torch.minimum(a, b)
    # Where P is 1 the other one changes nothing; expm1 of it has no gradient that is worth having.
    return (high + torch.log1p(-torch.expm1(high.clamp(max=log(1 - 1e-7))) * (low - high).exp())).clamp(max=0)
