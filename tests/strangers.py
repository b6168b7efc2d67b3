"""Generators as others write them, with random weights: their classes know nothing of this project."""

import itertools

import torch
from torch import nn
from torch.nn import functional as F


class DCGAN(nn.Module):
    """The generator of PyTorch's example: z (n, nz, 1, 1) -> [-1, 1]."""

    def __init__(self, nz: int = 20, ngf: int = 4, nc: int = 3):
        super().__init__()
        layers: list[nn.Module] = []
        sizes = [nz, ngf * 4, ngf * 2, ngf]
        for i, (width, more) in enumerate(itertools.pairwise(sizes)):
            layers += [nn.ConvTranspose2d(width, more, 4, 2 if i else 1, 1 if i else 0, bias=False),
                       nn.BatchNorm2d(more), nn.ReLU(True)]
        self.main = nn.Sequential(*layers, nn.ConvTranspose2d(ngf, nc, 4, 2, 1, bias=False), nn.Tanh())

    def forward(self, z):
        return self.main(z)


class ConditionalNorm(nn.Module):
    """Batch norm whose gain and bias come from a vector."""

    def __init__(self, channels: int, width: int):
        super().__init__()
        self.norm = nn.BatchNorm2d(channels, affine=False)
        self.gain, self.bias = nn.Linear(width, channels, bias=False), nn.Linear(width, channels, bias=False)

    def forward(self, x, y):
        gain, bias = (layer(y).view(y.size(0), -1, 1, 1) for layer in (self.gain, self.bias))
        return self.norm(x) * (1 + gain) + bias


class Block(nn.Module):
    def __init__(self, n_in: int, n_out: int, width: int):
        super().__init__()
        self.first, self.second = ConditionalNorm(n_in, width), ConditionalNorm(n_out, width)
        self.conv1, self.conv2 = nn.Conv2d(n_in, n_out, 3, padding=1), nn.Conv2d(n_out, n_out, 3, padding=1)
        self.skip = nn.Conv2d(n_in, n_out, 1)

    def forward(self, x, y):
        hidden = self.conv1(F.interpolate(F.relu(self.first(x, y)), scale_factor=2))
        return self.conv2(F.relu(self.second(hidden, y))) + self.skip(F.interpolate(x, scale_factor=2))


class Attention(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.query, self.key = nn.Conv2d(channels, 2, 1), nn.Conv2d(channels, 2, 1)
        self.value, self.out = nn.Conv2d(channels, 4, 1), nn.Conv2d(4, channels, 1)
        self.gamma = nn.Parameter(torch.tensor(0.5))

    def forward(self, x):
        n, _, height, width = x.shape
        query = self.query(x).view(n, -1, height * width)
        key = F.max_pool2d(self.key(x), 2).view(n, -1, height * width // 4)
        value = F.max_pool2d(self.value(x), 2).view(n, -1, height * width // 4)
        weights = F.softmax(torch.bmm(query.transpose(1, 2), key), dim=-1)
        mixed = torch.bmm(value, weights.transpose(1, 2)).view(n, -1, height, width)
        return self.gamma * self.out(mixed) + x


class BigGAN(nn.Module):
    """z is split over the blocks, each with the class's shared embedding; an attention in between; [-1, 1]."""

    def __init__(self, classes: int = 5, *, one_hot: bool = False):
        super().__init__()
        self.one_hot = one_hot
        self.shared = nn.Linear(classes, 4, bias=False) if one_hot else nn.Embedding(classes, 4)
        self.linear = nn.Linear(6, 8 * 4 * 4)
        self.blocks = nn.ModuleList([Block(8, 8, 10), Block(8, 6, 10)])
        self.attention = Attention(8)
        self.norm, self.rgb = nn.BatchNorm2d(6), nn.Conv2d(6, 3, 3, padding=1)

    def forward(self, z, label):
        y, parts = self.shared(label), torch.split(z, 6, dim=1)
        x = self.linear(parts[0]).view(-1, 8, 4, 4)
        for i, block in enumerate(self.blocks):
            x = block(x, torch.cat([parts[i + 1], y], dim=1))
            x = x if i else self.attention(x)
        return torch.tanh(self.rgb(F.relu(self.norm(x))))


class Decoder(nn.Module):
    """Of a VAE: z (n, d) -> grey pictures in [0, 1], 28 pixels a side as MNIST's."""

    def __init__(self, d: int = 8):
        super().__init__()
        self.dense = nn.Sequential(nn.Linear(d, 32), nn.ELU(), nn.Linear(32, 8 * 7 * 7), nn.LeakyReLU(0.2))
        self.net = nn.Sequential(nn.ConvTranspose2d(8, 6, 4, 2, 1), nn.GroupNorm(2, 6), nn.SiLU(),
                                 nn.Upsample(scale_factor=2, mode="bilinear"), nn.Conv2d(6, 1, 3, padding=1))

    def forward(self, z):
        return torch.sigmoid(self.net(self.dense(z).reshape(z.shape[0], 8, 7, 7)))


class Learned(nn.Module):
    """Starts from a learned constant that it repeats for each row, as StyleGAN does; values are 0 to 255, channels
    last."""

    def __init__(self, d: int = 6):
        super().__init__()
        self.const = nn.Parameter(torch.randn(1, 4, 4, 4))
        self.style, self.conv = nn.Linear(d, 4), nn.Conv2d(4, 3, 3, padding=1)

    def forward(self, z):
        x = self.conv(self.const.repeat(z.shape[0], 1, 1, 1) * self.style(z)[:, :, None, None])
        return (torch.tanh(x).permute(0, 2, 3, 1) + 1) * 127.5


def made(kind: type[nn.Module], *arguments, seed: int = 0, **settings) -> nn.Module:
    """In evaluation mode, with statistics as after training."""
    torch.manual_seed(seed)
    module = kind(*arguments, **settings).eval().requires_grad_(False)
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_(0, 0.2)
            layer.running_var.uniform_(0.3, 1.0)
    return module
