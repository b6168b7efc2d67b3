"""OpenVINO's CPU plugin for the graphs that it runs faster, in float32 or bfloat16; ONNX Runtime for the others."""

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
from engine.runtimes.onnxruntime import GraphField, OnnxRuntime, decode

# The graphs that OpenVINO runs, by precision; in that precision. It can run all of them, but for mapping and heads its
# calls cost 0.1 ms more than ONNX Runtime's, and in float32 the products themselves are no faster. Nor would bfloat16
# do for them: targets are sharp (sigma 0.1), and logits came out wrong by a tenth of their range. The pullback only
# turns cotangents into rows of the Jacobian, whose errors the step control sees: mean energies stay the same. That pays
# for many rows: solves of 64 rows took 0.85 of the processor time with 3 attributes and 0.74 with 12, of one row 1.2
# times (one thread, AVX-512 without AMX). It is a choice, because a row's bits must not depend on how many there are.
GRAPHS = {"fp32": ("synthesis",), "bf16": ("synthesis",), "bf16-jacobian": ("synthesis", "pullback")}
# Without one of these instructions the plugin emulates bfloat16 on AVX-512, slower than float32.
NATIVE_BF16 = {"avx512_bf16", "amx_bf16", "avx_ne_convert"}


class OpenVinoRuntime:
    name, device = "openvino", "cpu"
    version = f"{ov.__version__.partition('-')[0]} with onnxruntime {OnnxRuntime.version}"
    dtype = np.dtype(np.float32)
    # Products sum in the same order whatever the number of rows, and pictures are decoded one by one; tests check it.
    row_independent = True

    def __init__(self, bundle: Bundle, threads: int, precision: str):
        half = precision != "fp32"
        self.bundle, self.precision = bundle, "bf16" if half else "fp32"
        self.is_fused = "pullback" not in GRAPHS[precision]
        self.slopes = "fp32" if self.is_fused else self.precision
        self.core, self.lock = ov.Core(), Lock()
        if half and not has_bf16(self.core):
            raise BackendError(f"precision {precision!r}: this processor has no bfloat16 instructions, without which "
                               "it is slower than fp32: leave precision out")  # fmt: skip
        self.options = {"PERFORMANCE_HINT": "LATENCY", "ENABLE_CPU_PINNING": False, "INFERENCE_NUM_THREADS": threads,
                        "INFERENCE_PRECISION_HINT": "bf16" if half else "f32"}  # fmt: skip
        self.models: dict[str, ov.CompiledModel] = {}
        self.requests: dict[str, list[ov.InferRequest]] = {graph: [] for graph in GRAPHS[precision]}
        self.others = OnnxRuntime(bundle, threads)

    def run(self, graph: str, feeds: Mapping[str, Array]) -> dict[str, Array]:
        if graph not in self.requests:
            return self.others.run(graph, feeds)
        idle, model = self.requests[graph], self.model(graph)
        # A request holds the memory of one call: threads that call at once need one each.
        try:
            request = idle.pop()
        except IndexError:
            request = model.create_infer_request()
        answer = request.infer(dict(feeds), share_inputs=True)
        idle.append(request)
        return {name: value for output, value in answer.items() for name in output.get_names()}

    def model(self, graph: str) -> ov.CompiledModel:
        """The compiled model of a graph, made at its first use."""
        with self.lock:
            if graph not in self.models:
                self.models[graph] = self.open(graph)
            return self.models[graph]

    def open(self, graph: str) -> ov.CompiledModel:
        path = self.bundle.graph(graph)
        try:
            model = self.core.read_model(path)
            if graph == "synthesis":
                # One row of known shape. More rows a call are no faster per picture on a CPU, and with unknown shapes
                # the plugin plans worse: 4 rows of 64 pixels took 7 ms in fp32 one way, 16 ms the other (one thread).
                model.reshape({node.get_any_name(): [1, *list(node.get_partial_shape())[1:]] for node in model.inputs})
            return self.core.compile_model(model, "CPU", self.options)
        except RuntimeError as error:
            raise BackendError(f"openvino {self.version} cannot open {path}: {error}") from error

    def field(self, space: str = "z") -> GraphField:
        return GraphField(self, space)

    def noise_inputs(self) -> dict[str, int]:
        inputs = {node.get_any_name(): node.shape[-1] for node in self.model("synthesis").inputs}
        return {name: side for name, side in inputs.items() if name != "ws"}

    def synthesize(self, ws: Array, noises: Mapping[str, Array] | None = None) -> Array:
        return decode(self, ws, noises, rows=1)


def has_bf16(core: ov.Core) -> bool:
    """Whether the plugin knows bfloat16 here and the processor has instructions for it (only Linux says that)."""
    if "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        return False
    processor = Path("/proc/cpuinfo")
    return not processor.exists() or not NATIVE_BF16.isdisjoint(processor.read_text().split())


def open_bundle(bundle: Bundle, *, name: str, device: str, threads: int, precision: str | None) -> OpenVinoRuntime:
    return OpenVinoRuntime(bundle, threads, precision or "fp32")
