"""StyleGAN2 as two torch modules, mapping and synthesis, used for training and for export alike.

The modulated convolution is written in its non-fused form (scale the input, convolve with constant
weights, scale the output): it equals the fused form, keeps the batch dynamic in ONNX and lets compilers
see constant weights. Parameter names follow the layout of stylegan2-ada-pytorch checkpoints
(``b8.conv0.affine.weight``), so that every converter has one target.

Karras et al., "Analyzing and Improving the Image Quality of StyleGAN", CVPR 2020.
"""

import math
from collections.abc import Mapping as Dict
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

LOWERINGS = ("convt", "poly")
SQRT2 = math.sqrt(2.0)


def second_moment(x: Tensor) -> Tensor:
    """x / sqrt(mean(x^2) + 1e-8) over the last dimension: the pixel norm of the latent."""
    return x / (x.square().mean(dim=-1, keepdim=True) + 1e-8).sqrt()


class Dense(nn.Module):
    """Linear layer with an equalised learning rate: ``y = x (gain/sqrt(n) W)^T + gain b``.

    weight (out, in), bias (out,); ``lr_multiplier`` is the gain.
    """

    def __init__(self, n_in: int, n_out: int, *, lr_multiplier: float = 1.0, bias_init: float = 0.0):
        super().__init__()
        self.lr_multiplier = lr_multiplier
        self.weight = nn.Parameter(torch.randn(n_out, n_in) / lr_multiplier)
        self.bias = nn.Parameter(torch.full((n_out,), bias_init / lr_multiplier))

    def scaled(self) -> tuple[Tensor, Tensor]:
        """The weight and bias that act: gains folded in."""
        gain = self.lr_multiplier / math.sqrt(self.weight.shape[1])
        return self.weight * gain, self.bias * self.lr_multiplier

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, *self.scaled())


class Mapping(nn.Module):
    """z (rows, z_dim), label index (rows,) -> w (rows, w_dim), before truncation.

    With ``c_dim`` classes the normalised embedding of the label, ``embedded`` wide, is appended to the normalised z.
    All layers but the last give ``hidden`` numbers. Both are w_dim unless given.
    """

    w_avg: Tensor

    def __init__(self, z_dim: int, w_dim: int, *, c_dim: int = 0, num_layers: int = 8, lr_multiplier: float = 0.01,
                 hidden: int | None = None, embedded: int | None = None):
        super().__init__()
        self.z_dim, self.w_dim, self.c_dim, self.num_layers = z_dim, w_dim, c_dim, num_layers
        embedded = (embedded or w_dim) if c_dim else 0
        if c_dim:
            self.embed = Dense(c_dim, embedded)
        widths = [z_dim + embedded, *[hidden or w_dim] * (num_layers - 1), w_dim]
        for i in range(num_layers):
            setattr(self, f"fc{i}", Dense(widths[i], widths[i + 1], lr_multiplier=lr_multiplier))
        self.register_buffer("w_avg", torch.zeros(w_dim))

    @property
    def layers(self) -> list[Dense]:
        return [getattr(self, f"fc{i}") for i in range(self.num_layers)]

    def embedding(self) -> Tensor | None:
        """The table of normalised class embeddings (c_dim, w_dim), or None without labels."""
        if not self.c_dim:
            return None
        return second_moment(self.embed.weight.T / math.sqrt(self.c_dim) + self.embed.bias)

    def forward(self, z: Tensor, label: Tensor | None = None) -> Tensor:
        x = second_moment(z)
        table = self.embedding()
        if table is not None:
            x = torch.cat([x, table[label]], dim=1)
        for layer in self.layers:
            x = F.leaky_relu(layer(x), 0.2) * SQRT2
        return x


def fir(taps: Sequence[float] = (1, 3, 3, 1)) -> Tensor:
    """The separable resampling filter as a (n, n) kernel that sums to one."""
    f = torch.tensor(taps, dtype=torch.float32)
    kernel = torch.outer(f, f)
    return kernel / kernel.sum()


def upsample_kernel(weight: Tensor, kernel: Tensor) -> Tensor:
    """Polyphase form of "transposed 3x3 convolution with stride 2, then 4x4 FIR with gain 4".

    weight (O, I, 3, 3), kernel (4, 4) -> (4 O, I, 3, 3) for one 3x3 convolution followed by a
    depth-to-space of 2; output channel o*4 + 2 p_y + p_x holds phase (p_y, p_x).
    """
    out, inp = weight.shape[:2]
    # The composite is a full correlation of the weight with the filter: 6x6 taps, g[m] at index m + 2.
    full = F.conv2d(weight.reshape(out * inp, 1, 3, 3), 4 * kernel.flip(0, 1)[None, None], padding=3)
    full = full.reshape(out, inp, 6, 6)
    # Phase p takes tap g[2 (1 - a) + p] on x[q - 1 + a], that is index 4 - 2a + p.
    index = torch.tensor([[4, 2, 0], [5, 3, 1]], device=weight.device)
    phases = full[:, :, index][:, :, :, :, index]  # (O, I, p_y, a_y, p_x, a_x)
    return phases.permute(0, 2, 4, 1, 3, 5).reshape(out * 4, inp, 3, 3)


class SynthesisLayer(nn.Module):
    """Modulated 3x3 convolution (optionally upsampling by 2), noise, bias, leaky ReLU.

    x (rows, I, h, w), style source w (rows, w_dim) -> (rows, O, r, r).
    """

    resample_filter: Tensor
    noise_const: Tensor

    def __init__(self, n_in: int, n_out: int, w_dim: int, resolution: int, *, up: bool, use_noise: bool = True):
        super().__init__()
        self.up, self.resolution, self.use_noise = up, resolution, use_noise
        self.lowering = "convt"
        self.conv_clamp: float | None = None
        self.gain = 1.0
        self.affine = Dense(w_dim, n_in, bias_init=1.0)
        self.weight = nn.Parameter(torch.randn(n_out, n_in, 3, 3))
        self.bias = nn.Parameter(torch.zeros(n_out))
        self.register_buffer("resample_filter", fir())
        if use_noise:
            self.noise_strength = nn.Parameter(torch.zeros([]))
            self.register_buffer("noise_const", torch.randn(resolution, resolution))

    def convolve(self, x: Tensor, weight: Tensor) -> Tensor:
        if not self.up:
            return F.conv2d(x, weight.to(x.dtype), padding=1)
        if self.lowering == "poly":
            kernel = upsample_kernel(weight, self.resample_filter)
            return F.pixel_shuffle(F.conv2d(x, kernel.to(x.dtype), padding=1), 2)
        y = F.conv_transpose2d(x, weight.to(x.dtype).transpose(0, 1), stride=2)
        return blur(y, 4 * self.resample_filter, padding=1)

    def forward(self, x: Tensor, w: Tensor, noise: Tensor | None = None) -> Tensor:
        """``noise``: (rows or 1, 1, r, r), already drawn; None leaves it out."""
        weight, styles = self.weight, self.affine(w)
        # Largest weight and style become one: nothing can overflow in float16, and the factors cancel in
        # the demodulation. 1e-8 is added after the rescaling, as the reference does for float16.
        if x.dtype == torch.float16:
            fan_in = weight[0].numel()
            peak = weight.abs().amax(dim=(1, 2, 3), keepdim=True)
            weight = weight / (math.sqrt(fan_in) * peak)
            styles = styles / styles.abs().amax(dim=1, keepdim=True)
        energy = weight.square().sum(dim=(2, 3))
        demodulation = (styles.square() @ energy.T + 1e-8).rsqrt()
        x = x * styles.to(x.dtype)[:, :, None, None]
        # Leaky ReLU is homogeneous: its gain moves into the three terms before it and costs no pass over x.
        gain = SQRT2 * self.gain
        x = self.convolve(x, weight) * (demodulation * gain).to(x.dtype)[:, :, None, None]
        if noise is not None:
            x = x + (noise * (self.noise_strength * gain)).to(x.dtype)
        x = F.leaky_relu(x + (self.bias * gain).to(x.dtype)[:, None, None], 0.2)
        if self.conv_clamp is not None:
            limit = self.conv_clamp * self.gain
            x = x.clamp(-limit, limit)
        return x


def blur(x: Tensor, kernel: Tensor, padding: int) -> Tensor:
    """Depthwise filter with a symmetric kernel (n, n)."""
    weight = kernel.to(x.dtype)[None, None].repeat(x.shape[1], 1, 1, 1)
    return F.conv2d(x, weight, padding=padding, groups=x.shape[1])


def upsample_image(x: Tensor, kernel: Tensor) -> Tensor:
    """Upsampling by 2 with the 4x4 filter (gain 4): a depthwise transposed convolution, padding 1."""
    weight = (4 * kernel).to(x.dtype)[None, None].repeat(x.shape[1], 1, 1, 1)
    return F.conv_transpose2d(x, weight, stride=2, padding=1, groups=x.shape[1])


class ToRGB(nn.Module):
    """Modulated 1x1 convolution without demodulation: (rows, I, r, r) -> (rows, channels, r, r)."""

    def __init__(self, n_in: int, n_out: int, w_dim: int):
        super().__init__()
        self.conv_clamp: float | None = None
        self.affine = Dense(w_dim, n_in, bias_init=1.0)
        self.weight = nn.Parameter(torch.randn(n_out, n_in, 1, 1))
        self.bias = nn.Parameter(torch.zeros(n_out))

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        # 1/sqrt(I) goes into the style, not into the weight: |x| <= 256 times a style of a hundred overflows float16.
        weight, bias = (t / math.sqrt(self.weight.shape[1]) for t in self.affine.scaled())
        styles = F.linear(w, weight, bias)
        x = F.conv2d(x * styles.to(x.dtype)[:, :, None, None], self.weight.to(x.dtype))
        x = x + self.bias.to(x.dtype)[:, None, None]
        return x if self.conv_clamp is None else x.clamp(-self.conv_clamp, self.conv_clamp)


class Skip(nn.Module):
    """The residual branch of the ``resnet`` architecture: 1x1 convolution, then upsampling by 2."""

    resample_filter: Tensor

    def __init__(self, n_in: int, n_out: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(n_out, n_in, 1, 1))
        self.register_buffer("resample_filter", fir())

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight / math.sqrt(self.weight.shape[1])
        return upsample_image(F.conv2d(x, weight.to(x.dtype)), self.resample_filter) * math.sqrt(0.5)


class Block(nn.Module):
    """One resolution: conv0 (up), conv1, and the picture's layer where the architecture has one."""

    resample_filter: Tensor

    def __init__(self, n_in: int, n_out: int, w_dim: int, resolution: int, img_channels: int, *, architecture: str,
                 is_last: bool, use_noise: bool):
        super().__init__()
        self.resolution, self.architecture = resolution, architecture
        self.dtype = torch.float32
        self.register_buffer("resample_filter", fir())
        if n_in == 0:
            self.const = nn.Parameter(torch.randn(n_out, resolution, resolution))
        else:
            self.conv0 = SynthesisLayer(n_in, n_out, w_dim, resolution, up=True, use_noise=use_noise)
            if architecture == "resnet":
                self.skip = Skip(n_in, n_out)
        self.conv1 = SynthesisLayer(n_out, n_out, w_dim, resolution, up=False, use_noise=use_noise)
        if architecture == "resnet" and n_in:
            self.conv1.gain = math.sqrt(0.5)
        if is_last or architecture == "skip":
            self.torgb = ToRGB(n_out, img_channels, w_dim)

    @property
    def layers(self) -> list[SynthesisLayer]:
        return [self.conv1] if hasattr(self, "const") else [self.conv0, self.conv1]

    def forward(self, x: Tensor | None, image: Tensor | None, ws: list[Tensor], noises: list[Tensor | None]):
        """``ws``: one (rows, w_dim) per layer, the picture's last. Returns (x, image), image in float32."""
        if x is None:
            # Broadcast by the style: the batch stays dynamic without an Expand.
            y = self.conv1(self.const[None].to(self.dtype), ws[0], noises[0])
        else:
            x = x.to(self.dtype)
            y = self.conv1(self.conv0(x, ws[0], noises[0]), ws[1], noises[1])
            if self.architecture == "resnet":
                y = self.skip(x) + y
        if image is not None:
            image = upsample_image(image, self.resample_filter)
        if hasattr(self, "torgb"):
            rgb = self.torgb(y, ws[-1]).to(torch.float32)
            image = rgb if image is None else image + rgb
        return y, image


class Synthesis(nn.Module):
    """ws (rows, num_ws, w_dim) -> image (rows, img_channels, R, R), roughly in [-1, 1], not clamped.

    channels        {resolution: width} for 4, 8, ..., R
    architecture    'skip' (pictures summed over resolutions), 'resnet' or 'orig'
    conv_clamp      None, or the bound on activations that float16 needs
    """

    def __init__(self, w_dim: int, channels: Dict[int, int], *, img_channels: int = 3, architecture: str = "skip",
                 use_noise: bool = True, conv_clamp: float | None = None):
        super().__init__()
        if architecture not in ("skip", "resnet", "orig"):
            raise ValueError(f"unknown architecture {architecture!r}: expected skip, resnet or orig")
        self.w_dim, self.architecture, self.img_channels = w_dim, architecture, img_channels
        self.resolutions = sorted(channels)
        self.resolution = self.resolutions[-1]
        previous = 0
        for r in self.resolutions:
            block = Block(previous, channels[r], w_dim, r, img_channels, architecture=architecture,
                          is_last=r == self.resolution, use_noise=use_noise)
            setattr(self, f"b{r}", block)
            previous = channels[r]
        self.num_ws = 2 * len(self.resolutions)
        self.set_conv_clamp(conv_clamp)

    @property
    def blocks(self) -> list[Block]:
        return [self.get_submodule(f"b{r}") for r in self.resolutions]  # type: ignore[misc]

    @property
    def layers(self) -> list[SynthesisLayer]:
        return [layer for block in self.blocks for layer in block.layers]

    def set_conv_clamp(self, limit: float | None) -> None:
        for module in self.modules():
            if isinstance(module, (SynthesisLayer, ToRGB)):
                module.conv_clamp = limit

    def set_lowering(self, lowering: str) -> None:
        """'convt' (fewest multiply-adds) or 'poly' (no transposed convolution, the one form for bfloat16)."""
        if lowering not in LOWERINGS:
            raise ValueError(f"unknown lowering {lowering!r}: expected one of {', '.join(LOWERINGS)}")
        for layer in self.layers:
            layer.lowering = lowering

    def set_precision(self, dtype: torch.dtype) -> None:
        """Run the blocks from 8x8 upwards in ``dtype``; styles, demodulation and pictures stay float32."""
        for block in self.blocks[1:]:
            block.dtype = dtype

    def const_noises(self) -> list[Tensor | None]:
        return [layer.noise_const[None, None] if layer.use_noise else None for layer in self.layers]

    def random_noises(self, rows: int, generator: torch.Generator | None = None) -> list[Tensor | None]:
        device = self.blocks[0].const.device
        return [
            torch.randn(rows, 1, layer.resolution, layer.resolution, generator=generator, device=device)
            if layer.use_noise
            else None
            for layer in self.layers
        ]

    def forward(self, ws: Tensor, noises: list[Tensor | None] | None = None) -> Tensor:
        """``noises``: one entry per layer; None stands for the stored constant noises."""
        noises = self.const_noises() if noises is None else noises
        x, image, layer = None, None, 0
        for block in self.blocks:
            n = len(block.layers)
            # The picture's layer shares its style with the first layer of the next block.
            styles = [ws[:, layer + j] for j in range(n + 1)]
            x, image = block(x, image, styles, noises[layer : layer + n])
            layer += n
        assert image is not None  # the last block of every architecture draws a picture
        return image


class Generator(nn.Module):
    """mapping + synthesis, for training and for recording golden answers."""

    def __init__(self, mapping: Mapping, synthesis: Synthesis):
        super().__init__()
        self.mapping, self.synthesis = mapping, synthesis

    def truncate(self, w: Tensor, psi: Tensor | float) -> Tensor:
        """w_avg + psi (w - w_avg);  psi a number or (rows, 1)."""
        average = self.mapping.w_avg
        return average + psi * (w - average)

    def forward(self, z: Tensor, label: Tensor | None = None, *, psi: float = 1.0) -> Tensor:
        w = self.truncate(self.mapping(z, label), psi)
        return self.synthesis(w[:, None].expand(-1, self.synthesis.num_ws, -1))


def channel_widths(resolution: int, base: int = 32768, limit: int = 512) -> dict[int, int]:
    """NVIDIA's rule min(base // r, limit); base 32768 is config-f."""
    return {2**k: min(base // 2**k, limit) for k in range(2, int(np.log2(resolution)) + 1)}
