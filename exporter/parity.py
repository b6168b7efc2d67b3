"""The export's exam: the bundle that was written must answer as the network that was read.

The comparison itself is engine/verify.py, the same that lace-verify runs. Here is what only an export can do: refuse,
and examine a bfloat16 graph, which ONNX Runtime cannot run on a CPU, through a float32 twin of it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace

import numpy as np
import onnx
import torch
from numpy import ndarray as Array
from onnx import TensorProto, numpy_helper

from engine.bundle import Bundle
from engine.errors import BackendError
from engine.runtimes import Drawing, open_runtime
from engine.verify import PARTS, Check, ParityError, check_bundle, check_synthesis, compare_images
from exporter.synthesis_graph import Synthesis, Traced, prepare

RUNTIME = "onnxruntime"


def float32_twin(model: onnx.ModelProto) -> onnx.ModelProto:
    """The graph with every bfloat16 made float32: the same nodes and the same rounded weights."""
    for i, tensor in enumerate(model.graph.initializer):
        if tensor.data_type == TensorProto.BFLOAT16:
            values = numpy_helper.to_array(tensor).astype(np.float32)
            model.graph.initializer[i].CopyFrom(numpy_helper.from_array(values, tensor.name))
    for node in model.graph.node:
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.name == "to" and attribute.i == TensorProto.BFLOAT16:
                attribute.i = TensorProto.FLOAT
            if attribute.HasField("t") and attribute.t.data_type == TensorProto.BFLOAT16:
                values = numpy_helper.to_array(attribute.t).astype(np.float32)
                attribute.t.CopyFrom(numpy_helper.from_array(values))
    return model


class Twin(Drawing):
    """Pictures by a graph in memory; noise inputs are zero."""

    name, version, precision = "twin", "", "fp32"

    def __init__(self, model: onnx.ModelProto):
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        self.session = onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])

    def synthesize(self, ws: Array, noises: Mapping[str, Array] | None = None) -> Array:
        feeds = {"ws": ws}
        for node in self.session.get_inputs()[1:]:
            feeds[node.name] = np.zeros((len(ws), *node.shape[1:]), np.float32)
        return np.asarray(self.session.run(["image"], feeds)[0])


def check_twin(bundle: Bundle) -> list[Check]:
    note = "ONNX Runtime has no bfloat16 convolution on a CPU: checked on the same graph with its types made float32"
    twin = Twin(float32_twin(onnx.load(bundle.graph("synthesis"))))
    return [replace(check, note=note) for check in check_synthesis(bundle, twin)]


@torch.no_grad()
def check_module(synthesis: Synthesis, graph: Mapping, golden: Mapping[str, Array]) -> list[Check]:
    """The torch module in the graph's precision: what its arithmetic, not only its weights, does to a picture."""
    prepared, _ = prepare(synthesis, graph["precision"], graph["lowering"])
    model = Traced(prepared, "none" if graph["noise"] == "input" else graph["noise"]).eval()
    image = model(torch.from_numpy(golden["w"])[:1, None].expand(-1, synthesis.num_ws, -1), []).float().numpy()
    return list(compare_images("image of the torch module,", image, golden["image"], graph["precision"]))


def examine(bundle: Bundle, *, parts: Sequence[str] = PARTS) -> list[Check]:
    """All checks; raises ParityError that names the first one that did not pass."""
    try:
        checks = check_bundle(bundle, open_runtime(bundle, RUNTIME), parts=parts)
    except BackendError as error:
        raise ParityError(f"the exported graphs cannot be run: {error}") from error
    if any(check.passed is None for check in checks) and bundle.manifest.graphs["synthesis"]["precision"] == "bf16":
        checks = [check for check in checks if check.passed is not None] + check_twin(bundle)
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
