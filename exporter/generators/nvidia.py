"""NVIDIA's pickles of stylegan2-ada-pytorch and stylegan3: passive module records -> Parts.

Everything is read from the attributes and shapes of the modules; the constructor arguments that the files also
hold differ between the two repositories and are ignored.
"""

from collections.abc import Mapping as Dict
from typing import Any

import numpy as np

from engine.errors import CheckpointError
from exporter.generators import Parts
from exporter.generators.state import named_list, stylegan2_parts
from exporter.passive import Module

MAX_TENSORS = 20_000


def from_nvidia(content: Dict[str, Any] | Module) -> Parts:
    """``content``: a snapshot with ``G_ema``, or the generator's record itself."""
    record = content if isinstance(content, Module) else content.get("G_ema")
    if not isinstance(record, Module):
        keys = named_list([str(key) for key in content]) if isinstance(content, dict) else ""
        raise CheckpointError(f"the snapshot has no module under 'G_ema'; its keys are: {keys}")
    if record.class_name.startswith("Superres") or "embed_proj" in children(child(record, "mapping")):
        raise CheckpointError("this is a StyleGAN-XL generator, which is not supported; use StyleGAN2 or StyleGAN3")
    synthesis = children(child(record, "synthesis"))
    if "input" in synthesis:
        return from_stylegan3(record)
    if "b4" not in synthesis:
        raise CheckpointError(
            f"the synthesis network is neither StyleGAN2 (b4, b8, ...) nor StyleGAN3 (input, L0_...); "
            f"it has: {named_list(list(synthesis))}"
        )
    return from_stylegan2(record)


def from_stylegan3(record: Module) -> Parts:
    # Late: StyleGAN2 users need none of it.
    from exporter.generators import stylegan3

    parts = stylegan3.from_nvidia(record)
    for module in (parts.mapping, parts.synthesis):
        module.eval().requires_grad_(False)
    return parts


def from_stylegan2(record: Module) -> Parts:
    mapping, synthesis = child(record, "mapping"), child(record, "synthesis")
    blocks = [block for name, block in children(synthesis).items() if name != "b4"] + [child(synthesis, "b4")]
    layers = [layer for block in blocks for name, layer in children(block).items() if name.startswith("conv")]
    dense = [layer for name, layer in children(mapping).items() if name.startswith("fc")]
    uniform(layers + dense, "activation", expected="lrelu")
    pictures = [layer for block in blocks for name, layer in children(block).items() if name == "torgb"]
    clamp = uniform(layers + pictures, "conv_clamp")
    parts = stylegan2_parts(
        {**named_arrays(mapping, "mapping."), **named_arrays(synthesis, "synthesis.")},
        source="nvidia",
        lr_multiplier=float(uniform(dense, "bias_gain", expected=None) or 0.01),
        conv_clamp=None if clamp is None else float(clamp),
        num_fp16_res=sum(bool(block.state.get("use_fp16")) for block in blocks),
    )
    stated = uniform(blocks, "architecture")
    if stated is not None and parts.facts.architecture != f"stylegan2-{stated}":
        raise CheckpointError(f"the file calls its architecture {stated!r}, its tensors are {parts.facts.architecture}")
    return parts


def uniform(modules: list[Module], attribute: str, expected: object = None) -> Any:
    """The one value that all modules have for an attribute (None where they have none)."""
    values = [module.state.get(attribute) for module in modules] or [None]
    plain = [value.item() if isinstance(value, np.generic) else value for value in values]
    if any(value != plain[0] for value in plain) or not isinstance(plain[0], (int, float, str, type(None))):
        raise CheckpointError(f"the modules of this file differ in {attribute!r}; only one value for all is supported")
    if expected is not None and plain[0] not in (None, expected):
        raise CheckpointError(f"the file uses {attribute} {plain[0]!r}; only {expected!r} is supported")
    return plain[0]


def children(record: Module) -> dict[str, Module]:
    found = record.state.get("_modules")
    if not isinstance(found, dict):
        raise CheckpointError(f"the record of {record.class_name!r:.60} has no _modules: the file is damaged")
    return {str(name): module for name, module in found.items() if isinstance(module, Module)}


def child(record: Module, name: str) -> Module:
    found = children(record)
    if name not in found:
        raise CheckpointError(
            f"{record.class_name!r:.60} has no part {name!r}; it has: {named_list(list(found)) or 'none'}. "
            f"Expected a generator (G_ema) with mapping and synthesis"
        )
    return found[name]


def named_arrays(record: Module, prefix: str = "") -> dict[str, np.ndarray]:
    """Parameters and buffers of a module and of all below it, by their dotted names."""
    arrays: dict[str, np.ndarray] = {}
    waiting = [(prefix, record)]
    # Counting visits stops records that contain themselves, or one another many times over.
    for _ in range(MAX_TENSORS):
        if not waiting:
            return arrays
        start, module = waiting.pop()
        for table in ("_parameters", "_buffers"):
            entries = module.state.get(table)
            for name, value in entries.items() if isinstance(entries, dict) else ():
                if value is not None and not isinstance(value, np.ndarray):
                    raise CheckpointError(f"{start}{name} is a {type(value).__name__} where a tensor was expected")
                if value is not None:
                    arrays[f"{start}{name}"] = value
        waiting += [(f"{start}{name}.", inner) for name, inner in children(module).items()]
        if len(arrays) + len(waiting) > MAX_TENSORS:
            break
    raise CheckpointError(f"the checkpoint has more than {MAX_TENSORS} tensors or modules; it was refused")
