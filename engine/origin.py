"""Where a measurement comes from: pieces of what records and reports say of packages, processor and code."""

import platform
import subprocess
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from engine import __version__


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Of this engine, of Python, and of those of the packages that are installed."""
    return {"lace-engine": __version__, "python": platform.python_version(), **installed(packages)}


def installed(packages: Iterable[str]) -> dict[str, str]:
    """The versions of those of the packages that are installed."""
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


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
