"""A CUDA device through the driver API: memory, kernels, launches and graphs, every call checked.

The one file that imports cuda.bindings, of any version from 13.0 to 13.x: the names used here are the same in all of
them. Work goes to one stream per device. What is launched inside ``capture`` or ``capture_loop`` is recorded instead
of run, so a solve is written once, for the graphs and for the loop on the host.
"""

import contextlib
import ctypes
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from typing import Any

import cuda.bindings.driver as bindings
import numpy as np
from numpy import ndarray as Array

from engine.cuda.advice import advice
from engine.errors import BackendError

VERSION = f"cuda.bindings {version('cuda-bindings')}"
NON_BLOCKING, WITHOUT_TIMING = 1, 2
KIND_CUDA = 2  # of DLPack's devices
# A handle that is left at its last value would end the next launch before its first iteration.
ASSIGN_DEFAULT = 1


class NoDevice(BackendError):
    """There is no NVIDIA driver, or no GPU."""


class Device:
    """A GPU: its primary context, which torch and onnxruntime share, and one stream of ours.

    A thread calls ``activate`` before it uses the device. Raises NoDevice without a driver or a GPU; all else raises
    BackendError with the name of CUDA's error and what to do.
    """

    def __init__(self, ordinal: int = 0, api: Any = bindings):
        self.api, self.ordinal, self.kind = api, ordinal, getattr(api, "dlpack_kind", KIND_CUDA)
        try:
            self.call("cuInit", 0)
            self.handle = self.call("cuDeviceGet", ordinal)
        except Exception as error:  # without a driver cuda.bindings raises types of its own
            raise NoDevice(f"device 'cuda:{ordinal}' cannot be used: {error}") from error
        self.context = self.call("cuDevicePrimaryCtxRetain", self.handle)
        self.activate()
        self.stream = int(self.call("cuStreamCreate", NON_BLOCKING))
        self.modules: list[Any] = []
        self.memory: weakref.WeakSet[Block | Pinned] = weakref.WeakSet()
        self.is_open = True

    def call(self, name: str, *arguments: Any) -> Any:
        """A function of the driver API: its results without the code, which is checked."""
        code, *results = getattr(self.api, name)(*arguments)
        if code != self.api.CUresult.CUDA_SUCCESS:
            raise BackendError(f"{name} failed with {self.describe(code)}")
        return tuple(results) if len(results) > 1 else results[0] if results else None

    def describe(self, code: Any) -> str:
        _, name = self.api.cuGetErrorName(code)
        _, text = self.api.cuGetErrorString(code)
        name, text = (part.decode() if part else str(code) for part in (name, text))
        return ": ".join(part for part in (f"{name} ({text})", advice(name)) if part)

    def activate(self) -> None:
        self.call("cuCtxSetCurrent", self.context)

    # --- facts ---------------------------------------------------------------------------------------------------

    def attribute(self, name: str) -> int:
        """Such as MULTIPROCESSOR_COUNT, L2_CACHE_SIZE, COMPUTE_CAPABILITY_MAJOR."""
        which = getattr(self.api.CUdevice_attribute, f"CU_DEVICE_ATTRIBUTE_{name}")
        return int(self.call("cuDeviceGetAttribute", which, self.handle))

    @property
    def capability(self) -> tuple[int, int]:
        return self.attribute("COMPUTE_CAPABILITY_MAJOR"), self.attribute("COMPUTE_CAPABILITY_MINOR")

    @property
    def architecture(self) -> str:
        """What its kernels are compiled for, "sm_90"."""
        return "sm_{}{}".format(*self.capability)

    @property
    def name(self) -> str:
        return self.call("cuDeviceGetName", 128, self.handle).split(b"\0")[0].decode()

    @property
    def driver_version(self) -> str:
        number = int(self.call("cuDriverGetVersion"))
        return f"{number // 1000}.{number % 1000 // 10}"

    # --- memory --------------------------------------------------------------------------------------------------

    def allocate(self, nbytes: int) -> "Block":
        return Block(self, nbytes)

    def upload(self, target: int, source: Array) -> None:
        """On the stream: a source in ``Pinned`` memory must stay as it is until ``synchronize``."""
        self.call("cuMemcpyHtoDAsync", target, source.ctypes.data, source.nbytes, self.stream)

    def download(self, target: Array, source: int) -> None:
        """On the stream: nothing is there before ``synchronize``."""
        self.call("cuMemcpyDtoHAsync", target.ctypes.data, source, target.nbytes, self.stream)

    def move(self, target: int, source: int, nbytes: int) -> None:
        """Within the device, on the stream."""
        self.call("cuMemcpyDtoDAsync", target, source, nbytes, self.stream)

    def spread(self, target: int, pitch: int, source: int, row: int, rows: int) -> None:
        """``rows`` rows of ``row`` bytes, one behind the other, to ``pitch`` bytes apart, on the stream."""
        copy, kind = self.api.CUDA_MEMCPY2D(), self.api.CUmemorytype.CU_MEMORYTYPE_DEVICE
        copy.srcMemoryType, copy.srcDevice, copy.srcPitch = kind, source, row
        copy.dstMemoryType, copy.dstDevice, copy.dstPitch = kind, target, pitch
        copy.WidthInBytes, copy.Height = row, rows
        self.call("cuMemcpy2DAsync", copy, self.stream)

    def fill(self, target: int, nbytes: int, byte: int = 0) -> None:
        self.call("cuMemsetD8Async", target, byte, nbytes, self.stream)

    def synchronize(self) -> None:
        self.call("cuStreamSynchronize", self.stream)

    def follow(self, other: "Device") -> None:
        """What comes next on our stream starts after all that is on the other's now."""
        event = self.call("cuEventCreate", WITHOUT_TIMING)
        self.call("cuEventRecord", event, other.stream)
        self.call("cuStreamWaitEvent", self.stream, event, 0)
        self.call("cuEventDestroy", event)  # the driver frees it after it has happened

    # --- kernels -------------------------------------------------------------------------------------------------

    def load(self, cubin: bytes) -> Callable[[str], Any]:
        """A compiled module; returns a function that gives its kernels by name."""
        module = self.call("cuModuleLoadData", cubin)
        self.modules.append(module)
        return cache(lambda name: self.call("cuModuleGetFunction", module, name.encode()))

    def launch(self, launch: "Launch") -> None:
        """Run a kernel on the stream, or record it while a graph is captured."""
        config = self.api.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = (*launch.grid, 1, 1)[:3]
        config.blockDimX, config.blockDimY, config.blockDimZ = launch.block, 1, 1
        config.sharedMemBytes, config.hStream = 0, self.stream
        if launch.overlaps:
            attribute = self.api.CUlaunchAttribute()
            attribute.id = self.api.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
            attribute.value.programmaticStreamSerializationAllowed = 1
            config.attrs, config.numAttrs = [attribute], 1
        self.call("cuLaunchKernelEx", config, launch.kernel, pack(launch.arguments), 0)

    # --- graphs --------------------------------------------------------------------------------------------------

    def capture(self, work: Callable[[], None]) -> "Graph":
        """What ``work`` launches, as a graph."""
        graph = self.call("cuGraphCreate", 0)
        with self.closing_on_error(graph):
            self.record(graph, work)
            return Graph(self, graph)

    def capture_loop(self, body: Callable[[int], None]) -> "Graph":
        """A graph that repeats what ``body`` launches for as long as the condition holds at the end of a round.

        body   is given the handle of the condition; a kernel in it calls cudaGraphSetConditional(handle, 0 or 1). It
               may hold kernels, copies and fills only, of one context (CUDA programming guide, conditional nodes)
        """
        api, graph = self.api, self.call("cuGraphCreate", 0)
        with self.closing_on_error(graph):
            handle = self.call("cuGraphConditionalHandleCreate", graph, self.context, 1, ASSIGN_DEFAULT)
            parameters = api.CUgraphNodeParams()
            parameters.type = api.CUgraphNodeType.CU_GRAPH_NODE_TYPE_CONDITIONAL
            loop = parameters.conditional
            loop.handle, loop.type, loop.size = handle, api.CUgraphConditionalNodeType.CU_GRAPH_COND_TYPE_WHILE, 1
            loop.ctx = self.context
            self.call("cuGraphAddNode", graph, None, None, 0, parameters)
            self.record(loop.phGraph_out[0], lambda: body(int(handle)))
            return Graph(self, graph)

    def record(self, graph: Any, work: Callable[[], None]) -> None:
        # The garbage collector may free memory meanwhile, which the stricter modes take for a mistake.
        mode = self.api.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED
        self.call("cuStreamBeginCaptureToGraph", self.stream, graph, None, None, 0, mode)
        try:
            work()
        except BaseException:
            # The stream must leave its recording state, or nothing runs on it any more.
            self.api.cuStreamEndCapture(self.stream)
            raise
        self.call("cuStreamEndCapture", self.stream)

    @contextlib.contextmanager
    def closing_on_error(self, graph: Any) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self.api.cuGraphDestroy(graph)
            raise

    # --- time and end --------------------------------------------------------------------------------------------

    def elapsed(self, work: Callable[[], None]) -> float:
        """Milliseconds that the device takes for what ``work`` puts on the stream."""
        events = [self.call("cuEventCreate", 0) for _ in range(2)]
        try:
            self.call("cuEventRecord", events[0], self.stream)
            work()
            self.call("cuEventRecord", events[1], self.stream)
            self.call("cuEventSynchronize", events[1])
            return float(self.call("cuEventElapsedTime", *events))
        finally:
            for event in events:
                self.call("cuEventDestroy", event)

    def close(self) -> None:
        """Free all that is left. What was made on the device must not be used afterwards."""
        if not self.is_open:
            return
        self.is_open = False
        self.activate()
        self.synchronize()
        for part in list(self.memory):
            part.free()
        for module in self.modules:
            self.call("cuModuleUnload", module)
        self.call("cuStreamDestroy", self.stream)
        self.call("cuDevicePrimaryCtxRelease", self.handle)


class Block:
    """``nbytes`` of device memory, freed with the last reference, and before that by ``free``."""

    def __init__(self, device: Device, nbytes: int):
        self.device, self.nbytes = device, nbytes
        self.address = int(device.call("cuMemAlloc", max(nbytes, 1)))
        self.free = weakref.finalize(self, release, device, "cuMemFree", self.address)
        # At the end of the process the driver frees everything, and may be unloaded first.
        self.free.atexit = False
        device.memory.add(self)


class Pinned:
    """``nbytes`` of page-locked host memory, which copies need to run beside the host: ``bytes`` (nbytes,) uint8."""

    def __init__(self, device: Device, nbytes: int):
        self.address = int(device.call("cuMemHostAlloc", max(nbytes, 1), 0))
        self.bytes = np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(self.address))
        self.free = weakref.finalize(self, release, device, "cuMemFreeHost", self.address)
        self.free.atexit = False
        device.memory.add(self)


def release(device: Device, function: str, address: int) -> None:
    device.activate()
    device.call(function, address)


class Graph:
    """Instantiated and on the device. It does not keep the memory that its kernels read."""

    def __init__(self, device: Device, graph: Any):
        self.device, self.graph = device, graph
        self.executable = device.call("cuGraphInstantiate", graph, 0)
        device.call("cuGraphUpload", self.executable, device.stream)

    def launch(self) -> None:
        self.device.call("cuGraphLaunch", self.executable, self.device.stream)

    def close(self) -> None:
        self.device.call("cuGraphExecDestroy", self.executable)
        self.device.call("cuGraphDestroy", self.graph)


@dataclass(frozen=True, slots=True)
class Launch:
    """One kernel with its arguments.

    grid        blocks in x and y;  block: threads
    arguments   ctypes numbers; addresses as c_void_p
    overlaps    it may start before its predecessor has ended, and waits itself (griddepcontrol.wait)
    """

    name: str
    kernel: Any
    grid: tuple[int, ...]
    block: int
    arguments: Sequence[Any]
    overlaps: bool = False


def pack(arguments: Sequence[Any]) -> tuple[tuple, tuple]:
    """As cuda.bindings takes a kernel's arguments: values and types."""
    return tuple(a.value or 0 for a in arguments), tuple(type(a) for a in arguments)
