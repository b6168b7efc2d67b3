"""Compile ``kernels/cpu``, and the step that a GPU has too:  python -m engine.native.build

Installing the package does it as well (hatch_build.py). One library for each set of instructions, because the machine
that builds need not be the one that runs.
"""

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

from engine import sources
from engine.constants import constants
from engine.folders import write_atomically

HERE = Path(__file__).parent
COMPILERS = ("g++", "clang++", "c++")
# Products and sums may become one instruction; no sum is reordered, because a row's bits must not depend on others.
OPTIONS = ("-std=c++17", "-O3", "-ffp-contract=fast", "-fPIC", "-shared", "-pthread", "-Wall", "-Wextra", "-Wno-psabi")
AVX2 = ("-mavx2", "-mfma")
AVX512 = (*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq")
# By name: the flags in /proc/cpuinfo that it needs, and the compiler's options. The first that fits is the fastest.
VARIANTS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "avx512_bf16": (("avx512_bf16", "avx512f", "avx512bw", "avx512vl", "avx512dq"), (*AVX512, "-mavx512bf16")),
    "avx512": (("avx512f", "avx512bw", "avx512vl", "avx512dq"), AVX512),
    "avx2": (("avx2", "fma"), AVX2),
    "plain": ((), ()),
}


def is_x86() -> bool:
    return platform.machine().lower() in ("x86_64", "amd64")


def variants() -> list[str]:
    """Those that can be compiled for this architecture, the fastest first."""
    return [name for name, (flags, _) in VARIANTS.items() if is_x86() or not flags]


@cache
def digest() -> str:
    """Of the sources."""
    root = sources.folder()
    files = sorted((*root.glob("cpu/*.h"), *root.glob("cpu/*.cpp"), *root.glob("*.cuh")))
    texts = [path.name + path.read_text() for path in files]
    return hashlib.sha256("".join([*texts, constants()]).encode()).hexdigest()[:16]


def library_path(variant: str, folder: Path = HERE) -> Path:
    """Its name tells its sources, so that what was built from others is not loaded."""
    return folder / f"lace-{variant}-{digest()}.so"


def compiler() -> str | None:
    """$CXX, or the first that is installed."""
    return next((found for name in (os.environ.get("CXX"), *COMPILERS) if name and (found := shutil.which(name))), None)


def build(folder: Path = HERE, names: list[str] | None = None) -> list[Path]:
    """Compile the variants that are not there yet; none without a compiler. One that it refuses is left out."""
    if compiler() is None or sys.platform == "win32":
        return []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = list(pool.map(lambda name: compiled(name, folder), variants() if names is None else names))
    for old in set(folder.glob("*.so")) - {library_path(name, folder) for name in variants()}:
        old.unlink()
    return [place for place in found if place is not None]


def compiled(name: str, folder: Path) -> Path | None:
    place = library_path(name, folder)
    if place.exists():
        return place
    with tempfile.TemporaryDirectory(prefix="lace-build-") as scratch:
        partial = Path(scratch) / place.name
        (Path(scratch) / "constants.cuh").write_text(constants())
        source = sources.folder() / "cpu" / "library.cpp"
        command = [str(compiler()), *OPTIONS, *VARIANTS[name][1], f"-I{scratch}", str(source)]
        if subprocess.run([*command, "-o", str(partial)], check=False).returncode:
            sys.stderr.write(f"{compiler()} does not compile variant {name!r}: left out\n")
            return None
        write_atomically(place, partial.read_bytes())
        return place


if __name__ == "__main__":
    sys.exit(0 if build() else "no C++ compiler was found: install g++ or clang++, or set CXX")
