"""What installing does beside copying: it compiles the sources of kernels/cpu, where there is a C++ compiler."""

import importlib
import sys

from hatchling.builders.hooks.plugin.interface import BuildHookInterface
from packaging.tags import platform_tags


class CpuField(BuildHookInterface):
    """Without a compiler the package works too: runtime "onnxruntime" then solves in the place of "native"."""

    def initialize(self, version: str, build_data: dict) -> None:
        sys.path.insert(0, self.root)
        try:
            module = importlib.import_module("kernels.cpu.build")
        finally:
            sys.path.remove(self.root)
        built = module.build()
        if not built:
            self.app.display_warning("no C++ compiler was found (g++, clang++ or $CXX): runtime 'native' is left out")
            return
        build_data["artifacts"] += [f"kernels/cpu/{path.name}" for path in built]
        build_data["pure_python"], build_data["tag"] = False, f"py3-none-{next(platform_tags())}"
