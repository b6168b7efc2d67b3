"""The reference runtime: the field in float64 numpy. Slow, obvious, and the judge of the others.

It has no synthesis: pictures need one of the other runtimes.
"""

from collections.abc import Mapping

import numpy as np
from numpy import ndarray as Array

from engine.bundle import Bundle
from engine.errors import BackendError
from engine.reference import field as twin
from engine.reference.oneshot import push
from engine.runtimes import ALL, Drawing, Runtime, Solving
from engine.spaces import Space

NO_PICTURES = "runtime 'numpy' only solves; to decode pictures choose runtime='onnxruntime'"


class ReferenceField:
    def __init__(self, bundle: Bundle, space: Space):
        self.space, self.normalise = space, bundle.generator.normalise
        self.tensors = {name: tensor.astype(np.float64) for name, tensor in bundle.field.items()}
        self.stacks = {name: twin.layers(self.tensors, f"head.{name}") for name in bundle.stacks}
        self.spaces = {name: stack.space for name, stack in bundle.stacks.items()}
        self.z = self.psi = np.empty((0, 0))
        self.hidden: list[Array] = []

    def forward(self, z: Array, psi: Array, label: Array | None, heads: Mapping[str, Array],
                some: Mapping[str, Array] = ALL):
        self.z, self.psi = z.astype(np.float64), psi.astype(np.float64)
        if self.space.is_mapped:
            w, self.hidden = twin.mapping(self.tensors, self.z, self.psi, label, normalise=self.normalise)
        else:
            w = self.z
        found = {}
        for name, seeds in heads.items():
            x = w if self.spaces[name] == "w" else self.z
            x = x[some[name]] if name in some else x
            logits, hidden = twin.head(self.stacks[name], x)
            found[name] = logits, twin.head_rows(self.stacks[name], hidden, seeds, rows=len(x))
        return w, found

    linearise = None

    def pullback(self, cotangent: Array, rows: Array | None = None) -> Array:
        if not self.space.is_mapped:
            return cotangent
        part = slice(None) if rows is None else rows
        hidden = [activation[part] for activation in self.hidden]
        return twin.pullback(self.tensors, self.z[part], self.psi[part], hidden, cotangent.astype(np.float64),
                             normalise=self.normalise)


class ReferenceSolving(Solving):
    name, version, device, jacobian = "numpy", np.__version__, "cpu", "fp64"
    dtype = np.dtype(np.float64)
    # BLAS picks its kernel by the number of rows, so the last bits may depend on it.
    row_independent = False

    def __init__(self, bundle: Bundle):
        self.bundle = bundle

    def field(self, space: Space) -> ReferenceField:
        return ReferenceField(self.bundle, space)

    def oneshot(self, name: str, noise: Array, targets: Array | None) -> Array:
        tensors = {key: tensor.astype(np.float64) for key, tensor in self.bundle.field.items()}
        return push(tensors, self.bundle.oneshots[name], noise.astype(np.float64), targets,
                    normalise=self.bundle.generator.normalise)


class NoDrawing(Drawing):
    name, version, precision = "numpy", np.__version__, "fp64"

    def noise_inputs(self) -> dict[str, int]:
        raise BackendError(NO_PICTURES)

    def synthesize(self, ws: Array, noises: Mapping[str, Array] | None = None) -> Array:
        raise BackendError(NO_PICTURES)


def open_bundle(bundle: Bundle, *, name: str, device: str, threads: int, precision: str | None) -> Runtime:
    return Runtime(name, ReferenceSolving(bundle), NoDrawing())
