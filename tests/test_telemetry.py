"""Findings B4: no library that we start opens a connection, or writes outside of our folders."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from engine.native.build import compiler

pytestmark = pytest.mark.skipif(compiler() is None or sys.platform != "linux", reason="needs a C++ compiler and Linux")

# Stands before the C library's: whoever connects to another place than this machine's own files leaves a line.
SHIM = r"""
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>
extern "C" int connect(int handle, const sockaddr* address, socklen_t size) {
    if (address->sa_family != AF_UNIX) {
        FILE* file = fopen(getenv("LACE_CONNECTIONS"), "a");
        fprintf(file, "family %d\n", address->sa_family);
        fclose(file);
    }
    using Connect = int (*)(int, const sockaddr*, socklen_t);
    return reinterpret_cast<Connect>(dlsym(RTLD_NEXT, "connect"))(handle, address, size);
}
"""
SAMPLE = """
from engine import Sampler
with Sampler("demo", runtime="{runtime}", threads=1) as sampler:
    assert sampler.sample("smile", seeds=range(2))[0].image is not None
    assert sampler.submit(__import__("engine").Request("hat", seed=1)).result(timeout=60).image is not None
"""
CONNECT = "import socket\ntry:\n    socket.create_connection(('127.0.0.1', 9), 1)\nexcept OSError:\n    pass"


@pytest.fixture(scope="module")
def shim(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("shim")
    (folder / "shim.cpp").write_text(SHIM)
    command = [compiler(), "-shared", "-fPIC", str(folder / "shim.cpp"), "-o", str(folder / "shim.so"), "-ldl"]
    subprocess.run(command, check=True)
    return folder / "shim.so"


def run(code: str, shim: Path, home: Path) -> tuple[str, list[str]]:
    """What connected, and the files that appeared below a home of its own."""
    log = home.parent / "connections"
    log.write_text("")
    home.mkdir()
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("ORT_", "XDG_"))}
    environment |= {"HOME": str(home), "LD_PRELOAD": str(shim), "LACE_CONNECTIONS": str(log)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False,
                          cwd=Path(__file__).parents[1], timeout=120)
    assert done.returncode == 0, done.stderr
    return log.read_text(), sorted(path.name for path in home.rglob("*") if path.is_file())


@pytest.mark.parametrize("runtime", ["native", "onnxruntime", "openvino"])
def test_B4_sampling_and_decoding_connects_to_nobody_and_writes_nothing(shim, tmp_path, runtime):
    assert run(SAMPLE.format(runtime=runtime), shim, tmp_path / "home") == ("", [])


def test_a_connection_would_be_seen(shim, tmp_path):
    connections, _ = run(CONNECT, shim, tmp_path / "home")
    assert connections.startswith("family 2")
