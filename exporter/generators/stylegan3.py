"""StyleGAN3 (T and R) synthesis as torch modules, written for export.

Everything a layer needs (taps, padding, factors, sizes, clamp) is stated by a ``Plan``, read from a file or
made by ``design``. The modulated convolution is non-fused (scale the input, convolve with constant weights,
scale the output), so that the batch stays dynamic. Parameter names follow the layout of stylegan3
checkpoints (``L3_52_512.affine.weight``).

Karras et al., "Alias-Free Generative Adversarial Networks", NeurIPS 2021.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from exporter.generators.resampling import Edges, downsample, extend, split_padding, unused_inputs, upsample
from exporter.generators.stylegan2 import LOWERINGS, SQRT2, Dense, second_moment
from exporter.generators.stylegan3_design import InputSpec, LayerSpec, Plan, design

__all__ = ["FilteredLayer", "FourierInput", "InputSpec", "LayerSpec", "Plan", "Synthesis3", "design"]


class FourierInput(nn.Module):
    """w (rows, w_dim) -> rotated and translated Fourier features (rows, channels, size, size), float32.

    ``transform`` (3, 3) is the user's: it maps picture coordinates (centre 0, edges -0.5 and 0.5) to the
    coordinates where the network is evaluated. A last column of (-k / R, 0, 1) moves the picture k pixels right.
    """

    freqs: Tensor
    phases: Tensor
    transform: Tensor

    def __init__(self, spec: InputSpec, w_dim: int):
        super().__init__()
        self.spec = spec
        self.affine = Dense(w_dim, 4)
        with torch.no_grad():
            self.affine.weight.zero_()
            self.affine.bias.copy_(torch.tensor([1.0, 0.0, 0.0, 0.0]))
        self.weight = nn.Parameter(torch.randn(spec.channels, spec.channels))
        # Uniform in the disc of the bandwidth, by the normal sample's own radius: 1 - exp(-r^2 / 2) is uniform.
        direction = torch.randn(spec.channels, 2)
        radius = direction.norm(dim=1, keepdim=True)
        freqs = direction / radius * (1 - torch.exp(-radius.square() / 2)).sqrt() * spec.bandwidth
        self.register_buffer("transform", torch.eye(3))
        self.register_buffer("freqs", freqs)
        self.register_buffer("phases", torch.rand(spec.channels) - 0.5)

    def waves(self, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Frequencies along x and y, and phases, each (rows, channels), after all transforms."""
        t = self.affine(w)
        t = t / t[:, :2].square().sum(dim=1, keepdim=True).sqrt()
        cos, sin, dx, dy = t[:, 0:1], t[:, 1:2], t[:, 2:3], t[:, 3:4]
        fx, fy = self.freqs[:, 0], self.freqs[:, 1]
        # f (R T) U for row vectors f, with T the translation by (-dx, -dy) and U the user's transform.
        a, b = fx * cos + fy * sin, fy * cos - fx * sin
        shift = -(a * dx + b * dy)
        u = self.transform
        x, y, phase = (a * u[0, j] + b * u[1, j] + shift * u[2, j] for j in range(3))
        return x, y, phase + self.phases

    def forward(self, w: Tensor) -> Tensor:
        spec = self.spec
        fx, fy, phase = self.waves(w)
        # Waves that a transform pushes beyond the bandwidth fade out before they alias.
        norm = (fx.square() + fy.square()).sqrt()
        amplitude = (1 - (norm - spec.bandwidth) / (spec.sampling_rate / 2 - spec.bandwidth)).clamp(0, 1)
        grid = torch.arange(spec.size, dtype=torch.float32, device=w.device)
        grid = (grid + (0.5 - spec.size / 2)) / spec.sampling_rate
        angle = fx[:, :, None, None] * grid + (fy[:, :, None, None] * grid[:, None] + phase[:, :, None, None])
        x = (angle * (2 * math.pi)).sin() * amplitude[:, :, None, None]
        return F.conv2d(x, (self.weight / math.sqrt(spec.channels))[:, :, None, None])


class FilteredLayer(nn.Module):
    """x (rows, n_in, in_size, in_size), w (rows, w_dim) -> (rows, n_out, out_size, out_size)."""

    magnitude_ema: Tensor
    up_filter: Tensor | None
    down_filter: Tensor | None

    def __init__(self, spec: LayerSpec, w_dim: int):
        super().__init__()
        self.spec = spec
        self.conv_clamp = spec.conv_clamp
        self.lowering = "convt"
        self.dtype = torch.float32
        self.affine = Dense(w_dim, spec.n_in, bias_init=1.0)
        self.weight = nn.Parameter(torch.randn(spec.n_out, spec.n_in, spec.kernel, spec.kernel))
        self.bias = nn.Parameter(torch.zeros(spec.n_out))
        self.register_buffer("magnitude_ema", torch.ones([]))
        self.register_buffer("up_filter", None if spec.up_filter is None else torch.tensor(spec.up_filter))
        self.register_buffer("down_filter", None if spec.down_filter is None else torch.tensor(spec.down_filter))

    def modulation(self, w: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Styles (rows, n_in), weight (n_out, n_in, k, k), factors of the outputs (rows, n_out); float32."""
        weight, styles = self.weight, self.affine(w)
        gain = self.magnitude_ema.rsqrt()
        fan_in = weight[0].numel()
        if self.spec.is_torgb:
            return styles * (gain / math.sqrt(fan_in)), weight, None
        # The reference divides the styles by their RMS over the whole batch; per sample makes rows independent,
        # and either cancels in the demodulation.
        styles = second_moment(styles)
        weight = weight * (weight.square().mean(dim=(1, 2, 3), keepdim=True) + 1e-8).rsqrt()
        factor = gain * (styles.square() @ weight.square().sum(dim=(2, 3)).T + 1e-8).rsqrt()
        if self.dtype == torch.float16:
            # Largest style one, largest weight 1/sqrt(fan_in): |x| < 256 cannot overflow the sum.
            style_peak = styles.abs().amax(dim=1, keepdim=True)
            weight_peak = weight.abs().amax(dim=(1, 2, 3), keepdim=True) * math.sqrt(fan_in)
            styles, weight = styles / style_peak, weight / weight_peak
            factor = factor * style_peak * weight_peak[:, 0, 0, 0]
        return styles, weight, factor

    def convolve(self, x: Tensor, w: Tensor, edges: Edges) -> Tensor:
        styles, weight, factor = self.modulation(w)
        padding, rest = split_padding(edges)
        x = extend(x, rest) * styles.to(x.dtype)[:, :, None, None]
        x = F.conv2d(x, weight.to(x.dtype), padding=padding)
        if factor is not None:
            x = x * factor.to(x.dtype)[:, :, None, None]
        return x + self.bias.to(x.dtype)[:, None, None]

    def clamp(self, x: Tensor) -> Tensor:
        return x if self.conv_clamp is None else x.clamp(-self.conv_clamp, self.conv_clamp)

    def activate(self, x: Tensor, padding: Edges) -> Tensor:
        """Up-sample, leaky ReLU, clamp, down-sample: the nonlinearity at a rate where it does not alias."""
        up = self.spec.up
        taps = torch.ones(1, device=x.device) if self.up_filter is None else self.up_filter
        left, right, top, bottom = padding
        # The gain of leaky ReLU is homogeneous: it moves into the filter.
        x = upsample(x, taps * (up * SQRT2), up, 2, low=top, high=bottom, lowering=self.lowering)
        x = upsample(x, taps * up, up, 3, low=left, high=right, lowering=self.lowering)
        return downsample(self.clamp(F.leaky_relu(x, 0.2)), self.down_filter, self.spec.down)

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        spec, x = self.spec, x.to(self.dtype)
        margin = spec.kernel - 1
        if spec.is_torgb:
            x = self.convolve(x, w, (margin, margin, margin, margin))
            return self.clamp(extend(x, spec.padding))
        # Where the padding is negative, whole samples of the convolution are never used: do not compute them.
        unused = unused_inputs(spec.padding, spec.up)
        left, right, top, bottom = (margin - n for n in unused)
        x = self.convolve(x, w, (left, right, top, bottom))
        left, right, top, bottom = (p + n * spec.up for p, n in zip(spec.padding, unused, strict=True))
        return self.activate(x, (left, right, top, bottom))


class Synthesis3(nn.Module):
    """ws (rows, num_ws, w_dim) -> image (rows, img_channels, R, R) float32, roughly in [-1, 1], not clamped."""

    def __init__(self, plan: Plan):
        super().__init__()
        self.plan, self.w_dim, self.layer_names = plan, plan.w_dim, plan.layer_names
        self.num_ws = len(plan.layers) + 1
        self.resolution, self.img_channels = plan.layers[-1].out_size, plan.layers[-1].n_out
        self.output_scale = plan.output_scale
        self.input = FourierInput(plan.input, plan.w_dim)
        for spec in plan.layers:
            setattr(self, spec.name, FilteredLayer(spec, plan.w_dim))

    @property
    def layers(self) -> list[FilteredLayer]:
        return [getattr(self, name) for name in self.layer_names]

    def set_conv_clamp(self, limit: float | None) -> None:
        for layer in self.layers:
            layer.conv_clamp = limit

    def set_lowering(self, lowering: str) -> None:
        """'convt' (transposed depthwise convolutions) or 'poly' (ordinary ones, the one form for bfloat16)."""
        if lowering not in LOWERINGS:
            raise ValueError(f"unknown lowering {lowering!r}: expected one of {', '.join(LOWERINGS)}")
        for layer in self.layers:
            layer.lowering = lowering

    def set_precision(self, dtype: torch.dtype) -> None:
        """Run the layers marked ``use_fp16`` in ``dtype``; input, styles and demodulation stay float32."""
        for layer in self.layers:
            layer.dtype = dtype if layer.spec.use_fp16 else torch.float32

    @torch.no_grad()
    def calibrate(self, ws: Tensor) -> None:
        """Set every ``magnitude_ema`` to the mean square of its layer's input, as training does over time."""
        x = self.input(ws[:, 0])
        for i, layer in enumerate(self.layers):
            layer.magnitude_ema.copy_(x.to(torch.float32).square().mean())
            x = layer(x, ws[:, i + 1])

    def forward(self, ws: Tensor) -> Tensor:
        x = self.input(ws[:, 0])
        for i, layer in enumerate(self.layers):
            x = layer(x, ws[:, i + 1])
        return x.to(torch.float32) * self.output_scale
