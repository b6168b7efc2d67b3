"""What installing does beside copying: it compiles the field for the CPU, where there is a C++ compiler."""

import importlib.util
from pathlib import Path

from hatchling.builders.hooks.plugin.interface import BuildHookInterface
from packaging.tags import platform_tags


class CpuField(BuildHookInterface):
    """Without a compiler the package works too: runtime "onnxruntime" then solves in the place of "native"."""

    def initialize(self, version: str, build_data: dict) -> None:
        place = Path(self.root) / "kernels" / "cpu" / "build.py"
        spec = importlib.util.spec_from_file_location("lace_cpu_build", place)
        if spec is None or spec.loader is None:
            raise OSError(f"{place} cannot be read")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        built = module.build()
        if not built:
            self.app.display_warning("no C++ compiler was found (g++, clang++ or $CXX): runtime 'native' is left out")
            return
        build_data["artifacts"] += [f"kernels/cpu/{path.name}" for path in built]
        build_data["pure_python"], build_data["tag"] = False, f"py3-none-{next(platform_tags())}"
