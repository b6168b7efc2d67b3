"""The kernels of a solve on the simulated driver: the same sources, compiled for the host; every address is checked."""

import ctypes
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace

import numpy as np

from engine.bundle import Bundle
from engine.constants import Queue
from engine.cuda.compile import BLOCKS, TILES
from engine.cuda.driver import Device, Launch
from engine.cuda.engine import Engine
from engine.layout import DTYPES
from engine.runtimes import Runtime
from engine.runtimes.cuda import CudaSolving
from engine.runtimes.decoding import Buffers, Pictures
from tests import host_kernels
from tests.fake_cuda import FakeCuda
from tests.fake_launches import LaunchFacts
from tests.fake_memory import Violation, viewed

# Fields of Solve that may be null: what a flow in W, or one without labels or heads on z, does not have.
MAY_BE_NULL = {"combined", "embedding", "hidden", "input", "state", "trial_w", "truncated", "cotangent", "pulled"}


class DeviceOf(FakeCuda):
    """operand   bytes of a number that is multiplied"""

    def __init__(self, precision: str):
        super().__init__()
        self.operand = 2 if precision == "fp16" else 4


def fake_cuda(precision: str = "fp32") -> DeviceOf:
    """A driver that knows the kernels of a solve."""
    library, fake = host_kernels.library("float", precision), DeviceOf(precision)

    def kernel(name: str) -> Callable:
        function, check = getattr(library, f"host_{name}"), check_level if name in TILES else check_solve
        function.argtypes, function.restype = [ctypes.c_void_p], None

        def run(launch: LaunchFacts, address: int) -> None:
            found = check(fake, name, launch, address)
            function(address)
            if name == "turnover_while":
                queue = view(found["queue"], np.int32, len(Queue))
                fake.set_condition(int(found["conditional"]), int(queue[Queue.GOES_ON]))

        return run

    names = ("normalise", "tape", "cotangents", "pullback", "gauss_newton", "runge_kutta", "turnover", "turnover_while")
    tiles = [name for name in TILES if hasattr(library, f"host_{name}")]  # float32 has none with wgmma
    fake.kernels.update({name: kernel(name) for name in (*names, *tiles)})
    pixels = library.host_pixels_f32
    pixels.argtypes, pixels.restype = [ctypes.c_void_p] * 2 + [ctypes.c_int] * 3, None
    fake.kernels["pixels_f32"] = lambda launch, *arguments: pixels(*arguments)
    return fake


def view(address: int, dtype: np.dtype | type, count: int) -> np.ndarray:
    return viewed(int(address), count * np.dtype(dtype).itemsize).view(dtype)


def check_pointers(fake: FakeCuda, record: np.void, may_be_null: set[str]) -> None:
    for name in record.dtype.names or ():
        if record.dtype[name] == np.uint64 and name != "conditional":
            if record[name]:
                fake.block(int(record[name]))
            elif name not in may_be_null:
                raise Violation(f"the field {name} of a struct was not set")


def check_solve(fake: FakeCuda, name: str, launch: LaunchFacts, address: int) -> np.void:
    """Every address that the struct holds is live, and the grid has a block for every row and slot."""
    solve = view(address, DTYPES["Solve"], 1)[0]
    check_pointers(fake, solve, MAY_BE_NULL)
    rows, slots = launch.grid[:2]
    wanted = (1, 1) if name.startswith("turnover") else (int(solve["capacity"]), 1)
    if name in ("cotangents", "pullback"):
        wanted = wanted[0], int(solve["slots"])
    if rows != wanted[0] or slots < wanted[1]:
        raise Violation(f"{name} was given a grid of {launch.grid}, and needs {wanted}")
    return solve


def check_level(fake: DeviceOf, name: str, launch: LaunchFacts, address: int) -> None:
    level = view(address, DTYPES["Level"], 1)[0]
    fake.block(int(level["problems"]))
    rows, columns = TILES[name]
    tiles = deepest = 0
    for problem in view(level["problems"], DTYPES["Dense"], int(level["count"])):
        names = set(problem.dtype.names or ()) - {"input", "weight"}
        check_pointers(fake, problem, names)
        tiles += -(-int(problem["n"]) // columns)
        deepest = max(deepest, int(level["rows"] * problem["each"]))
        fake.block(int(problem["weight"]), fake.operand * int(problem["n"]) * int(problem["k"]))
    if launch.grid[0] < tiles or launch.grid[1] * rows < deepest:
        raise Violation(f"{name} was given a grid of {launch.grid}: {tiles} tiles and {deepest} rows need more")


def build(source: str, *, architecture: str, precision: str):
    return SimpleNamespace(cubin=source.encode())


class LinearDecoder:
    """A decoder whose pictures are the sums of w, on the simulated device."""

    name, version, precision, rows = "linear", "0", "fp32", (2, 1)

    def __init__(self, bundle: Bundle, device: Device):
        self.device, self.buffers = device, Buffers(bundle, device, self.rows[0])
        self.addresses, self.shapes = self.buffers.addresses, self.buffers.shapes
        device.api.kernels["synthesis"] = self.run
        self.kernel = device.load(b"synthesis")("synthesis")

    def enqueue(self, rows: int) -> None:
        arguments = (
            ctypes.c_void_p(self.addresses["ws"]),
            ctypes.c_void_p(self.addresses["image"]),
            ctypes.c_int(rows),
        )
        self.device.launch(Launch("synthesis", self.kernel, (1,), 32, arguments))

    def run(self, launch: LaunchFacts, ws: int, image: int, rows: int) -> None:
        size = [rows * int(np.prod(self.shapes[name])) for name in ("ws", "image")]
        sums = view(ws, np.float32, size[0]).reshape(rows, -1).mean(axis=1)
        view(image, np.float32, size[1]).reshape(rows, -1)[:] = sums[:, None]


def open_fake(bundle: Bundle, *, precision: str = "fp32", loops: bool = True,
              capability: tuple[int, int] = (9, 0)) -> tuple[Runtime, FakeCuda]:
    """The cuda runtime on a simulated device."""
    fake = fake_cuda(precision)
    fake.capability = capability
    engine = Engine(Device(api=fake), bundle, precision, build, blocks=BLOCKS, loops=loops)
    pixels = engine.kernels.find("pixels_f32"), BLOCKS["pixels_f32"]
    pictures = Pictures(bundle, Device(api=fake), partial(LinearDecoder, bundle), pixels, name="linear", version="0",
                        precision="fp32")
    return Runtime("cuda", CudaSolving(engine), pictures), fake
