"""Pictures by OpenVINO's CPU plugin, in float32 or bfloat16; the field by our own kernels, or else by ONNX Runtime."""

import sys
from collections.abc import Mapping
from pathlib import Path
from threading import Lock

import numpy as np

# Importing openvino reports to its makers over the network, from a process that it forks. Without this package it uses
# a stub of its own instead.
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
import openvino as ov
from numpy import ndarray as Array

from engine.bundle import Bundle
from engine.errors import BackendError
from engine.runtimes import Field, MissingRuntime
from engine.runtimes.native import NativeRuntime
from engine.runtimes.onnxruntime import OnnxRuntime, decode
from engine.solvers import Solver

# Without one of these instructions the plugin emulates bfloat16 on AVX-512, slower than float32.
NATIVE_BF16 = {"avx512_bf16", "amx_bf16", "avx_ne_convert"}


class OpenVinoRuntime:
    name, device = "openvino", "cpu"
    dtype = np.dtype(np.float32)
    # Pictures are decoded one by one; the field is another runtime's. The tests check it.
    row_independent = True

    def __init__(self, bundle: Bundle, threads: int, precision: str):
        half = precision != "fp32"
        self.bundle, self.precision = bundle, "bf16" if half else "fp32"
        self.core, self.lock = ov.Core(), Lock()
        if half and not has_bf16(self.core):
            raise BackendError(f"precision {precision!r}: this processor has no bfloat16 instructions, without which "
                               "it is slower than fp32: leave precision out")
        self.options = {"PERFORMANCE_HINT": "LATENCY", "ENABLE_CPU_PINNING": False, "INFERENCE_NUM_THREADS": threads,
                        "INFERENCE_PRECISION_HINT": "bf16" if half else "f32"}
        self.model: ov.CompiledModel | None = None
        self.idle: list[ov.InferRequest] = []
        self.solving = solving(bundle, threads, precision)
        self.slopes = self.solving.slopes
        self.version = f"{ov.__version__.partition('-')[0]} with {self.solving.name} {self.solving.version}"

    def run(self, graph: str, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """One call of the synthesis, the only graph that is run here."""
        model = self.compiled()
        # A request holds the memory of one call: threads that call at once need one each.
        try:
            request = self.idle.pop()
        except IndexError:
            request = model.create_infer_request()
        try:
            answer = request.infer(dict(feeds), share_inputs=True)
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:400]
            raise BackendError(f"openvino {ov.__version__} cannot run the graph {graph!r} of {self.bundle.path}: "
                               f"{reason}") from error
        self.idle.append(request)
        return {name: value for output, value in answer.items() for name in output.get_names()}

    def compiled(self) -> ov.CompiledModel:
        """The synthesis, compiled at its first use."""
        with self.lock:
            if self.model is None:
                self.model = self.compile(self.bundle.graph("synthesis"))
            return self.model

    def compile(self, path: Path) -> ov.CompiledModel:
        try:
            model = self.core.read_model(path)
            # One row of known shape. More rows a call are no faster per picture on a CPU, and with unknown shapes
            # the plugin plans worse: 4 rows of 64 pixels took 7 ms in fp32 one way, 16 ms the other (one thread).
            model.reshape({node.get_any_name(): [1, *list(node.get_partial_shape())[1:]] for node in model.inputs})
            return self.core.compile_model(model, "CPU", self.options)
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:400]
            raise BackendError(f"openvino {self.version} cannot open {path}: {reason}") from error

    def solver(self, solver: Solver, capacity: int) -> Solver:
        return self.solving.solver(solver, capacity) if isinstance(self.solving, NativeRuntime) else solver

    def field(self, space: str = "z") -> Field:
        return self.solving.field(space)

    def noise_inputs(self) -> dict[str, int]:
        inputs = {node.get_any_name(): node.shape[-1] for node in self.compiled().inputs}
        return {name: side for name, side in inputs.items() if name != "ws"}

    def synthesize(self, ws: Array, noises: Mapping[str, Array] | None = None) -> Array:
        return decode(self, ws, noises, rows=1)


def solving(bundle: Bundle, threads: int, precision: str) -> NativeRuntime | OnnxRuntime:
    """What runs the field. Raises BackendError if only our own kernels can do it and they were not built."""
    is_half = precision == "bf16-jacobian"
    try:
        return NativeRuntime(bundle, threads, precision if is_half else "fp32")
    except MissingRuntime:
        if is_half:
            raise
        return OnnxRuntime(bundle, threads)


def has_bf16(core: ov.Core) -> bool:
    """Whether the plugin knows bfloat16 here and the processor has instructions for it (only Linux says that)."""
    if "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        return False
    processor = Path("/proc/cpuinfo")
    return not processor.exists() or not NATIVE_BF16.isdisjoint(processor.read_text().split())


def open_bundle(bundle: Bundle, *, name: str, device: str, threads: int, precision: str | None) -> OpenVinoRuntime:
    return OpenVinoRuntime(bundle, threads, precision or "fp32")
