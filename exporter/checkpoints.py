"""Generators from files: recognises what a checkpoint holds by its content and hands it to the right converter."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from engine.errors import CheckpointError
from exporter.archives import SUPPORTED, read_archive, safetensors_metadata
from exporter.generators import Parts
from exporter.generators.state import named_list
from exporter.passive import Module
from exporter.unpickle import guarded

GENERATOR_METADATA = "lace_generator"
HEAD_KEYS = {"heads.weight", "linear.weight", "f.heads.weight", "f.linear.weight"}


def load_generator(path: str | Path) -> Parts:
    """Mapping and synthesis of any supported checkpoint, as torch modules in evaluation mode.

    Raises CheckpointError for everything else, without having executed anything of the file.
    """
    archive = read_archive(path)
    read = from_safetensors if archive.container == "safetensors" else convert
    try:
        return guarded("the checkpoint", lambda: read(archive.content))
    except CheckpointError as error:
        raise CheckpointError(f"cannot use {path}: {error}") from error


def convert(content: Any) -> Parts:
    from exporter.generators import nvidia, rosinality, tensorflow
    from exporter.generators.state import stylegan2_parts

    if isinstance(content, Module) or (isinstance(content, dict) and any_module(content)):
        return nvidia.from_nvidia(content)
    if tensorflow.is_tensorflow(content):
        return tensorflow.from_tensorflow(content)
    if rosinality.is_rosinality(content):
        return rosinality.from_rosinality(content)
    if isinstance(content, dict) and isinstance(content.get("ema"), dict) and "config" in content:
        arrays = content["ema"]
        if all(isinstance(value, np.ndarray) for value in arrays.values()):
            return stylegan2_parts(arrays, source="lace-train")
    raise CheckpointError(describe(content))


def from_safetensors(data: bytes) -> Parts:
    """The generator file of our own trainer: tensors in NVIDIA's layout, and what they are in the metadata."""
    from exporter.generators.state import stylegan2_parts

    text = safetensors_metadata(data).get(GENERATOR_METADATA)
    if text is None:
        raise CheckpointError(f"it is a safetensors file without a generator of `lace-train gan`; {SUPPORTED}")
    return stylegan2_parts(safetensors.numpy.load(data), source="lace-train")


def training_record(path: Path) -> dict:
    """What our own trainer wrote into its generator file: configuration, pictures seen, seconds. Else nothing."""
    with open(path, "rb") as file:
        if file.read(9)[8:] != b"{":
            return {}
    text = safetensors_metadata(path.read_bytes()).get(GENERATOR_METADATA)
    return {"training": json.loads(text)} if text else {}


def any_module(content: dict) -> bool:
    return any(isinstance(value, Module) for value in content.values())


def describe(content: Any) -> str:
    """What was found instead of a generator."""
    if not isinstance(content, dict):
        return f"it holds a {type(content).__name__}, not a generator; {SUPPORTED}"
    inner = content.get("state_dict", content.get("model_state_dict"))
    if isinstance(inner, dict) and HEAD_KEYS & set(inner):
        return "it holds an attribute head of LACE, not a generator; give it as a head (--heads)"
    if any(str(key).startswith(("synthesis.", "mapping.", "style.", "convs.")) for key in content):
        return f"it is a bare state_dict; wrap it as {{'g_ema': state_dict}} if it is rosinality's; {SUPPORTED}"
    return f"it holds a dict with the keys {named_list([str(key)[:40] for key in content]) or 'none'}; {SUPPORTED}"
