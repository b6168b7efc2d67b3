"""Small worlds for the tests: bundles made from numbers, without a checkpoint."""

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from engine.bundle import (
    FIELD,
    GOLDEN,
    Attribute,
    Bundle,
    GeneratorFacts,
    Head,
    Manifest,
    Sharp,
    write_manifest,
    writing,
)
from engine.reference.answers import golden_answers
from exporter.field_graphs import write_field_graphs


def mapping_tensors(rng: np.random.Generator, z_dim: int, w_dim: int, layers: int, labels: int = 0) -> dict:
    """A mapping as StyleGAN2 initialises it, gains folded in: N(0, 2/n) weights."""
    tensors = {}
    for i in range(layers):
        n_in = w_dim if i else z_dim + (w_dim if labels else 0)
        tensors[f"mapping.{i}.weight"] = rng.standard_normal((w_dim, n_in)) * np.sqrt(2 / n_in)
        tensors[f"mapping.{i}.bias"] = rng.standard_normal(w_dim) * 0.01
    tensors["mapping.w_avg"] = rng.standard_normal(w_dim) * 0.1
    if labels and not layers:  # plain: the class stands behind z
        tensors |= {"mapping.embedding": np.eye(labels), "mapping.w_avg": np.zeros(w_dim)}
    elif labels:
        table = rng.standard_normal((labels, w_dim))
        tensors["mapping.embedding"] = table / np.sqrt(np.mean(table**2, axis=1, keepdims=True))
    return tensors


def head_tensors(rng: np.random.Generator, name: str, widths: tuple[int, ...], scale: float, shift: float) -> dict:
    """A random stack whose logits are about N(shift, scale) on inputs of unit variance."""
    tensors = {}
    for i, (n_in, n_out) in enumerate(itertools.pairwise(widths)):
        last = i == len(widths) - 2
        gain = np.sqrt((1 if last else 2) / n_in) * (scale if last else 1)
        tensors[f"head.{name}.{i}.weight"] = rng.standard_normal((n_out, n_in)) * gain
        tensors[f"head.{name}.{i}.bias"] = np.full(n_out, shift) if last else np.zeros(n_out)
    return tensors


def head_widths(dim: int, logits: int, up_dim: int | None = None) -> tuple[int, ...]:
    """LACE's: linspace(dim, up_dim, 4) as integers, then the logits."""
    return (*(int(x) for x in np.linspace(dim, up_dim or max(dim // 4, 4), 4)), logits)


def write_bundle(path: Path, tensors: dict, heads: list[Head], attributes: list[Attribute], facts: GeneratorFacts,
                 graphs: bool = False) -> Bundle:
    """A bundle without synthesis; with ``graphs`` its field can run on onnxruntime."""
    tensors = {name: np.ascontiguousarray(t, np.float32) for name, t in tensors.items()}
    layers = sum(name.startswith("mapping.") and name.endswith(".weight") for name in tensors)
    facts = replace(facts, mapping_layers=layers)
    manifest = Manifest(facts, tuple(heads), tuple(attributes), graphs={})
    with writing(path) as folder:
        save_file(tensors, folder / FIELD)
        save_file(golden_answers(tensors, heads, facts), folder / GOLDEN)
        if graphs:
            manifest = replace(manifest, graphs=write_field_graphs(folder, facts, heads))
        write_manifest(folder, manifest)
    return Bundle(path)


def random_world(path: Path, *, dim: int = 32, seed: int = 0, layers: int = 4, labels: int = 0, z_head: bool = False,
                 up_dim: int | None = None, graphs: bool = False, guidance: float = 1.0, normalise: bool = True,
                 more: int = 0, sharp: bool = False) -> Bundle:
    """smile, glasses (yes/no), colour (5 classes), age, yaw (values), random heads on w; ``more`` of two classes.

    sharp   heads have second stacks too, which say they are calibrated, and values their tolerances
    """
    rng = np.random.default_rng(seed)
    w_dim = dim if layers else dim + labels
    tensors = mapping_tensors(rng, dim, w_dim, layers, labels)
    heads, attributes = [], []
    kinds = {"smile": 2, "glasses": 2, "colour": 5, "age": 1, "yaw": 1} | {f"more{i}": 2 for i in range(more)}
    if z_head:
        kinds["shape"] = 2
    for name, logits in kinds.items():
        widths = head_widths(dim if name == "shape" else w_dim, logits, up_dim)
        scale, shift = (0.4, 0.5) if logits == 1 else (2.0, 0.0)
        tensors |= head_tensors(rng, name, widths, scale, shift)
        second = None
        if sharp:
            second = Sharp((widths[0], 24, logits), calibrated=True, temperature={name: 1.0}, ece={name: {"0.7": 0.01}})
            tensors |= head_tensors(rng, f"{name}.sharp", second.widths, 3 * scale, shift)
        heads.append(Head(name, "z" if name == "shape" else "w", widths, second))
        classes = ("no", "yes") if logits == 2 else tuple(f"c{i}" for i in range(logits)) if logits > 1 else ()
        attributes.append(Attribute(name, "class" if logits > 1 else "value", name, (0, logits), classes,
                                    tolerance=0.1 if sharp and logits == 1 else None))
    facts = GeneratorFacts("random", "none", dim, w_dim, 2, 4, labels=labels, truncation=0.7, guidance=guidance,
                           mapping_layers=layers, normalise=normalise)
    return write_bundle(path, tensors, heads, attributes, facts, graphs)


def linear_world(path: Path, *, dim: int = 8, seed: int = 0) -> Bundle:
    """Two value heads that are linear on z: the flow of ``a=.. & b=..`` is a linear ODE with a closed form."""
    rng = np.random.default_rng(seed)
    tensors = mapping_tensors(rng, dim, dim, 1)
    heads, attributes = [], []
    for name in ("a", "b"):
        tensors |= head_tensors(rng, name, (dim, 1), 1.0, 0.3)
        heads.append(Head(name, "z", (dim, 1)))
        attributes.append(Attribute(name, "value", name, (0, 1), sigma=1.0))
    facts = GeneratorFacts("linear", "none", dim, dim, 2, 4, truncation=1.0)
    return write_bundle(path, tensors, heads, attributes, facts)
