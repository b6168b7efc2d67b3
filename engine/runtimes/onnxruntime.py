"""The graphs of a bundle on ONNX Runtime's CPU provider."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy import ndarray as Array

from engine.bundle import Bundle
from engine.errors import BackendError

# Rows that one synthesis call decodes: bounds the memory of a 1024 px batch, and is past the point where more
# rows per call make a CPU faster.
SYNTHESIS_ROWS = 8
# An InferenceSession; its stubs say that a result may be sparse, a list or a dictionary, which ours never are.
Session = Any


class OnnxField:
    """See engine.runtimes.Field. One session for the mapping, one a head: only what a request mentions runs."""

    def __init__(self, runtime: "OnnxRuntime", space: str):
        self.runtime, self.in_w = runtime, space == "w"
        self.feeds: dict[str, Array] = {}

    def forward(self, z: Array, psi: Array, label: Array | None, heads: Mapping[str, Array]):
        w = z if self.in_w else self.map(z, psi, label)
        found = {}
        for name, seeds in heads.items():
            x = w if self.runtime.bundle.heads[name].space == "w" else z
            feeds = {"x": x, "seeds": seeds}
            found[name] = tuple(self.runtime.session(f"head.{name}").run(["logits", "slopes"], feeds))
        return w, found

    def map(self, z: Array, psi: Array, label: Array | None) -> Array:
        """w, and keep the activations that ``pullback`` reads."""
        session = self.runtime.session("mapping")
        feeds = {"z": z, "psi": psi} if label is None else {"z": z, "psi": psi, "label": label}
        names = [node.name for node in session.get_outputs()]
        found = dict(zip(names, session.run(names, feeds), strict=True))
        w = found.pop("w")
        self.feeds = {"z": z, "psi": psi, **found}
        return w

    def pullback(self, cotangent: Array) -> Array:
        if self.in_w:
            return cotangent
        return self.runtime.session("pullback").run(["dz"], {**self.feeds, "cotangent": cotangent})[0]


class OnnxRuntime:
    name, device = "onnxruntime", "cpu"
    version = ort.__version__
    dtype = np.dtype(np.float32)
    # Each element of a product is summed in the same order whatever the number of rows; the tests check it.
    row_independent = True

    def __init__(self, bundle: Bundle, threads: int):
        self.bundle, self.threads = bundle, threads
        self.precision = bundle.manifest.graphs.get("synthesis", {}).get("precision", "fp32")
        self.sessions: dict[str, Session] = {}

    def session(self, graph: str) -> Session:
        """The session of a graph, opened at its first use."""
        if graph not in self.sessions:
            self.sessions[graph] = self.open(graph)
        return self.sessions[graph]

    def open(self, graph: str) -> Session:
        options = ort.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.log_severity_level = 3
        path = self.bundle.graph(graph)
        try:
            return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime raises many private types
            raise BackendError(f"onnxruntime {ort.__version__} cannot open {path}: {error}") from error

    def field(self, space: str = "z") -> OnnxField:
        return OnnxField(self, space)

    def noise_inputs(self) -> dict[str, int]:
        return {node.name: node.shape[-1] for node in self.session("synthesis").get_inputs() if node.name != "ws"}

    def synthesize(self, ws: Array, noises: Mapping[str, Array] | None = None) -> Array:
        g, session, sides = self.bundle.generator, self.session("synthesis"), self.noise_inputs()
        images = np.empty((len(ws), g.img_channels, g.resolution, g.resolution), np.float32)
        for first in range(0, len(ws), SYNTHESIS_ROWS):
            rows = slice(first, first + SYNTHESIS_ROWS)
            n = len(ws[rows])
            feeds = {k: noises[k][rows] if noises else np.zeros((n, 1, r, r), np.float32) for k, r in sides.items()}
            images[rows] = session.run(["image"], {"ws": ws[rows], **feeds})[0]
        return images


def open_bundle(bundle: Bundle, *, threads: int = 0) -> OnnxRuntime:
    return OnnxRuntime(bundle, threads)
