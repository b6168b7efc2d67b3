"""Every kernel compiles for every architecture, without spilling registers; the cache is whole or not there."""

import os
import re
import subprocess
import sys

import pytest

from engine import layout
from engine.cuda import compile as compiling
from engine.cuda.compile import BLOCKS, BY_PRECISION, KERNELS, TILES, WGMMA, CompileError, build
from tests.host_kernels import compiler, library

pytest.importorskip("cuda.bindings.nvrtc", reason="cuda-bindings is not installed")

ARCHITECTURES = ("sm_80", "sm_90", "sm_120")
CASES = [(source, architecture, precision) for source in ("network", "solve", "loop") for architecture in ARCHITECTURES
         for precision in (layout.PRECISIONS if source in BY_PRECISION else layout.PRECISIONS[:1])]
CASES += [("wide", WGMMA, precision) for precision in ("tf32", "fp16")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("cubins")


@pytest.mark.parametrize(("source", "architecture", "precision"), CASES)
def test_the_kernels_compile_and_spill_nothing(folder, source, architecture, precision):
    built = build(source, architecture=architecture, precision=precision, folder=folder)
    assert set(built.resources) == set(KERNELS[source])
    assert {name: r.spills for name, r in built.resources.items() if r.spills} == {}
    for name, r in built.resources.items():
        # A multiprocessor has 65,536 registers, and a block 48 KiB of shared memory without asking for more.
        assert r.registers * BLOCKS[name] <= 65_536
        assert r.shared <= 48 * 1024


@pytest.mark.parametrize("precision", ["tf32", "fp16"])
def test_products_by_wgmma_overlap(tmp_path, monkeypatch, precision):
    """The compiler says so where it makes them wait for each other, because their registers are used in between."""
    logs, read = [], compiling.resources
    monkeypatch.setattr(compiling, "resources", lambda log: logs.append(log) or read(log))
    build("wide", architecture=WGMMA, precision=precision, folder=tmp_path)
    assert "serialized" not in logs[0]
    texts = compiling.sources()
    spoilt = texts["wide.cuh"].replace("            async.commit();", "            async.commit(); own[0] += chunk;")
    monkeypatch.setattr(compiling, "sources", lambda: texts | {"wide.cuh": spoilt})
    build("wide", architecture=WGMMA, precision=precision, folder=tmp_path)
    assert "serialized" in logs[1]


def test_what_does_not_depend_on_the_precision_is_compiled_once(folder):
    places = [set(folder.iterdir())]
    for precision in layout.PRECISIONS:
        build("loop", architecture="sm_90", precision=precision, folder=folder)
        places.append(set(folder.iterdir()))
    assert places[1] == places[-1]


def test_narrow_layers_leave_room_for_a_second_block(folder):
    """The narrow tile is for few rows, where many small blocks hide each other's latency."""
    resources = build("network", architecture="sm_90", precision="fp16", folder=folder).resources["dense_16x8"]
    assert resources.registers * BLOCKS["dense_16x8"] <= 65_536 // 2


def test_a_cubin_comes_from_the_cache_as_it_was_built(tmp_path, monkeypatch):
    first = build("loop", architecture="sm_90", folder=tmp_path)
    monkeypatch.setattr(compiling, "compile_source", lambda *_: pytest.fail("it was compile_source again"))
    assert build("loop", architecture="sm_90", folder=tmp_path) == first


def test_a_damaged_file_of_the_cache_is_made_anew(tmp_path):
    first = build("loop", architecture="sm_90", folder=tmp_path)
    (place,) = tmp_path.iterdir()
    for content in (b"", place.read_bytes()[:-1], b"nonsense\n", b'{"sha256": 1}\n'):
        place.write_bytes(content)
        assert build("loop", architecture="sm_90", folder=tmp_path) == first
        assert place.read_bytes().endswith(first.cubin)


@pytest.mark.parametrize("change", ["source", "constant", "version", "architecture", "precision"])
def test_the_cache_knows_all_that_a_cubin_depends_on(tmp_path, monkeypatch, change):
    options = {"architecture": "sm_90", "precision": "fp32"}
    monkeypatch.setattr(compiling, "BY_PRECISION", ("loop",))
    build("loop", folder=tmp_path, **options)
    texts = compiling.sources()
    if change == "source":
        monkeypatch.setattr(compiling, "sources", lambda: texts | {"loop.cu": texts["loop.cu"] + "\n"})
    elif change == "constant":
        monkeypatch.setattr(compiling, "sources", lambda: texts | {"constants.cuh": texts["constants.cuh"] + "\n"})
    elif change == "version":
        monkeypatch.setattr(compiling, "nvrtc_version", lambda: (99, 0))
    else:
        options[change] = {"architecture": "sm_80", "precision": "fp16"}[change]
    build("loop", folder=tmp_path, **options)
    assert len(list(tmp_path.iterdir())) == 2


def test_a_cache_that_cannot_be_written_does_no_harm(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    assert build("loop", architecture="sm_90", folder=tmp_path / "file").cubin


def test_refusals_say_what_was_wrong(tmp_path, monkeypatch):
    with pytest.raises(CompileError, match=r"no source 'x'.*fp16"):
        build("x", architecture="sm_90", folder=tmp_path)
    with pytest.raises(CompileError, match=r"refused loop\.cu.*sm_1\b"):
        build("loop", architecture="sm_1", folder=tmp_path)
    texts = compiling.sources()
    monkeypatch.setattr(compiling, "sources", lambda: texts | {"loop.cu": "int x = y;"})
    with pytest.raises(CompileError, match=r'identifier "y" is undefined'):
        build("loop", architecture="sm_90", folder=tmp_path)
    for architecture, precision in (("sm_90", "fp16"), (WGMMA, "fp32")):
        with pytest.raises(CompileError, match="wgmma multiplies tf32 and fp16 on sm_90a"):
            build("wide", architecture=architecture, precision=precision, folder=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_importing_the_kernels_imports_no_cuda():
    command = (
        "import sys, engine.cuda.compile, engine.layout; assert not any(m.split('.')[0] == 'cuda' for m in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", command], check=True)


def claims():
    """What numpy says about the structs, as C."""
    includes = "".join(f'#include "{name}.cuh"\n' for name in ("constants", "common", "layout"))
    return includes + "".join(
        f"static_assert(sizeof({name}) == {dtype.itemsize});\n"
        + "".join(
            f"static_assert(__builtin_offsetof({name}, {field}) == {dtype.fields[field][1]});\n"
            for field in dtype.names
        )
        for name, dtype in layout.DTYPES.items()
    )


def test_the_device_compiler_lays_structs_out_as_numpy_does():
    texts = compiling.sources() | {"loop.cu": claims()}
    compiling.compile_source("loop.cu", texts, ("--std=c++17", "--gpu-architecture=sm_90"))
    texts["loop.cu"] = claims().replace("conditional) == ", "conditional) == 1")
    with pytest.raises(CompileError, match="static assertion failed"):
        compiling.compile_source("loop.cu", texts, ("--std=c++17", "--gpu-architecture=sm_90"))


@pytest.mark.skipif(compiler() is None and "CI" not in os.environ, reason="no C++ compiler is installed")
def test_the_host_compiler_lays_structs_out_as_numpy_does():
    library("float", "fp16", claims())


def test_every_kernel_is_known_with_its_block():
    texts = compiling.sources()
    for source, kernels in KERNELS.items():
        found = re.findall(r"^(?:KERNEL|DEFINE|DEFINE_PIXELS)\((\w+)", texts[f"{source}.cu"], re.MULTILINE)
        assert set(found) == set(kernels)
    assert set(TILES) < set(BLOCKS)
