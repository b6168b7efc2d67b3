"""ONNX Runtime comes in two packages that share one folder: what is wrong where both are, or were, installed."""

from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType

from engine.runtimes import MissingRuntime

PACKAGES = ("onnxruntime", "onnxruntime-gpu")


def check_onnxruntime(module: ModuleType) -> None:
    """Raises MissingRuntime where the folder of onnxruntime lost its files to the removal of the other package."""
    if hasattr(module, "InferenceSession"):
        return
    package = next(iter(installed(PACKAGES)), PACKAGES[0])
    raise MissingRuntime(f"the package {package} has lost files, as happens when the other of {' and '.join(PACKAGES)} "
                         f"is removed: install it again with: pip install --force-reinstall --no-deps {package}")


def cuda_advice() -> str:
    """How to come to the package that has the CUDA provider."""
    if len(installed(PACKAGES)) == len(PACKAGES):
        return (f"{' and '.join(PACKAGES)} are both installed and share one folder; keep one: pip uninstall -y "
                f"{' '.join(PACKAGES)} && pip install 'lace-engine[gpu]'")
    return "install it with: pip uninstall -y onnxruntime && pip install 'lace-engine[gpu]'"


def installed(packages: Iterable[str]) -> dict[str, str]:
    """The versions of those of the packages that are installed."""
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
