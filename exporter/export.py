"""The whole export: a generator and heads in, a bundle out.

    bundle = export("ffhq.pkl", ["smile.pt", "age.pt"], out="ffhq.lace")

Where ``gan`` is a bundle already, its synthesis is not exported again: the heads are added and the rest is copied.
"""

import difflib
import math
import os
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
from exporter.contents import (
    array,
    check_heads,
    field_tensors,
    generator_facts,
    head_tensors,
    records,
    rename,
    versions,
)
from exporter.field_graphs import write_field_graphs
from exporter.generators.stylegan2 import LOWERINGS
from exporter.golden import golden_answers
from exporter.heads import load_heads, read_labels
from exporter.parity import check_module, examine, record, refuse
from exporter.synthesis_graph import NOISES, PRECISIONS, export_synthesis

SUFFIX = ".lace"
MAX_NAME = 200  # letters: the temporary folder's name is longer, and file systems take 255
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
    check_options(truncation=truncation, guidance=guidance, precision=precision, noise=noise, lowering=lowering,
                  name=name)
    path = None if hasattr(gan, "mapping") else Path(gan)
    if out is None and path is None:
        raise BundleError("out= is needed for a generator that does not come from a file")
    target = Path(out) if out is not None else Path(f"{path.name.removesuffix(path.suffix)}{SUFFIX}")  # type: ignore
    check_target(target)
    if path is not None and (path / MANIFEST).is_file():
        options = {"truncation": truncation, "precision": precision, "noise": noise, "lowering": lowering, "name": name}
        refuse_options(options)
        return add_heads(
            Bundle(path), heads, labels, target, overwrite, provenance or {}, guidance, progress
        )
    source = {}
    if path is not None:
        progress("reading the generator")
        gan, source = load_generator(path), {"source": path.name, "sha256": sha256(path), **training_record(path)}
    facts = generator_facts(gan, name or (path.stem if path else "generator"), truncation, guidance)
    stacks = read_heads(heads, labels, array(gan.mapping.w_avg))
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
        manifest, graphs={"synthesis": graph, **graphs},
        provenance={**manifest.provenance, "remarks": [*parts.remarks, *remarks]},
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


def add_heads(bundle: Bundle, heads: Sequence, labels: str | Path | None, target: Path, overwrite: bool,
              provenance: dict, guidance: float | None, progress: Say) -> Bundle:
    """The same generator with more heads. The synthesis is copied: its hash vouches for it."""
    old = bundle.manifest
    facts = bundle.generator if guidance is None else replace(bundle.generator, guidance=float(guidance))
    if not heads:
        raise BundleError(f"{bundle.path} is a bundle already: pass --heads to add to it")
    stacks = rename(read_heads(heads, labels, bundle.field["mapping.w_avg"]), set(bundle.heads))
    check_heads(stacks, facts, known=set(bundle.attributes))
    added, attributes = records(stacks, facts)
    manifest = replace(old, generator=facts, heads=old.heads + added, attributes=old.attributes + attributes,
                       provenance={**old.provenance, **provenance})
    with writing(target, overwrite=overwrite) as folder:
        progress("field graphs")
        tensors = bundle.field | head_tensors(stacks)
        save_tensors(folder / FIELD, tensors)
        graphs = write_field_graphs(folder, facts, manifest.heads)
        manifest = replace(manifest, graphs={"synthesis": old.graphs["synthesis"], **graphs})
        shutil.copyfile(bundle.graph("synthesis"), folder / "synthesis.onnx")
        progress("golden answers")
        save_tensors(folder / GOLDEN, bundle.golden | twin_answers(tensors, added, attributes, bundle.golden,
                                                                       normalise=bundle.generator.normalise))
        finish(folder, manifest, progress, parts=("field",))
    return Bundle(target)


def twin_answers(tensors: dict, heads: Sequence[Head], attributes: Sequence[Attribute], given: dict, *,
                 normalise: bool) -> dict:
    """Golden answers of new heads on the stored latents, by the float64 numpy definition of the field."""
    tensors = {name: tensor.astype(np.float64) for name, tensor in tensors.items()}
    z, psi = given["z"].astype(np.float64), given["psi"].astype(np.float64)
    w, hidden = twin.mapping(tensors, z, psi, given.get("label"), normalise=normalise)
    answers = {}
    for head in heads:
        stack = twin.layers(tensors, f"head.{head.name}")
        logits, activations = twin.head(stack, w if head.space == "w" else z)
        for attribute in (a for a in attributes if a.head == head.name):
            columns = slice(*attribute.columns)
            seeds = np.eye(head.widths[-1])[columns]
            gradient = twin.head_rows(stack, activations, seeds, rows=len(z))
            if head.space == "w":
                gradient = twin.pullback(tensors, z, psi, hidden, gradient, normalise=normalise)
            answers[f"{attribute.name}.logits"] = logits[:, columns].astype(np.float32)
            answers[f"{attribute.name}.gradient"] = gradient.astype(np.float32)
    return {name: np.ascontiguousarray(answer) for name, answer in answers.items()}


def check_target(target: Path) -> None:
    """What cannot become a folder is said before the export, which takes a minute, and not at its end."""
    if "\0" in str(target) or len(os.fsencode(target.name)) > MAX_NAME:
        raise BundleError(f"the bundle cannot be called {target.name[:60]!r}: choose another --out, of up to "
                          f"{MAX_NAME} letters and without a zero byte")
    if target.is_symlink() and not target.exists():
        raise BundleError(f"{target} is a link that leads nowhere: remove it, or choose another --out")
    above = next(folder for folder in (*target.absolute().parents, Path("/")) if folder.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise BundleError(f"{target} cannot be written: {above} is not a folder that you may write to; choose another "
                          "--out")


def check_options(*, truncation: float | None, guidance: float | None, precision: str | None, noise: str | None,
                  lowering: str | None, name: str | None) -> None:
    if name is not None and not (name.isprintable() and 0 < len(name) <= MAX_NAME):
        raise BundleError(f"the name is {name[:60]!r}; expected 1 to {MAX_NAME} printable letters")
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


def read_heads(heads: Sequence, labels: str | Path | None, w_avg: np.ndarray) -> list:
    """HeadStacks, from paths where they are paths, each with a name of its own."""
    wishes = read_labels(labels)
    stacks = [head if hasattr(head, "layers") else load_heads(head, labels=wishes, centre=w_avg) for head in heads]
    known = [attribute.name for stack in stacks for attribute in stack.attributes]
    for name in wishes:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"they have: {', '.join(known[:20]) or 'none'}"
            raise BundleError(f"--labels names the attribute {name[:60]!r}, which none of the heads has; {hint}")
    return rename(stacks, set())
