"""StyleGAN3 (T and R) synthesis as torch modules, written for export.

Everything a layer needs (taps, padding, factors, sizes, clamp) is stated by a ``Plan``, read from a file or
made by ``design``. The modulated convolution is non-fused (scale the input, convolve with constant weights,
scale the output), so that the batch stays dynamic. Parameter names follow the layout of stylegan3
checkpoints (``L3_52_512.affine.weight``).

Karras et al., "Alias-Free Generative Adversarial Networks", NeurIPS 2021.
"""

import math
from dataclasses import replace
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engine.errors import CheckpointError
from exporter.generators import Facts, Parts
from exporter.generators.nvidia import child, children, named_arrays
from exporter.generators.resampling import Edges, downsample, extend, split_padding, unused_inputs, upsample
from exporter.generators.state import build_mapping, named_list
from exporter.generators.stylegan2 import LOWERINGS, SQRT2, Dense, Mapping, second_moment
from exporter.generators.stylegan3_design import InputSpec, LayerSpec, Plan, design
from exporter.passive import Module

__all__ = ["FilteredLayer", "FourierInput", "InputSpec", "LayerSpec", "Plan", "Synthesis3", "design", "from_nvidia"]

M = TypeVar("M", bound=nn.Module)
MAX_SIZE, MAX_FACTOR = 16384, 16


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


# Reading a checkpoint. ``record`` is the passive form of a pickled module. Channels come from the shapes of the
# tensors, which the unpickler has checked against the bytes; every other number is checked here before it is used.


def from_nvidia(record: Module) -> Parts:
    """The generator of a StyleGAN3 pickle."""
    mapping = read_mapping(child(record, "mapping"))
    synthesis = read_synthesis(child(record, "synthesis"))
    if mapping.w_dim != synthesis.w_dim:
        raise CheckpointError("mapping and synthesis of this file disagree on w_dim: the file is damaged")
    layers = [child(child(record, "synthesis"), name) for name in synthesis.layer_names]
    low = [_number(layer, "out_sampling_rate") for layer in layers if layer.state.get("use_fp16")]
    radial = any(f is not None and f.ndim == 2 for f in (spec.down_filter for spec in synthesis.plan.layers))
    facts = Facts(
        name=f"stylegan3-{synthesis.resolution}",
        architecture="stylegan3-r" if radial else "stylegan3-t",
        z_dim=mapping.z_dim,
        w_dim=mapping.w_dim,
        c_dim=mapping.c_dim,
        num_ws=synthesis.num_ws,
        resolution=synthesis.resolution,
        img_channels=synthesis.img_channels,
        source="nvidia",
        num_fp16_res=1 + round(math.log2(synthesis.resolution / min(low))) if low else 0,
        conv_clamp=synthesis.layers[0].conv_clamp,
    )
    return Parts(mapping, synthesis, facts)


def read_mapping(record: Module) -> Mapping:
    # The learning-rate multiplier is stored as the gain of the bias.
    multiplier = _number(child(record, "fc0"), "bias_gain")
    return _load(build_mapping(named_arrays(record, "mapping."), multiplier), record)


def read_synthesis(record: Module) -> Synthesis3:
    names = [name for name in children(record) if name != "input"]
    layers = [_read_layer(name, child(record, name)) for name in names]
    rates = [_number(child(record, name), "out_sampling_rate") for name in names]
    if not layers or not layers[-1].is_torgb or any(layer.is_torgb for layer in layers[:-1]):
        raise CheckpointError(f"expected layers that end with one that makes the picture; the file has: {names}")
    if not any(layer.use_fp16 for layer in layers):
        # Trained in float32 throughout: the rule that the reference applies to its top four octaves.
        layers = [replace(spec, use_fp16=16 * rate > rates[-1]) for spec, rate in zip(layers, rates, strict=True)]
    source = child(record, "input")
    first = InputSpec(
        channels=_weight(source, 2).shape[0],
        size=_square(source, "size"),
        sampling_rate=_number(source, "sampling_rate"),
        bandwidth=_number(source, "bandwidth"),
    )
    sizes = [first.size] + [spec.out_size for spec in layers]
    for spec, size in zip(layers, sizes, strict=False):
        if spec.in_size != size or set(filtered_sizes(spec)) != {spec.out_size}:
            raise CheckpointError(f"layer {spec.name}: sizes, padding and filters do not fit: the file is damaged")
    w_dim = _weight(child(source, "affine"), 2).shape[1]
    return _load(Synthesis3(Plan(w_dim, first, tuple(layers), _number(record, "output_scale"))), record)


def filtered_sizes(spec: LayerSpec) -> tuple[int, int]:
    """The width and height that a layer's padding, filters and factors lead to."""
    taps = sum(0 if f is None else f.shape[0] - 1 for f in (spec.up_filter, spec.down_filter))
    inserted = (spec.in_size + spec.kernel - 1) * spec.up - taps
    left, right, top, bottom = spec.padding
    return -(-(inserted + left + right) // spec.down), -(-(inserted + top + bottom) // spec.down)


def _read_layer(name: str, record: Module) -> LayerSpec:
    n_out, n_in, kernel, _ = _weight(record, 4).shape
    clamp, padding = record.state.get("conv_clamp"), record.state.get("padding")
    if not isinstance(padding, (list, tuple)) or len(padding) != 4 or not all(isinstance(p, int) for p in padding):
        raise CheckpointError(f"layer {name} has the padding {padding!r:.60}; expected four integers")
    arrays = named_arrays(record)
    spec = LayerSpec(
        name=name,
        n_in=n_in,
        n_out=n_out,
        in_size=_square(record, "in_size"),
        out_size=_square(record, "out_size"),
        kernel=kernel,
        up=int(_number(record, "up_factor")),
        down=int(_number(record, "down_factor")),
        padding=(padding[0], padding[1], padding[2], padding[3]),
        up_filter=arrays.get("up_filter"),
        down_filter=arrays.get("down_filter"),
        is_torgb=bool(record.state.get("is_torgb")),
        use_fp16=bool(record.state.get("use_fp16")),
        conv_clamp=None if clamp is None else _number(record, "conv_clamp"),
    )
    _check_filters(spec)
    return spec


def _check_filters(spec: LayerSpec) -> None:
    filters = spec.up_filter is not None or spec.down_filter is not None
    if spec.is_torgb and (filters or (spec.up, spec.down) != (1, 1)):
        raise CheckpointError(f"layer {spec.name} makes the picture and resamples; expected a plain convolution")
    if spec.up_filter is not None and spec.up_filter.ndim != 1:
        raise CheckpointError(f"layer {spec.name} has a {spec.up_filter.ndim}-D up filter; expected a separable one")
    down = spec.down_filter
    if down is not None and (down.ndim not in (1, 2) or len(set(down.shape)) != 1):
        raise CheckpointError(f"layer {spec.name} has a down filter of shape {down.shape}; expected (n,) or (n, n)")
    if max(spec.up, spec.down) > MAX_FACTOR:
        raise CheckpointError(f"layer {spec.name} resamples by {spec.up} and {spec.down}; at most {MAX_FACTOR} is sane")


def _number(record: Module, name: str) -> float:
    """A positive attribute, whether a Python or a numpy number."""
    value = record.state.get(name)
    if not isinstance(value, (int, float, np.number)) or not 0 < value < math.inf:
        raise CheckpointError(f"{record.class_name!r:.60} states {name} = {value!r:.60}; expected a positive number")
    return float(value)


def _square(record: Module, name: str) -> int:
    """The side of a square size, stated as one integer or two equal ones."""
    sides = np.unique(np.asarray(record.state.get(name, ())))
    if sides.size != 1 or sides.dtype.kind not in "iu" or not 0 < sides[0] <= MAX_SIZE:
        raise CheckpointError(f"{name} of {record.class_name!r:.60} is {sides}; expected the side of a square")
    return int(sides[0])


def _weight(record: Module, rank: int) -> np.ndarray:
    weight = named_arrays(record).get("weight")
    if weight is None or weight.ndim != rank:
        raise CheckpointError(
            f"{record.class_name!r:.60} has no weight of {rank} dimensions: expected a StyleGAN3 layer"
        )
    return weight


def _load(module: M, record: Module) -> M:
    arrays = named_arrays(record)
    broken = [name for name, array in arrays.items() if not np.isfinite(array).all()]
    if broken:
        raise CheckpointError(f"{record.class_name!r:.60} holds NaN or infinite numbers in {named_list(broken)}")
    try:
        module.load_state_dict({name: torch.from_numpy(np.array(a, dtype=np.float32)) for name, a in arrays.items()})
    except RuntimeError as error:
        raise CheckpointError(f"the tensors of {record.class_name!r:.60} do not form a StyleGAN3: {error}") from None
    return module.eval().requires_grad_(False)
