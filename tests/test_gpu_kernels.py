"""Single kernels on a real GPU against their numpy twins. Whole solves: tests/test_gpu_solve.py."""

import ctypes

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.cuda.compile import BLOCKS, SOURCE_OF, TILES, WGMMA, build, has_wgmma
from engine.errors import BackendError
from engine.layout import DTYPES, PRECISIONS, to_operand
from engine.reference import field
from engine.runtimes import to_pixels
from tests.host_kernels import KNOWN, HostSolve, struct
from tests.test_cuda_solvers import compare_tapes
from tests.test_tape import SEEDS, TREES

pytest.importorskip("cuda.bindings.driver", reason="cuda-bindings is not installed")
from benchmarks.gpu.probes import compile_probes
from engine.cuda.driver import Device, Launch

pytestmark = pytest.mark.gpu
TILE_CASES = [(tile, precision) for tile in TILES for precision in PRECISIONS
              if precision != "fp32" or SOURCE_OF[tile] != "wide"]


class Gpu:
    """Runs a kernel on copies of host arrays, and copies back what it has written."""

    def __init__(self):
        self.device = Device()
        self.modules = {}

    def kernel(self, name, precision):
        source = SOURCE_OF[name]
        if (source, precision) not in self.modules:
            architecture = WGMMA if source == "wide" else self.device.architecture
            if source == "wide" and not has_wgmma(self.device.capability, precision):
                pytest.skip("this GPU has no wgmma")
            cubin = build(source, architecture=architecture, precision=precision).cubin
            self.modules[source, precision] = self.device.load(cubin)
        return self.modules[source, precision](name)

    def run(self, name, grid, *arguments, precision="fp32", kernel=None):
        """Arguments are arrays or numbers. Records take along the arrays that they point at.

        kernel   of 256 threads, that is not one of ours
        """
        copies = {}
        addresses = [self.copy(a, copies) if isinstance(a, np.ndarray) else a for a in arguments]
        packed = [ctypes.c_void_p(a) if isinstance(b, np.ndarray) else ctypes.c_int(a)
                  for a, b in zip(addresses, arguments, strict=True)]
        found = kernel or self.kernel(name, precision)
        self.device.launch(Launch(name, found, grid, BLOCKS.get(name, 256), packed))
        for array, block in copies.values():
            if array.dtype.names is None:
                self.device.download(array, block.address)
        self.device.synchronize()

    def copy(self, array, copies):
        """The address of a copy on the device; one array has one copy."""
        source = array.ctypes.data
        if source not in copies:
            block = self.device.allocate(array.nbytes)
            copies[source] = array, block
            there = array.copy()
            for name in array.dtype.names or ():
                if array.dtype[name] == np.uint64 and name != "conditional":
                    pointers = [self.copy(KNOWN[int(p)], copies) if p else 0 for p in array[name].ravel()]
                    there[name] = np.reshape(pointers, array.shape)
            self.device.upload(block.address, there)
            self.device.synchronize()
        return copies[source][1].address


@pytest.fixture(scope="module")
def gpu():
    try:
        gpu = Gpu()
    except BackendError as error:
        pytest.skip(f"no GPU: {error}")
    yield gpu
    gpu.device.close()


def on(gpu):
    """HostSolve, but on the GPU."""

    class DeviceSolve(HostSolve):
        def run(self, kernel):
            record = struct("Solve", **self.numbers, **self.arrays)
            gpu.run(kernel, (int(record["capacity"]), max(1, int(record["slots"]))), record)

    return DeviceSolve


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(TREES, SEEDS, st.sampled_from([0.1, 1.0, 30.0]), st.sampled_from(["product", "lace"]))
def test_the_tape(gpu, condition, seed, scale, logic):
    compare_tapes(condition, seed, scale, kind=on(gpu), real=np.float32, logic=logic)


# Rows and widths on both sides of every tile's edges; k as the mapping, a head and an odd number of chunks have it.
@pytest.mark.parametrize(("tile", "precision"), TILE_CASES)
@pytest.mark.parametrize(("rows", "n", "k"), [(1, 32, 32), (16, 512, 512), (17, 96, 544), (130, 256, 384)])
def test_dense_layers(gpu, tile, precision, rows, n, k):
    """Operands are representable, so that every precision must give the sums of float32."""
    random = np.random.default_rng(rows)
    level, arrays = dense_level(random, precision, rows, n, k)
    grid = -(-(n + 64) // TILES[tile][1]), -(-3 * rows // TILES[tile][0])
    gpu.run(tile, grid, level, precision=precision)
    x, weight, bias, cotangent, back, activation = (arrays[name].astype(float) for name in ("x", "weight", "bias",
                                                    "cotangent", "back", "activation"))
    hidden = field.leaky(x @ weight.T + bias)
    slopes = (cotangent @ back.T).reshape(rows, 3, 64) * field.slope(activation)[:, None]
    close(arrays["exact"], hidden, 1e-5)
    close(arrays["out"], hidden, 1e-5 if precision == "fp32" else 1e-3)
    close(arrays["seeded"].reshape(rows, 2, n), arrays["seeds"] * field.slope(hidden)[:, None], 1e-3)
    close(arrays["slopes"].reshape(rows, 3, 64), slopes, 1e-5)


@pytest.mark.parametrize("precision", ["tf32", "fp16"])
@pytest.mark.parametrize(("rows", "n", "k"), [(300, 512, 512), (1025, 544, 96)])
def test_wgmma_gives_what_mma_gives(gpu, precision, rows, n, k):
    results = {}
    for tile in ("dense_64x32", "dense_64x64"):
        level, arrays = dense_level(np.random.default_rng(k), precision, rows, n, k)
        grid = -(-n // TILES[tile][1]) + 2, -(-3 * rows // TILES[tile][0])
        gpu.run(tile, grid, level, precision=precision)
        results[tile] = arrays
    for name in ("exact", "out", "seeded", "slopes"):
        close(results["dense_64x64"][name], results["dense_64x32"][name].astype(float), 1e-5 if name != "out" else 1e-3)


def test_the_probe_of_a_matrix_product(gpu):
    """What benchmarks/gpu/checklist.py times is the product that it says."""
    random = np.random.default_rng(2)
    weight, rows = random.normal(size=(64, 96)).astype(np.float16), random.normal(size=(8, 96)).astype(np.float16)
    found = np.zeros((8, 64), np.float32)
    cubin, _ = compile_probes(gpu.device.architecture)
    gpu.run("gemv", (4,), weight, rows, found, 96, 2, kernel=gpu.device.load(cubin)("gemv"))
    close(found, rows.astype(float) @ weight.astype(float).T, 1e-5)


def close(found, twin, tolerance):
    error = np.linalg.norm(found.astype(float) - twin) / np.linalg.norm(twin)
    assert error < tolerance
    assert np.isfinite(found).all()


def dense_level(random, precision, rows, n, k):
    """A forward layer with seeds, and a backward one with three cotangents a row."""
    operand = lambda *shape: to_operand(random.normal(size=shape), precision)  # noqa: E731
    real = lambda *shape: random.normal(size=shape).astype(np.float32)  # noqa: E731
    arrays = {
        "x": operand(rows, k), "weight": operand(n, k), "bias": real(n), "seeds": real(2, n), "out": operand(rows, n),
        "exact": real(rows, n), "seeded": operand(2 * rows, n), "cotangent": operand(3 * rows, k),
        "back": operand(64, k), "activation": operand(rows, 64), "slopes": real(3 * rows, 64),
    }
    a = arrays
    problems = np.stack([
        struct("Dense", input=a["x"], weight=a["weight"], bias=a["bias"], output=a["out"], exact=a["exact"],
               seeds=a["seeds"], seeded=a["seeded"], columns=2, n=n, k=k, each=1, leaky=1),
        struct("Dense", input=a["cotangent"], weight=a["back"], exact=a["slopes"], activation=a["activation"], n=64,
               k=k, each=3),
    ])
    assert problems.dtype == DTYPES["Dense"]
    return struct("Level", problems=problems, count=2, rows=rows), arrays


@pytest.mark.parametrize("tile", list(TILES))
def test_a_row_of_a_layer_does_not_know_its_neighbours(gpu, tile):
    results = []
    for rows in (1, 70):
        level, arrays = dense_level(np.random.default_rng(0), "fp16", 70, 64, 128)
        level["rows"] = rows
        gpu.run(tile, (-(-128 // TILES[tile][1]), -(-210 // TILES[tile][0])), level, precision="fp16")
        results.append(arrays["exact"][0])
    np.testing.assert_array_equal(*results)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_pixels(gpu, dtype):
    images = np.random.default_rng(5).uniform(-1.2, 1.2, (3, 3, 17, 31)).astype(dtype)
    images.reshape(-1)[:256] = (np.arange(256, dtype=np.float32) - 128) / np.float32(127.5)
    pixels = np.zeros((3, 17, 31, 3), np.uint8)
    name = {np.float32: "pixels_f32", np.float16: "pixels_f16"}[dtype]
    gpu.run(name, (-(-3 * 17 * 31 // BLOCKS[name]),), images, pixels, 3, 3, 17 * 31)
    np.testing.assert_array_equal(pixels, to_pixels(images.astype(np.float32)))
