"""What a GPU's parts cost by themselves: the kernels of probes.cu, launched and timed.

Each function yields facts: what was looked at, what was found, and what is known or expected of an H100.
"""

import ctypes
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from engine.cuda.compile import OPTIONS, compile_source
from engine.cuda.driver import Device, Launch, pack

PROBES = Path(__file__).with_name("probes.cu")
ROUNDS, REPEATS, LARGE = 1000, 7, 220 * 1024
# Bytes of the weights of a field with three heads in half precision and in float32.
BUFFERS = (6_200_000, 12_300_000)
# Outputs and inputs of a layer of the mapping; outputs of a block of ``gemv``, rows, and operations of a product.
LAYER, OUTPUTS, ROWS = (512, 512), 16, 8
CLUSTERS = (8, 16)
# Clusters of these sizes end at different processors, so that together they link all of a graphics cluster.
LINKING = (16, 8, 7, 6, 5, 4, 3, 2)
STAY = 20_000  # nanoseconds: longer than it takes to launch all blocks
Fact = tuple[str, Any, str]


class Probes:
    """probes.cu on a device. ``loop`` is the part with a symbol that the driver may not know; ``loops`` loads it."""

    def __init__(self, device: Device, cubin: bytes, loop: bytes):
        self.device, self.find, self.loop = device, device.load(cubin), loop
        self.count = device.allocate(256)
        self.sink = ctypes.c_void_p(0)

    def clear(self) -> None:
        self.device.fill(self.count.address, self.count.nbytes)

    def launch(self, name: str, grid: int, block: int, *arguments: Any, overlaps: bool = False) -> None:
        self.device.launch(Launch(name, self.find(name), (grid,), block, arguments, overlaps))

    def chain(self, nodes: int, overlaps: bool = False) -> None:
        """Kernels that do nothing, of a block for each processor of an H100."""
        for _ in range(nodes):
            self.launch("nothing", 132, 128, self.sink, overlaps=overlaps)

    @property
    def counter(self) -> ctypes.c_void_p:
        return ctypes.c_void_p(self.count.address)

    def microseconds(self, work: Callable[[], None]) -> float:
        """The median of some runs, by the device's own clock."""
        times = []
        for _ in range(REPEATS + 2):
            self.clear()
            times.append(1e3 * self.device.elapsed(work))
        return float(np.median(times[2:]))

    def allow_large(self, name: str) -> None:
        """Let a kernel have 220 KB of shared memory and clusters of 16 blocks."""
        attributes = self.device.api.CUfunction_attribute
        for attribute, value in (("MAX_DYNAMIC_SHARED_SIZE_BYTES", LARGE), ("NON_PORTABLE_CLUSTER_SIZE_ALLOWED", 1)):
            which = getattr(attributes, f"CU_FUNC_ATTRIBUTE_{attribute}")
            self.device.call("cuFuncSetAttribute", self.find(name), which, value)

    def most_clusters(self, name: str, size: int) -> int:
        """Clusters of ``size`` blocks with 220 KB of shared memory that run at a time."""
        config = configured(self.device, size, 256, shared=LARGE, cluster=size)
        return int(self.device.call("cuOccupancyMaxActiveClusters", self.find(name), config))


def has_clusters(device: Device) -> bool:
    return device.capability >= (9, 0)


def compile_probes(target: str) -> tuple[bytes, bytes]:
    """All probes but the loop, and the loop."""
    texts, options = {PROBES.name: PROBES.read_text()}, (*OPTIONS, f"--gpu-architecture={target}")
    built = (compile_source(PROBES.name, texts, given) for given in (options, (*options, "-DLOOP")))
    plain, loop = (each.cubin for each in built)
    return plain, loop


def configured(device: Device, grid: int, block: int, *, shared: int = 0, cluster: int = 0, cooperative: bool = False):
    """A launch with attributes that no kernel of a solve needs."""
    api, config = device.api, device.api.CUlaunchConfig()
    config.gridDimX, config.gridDimY, config.gridDimZ = grid, 1, 1
    config.blockDimX, config.blockDimY, config.blockDimZ = block, 1, 1
    config.sharedMemBytes, config.hStream = shared, device.stream
    attribute = api.CUlaunchAttribute()
    if cooperative:
        attribute.id, attribute.value.cooperative = api.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_COOPERATIVE, 1
    else:
        attribute.id = api.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
        dimension = attribute.value.clusterDim
        dimension.x, dimension.y, dimension.z = cluster, 1, 1
    config.attrs, config.numAttrs = [attribute], 1
    return config


# --- the parts of the list ----------------------------------------------------------------------------------------


def clusters(device: Device, probes: Probes) -> Iterator[Fact]:
    """How many clusters of large blocks run at a time, and which processors share a graphics cluster (GPC)."""
    if not has_clusters(device):
        yield "clusters of blocks", "none", "from compute capability 9.0 on"
        return
    probes.allow_large("large")
    for size in CLUSTERS:
        yield f"clusters of {size}", probes.most_clusters("large", size), "15 or 16; 7 or 8"
    groups = together(placed(device, probes))
    yield "processors of each GPC", [len(group) for group in groups], "8 of 16 or 18, 132 in all"
    for i, group in enumerate(groups):
        yield f"processors of GPC {i}", group, "numbers that lie apart: %smid is dealt out over the GPCs"


def placed(device: Device, probes: Probes) -> Iterator[list[int]]:
    """Processors that have run a cluster together. Blocks are so large that each has a processor to itself."""
    probes.allow_large("whereabouts")
    for size in LINKING:
        count = probes.most_clusters("whereabouts", size)
        if count == 0:
            continue
        found = device.allocate(4 * size * count)
        config = configured(device, size * count, 256, shared=LARGE, cluster=size)
        arguments = pack((ctypes.c_void_p(found.address), ctypes.c_int(STAY)))
        for _ in range(REPEATS):
            device.call("cuLaunchKernelEx", config, probes.find("whereabouts"), arguments, 0)
            processors = np.empty((count, size), np.uint32)
            device.download(processors, found.address)
            device.synchronize()
            yield from processors.tolist()


def together(links: Iterable[Iterable[int]]) -> list[list[int]]:
    """Disjoint groups, each sorted, the largest first: what is in one link is in one group."""
    groups: list[set[int]] = []
    for link in links:
        merged, apart = set(link), []
        for group in groups:
            if merged.isdisjoint(group):
                apart.append(group)
            else:
                merged |= group
        groups = [*apart, merged]
    return sorted((sorted(group) for group in groups), key=lambda group: (-len(group), group))


def launches(device: Device, probes: Probes) -> Iterator[Fact]:
    """Graphs of kernels that do nothing."""
    for overlaps, expected in ((False, "about 1.3"), (True, "below 1")):
        for nodes in (25, 50, 100):
            graph = device.capture(partial(probes.chain, nodes, overlaps))
            each = probes.microseconds(graph.launch) / nodes
            yield f"us a node, {nodes} nodes{', overlapping' if overlaps else ''}", round(each, 3), expected
            graph.close()


def loops(device: Device, probes: Probes) -> Iterator[Fact]:
    """Rounds of a loop on the device, of one kernel and of 25."""
    again = device.load(probes.loop)("again")
    for others in (0, 24):

        def body(handle: int, others: int = others) -> None:
            probes.chain(others)
            arguments = probes.counter, ctypes.c_int(ROUNDS), ctypes.c_uint64(handle)
            device.launch(Launch("again", again, (1,), 32, arguments))

        graph = device.capture_loop(body)
        each = probes.microseconds(graph.launch) / ROUNDS
        yield f"us a round of {others + 1} kernels", round(each, 3), "not known"
        graph.close()


def barriers(device: Device, probes: Probes) -> Iterator[Fact]:
    """Barriers over the grid, our own and that of cooperative groups, and within clusters; and 512 bytes from every
    block of a cluster to every other."""
    count, rounds = device.attribute("MULTIPROCESSOR_COUNT"), ctypes.c_int(ROUNDS)
    whole = configured(device, count, 128, cooperative=True)
    cases = [("grid_barrier", whole, (probes.counter, rounds), "0.8 to 1"),
             ("grid_sync", whole, (probes.counter, rounds), "1.1 to 1.5")]
    for size in CLUSTERS if has_clusters(device) else ():
        config = configured(device, size, 128, cluster=size)
        cases += [("cluster_barrier", config, (rounds,), "0.15 to 0.25"),
                  ("cluster_gather", config, (rounds, probes.sink), "below 1")]
        for name in ("cluster_barrier", "cluster_gather"):
            nonportable = device.api.CUfunction_attribute.CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED
            device.call("cuFuncSetAttribute", probes.find(name), nonportable, 1)
    for name, config, arguments, expected in cases:
        work = partial(device.call, "cuLaunchKernelEx", config, probes.find(name), pack(arguments), 0)
        yield f"us a {name}, {config.gridDimX} blocks", round(probes.microseconds(work) / ROUNDS, 3), expected


def streams(device: Device, probes: Probes) -> Iterator[Fact]:
    """Reading the weights of a field from L2 again and again."""
    passes, count = 100, device.attribute("MULTIPROCESSOR_COUNT")
    for nbytes in BUFFERS:
        block = device.allocate(nbytes)
        device.fill(block.address, nbytes)
        for blocks in (16, count, 4 * count):
            arguments = (ctypes.c_void_p(block.address), ctypes.c_int(nbytes // 16), ctypes.c_int(passes),
                         ctypes.c_void_p(probes.count.address))
            took = probes.microseconds(partial(probes.launch, "stream", blocks, 512, *arguments))
            rate = nbytes * passes / took / 1e6
            yield f"TB/s from L2, {nbytes / 1e6:.1f} MB, {blocks} blocks", round(rate, 3), "5.5 with all"


def products(device: Device, probes: Probes) -> Iterator[Fact]:
    """A layer for 8 rows on the tensor core in half precision, weights from L2: one layer, and one on all processors.

    Rounds do not wait for each other's results: it is a layer's own time, to which a barrier or a launch comes.
    """
    outputs, k = LAYER
    for n in (outputs, OUTPUTS * device.attribute("MULTIPROCESSOR_COUNT")):
        arrays = [device.allocate(size) for size in (2 * n * k, 2 * ROWS * k, 4 * ROWS * n)]
        for array in arrays:
            device.fill(array.address, array.nbytes)
        addresses = [ctypes.c_void_p(array.address) for array in arrays]
        arguments = (*addresses, ctypes.c_int(k), ctypes.c_int(ROUNDS))
        each = probes.microseconds(partial(probes.launch, "gemv", n // OUTPUTS, 256, *arguments)) / ROUNDS
        name = f"a layer of {n} x {k} for {ROWS} rows"
        yield f"us {name}", round(each, 3), "1 to 2.5 with its launch"
        yield f"TB/s of weights, {name}", round(2e-6 * n * k / each, 3), "5.5 at most"
        yield f"TFLOP/s, {name}", round(2e-6 * n * k * ROWS / each, 3), ""
