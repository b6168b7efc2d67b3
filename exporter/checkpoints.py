"""Generators from files: recognises what a checkpoint holds by its content and hands it to the right converter."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from engine.errors import CheckpointError
from exporter.archives import SUPPORTED, Archive, read_archive, safetensors_metadata
from exporter.generators import Parts
from exporter.generators.state import named_list
from exporter.passive import Foreign, Module, Network, is_a, shown
from exporter.unpickle import guarded

GENERATOR_METADATA = "lace_generator"
HEAD_KEYS = {"heads.weight", "linear.weight", "f.heads.weight", "f.linear.weight"}
# Where files keep generators: averaged ones first, then those as training left them, then what wraps either.
AVERAGED = ("G_ema", "g_ema", "params_ema", "ema", "generator_ema", "netG_ema")
PLAIN = ("G", "g", "generator", "params", "netG", "gen")
WRAPPERS = ("state_dict", "model_state_dict", "model", "weights", "GAN")
MAX_WRAPPERS = 3
CENTRES = ("latent_avg", "mean_latent")
# The tensors by which a family is known, whatever stands in front of their names; the surest first.
SIGNATURES = {
    "synthesis.b4.const": "nvidia", "synthesis.input.freqs": "nvidia", "constant_input.weight": "basicsr",
    "input.input": "rosinality", "synthesis.b4.conv1.weight": "nvidia", "style_mlp.1.weight": "basicsr",
    "style.1.weight": "rosinality", "mapping.fc0.weight": "nvidia",
}
RAW = "the averaged generator is not in this file; the one that training left was taken, and its pictures may be worse"
BARE = ("load it with the code that wrote it, and save the generator's bare state_dict: "
        "torch.save(G_ema.state_dict(), 'generator.pt'); that file is read")


@dataclass(frozen=True, slots=True)
class Found:
    """A generator in a file: the tensors or the record, the keys that lead there, and the dicts on the way."""

    value: Any
    keys: tuple[str, ...]
    outer: tuple[dict, ...]

    @property
    def is_averaged(self) -> bool:
        return not any(key in PLAIN for key in self.keys)


def load_generator(path: str | Path) -> Parts:
    """Mapping and synthesis of any supported checkpoint, as torch modules in evaluation mode.

    Raises CheckpointError for everything else, without having executed anything of the file.
    """
    archive = read_archive(path)
    try:
        return guarded("the checkpoint", lambda: read(archive))
    except CheckpointError as error:
        raise CheckpointError(f"cannot use {path}: {error}") from error


def read(archive: Archive) -> Parts:
    if archive.container == "safetensors":
        return from_safetensors(archive.content)
    parts = convert(archive.content)
    if not archive.foreign:
        return parts
    left_out = ("the file also holds objects of classes that stand for nothing here; they were left out, and nothing "
                f"was executed: {named_list(list(archive.foreign))}")
    return replace(parts, remarks=(*parts.remarks, left_out))


def convert(content: Any) -> Parts:
    from exporter.generators import nvidia, tensorflow
    from exporter.generators.records import is_network, named_arrays
    from exporter.generators.state import stylegan2_parts

    if tensorflow.is_tensorflow(content):
        return tensorflow.from_tensorflow(content)
    if is_a(content, dict) and "config" in content and is_state(content.get("ema")):
        return stylegan2_parts(content["ema"], source="lace-train")
    unknown = None
    for found in candidates(content):
        remarks = () if found.is_averaged else (RAW,)
        if is_state(found.value):
            if is_known(found.value):
                return from_state(found.value, found.outer, remarks)
            unknown = unknown or found.value
        elif is_network(found.value):
            refuse_family(found.value)
            if is_a(found.value, Module):
                return replace_remarks(nvidia.from_nvidia(found.value), remarks)
            # A whole module, saved by torch.save: its tensors have the names that its state_dict would have.
            return from_state(named_arrays(found.value), found.outer, remarks)
    raise CheckpointError(describe_state(unknown) if unknown else describe(content))


def replace_remarks(parts: Parts, remarks: tuple[str, ...]) -> Parts:
    return replace(parts, remarks=(*remarks, *parts.remarks))


def candidates(content: Any, keys: tuple[str, ...] = (), outer: tuple[dict, ...] = ()) -> Iterator[Found]:
    """What may be a generator, the most wanted first."""
    if is_a(content, Module, Foreign) or is_state(content):
        yield Found(content, keys, outer)
    elif is_a(content, dict) and len(keys) < MAX_WRAPPERS:
        for key in (*AVERAGED, *PLAIN, *WRAPPERS):
            if is_a(content.get(key), dict, Module, Foreign):
                yield from candidates(content[key], (*keys, key), (*outer, content))


def is_state(value: Any) -> bool:
    """Whether it is a state_dict: tensors by name, and nothing that holds tensors of its own."""
    if not is_a(value, dict) or not all(is_a(name, str) for name in value):
        return False
    holders = (is_a(inner, dict, Module, Network) or (is_a(inner, Foreign) and is_a(inner.state, dict))
               for inner in value.values())
    return any(is_a(inner, np.ndarray) for inner in value.values()) and not any(holders)


def from_state(state: dict[str, Any], outer: tuple[dict, ...], remarks: tuple[str, ...]) -> Parts:
    """A bare state_dict of any family that is read."""
    from exporter.generators import basicsr, nvidia, rosinality, unsupported

    tensors = {name: value for name, value in state.items() if is_a(value, np.ndarray)}
    sentence = unsupported.of_tensors(tensors)
    if sentence:
        raise CheckpointError(sentence)
    family, prefix = signature(tensors)
    if family is None:
        raise CheckpointError(describe_state(state))
    own = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    if family == "nvidia":
        return nvidia.from_state(own, remarks)
    centre = next((level[key] for level in (state, *reversed(outer)) for key in CENTRES if key in level), None)
    own = {name: value for name, value in own.items() if name not in CENTRES}
    if family == "basicsr":
        inside = prefix.endswith("stylegan_decoder.")
        return basicsr.from_state(own, centre, (*remarks, basicsr.INSIDE_GFPGAN) if inside else remarks)
    return rosinality.from_state(own, centre, remarks)


def is_known(state: dict[str, Any]) -> bool:
    """Whether there is anything to say about the network with these tensors."""
    from exporter.generators import unsupported

    return signature(state)[0] is not None or unsupported.of_tensors(state) is not None


def signature(tensors: Iterable[str]) -> tuple[str | None, str]:
    """(the family, what stands in front of its names): '', 'module.', 'decoder.', 'G_ema.' ... Averaged ones win."""
    for mark, family in SIGNATURES.items():
        prefixes = [name.removesuffix(mark) for name in tensors if name == mark or name.endswith(f".{mark}")]
        if prefixes:
            return family, min(prefixes, key=lambda prefix: ("ema" not in prefix.lower(), len(prefix)))
    return None, ""


def refuse_family(record: Module | Foreign) -> None:
    """Of a network of another family: say so before anything is converted."""
    from exporter.generators import unsupported
    from exporter.generators.records import attributes, children

    name = record.class_name if isinstance(record, Module) else record.name
    parts = children(record)
    below = {f"{outer}.{inner}.x": None for outer, part in parts.items()
             if is_a(attributes(part).get("_modules"), dict) for inner in children(part)}
    classes = [name, *(part.class_name if isinstance(part, Module) else part.name for part in parts.values())]
    sentence = unsupported.of_classes(classes) or unsupported.of_tensors([*(f"{part}.x" for part in parts), *below])
    if sentence:
        raise CheckpointError(sentence)


def from_safetensors(data: bytes) -> Parts:
    """The generator file of our own trainer, or a state_dict of any family that is read."""
    from exporter.generators.state import stylegan2_parts

    tensors = safetensors.numpy.load(data)
    if GENERATOR_METADATA in safetensors_metadata(data):
        return stylegan2_parts(tensors, source="lace-train")
    return from_state(tensors, (), ())


def training_record(path: Path) -> dict:
    """What our own trainer wrote into its generator file: configuration, pictures seen, seconds. Else nothing."""
    with open(path, "rb") as file:
        if file.read(9)[8:] != b"{":
            return {}
    text = safetensors_metadata(path.read_bytes()).get(GENERATOR_METADATA)
    return {"training": guarded("the record of the training", lambda: json.loads(text))} if text else {}


# --- what was found instead of a generator ------------------------------------------------------------------------


def describe(content: Any) -> str:
    if is_a(content, Foreign):
        return (f"it holds an object of the class {shown(content.name, 120)}, which is not on the list of things that "
                f"are read; nothing was executed. If it is a StyleGAN2 or StyleGAN3 generator, {BARE}")
    if not is_a(content, dict):
        return f"it holds a {type(content).__name__}, not a generator; {SUPPORTED}"
    blocked = [(key, content[key]) for key in (*AVERAGED, *PLAIN, *WRAPPERS) if is_a(content.get(key), Foreign)]
    if blocked:
        key, value = blocked[0]
        return (f"under {key!r} it holds an object of the class {shown(value.name, 120)}, which is not on the list of "
                f"things that are read; nothing was executed. If it is a StyleGAN2 or StyleGAN3 generator, {BARE}")
    return describe_state(content)


def describe_state(content: dict) -> str:
    inner = content.get("state_dict", content.get("model_state_dict"))
    if HEAD_KEYS & set(content) or (is_a(inner, dict) and HEAD_KEYS & set(inner)):
        return "it holds an attribute head of LACE, not a generator; give it as a head (--heads)"
    names = [str(key)[:80] for key in content]
    if all(is_a(value, np.ndarray) for value in content.values()) and content:
        return f"it is a state_dict of an unknown network with the tensors {named_list(names)}; {SUPPORTED}"
    return f"it holds a dict with the keys {named_list(names) or 'none'}, and no generator in it; {SUPPORTED}"
