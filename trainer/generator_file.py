"""The averaged generator of a training as a file of its own: safetensors in the layout of NVIDIA's checkpoints."""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes

from engine.errors import CheckpointError
from exporter.checkpoints import load_generator as load_checkpoint
from exporter.generators import Parts
from exporter.generators.state import stylegan2_parts
from trainer.data import save_atomically

FORMAT = "lace-engine generator"
METADATA = "lace_generator"


def export_generator(checkpoint: Path, path: Path) -> Path:
    """Write the averaged weights of ``checkpoint.pt`` to ``path`` (.safetensors, float32), an eighth of its size."""
    try:
        state = torch.load(checkpoint, map_location="cpu", weights_only=True)
        weights, config = {k: v.float().contiguous() for k, v in state["ema"].items()}, state["config"]
    except Exception as error:  # torch.load has no common error for a damaged file
        raise CheckpointError(
            f"cannot read {checkpoint}: {error}; expected a checkpoint of `lace-train gan`"
        ) from error
    pictures = state["step"] * config["batch"]
    facts = {"format": FORMAT, "version": 1, "config": config, "pictures": pictures, "seconds": state["seconds"]}
    data = to_bytes(weights, metadata={METADATA: json.dumps(facts)})
    save_atomically(Path(path), lambda p: p.write_bytes(data))
    return Path(path)


def load_generator(path: Path) -> Parts:
    """Mapping and synthesis of ``generator.safetensors``, or of any checkpoint that the exporter reads."""
    with open(path, "rb") as file:
        is_safetensors = file.read(9)[8:] == b"{"
    if not is_safetensors:
        return load_checkpoint(path)
    try:
        with safe_open(str(path), framework="numpy") as file:
            facts = json.loads((file.metadata() or {}).get(METADATA, "{}"))
            arrays = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error
    if facts.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not a generator; expected a file of `lace-train gan`")
    return stylegan2_parts(arrays, source="lace-train")
