"""Plans: the compiled synthesis of a bundle, and the cache that keeps them.

A plan holds code for a GPU. So only plans that were built here are opened: they lie in this user's cache folder, and a
bundle, which may come from a stranger, brings none. A bundle's content and hash do not depend on them, and they may be
deleted at any time. The name of a file says all that the plan depends on, and how its content hashes::

    synthesis.tensorrt_rtx-1.7.1.116.sm80+sm86+sm89+sm120.fp16.rows1-4-8.{of the ONNX file}.{of the plan}.plan

So a plan of another GPU, version or graph is not found, and a damaged one is recognised and built again.
"""

import contextlib
import logging
import os
from collections.abc import Sequence
from glob import escape
from pathlib import Path
from typing import TYPE_CHECKING

from engine.bundle import Bundle
from engine.folders import write_atomically
from engine.runtimes import MissingRuntime
from engine.runtimes.compiling import LIBRARIES, Plan, build, capability, load, target
from engine.runtimes.decoding import ROWS, picture_precision

if TYPE_CHECKING:
    from engine.cuda.driver import Device

log = logging.getLogger(__name__)

THIS_GPU = "gpu"


def plan_of(bundle: Bundle, library: str, wanted: str, *, precision: str | None = None,
            rows: tuple[int, int, int] = ROWS) -> Plan:
    """The plan for a target. ``precision``: None, or 'tf32' where the graph is float32."""
    version = load(library)[0].__version__
    graph = bundle.files[bundle.graph("synthesis").name]["sha256"]
    return Plan(library, version, wanted, picture_precision(bundle, precision), rows, graph)


def target_on(library: str, device: "Device") -> str:
    """The target of the plan that serves this GPU."""
    return target(library, capability(device), device.name)


# --- ahead of time -------------------------------------------------------------------------------------------------


def resolve(wanted: Sequence[str] = ()) -> list[tuple[str, str]]:
    """Libraries with the targets that they can build for here, each once.

    wanted   compute capabilities such as 'sm89' for TensorRT-RTX, which need no GPU; 'gpu' for TensorRT on the GPU of
             this machine. None: what TensorRT-RTX builds for by itself if it is installed, and 'gpu' if TensorRT is

    Raises BackendError, also MissingRuntime and NoDevice.
    """
    return list(dict.fromkeys(resolve_one(name) for name in wanted or installed()))


def resolve_one(name: str) -> tuple[str, str]:
    if name != THIS_GPU:
        found = target("tensorrt_rtx", name)
        load("tensorrt_rtx")
        return "tensorrt_rtx", found
    load("tensorrt")
    try:
        from engine.cuda.driver import Device
    except ImportError as error:
        advice = "pip install 'lace-engine[tensorrt]'"
        raise MissingRuntime(f"the GPU cannot be asked for its name ({error}): {advice}") from error
    return "tensorrt", target_on("tensorrt", Device())


def installed() -> list[str]:
    """The targets to build for where none is named."""
    found = []
    for library, name in (("tensorrt_rtx", LIBRARIES["tensorrt_rtx"].groups[0][0]), ("tensorrt", THIS_GPU)):
        with contextlib.suppress(MissingRuntime):
            load(library)
            found.append(name)
    if not found:
        raise MissingRuntime("neither TensorRT nor TensorRT-RTX is installed: pip install 'lace-engine[tensorrt]', or "
                             "'lace-engine[tensorrt-rtx]' for GeForce RTX and RTX PRO")
    return found


def build_ahead(bundle: Bundle, targets: Sequence[tuple[str, str]]) -> list[Path]:
    """Put the plans for ``resolve``'s targets into the cache, unless they are there; returns their files."""
    plans = [plan_of(bundle, library, name) for library, name in targets]
    for plan in plans:
        obtain(bundle, plan)
    return [path for plan in plans for path in files(plan)]


# --- the cache -----------------------------------------------------------------------------------------------------


def obtain(bundle: Bundle, plan: Plan, *, anew: bool = False) -> bytes:
    """The plan from the cache, or built and kept there. Raises BackendError if it cannot be built.

    anew   remove what is in the cache, because the library no longer takes it
    """
    if anew:
        for path in files(plan):
            remove(path)
    content = None if anew else find(plan)
    if content is None:
        about = LIBRARIES[plan.library]
        # A second with TensorRT-RTX; TensorRT tries out kernels on the GPU, which takes minutes.
        level = logging.INFO if about.is_portable else logging.WARNING
        log.log(level, "%s %s builds a plan for %s, once", about.title, plan.version, plan.target)
        content = build(plan, bundle.graph("synthesis"))
        keep(plan, content)
    return content


def folder() -> Path:
    """$LACE_PLANS, a folder of plans that the user trusts; or $LACE_CACHE/plans; or lace/plans in the user's cache."""
    if chosen := os.environ.get("LACE_PLANS"):
        return Path(chosen)
    base = os.environ.get("LACE_CACHE")
    root = Path(base) if base else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lace"
    return root / "plans"


def files(plan: Plan) -> list[Path]:
    return sorted(folder().glob(f"{escape(plan.stem)}.*.plan"))


def find(plan: Plan) -> bytes | None:
    """The plan as it was written; damaged files are removed."""
    for path in files(plan):
        content = path.read_bytes()
        if path.name == plan.file(content):
            return content
        log.warning("%s is damaged: the plan is built again", path)
        remove(path)
    return None


def keep(plan: Plan, content: bytes) -> None:
    """Where the cache cannot be written, plans are built in every process."""
    path = folder() / plan.file(content)
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_atomically(path, content)
    except OSError as error:
        log.warning("the plan cannot be kept in %s (%s): it will be built again", path.parent, error)


def remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink()
