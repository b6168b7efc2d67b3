"""What training a GAN minimises: the logistic losses and two penalties on gradients."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Logistic loss of the discriminator; Goodfellow et al., NeurIPS 2014."""
    return F.softplus(fake_logits).mean() + F.softplus(-real_logits).mean()


def generator_loss(fake_logits: Tensor) -> Tensor:
    """Non-saturating: the generator makes fakes more likely to be real."""
    return F.softplus(-fake_logits).mean()


def r1_penalty(discriminator: nn.Module, reals: Tensor) -> Tensor:
    """Mean of |grad_x D(x)|^2 over reals (n, 3, R, R); Mescheder et al., ICML 2018.

    With augmentation the reals are the augmented ones, and the gradient is with respect to them: to what D sees.
    """
    reals = reals.detach().requires_grad_(True)
    gradient = torch.autograd.grad(discriminator(reals).sum(), reals, create_graph=True)[0]
    return gradient.float().square().sum(dim=(1, 2, 3)).mean()


def path_lengths(pictures: Tensor, ws: Tensor, rng: torch.Generator) -> Tensor:
    """|J_w^T y| of every picture (n,), y ~ N(0, 1) / sqrt(pixels); Karras et al., CVPR 2020, equation 4.

    pictures   (n, 3, R, R), a function of ws (n, num_ws, w_dim); the mean over the layers is within the root
    """
    noise = torch.randn(pictures.shape, generator=rng, device=pictures.device)
    y = noise / math.sqrt(pictures.shape[2] * pictures.shape[3])
    gradient = torch.autograd.grad((pictures * y).sum(), ws, create_graph=True)[0]
    return gradient.square().sum(dim=2).mean(dim=1).sqrt()
