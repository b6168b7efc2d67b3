"""A CUDA driver that runs without a GPU: stands in for the module cuda.bindings.driver and executes graphs on the host.

Device memory is host memory, so a device pointer is a host address, and a kernel is a Python function of its arguments
(see ``KERNELS`` of the tests that use it). Everything on a stream happens at the next synchronisation and not before:
who reads too early reads poison. What a real driver would let pass, or answer with a crash far away, raises Violation:
memory used after its end, freed twice or forgotten, nodes that a conditional body may not hold, calls that end a
capture, arguments that point nowhere.
"""

import ctypes
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import count
from threading import RLock
from typing import Any

from cuda.bindings import driver as real

from tests.fake_launches import PROCESSORS, FakeLaunches, facts_of
from tests.fake_memory import Code, FakeMemory, Violation

MOST_ROUNDS = 100_000


@dataclass(slots=True)
class Node:
    kind: str
    run: Callable[[], None]
    name: str = ""
    is_ready: Callable[[], bool] = lambda: True


@dataclass(slots=True)
class Graph:
    nodes: list[Node] = field(default_factory=list)
    is_body: bool = False
    handles: dict[int, int] = field(default_factory=dict)  # of conditions: their value at launch
    bodies: dict[int, Any] = field(default_factory=dict)  # handle of a body: the list that the driver shows


@dataclass(slots=True)
class Stream:
    pending: list[Node] = field(default_factory=list)
    captured: Graph | None = None


class FakeCuda(FakeMemory, FakeLaunches):
    """kernels   what to execute: name -> function(launch, *arguments), where launch has grid and block
    fail         function of the driver: the error that it returns from now on
    refuses_overlap   launches that overlap with their predecessor cannot be recorded
    """

    capability = (9, 0)
    dlpack_kind = 1  # its arrays lie on the host, where torch's CPU build finds them

    def __init__(self, kernels: Mapping[str, Callable] | None = None):
        FakeMemory.__init__(self)
        FakeLaunches.__init__(self)
        self.kernels = dict(kernels or {})
        self.fail: dict[str, Code] = {}
        self.calls: list[str] = []
        self.launched: list[str] = []
        self.objects: dict[str, dict[int, Any]] = {k: {} for k in ("stream", "graph", "executable", "module", "event")}
        self.conditions: dict[int, int] = {}
        self.contexts, self.lock, self.refuses_overlap = 0, RLock(), False
        self.numbers = count(1 << 40, 16)

    def __getattr__(self, name: str) -> Any:
        """Types, enumerations and constants are the real ones; a function that is not below is not simulated."""
        if name.startswith("cu") and name[2:3].isupper():
            raise Violation(f"{name} is not simulated: add it to tests/fake_cuda.py")
        return getattr(real, name)

    def __getattribute__(self, name: str) -> Any:
        found = object.__getattribute__(self, name)
        if not (name.startswith("cu") and name[2:3].isupper()):
            return found
        self.calls.append(name)
        if name in self.fail:
            return lambda *_: (self.fail[name], None)

        def locked(*arguments: Any) -> Any:  # threads may call at once, as they may call the real one
            with self.lock:
                return found(*arguments)

        return locked

    # --- what the tests ask --------------------------------------------------------------------------------------

    def check_nothing_is_left(self) -> None:
        live = [m for m in self.memory if m.is_live]
        left = {kind: len(found) for kind, found in self.objects.items() if found}
        if live or left or self.contexts:
            raise Violation(f"left behind: {len(live)} blocks of memory, {left}, {self.contexts} contexts")

    def set_condition(self, handle: int, value: int) -> None:
        """What a kernel does with cudaGraphSetConditional."""
        if handle not in self.conditions:
            raise Violation(f"conditional handle {handle:#x} belongs to no graph that runs")
        self.conditions[handle] = value

    # --- context -------------------------------------------------------------------------------------------------

    def cuInit(self, flags: int):
        return (Code.CUDA_SUCCESS,)

    def cuGetErrorName(self, code):
        return Code.CUDA_SUCCESS, code.name.encode()

    def cuGetErrorString(self, code):
        return Code.CUDA_SUCCESS, b"simulated"

    def cuDriverGetVersion(self):
        return Code.CUDA_SUCCESS, 13000

    def cuDeviceGet(self, ordinal: int):
        return (Code.CUDA_SUCCESS, 0) if ordinal == 0 else (Code.CUDA_ERROR_INVALID_DEVICE, None)

    def cuDeviceGetName(self, length: int, device):
        return Code.CUDA_SUCCESS, b"Fake GPU\0"

    def cuDeviceGetAttribute(self, which, device):
        major, minor = self.capability
        found = {"COMPUTE_CAPABILITY_MAJOR": major, "COMPUTE_CAPABILITY_MINOR": minor, "L2_CACHE_SIZE": 50 * 2**20,
                 "MULTIPROCESSOR_COUNT": PROCESSORS}
        return Code.CUDA_SUCCESS, found[which.name.removeprefix("CU_DEVICE_ATTRIBUTE_")]

    def cuDevicePrimaryCtxRetain(self, device):
        self.contexts += 1
        return Code.CUDA_SUCCESS, real.CUcontext(77)

    def cuDevicePrimaryCtxRelease(self, device):
        self.contexts -= 1
        return (Code.CUDA_SUCCESS,)

    def cuCtxSetCurrent(self, context):
        if not self.contexts:
            raise Violation("the context was released")
        return (Code.CUDA_SUCCESS,)

    # --- streams and events --------------------------------------------------------------------------------------

    def made(self, kind: str, thing: Any) -> int:
        number = next(self.numbers)
        self.objects[kind][number] = thing
        return number

    def of(self, kind: str, handle: Any) -> Any:
        if int(handle) not in self.objects[kind]:
            raise Violation(f"{kind} {int(handle):#x} does not exist, or no longer")
        return self.objects[kind][int(handle)]

    def gone(self, kind: str, handle: Any) -> Any:
        thing = self.of(kind, handle)
        self.drain()
        del self.objects[kind][int(handle)]
        return thing

    def cuStreamCreate(self, flags: int):
        if flags != real.CUstream_flags.CU_STREAM_NON_BLOCKING.value:
            raise Violation("a stream that waits for the default stream cannot be captured beside torch")
        return Code.CUDA_SUCCESS, real.CUstream(self.made("stream", Stream()))

    def cuStreamDestroy(self, stream):
        if self.of("stream", stream).captured is not None:
            raise Violation("a stream was destroyed while it recorded")
        self.gone("stream", stream)
        return (Code.CUDA_SUCCESS,)

    def cuStreamSynchronize(self, stream):
        if self.of("stream", stream).captured is not None:
            raise Violation("a stream that records cannot be waited for: the capture would be lost")
        self.drain()
        return (Code.CUDA_SUCCESS,)

    def drain(self) -> None:
        """Run all that is pending, the newest stream first: who forgets to wait for another stream is too early."""
        streams = list(self.objects["stream"].values())[::-1]
        while any(stream.pending for stream in streams):
            ready = next((s for s in streams if s.pending and s.pending[0].is_ready()), None)
            if ready is None:
                raise Violation("a stream waits for an event that was never recorded")
            ready.pending.pop(0).run()

    def add(self, stream: Any, kind: str, run: Callable[[], None], name: str = ""):
        """Put work on a stream, or into the graph that it records."""
        found: Stream = self.of("stream", stream)
        if found.captured is None:
            found.pending.append(Node(kind, run, name))
        elif found.captured.is_body and kind not in ("kernel", "memcpy", "memset"):
            raise Violation(f"a conditional body may not hold a node of kind {kind}")
        else:
            found.captured.nodes.append(Node(kind, run, name))
        return (Code.CUDA_SUCCESS,)

    def cuEventCreate(self, flags: int):
        return Code.CUDA_SUCCESS, real.CUevent(self.made("event", []))

    def cuEventDestroy(self, event):
        self.of("event", event)
        del self.objects["event"][int(event)]  # what waits for it has it still
        return (Code.CUDA_SUCCESS,)

    def cuEventRecord(self, event, stream):
        marks = self.of("event", event)
        return self.add(stream, "event", lambda: marks.append(len(self.launched)))

    def cuStreamWaitEvent(self, stream, event, flags: int):
        marks, found = self.of("event", event), self.of("stream", stream)
        if found.captured is not None:
            raise Violation("a wait for another stream is not simulated in a recording")
        found.pending.append(Node("wait", lambda: None, is_ready=lambda: bool(marks)))
        return (Code.CUDA_SUCCESS,)

    def cuEventSynchronize(self, event):
        self.drain()
        return (Code.CUDA_SUCCESS,) if self.of("event", event) else (Code.CUDA_ERROR_NOT_READY,)

    def cuEventElapsedTime(self, start, end):
        """A kernel takes a millisecond here."""
        return Code.CUDA_SUCCESS, float(self.of("event", end)[-1] - self.of("event", start)[-1])

    # --- kernels -------------------------------------------------------------------------------------------------

    def cuModuleLoadData(self, image: bytes):
        return Code.CUDA_SUCCESS, real.CUmodule(self.made("module", image))

    def cuModuleUnload(self, module):
        self.gone("module", module)
        return (Code.CUDA_SUCCESS,)

    def cuModuleGetFunction(self, module, name: bytes):
        self.of("module", module)
        if name.decode() not in self.kernels:
            return Code.CUDA_ERROR_NOT_FOUND, None
        handle = next(self.numbers)
        self.functions[handle] = name.decode()
        return Code.CUDA_SUCCESS, real.CUfunction(handle)

    def cuLaunchKernelEx(self, config, function, parameters, extra):
        name = self.functions.get(int(function))
        if name is None:
            raise Violation("this is no kernel of a loaded module")
        facts = facts_of(config)
        refusal = self.refusal(function, facts)
        if refusal is not None:
            return (refusal,)
        if self.refuses_overlap and config.numAttrs and self.of("stream", config.hStream).captured is not None:
            return (Code.CUDA_ERROR_NOT_SUPPORTED,)
        values, kinds = parameters
        pointers = [value for value, kind in zip(values, kinds, strict=True) if kind is ctypes.c_void_p and value]

        def run() -> None:
            for address in pointers:
                self.block(address)
            self.launched.append(name)
            self.kernels[name](facts, *values)

        for address in pointers:
            self.block(address)
        return self.add(config.hStream, "kernel", run, name)

    # --- graphs --------------------------------------------------------------------------------------------------

    def cuGraphCreate(self, flags: int):
        return Code.CUDA_SUCCESS, real.CUgraph(self.made("graph", Graph()))

    def cuGraphDestroy(self, graph):
        for body in self.gone("graph", graph).bodies:  # they belong to their graph
            del self.objects["graph"][body]
        return (Code.CUDA_SUCCESS,)

    def cuGraphConditionalHandleCreate(self, graph, context, default: int, flags: int):
        handle = next(self.numbers)
        if flags != real.CU_GRAPH_COND_ASSIGN_DEFAULT:
            raise Violation("without its default a condition that has become 0 ends the next launch at once")
        self.of("graph", graph).handles[handle] = default
        return Code.CUDA_SUCCESS, real.CUgraphConditionalHandle(handle)

    def cuGraphAddNode(self, graph, dependencies, edges, number: int, parameters):
        found, kinds = self.of("graph", graph), real.CUgraphNodeType
        if parameters.type != kinds.CU_GRAPH_NODE_TYPE_CONDITIONAL or number:
            raise Violation("only a first conditional node is simulated here; the rest is captured")
        handle = int(parameters.conditional.handle)
        if handle not in found.handles:
            raise Violation("the handle was made for another graph")
        body = Graph(is_body=True)
        number = self.made("graph", body)
        # The driver writes the address of its list of bodies into the structure: behind handle (8), type and size (4).
        found.bodies[number] = (ctypes.c_void_p * 1)(number)
        ctypes.c_void_p.from_address(parameters.conditional.getPtr() + 16).value = ctypes.addressof(
            found.bodies[number]
        )
        found.nodes.append(Node("while", lambda: self.repeat(handle, body)))
        return Code.CUDA_SUCCESS, real.CUgraphNode(next(self.numbers))

    def repeat(self, handle: int, body: Graph) -> None:
        rounds = 0
        while self.conditions[handle]:
            for node in body.nodes:
                node.run()
            rounds += 1
            if rounds > MOST_ROUNDS:
                raise Violation("a loop on the device does not end")

    def cuStreamBeginCaptureToGraph(self, stream, graph, dependencies, edges, number: int, mode):
        found: Stream = self.of("stream", stream)
        if found.captured is not None or number:
            raise Violation("the stream records already, or the recording has dependencies, which are not simulated")
        found.captured = self.of("graph", graph)
        return (Code.CUDA_SUCCESS,)

    def cuStreamEndCapture(self, stream):
        found: Stream = self.of("stream", stream)
        if found.captured is None:
            raise Violation("the stream records nothing")
        found.captured = None
        return Code.CUDA_SUCCESS, None

    def cuGraphInstantiate(self, graph, flags: int):
        found = self.of("graph", graph)
        if found.is_body:
            raise Violation("a conditional body is instantiated with its graph")
        return Code.CUDA_SUCCESS, real.CUgraphExec(self.made("executable", found))

    def cuGraphUpload(self, executable, stream):
        self.of("executable", executable)
        return (Code.CUDA_SUCCESS,)

    def cuGraphLaunch(self, executable, stream):
        graph: Graph = self.of("executable", executable)

        def run() -> None:
            self.conditions.update(graph.handles)
            for node in graph.nodes:
                node.run()
            for handle in graph.handles:
                del self.conditions[handle]

        return self.add(stream, "graph", run)

    def cuGraphExecDestroy(self, executable):
        self.gone("executable", executable)
        return (Code.CUDA_SUCCESS,)
