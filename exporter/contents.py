"""What of a generator and its heads goes into a bundle: sizes, records and tensors."""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch
from numpy import ndarray as Array

from engine import origin
from engine.bundle import Attribute, GeneratorFacts, Head, Sharp
from engine.errors import BundleError
from exporter.generators.stylegan2 import SQRT2
from exporter.heads import FFHQ_LAYERS

# Style layers of the 1024 px generators that LACE's own heads were made for.
LACE_LAYERS = 18


def rename(stacks: list, taken: set[str]) -> list:
    """Two files may be called alike: later stacks get a number. (Attributes may not; see check_heads.)"""
    taken, renamed = set(taken), []
    for stack in stacks:
        name, count = stack.name, 2
        while name in taken:
            name, count = f"{stack.name}_{count}", count + 1
        taken.add(name)
        renamed.append(replace(stack, name=name))
    return renamed


def check_heads(stacks: list, facts: GeneratorFacts, known: set[str] = frozenset()) -> None:  # type: ignore[assignment]
    seen = set(known)
    for stack in stacks:
        wanted = facts.w_dim if stack.space == "w" else facts.z_dim
        layers = stack.layers or stack.sharp.layers
        width = np.shape(layers[0][0])[1]
        if width != wanted:
            raise BundleError(f"head {stack.name!r} reads {width} numbers, but {stack.space} of {facts.name!r} has "
                              f"{wanted}: it belongs to another generator; train heads for this one")
        for attribute in stack.attributes:
            if attribute.name in seen:
                raise BundleError(f"two heads are called {attribute.name!r}: leave one out, or name them differently "
                                  "with --labels")
            if attribute.columns[1] > np.shape(layers[-1][0])[0]:
                raise BundleError(f"attribute {attribute.name!r} lies outside the logits of head {stack.name!r}")
            seen.add(attribute.name)


def generator_facts(parts, name: str, truncation: float | None, guidance: float | None) -> GeneratorFacts:
    mapping, synthesis = parts.mapping, parts.synthesis
    return GeneratorFacts(
        name=name,
        architecture=parts.facts.architecture,
        z_dim=mapping.z_dim,
        w_dim=mapping.w_dim,
        num_ws=synthesis.num_ws,
        resolution=synthesis.resolution,
        img_channels=synthesis.img_channels,
        labels=mapping.c_dim,
        truncation=parts.facts.truncation if truncation is None else float(truncation),
        guidance=1.0 if guidance is None else float(guidance),
        mapping_layers=len(mapping.layers),
        normalise=parts.facts.normalise,
    )


def records(stacks: list, facts: GeneratorFacts) -> tuple[tuple[Head, ...], tuple[Attribute, ...]]:
    """What the manifest says of the heads and of their attributes."""
    heads = [Head(stack.name, stack.space, widths(stack.layers), sharp_record(stack.sharp)) for stack in stacks]
    attributes = [attribute_record(stack.name, a, facts) for stack in stacks for a in stack.attributes]
    return tuple(heads), tuple(attributes)


def widths(layers) -> tuple[int, ...]:
    sizes = [np.shape(weight) for weight, _ in layers]
    return sizes[0][1], *(n_out for n_out, _ in sizes)


def sharp_record(sharp) -> Sharp | None:
    if sharp is None:
        return None
    return Sharp(widths(sharp.layers), sharp.calibrated, dict(sharp.temperature),
                 {name: dict(table) for name, table in sharp.ece.items()})


def attribute_record(head: str, a, facts: GeneratorFacts) -> Attribute:
    layers = a.layers
    if facts.num_ws != LACE_LAYERS and a.name in FFHQ_LAYERS and layers == style_layers(*FFHQ_LAYERS[a.name]):
        layers = None  # the paper's choice, which means something for 1024 px only
    if layers is not None and not all(0 <= layer < facts.num_ws for layer in layers):
        raise BundleError(f"attribute {a.name!r} edits the style layers {layers}, but {facts.name!r} has "
                          f"{facts.num_ws} (0 to {facts.num_ws - 1}): correct them in --labels")
    return Attribute(a.name, a.kind, head, tuple(a.columns), tuple(a.classes), a.sigma, tuple(a.range), layers,
                     dict(a.provenance), a.tolerance)


def style_layers(first: int, last: int) -> tuple[int, ...]:
    return tuple(range(first, last + 1))


def array(tensor) -> Array:
    tensor = tensor.detach() if isinstance(tensor, torch.Tensor) else tensor
    return np.ascontiguousarray(np.asarray(tensor, dtype=np.float32))


def field_tensors(mapping) -> dict[str, Array]:
    """The mapping as plain layers ``x <- lrelu(W x + b)``: learning-rate gains and sqrt(2) are folded in.

    A bundle's mapping is w_dim wide throughout: narrower layers and embeddings are padded with zeros, which stay zero.
    """
    width = mapping.w_dim
    tensors, table = {"mapping.w_avg": array(mapping.w_avg)}, mapping.embedding()
    embedded = width if len(mapping.layers) else width - mapping.z_dim
    n_in = mapping.z_dim if table is None else mapping.z_dim + embedded
    for i, layer in enumerate(mapping.layers):
        weight, bias = layer.scaled()
        tensors[f"mapping.{i}.weight"] = padded(array(weight * SQRT2), width, width if i else n_in)
        tensors[f"mapping.{i}.bias"] = padded(array(bias * SQRT2), width)
    if table is not None:
        tensors["mapping.embedding"] = padded(array(table), len(table), embedded)
    return tensors


def padded(tensor: Array, *shape: int) -> Array:
    """Zeros behind the end of each dimension, up to ``shape``."""
    return np.pad(tensor, [(0, wanted - found) for wanted, found in zip(shape, tensor.shape, strict=True)])


def head_tensors(stacks: list) -> dict[str, Array]:
    tensors = {}
    for stack in stacks:
        tensors |= layer_tensors(f"head.{stack.name}", stack.layers)
        if stack.sharp:
            tensors |= layer_tensors(f"head.{stack.name}.sharp", stack.sharp.layers)
    return tensors


def sharp_tensors(sharpened: Mapping) -> dict[str, Array]:
    """Of stacks that bring a sharp one to a head, by its name."""
    tensors = {}
    for name, stack in sharpened.items():
        tensors |= layer_tensors(f"head.{name}.sharp", stack.sharp.layers)
    return tensors


def layer_tensors(prefix: str, layers) -> dict[str, Array]:
    tensors = {}
    for i, (weight, bias) in enumerate(layers):
        tensors |= {f"{prefix}.{i}.weight": array(weight), f"{prefix}.{i}.bias": array(bias)}
    return tensors


def versions() -> dict[str, dict[str, str]]:
    return {"versions": origin.versions(("torch", "onnx"))}
