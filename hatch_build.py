"""What installing does beside copying: it compiles the sources of kernels/cpu, where there is a C++ compiler."""

import importlib
import sys
from pathlib import Path
from types import ModuleType

from hatchling.builders.hooks.plugin.interface import BuildHookInterface
from packaging.tags import platform_tags


class CpuField(BuildHookInterface):
    """Without a compiler the package works too: runtime "onnxruntime" then solves in the place of "native"."""

    def initialize(self, version: str, build_data: dict) -> None:
        # A bare package: engine/__init__.py needs what is not installed while a wheel is built.
        engine = sys.modules["engine"] = ModuleType("engine")
        engine.__path__ = [str(Path(self.root) / "engine")]
        try:
            built = importlib.import_module("engine.native.build").build()
        finally:
            for name in [name for name in sys.modules if name.partition(".")[0] == "engine"]:
                del sys.modules[name]
        if not built:
            self.app.display_warning("no C++ compiler was found (g++, clang++ or $CXX): runtime 'native' is left out")
            return
        build_data["artifacts"] += [f"engine/native/{path.name}" for path in built]
        build_data["pure_python"], build_data["tag"] = False, f"py3-none-{next(platform_tags())}"
