"""TensorRT and TensorRT-RTX without a GPU: stands in for the package and decodes with ONNX Runtime.

A plan is the path of its graph. A context works on the memory of tests/fake_cuda.py, in the order of its stream. What
the real one would answer with a wrong picture or a crash raises Violation: a call before shapes, addresses and memory
are set, a first run inside a capture, rows outside the profile, memory that is too small.
"""

import json
import sys
from enum import Enum
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime

from engine.runtimes.compiling import load
from tests.fake_cuda import FakeCuda
from tests.fake_memory import Violation, viewed

ACTIVATIONS = 4096  # bytes that a context asks for
TRUE_SESSION = onnxruntime.InferenceSession


def on_the_host(path: str) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return TRUE_SESSION(path, options, providers=["CPUExecutionProvider"])


def run_onnx(session: Any, rows: int, shapes: dict[str, tuple[int, ...]], addresses: dict[str, int]) -> None:
    """Decode what lies at the inputs' addresses, to the address of the image. ``shapes`` are those of one row."""
    arrays = {}
    for name, shape in shapes.items():
        count = rows * int(np.prod(shape))
        arrays[name] = viewed(addresses[name], 4 * count).view(np.float32).reshape(rows, *shape)
    arrays["image"][:] = session.run(["image"], {name: a for name, a in arrays.items() if name != "image"})[0]


class Tensor:
    is_network_input = True

    def __init__(self, value: onnx.ValueInfoProto):
        self.name = value.name
        self.shape = [d.dim_value or -1 for d in value.type.tensor_type.shape.dim]


class Ada(FakeCuda):
    """A GPU that both libraries know."""

    def cuDeviceGetName(self, length: int, device):
        return self.CUresult.CUDA_SUCCESS, b"NVIDIA L40S\0"

    def cuDeviceGetAttribute(self, which, device):
        found = {"COMPUTE_CAPABILITY_MAJOR": 8, "COMPUTE_CAPABILITY_MINOR": 9}
        return self.CUresult.CUDA_SUCCESS, found[which.name.removeprefix("CU_DEVICE_ATTRIBUTE_")]


def package(cuda: FakeCuda, *, portable: bool, capturable: bool = True) -> SimpleNamespace:
    """The module ``tensorrt``, or with ``portable`` ``tensorrt_rtx``. ``capturable``: what a context says of itself.

    Its ``builds`` lists what was built, ``refused`` holds plans that it does not open, ``runs`` counts decodes.
    """
    fake = SimpleNamespace(builds=[], refused=set(), runs=[], __version__="0.1")

    class Names(dict):
        def __getattr__(self, name: str) -> str:
            return name

    class ILogger:
        ERROR, INTERNAL_ERROR, WARNING = "error", "internal error", "warning"

    class Network:
        def __init__(self):
            self.inputs, self.outputs, self.path = [], [], ""
            self.get_input, self.get_output = self.inputs.__getitem__, self.outputs.__getitem__

        @property
        def num_inputs(self) -> int:
            return len(self.inputs)

    class OnnxParser:
        num_errors = 0

        def __init__(self, network: Network, logger: ILogger):
            self.network = network

        def parse_from_file(self, path: str) -> bool:
            graph, network = onnx.load(path).graph, self.network
            network.path = path
            network.inputs += map(Tensor, graph.input)
            network.outputs += map(Tensor, graph.output)
            network.outputs[0].is_network_input = False
            return True

    class Profile:
        def __init__(self):
            self.shapes: dict[str, tuple] = {}

        def set_shape(self, name: str, *shapes: tuple) -> None:
            self.shapes[name] = shapes

    class Config:
        def __init__(self):
            self.flags, self.capabilities, self.profile = {"TF32"}, [], Profile()
            self.set_flag, self.clear_flag = self.flags.add, self.flags.discard
            self.num_compute_capabilities, self.max_aux_streams = 0, 4

        def set_compute_capability(self, name: str, index: int) -> None:
            self.capabilities.append(name)

        def add_optimization_profile(self, profile: Profile) -> None:
            self.profile = profile

    class Builder:
        create_builder_config, create_optimization_profile = staticmethod(Config), staticmethod(Profile)

        def __init__(self, logger: ILogger):
            pass

        def create_network(self, flags: int) -> Network:
            if flags != 1:
                raise Violation("TensorRT 10 would choose types by itself")
            return Network()

        def build_serialized_network(self, network: Network, config: Config) -> bytes:
            fake.builds.append(config)
            rows = [shape[0] for shape in config.profile.shapes["ws"]]
            return json.dumps({"path": network.path, "rows": rows, "build": len(fake.builds)}).encode()

    class Context:
        def __init__(self, engine: "Engine"):
            self.engine, self.rows, self.addresses, self.has_run, self.size = engine, {}, {}, False, 0

        def set_device_memory(self, address: int, size: int) -> None:
            cuda.block(address, size)
            self.size = size

        def set_tensor_address(self, name: str, address: int) -> bool:
            cuda.block(address)
            self.addresses[name] = address
            return name in self.engine.shapes

        def set_input_shape(self, name: str, shape: tuple) -> bool:
            self.rows[name] = shape[0]
            fewest, _, most = self.engine.profile
            return shape[1:] == self.engine.shapes[name] and fewest <= shape[0] <= most

        def is_stream_capturable(self, stream: int) -> bool:
            return capturable

        def execute_async_v3(self, stream: int) -> bool:
            is_recording = cuda.of("stream", stream).captured is not None
            if is_recording and not self.has_run:
                raise Violation("the first run allocates and compiles: it cannot be captured")
            if len(set(self.rows.values())) != 1 or self.addresses.keys() != self.engine.shapes.keys():
                raise Violation("a shape or an address is not set")
            if self.size < self.engine.device_memory_size_v2:
                raise Violation("the context has no memory")
            self.has_run = True
            rows, addresses = self.rows["ws"], dict(self.addresses)

            def run() -> None:
                for name, shape in self.engine.shapes.items():
                    cuda.block(addresses[name], 4 * rows * int(np.prod(shape)))
                fake.runs.append(rows)
                run_onnx(self.engine.session, rows, self.engine.shapes, addresses)

            cuda.add(stream, "kernel", run)
            return True

    class RuntimeCache:
        content = b""

        def deserialize(self, content: bytes) -> bool:
            self.content = content
            return True

        def serialize(self) -> bytes:
            return self.content + b"kernels;"

    class RuntimeConfig:
        dynamic_shapes_kernel_specialization_strategy = "LAZY"

        def __init__(self):
            self.strategy, self.cache = "STATIC", None

        def set_execution_context_allocation_strategy(self, strategy: str) -> None:
            self.strategy = strategy

        create_runtime_cache = staticmethod(RuntimeCache)

        def set_runtime_cache(self, cache: RuntimeCache) -> bool:
            self.cache = cache
            return True

        def get_runtime_cache(self) -> Any:
            return self.cache

    class Engine:
        device_memory_size_v2 = ACTIVATIONS

        def __init__(self, content: bytes):
            facts = json.loads(content)
            self.profile, self.session = facts["rows"], on_the_host(facts["path"])
            nodes = (*self.session.get_inputs(), *self.session.get_outputs())
            self.shapes = {node.name: tuple(node.shape[1:]) for node in nodes}

        create_runtime_config = staticmethod(RuntimeConfig)

        def create_execution_context(self, how: Any) -> Context:
            if (how.strategy if portable else how) != "USER_MANAGED":
                raise Violation("the context would allocate memory of its own")
            if portable and how.dynamic_shapes_kernel_specialization_strategy != "EAGER":
                raise Violation("a graph would keep kernels that were to be exchanged later")
            return Context(self)

    class Runtime:
        def __init__(self, logger: Any):
            self.logger = logger

        def deserialize_cuda_engine(self, content: bytes) -> Engine | None:
            if content in fake.refused or b"path" not in content:
                self.logger.log(ILogger.ERROR, "this plan is of another driver")
                return None
            return Engine(content)

    names = Names()
    fake.BuilderFlag = fake.ComputeCapability = fake.ExecutionContextAllocationStrategy = names
    fake.DynamicShapesKernelSpecializationStrategy = names
    fake.NetworkDefinitionCreationFlag = Enum("NetworkDefinitionCreationFlag", {"STRONGLY_TYPED": 0}, type=int)
    for part in (ILogger, Network, OnnxParser, Profile, Config, Builder, Context, RuntimeCache, RuntimeConfig, Engine,
                 Runtime):
        setattr(fake, part.__name__, part)
    return fake


def install(monkeypatch, cuda: FakeCuda, name: str, **options) -> SimpleNamespace:
    """Put a stand-in in the place of ``tensorrt`` or ``tensorrt_rtx``."""
    fake = package(cuda, portable=name == "tensorrt_rtx", **options)
    monkeypatch.setitem(sys.modules, name, fake)
    load.cache_clear()
    return fake
