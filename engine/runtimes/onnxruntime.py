"""The graphs of a bundle on ONNX Runtime's CPU provider."""

from collections.abc import Mapping
from threading import Lock
from typing import Any, Protocol

import numpy as np
import onnxruntime as ort
from numpy import ndarray as Array

from engine.bundle import Bundle
from engine.errors import BackendError

# What one synthesis call decodes: more rows make a CPU no faster once they are 8 or a megapixel, and cost memory.
SYNTHESIS_ROWS, SYNTHESIS_PIXELS = 8, 2**20
# An InferenceSession; its stubs say that a result may be sparse, a list or a dictionary, which ours never are.
Session = Any


class Graphs(Protocol):
    """What runs a bundle's graphs, for several threads at a time: what ``GraphField`` and ``decode`` need."""

    bundle: Bundle

    def run(self, graph: str, feeds: Mapping[str, Array]) -> dict[str, Array]: ...
    def noise_inputs(self) -> dict[str, int]: ...


class GraphField:
    """See engine.runtimes.Field. One graph for the mapping, one a head: only what a request mentions runs."""

    def __init__(self, graphs: Graphs, space: str):
        self.graphs, self.in_w = graphs, space == "w"
        self.feeds: dict[str, Array] = {}

    def forward(self, z: Array, psi: Array, label: Array | None, heads: Mapping[str, Array]):
        w = z if self.in_w else self.map(z, psi, label)
        found = {}
        for name, seeds in heads.items():
            x = w if self.graphs.bundle.heads[name].space == "w" else z
            answer = self.graphs.run(f"head.{name}", {"x": x, "seeds": seeds})
            found[name] = answer["logits"], answer["slopes"]
        return w, found

    def map(self, z: Array, psi: Array, label: Array | None) -> Array:
        """w, and keep the activations that ``pullback`` reads."""
        feeds = {"z": z, "psi": psi} if label is None else {"z": z, "psi": psi, "label": label}
        found = self.graphs.run("mapping", feeds)
        hidden = {name: value for name, value in found.items() if name.startswith("hidden.")}
        self.feeds = {"z": z, "psi": psi, **hidden}
        return found["w"]

    def pullback(self, cotangent: Array) -> Array:
        if self.in_w:
            return cotangent
        return self.graphs.run("pullback", {**self.feeds, "cotangent": cotangent})["dz"]


def decode(graphs: Graphs, ws: Array, noises: Mapping[str, Array] | None, rows: int) -> Array:
    """See engine.runtimes.Runtime.synthesize; ``rows`` a call."""
    g, sides = graphs.bundle.generator, graphs.noise_inputs()
    images = np.empty((len(ws), g.img_channels, g.resolution, g.resolution), np.float32)
    for first in range(0, len(ws), rows):
        part = slice(first, first + rows)
        n = len(ws[part])
        feeds = {k: noises[k][part] if noises else np.zeros((n, 1, r, r), np.float32) for k, r in sides.items()}
        images[part] = graphs.run("synthesis", {"ws": ws[part], **feeds})["image"]
    return images


class OnnxRuntime:
    name, device, slopes = "onnxruntime", "cpu", "fp32"
    version = ort.__version__
    dtype = np.dtype(np.float32)
    # Each element of a product is summed in the same order whatever the number of rows; the tests check it.
    row_independent = True

    def __init__(self, bundle: Bundle, threads: int):
        self.bundle, self.threads = bundle, threads
        self.precision = bundle.manifest.graphs.get("synthesis", {}).get("precision", "fp32")
        self.sessions: dict[str, tuple[Session, list[str]]] = {}
        self.lock = Lock()

    def run(self, graph: str, feeds: Mapping[str, Array]) -> dict[str, Array]:
        session, names = self.session(graph)
        return dict(zip(names, session.run(names, feeds), strict=True))

    def session(self, graph: str) -> tuple[Session, list[str]]:
        """The session of a graph with its outputs' names, opened at its first use."""
        with self.lock:
            if graph not in self.sessions:
                session = self.open(graph)
                self.sessions[graph] = session, [node.name for node in session.get_outputs()]
            return self.sessions[graph]

    def open(self, graph: str) -> Session:
        options = ort.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.log_severity_level = 3
        # A plan of the memory for each number of rows, kept for ever: 1.5 instead of 1.0 GB at 1024 px, and no faster.
        options.enable_mem_pattern = False
        path = self.bundle.graph(graph)
        try:
            return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime raises many private types
            raise BackendError(f"onnxruntime {ort.__version__} cannot open {path}: {error}") from error

    def field(self, space: str = "z") -> GraphField:
        return GraphField(self, space)

    def noise_inputs(self) -> dict[str, int]:
        session, _ = self.session("synthesis")
        return {node.name: node.shape[-1] for node in session.get_inputs() if node.name != "ws"}

    def synthesize(self, ws: Array, noises: Mapping[str, Array] | None = None) -> Array:
        fitting = SYNTHESIS_PIXELS // self.bundle.generator.resolution**2
        return decode(self, ws, noises, min(max(fitting, 1), SYNTHESIS_ROWS))


def open_bundle(bundle: Bundle, *, threads: int = 0, precision: str | None = None) -> OnnxRuntime:
    return OnnxRuntime(bundle, threads)
