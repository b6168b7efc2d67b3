"""Runtimes: what runs a bundle on a device. One file each, imported late.

A runtime is composed of what solves and what draws. Adding one: a file with a ``Solving`` or a ``Drawing``, its
``open_bundle``, and a line in RUNTIMES.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy import ndarray as Array

from engine.bundle import Bundle
from engine.errors import BackendError, RequestError
from engine.spaces import Space

if TYPE_CHECKING:
    from engine.cuda.field import OnDevice
    from engine.runtimes.decoding import Pictures
    from engine.solvers import Solver

log = logging.getLogger(__name__)
# Every head runs for all rows.
ALL: Mapping[str, Array] = {}


class Field(Protocol):
    """The network z -> w -> logits. ``pullback`` continues from the last ``forward``."""

    def forward(
        self, z: Array, psi: Array, label: Array | None, heads: Mapping[str, Array], some: Mapping[str, Array] = ALL
    ) -> tuple[Array, dict[str, tuple[Array, Array]]]:
        """Evaluate the mapping once, and the named heads only.

        z (rows, z_dim), psi (rows, 1), label (rows,) int64 or None
        heads     {head: the wanted combinations (k, C) of its logits}
        some      {head: positions (m,)}: of the rows that want a head, which then gives m rows; others give all
        returns   w (rows, w_dim), {head: (logits (rows, C), Jacobian (rows, k, dim))}, the derivatives of
                  combinations @ logits by the head's input
        """
        ...

    # All of it in one call, where the field can.
    linearise: "Linearise | None"

    def pullback(self, cotangent: Array, rows: Array | None = None) -> Array:
        """cotangent (rows, r, w_dim) on w -> (rows, r, z_dim) on z.

        rows   (pairs,) with a cotangent (pairs, r, w_dim): the row that each belongs to. Rows may come more than once
        """
        ...


class Linearise(Protocol):
    """Mapping, heads on w, and the pullback of their Jacobians, in one call."""

    def __call__(
        self,
        z: Array,
        psi: Array,
        label: Array | None,
        heads: Mapping[str, tuple[Array, Array]],
        pair_row: Array,
        source: Array,
        near_row: Array,
        near_anchor: Array,
    ) -> tuple[Array, dict[str, Array], Array]:
        """z, psi, label as in ``forward``.

        heads      {head: rows (m,), combinations (k, C)} in the order of the bundle
        pair_row   (pairs,): the row of each cotangent that is wanted
        source     (pairs,): its place among the rows of Jacobian (m, k) of all heads, one after the other, and after
                   them w[near_row] - near_anchor (q, w_dim)
        returns    w (rows, w_dim), {head: logits (m, C)}, the cotangents on z (pairs, z_dim)
        """
        ...


class Solving:
    """What solves on a device: gives fields, and may have a way of its own to run a solver.

    Its functions may be called by several threads at a time; a field belongs to one.

    jacobian          precision of the rows of Jacobian; if it is tf32 or fp16 also of w and logits, which else are
                      float32 or better
    dtype             of the field's results, and so of the solver's state
    row_independent   a row's result does not depend, to the bit, on the other rows of the call
    """

    name: str
    version: str
    device: str
    jacobian: str
    dtype: np.dtype
    row_independent: bool

    def field(self, space: Space) -> Field:
        """A field with a state of its own, the activations that ``pullback`` needs.

        space   where its latents lie. In one that is not mapped ``forward`` is given w in the place of z, and
                ``pullback`` is the identity
        """
        raise NotImplementedError

    def solver(self, solver: "Solver", capacity: int) -> "Solver":
        """The solver as it runs here, such as one whose ``step`` takes all rows of a batch to their end."""
        return solver

    def room(self, solver: "Solver", capacity: int) -> int:
        """Rows that ``self.solver(solver, capacity)`` wants to be given at a time."""
        return capacity

    def oneshot(self, name: str, noise: Array, targets: Array | None) -> Array:
        """The one-pass map ``name``: noise (rows, z_dim), targets (rows, T) or None -> latents (rows, z_dim)."""
        raise RequestError(f"runtime {self.name!r} does not run one-pass maps on {self.device!r} yet: open the sampler "
                           "with device='cpu'")

    def on_device(self, solver: "Solver", capacity: int) -> "OnDevice":
        """The solver for latents that stay on the device, see engine.tensors."""
        raise RequestError("tensors need a sampler with device='cuda' and gauss-newton or a Runge-Kutta method")

    def close(self) -> None:
        """Free what lies on a device. The end of the process does that too."""


class Drawing:
    """What draws pictures: runs the synthesis. Its functions may be called by several threads at a time.

    precision   of the pictures
    """

    name: str
    version: str
    precision: str

    def noise_inputs(self) -> dict[str, int]:
        """The synthesis' noise inputs and their sides in pixels; none unless exported with ``--noise input``."""
        raise NotImplementedError

    def synthesize(self, ws: Array, noises: Mapping[str, Array] | None = None) -> Array:
        """ws (rows, num_ws, w_dim) float32 -> images (rows, channels, R, R) float32, about [-1, 1].

        noises   {name: (rows, 1, r, r)} for the noise inputs; without it they are zero
        """
        raise NotImplementedError

    def pixels(self, ws: Array, noises: Mapping[str, Array] | None = None) -> Array:
        """``synthesize`` as 8-bit pictures (rows, R, R, channels)."""
        return to_pixels(self.synthesize(ws, noises))

    def on_device(self) -> "Pictures":
        """What draws latents that stay on the device, see engine.tensors."""
        raise RequestError("tensors need a sampler with device='cuda'")

    def close(self) -> None:
        """Free what lies on a device. The end of the process does that too."""


@dataclass(frozen=True, slots=True, eq=False)
class Runtime:
    """A bundle on a device: what solves, and what draws.

    name   as it was asked for: a key of RUNTIMES
    """

    name: str
    solving: Solving
    drawing: Drawing

    @property
    def device(self) -> str:
        return self.solving.device

    @property
    def version(self) -> str:
        solving, drawing = self.solving, self.drawing
        if solving.name == drawing.name == self.name:
            return solving.version
        told = [part if name == self.name else f"{name} {part}"
                for name, part in ((solving.name, solving.version), (drawing.name, drawing.version))]
        return " with ".join(told if solving.name == self.name else reversed(told))

    def close(self) -> None:
        self.solving.close()
        self.drawing.close()


def to_pixels(images: Array) -> Array:
    """(n, C, H, W) -> (n, H, W, C) in 8 bits as StyleGAN defines them: x 127.5 + 128, cut off at both ends."""
    pixels = images * np.float32(127.5)
    pixels += np.float32(128)
    np.clip(pixels, 0, 255, out=pixels)
    return np.ascontiguousarray(pixels.transpose(0, 2, 3, 1), np.uint8)


@dataclass(frozen=True, slots=True)
class Entry:
    """Where a runtime is and what may be asked of it.

    extras       of the package, which install it, by device
    precisions   that can be chosen on a device; the first is the default, except for tf32: without it, everything is
                 computed as the bundle's graphs are typed
    """

    module: str
    extras: Mapping[str, str]
    precisions: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


RUNTIMES = {
    "native": Entry("engine.runtimes.native", {"cpu": "cpu"}, {"cpu": ("fp32", "bf16-jacobian")}),
    "onnxruntime": Entry("engine.runtimes.onnxruntime", {"cpu": "cpu", "cuda": "gpu"}, {"cuda": ("tf32",)}),
    "openvino": Entry("engine.runtimes.openvino", {"cpu": "openvino"}, {"cpu": ("fp32", "bf16", "bf16-jacobian")}),
    "cuda": Entry("engine.runtimes.cuda", {"cuda": "gpu"}, {"cuda": ("fp32", "tf32", "fp16")}),
    "tensorrt": Entry("engine.runtimes.tensorrt", {"cuda": "tensorrt"}, {"cuda": ("fp32", "tf32", "fp16")}),
    "tensorrt_rtx": Entry("engine.runtimes.tensorrt", {"cuda": "tensorrt-rtx"}, {"cuda": ("fp32", "tf32", "fp16")}),
    "numpy": Entry("engine.runtimes.reference", {"cpu": ""}),
}
# "auto" takes the first of these that is installed and knows the device. On a GPU the first three solve alike, by our
# kernels; who has installed a TensorRT wants its pictures.
AUTO = {"cpu": ("native", "onnxruntime"), "cuda": ("tensorrt", "tensorrt_rtx", "cuda", "onnxruntime")}


def open_runtime(bundle: Bundle, name: str = "auto", *, device: str = "cpu", threads: int = 0,
                 precision: str | None = None) -> Runtime:
    """Open ``bundle`` on the runtime ``name``; 'auto' takes the first of the device's AUTO that is installed.

    threads, precision   0 and None: the runtime's own choice
    Raises BackendError: a choice is honoured or refused, never replaced.
    """
    if name == "auto":
        if device not in AUTO:
            raise BackendError(f"there is no device {device!r}; known are: {', '.join(AUTO)}")
        *others, name = AUTO[device]
        for candidate in others:
            try:
                return open_runtime(bundle, candidate, device=device, threads=threads, precision=precision)
            except (MissingRuntime, UnfitDevice) as error:
                if candidate == "native":
                    warn_slow(str(error))
    if name not in RUNTIMES:
        raise BackendError(f"there is no runtime {name!r}; known are: auto, {', '.join(RUNTIMES)}")
    entry = RUNTIMES[name]
    if device not in entry.extras:
        known = ", ".join(entry.extras)
        raise BackendError(f"runtime {name!r} does not run on device {device!r}; it runs on: {known}")
    choices = entry.precisions.get(device, ())
    if precision is not None and precision not in choices:
        known = ", ".join(choices) or "none, it computes as the bundle was exported"
        raise BackendError(f"runtime {name!r} has no precision {precision!r} to choose; it has: {known}")
    try:
        factory: Callable[..., Runtime] = import_module(entry.module).open_bundle
        return factory(bundle, name=name, device=device, threads=threads, precision=precision)
    except ImportError as error:
        advice = f"install it with: pip install 'lace-engine[{entry.extras[device]}]'"
        raise MissingRuntime(f"runtime {name!r} is not installed ({error}); {advice}") from error


@cache
def warn_slow(reason: str) -> None:
    """Once: that the compiled field is not there, what it costs, and (in the reason) how to get it."""
    log.warning("solving about 8 times slower than with the compiled field: %s", reason)


class MissingRuntime(BackendError):
    """The runtime is known, but the package behind it is not installed."""


class UnfitDevice(BackendError):
    """The runtime is installed, but does not run on this model of GPU."""
