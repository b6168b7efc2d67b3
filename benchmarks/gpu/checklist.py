"""The first thing to run on a new GPU:  python -m benchmarks.gpu.checklist [--out FILE.json]

Versions, do the kernels compile and load, whether a solve agrees with the processor's, how many clusters fit and where,
and what launches, loops, barriers, memory and matrix products cost. Each line says what was expected where something is
known. Nothing is written but FILE. Not yet run on a GPU.
"""

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.gpu import machine, probes
from benchmarks.gpu.probes import Fact, Probes
from engine.cli.console import CHECK_FAILED, EXIT_CODES, MISSING_PACKAGE, OK, complain, guarded, parse
from engine.cuda.compile import BY_PRECISION, KERNELS, WGMMA, CompileError, build, has_wgmma
from engine.cuda.driver import Device, NoDevice
from engine.errors import LaceError
from engine.folders import write_atomically
from engine.layout import PRECISIONS
from engine.runtimes import open_runtime
from engine.runtimes.cuda import CudaSolving
from engine.sampler import DEMO, Sampler, find_bundle

# --- the parts of the list ----------------------------------------------------------------------------------------


def compiling(device: Device) -> Iterator[Fact]:
    """Each precision is compiled for this GPU and loaded; the program with the loop needs the driver's own symbol."""
    for source, precision in product(KERNELS, PRECISIONS):
        if source == "wide" and not has_wgmma(device.capability, precision):
            continue
        if source not in BY_PRECISION and precision != PRECISIONS[0]:
            continue
        target = WGMMA if source == "wide" else device.architecture
        built = build(source, architecture=target, precision=precision)
        device.load(built.cubin)
        worst = max((part.registers for part in built.resources.values()), default=0)
        spills = sum(part.spills for part in built.resources.values())
        name = f"{source} in {precision}" if source in BY_PRECISION else source
        yield name, f"{worst} registers at most, {spills} bytes spilled", "0 spilled, loads"


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
    assert isinstance(runtime.solving, CudaSolving)
    sampler, ends = Sampler(DEMO), []
    for loops in (True, False):
        runtime.solving.engine.close_plans()
        runtime.solving.engine.loops = loops
        sampler.runtime, sampler.flows.solving = runtime, runtime.solving
        sampler.flows.idle.clear()
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
    loaded = Probes(device, *probes.compile_probes(device.architecture))
    for part in (probes.clusters, probes.launches, probes.loops, probes.barriers, probes.streams, probes.products):
        yield part.__name__, partial(part, device, loaded)


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
        write_atomically(out, json.dumps(found, indent=2) + "\n")
    print("\nNext: make gpu, then make sanitize, then python -m benchmarks.gpu --out FILE.jsonl")
    return CHECK_FAILED if failed else OK


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.gpu.checklist", description="What to run first on a new GPU.",
                                     epilog=EXIT_CODES, allow_abbrev=False)
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
