"""The whole export: a generator and heads in, a bundle out.

    bundle = export("ffhq.pkl", ["smile.pt", "age.pt"], out="ffhq.lace")

Where ``gan`` is a bundle already, its synthesis is not exported again: the heads are added and the rest is copied.
"""

import difflib
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path

import numpy as np

from engine.bundle import (
    FIELD,
    GOLDEN,
    MANIFEST,
    Attribute,
    Bundle,
    Head,
    Manifest,
    save_tensors,
    sha256,
    write_manifest,
    writing,
)
from engine.errors import BundleError
from engine.reference import field as twin
from engine.verify import PARTS, Check
from exporter.checkpoints import load_generator, training_record
from exporter.contents import check_heads, field_tensors, generator_facts, head_tensors, records, rename, versions
from exporter.field_graphs import write_field_graphs
from exporter.generators.stylegan2 import LOWERINGS
from exporter.golden import golden_answers
from exporter.heads import load_heads, read_labels
from exporter.parity import check_module, examine, record, refuse
from exporter.synthesis_graph import NOISES, PRECISIONS, export_synthesis

SUFFIX = ".lace"
Say = Callable[[str], None]


def export(gan, heads: Sequence = (), *, out: str | PathLike | None = None, truncation: float | None = None,
           guidance: float | None = None, precision: str | None = None, noise: str | None = None,
           labels: str | Path | None = None, lowering: str | None = None, overwrite: bool = False,
           name: str | None = None, provenance: dict | None = None,
           progress: Say = lambda phase: None) -> Bundle:
    """Write the bundle ``out`` and return it, opened.

    gan          path of a checkpoint or of a bundle, or Parts(mapping, synthesis, facts)
    heads        paths of head checkpoints, or HeadStacks
    truncation   default psi of a request (0.7)            guidance    default factor of a condition's log p (1)
    precision    'fp32' (default), 'fp16' or 'bf16'        noise       'const' (default), 'none' or 'input'
    lowering     of up-convolutions: 'convt' or 'poly'     labels      a file that names the heads' attributes
    progress     is told the name of each phase as it begins

    Raises ParityError, and writes nothing, if the graphs do not answer as the network did.
    """
    check_options(truncation=truncation, guidance=guidance, precision=precision, noise=noise, lowering=lowering)
    path = None if hasattr(gan, "mapping") else Path(gan)
    if out is None and path is None:
        raise BundleError("out= is needed for a generator that does not come from a file")
    target = Path(out) if out is not None else Path(f"{path.name.removesuffix(path.suffix)}{SUFFIX}")  # type: ignore
    if path is not None and (path / MANIFEST).is_file():
        options = {"truncation": truncation, "precision": precision, "noise": noise, "lowering": lowering, "name": name}
        refuse_options(options)
        return add_heads(
            Bundle(path), read_heads(heads, labels), target, overwrite, provenance or {}, guidance, progress
        )
    source = {}
    if path is not None:
        progress("reading the generator")
        gan, source = load_generator(path), {"source": path.name, "sha256": sha256(path), **training_record(path)}
    facts = generator_facts(gan, name or (path.stem if path else "generator"), truncation, guidance)
    stacks = read_heads(heads, labels)
    check_heads(stacks, facts)
    manifest = Manifest(
        facts, *records(stacks, facts), graphs={}, provenance={**versions(), **source, **(provenance or {})}
    )
    graph = {"precision": precision or "fp32", "noise": noise or "const", "lowering": lowering}
    with writing(target, overwrite=overwrite) as folder:
        fill(folder, gan, stacks, manifest, graph, progress)
    return Bundle(target)


def fill(folder: Path, parts, stacks: list, manifest: Manifest, options: dict, progress: Say) -> None:
    """Write all files of a new bundle. ``options``: precision, noise and lowering of the synthesis."""
    progress("field graphs")
    save_tensors(folder / FIELD, field_tensors(parts.mapping) | head_tensors(stacks))
    graphs = write_field_graphs(folder, manifest.generator, manifest.heads)
    progress("synthesis graph")
    graph, remarks = export_synthesis(parts.synthesis, folder / "synthesis.onnx", **options)
    progress("golden answers")
    answers = golden_answers(parts.mapping, parts.synthesis, stacks, noise=graph["noise"])
    save_tensors(folder / GOLDEN, answers)
    manifest = replace(
        manifest, graphs={"synthesis": graph, **graphs}, provenance={**manifest.provenance, "remarks": remarks}
    )
    # ONNX Runtime's CPU kernels cannot show what bfloat16 arithmetic does; torch's can.
    extra = check_module(parts.synthesis, graph, answers) if graph["precision"] == "bf16" else []
    refuse(extra)
    finish(folder, manifest, progress, extra=extra)


def finish(folder: Path, manifest: Manifest, progress: Say, parts: Sequence[str] = PARTS,
           extra: Sequence[Check] = ()) -> None:
    """Examine the bundle as it lies on the disk, then write its manifest with the results."""
    progress("parity check")
    write_manifest(folder, manifest)
    checks = record([*examine(Bundle(folder), parts=parts), *extra])
    kept = [] if "synthesis" in parts else [c for c in manifest.provenance.get("parity", ()) if is_picture(c)]
    manifest = replace(manifest, provenance={**manifest.provenance, "parity": [*checks, *kept]})
    write_manifest(folder, manifest)


def is_picture(check: dict) -> bool:
    return str(check.get("name", "")).startswith("image")


def add_heads(bundle: Bundle, stacks: list, target: Path, overwrite: bool, provenance: dict, guidance: float | None,
              progress: Say) -> Bundle:
    """The same generator with more heads. The synthesis is copied: its hash vouches for it."""
    old = bundle.manifest
    facts = bundle.generator if guidance is None else replace(bundle.generator, guidance=float(guidance))
    if not stacks:
        raise BundleError(f"{bundle.path} is a bundle already: pass --heads to add to it")
    stacks = rename(stacks, set(bundle.heads))
    check_heads(stacks, facts, known=set(bundle.attributes))
    heads, attributes = records(stacks, facts)
    manifest = replace(old, generator=facts, heads=old.heads + heads, attributes=old.attributes + attributes,
                       provenance={**old.provenance, **provenance})
    with writing(target, overwrite=overwrite) as folder:
        progress("field graphs")
        tensors = bundle.field | head_tensors(stacks)
        save_tensors(folder / FIELD, tensors)
        graphs = write_field_graphs(folder, facts, manifest.heads)
        manifest = replace(manifest, graphs={"synthesis": old.graphs["synthesis"], **graphs})
        shutil.copyfile(bundle.graph("synthesis"), folder / "synthesis.onnx")
        progress("golden answers")
        save_tensors(folder / GOLDEN, bundle.golden | twin_answers(tensors, heads, attributes, bundle.golden))
        finish(folder, manifest, progress, parts=("field",))
    return Bundle(target)


def twin_answers(tensors: dict, heads: Sequence[Head], attributes: Sequence[Attribute], given: dict) -> dict:
    """Golden answers of new heads on the stored latents, by the float64 numpy definition of the field."""
    tensors = {name: tensor.astype(np.float64) for name, tensor in tensors.items()}
    z, psi = given["z"].astype(np.float64), given["psi"].astype(np.float64)
    w, hidden = twin.mapping(tensors, z, psi, given.get("label"))
    answers = {}
    for head in heads:
        stack = twin.layers(tensors, f"head.{head.name}")
        logits, activations = twin.head(stack, w if head.space == "w" else z)
        for attribute in (a for a in attributes if a.head == head.name):
            columns = slice(*attribute.columns)
            seeds = np.eye(head.widths[-1])[columns]
            gradient = twin.head_rows(stack, activations, seeds, rows=len(z))
            if head.space == "w":
                gradient = twin.pullback(tensors, z, psi, hidden, gradient)
            answers[f"{attribute.name}.logits"] = logits[:, columns].astype(np.float32)
            answers[f"{attribute.name}.gradient"] = gradient.astype(np.float32)
    return {name: np.ascontiguousarray(answer) for name, answer in answers.items()}


def check_options(*, truncation: float | None, guidance: float | None, precision: str | None, noise: str | None,
                  lowering: str | None) -> None:
    if truncation is not None and not (math.isfinite(truncation) and truncation >= 0):
        raise BundleError(f"truncation is {truncation}; expected a number from 0 (the mean) to 1 (no truncation)")
    if guidance is not None and not (math.isfinite(guidance) and guidance > 0):
        raise BundleError(f"guidance is {guidance}; expected a number above 0 (1: the paper's)")
    choices = {"precision": (precision, PRECISIONS), "noise": (noise, NOISES), "lowering": (lowering, LOWERINGS)}
    for option, (value, known) in choices.items():
        if value is not None and value not in known:
            raise BundleError(f"{option} is {value!r}; expected one of: {', '.join(known)}")
    if precision == "bf16" and lowering == "convt":
        raise BundleError("TensorRT has no bfloat16 transposed convolution: with bf16 leave lowering out, or use poly")


def refuse_options(options: dict) -> None:
    given = [option for option, value in options.items() if value is not None]
    if given:
        raise BundleError(f"{', '.join(given)}: cannot be changed while heads are added to an existing bundle; "
                          "leave it out, or export the generator's checkpoint again")


def read_heads(heads: Sequence, labels: str | Path | None) -> list:
    """HeadStacks, from paths where they are paths, each with a name of its own."""
    stacks = [head if hasattr(head, "layers") else load_heads(head, labels=labels) for head in heads]
    found = [attribute.name for stack in stacks for attribute in stack.attributes]
    for name in read_labels(labels):
        if name not in found:
            near = difflib.get_close_matches(name, found, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise BundleError(f"--labels says what {name!r} is, which none of the heads has; they have: "
                              f"{', '.join(found) or 'nothing'}{hint}")
    return rename(stacks, set())
