"""The canvas and the antialiased shapes drawn on it.

Lengths are in canvas units: x and y run from -VIEW to VIEW, y points down. A shape is an opacity in [0, 1] made from a
signed distance, so it is equally sharp at any resolution. Wherever possible the terms of a distance depend on x alone
(n, 1, w) or on y alone (n, h, 1): these cost almost nothing, and only their sum touches every pixel.
"""

from dataclasses import dataclass

import torch

VIEW = 0.87  # half the side of the picture


@dataclass(frozen=True)
class Canvas:
    """A batch of pictures, or a window of one: the arrays are views, so painting a window paints the picture.

    x        (1, 1, w)      abscissae of the pixel centres
    y        (1, h, 1)      ordinates
    rgb      (n, 3, h, w)   colours in [0, 1]
    person   (n, h, w)      opacity of everything that is not background
    skin     (n, h, w)      opacity of the face itself, to which its features are clipped
    """

    x: torch.Tensor
    y: torch.Tensor
    rgb: torch.Tensor
    person: torch.Tensor
    skin: torch.Tensor

    @staticmethod
    def blank(n: int, side: int) -> "Canvas":
        """n black pictures of side x side pixels."""
        centres = ((torch.arange(side, dtype=torch.float32) + 0.5) * (2 / side) - 1) * VIEW
        rgb, masks = torch.zeros(n, 3, side, side), torch.zeros(2, n, side, side)
        return Canvas(centres.view(1, 1, -1), centres.view(1, -1, 1), rgb, masks[0], masks[1])

    @property
    def pixel(self) -> float:
        """Side of a pixel."""
        # Rows of the whole picture are contiguous, so their stride is its width, in a window as well.
        return 2 * VIEW / self.rgb.stride(2)

    def window(self, left, right, top, bottom) -> "Canvas":
        """The smallest window that holds [left, right] x [top, bottom] of every picture, each (n, 1, 1) or a number.

        Most layers touch a few per cent of the picture; windows are what makes the renderer fast.
        """
        pad = 2 * self.pixel
        xs = _span(self.x.numel(), _lowest(left) - pad, _highest(right) + pad)
        ys = _span(self.y.numel(), _lowest(top) - pad, _highest(bottom) + pad)
        masks = self.person[:, ys, xs], self.skin[:, ys, xs]
        return Canvas(self.x[:, :, xs], self.y[:, ys], self.rgb[:, :, ys, xs], *masks)

    def fill(self, distance, softness=None):
        """Opacity of the inside of a shape.

        distance   (n, h, w)   signed, negative inside
        softness   width of the edge, one pixel if not given
        returns    (n, h, w)
        """
        width = self.pixel if softness is None else softness
        return torch.sub(0.5, distance / width).clamp_(0, 1)

    def paint(self, alpha, colour, solid: bool = False) -> None:
        """Lay a colour (n, 3) over the picture with opacity alpha (n, h, w).  `solid` layers belong to the person."""
        self.rgb.lerp_(colour[:, :, None, None], alpha[:, None])
        if solid:
            torch.maximum(self.person, alpha, out=self.person)

    def ellipse(self, x, y, rx, ry, softness=None):
        """Opacity of an ellipse with centre (x, y) and half axes rx, ry, each (n, 1, 1)."""
        # Scaling by the smaller axis keeps thin ellipses sharp; the error on the long side is under a pixel.
        reach = torch.minimum(torch.as_tensor(rx), torch.as_tensor(ry))
        radius = (((self.x - x) / rx).square() + ((self.y - y) / ry).square()).sqrt_()
        return self.fill((radius - 1).mul_(reach), softness)

    def stroke(self, x, y, half, bend, thickness, slope=0.0, softness=None, upright=False):
        """Opacity of a parabolic brush stroke that tapers to nothing at both ends.

        x, y        centre of the stroke
        half        half its length
        bend        how far the ends lie below the centre (right of it if upright)
        thickness   half its thickness at the centre
        slope       how far the right (lower) end lies below (right of) the straight line
        """
        along, across = (self.y - y, self.x - x) if upright else (self.x - x, self.y - y)
        u = along / half
        middle = bend * u.square() + slope * u
        # Far below zero beyond the ends: without it a blurred edge would run past them, out of the window.
        extent = torch.where(u.square() < 1, thickness * (1 - u.square()), -1.0)
        return self.fill((across - middle).abs_().sub_(extent), softness)


def _lowest(value) -> float:
    return float(value.min()) if isinstance(value, torch.Tensor) else value


def _highest(value) -> float:
    return float(value.max()) if isinstance(value, torch.Tensor) else value


def _span(side: int, low: float, high: float) -> slice:
    """Indices of the pixels within [low, high] along a side of the whole picture, never empty."""
    first = min(max(int((low / VIEW + 1) * side / 2), 0), side - 1)
    last = min(max(int((high / VIEW + 1) * side / 2) + 1, first + 1), side)
    return slice(first, last)
