"""Compile the sources beside this file:  python -m kernels.cpu.build

Installing the package does it too (hatch_build.py, which has nothing but the standard library). One library for each
set of instructions, because the machine that builds need not be the one that runs.
"""

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

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
    texts = (path.name.encode() + path.read_bytes() for path in sorted(HERE.iterdir()) if path.suffix in (".h", ".cpp"))
    return hashlib.sha256(b"".join(texts)).hexdigest()[:16]


def library_path(variant: str, folder: Path = HERE) -> Path:
    """Its name tells its sources, so that what was built from others is not loaded."""
    return folder / f"field-{variant}-{digest()}.so"


def compiler() -> str | None:
    """$CXX, or the first that is installed."""
    return next((found for name in (os.environ.get("CXX"), *COMPILERS) if name and (found := shutil.which(name))), None)


def build(folder: Path = HERE, names: list[str] | None = None) -> list[Path]:
    """Compile the variants that are not there yet; none without a compiler. One that it refuses is left out."""
    with_compiler = compiler()
    if with_compiler is None or sys.platform == "win32":
        return []
    found = []
    for name in variants() if names is None else names:
        place = library_path(name, folder)
        if not place.exists():
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                partial = Path(scratch) / place.name
                command = [with_compiler, *OPTIONS, *VARIANTS[name][1], str(HERE / "field.cpp"), "-o", str(partial)]
                if subprocess.run(command, check=False).returncode:
                    sys.stderr.write(f"{with_compiler} does not compile variant {name!r}: left out\n")
                    continue
                partial.replace(place)
        found.append(place)
    for old in set(folder.glob("field-*.so")) - {library_path(name, folder) for name in variants()}:
        old.unlink()
    return found


if __name__ == "__main__":
    sys.exit(0 if build() else "no C++ compiler was found: install g++ or clang++, or set CXX")
