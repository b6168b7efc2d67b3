"""The first thing to run on a new GPU:  python -m benchmarks.gpu.checklist [--out FILE.json]

Versions, do the kernels compile and load, how many clusters fit, what launches, loops and barriers cost, and whether a
solve agrees with the processor's. Each line says what was expected where something is known. Nothing is written but
FILE. Not yet run on a GPU.
"""

import argparse
import ctypes
import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.gpu import machine
from engine.cli.console import CHECK_FAILED, EXIT_CODES, MISSING_PACKAGE, OK, complain, guarded, parse
from engine.cuda.driver import Device, Launch, NoDevice, packed
from engine.errors import LaceError
from engine.runtimes import open_runtime
from engine.runtimes.cuda import CudaRuntime
from engine.sampler import DEMO, Sampler, find_bundle
from engine.solvers import make_solver
from kernels.compile import OPTIONS, CompileError, build, compiled
from kernels.layout import PRECISIONS

PROBES = Path(__file__).with_name("probes.cu")
ROUNDS, REPEATS, LARGE = 1000, 7, 220 * 1024
# Bytes of the weights of a field with three heads in half precision and in float32.
BUFFERS = (6_200_000, 12_300_000)
# A fact: what was looked at, what was found, and what is known or expected of an H100.
Fact = tuple[str, Any, str]


class Probes:
    """probes.cu on a device."""

    def __init__(self, device: Device, cubin: bytes):
        self.device, self.find = device, device.load(cubin)
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


def architecture(device: Device) -> str:
    return "sm_{}{}".format(*device.capability)


def compile_probes(target: str) -> bytes:
    return compiled(PROBES.name, {PROBES.name: PROBES.read_text()}, (*OPTIONS, f"--gpu-architecture={target}")).cubin


# --- the parts of the list ----------------------------------------------------------------------------------------


def compiling(device: Device) -> Iterator[Fact]:
    """Each precision is compiled for this GPU and loaded; the program with the loop needs the driver's own symbol."""
    for precision in PRECISIONS:
        for source in ("solve", "loop"):
            built = build(source, architecture=architecture(device), precision=precision)
            device.load(built.cubin)
            worst = max((part.registers for part in built.resources.values()), default=0)
            spills = sum(part.spills for part in built.resources.values())
            yield f"{source} in {precision}", f"{worst} registers at most, {spills} bytes spilled", "0 spilled, loads"


def clusters(device: Device, probes: Probes) -> Iterator[Fact]:
    """How many clusters of blocks with 220 KB of shared memory run at a time."""
    api, kernel = device.api, probes.find("large")
    attributes = api.CUfunction_attribute
    for name, value in (("MAX_DYNAMIC_SHARED_SIZE_BYTES", LARGE), ("NON_PORTABLE_CLUSTER_SIZE_ALLOWED", 1)):
        device.call("cuFuncSetAttribute", kernel, getattr(attributes, f"CU_FUNC_ATTRIBUTE_{name}"), value)
    for size in (8, 16):
        config = configured(device, size, 256, shared=LARGE, cluster=size)
        yield f"clusters of {size}", device.call("cuOccupancyMaxActiveClusters", kernel, config), "15 or 16; 7 or 8"


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
    for others in (0, 24):

        def body(handle: int, others: int = others) -> None:
            probes.chain(others)
            probes.launch("again", 1, 32, probes.counter, ctypes.c_int(ROUNDS), ctypes.c_uint64(handle))

        graph = device.capture_loop(body)
        each = probes.microseconds(graph.launch) / ROUNDS
        yield f"us a round of {others + 1} kernels", round(each, 3), "not known"
        graph.close()


def barriers(device: Device, probes: Probes) -> Iterator[Fact]:
    """Barriers over the grid and within clusters, and 512 bytes from every block of a cluster to every other."""
    count = device.attribute("MULTIPROCESSOR_COUNT")
    rounds, kernel = ctypes.c_int(ROUNDS), probes.find
    nonportable = device.api.CUfunction_attribute.CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED
    cases = [("grid_barrier", configured(device, count, 128, cooperative=True), (probes.counter, rounds), "0.8 to 1")]
    for size in (8, 16):
        config = configured(device, size, 128, cluster=size)
        cases += [("cluster_barrier", config, (rounds,), "0.15 to 0.25"),
                  ("cluster_gather", config, (rounds, probes.sink), "below 1")]  # fmt: skip
    for name, config, arguments, expected in cases:
        if name != "grid_barrier":
            device.call("cuFuncSetAttribute", kernel(name), nonportable, 1)
        work = partial(device.call, "cuLaunchKernelEx", config, kernel(name), packed(arguments), 0)
        yield f"us a {name}, {config.gridDimX} blocks", round(probes.microseconds(work) / ROUNDS, 3), expected


def streams(device: Device, probes: Probes) -> Iterator[Fact]:
    """Reading the weights of a field from L2 again and again."""
    passes, count = 100, device.attribute("MULTIPROCESSOR_COUNT")
    for nbytes in BUFFERS:
        block = device.allocate(nbytes)
        device.fill(block.address, nbytes)
        for blocks in (16, count, 4 * count):
            arguments = (ctypes.c_void_p(block.address), ctypes.c_int(nbytes // 16), ctypes.c_int(passes),
                         ctypes.c_void_p(probes.count.address))  # fmt: skip
            took = probes.microseconds(partial(probes.launch, "stream", blocks, 512, *arguments))
            rate = nbytes * passes / took / 1e6
            yield f"TB/s from L2, {nbytes / 1e6:.1f} MB, {blocks} blocks", round(rate, 3), "5.5 with all"


def solves(device: Device) -> Iterator[Fact]:
    """The demo bundle here and on the processor."""
    condition, bundle = "smile & ~glasses & age=0.7", find_bundle(DEMO)
    wanted = Sampler(bundle).solve(condition, seeds=range(16))
    for precision in PRECISIONS:
        sampler = Sampler(bundle, runtime="cuda", device="cuda", precision=precision)
        found = sampler.solve(condition, seeds=range(16))
        work = [float(np.mean([s.evaluations for s in samples])) for samples in (found, wanted)]
        ends = [float(np.mean([s.energy for s in samples])) for samples in (found, wanted)]
        yield f"evaluations of a solve, {precision}", round(work[0], 2), f"{work[1]:.2f} within 5 %"
        yield f"energy of a solve, {precision}", round(ends[0], 5), f"{ends[1]:.5f} within 0.001"


def host_loop(device: Device) -> Iterator[Fact]:
    """Whether the loop on the device gives the bits of the loop on the host."""
    runtime = open_runtime(find_bundle(DEMO), "cuda", device="cuda")
    assert isinstance(runtime, CudaRuntime)
    sampler, ends = Sampler(DEMO), []
    for loops in (True, False):
        runtime.engine.close_plans()
        runtime.engine.loops = loops
        sampler.runtime, sampler.flows = runtime, {False: [], True: []}
        sampler.stepper = runtime.solver(make_solver("gauss-newton"), 16)
        ends.append(np.stack([s.w for s in sampler.solve("smile & age=0.7", seeds=range(16))]))
    yield "the loop on the device gives the host's bits", bool(np.array_equal(*ends)), "True"


def versions(device: Device) -> Iterator[Fact]:
    for name, value in {**machine.facts(device), **machine.versions(), **machine.clock()}.items():
        yield name, value, ""


def parts(device: Device) -> Iterator[tuple[str, Callable[[], Iterator[Fact]]]]:
    """Each part stands for itself: one that fails is told, and the next one runs."""
    yield "versions", partial(versions, device)
    yield "kernels", partial(compiling, device)
    yield "solves", partial(solves, device)
    yield "host loop", partial(host_loop, device)
    probes = Probes(device, compile_probes(architecture(device)))
    for part in (clusters, launches, loops, barriers, streams):
        yield part.__name__, partial(part, device, probes)


def run(device: Device, out: Path | None) -> int:
    found: dict[str, dict[str, Any]] = {}
    failed = False
    for title, part in parts(device):
        print(f"\n{title}")
        found[title] = {}
        try:
            for name, value, expected in part():
                print(f"  {name:44} {value!s:32} {expected}")
                found[title][name] = value
        except (LaceError, CompileError) as error:
            failed, found[title]["failed"] = True, str(error)
            complain(f"{title}: {error}")
    if out is not None:
        out.write_text(json.dumps(found, indent=2) + "\n")
    print("\nNext: make gpu, then make sanitize, then python -m benchmarks.gpu --out FILE.jsonl")
    return CHECK_FAILED if failed else OK


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.gpu.checklist", description="What to run first on a new GPU.",
                                     epilog=EXIT_CODES, allow_abbrev=False)  # fmt: skip
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON file for what was found")
    options = parse(parser, arguments)
    try:
        device = Device()
    except NoDevice as error:
        complain(f"{error} The checklist needs an NVIDIA GPU")
        return MISSING_PACKAGE
    return guarded(lambda: run(device, options.out))


if __name__ == "__main__":
    raise SystemExit(main())
