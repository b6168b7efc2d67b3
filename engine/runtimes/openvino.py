"""Pictures by OpenVINO's CPU plugin, in float32 or bfloat16; the field by our own kernels, or else by ONNX Runtime."""

import sys
from collections.abc import Mapping
from pathlib import Path
from threading import Lock

# Importing openvino reports to its makers over the network, from a process that it forks. Without this package it uses
# a stub of its own instead.
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
import openvino as ov
from numpy import ndarray as Array

from engine.bundle import Bundle
from engine.errors import BackendError
from engine.forks import abandon, remember
from engine.runtimes import Drawing, MissingRuntime, Runtime, Solving, warn_slow
from engine.runtimes.native import NativeSolving
from engine.runtimes.onnxruntime import Graphs, OnnxSolving, decode

# Without one of these instructions the plugin emulates bfloat16 on AVX-512, slower than float32.
NATIVE_BF16 = {"avx512_bf16", "amx_bf16", "avx_ne_convert"}


class OpenVinoDrawing(Drawing):
    """Pictures one by one, in float32 or, where the processor has it, in bfloat16."""

    name, version = "openvino", ov.__version__.partition("-")[0]

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
        remember(self)

    def after_fork(self) -> None:
        """A compiled model has threads of its own."""
        abandon((self.core, self.model, self.idle))
        self.core, self.lock, self.model, self.idle = ov.Core(), Lock(), None, []

    def draw(self, feeds: Mapping[str, Array]) -> Array:
        model = self.compiled()
        # A request holds the memory of one call: threads that call at once need one each.
        try:
            request = self.idle.pop()
        except IndexError:
            request = model.create_infer_request()
        try:
            (image,) = request.infer(dict(feeds), share_inputs=True).values()
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:400]
            raise BackendError(f"openvino {self.version} cannot draw with {self.bundle.path}: {reason}") from error
        self.idle.append(request)
        return image

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

    def noise_inputs(self) -> dict[str, int]:
        inputs = {node.get_any_name(): node.shape[-1] for node in self.compiled().inputs}
        return {name: side for name, side in inputs.items() if name != "ws"}

    def synthesize(self, ws: Array, noises: Mapping[str, Array] | None = None) -> Array:
        return decode(self.bundle, self.draw, self.noise_inputs(), ws, noises, rows=1)


def open_solving(bundle: Bundle, threads: int, precision: str) -> Solving:
    """What runs the field. Raises BackendError if only our own kernels can do it and they were not built."""
    is_half = precision == "bf16-jacobian"
    try:
        return NativeSolving(bundle, threads, precision if is_half else "fp32")
    except MissingRuntime as error:
        if is_half:
            raise
        warn_slow(str(error))
        return OnnxSolving(Graphs(bundle, threads))


def has_bf16(core: ov.Core) -> bool:
    """Whether the plugin knows bfloat16 here and the processor has instructions for it (only Linux says that)."""
    if "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        return False
    processor = Path("/proc/cpuinfo")
    return not processor.exists() or not NATIVE_BF16.isdisjoint(processor.read_text().split())


def open_bundle(bundle: Bundle, *, name: str, device: str, threads: int, precision: str | None) -> Runtime:
    precision = precision or "fp32"
    drawing = OpenVinoDrawing(bundle, threads, precision)
    return Runtime(name, open_solving(bundle, threads, precision), drawing)
