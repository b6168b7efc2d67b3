"""Where a report comes from: machine, versions, commit."""

import os
import platform
from pathlib import Path

from engine import origin
from engine.origin import git, processor


def machine() -> dict:
    facts = {"system": f"{platform.system()} {platform.machine()}", "cores": os.cpu_count()}
    first = processor()
    return {**facts, **({"cpu": first["model name"]} if "model name" in first else {})}


def versions() -> dict[str, str]:
    return origin.versions(("numpy", "torch", "onnxruntime"))


def commit() -> str | None:
    """The commit of this code, with a + when files were changed since; None outside a checkout."""
    root = Path(__file__).parent.parent
    if not (root / ".git").exists():
        return None
    return git(root, "rev-parse", "HEAD") + ("+" if git(root, "status", "--porcelain") else "") or None
