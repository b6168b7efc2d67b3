"""Bundles of FFHQ's size with random weights: the mapping of StyleGAN2, twelve heads of LACE's shape, a synthesis.

Random networks are useful only if their problem is like a trained one's. So the last layer of every head is calibrated
on truncated w: values have a mean of 0.5 and a standard deviation of 0.2, logits one of 3. A generator is seeded, and
its bundle is kept in the folder that is given.
"""

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from engine.bundle import FIELD, GOLDEN, Bundle, GeneratorFacts, Manifest, save_tensors, write_manifest, writing
from engine.reference import field as twin
from engine.reference.answers import golden_answers
from exporter import export
from exporter.contents import field_tensors, head_tensors, records
from exporter.field_graphs import write_field_graphs
from exporter.generators import Facts, Parts
from exporter.generators.stylegan2 import Mapping, Synthesis, channel_widths
from exporter.heads import HeadAttribute, HeadStack

# The classes of an attribute, () for a value.
ATTRIBUTES = {
    "smile": ("no", "yes"), "glasses": ("no", "yes"), "age": (), "gender": ("female", "male"), "beard": ("no", "yes"),
    "yaw": (), "haircolor": ("black", "brown", "blond", "red", "grey"), "bald": ("no", "yes"), "light": (),
    "hat": ("no", "yes"), "pitch": (), "width": (),
}
DIM, LAYERS, HIDDEN, TRUNCATION = 512, 8, (384, 256, 128), 0.7
VALUE_MEAN, VALUE_STD, LOGIT_STD = 0.5, 0.2, 3.0
NOISE = 0.1  # strength of a layer's noise: with the zero that weights start from, the graph would leave it out
SAMPLES = 1000


def world(folder: Path, resolution: int | None = None, *, dim: int = DIM, hidden: tuple[int, ...] = HIDDEN,
          precision: str = "fp32") -> Bundle:
    """The bundle ``ffhq.lace`` without a synthesis, or ``ffhq-{resolution}.lace`` with one; made if it is not there.

    ``precision`` of the synthesis is in the name too, unless it is fp32. Export and parity check of 1024 pixels take a
    minute and 3 GB.
    """
    kind = f"-{precision}" if precision != "fp32" else ""
    path = folder / f"ffhq{f'-{resolution}{kind}' if resolution else ''}.lace"
    if path.exists():
        return Bundle(path)
    mapping, w = random_mapping(dim)
    stacks = [random_head(i, name, w, hidden) for i, name in enumerate(ATTRIBUTES)]
    if resolution is None:
        return write_field(path, mapping, stacks)
    return export(parts(mapping, resolution), stacks, out=path, truncation=TRUNCATION, name=path.stem,
                  precision=precision)


def random_mapping(dim: int) -> tuple[Mapping, np.ndarray]:
    """The mapping with its mean w, and truncated w of SAMPLES latents."""
    torch.manual_seed(0)
    mapping = Mapping(dim, dim, num_layers=LAYERS).eval().requires_grad_(False)
    w = mapping(torch.randn(SAMPLES, dim))
    mapping.w_avg.copy_(w.mean(dim=0))
    return mapping, (mapping.w_avg + TRUNCATION * (w - mapping.w_avg)).numpy()


def random_head(seed: int, name: str, w: np.ndarray, hidden: tuple[int, ...]) -> HeadStack:
    """Layers as torch initialises leaky networks (He), the last one calibrated on w."""
    rng, classes = np.random.default_rng(seed), ATTRIBUTES[name]
    sizes = (w.shape[1], *hidden, len(classes) or 1)
    layers = [(rng.standard_normal((n_out, n_in)) * np.sqrt(2 / n_in), np.zeros(n_out))
              for n_in, n_out in itertools.pairwise(sizes)]
    logits, _ = twin.head(layers, w)
    scale = (LOGIT_STD if classes else VALUE_STD) / logits.std(axis=0)
    shift = (0.0 if classes else VALUE_MEAN) - scale * logits.mean(axis=0)
    layers[-1] = (layers[-1][0] * scale[:, None], shift)
    attribute = HeadAttribute(name, "class" if classes else "value", classes, (0, sizes[-1]))
    single = tuple((weight.astype(np.float32), bias.astype(np.float32)) for weight, bias in layers)
    return HeadStack(name, "w", single, (attribute,))


def parts(mapping: Mapping, resolution: int) -> Parts:
    """The mapping with a random synthesis of config-f."""
    torch.manual_seed(1)
    synthesis = Synthesis(mapping.w_dim, channel_widths(resolution)).eval().requires_grad_(False)
    for layer in synthesis.layers:
        layer.noise_strength.fill_(NOISE)
    facts = Facts("ffhq", "stylegan2-skip", mapping.z_dim, mapping.w_dim, 0, synthesis.num_ws, resolution, 3, "random")
    return Parts(mapping, synthesis, facts)


def write_field(path: Path, mapping: Mapping, stacks: list[HeadStack]) -> Bundle:
    """A bundle that solves and draws nothing: its synthesis would be a hundred times its size."""
    facts = GeneratorFacts(path.stem, "none", mapping.z_dim, mapping.w_dim, 18, 1024, truncation=TRUNCATION,
                           mapping_layers=LAYERS)
    manifest = Manifest(facts, *records(stacks, facts), graphs={})
    with writing(path) as folder:
        tensors = field_tensors(mapping) | head_tensors(stacks)
        save_tensors(folder / FIELD, tensors)
        save_tensors(folder / GOLDEN, golden_answers(tensors, manifest.heads, facts))
        manifest = replace(manifest, graphs=write_field_graphs(folder, manifest.generator, manifest.heads))
        write_manifest(folder, manifest)
    return Bundle(path)
