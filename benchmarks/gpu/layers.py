"""One dense layer of the mapping's size by each kernel that the device has: mma.sync in three tiles, and wgmma.

It tells up to how many rows a tile pays (``DENSE`` of engine/cuda/evaluation.py). Layers alternate between two arrays,
so that each waits for the one before, as in a solve.
"""

from collections.abc import Iterator
from itertools import product
from typing import Any

import numpy as np

from benchmarks.gpu import machine
from engine.bench.contest import Bench
from engine.cuda.compile import BLOCKS, SOURCE_OF, TILES, build
from engine.cuda.driver import Device
from engine.cuda.evaluation import REAL, Kernels
from engine.cuda.memory import Region
from engine.cuda.tables import put
from engine.layout import DTYPES, PRECISIONS, to_operand
from engine.reference import field

SIDE = 512
ROWS = (16, 64, 256, 512, 1024, 4096)
# Layers in one graph, so that its launch is a small part of what is measured; an even number.
CHAIN = 40
# Of the largest number: operands are representable, so that only the sums' rounding is left.
TOLERANCE = 1e-4


def layers(bench: Bench, rows: tuple[int, ...]) -> None:
    for precision in PRECISIONS:
        device, kernels = open_kernels(precision)
        for n, name in product(rows, (name for name in TILES if SOURCE_OF[name] in kernels.modules)):
            line = {"suite": "gpu layer", "rows": n, "contestant": f"{name} {precision}"}
            if bench.only in line["contestant"] and not bench.log.has(line):
                bench.say(f"layer: {name} in {precision}, {n} rows")
                bench.log.write([{**line, **measured(Layer(device, kernels, precision, n), name)}])
        device.close()


def open_kernels(precision: str) -> tuple[Device, Kernels]:
    device = Device()
    return device, Kernels(device, precision, build, BLOCKS)


class Layer:
    """leaky(x W^T + b) from ``x`` to ``y``, and with the same weights from ``y`` to ``z``."""

    def __init__(self, device: Device, kernels: Kernels, precision: str, rows: int):
        self.device, self.kernels, self.rows = device, kernels, rows
        random, dtype = np.random.default_rng(0), to_operand(np.zeros(1), precision).dtype
        shape = rows, SIDE
        self.region = region = Region(device, {
            "x": (shape, dtype), "y": (shape, dtype), "z": (shape, dtype), "weight": ((SIDE, SIDE), dtype),
            "bias": ((SIDE,), REAL), "exact": (shape, REAL), "problems": ((2,), DTYPES["Dense"]),
            "levels": ((2,), DTYPES["Level"]),
        }, mirrored=True)
        host = region.host
        host["x"][:] = to_operand(random.normal(size=shape), precision)
        host["weight"][:] = to_operand(random.normal(size=(SIDE, SIDE)) / np.sqrt(SIDE), precision)
        host["bias"][:] = random.normal(size=SIDE)
        for i, (source, target) in enumerate((("x", "y"), ("y", "z"))):
            put(host["problems"][i], input=region[source], weight=region["weight"], bias=region["bias"],
                output=region[target], n=SIDE, k=SIDE, each=1, leaky=1)
            put(host["levels"][i], problems=region["problems"] + i * DTYPES["Dense"].itemsize, count=1, rows=rows)
        put(host["problems"][0], exact=region["exact"])
        region.upload()
        device.synchronize()

    def launch(self, name: str) -> None:
        """Both layers."""
        tile_rows, tile_columns = TILES[name]
        grid = -(-SIDE // tile_columns), -(-self.rows // tile_rows)
        for i in range(2):
            address = self.region["levels"] + i * DTYPES["Level"].itemsize
            self.device.launch(self.kernels.launch(name, grid, address))

    def error(self) -> float:
        """Of the first layer that was launched, against the twin in float64."""
        x, weight = (self.region.host[name].astype(float) for name in ("x", "weight"))
        twin = field.leaky(x @ weight.T + self.region.host["bias"])
        return float(np.abs(self.region.read("exact") - twin).max() / np.abs(twin).max())


def measured(layer: Layer, name: str) -> dict[str, Any]:
    """Milliseconds of one layer by the device's own clock."""
    device = layer.device

    def chain() -> None:
        for _ in range(CHAIN // 2):
            layer.launch(name)

    graph = device.capture(chain)
    times = list(timed(device, graph.launch))
    graph.close()
    median, error = float(np.median(times)), layer.error()
    size = layer.region.host["weight"].itemsize
    moved = size * SIDE * (SIDE + 2 * layer.rows)  # each number once; what tiles read twice is not counted
    return {
        "unit": "ms", "median": median, "q1": float(np.quantile(times, 0.25)), "q3": float(np.quantile(times, 0.75)),
        "repeats": len(times), "check": "passed" if error < TOLERANCE else f"off by {error:.1e} of the largest",
        "details": {"launches": 1, "gigabytes_per_second": moved / median / 1e6,
                    "teraflops": 2e-9 * SIDE * SIDE * layer.rows / median, **machine.clock()},
    }


def timed(device: Device, work: Any, repeats: int = 12, warm: int = 2) -> Iterator[float]:
    for i in range(repeats + warm):
        took = device.elapsed(work) / CHAIN
        if i >= warm:
            yield took
