"""Compiling a synthesis with TensorRT or TensorRT-RTX: what differs between the two, and the one code path for both."""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

from engine.errors import BackendError
from engine.runtimes import MissingRuntime, UnfitDevice

if TYPE_CHECKING:
    from engine.cuda.driver import Device

DIGITS = 16  # of a sha256 in a file's name
# The messages of a library are collected in one place, so one build at a time.
BUILDING = Lock()


@dataclass(frozen=True, slots=True)
class Library:
    """What differs between the two; all else is the same.

    package, extra   to import it, and to install it with lace-engine[extra]
    groups           compute capabilities that share a plan, which can be built anywhere. Without them a plan is built
                     on the GPU that runs it, and serves GPUs of that name only
    flags            of the builder
    """

    title: str
    package: str
    extra: str
    groups: tuple[tuple[str, ...], ...] = ()
    flags: tuple[str, ...] = ()

    @property
    def is_portable(self) -> bool:
        """A plan is finished by a compiler at run time, for the GPU and the shapes that it finds there."""
        return bool(self.groups)


LIBRARIES = {
    "tensorrt": Library("TensorRT", "tensorrt", "tensorrt"),
    # The first group is what TensorRT-RTX builds for by itself; one of them alone saves 16 bytes. There is no sm90
    # (H100, H200), and on sm75 it has no float32 matrix products, with which the graphs compute styles.
    # With the flag a context takes all its memory from us; without it, its work could not be captured.
    "tensorrt_rtx": Library("TensorRT-RTX", "tensorrt_rtx", "tensorrt-rtx",
                            groups=(("sm80", "sm86", "sm89", "sm120"), ("sm121",)),
                            flags=("REQUIRE_USER_ALLOCATION",)),
}


@dataclass(frozen=True, slots=True)
class Plan:
    """All that a compiled synthesis depends on.

    library     a name of LIBRARIES, with its version
    target      compute capabilities joined by '+', or the name of a GPU
    precision   fp32, fp16 or bf16, as the graph is typed; or tf32
    rows        fewest, preferred and most of a call; all the same for a fixed shape
    graph       sha256 of the ONNX file
    """

    library: str
    version: str
    target: str
    precision: str
    rows: tuple[int, int, int]
    graph: str

    @property
    def stem(self) -> str:
        rows = "-".join(map(str, self.rows))
        return (f"synthesis.{self.library}-{self.version}.{self.target}.{self.precision}.rows{rows}"
                f".{self.graph[:DIGITS]}")

    def file(self, content: bytes) -> str:
        return f"{self.stem}.{hashlib.sha256(content).hexdigest()[:DIGITS]}.plan"


@cache
def load(library: str) -> tuple[Any, Any]:
    """The package, and the logger of all that is made with it: ``logger.errors`` has what it complained about.

    Raises MissingRuntime.
    """
    about = LIBRARIES[library]
    try:
        trt = import_module(about.package)
    except ImportError as error:
        raise MissingRuntime(f"{about.title} is not installed ({error}); install it with: "
                             f"pip install 'lace-engine[{about.extra}]'") from error

    class Messages(trt.ILogger):
        def __init__(self):
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity, message):
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.errors.append(str(message))

    return trt, Messages()


def capability(device: "Device") -> str:
    """Such as sm89."""
    return f"sm{''.join(map(str, device.capability))}"


def target(library: str, wanted: str, gpu: str = "") -> str:
    """The target of the plan that serves a compute capability such as 'sm89', on the GPU of that name.

    Raises UnfitDevice.
    """
    about = LIBRARIES[library]
    if not about.is_portable:
        return f"{re.sub('[^a-z0-9]+', '-', gpu.lower()).strip('-')}-{wanted}"
    for group in about.groups:
        if wanted in group:
            return "+".join(group)
    known = ", ".join(name for group in about.groups for name in group)
    raise UnfitDevice(f"{about.title} does not run on {wanted}{f' ({gpu})' if gpu else ''}; it runs on: {known}")


def build(plan: Plan, path: Path) -> bytes:
    """Compile the ONNX file. Types are those of the graph (strongly typed); the number of rows stays open.

    Raises BackendError, which names the node of the graph that cannot be compiled.
    """
    trt, messages = load(plan.library)
    with BUILDING:
        messages.errors.clear()
        try:
            builder = trt.Builder(messages)
        except TypeError as error:  # what its bindings make of a null pointer
            raise failed(plan, path, [*messages.errors, "is there a GPU?"]) from error
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = trt.OnnxParser(network, messages)
        if not parser.parse_from_file(str(path)) or parser.num_errors:
            raise failed(plan, path, [told(parser.get_error(i)) for i in range(parser.num_errors)])
        config = configured(builder, trt, plan)
        config.add_optimization_profile(profile(builder, network, plan, path))
        content = builder.build_serialized_network(network, config)
        if content is None:
            raise failed(plan, path, messages.errors)
        return bytes(content)


def configured(builder: Any, trt: Any, plan: Plan) -> Any:
    about, config = LIBRARIES[plan.library], builder.create_builder_config()
    if plan.precision != "tf32":  # the flag is set by default
        config.clear_flag(trt.BuilderFlag.TF32)
    for flag in about.flags:
        config.set_flag(getattr(trt.BuilderFlag, flag))
    config.max_aux_streams = 0  # one stream, ours
    if about.is_portable:
        names = plan.target.split("+")
        config.num_compute_capabilities = len(names)
        for i, name in enumerate(names):
            config.set_compute_capability(getattr(trt.ComputeCapability, name.upper()), i)
    return config


def profile(builder: Any, network: Any, plan: Plan, path: Path) -> Any:
    """Every input from the fewest to the most rows; refuses a graph whose number of rows is fixed."""
    shapes = builder.create_optimization_profile()
    for tensor in (*map(network.get_input, range(network.num_inputs)), network.get_output(0)):
        rows, *rest = tuple(tensor.shape)
        if rows != -1:
            raise failed(plan, path, [f"the number of rows of {tensor.name!r} is fixed to {rows}: export it again"])
        if tensor.is_network_input:
            shapes.set_shape(tensor.name, *((n, *rest) for n in plan.rows))
    return shapes


def told(error: Any) -> str:
    """One complaint of the parser, by the name of the node."""
    operator = error.node_operator()
    where = f"node {error.node_name()!r} ({operator})" if operator else "the file"
    return f"{where}: {error.code().name}, {error.desc()}"


def failed(plan: Plan, path: Path, reasons: Sequence[str]) -> BackendError:
    listed = "; ".join(reasons[:4]) or "no reason was given"
    title = LIBRARIES[plan.library].title
    return BackendError(f"{title} {plan.version} cannot build {path} for {plan.target} in {plan.precision}: {listed}")
