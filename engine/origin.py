"""Where a measurement comes from: pieces of what records and reports say of packages, processor and code."""

import os
import platform
import subprocess
from collections.abc import Iterable
from pathlib import Path

from engine import __version__
from engine.runtimes.packages import installed

PACKAGES = ("numpy", "onnxruntime", "openvino", "torch", "onnx")  # what decides results and speed
ROOT = Path(__file__).resolve().parent.parent


def versions(packages: Iterable[str] = PACKAGES) -> dict[str, str]:
    """Of this engine, of Python, and of those of the packages that are installed."""
    return {"lace-engine": __version__, "python": platform.python_version(), **installed(packages)}


def machine() -> dict:
    """System, processor, the cores that this process may use, and the memory in GiB where the system says it."""
    first = processor()
    name = first.get("model name") or platform.processor() or "unknown"
    facts = {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": f"{name} (model {first['model']})" if "model" in first else name,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
    }
    if "SC_PHYS_PAGES" in getattr(os, "sysconf_names", {}):
        facts["memory_gib"] = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    return facts


def commit() -> str:
    """Twelve digits of the commit of this code, with a + where tracked files were changed since; or 'installed'."""
    # An installed copy may lie below somebody else's repository.
    if not git(ROOT, "ls-files", "engine/origin.py"):
        return "installed"
    changed = git(ROOT, "status", "--porcelain", "--untracked-files=no")
    return git(ROOT, "rev-parse", "--short=12", "HEAD") + ("+" if changed else "")


def processor() -> dict[str, str]:
    """What Linux says of the first processor, 'model name' and 'flags' for example; nothing on other systems."""
    table = Path("/proc/cpuinfo")
    if not table.exists():
        return {}
    entries = [line.partition(":") for line in table.read_text(encoding="utf-8").splitlines()]
    return {key.strip(): value.strip() for key, _, value in reversed(entries)}


def git(root: Path, *arguments: str) -> str:
    """What git prints in a folder; '' where there is no git, or where it fails."""
    try:
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout.strip()
