"""The dense layers by wgmma, on threads of the host: shared memory is read as the descriptors say, and as late as PTX
allows (kernels/host_wgmma.cuh). No GPU has run it yet."""

import ctypes
import os
from types import SimpleNamespace

import numpy as np
import pytest

from engine import Request, Sampler
from engine.cuda.compile import BLOCKS, TILES
from engine.layout import to_operand
from engine.reference import field
from engine.solvers import make_solver
from tests.host_kernels import address, compiler, library, struct
from tests.worlds import random_world

pytestmark = pytest.mark.skipif(compiler() is None and "CI" not in os.environ, reason="no C++ compiler is installed")
NAME = "dense_64x64"
PRECISIONS = ("tf32", "fp16")


class Layers:
    """A layer forwards with truncation and seeds, and one backwards with two cotangents a row, in one level.

    Widths that are not multiples of the tile, and chunks of k that go round the stages more than once.
    """

    def __init__(self, precision: str, rows: int, k: int, n: int = 96, back_n: int = 32):
        random = np.random.default_rng(k)
        operand = lambda *shape: to_operand(random.normal(size=shape), precision)  # noqa: E731
        real = lambda *shape: random.normal(size=shape).astype(np.float32)  # noqa: E731
        self.rows, self.n, self.back_n, self.k, self.precision = rows, n, back_n, k, precision
        self.given = {
            "x": operand(rows, k), "weight": operand(n, k), "bias": real(n), "average": real(n), "psi": real(rows),
            "seeds": real(2, n), "cotangent": operand(2 * rows, k), "back": operand(back_n, k),
            "activation": operand(rows, back_n),
        }
        self.found = {
            "out": operand(rows, n), "exact": real(rows, n), "truncated": operand(rows, n),
            "seeded": operand(2 * rows, n), "slopes": real(2 * rows, back_n), "rounded": operand(2 * rows, back_n),
        }
        a, b = self.given, self.found
        self.problems = np.stack([
            struct("Dense", input=a["x"], weight=a["weight"], bias=a["bias"], output=b["out"], exact=b["exact"],
                   average=a["average"], psi=a["psi"], truncated=b["truncated"], seeds=a["seeds"], seeded=b["seeded"],
                   columns=2, n=n, k=k, each=1, leaky=1),
            struct("Dense", input=a["cotangent"], weight=a["back"], output=b["rounded"], exact=b["slopes"],
                   activation=a["activation"], n=back_n, k=k, each=2),
        ])

    def run(self, kernels: ctypes.CDLL) -> None:
        """One block more than there is work for, in both directions."""
        level = struct("Level", problems=self.problems, count=2, rows=self.rows)
        tile_rows, tile_columns = TILES[NAME]
        tiles = -(-self.n // tile_columns) - (-self.back_n // tile_columns)
        for x, y in np.ndindex(tiles + 1, -(-2 * self.rows // tile_rows) + 1):
            kernels.block_dense_64x64(ctypes.c_void_p(address(level)), x, y, 32, BLOCKS[NAME] // 32)

    def worst(self) -> float:
        """The largest error against the twin, in roundings of an operand, or of float32 where nothing is rounded."""
        a = {name: array.astype(float) for name, array in self.given.items()}
        hidden = field.leaky(a["x"] @ a["weight"].T + a["bias"])
        w = a["average"] + a["psi"][:, None] * (hidden - a["average"])
        slopes = (a["cotangent"] @ a["back"].T).reshape(self.rows, 2, -1) * field.slope(a["activation"])[:, None]
        seeded = a["seeds"] * field.slope(hidden)[:, None]
        twins = {"out": hidden, "exact": w, "truncated": w, "seeded": seeded.reshape(-1, self.n),
                 "slopes": slopes.reshape(-1, self.back_n), "rounded": slopes.reshape(-1, self.back_n)}
        errors = []
        for name, twin in twins.items():
            digit = 1e-5 if name in ("exact", "slopes") else 1e-3
            gap = np.abs(self.found[name].astype(float) - twin).max()
            errors.append(gap / np.abs(twin).max() / digit)
        return float(np.max(errors))  # NaN if there is one


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("rows", "k"), [(70, 416), (3, 32), (64, 96)])
def test_a_block_gives_what_its_layers_define(precision, rows, k):
    layers = Layers(precision, rows, k)
    layers.run(library("float", precision, parts=("wide",)))
    assert layers.worst() < 1


FAULTS = {
    "offsets exchanged": (
        "wgmma.cuh",
        "along_k = CORE, along_rows = PIECES * CORE",
        "along_k = PIECES * CORE, along_rows = CORE",
    ),
    "half of k": ("wgmma.cuh", "#define STEP (2 * CORE)", "#define STEP CORE"),
    "swizzled": ("wgmma.cuh", "return (address", "return 1ull << 62 | (address"),
    "copies not waited for": ("wide.cuh", "wait_copies<AHEAD - 1>", "wait_copies<AHEAD>"),
    "copies not shown": ("wide.cuh", "async.show_copies();", ""),
    "stages used too early": ("wide.cuh", "AHEAD = STAGES - 2", "AHEAD = STAGES - 1"),
    "registers not fenced": ("wide.cuh", "async.begin(own);", ""),
    "products not waited for": ("wide.cuh", "async.wait<0>(own);", "async.wait<1>(own);"),
    "rows of a register": ("wide.cuh", "g + i / 2 % 2 * 8", "g + i % 2 * 8"),
}


QUICK = ("offsets exchanged", "stages used too early")


@pytest.mark.parametrize(
    "fault", [fault if fault in QUICK else pytest.param(fault, marks=pytest.mark.slow) for fault in FAULTS]
)
def test_faults_give_wrong_numbers(fault):
    layers = Layers("fp16", 10, 416, n=64)
    layers.run(library("float", "fp16", parts=("wide",), change=FAULTS[fault]))
    assert not layers.worst() < 1


@pytest.mark.parametrize(("capability", "precision", "widest"), [
    ((9, 0), "fp16", NAME), ((9, 0), "tf32", NAME), ((9, 0), "fp32", "dense_64x32"), ((8, 0), "fp16", "dense_64x32"),
    ((10, 0), "fp16", "dense_64x32"), ((12, 0), "tf32", "dense_64x32"),
])
def test_who_takes_many_rows(capability, precision, widest):
    pytest.importorskip("cuda.bindings.driver", reason="needs cuda-bindings")
    from engine.cuda.driver import Device
    from engine.cuda.evaluation import Kernels
    from tests.fake_cuda import FakeCuda

    built, fake = [], FakeCuda({name: lambda *_: None for name in BLOCKS})
    fake.capability = capability

    def build(source, **options):
        built.append((source, options["architecture"]))
        return SimpleNamespace(cubin=source.encode())

    device = Device(api=fake)
    kernels = Kernels(device, precision, build, BLOCKS)
    names = [kernels.dense(rows) for rows in (1, 16, 17, 64, 65, 256, 257, 100_000)]
    assert names == ["dense_16x8"] * 2 + ["dense_32x16"] * 2 + ["dense_64x32"] * 2 + [widest] * 2
    assert kernels.find(widest)
    assert (("wide", "sm_90a") in built) == (widest == NAME)
    device.close()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_round_of_many_rows_runs_through_it(tmp_path, precision):
    """Grids cover heads of widths that are no multiples of the tile; device 8.0 does the same with mma.sync."""
    pytest.importorskip("cuda.bindings.driver", reason="needs cuda-bindings")
    from tests.fake_kernels import open_fake
    from tests.following import admitted, follow, tickets_of

    world, plans, runtimes = random_world(tmp_path / "w.lace", dim=40, layers=2), [], []
    for capability in ((9, 0), (8, 0)):
        runtime, fake = open_fake(world, precision=precision, capability=capability)
        judge = Sampler(world, runtime="numpy")
        requests = [Request("smile & age=0.7 & yaw>0.3", seed=seed) for seed in range(65)]
        starts = [judge.starts.start(r) for r in requests]
        plans.append(admitted(runtime.solving.engine, tickets_of(starts), make_solver("gauss-newton"), capacity=128))
        runtimes.append((runtime, fake))
    names = [{launch.name for launch in plan.round(on_device=False)} for plan in plans]
    assert [NAME in some for some in names] == [True, False]
    assert max(follow(*plans, rounds=1).values()) == 0
    for runtime, fake in runtimes:
        runtime.close()
        fake.check_nothing_is_left()
