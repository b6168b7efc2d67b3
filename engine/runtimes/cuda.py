"""A GPU by our own kernels: whole solves as one CUDA graph; pictures by whoever decodes. Not yet run on a GPU."""

from collections.abc import Callable, Mapping
from functools import partial

import numpy as np
from numpy import ndarray as Array

from engine.bundle import Bundle
from engine.cuda.compile import BLOCKS, CompileError, build
from engine.cuda.driver import VERSION, Device
from engine.cuda.engine import Engine
from engine.cuda.field import CudaField, OnDevice
from engine.cuda.settings import has_kernel
from engine.errors import BackendError
from engine.runtimes.decoding import Decoder, Pictures, noise_sides, picture_precision, pictures_in
from engine.solvers import Solver


class CudaRuntime:
    """See engine.runtimes.Runtime.

    engine     the solves;  pictures: the decoder, which is opened at the first picture
    """

    device = "cuda"
    dtype = np.dtype(np.float32)
    # The kernels sum in the same order for any number of rows of one capacity, but there are several capacities.
    row_independent = False

    def __init__(self, engine: Engine, pictures: Pictures, *, name: str, version: str, precision: str):
        self.engine, self.pictures, self.name, self.version = engine, pictures, name, version
        self.bundle, self.slopes, self.precision = engine.bundle, engine.network.precision, precision

    def solver(self, solver: Solver, capacity: int) -> Solver:
        """The solver as it runs here: rows go to their end in one call if it has a kernel, else step by step."""
        return OnDevice(self.engine, solver, capacity) if has_kernel(solver) else solver

    def field(self, space: str = "z") -> CudaField:
        return CudaField(self.engine, space)

    def noise_inputs(self) -> dict[str, int]:
        return noise_sides(self.bundle)

    def synthesize(self, ws: Array, noises: Mapping[str, Array] | None = None) -> Array:
        return self.pictures.synthesize(ws, noises)

    def pixels(self, ws: Array, noises: Mapping[str, Array] | None = None) -> Array:
        return self.pictures.pixels(ws, noises)

    def close(self) -> None:
        """Free what lies on the device. The end of the process does that too."""
        self.engine.close()
        self.pictures.device.close()


def open_bundle(bundle: Bundle, *, name: str = "cuda", device: str = "cuda", threads: int = 0,
                precision: str | None = None, decoder: Callable[[Device], Decoder] | None = None,
                version: str = "") -> CudaRuntime:
    """precision   of the operands in a solve: 'fp32' (default), 'tf32' or 'fp16', always summed in float32
    decoder        makes the decoder of pictures; the default is ONNX Runtime's CUDA provider
    """
    if decoder is None:
        from engine.runtimes.onnxruntime import require_cuda

        require_cuda()  # now, and not after the first solve
    try:
        engine = Engine(Device(), bundle, precision or "fp32", build, blocks=BLOCKS)
    except CompileError as error:
        raise BackendError(f"runtime {name!r} cannot compile its kernels: {error}") from error
    # A stream of its own, so that pictures are decoded beside the next solve.
    decoder = decoder or partial(open_decoder, bundle, pictures_in(bundle, precision))
    pictures = Pictures(bundle, Device(), decoder, (engine.kernels.find("pixels_f32"), BLOCKS["pixels_f32"]))
    version = f"{f'{version} with ' if version else ''}{VERSION} on {engine.device.name}"
    drawn = picture_precision(bundle, pictures_in(bundle, precision))
    return CudaRuntime(engine, pictures, name=name, version=version, precision=drawn)


def open_decoder(bundle: Bundle, precision: str | None, device: Device) -> Decoder:
    from engine.runtimes.onnxruntime import CudaDecoder

    return CudaDecoder(bundle, device, precision=precision)
