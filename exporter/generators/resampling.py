"""Resampling with stated filters: zero-insertion, padding or cropping, filtering, decimation.

All of it is depthwise convolution with constant weights, and exact including the borders; channels and
spatial sizes are constants of the graph, the batch stays dynamic.
"""

from torch import Tensor
from torch.nn import functional as F

Edges = tuple[int, int, int, int]  # left, right, top, bottom


def extend(x: Tensor, edges: Edges) -> Tensor:
    """Zero padding of x (rows, C, h, w); negative edges crop."""
    left, right, top, bottom = edges
    height, width = x.shape[2:]
    # Slices for the crops: a Pad with negative numbers is legal ONNX that not every compiler takes.
    if min(edges) < 0:
        x = x[:, :, max(-top, 0) : height - max(-bottom, 0), max(-left, 0) : width - max(-right, 0)]
    if max(edges) > 0:
        x = F.pad(x, [max(e, 0) for e in edges])
    return x


def split_padding(edges: Edges) -> tuple[tuple[int, int], Edges]:
    """The part of ``edges`` that a convolution's own padding (vertical, horizontal) covers, and the rest."""
    left, right, top, bottom = edges
    v, h = max(0, min(top, bottom)), max(0, min(left, right))
    return (v, h), (left - h, right - h, top - v, bottom - v)


def along(axis: int, length: int, other: int = 1) -> tuple[int, int]:
    """(length, other) for axis 2 (vertical), (other, length) for axis 3 (horizontal)."""
    return (length, other) if axis == 2 else (other, length)


def side_edges(axis: int, low: int, high: int) -> Edges:
    return (0, 0, low, high) if axis == 2 else (low, high, 0, 0)


def unused_inputs(padding: Edges, up: int) -> Edges:
    """Samples on each side of the input that a negative padding removes entirely.

    Left of the first kept one come ``-low`` dropped positions, ``up`` for each sample. The last sample is
    followed by up - 1 zeros, so that dropping ``up`` positions there costs one sample too.
    """
    left, right, top, bottom = padding
    return max(0, -(left // up)), max(0, -right // up), max(0, -(top // up)), max(0, -bottom // up)


def upsample(x: Tensor, taps: Tensor, up: int, axis: int, *, low: int, high: int, lowering: str) -> Tensor:
    """Zero-insert (up - 1 zeros after each sample), pad (low, high), filter with ``taps``, along one axis."""
    # The transposed convolution holds every sum the filter can make; ours begins at sample taps - 1 - low of it.
    n, channels = taps.shape[0], x.shape[1]
    start, surplus = n - 1 - low, n - up - high
    if lowering == "convt":
        weight = taps.to(x.dtype).reshape(1, 1, *along(axis, n)).repeat(channels, 1, 1, 1)
        crop, rest = split_padding(side_edges(axis, start, surplus))
        x = F.conv_transpose2d(x, weight, stride=along(axis, up), padding=crop, groups=channels)
        left, right, top, bottom = rest
        return extend(x, (-left, -right, -top, -bottom))
    return upsample_polyphase(x, taps, up, axis, start=start, surplus=surplus)


def upsample_polyphase(x: Tensor, taps: Tensor, up: int, axis: int, *, start: int, surplus: int) -> Tensor:
    """The same with ordinary convolutions: one short filter for each of ``up`` phases, interleaved."""
    channels, size = x.shape[1], x.shape[axis]
    length = (size - 1) * up + taps.shape[0] - start - surplus
    reach = -(-taps.shape[0] // up)
    # Phase r of output group q sums x[first + q - j] * taps[j up + r] over j < reach.
    phases = F.pad(taps, (0, reach * up - taps.shape[0])).reshape(reach, up).flip(0).T
    first = start // up
    groups = -(-(length + start - first * up) // up)
    padding, rest = split_padding(side_edges(axis, reach - 1 - first, first + groups - size))
    weight = phases.to(x.dtype).reshape(up, 1, *along(axis, reach)).repeat(channels, 1, 1, 1)
    x = F.conv2d(extend(x, rest), weight, padding=padding, groups=channels)
    height, width = x.shape[2:]
    x = x.reshape(-1, channels, up, height, width)
    x = x.permute(0, 1, 3, 2, 4) if axis == 2 else x.permute(0, 1, 3, 4, 2)
    x = x.reshape(-1, channels, *((height * up, width) if axis == 2 else (height, width * up)))
    skip = start - first * up
    return x[:, :, skip : skip + length] if axis == 2 else x[:, :, :, skip : skip + length]


def downsample(x: Tensor, taps: Tensor | None, down: int) -> Tensor:
    """Filter, then keep every ``down``-th sample. taps (n,) separable, (n, n), or None."""
    if taps is None:
        return x[:, :, ::down, ::down] if down > 1 else x
    channels = x.shape[1]
    # torch correlates; a filter convolves. All designed filters are symmetric, a file's need not be.
    kernel = taps.to(x.dtype).flip(*range(taps.dim()))
    if taps.dim() == 2:
        return F.conv2d(x, kernel[None, None].repeat(channels, 1, 1, 1), stride=down, groups=channels)
    for axis in (2, 3):
        weight = kernel.reshape(1, 1, *along(axis, taps.shape[0])).repeat(channels, 1, 1, 1)
        x = F.conv2d(x, weight, stride=along(axis, down), groups=channels)
    return x
