"""Small networks on disk: safetensors, kernels in float16, the rest in float32, the facts as JSON in the metadata."""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from engine.errors import CheckpointError
from engine.folders import write_atomically


@torch.no_grad()
def round_weights(model: nn.Module) -> None:
    """Round matrices and kernels to what the file will hold (float16), so that the scores describe the file."""
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.copy_(parameter.half().float())


def save_weights(model: nn.Module, path: Path, facts: dict) -> None:
    """Write the model's tensors and ``facts``, of which "format" names the kind of file."""
    state = {k: v.half() if v.ndim > 1 else v for k, v in model.state_dict().items() if "num_batches" not in k}
    state = {k: v.contiguous() for k, v in state.items()}
    data = to_bytes(state, metadata={"lace": json.dumps(facts)})
    write_atomically(path, data)


def read_weights(path: Path, format: str) -> tuple[dict, dict[str, Tensor]]:
    """Facts and float32 tensors of what ``save_weights`` wrote.

    format   the kind of file that is wanted, "lace-engine classifier"; CheckpointError for another or a damaged one
    """
    kind = format.removeprefix("lace-engine ")
    try:
        with safe_open(str(path), framework="pt") as file:
            facts = json.loads((file.metadata() or {}).get("lace", "{}"))
            state = {key: file.get_tensor(key).float() for key in file.keys()}  # noqa: SIM118 - not a dict
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(f"cannot read the {kind} {path}: {error}; train one with lace-train") from error
    if facts.get("format") != format:
        raise CheckpointError(f"{path} holds no {kind}; expected a file of `lace-train {kind}`")
    return facts, state


def fill(model: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    """Load ``state`` into the model; CheckpointError if tensors lack or are surplus."""
    missing, unexpected = model.load_state_dict(state, strict=False)
    if unexpected or any("num_batches" not in key for key in missing):
        raise CheckpointError(f"{path} lacks or has surplus tensors: {sorted(missing)[:3]}, {sorted(unexpected)[:3]}")
    model.to(memory_format=torch.channels_last).eval().requires_grad_(False)
