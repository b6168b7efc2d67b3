"""The graphs of a bundle on ONNX Runtime: on its CPU provider, or on its CUDA provider (not yet run on a GPU)."""

import contextlib
import io
import os
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np

# From 1.30 on it writes an identity of the device into the user's cache and reports to its makers, from a thread that
# may also abort the process at its end. It reads this when it is loaded.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
import onnxruntime as ort
from numpy import ndarray as Array

from engine.bundle import FIELD, Bundle
from engine.errors import BackendError
from engine.forks import abandon, remember
from engine.onnx_file import read_bytes
from engine.onnx_rewrite import inline_weights, widen
from engine.runtimes import ALL, Drawing, Linearise, MissingRuntime, Runtime, Solving
from engine.runtimes.decoding import IMAGE, ROWS, Buffers, Pictures, noise_sides, picture_precision, sizes
from engine.runtimes.packages import check_onnxruntime, cuda_advice
from engine.spaces import Space

if TYPE_CHECKING:
    from engine.cuda.driver import Device

check_onnxruntime(ort)

VERSION = ort.__version__
CUDA = "CUDAExecutionProvider"
# What one synthesis call decodes: more rows make a CPU no faster once they are 8 or a megapixel, and cost memory.
SYNTHESIS_ROWS, SYNTHESIS_PIXELS = 8, 2**20
# An InferenceSession; its stubs say that a result may be sparse, a list or a dictionary, which ours never are.
Session = Any


class GraphField:
    """See engine.runtimes.Field. One graph for the mapping, one a head: only what a request mentions runs."""

    def __init__(self, graphs: "Graphs", space: Space):
        self.graphs, self.space = graphs, space
        self.feeds: dict[str, Array] = {}
        self.normalise = graphs.bundle.generator.normalise
        self.has_seeds_by_row = graphs.bundle.manifest.format[0] >= 2
        has_it = graphs.device == "cpu" and space.is_mapped and "linearise" in graphs.bundle.manifest.graphs
        self.linearise: Linearise | None = self.run_linearise if has_it else None

    def run_linearise(self, z: Array, psi: Array, label: Array | None, heads: Mapping[str, tuple[Array, Array]],
                      pair_row: Array, source: Array, near_row: Array, near_anchor: Array):
        """See engine.runtimes.Linearise."""
        feeds = {"z": z, "psi": psi, "pair_row": pair_row, "source": source, "near_row": near_row,
                 "near_anchor": near_anchor}
        if label is not None:
            feeds["label"] = label
        for name, head in self.graphs.bundle.heads.items():
            if head.space == "w":
                feeds[f"rows.{name}"], feeds[f"seeds.{name}"] = heads.get(name) or nobody(head.widths[-1])
        found = self.graphs.run("linearise", feeds)
        w, logits = found["w"], {name: found[f"logits.{name}"] for name in heads}
        if (lost := self.overflowing(z)) is not None:
            w[lost] = np.nan
            for name, (rows, _) in heads.items():
                logits[name][lost[rows]] = np.nan
        return w, logits, found["jacobian"]

    def forward(self, z: Array, psi: Array, label: Array | None, heads: Mapping[str, Array],
                some: Mapping[str, Array] = ALL):
        w = self.map(z, psi, label) if self.space.is_mapped else z
        found = {}
        for name, seeds in heads.items():
            x = w if self.graphs.bundle.stacks[name].space == "w" else z
            x = x[some[name]] if name in some else x
            if self.has_seeds_by_row:
                seeds = np.ascontiguousarray(np.broadcast_to(seeds, (len(x), *seeds.shape)))
            answer = self.graphs.run(f"head.{name}", {"x": x, "seeds": seeds})
            found[name] = answer["logits"], answer["slopes"]
        return w, found

    def map(self, z: Array, psi: Array, label: Array | None) -> Array:
        """w, and keep the activations that ``pullback`` reads."""
        feeds = {"z": z, "psi": psi} if label is None else {"z": z, "psi": psi, "label": label}
        found = self.graphs.run("mapping", feeds)
        hidden = {name: value for name, value in found.items() if name.startswith("hidden.")}
        self.feeds = {"z": z, "psi": psi, **hidden}
        w = found["w"]
        if (lost := self.overflowing(z)) is not None:
            w[lost] = np.nan
        return w

    def overflowing(self, z: Array) -> Array | None:
        """Rows (n,) whose sum of squares is infinite, if any: the graphs make them zero, which is finite and wrong."""
        squares = np.vecdot(z, z)
        return ~np.isfinite(squares) if self.normalise and not np.isfinite(squares).all() else None

    def pullback(self, cotangent: Array, rows: Array | None = None) -> Array:
        if not self.space.is_mapped:
            return cotangent
        feeds = self.feeds if rows is None else {name: value[rows] for name, value in self.feeds.items()}
        return self.graphs.run("pullback", {**feeds, "cotangent": cotangent})["dz"]


@cache
def nobody(logits: int) -> tuple[Array, Array]:
    """The rows and the seeds of a head that no row reads."""
    return np.zeros(0, np.int64), np.zeros((0, logits), np.float32)


def decode(bundle: Bundle, run: Callable[[Mapping[str, Array]], Array], sides: Mapping[str, int], ws: Array,
           noises: Mapping[str, Array] | None, rows: int) -> Array:
    """See engine.runtimes.Drawing.synthesize.

    run     one call of the synthesis: its inputs by name -> images
    sides   of the noise inputs;  rows: of a call
    """
    g = bundle.generator
    images = np.empty((len(ws), g.img_channels, g.resolution, g.resolution), np.float32)
    for first in range(0, len(ws), rows):
        part = slice(first, first + rows)
        n = len(ws[part])
        feeds = {k: noises[k][part] if noises else np.zeros((n, 1, r, r), np.float32) for k, r in sides.items()}
        images[part] = run({"ws": ws[part], **feeds})
    return images


def require_cuda() -> None:
    """Raises MissingRuntime if the package that is installed was built without the CUDA provider."""
    if CUDA not in ort.get_available_providers():
        raise MissingRuntime(f"onnxruntime {VERSION} has no {CUDA} here: {cuda_advice()}")


@cache
def load_libraries() -> None:
    """Load CUDA's libraries from the packages that pip installs them in, where the system's loader does not look."""
    with contextlib.redirect_stdout(io.StringIO()):  # what is missing is told by the session that needs it
        ort.preload_dlls()


def graph_content(bundle: Bundle, graph: str, *, has_bf16: bool) -> Path | bytes:
    """What a session is opened from: the graph's path, or its bytes where ONNX Runtime could not do with the file.

    It follows no symbolic link to weights, such as those of the Hugging Face Hub's cache, and its CPU provider has no
    bfloat16: such a synthesis is computed in float32, with its rounded weights.
    """
    path = bundle.graph(graph)
    if not has_bf16 and bundle.manifest.graphs[graph].get("precision") == "bf16":
        return widen(read_bytes(path))
    if bundle.is_linked and graph != "synthesis":
        return inline_weights(read_bytes(path), bundle.places[FIELD].read_bytes())
    return path


def in_short(error: Exception) -> str:
    """A message of ONNX Runtime in one line."""
    return " ".join(str(error).split())[:400]


def open_session(graph: Path | bytes, threads: int, cuda: Mapping[str, Any] | None = None, name: str = "") -> Session:
    """A session on the CPU provider; on the CUDA provider, and on that alone, where its options are given.

    name   of a graph that is given as bytes, for errors
    Raises BackendError: whatever cannot run on the provider that was asked for does not run.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    # A plan of the memory for each number of rows, kept for ever: 1.5 instead of 1.0 GB at 1024 px, and no faster.
    options.enable_mem_pattern = False
    providers: list[Any] = ["CPUExecutionProvider"]
    if cuda is not None:
        require_cuda()
        load_libraries()
        # Without these two, a node without a kernel or a library that is missing would send the work to the CPU. None
        # of our graphs has a node that belongs there: no shape is computed.
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        providers = [(CUDA, {name: str(value) for name, value in cuda.items()})]
    try:
        source = str(graph) if isinstance(graph, Path) else graph
        session = ort.InferenceSession(source, options, providers=providers, enable_fallback=0)
    except Exception as error:  # onnxruntime raises many private types
        raise BackendError(f"onnxruntime {VERSION} cannot open {name or graph}: {in_short(error)}") from error
    if cuda is not None and CUDA not in session.get_providers():
        raise BackendError(f"onnxruntime {VERSION} could not start its {CUDA}: are the CUDA 13 libraries and "
                           "the NVIDIA driver there? See: pip install 'lace-engine[gpu]'")
    return session


def cuda_options(*, tf32: bool = False, stream: int = 0, graphs: bool = False) -> dict[str, Any]:
    """Options of the CUDA provider. TF32, which it uses by default, only where it was asked for."""
    # The default search for the fastest convolution measures, and so may choose another, with other bits, every time.
    options = {"device_id": 0, "use_tf32": int(tf32), "cudnn_conv_algo_search": "HEURISTIC"}
    if stream:
        options["user_compute_stream"] = stream
    return {**options, "enable_cuda_graph": 1} if graphs else options


class CudaDecoder:
    """See engine.runtimes.decoding.Decoder. ONNX Runtime captures the graphs itself, one for each number of rows."""

    name, version = "onnxruntime", VERSION

    def __init__(self, bundle: Bundle, device: "Device", *, precision: str | None = None,
                 rows: tuple[int, ...] = sizes(ROWS[0], ROWS[-1])):
        self.rows, self.precision = rows, picture_precision(bundle, precision)
        self.buffers = Buffers(bundle, device, rows[0])
        self.addresses = self.buffers.addresses
        options = cuda_options(tf32=precision == "tf32", stream=device.stream, graphs=True)
        self.session = open_session(bundle.graph("synthesis"), 0, options)
        self.bindings: dict[int, tuple[Any, Any]] = {}

    def enqueue(self, rows: int) -> None:
        if rows not in self.bindings:
            self.bindings[rows] = self.bind(rows)
        self.session.run_with_iobinding(*self.bindings[rows])

    def bind(self, rows: int) -> tuple[Any, Any]:
        """Fixed addresses and shapes, which its captured graphs need, and the options of such a call."""
        binding = self.session.io_binding()
        for name, shape in self.buffers.shapes.items():
            bind = binding.bind_output if name == IMAGE else binding.bind_input
            bind(name, "cuda", 0, np.float32, (rows, *shape), self.addresses[name])
        options = ort.RunOptions()
        options.add_run_config_entry("gpu_graph_id", str(rows))
        options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        return binding, options


class Graphs:
    """The graphs of a bundle in sessions, each opened at its first use; several threads may run them at a time."""

    def __init__(self, bundle: Bundle, threads: int = 0, device: str = "cpu"):
        self.bundle, self.threads, self.device = bundle, threads, device
        self.sessions: dict[str, tuple[Session, list[str]]] = {}
        self.lock = Lock()
        remember(self)

    def after_fork(self) -> None:
        """Sessions have threads of their own."""
        abandon(self.sessions)
        self.sessions, self.lock = {}, Lock()

    def run(self, graph: str, feeds: Mapping[str, Array]) -> dict[str, Array]:
        session, names = self.session(graph)
        try:
            return dict(zip(names, session.run(names, feeds), strict=True))
        except Exception as error:  # onnxruntime raises many private types
            raise BackendError(f"onnxruntime {VERSION} cannot run the graph {graph!r} of {self.bundle.path}: "
                               f"{in_short(error)}") from error

    def session(self, graph: str) -> tuple[Session, list[str]]:
        """The session of a graph with its outputs' names."""
        with self.lock:
            if graph not in self.sessions:
                session = self.open(graph)
                self.sessions[graph] = session, [node.name for node in session.get_outputs()]
            return self.sessions[graph]

    def open(self, graph: str) -> Session:
        options = cuda_options() if self.device == "cuda" else None
        content = graph_content(self.bundle, graph, has_bf16=self.device == "cuda")
        return open_session(content, self.threads, options, str(self.bundle.graph(graph)))


class OnnxSolving(Solving):
    name, version, jacobian = "onnxruntime", VERSION, "fp32"
    dtype = np.dtype(np.float32)

    def __init__(self, graphs: Graphs):
        self.graphs, self.device = graphs, graphs.device
        # Each element of a product is summed in the same order whatever the number of rows; the tests check it. The
        # libraries of a GPU choose their kernels by the number of rows.
        self.row_independent = graphs.device == "cpu"

    def field(self, space: Space) -> GraphField:
        return GraphField(self.graphs, space)

    def oneshot(self, name: str, noise: Array, targets: Array | None) -> Array:
        if self.device != "cpu":
            return super().oneshot(name, noise, targets)
        return run_oneshot(self.graphs, name, noise, targets)


class OnnxDrawing(Drawing):
    """Pictures by the CPU provider."""

    name, version = "onnxruntime", VERSION

    def __init__(self, bundle: Bundle, threads: int = 0, graphs: Graphs | None = None):
        self.bundle, self.precision = bundle, picture_precision(bundle, None)
        self.graphs = graphs or Graphs(bundle, threads)

    def noise_inputs(self) -> dict[str, int]:
        return noise_sides(self.bundle)

    def synthesize(self, ws: Array, noises: Mapping[str, Array] | None = None) -> Array:
        fitting = SYNTHESIS_PIXELS // self.bundle.generator.resolution**2
        rows = min(max(fitting, 1), SYNTHESIS_ROWS)
        return decode(self.bundle, self.draw, self.noise_inputs(), ws, noises, rows)

    def draw(self, feeds: Mapping[str, Array]) -> Array:
        return self.graphs.run("synthesis", feeds)["image"]


def run_oneshot(graphs: Graphs, name: str, noise: Array, targets: Array | None) -> Array:
    """See engine.runtimes.Solving.oneshot."""
    feeds = {"noise": noise} if targets is None else {"noise": noise, "targets": targets}
    return graphs.run(f"oneshot.{name}", feeds)["latent"]


def open_bundle(bundle: Bundle, *, name: str, device: str, threads: int, precision: str | None) -> Runtime:
    graphs = Graphs(bundle, threads, device)
    if device == "cpu":
        return Runtime(name, OnnxSolving(graphs), OnnxDrawing(bundle, threads, graphs))
    require_cuda()
    from engine.cuda.driver import Device

    pictures = Pictures(bundle, Device(), lambda gpu: CudaDecoder(bundle, gpu, precision=precision),
                        name=name, version=VERSION, precision=picture_precision(bundle, precision))
    return Runtime(name, OnnxSolving(graphs), pictures)
