"""The export's exam: the bundle that was written must answer as the network that was read.

The comparison itself is engine/verify.py, the same that lace-verify runs. Here is what only an export can do: refuse,
and run the torch module in the graph's precision, because ONNX Runtime computes a bfloat16 graph in float32 on a CPU.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict

import torch
from numpy import ndarray as Array

from engine.bundle import Bundle
from engine.errors import BackendError
from engine.runtimes import open_runtime
from engine.verify import PARTS, Check, ParityError, check_bundle, compare_images
from exporter.synthesis_graph import Synthesis, Traced, prepare

RUNTIME = "onnxruntime"


@torch.no_grad()
def check_module(synthesis: Synthesis, graph: Mapping, golden: Mapping[str, Array]) -> list[Check]:
    """The torch module in the graph's precision: what its arithmetic, not only its weights, does to a picture."""
    prepared, _ = prepare(synthesis, graph["precision"], graph["lowering"])
    model = Traced(prepared, "none" if graph["noise"] == "input" else graph["noise"]).eval()
    image = model(torch.from_numpy(golden["mapping.w"])[:1, None].expand(-1, synthesis.num_ws, -1), []).float().numpy()
    return list(compare_images("image of the torch module,", image, golden["synthesis.image"], graph["precision"]))


def examine(bundle: Bundle, *, parts: Sequence[str] = PARTS) -> list[Check]:
    """All checks; raises ParityError that names the first one that did not pass."""
    try:
        checks = check_bundle(bundle, open_runtime(bundle, RUNTIME), parts=parts)
    except BackendError as error:
        raise ParityError(f"the exported graphs cannot be run: {error}") from error
    refuse(checks)
    return checks


def refuse(checks: Sequence[Check]) -> None:
    failed = [check for check in checks if not check.passed]
    if not failed:
        return
    check = failed[0]
    if check.passed is None:
        raise ParityError(f"the exported bundle could not be checked ({check.name}): {check.note}")
    others = f" ({len(failed) - 1} more checks failed too)" if len(failed) > 1 else ""
    side = "at least" if check.name.endswith("psnr") else "at most"
    raise ParityError(
        f"the exported bundle does not answer as the original network: {check.name} is {check.error:.3g}, and must be "
        f"{side} {check.limit:.3g}{others}. Nothing was written. If this is fp16 or bf16, export with --precision "
        "fp32; if it is fp32, this is a bug of the exporter: please report it with the checkpoint's kind"
    )


def record(checks: Sequence[Check]) -> list[dict]:
    """The checks as the manifest keeps them."""
    return [{key: value for key, value in asdict(check).items() if value != ""} for check in checks]
