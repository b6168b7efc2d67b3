"""Compile ``kernels/cpu``, and the step that a GPU has too:  python -m engine.native.build

Installing the package does it as well (hatch_build.py). One library for each set of instructions, because the machine
that builds need not be the one that runs. With --sanitize they watch themselves, for the tests; such ones go into a
folder of their own, which $LACE_NATIVE names to whoever runs them.
"""

import argparse
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
# The first error ends the process. Speed does not matter, and lines of the source do.
WATCHED = ("-O1", "-g", "-fno-omit-frame-pointer", "-fno-sanitize-recover=all")
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


def folder() -> Path:
    """$LACE_NATIVE, or this package's own."""
    return Path(os.environ.get("LACE_NATIVE") or HERE)


def library_path(variant: str, place: Path | None = None) -> Path:
    """Its name tells its sources, so that what was built from others is not loaded."""
    return (place or folder()) / f"lace-{variant}-{digest()}.so"


def compiler() -> str | None:
    """$CXX, or the first that is installed."""
    return next((found for name in (os.environ.get("CXX"), *COMPILERS) if name and (found := shutil.which(name))), None)


def build(place: Path = HERE, names: list[str] | None = None, *, sanitize: str = "", again: bool = False) -> list[Path]:
    """Compile the variants that are not there yet; none without a compiler. One that it refuses is left out.

    sanitize   what the libraries watch themselves for, as -fsanitize has it: "address,undefined" or "thread"
    again      also those that are there

    Raises OSError where ``place`` cannot be written.
    """
    if compiler() is None or sys.platform == "win32":
        return []
    names = variants() if names is None else names
    place.mkdir(parents=True, exist_ok=True)
    options = (*OPTIONS, *(WATCHED if sanitize else ()), *([f"-fsanitize={sanitize}"] if sanitize else []))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = list(pool.map(lambda name: compiled(name, place, options, again=again), names))
    for old in set(place.glob("lace-*.so")) - {library_path(name, place) for name in variants()}:
        old.unlink()
    return [path for path in found if path is not None]


def compiled(name: str, place: Path, options: tuple[str, ...], *, again: bool) -> Path | None:
    target = library_path(name, place)
    if target.exists() and not again:
        return target
    with tempfile.TemporaryDirectory(prefix="lace-build-") as scratch:
        partial = Path(scratch) / target.name
        (Path(scratch) / "constants.cuh").write_text(constants())
        source = sources.folder() / "cpu" / "library.cpp"
        command = [str(compiler()), *options, *VARIANTS[name][1], f"-I{scratch}", str(source)]
        if subprocess.run([*command, "-o", str(partial)], check=False).returncode:
            sys.stderr.write(f"{compiler()} does not compile variant {name!r}: left out\n")
            return None
        write_atomically(target, partial.read_bytes())
        return target


def main(arguments: list[str] | None = None) -> str | None:
    """What went wrong, in a sentence; None if nothing did."""
    parser = argparse.ArgumentParser(prog="python -m engine.native.build", description="Compile the CPU kernels.")
    parser.add_argument("--again", action="store_true", help="also the libraries that are there")
    parser.add_argument("--sanitize", default="", metavar="KINDS", help="address,undefined or thread: for the tests")
    parser.add_argument("--folder", type=Path, default=folder(), help="where the libraries go")
    given = parser.parse_args(arguments)
    if given.sanitize and given.folder.resolve() == HERE:
        return "libraries that watch themselves are slow and stay out of the package: give --folder"
    if compiler() is None:
        return "no C++ compiler was found: install g++ or clang++, or set CXX"
    try:
        built = build(given.folder, sanitize=given.sanitize, again=given.again)
    except OSError as error:
        return (f"{given.folder} cannot be written ({error.strerror or error}): run this as the owner of that folder, "
                "or give --folder and set LACE_NATIVE to the same")
    return None if built else f"{compiler()} compiled no variant: its messages are above"


if __name__ == "__main__":
    sys.exit(main())
