"""Runtimes: what runs a bundle's graphs on a device. One file each, imported late.

Adding one: a file with the methods of ``Runtime`` and ``Field``, and a line in RUNTIMES.
"""

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Protocol

import numpy as np
from numpy import ndarray as Array

from engine.bundle import Bundle
from engine.errors import BackendError


class Field(Protocol):
    """The network z -> w -> logits. ``pullback`` continues from the last ``forward``."""

    def forward(
        self, z: Array, psi: Array, label: Array | None, heads: Mapping[str, Array]
    ) -> tuple[Array, dict[str, tuple[Array, Array]]]:
        """Evaluate the mapping once, and the named heads only.

        z (rows, z_dim), psi (rows, 1), label (rows,) int64 or None
        heads     {head: seeds (k, C)}: the wanted combinations of its logits
        returns   w (rows, w_dim), {head: (logits (rows, C), slopes (rows, k, dim))}, where the slopes are the
                  derivatives of seeds @ logits by the head's input
        """
        ...

    def pullback(self, cotangent: Array) -> Array:
        """cotangent (rows, r, w_dim) on w -> (rows, r, z_dim) on z."""
        ...


class Runtime(Protocol):
    """Something that runs a bundle.

    Its functions may be called by several threads at a time; a field belongs to one.

    precision         of the pictures
    slopes            precision of the rows of Jacobian; w and logits are float32 or better everywhere
    dtype             of the field's results, and so of the solver's state
    row_independent   a row's result does not depend, to the bit, on the other rows of the call
    """

    name: str
    version: str
    device: str
    precision: str
    slopes: str
    dtype: np.dtype
    row_independent: bool

    def field(self, space: str = "z") -> Field:
        """A field with a state of its own (the activations that ``pullback`` needs).

        space   'z', or 'w': ``forward`` is given w in the place of z, and ``pullback`` is the identity
        """
        ...

    def noise_inputs(self) -> dict[str, int]:
        """The synthesis' noise inputs and their sides in pixels; none unless exported with ``--noise input``."""
        ...

    def synthesize(self, ws: Array, noises: Mapping[str, Array] | None = None) -> Array:
        """ws (rows, num_ws, w_dim) float32 -> images (rows, channels, R, R) float32, about [-1, 1].

        noises   {name: (rows, 1, r, r)} for the noise inputs; without it they are zero
        """
        ...


@dataclass(frozen=True, slots=True)
class Entry:
    """Where a runtime is and what may be asked of it.

    extra        of the package, which installs it
    precisions   that can be chosen; the first is the default. Without a choice it is that of the bundle's graphs
    """

    module: str
    extra: str
    devices: tuple[str, ...] = ("cpu",)
    precisions: tuple[str, ...] = ()


RUNTIMES = {
    "onnxruntime": Entry("engine.runtimes.onnxruntime", "cpu"),
    "openvino": Entry("engine.runtimes.openvino", "openvino", precisions=("fp32", "bf16", "bf16-jacobian")),
    "numpy": Entry("engine.runtimes.reference", ""),
}
# The first of these that is installed is "auto".
AUTO = ("onnxruntime",)


def open_runtime(bundle: Bundle, name: str = "auto", *, device: str = "cpu", threads: int = 0,
                 precision: str | None = None) -> Runtime:  # fmt: skip
    """Open ``bundle`` on the runtime ``name``; 'auto' takes the first of AUTO that is installed.

    threads, precision   0 and None: the runtime's own choice
    Raises BackendError: a choice is honoured or refused, never replaced.
    """
    if name == "auto":
        for candidate in AUTO[:-1]:
            with contextlib.suppress(MissingRuntime):
                return open_runtime(bundle, candidate, device=device, threads=threads, precision=precision)
        name = AUTO[-1]
    if name not in RUNTIMES:
        raise BackendError(f"there is no runtime {name!r}; known are: auto, {', '.join(RUNTIMES)}")
    entry = RUNTIMES[name]
    if device not in entry.devices:
        known = ", ".join(entry.devices)
        raise BackendError(f"runtime {name!r} does not run on device {device!r}; it runs on: {known}")
    if precision is not None and precision not in entry.precisions:
        known = ", ".join(entry.precisions) or "none, it computes as the bundle was exported"
        raise BackendError(f"runtime {name!r} has no precision {precision!r} to choose; it has: {known}")
    try:
        factory: Callable[..., Runtime] = import_module(entry.module).open_bundle
    except ImportError as error:
        advice = f"install it with: pip install 'lace-engine[{entry.extra}]'"
        raise MissingRuntime(f"runtime {name!r} is not installed ({error}); {advice}") from error
    return factory(bundle, threads=threads, precision=precision)


class MissingRuntime(BackendError):
    """The runtime is known, but the package behind it is not installed."""
