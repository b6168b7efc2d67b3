"""CUDA sources to cubins: NVRTC through cuda.bindings, with a cache on disk.

The sources need no header of the CUDA toolkit, and compiling needs no GPU. A cubin's name in the cache is the hash of
all that it depends on, so that the cache never goes stale and may be deleted at any time.
"""

import contextlib
import hashlib
import json
import os
import re
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

from engine.constants import constants
from engine.errors import WriteError
from engine.folders import write_atomically
from engine.layout import PRECISIONS
from engine.sources import folder as sources_folder

# By source: its kernels, with the threads of a block. One source is one module on the device.
KERNELS = {
    "network": {"normalise": 128, "dense_16x8": 256, "dense_32x16": 128, "dense_64x32": 256, "tape": 128,
                "cotangents": 128},
    "solve": {"pullback": 128, "gauss_newton": 256, "runge_kutta": 256, "turnover": 1024, "pixels_f32": 256,
              "pixels_f16": 256},
    "loop": {"turnover_while": 1024},  # it needs a symbol that only the driver resolves
    "wide": {"dense_64x64": 128},  # it needs wgmma
}
BLOCKS = {name: threads for kernels in KERNELS.values() for name, threads in kernels.items()}
SOURCE_OF = {name: source for source, kernels in KERNELS.items() for name in kernels}
BY_PRECISION = ("network", "wide")  # the others are the same for all
WGMMA = "sm_90a"  # the one architecture that has it
# Rows and columns of a block. The last one is for devices and precisions that ``has_wgmma``.
TILES = {"dense_16x8": (16, 8), "dense_32x16": (32, 16), "dense_64x32": (64, 32), "dense_64x64": (64, 64)}
OPTIONS = ("--std=c++17", "--ptxas-options=-v")
FORMAT = 3  # of the files in the cache


class CompileError(Exception):
    """NVRTC is missing or refused a source: what happened and what to do."""


@dataclass(frozen=True, slots=True)
class Resources:
    """What a kernel and the functions that it calls take, as ptxas reports it; bytes."""

    registers: int
    shared: int
    stack: int
    spills: int


@dataclass(frozen=True, slots=True)
class Built:
    cubin: bytes
    resources: dict[str, Resources]


def build(source: str = "solve", *, architecture: str, precision: str = "fp32", folder: Path | None = None) -> Built:
    """Compile one of KERNELS' sources, or take it from the cache.

    architecture   "sm_90"; a cubin runs on the devices of its major version from its minor version on
    precision      of the operands of matrix products: "fp32", "tf32" or "fp16"; sums are float32
    folder         of the cache; default: ``cache_folder()``

    Raises ImportError without cuda.bindings, CompileError when NVRTC is missing or refuses.
    """
    if source not in KERNELS or precision not in PRECISIONS:
        raise CompileError(
            f"there is no source {source!r} in {precision!r}: expected one of {tuple(KERNELS)}, {PRECISIONS}"
        )
    if source not in BY_PRECISION:
        precision = PRECISIONS[0]
    if source == "wide" and (architecture != WGMMA or precision == "fp32"):
        raise CompileError(f"wgmma multiplies tf32 and fp16 on {WGMMA}, not {precision} on {architecture}")
    options = (*OPTIONS, f"--gpu-architecture={architecture}", f"-DPRECISION={precision.upper()}")
    texts = sources()
    version = nvrtc_version()
    key = hashlib.sha256(json.dumps([FORMAT, version, options, source, texts]).encode()).hexdigest()
    place = (folder or cache_folder()) / f"{source}-{architecture}-{precision}-{key[:32]}"
    found = read(place)
    if found is None:
        found = compile_source(f"{source}.cu", texts, options)
        write(place, found)
    return found


def has_wgmma(capability: tuple[int, int], precision: str) -> bool:
    """Whether a device can run "wide", compile_source for WGMMA."""
    return capability == (9, 0) and precision != "fp32"


@cache
def sources() -> dict[str, str]:
    """All texts by name; constants.cuh is made here."""
    files = sorted(path for path in sources_folder().iterdir() if path.suffix in (".cu", ".cuh"))
    texts = {path.name: path.read_text() for path in files}
    blocks = [f"#define BLOCK_{name} {threads}\n" for name, threads in BLOCKS.items()]
    return texts | {"constants.cuh": "".join([constants(), *blocks])}


def cache_folder() -> Path:
    """$LACE_CACHE/kernels, or lace/kernels in the user's cache folder."""
    base = os.environ.get("LACE_CACHE")
    root = Path(base) if base else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lace"
    return root / "kernels"


def nvrtc_version() -> tuple[int, int]:
    import cuda.bindings.nvrtc as nvrtc

    try:
        status, major, minor = nvrtc.nvrtcVersion()
    except RuntimeError as error:  # the library is a package of its own
        raise CompileError(f"NVRTC was not found ({error}): install it with pip install nvidia-cuda-nvrtc") from error
    check(status, "nvrtcVersion")
    return major, minor


def compile_source(name: str, texts: dict[str, str], options: tuple[str, ...]) -> Built:
    """One translation unit through NVRTC; the other texts are its headers."""
    import cuda.bindings.nvrtc as nvrtc

    headers = [header for header in texts if header != name]
    status, program = nvrtc.nvrtcCreateProgram(
        texts[name].encode(), name.encode(), len(headers), [texts[h].encode() for h in headers],
        [h.encode() for h in headers],
    )
    check(status, "nvrtcCreateProgram")
    try:
        (status,) = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
        log = text_of(nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog, program).decode(errors="replace")
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            raise CompileError(f"NVRTC {nvrtc_version()} refused {name} with {' '.join(options)}:\n{log}")
        cubin = text_of(nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN, program)
    finally:
        nvrtc.nvrtcDestroyProgram(program)
    return Built(cubin, resources(log))


def text_of(size, get, program) -> bytes:
    """Bytes from NVRTC: first their length, then their content."""
    status, length = size(program)
    check(status, size.__name__)
    # NVRTC writes into the object, and Python shares the objects of a single byte.
    content = b" " * max(length, 2)
    (status,) = get(program, content)
    check(status, get.__name__)
    return content[:length]


def check(status, what: str) -> None:
    if int(status) != 0:
        advice = "compare the versions of cuda-bindings and nvidia-cuda-nvrtc"
        raise CompileError(f"{what} failed with {status!r}: {advice}")


def resources(log: str) -> dict[str, Resources]:
    """The report of ``--ptxas-options=-v``, by kernel."""
    found = {}
    for name, body in re.findall(r"entry function '(\w+)'(.*?)Compile time", log, re.DOTALL):
        patterns = r"Used (\d+) registers", r"(\d+) bytes smem", r"(\d+) bytes stack", r"(\d+) bytes spill stores"
        # Functions that were not inlined are reported behind their kernel.
        found[name] = Resources(*(sum(map(int, re.findall(pattern, body))) for pattern in patterns))
    return found


def read(place: Path) -> Built | None:
    """A file of the cache; a damaged one counts as missing."""
    try:
        header, _, cubin = place.read_bytes().partition(b"\n")
        facts = json.loads(header)
        if hashlib.sha256(cubin).hexdigest() != facts["sha256"]:
            return None
        return Built(cubin, {name: Resources(**values) for name, values in facts["resources"].items()})
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write(place: Path, built: Built) -> None:
    """Whole or not at all. A cache that cannot be written costs time, not the result."""
    facts = {"sha256": hashlib.sha256(built.cubin).hexdigest(),
             "resources": {name: asdict(values) for name, values in built.resources.items()}}
    with contextlib.suppress(WriteError):
        write_atomically(place, json.dumps(facts).encode() + b"\n" + built.cubin)
