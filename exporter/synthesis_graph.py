"""synthesis.onnx: traced by torch, with everything that does not depend on the input folded beforehand.

Types live in the graph: for fp16 and bf16 the blocks from 8x8 upwards are typed so, while styles, demodulation and
the sum of pictures stay float32. Strongly typed compilers (TensorRT 11, TensorRT-RTX) and ONNX Runtime then agree on
one file. Convolution weights are stored in the type they are used in.
"""

import contextlib
import copy
import io
import logging
import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor, fx, nn
from torch.export import Dim

from engine.errors import BundleError
from exporter.field_graphs import IR_VERSION, OPSET, ROWS

# ONNX gave Conv the type bfloat16 in opset 22; everything else stays at the version that most readers know.
BF16_OPSET = 22
PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
NOISES = ("const", "none", "input")
# The bound on activations that NVIDIA trains float16 networks with. Together with normalised weights and styles it
# guarantees that no sum overflows: 256 sqrt(9 * 512) = 17,378 < 65,504.
FP16_CLAMP = 256.0
# TensorRT has no bfloat16 transposed convolution, so there the up-convolution is an ordinary one and a shuffle.
LOWERING = {"fp32": "convt", "fp16": "convt", "bf16": "poly"}
# A synthesis module of either family; nn.Module would hide its attributes from a type checker.
Synthesis = Any
# Files above this cannot be one protobuf.
PROTOBUF_LIMIT = 2**31 - 2**20


class Traced(nn.Module):
    """ws (rows, num_ws, w_dim), noise inputs -> image. ``mode`` is one of NOISES."""

    def __init__(self, synthesis: Synthesis, mode: str):
        super().__init__()
        self.synthesis: Synthesis = synthesis
        self.mode, self.noisy = mode, noisy_layers(synthesis)

    def forward(self, ws: Tensor, inputs: list[Tensor]) -> Tensor:
        if not hasattr(self.synthesis, "const_noises"):
            return self.synthesis(ws)
        noises: list[Tensor | None] = [None] * len(self.synthesis.layers)
        if self.mode != "none":
            stored = self.synthesis.const_noises()
            for position, layer in enumerate(self.noisy):
                noises[layer] = inputs[position] if self.mode == "input" else stored[layer]
        return self.synthesis(ws, noises)


def noisy_layers(synthesis: Synthesis) -> list[int]:
    """Indices of the layers whose noise does anything: a strength of zero leaves its addition out."""
    if not hasattr(synthesis, "const_noises"):
        return []
    layers = list(synthesis.layers)
    return [i for i, layer in enumerate(layers) if layer.use_noise and float(layer.noise_strength) != 0]


def noise_shapes(synthesis: Synthesis, mode: str) -> dict[str, tuple[int, int]]:
    """The noise inputs of the graph: ``noise.{layer}`` -> (r, r); empty unless the mode is 'input'."""
    if mode != "input":
        return {}
    layers = list(synthesis.layers)
    return {f"noise.{i}": (layers[i].resolution,) * 2 for i in noisy_layers(synthesis)}


def prepare(synthesis: Synthesis, precision: str, lowering: str) -> tuple[Synthesis, list[str]]:
    """A copy in the wanted precision and lowering, and remarks for the provenance."""
    remarks = []
    clamps = [m.conv_clamp for m in synthesis.modules() if hasattr(m, "conv_clamp")]
    synthesis = copy.deepcopy(synthesis).eval().requires_grad_(False)
    if precision == "fp16" and None in clamps:
        synthesis.set_conv_clamp(FP16_CLAMP)
        remarks.append(f"conv_clamp {FP16_CLAMP:g} was set, which float16 needs and the file does not have")
    synthesis.set_precision(PRECISIONS[precision])
    synthesis.set_lowering(lowering)
    return synthesis, remarks


def fold(module: fx.GraphModule) -> fx.GraphModule:
    """Evaluate, once, every node that does not depend on an input."""
    values: dict[fx.Node, Any] = {}
    for node in module.graph.nodes:
        if node.op == "get_attr":
            values[node] = attribute(module, node.target)
        elif node.op == "call_function" and all(source in values for source in node.all_input_nodes):
            args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
            values[node] = node.target(*args, **kwargs)
    for node, value in values.items():
        is_used = any(user not in values for user in node.users)
        if node.op == "call_function" and is_used and isinstance(value, Tensor):
            name = f"folded_{node.name}"
            module.register_buffer(name, value.detach().contiguous())
            with module.graph.inserting_before(node):
                node.replace_all_uses_with(module.graph.get_attr(name))
    module.graph.eliminate_dead_code()
    module.delete_all_unused_submodules()
    module.recompile()
    return module


def attribute(module: nn.Module, path: str):
    for name in path.split("."):
        module = getattr(module, name)
    return module


def trace(module: Traced, noises: Mapping[str, tuple[int, int]], opset: int) -> onnx.ModelProto:
    rows = Dim(ROWS, min=1, max=4096)
    parameter = next(module.parameters())
    ws = torch.zeros(3, module.synthesis.num_ws, module.synthesis.w_dim, device=parameter.device)
    arguments = (ws, [torch.zeros(3, 1, *shape) for shape in noises.values()])
    shapes = ({0: rows}, [{0: rows} for _ in noises])
    with torch.no_grad(), quiet():
        program = torch.export.export(module, arguments, dynamic_shapes=shapes)
        folded = fold(program.module(check_guards=False))
        program = torch.export.export(folded, arguments, dynamic_shapes=shapes)
        return graph_of(program, opset)


def trace_rows(module: nn.Module, arguments: tuple[Tensor, ...]) -> onnx.ModelProto:
    """The graph of a module, all of whose inputs and outputs have rows that are free."""
    rows = Dim(ROWS, min=1, max=4096)
    shapes = tuple({0: rows} for _ in arguments)
    with torch.no_grad(), quiet():
        return graph_of(torch.export.export(module, arguments, dynamic_shapes=shapes), OPSET)


def graph_of(program: torch.export.ExportedProgram, opset: int) -> onnx.ModelProto:
    exported = torch.onnx.export(program, (), dynamo=True, opset_version=opset, verbose=False)
    assert exported is not None
    return exported.model_proto


@contextlib.contextmanager
def quiet():
    """The exporter of torch 2.13 reports its progress on stdout and warns about its own internals."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def clean(model: onnx.ModelProto, noises: Mapping[str, tuple[int, int]]) -> None:
    """Public names, named dynamic rows, and nothing of the machine that exported (torch records stack traces)."""
    graph = model.graph
    names = ["ws", *noises, "image"]
    values = [*graph.input, *graph.output]
    if len(values) != len(names):
        raise BundleError(f"the traced synthesis has {len(values)} inputs and outputs; expected {', '.join(names)}")
    renamed = {value.name: name for value, name in zip(values, names, strict=True)}
    for value in values:
        value.name = renamed[value.name]
        dimensions = value.type.tensor_type.shape.dim
        if dimensions[0].dim_value:
            raise BundleError(f"{value.name} of the traced synthesis has a frozen batch: {dimensions[0].dim_value}")
        dimensions[0].dim_param = ROWS
    for node in graph.node:
        node.input[:] = [renamed.get(name, name) for name in node.input]
        node.output[:] = [renamed.get(name, name) for name in node.output]
        strip(node)
    for record in (model, graph, *values, *graph.initializer):
        strip(record)
    del graph.value_info[:]
    model.functions.clear()
    model.ir_version = min(model.ir_version, IR_VERSION)
    model.producer_name, graph.name = "lace-engine", "synthesis"


def strip(record) -> None:
    record.doc_string = ""
    del record.metadata_props[:]


def constant_nodes(model: onnx.ModelProto) -> list[str]:
    """Nodes whose inputs are all constant: work that the export should have done."""
    known = {tensor.name for tensor in model.graph.initializer} | {""}
    known |= {node.output[0] for node in model.graph.node if node.op_type == "Constant"}
    nodes = [node for node in model.graph.node if node.op_type != "Constant"]
    return [f"{node.op_type} {node.output[0]}" for node in nodes if known.issuperset(node.input)]


def export_synthesis(synthesis: Synthesis, path: Path, *, precision: str = "fp32", noise: str = "const",
                     lowering: str | None = None) -> tuple[dict, list[str]]:
    """Write ``path``; returns the graph's record for the manifest, and remarks for the provenance."""
    lowering = lowering or LOWERING[precision]
    prepared, remarks = prepare(synthesis, precision, lowering)
    if noise != "none" and not noisy_layers(prepared):
        noise = "none"
        remarks.append("no layer of this generator adds noise")
    noises = noise_shapes(prepared, noise)
    opset = BF16_OPSET if precision == "bf16" else OPSET
    model = trace(Traced(prepared, noise).eval(), noises, opset)
    clean(model, noises)
    left = constant_nodes(model)
    if left:
        raise BundleError(f"internal error: {len(left)} constant nodes were not folded: {', '.join(left[:5])}")
    if model.ByteSize() > PROTOBUF_LIMIT:
        raise BundleError(f"this synthesis needs {model.ByteSize() / 1e9:.1f} GB; one ONNX file holds 2 GB")
    path.write_bytes(model.SerializeToString())
    parameters = sum(math.prod(tensor.dims) for tensor in model.graph.initializer)
    record = {"file": path.name, "precision": precision, "noise": noise, "lowering": lowering, "opset": opset,
              "nodes": len(model.graph.node), "parameters": parameters}
    if noises:
        record["noises"] = {name: list(shape) for name, shape in noises.items()}
    return record, remarks
