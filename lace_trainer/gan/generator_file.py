"""The averaged generator of a training as a file of its own: safetensors in the layout of NVIDIA's checkpoints."""

import json
from pathlib import Path

import torch
from safetensors.torch import save as to_bytes

from engine.errors import CheckpointError
from engine.folders import write_atomically
from exporter.checkpoints import GENERATOR_METADATA

FORMAT = "lace-engine generator"


def export_generator(checkpoint: Path, path: Path, score: dict | None = None) -> Path:
    """Write the averaged weights of ``checkpoint.pt`` to ``path`` (.safetensors, float32), an eighth of its size.

    score   what ``lace_trainer.gan.score`` found, for the record in the metadata
    """
    try:
        state = torch.load(checkpoint, map_location="cpu", weights_only=True)
        weights, config = {k: v.float().contiguous() for k, v in state["ema"].items()}, state["config"]
    except Exception as error:  # torch.load has no common error for a damaged file
        raise CheckpointError(
            f"cannot read {checkpoint}: {error}; expected a checkpoint of `lace-train gan`"
        ) from error
    pictures = state["step"] * config["batch"]
    facts = {"format": FORMAT, "version": 1, "config": config, "pictures": pictures, "seconds": state["seconds"]}
    facts |= {"machine": state["machine"]} if "machine" in state else {}
    facts |= {"score": score} if score else {}
    data = to_bytes(weights, metadata={GENERATOR_METADATA: json.dumps(facts)})
    write_atomically(path, data)
    return Path(path)
