"""The compiled library under AddressSanitizer, UBSan and ThreadSanitizer: the native tests in a child process."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from engine import sources
from engine.native import build
from tests.test_native import KNOWN
from tests.test_native import pytestmark as needs_compiler

pytestmark = [pytest.mark.slow, needs_compiler]
VARIANT = "avx2" if set(build.VARIANTS["avx2"][0]) <= KNOWN else "plain"
ROOT = Path(__file__).parent.parent
FILES = [f"tests/test_{name}.py" for name in
         ("native", "native_doors", "native_rows", "overflow", "posterior_native", "posterior_solver")]
# Left out: other variants and what builds them; other processes, which the preloaded runtime would follow; memory that
# the sanitizers themselves refuse; other runtimes; and a comparison to 1e-4 whose rounding is that of -O3.
LEFT_OUT = ["variant_is_built", "test_C3", "cannot_run", "bfloat16_is_refused", "leaves_nothing", "sources_goes",
            "fork", "system_refuses", "memory_whole", "onnxruntime", "openvino", "numpy", "kernels_say",
            "infinite_logit_has", "fixed_steps_lead", *(name for name in build.VARIANTS if name != VARIANT)]
# Threads that race would be seen in any of these; all of the tests would take an hour.
RACES = ["threads", "any_batch", "disturbs_nobody", "leaves_makes_room", "submitted", "its_neighbours"]
KINDS = {
    "address,undefined": ("libasan.so", {"ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"}, []),
    # Python's own locks are not seen, so only what both threads of a report are in this library for is one of ours.
    "thread": ("libtsan.so", {"TSAN_OPTIONS": "halt_on_error=1 ignore_noninstrumented_modules=1"}, RACES),
}


def runtime_library(name: str) -> str | None:
    """Where the compiler has a library of its own; None if it has not."""
    asked = [str(build.compiler()), f"-print-file-name={name}"]
    found = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    return found if os.path.isabs(found) else None


def environment(folder: Path, kinds: str) -> dict[str, str]:
    """In which a child process runs the library in the folder; skips where the compiler has no such sanitizer."""
    name, options, _ = KINDS[kinds]
    # The C++ runtime comes with it: without it the sanitizer does not know how to throw.
    preloaded = [runtime_library(library) for library in (name, "libstdc++.so.6")]
    if None in preloaded:
        pytest.skip(f"{build.compiler()} has no {name}")
    return {**os.environ, **options, "LACE_NATIVE": str(folder), "LD_PRELOAD": " ".join(map(str, preloaded))}


def run(folder: Path, kinds: str, chosen: str, *files: str) -> subprocess.CompletedProcess:
    """The chosen tests of some files. pytest must neither handle faults first nor swallow what a sanitizer says."""
    given = ["-s", "-p", "no:cacheprovider", "-p", "no:faulthandler"]
    command = [sys.executable, "-m", "pytest", "-q", "-x", *given, "-k", chosen, *files]
    return subprocess.run(command, env=environment(folder, kinds), cwd=ROOT, capture_output=True, text=True,
                          timeout=3000, check=False)


@pytest.mark.parametrize("kinds", KINDS)
def test_no_sanitizer_finds_anything(tmp_path, kinds):
    assert build.build(tmp_path, [VARIANT], sanitize=kinds)
    chosen, only = " and ".join(f"not {word}" for word in LEFT_OUT), KINDS[kinds][2]
    found = run(tmp_path, kinds, f"({' or '.join(only)}) and {chosen}" if only else chosen, *FILES)
    assert found.returncode == 0, (found.stdout + found.stderr)[-8000:]
    assert int(found.stdout.split(" passed")[0].split()[-1]) > (15 if only else 60)


def test_a_read_behind_an_array_is_found(tmp_path, monkeypatch):
    """The judge is judged: with doors that check nothing, the first wrong label ends the process."""
    library, kernels = build.library_path(VARIANT, tmp_path), tmp_path / "kernels"
    shutil.copytree(sources.folder(), kernels)
    checks = kernels / "cpu" / "checks.h"
    refusal = "if (!holds) throw Refused{why};"
    assert refusal in checks.read_text()
    checks.write_text(checks.read_text().replace(refusal, "(void)holds, (void)why;"))
    monkeypatch.setattr(sources, "folder", lambda: kernels)
    assert build.build(tmp_path, [VARIANT], sanitize="address,undefined") == [library]
    found = run(tmp_path, "address,undefined", "does_not_fit_the_network", FILES[1])
    assert found.returncode != 0
    assert "AddressSanitizer" in found.stdout + found.stderr


def test_B1_random_bundles_of_strangers_touch_no_foreign_memory(tmp_path, monkeypatch):
    fuzzed = pytest.importorskip("tests.fuzzed_bundles", reason="there is no fuzzer of bundles here")
    assert build.build(tmp_path, [VARIANT], sanitize="address,undefined")
    base = tmp_path / "base.lace"
    fuzzed.write_base(base)
    for name, value in environment(tmp_path, "address,undefined").items():
        monkeypatch.setenv(name, value)
    assert fuzzed.run_child(base, 0, 1000, "native", timeout=3000).total() == 1000
