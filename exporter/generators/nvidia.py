"""NVIDIA's stylegan2-ada-pytorch and stylegan3: passive module records, or bare state_dicts -> Parts.

Of records everything is read from the attributes and shapes of the modules; the constructor arguments that the files
also hold differ between the two repositories and are ignored. A state_dict has names and tensors only: what they do
not say has the value that NVIDIA trains with.
"""

from collections.abc import Mapping as Dict
from typing import Any

import numpy as np

from engine.errors import CheckpointError
from exporter.generators import Parts
from exporter.generators.records import Record, attributes, child, children, is_network, named_arrays, plain, uniform
from exporter.generators.state import named_list, stylegan2_parts
from exporter.passive import shown

CLAMP = 256.0
UNSTATED = ("a bare state_dict does not say which bound the activations were trained with; "
            f"{CLAMP:g} was taken, as NVIDIA's training does")


def from_nvidia(content: Dict[str, Any] | Record) -> Parts:
    """``content``: a snapshot with ``G_ema``, or the generator's record itself."""
    record = content.get("G_ema") if isinstance(content, dict) else content
    if not is_network(record):
        keys = named_list([str(key) for key in content]) if isinstance(content, dict) else shown(content)
        raise CheckpointError(f"the snapshot has no module under 'G_ema'; its keys are: {keys}")
    synthesis = children(child(record, "synthesis"))  # type: ignore[arg-type]
    if "input" in synthesis:
        # Late: StyleGAN2 users need none of it.
        from exporter.generators import stylegan3_files

        return stylegan3_files.from_nvidia(record)  # type: ignore[arg-type]
    if "b4" not in synthesis:
        raise CheckpointError(
            f"the synthesis network is neither StyleGAN2 (b4, b8, ...) nor StyleGAN3 (input, L0_...); "
            f"it has: {named_list(list(synthesis))}"
        )
    return from_stylegan2(record)  # type: ignore[arg-type]


def from_stylegan2(record: Record) -> Parts:
    mapping, synthesis = child(record, "mapping"), child(record, "synthesis")
    blocks = [block for name, block in children(synthesis).items() if name != "b4"] + [child(synthesis, "b4")]
    layers = [layer for block in blocks for name, layer in children(block).items() if name.startswith("conv")]
    dense = [layer for name, layer in children(mapping).items() if name.startswith("fc")]
    uniform(layers + dense, "activation", expected="lrelu")
    pictures = [layer for block in blocks for name, layer in children(block).items() if name == "torgb"]
    parts = stylegan2_parts(
        {**named_arrays(mapping, "mapping."), **named_arrays(synthesis, "synthesis.")},
        source="nvidia",
        lr_multiplier=positive(uniform(dense, "bias_gain"), "bias_gain") or 0.01,
        conv_clamp=positive(uniform(layers + pictures, "conv_clamp"), "conv_clamp"),
        num_fp16_res=sum(plain(attributes(block).get("use_fp16")) is True for block in blocks),
    )
    stated = uniform(blocks, "architecture")
    if stated is not None and parts.facts.architecture != f"stylegan2-{stated}":
        raise CheckpointError(f"the file calls its architecture {shown(stated)}, its tensors are "
                              f"{parts.facts.architecture}")
    return parts


def positive(value: Any, name: str) -> float | None:
    if value is not None and not (isinstance(value, (int, float)) and 0 < value < np.inf):
        raise CheckpointError(f"the file states {name} = {shown(value)}; expected a positive number")
    return None if value is None else float(value)


def from_state(arrays: Dict[str, np.ndarray], remarks: tuple[str, ...] = ()) -> Parts:
    """A bare state_dict of either family: ``mapping.fc0.weight``, ``synthesis.b4.const``, ..."""
    if any(name.startswith("synthesis.input.") for name in arrays):
        from exporter.generators import stylegan3_files

        return stylegan3_files.from_state(arrays, remarks)
    return stylegan2_parts(arrays, source="nvidia", conv_clamp=CLAMP, remarks=(*remarks, UNSTATED))
