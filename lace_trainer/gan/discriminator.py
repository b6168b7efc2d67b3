"""The residual discriminator of StyleGAN2, for training only.

Karras et al., "Analyzing and Improving the Image Quality of StyleGAN", CVPR 2020.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from exporter.generators.stylegan2 import SQRT2, Dense, blur, fir


class Conv(nn.Module):
    """Equalised convolution, optionally blurred and strided by 2, optionally leaky ReLU.  (n, I, h, w)"""

    def __init__(self, n_in: int, n_out: int, kernel: int, *, down: bool = False, activate: bool = True):
        super().__init__()
        self.kernel, self.down, self.activate = kernel, down, activate
        self.weight = nn.Parameter(torch.randn(n_out, n_in, kernel, kernel))
        self.bias = nn.Parameter(torch.zeros(n_out)) if activate else None
        self.register_buffer("resample_filter", fir())

    def forward(self, x: Tensor) -> Tensor:
        weight = (self.weight / math.sqrt(self.weight[0].numel())).to(x.dtype)
        if self.down:
            # Padding as if the blur (4 taps) and the kernel were one centred filter.
            x = blur(x, self.resample_filter, padding=2 if self.kernel == 3 else 1)
            stride = 2
            if self.kernel == 1:
                x, stride = x[:, :, ::2, ::2], 1
            x = F.conv2d(x, weight, stride=stride)
        else:
            x = F.conv2d(x, weight, padding=self.kernel // 2)
        if self.activate:
            x = F.leaky_relu(x + self.bias.to(x.dtype)[:, None, None], 0.2) * SQRT2
        return x


class DownBlock(nn.Module):
    def __init__(self, n_in: int, n_out: int):
        super().__init__()
        self.conv0 = Conv(n_in, n_in, 3)
        self.conv1 = Conv(n_in, n_out, 3, down=True)
        self.skip = Conv(n_in, n_out, 1, down=True, activate=False)

    def forward(self, x: Tensor) -> Tensor:
        return (self.conv1(self.conv0(x)) + self.skip(x)) * math.sqrt(0.5)


def minibatch_std(x: Tensor, group: int = 4) -> Tensor:
    """Append one channel: the mean standard deviation within groups of ``group`` pictures."""
    n, _, h, w = x.shape
    group = math.gcd(group, n)
    spread = x.reshape(group, -1, *x.shape[1:]).float()
    spread = (spread.var(dim=0, unbiased=False) + 1e-8).sqrt().mean(dim=(1, 2, 3))
    return torch.cat([x, spread.to(x.dtype).repeat(group)[:, None, None, None].expand(n, 1, h, w)], dim=1)


class Discriminator(nn.Module):
    """image (n, img_channels, R, R) -> logit (n,), float32. ``channels``: {resolution: width}, 4..R."""

    def __init__(self, channels: Mapping[int, int], img_channels: int = 3):
        super().__init__()
        resolutions = sorted(channels, reverse=True)
        self.dtype = torch.float32
        self.from_rgb = Conv(img_channels, channels[resolutions[0]], 1)
        self.blocks = nn.Sequential(
            *(DownBlock(channels[r], channels[r // 2]) for r in resolutions[:-1]),
        )
        width = channels[4]
        self.last = Conv(width + 1, width, 3)
        self.hidden = Dense(width * 16, width)
        self.out = Dense(width, 1)

    def forward(self, image: Tensor) -> Tensor:
        x = self.from_rgb(image.to(self.dtype))
        x = self.last(minibatch_std(self.blocks(x))).float()
        x = F.leaky_relu(self.hidden(x.flatten(1)), 0.2) * SQRT2
        return self.out(x)[:, 0]
