"""StyleGAN3 as data: what a network is (``Plan``) and the paper's rules that make a fresh one (``design``).

A checkpoint states every size, padding and filter tap; the rules here serve networks that do not come from
a file. Filters are designed with numpy alone.

Karras et al., "Alias-Free Generative Adversarial Networks", NeurIPS 2021, section 3 and appendix C.
"""

import math
from dataclasses import dataclass

import numpy as np

LAYERS, CRITICAL = 14, 2
FIRST_CUTOFF, FIRST_STOPBAND, LAST_STOPBAND_REL = 2.0, 2**2.1, 2**0.3
MARGIN, FILTER_SIZE, LRELU_UPSAMPLING = 10, 6, 2


@dataclass(frozen=True, slots=True)
class InputSpec:
    """Fourier features: ``channels`` waves below ``bandwidth`` on a square grid of ``size`` points."""

    channels: int
    size: int
    sampling_rate: float
    bandwidth: float


@dataclass(frozen=True, slots=True, eq=False)
class LayerSpec:
    """One layer: modulated convolution and filtered leaky ReLU, on square pictures.

    padding       (left, right, top, bottom) around the zero-inserted signal; negative crops
    up_filter     (taps,) or None;  down_filter (taps,), (taps, taps) when radial, or None; both sum to one
    use_fp16      whether ``set_precision`` may change the type of this layer
    """

    name: str
    n_in: int
    n_out: int
    in_size: int
    out_size: int
    kernel: int
    up: int
    down: int
    padding: tuple[int, int, int, int]
    up_filter: np.ndarray | None
    down_filter: np.ndarray | None
    is_torgb: bool = False
    use_fp16: bool = False
    conv_clamp: float | None = 256.0


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """A whole synthesis network without its weights; the last layer makes the picture."""

    w_dim: int
    input: InputSpec
    layers: tuple[LayerSpec, ...]
    output_scale: float = 0.25

    @property
    def layer_names(self) -> list[str]:
        return [layer.name for layer in self.layers]


def bessel_j1(x: np.ndarray) -> np.ndarray:
    """Bessel function of the first kind, order one: (1/2pi) * integral of cos(t - x sin t) over a period.

    The trapezoidal rule converges geometrically on a periodic integrand; 256 points serve |x| < 200.
    """
    t = np.arange(256) * (2 * np.pi / 256)
    return np.cos(t - np.asarray(x, dtype=np.float64)[..., None] * np.sin(t)).mean(axis=-1)


def kaiser_shape(taps: int, width: float) -> float:
    """Kaiser's beta for a filter of ``taps`` with a transition band ``width`` (1 = half the sampling rate)."""
    attenuation = 2.285 * (taps - 1) * math.pi * width + 7.95
    if attenuation > 50:
        return 0.1102 * (attenuation - 8.7)
    if attenuation > 21:
        return 0.5842 * (attenuation - 21) ** 0.4 + 0.07886 * (attenuation - 21)
    return 0.0


def lowpass(taps: int, *, cutoff: float, width: float, rate: float, radial: bool = False) -> np.ndarray | None:
    """Kaiser-windowed low-pass filter that sums to one; None stands for the identity (one tap).

    cutoff, width, rate   in the same unit (cycles per picture); ``width`` is the whole transition band
    returns               (taps,) float32, or (taps, taps) for the rotationally symmetric one (jinc)
    """
    if taps == 1:
        return None
    window = np.kaiser(taps, kaiser_shape(taps, 2 * width / rate))
    x = (np.arange(taps) - (taps - 1) / 2) / rate
    if radial:
        r = np.hypot(x[:, None], x[None, :])
        safe = np.where(r > 0, r, 1.0)
        # The limit of J1(2 pi c r) / r at the centre (odd numbers of taps only) is pi c.
        f = np.where(r > 0, bessel_j1(2 * np.pi * cutoff * safe) / safe, np.pi * cutoff)
        f = f * np.outer(window, window)
    else:
        f = np.sinc(2 * cutoff * x) * window
    return (f / f.sum()).astype(np.float32)


@dataclass(frozen=True, slots=True)
class _Schedule:
    """Per layer (n + 1,): frequencies in cycles per picture, sizes in samples."""

    cutoffs: np.ndarray
    half_widths: np.ndarray
    rates: np.ndarray
    sizes: np.ndarray
    channels: np.ndarray


def _schedule(resolution: int, base: int, limit: int, img_channels: int) -> _Schedule:
    """Cutoff and stopband grow geometrically until the critically sampled layers, then stay."""
    progress = np.minimum(np.arange(LAYERS + 1) / (LAYERS - CRITICAL), 1.0)
    last_cutoff = resolution / 2
    cutoffs = FIRST_CUTOFF * (last_cutoff / FIRST_CUTOFF) ** progress
    stopbands = FIRST_STOPBAND * (last_cutoff * LAST_STOPBAND_REL / FIRST_STOPBAND) ** progress
    rates = np.exp2(np.ceil(np.log2(np.minimum(2 * stopbands, resolution))))
    sizes = rates.astype(int) + 2 * MARGIN
    sizes[-2:] = resolution
    channels = np.rint(np.minimum(base / 2 / cutoffs, limit)).astype(int)
    channels[-1] = img_channels
    return _Schedule(cutoffs, np.maximum(stopbands, rates / 2) - cutoffs, rates, sizes, channels)


def _layer(schedule: _Schedule, i: int, *, kernel: int, radial: bool, num_fp16_res: int) -> LayerSpec:
    s, before, last = schedule, max(i - 1, 0), i == LAYERS
    rate_in, rate_out, size_in, size_out = s.rates[before], s.rates[i], int(s.sizes[before]), int(s.sizes[i])
    rate = max(rate_in, rate_out) * (1 if last else LRELU_UPSAMPLING)
    up, down = round(rate / rate_in), round(rate / rate_out)
    kernel = 1 if last else kernel
    up_taps = FILTER_SIZE * up if up > 1 and not last else 1
    down_taps = FILTER_SIZE * down if down > 1 and not last else 1
    # What the two filters consume, less what the convolution and the margins provide; the odd one goes left.
    total = (size_out - 1) * down + 1 - (size_in + kernel - 1) * up + up_taps + down_taps - 2
    low = (total + up) // 2
    return LayerSpec(
        name=f"L{i}_{size_out}_{s.channels[i]}",
        n_in=int(s.channels[before]),
        n_out=int(s.channels[i]),
        in_size=size_in,
        out_size=size_out,
        kernel=kernel,
        up=up,
        down=down,
        padding=(low, total - low, low, total - low),
        up_filter=lowpass(up_taps, cutoff=s.cutoffs[before], width=2 * s.half_widths[before], rate=rate),
        down_filter=lowpass(
            down_taps,
            cutoff=s.cutoffs[i],
            width=2 * s.half_widths[i],
            rate=rate,
            radial=radial and i < LAYERS - CRITICAL,
        ),
        is_torgb=last,
        use_fp16=bool(rate_out * 2**num_fp16_res > s.rates[-1]),
    )


def design(resolution: int, *, config: str = "T", channel_base: int | None = None, channel_max: int | None = None,
           w_dim: int = 512, img_channels: int = 3, num_fp16_res: int = 4) -> Plan:
    """A fresh network by the paper's rules.

    config   'T' (3x3 convolutions, separable filters; base 32768, at most 512 channels) or
             'R' (1x1 convolutions, radial down filters; base 65536, at most 1024 channels)
    """
    if config not in ("T", "R"):
        raise ValueError(f"unknown configuration {config!r}: expected 'T' or 'R'")
    if resolution < 16 or resolution & (resolution - 1):
        raise ValueError(f"the resolution is {resolution}: expected a power of two from 16 upwards")
    is_r = config == "R"
    base = channel_base or (65536 if is_r else 32768)
    limit = channel_max or (1024 if is_r else 512)
    s = _schedule(resolution, base, limit, img_channels)
    layers = [_layer(s, i, kernel=1 if is_r else 3, radial=is_r, num_fp16_res=num_fp16_res) for i in range(LAYERS + 1)]
    first = InputSpec(int(s.channels[0]), int(s.sizes[0]), float(s.rates[0]), float(s.cutoffs[0]))
    return Plan(w_dim, first, tuple(layers))
