"""TensorRT and TensorRT-RTX: pictures by a plan of the bundle's synthesis. Our kernels solve.

One code path for both; what differs is in engine/runtimes/compiling.py. Not yet run on a GPU.
"""

import logging
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.bundle import Bundle
from engine.errors import BackendError
from engine.folders import write_atomically
from engine.runtimes import Runtime
from engine.runtimes.compiling import LIBRARIES, capability, load
from engine.runtimes.decoding import IMAGE, ROWS, Buffers, pictures_in, sizes
from engine.runtimes.plans import folder, obtain, plan_of, target_on

if TYPE_CHECKING:
    from engine.cuda.driver import Device

log = logging.getLogger(__name__)


class TensorRtDecoder:
    """See engine.runtimes.decoding.Decoder. Opening it may build a plan, which takes seconds or minutes.

    library     'tensorrt' or 'tensorrt_rtx'
    precision   None, or 'tf32' where the graph is float32
    rows        fewest, preferred and most of a call; all the same for a plan of a fixed shape

    Raises MissingRuntime, and BackendError with the library's own complaint.
    """

    def __init__(self, bundle: Bundle, library: str, device: "Device", *, precision: str | None = None,
                 rows: tuple[int, int, int] = ROWS):
        self.bundle, self.device, self.about = bundle, device, LIBRARIES[library]
        self.gpu = capability(device)
        self.trt, self.messages = load(library)
        self.plan = plan_of(bundle, library, target_on(library, device), precision=precision, rows=rows)
        self.name, self.version, self.precision = library, self.plan.version, self.plan.precision
        self.runtime = self.trt.Runtime(self.messages)
        self.engine = self.open_engine()
        self.rows = sizes(rows[0], rows[2])
        self.buffers = Buffers(bundle, device, self.rows[0])
        self.addresses = self.buffers.addresses
        # Activations of the largest call. Calls follow each other on one stream, so all contexts share them.
        self.memory = device.allocate(self.engine.device_memory_size_v2)
        # A graph does not keep what it was captured from.
        self.contexts: list[Any] = []
        self.calls: dict[int, Callable[[], None]] = {}

    def open_engine(self) -> Any:
        """The plan on the device. One that the library refuses, after an update of the driver say, is built again."""
        self.messages.errors.clear()
        engine = self.runtime.deserialize_cuda_engine(obtain(self.bundle, self.plan))
        if engine is None:
            log.warning("%s refuses its plan of %s: it is built again", self.about.title, self.bundle.path.name)
            engine = self.runtime.deserialize_cuda_engine(obtain(self.bundle, self.plan, anew=True))
        if engine is None:
            raise self.failure("cannot open the plan that it built")
        return engine

    def failure(self, what: str) -> BackendError:
        reasons = "; ".join(self.messages.errors[:4]) or "no reason was given"
        return BackendError(f"{self.about.title} {self.version} {what} on {self.device.name} ({self.gpu}): {reasons}")

    def enqueue(self, rows: int) -> None:
        if rows not in self.calls:
            self.calls[rows] = self.prepare(rows)
        self.calls[rows]()

    def prepare(self, rows: int) -> Callable[[], None]:
        """A call for ``rows`` rows, with its own context, whose shapes and addresses never change."""
        context = self.open_context()
        context.set_device_memory(self.memory.address, self.engine.device_memory_size_v2)
        for name, shape in self.buffers.shapes.items():
            if not context.set_tensor_address(name, self.addresses[name]):
                raise self.failure(f"has no tensor {name!r}")
            if name != IMAGE and not context.set_input_shape(name, (rows, *shape)):
                raise self.failure(f"does not take {rows} rows of {name!r}")

        def run() -> None:
            if not context.execute_async_v3(self.device.stream):
                raise self.failure(f"failed to decode {rows} rows")

        # What is set up or compiled at the first run must not happen while a graph is captured.
        self.messages.errors.clear()
        run()
        self.device.synchronize()
        if self.about.is_portable:
            self.keep_kernels()
            if not context.is_stream_capturable(self.device.stream):
                return run
        self.contexts.append(context)
        return self.device.capture(run).launch

    def open_context(self) -> Any:
        """A context whose memory is ours."""
        managed = self.trt.ExecutionContextAllocationStrategy.USER_MANAGED
        context = self.engine.create_execution_context(self.config if self.about.is_portable else managed)
        if context is None:
            raise self.failure("cannot make an execution context")
        return context

    # --- TensorRT-RTX only: the compiler behind a portable plan ------------------------------------------------------

    @cached_property
    def config(self) -> Any:
        """Kernels for a shape are compiled before its first run, and kept with the plan.

        The usual way is to start with slow kernels that fit any shape, and to exchange them when better ones are
        ready; a graph that is captured too early would keep the slow ones for ever.
        """
        trt, config = self.trt, self.engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        config.dynamic_shapes_kernel_specialization_strategy = trt.DynamicShapesKernelSpecializationStrategy.EAGER
        cache = config.create_runtime_cache()
        if self.kernels.is_file():
            cache.deserialize(self.kernels.read_bytes())  # it refuses what does not fit this GPU and driver
        config.set_runtime_cache(cache)
        return config

    @property
    def kernels(self) -> Path:
        return folder() / f"{self.plan.stem}.{self.gpu}.kernels"

    def keep_kernels(self) -> None:
        try:
            write_atomically(self.kernels, bytes(self.config.get_runtime_cache().serialize()))
        except OSError as error:
            log.warning("%s cannot be written (%s): kernels will be compiled again", self.kernels, error)


def open_bundle(bundle: Bundle, *, name: str, device: str, threads: int, precision: str | None) -> Runtime:
    """precision   of the solve, see engine.runtimes.cuda; pictures are computed as their graph is typed, or in TF32"""
    trt, _ = load(name)
    from engine.cuda.driver import Device
    from engine.runtimes import cuda

    here = Device()
    target_on(name, here)  # a GPU that the library does not know is refused now, not at the first picture
    here.close()

    def decoder(gpu: "Device") -> TensorRtDecoder:
        return TensorRtDecoder(bundle, name, gpu, precision=pictures_in(bundle, precision))

    return cuda.open_bundle(bundle, name=name, device=device, threads=threads, precision=precision, decoder=decoder,
                            drawer=name, version=trt.__version__)
