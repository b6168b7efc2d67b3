"""A GPU by our own kernels: whole solves as one CUDA graph; pictures by whoever decodes. Not yet run on a GPU."""

from collections.abc import Callable
from functools import partial

import numpy as np

from engine.bundle import Bundle
from engine.cuda.compile import BLOCKS, CompileError, build
from engine.cuda.driver import VERSION, Device
from engine.cuda.engine import Engine
from engine.cuda.field import CudaField, OnDevice
from engine.cuda.settings import has_kernel
from engine.errors import BackendError
from engine.runtimes import Runtime, Solving
from engine.runtimes.decoding import Decoder, Pictures, picture_precision, pictures_in
from engine.solvers import Solver
from engine.spaces import Space


class CudaSolving(Solving):
    """``engine`` does the solves; their name is that of the library that draws, which the user chose."""

    name, device = "cuda", "cuda"
    dtype = np.dtype(np.float32)
    # The kernels sum in the same order for any number of rows of one capacity, but there are several capacities.
    row_independent = False

    def __init__(self, engine: Engine):
        self.engine, self.jacobian = engine, engine.network.precision
        self.version = f"{VERSION} on {engine.device.name}"

    def solver(self, solver: Solver, capacity: int) -> Solver:
        """Rows go to their end in one call if the solver has a kernel, else step by step."""
        return OnDevice(self.engine, solver, capacity) if has_kernel(solver) else solver

    def room(self, solver: Solver, capacity: int) -> int:
        return OnDevice.room if has_kernel(solver) else capacity

    def on_device(self, solver: Solver, capacity: int) -> OnDevice:
        return OnDevice(self.engine, solver, capacity) if has_kernel(solver) else super().on_device(solver, capacity)

    def field(self, space: Space) -> CudaField:
        return CudaField(self.engine, space)

    def close(self) -> None:
        self.engine.close()


def open_bundle(bundle: Bundle, *, name: str = "cuda", device: str = "cuda", threads: int = 0,
                precision: str | None = None, decoder: Callable[[Device], Decoder] | None = None,
                drawer: str = "onnxruntime", version: str = "") -> Runtime:
    """precision   of the operands in a solve: 'fp32' (default), 'tf32' or 'fp16', always summed in float32
    decoder        makes the decoder of pictures, of the library ``drawer``; the default is ONNX Runtime's CUDA provider
    """
    if decoder is None:
        from engine.runtimes.onnxruntime import VERSION as ONNX_VERSION
        from engine.runtimes.onnxruntime import require_cuda

        require_cuda()  # now, and not after the first solve
        version = ONNX_VERSION
    try:
        engine = Engine(Device(), bundle, precision or "fp32", build, blocks=BLOCKS)
    except CompileError as error:
        raise BackendError(f"runtime {name!r} cannot compile its kernels: {error}") from error
    make = decoder or partial(open_decoder, bundle, pictures_in(bundle, precision))
    kernel = engine.kernels.find("pixels_f32"), BLOCKS["pixels_f32"]
    drawn = picture_precision(bundle, pictures_in(bundle, precision))
    # A stream of its own, so that pictures are decoded beside the next solve.
    drawing = Pictures(bundle, Device(), make, kernel, name=drawer, version=version, precision=drawn)
    return Runtime(name, CudaSolving(engine), drawing)


def open_decoder(bundle: Bundle, precision: str | None, device: Device) -> Decoder:
    from engine.runtimes.onnxruntime import CudaDecoder

    return CudaDecoder(bundle, device, precision=precision)
