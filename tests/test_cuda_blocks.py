"""The kernels thread by thread: a block of the device as threads of the host, with barriers where a warp acts as one.

One thread for a row, as in the other tests, would not notice a barrier that is missing or a number in the wrong lane.
"""

import os
import shutil
import subprocess
import sys
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from engine import Request, Sampler
from engine.cuda.compile import BLOCKS, SOURCE_OF, TILES
from engine.grammar import parse
from engine.layout import PRECISIONS, to_operand
from tests.host_kernels import BlockSolve, call, compiler, struct
from tests.test_cuda_solvers import CONDITIONS, Rig, compare_tapes
from tests.worlds import random_world

pytestmark = pytest.mark.skipif(compiler() is None and "CI" not in os.environ, reason="no C++ compiler is installed")


TILE_CASES = [(tile, precision) for tile, precision in product(TILES, PRECISIONS)
              if precision != "fp32" or SOURCE_OF[tile] != "wide"]


@pytest.mark.parametrize(("tile", "precision"), TILE_CASES)
@pytest.mark.parametrize(("rows", "k"), [(3, 96), (40, 32)])
def test_a_tile_gives_what_its_layers_define(tile, precision, rows, k):
    """Two problems, so that a block has to find its own; more rows than a tile, and fewer."""
    random = np.random.default_rng(k)
    operand = lambda *shape: to_operand(random.normal(size=shape), precision)  # noqa: E731
    arrays = [{"input": operand(rows * each, k), "weight": operand(n, k), "activation": operand(rows, n)}
              for each, n in ((1, 32), (2, 64))]
    exact = [[np.zeros((rows * each, n), np.float32) for each, n in ((1, 32), (2, 64))] for _ in range(2)]
    levels = [
        struct("Level", count=2, rows=rows, problems=np.stack([
            struct("Dense", **given, exact=out, n=out.shape[1], k=k, each=each)
            for given, out, each in zip(arrays, outs, (1, 2), strict=True)
        ])) for outs in exact
    ]
    call(tile, levels[0], real=np.float32, precision=precision)
    # One block more than there is work for, in both directions.
    for x, y in np.ndindex(-(-96 // TILES[tile][1]) + 1, -(-2 * rows // TILES[tile][0]) + 1):
        call(tile, levels[1], x, y, 32, BLOCKS[tile] // 32, real=np.float32, precision=precision)
    for whole, tiled in zip(*exact, strict=True):
        np.testing.assert_allclose(tiled, whole, rtol=1e-5, atol=2e-5)
        assert np.abs(whole).max() > 1


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return random_world(tmp_path_factory.mktemp("blocks") / "b", dim=16, layers=2, z_head=True)


@pytest.mark.parametrize(
    "options", [{"solver": "gauss-newton"}, {"solver": "heun-euler", "max_evaluations": 25}], ids=str
)
def test_blocks_solve_as_the_twins_do(world, options):
    sampler = Sampler(world, runtime="numpy", **options)
    requests = [Request(CONDITIONS[seed], seed=seed) for seed in range(3)]
    solve = Rig(sampler, requests, capacity=2, kind=BlockSolve).run()
    for i, sample in enumerate(sampler.solve(requests)):
        counters = [sample.steps, sample.evaluations, sample.rejected, sample.forced]
        assert (solve.result_status[i], list(solve.result_counters[i])) == (sample.status, counters)
        np.testing.assert_allclose(solve.result_z[i], sample.z, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("logic", ["product", "lace"])
@pytest.mark.parametrize(
    "text", ["smile | ~(haircolor=blond & age>0.4)", "~(~glasses | smile) & keep(yaw)", "2*age=0.3"]
)
def test_blocks_interpret_tapes_as_the_twin_does(text, logic):
    compare_tapes(parse(text), 0, kind=BlockSolve, logic=logic)


RACES = """
import sys, tempfile
from pathlib import Path
from tests import host_kernels
from tests import test_cuda_blocks as blocks

host_kernels.OPTIONS += ("-fsanitize=thread", "-g")
if sys.argv[1:]:
    texts, (name, text) = host_kernels.sources(), sys.argv[1:]
    assert text in texts[name]
    host_kernels.sources = lambda: texts | {name: texts[name].replace(text, "")}
world = blocks.random_world(Path(tempfile.mkdtemp()) / "b", dim=16, layers=2, z_head=True)
for options in ({}, {"solver": "heun-euler", "max_evaluations": 9}):
    sampler = blocks.Sampler(world, runtime="numpy", **options)
    requests = [blocks.Request(blocks.CONDITIONS[seed], seed=seed) for seed in range(3)]
    blocks.Rig(sampler, requests, capacity=2, kind=blocks.BlockSolve).run()
blocks.test_blocks_interpret_tapes_as_the_twin_does("smile | ~(haircolor=blond & age>0.4)", "lace")
for tile in blocks.TILES:
    blocks.test_a_tile_gives_what_its_layers_define(tile, "tf32", 3, 96)
"""


def races(*without):
    """What a race detector says about the kernels, and how the run ended; ``without`` = (file, text to leave out)."""
    found = subprocess.run([compiler() or "c++", "-print-file-name=libtsan.so"], capture_output=True, text=True)
    detector = Path(found.stdout.strip())
    if not detector.is_absolute() or shutil.which("setarch") is None:
        pytest.skip("the compiler has no libtsan, or there is no setarch")
    # The detector wants its memory at addresses that randomisation may have given away.
    command = ["setarch", "-R", sys.executable, "-c", RACES, *without]
    here = {"LD_PRELOAD": str(detector), "TSAN_OPTIONS": "exitcode=0", "PYTHONPATH": str(Path(__file__).parents[1])}
    run = subprocess.run(command, env=os.environ | here, capture_output=True, text=True, timeout=600)
    return run.stderr.count("WARNING: ThreadSanitizer: data race"), run


@pytest.mark.slow
def test_no_thread_reads_what_another_may_be_writing():
    count, run = races()
    assert (count, run.returncode) == (0, 0), run.stderr


@pytest.mark.slow
@pytest.mark.parametrize(("file", "text"), [
    ("gauss_newton.cuh", "        team.sync();\n"),
    ("dense.cuh", "        team.sync();\n"),
    ("wide.cuh", "            team.sync();\n"),
    ("wide.cuh", "        team.sync();  // nobody reads the stages any more\n"),
])
def test_a_missing_barrier_is_found(file, text):
    count, _ = races(file, text)
    assert count > 0
