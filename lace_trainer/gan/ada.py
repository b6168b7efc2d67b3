"""Adaptive discriminator augmentation: training a GAN on few pictures.

Karras et al., "Training Generative Adversarial Networks with Limited Data", NeurIPS 2020. The discriminator sees reals
and fakes through the same random transformations, each applied with probability p, so it cannot learn the data set by
heart; p follows how sure it is of the reals. As long as p stays below one, the generator learns pictures without them.

Two things differ from the paper. Pictures are resampled bilinearly, once, where the paper filters at twice the
resolution. And mirroring and quarter turns are switches, off unless asked for, as our attributes have a side.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

SPEED = 500_000  # pictures in which p could go from 0 to 1
INTERVAL = 4  # steps between two changes of p


class Augmentation:
    """The transformations and their probability p, which moves so that the mean sign of D(real) meets ``target``."""

    def __init__(self, target: float, *, flips: bool = False, turns: bool = False):
        self.target, self.flips, self.turns = target, flips, turns
        self.p, self.signs, self.steps = 0.0, 0.0, 0

    def __call__(self, images: Tensor, rng: torch.Generator) -> Tensor:
        """images (n, channels, R, R) in about [-1, 1], differentiable; as they are while p is zero."""
        if self.p == 0:
            return images
        theta = geometry(len(images), images.shape[-1], self.p, rng, flips=self.flips, turns=self.turns)
        grid = F.affine_grid(theta[:, :2], list(images.shape), align_corners=False)
        moved = F.grid_sample(images, grid, mode="bilinear", padding_mode="reflection", align_corners=False)
        matrix = colour(len(images), self.p, rng)
        painted = matrix[:, :3, :3] @ moved.flatten(2) + matrix[:, :3, 3:]
        return painted.view_as(moved).contiguous(memory_format=torch.channels_last)

    def adapt(self, real_logits: Tensor) -> None:
        """Count the signs of one step's logits of reals (n,); every INTERVAL steps move p (the paper's r_t)."""
        self.signs += real_logits.sign().mean().item()
        self.steps += 1
        if self.steps == INTERVAL:
            move = math.copysign(len(real_logits) * INTERVAL / SPEED, self.signs / INTERVAL - self.target)
            self.p, self.signs, self.steps = min(max(self.p + move, 0.0), 1.0), 0.0, 0

    def state_dict(self) -> dict[str, float]:
        return {"p": self.p, "signs": self.signs, "steps": self.steps}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.p, self.signs, self.steps = state["p"], state["signs"], int(state["steps"])


class Chance:
    """Random numbers (*axes, n) for n pictures; each picture with probability 1 - p has zero, which changes nothing."""

    def __init__(self, n: int, p: float, rng: torch.Generator):
        self.n, self.p, self.rng, self.device = n, p, rng, rng.device

    def uniform(self, limit: float, *axes: int, p: float | None = None) -> Tensor:
        """Between -limit and limit."""
        values = torch.rand(*axes, self.n, generator=self.rng, device=self.device)
        return self.gated((2 * values - 1) * limit, p)

    def normal(self, sigma: float, *axes: int) -> Tensor:
        return self.gated(torch.randn(*axes, self.n, generator=self.rng, device=self.device) * sigma)

    def whole(self, end: int) -> Tensor:
        """0, 1, ..., end - 1."""
        return self.gated(torch.randint(end, (self.n,), generator=self.rng, device=self.device).float())

    def gated(self, values: Tensor, p: float | None = None) -> Tensor:
        drawn = torch.rand(self.n, generator=self.rng, device=self.device) < (self.p if p is None else p)
        return torch.where(drawn, values, 0.0)


def geometry(n: int, size: int, p: float, rng: torch.Generator, *, flips: bool, turns: bool) -> Tensor:
    """Matrices (n, 3, 3) from the coordinates of the result to those of the picture, both in [-1, 1].

    The paper's pixel blitting (mirroring, quarter turns, shifts by whole pixels, an eighth of the side at most) and
    general geometry (scale, rotation, stretch, shift), with a rotation on either side of the stretch, so that it can
    have any direction.
    """
    draw = Chance(n, p, rng)
    matrix = torch.eye(3, device=rng.device).expand(n, 3, 3)
    if flips:
        matrix = matrix @ scaling(1 - 2 * draw.whole(2), torch.ones(n, device=rng.device))
    if turns:
        matrix = matrix @ rotation(draw.whole(4) * (math.pi / 2))
    matrix = matrix @ shift(*(draw.uniform(0.125, 2) * size).round() * (2 / size))
    scale = draw.normal(0.2).exp2()
    matrix = matrix @ scaling(scale, scale)
    half = 1 - math.sqrt(1 - p)  # either of two rotations then happens with probability p
    matrix = matrix @ rotation(draw.uniform(math.pi, p=half))
    stretch = draw.normal(0.2).exp2()
    matrix = matrix @ scaling(stretch, 1 / stretch)
    matrix = matrix @ rotation(draw.uniform(math.pi, p=half))
    return matrix @ shift(*draw.normal(2 * 0.125, 2))


def colour(n: int, p: float, rng: torch.Generator) -> Tensor:
    """Affine maps (n, 4, 4) of colours (r, g, b, 1): brightness, contrast, luma flip, hue, saturation."""
    draw = Chance(n, p, rng)
    eye = torch.eye(4, device=rng.device)
    grey = torch.zeros(4, 4, device=rng.device)
    grey[:3, :3] = 1 / 3  # projection onto the axis of greys
    cross = torch.zeros(4, 4, device=rng.device)  # product with the unit vector of that axis
    for row, column in ((2, 1), (0, 2), (1, 0)):
        cross[row, column], cross[column, row] = 3**-0.5, -(3**-0.5)
    plane = torch.diag(torch.tensor([1.0, 1.0, 1.0, 0.0], device=rng.device)) - grey
    constant = eye - plane - grey

    brightness = eye.repeat(n, 1, 1)
    brightness[:, :3, 3] = draw.normal(0.2)[:, None]
    contrast = (grey + plane) * draw.normal(0.5).exp2()[:, None, None] + constant
    flip = eye - 2 * grey * draw.whole(2)[:, None, None]
    angle = draw.uniform(math.pi)[:, None, None]
    hue = grey + plane * angle.cos() + cross * angle.sin() + constant
    saturation = grey + plane * draw.normal(1.0).exp2()[:, None, None] + constant
    return saturation @ hue @ flip @ contrast @ brightness


def shift(x: Tensor, y: Tensor) -> Tensor:
    matrix = torch.eye(3, device=x.device).repeat(len(x), 1, 1)
    matrix[:, 0, 2], matrix[:, 1, 2] = x, y
    return matrix


def scaling(x: Tensor, y: Tensor) -> Tensor:
    return torch.diag_embed(torch.stack([x, y, torch.ones_like(x)], dim=1))


def rotation(angle: Tensor) -> Tensor:
    matrix = torch.eye(3, device=angle.device).repeat(len(angle), 1, 1)
    matrix[:, 0, 0], matrix[:, 0, 1] = angle.cos(), -angle.sin()
    matrix[:, 1, 0], matrix[:, 1, 1] = angle.sin(), angle.cos()
    return matrix
