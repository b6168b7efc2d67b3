"""The whole export: a generator and heads in, a bundle out.

    bundle = export("ffhq.pkl", ["smile.pt", "age.pt"], out="ffhq.lace")
    plain = export(module, latent=128, out="vae.lace")
    more = add_parts("ffhq.lace", ["hat.safetensors"], out="more.lace")

A part that is added needs no checkpoint: the synthesis is not exported again but copied.
"""

import copy
import difflib
import math
import os
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

from numpy import ndarray as Array

from engine.bundle import (
    FIELD,
    FOR_PEOPLE,
    GOLDEN,
    MANIFEST,
    Bundle,
    Manifest,
    save_tensors,
    sha256,
    write_manifest,
    writing,
)
from engine.errors import BundleError
from engine.reference.answers import twin_answers
from engine.reference.oneshot import golden_answers as golden_oneshot
from engine.sampler import find_bundle
from engine.verify import PARTS, Check
from exporter.card import write_card
from exporter.checkpoints import load_generator, training_record
from exporter.contents import (
    array,
    check_heads,
    field_tensors,
    generator_facts,
    head_tensors,
    records,
    rename,
    sharp_tensors,
    versions,
)
from exporter.field_graphs import write_field_graphs
from exporter.generators.plain import write_plain
from exporter.generators.plain_loading import Wishes, is_onnx_file, load_plain
from exporter.generators.stylegan2 import LOWERINGS
from exporter.golden import golden_answers
from exporter.heads import HeadStack, read_labels
from exporter.oneshots import OneshotPart, check_oneshots, refuse_stale
from exporter.parity import check_module, examine, record, refuse
from exporter.parts import read_part, sharpen, split_stacks
from exporter.synthesis_graph import NOISES, PRECISIONS, export_synthesis

SUFFIX = ".lace"
MAX_NAME = 200  # letters: the temporary folder's name is longer, and file systems take 255
Say = Callable[[str], None]


def export(gan, heads: Sequence = (), *, out: str | PathLike | None = None, truncation: float | None = None,
           guidance: float | None = None, precision: str | None = None, noise: str | None = None,
           labels: str | Path | None = None, lowering: str | None = None, overwrite: bool = False,
           name: str | None = None, latent: int | Sequence[int] | None = None, classes: int | None = None,
           value_range: str | None = None, module: str | None = None, module_args: Mapping[str, Any] | None = None,
           provenance: dict | None = None, progress: Say = lambda phase: None) -> Bundle:
    """Write the bundle ``out`` and return it, opened.

    gan          path of a checkpoint, of an ONNX file or of a bundle; a torch module; or Parts(mapping, synthesis,
                 facts)
    heads        paths of head checkpoints, or HeadStacks
    truncation   default psi of a request (0.7)            guidance    default factor of a condition's log p (1)
    precision    'fp32' (default), 'fp16' or 'bf16'        noise       'const' (default), 'none' or 'input'
    lowering     of up-convolutions: 'convt' or 'poly'     labels      a file that names the heads' attributes
    progress     is told the name of each phase as it begins

    Of plain generators, which lead from a latent to a picture (truncation is 1 by default; docs/your-own-generator.md):
    latent       d, or the latent's sizes behind the rows, such as (100, 1, 1); an ONNX file says it itself
    classes      how many classes the generator takes, if any: forward(z, label)
    value_range  of its pictures: 'signed' ([-1, 1]), 'unit' ([0, 1]) or 'byte' ([0, 255]); None: found out
    module       'package.module:Class' that the checkpoint has the weights of, made with ``module_args``

    Raises ParityError, and writes nothing, if the graphs do not answer as the network did.
    """
    check_options(truncation=truncation, guidance=guidance, precision=precision, noise=noise, lowering=lowering,
                  name=name)
    path = None if hasattr(gan, "mapping") or hasattr(gan, "forward") else Path(gan)
    if out is None and path is None:
        raise BundleError("out= is needed for a generator that does not come from a file")
    target = Path(out) if out is not None else Path(f"{path.name.removesuffix(path.suffix)}{SUFFIX}")  # type: ignore
    check_target(target)
    if path is not None and (path / MANIFEST).is_file():
        options = {"truncation": truncation, "precision": precision, "noise": noise, "lowering": lowering, "name": name}
        refuse_options(options)
        if not heads:
            raise BundleError(f"{path} is a bundle already: pass --heads to add to it")
        bundle = Bundle(path)
        stacks = only_heads(read_stacks(heads, labels, bundle.field["mapping.w_avg"]))
        return add_stacks(bundle, stacks, target, overwrite, provenance or {}, guidance, progress)
    source, wishes = {}, Wishes(latent, classes, value_range, module, module_args or {})
    if not hasattr(gan, "mapping"):
        progress("reading the generator")
        if path is None or wishes.module or is_onnx_file(path):
            refuse_for_plain({"precision": precision, "noise": noise, "lowering": lowering})
            gan = load_plain(path or gan, wishes)
        else:
            gan = load_generator(wishes.refused(path))
    if path is not None:
        source = {"source": path.name, "sha256": sha256(path), **training_record(path)}
    facts = generator_facts(gan, name or (path.stem if path else "generator"), truncation, guidance)
    stacks = rename(only_heads(read_stacks(heads, labels, array(gan.mapping.w_avg))), set())
    refuse_lonely(stacks)
    check_heads(stacks, facts)
    manifest = Manifest(
        facts, *records(stacks, facts), graphs={}, provenance={**versions(), **source, **(provenance or {})}
    )
    graph = {"precision": precision or "fp32", "noise": noise or "const", "lowering": lowering}
    with writing(target, overwrite=overwrite) as folder:
        fill(folder, target.name, gan, stacks, manifest, graph, progress)
    return Bundle(target)


def fill(folder: Path, name: str, parts, stacks: list, manifest: Manifest, options: dict, progress: Say) -> None:
    """Write all files of the new bundle ``name``. ``options``: precision, noise and lowering of the synthesis."""
    progress("field graphs")
    save_tensors(folder / FIELD, field_tensors(parts.mapping) | head_tensors(stacks))
    graphs = write_field_graphs(folder, manifest.generator, manifest.heads)
    progress("synthesis graph")
    write = export_synthesis if parts.facts.normalise else write_plain
    graph, remarks = write(parts.synthesis, folder / "synthesis.onnx", **options)
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
    finish(folder, name, manifest, progress, extra=extra)


def finish(folder: Path, name: str, manifest: Manifest, progress: Say, parts: Sequence[str] = PARTS,
           extra: Sequence[Check] = ()) -> None:
    """Examine the bundle as it lies on the disk, then write its manifest with the results, and its card."""
    progress("parity check")
    write_manifest(folder, manifest)
    checks = record([*examine(Bundle(folder), parts=parts), *extra])
    kept = [] if "synthesis" in parts else kept_checks(manifest.provenance.get("parity"))
    manifest = replace(manifest, provenance={**manifest.provenance, "parity": [*checks, *kept]})
    write_manifest(folder, manifest)
    write_card(folder, manifest, name)


def kept_checks(parity: object) -> list[dict]:
    """Of what an earlier export recorded, the checks of pictures. It may come from a stranger, or from 0.1."""
    keys, kept = {"name": str, "error": float, "limit": float, "passed": bool, "note": str}, []
    for check in parity if isinstance(parity, list) else ():
        if not isinstance(check, dict):
            continue
        found = {"limit" if key == "floor" else key: value for key, value in check.items()}
        is_whole = {"name", "error", "limit", "passed"} <= set(found) <= set(keys)
        if is_whole and all(type(value) is keys[key] for key, value in found.items()):
            kept += [found] if found["name"].startswith("image") else []
    return kept


def add_parts(bundle, parts: Sequence, *, out: str | PathLike, labels: str | Path | None = None,
              guidance: float | None = None, overwrite: bool = False, provenance: dict | None = None,
              progress: Say = lambda phase: None) -> Bundle:
    """Write the bundle ``out``: ``bundle`` (a path, 'demo' or a Bundle) and what the parts bring. Never in place.

    parts   files that a training wrote (see exporter/parts.py), or HeadStacks
    The result is of the newest format and has passed its exam. Raises BundleError, CheckpointError, ParityError.
    """
    opened, target = find_bundle(bundle), Path(out)
    if not parts:
        raise BundleError("there is nothing to add: pass --add with the files of one or more parts")
    if target.exists() and target.resolve() == opened.path.resolve():
        raise BundleError(f"{target} is the bundle itself, which is never changed: choose another --out")
    read = read_stacks(parts, labels, opened.field["mapping.w_avg"])
    maps = [part for part in read if isinstance(part, OneshotPart)]
    stacks = [part for part in read if not isinstance(part, OneshotPart)]
    return add_stacks(opened, stacks, target, overwrite, provenance or {}, guidance, progress, maps)


def add_stacks(bundle: Bundle, stacks: list, target: Path, overwrite: bool, provenance: dict, guidance: float | None,
               progress: Say, maps: Sequence[OneshotPart] = ()) -> Bundle:
    """The same generator with more heads and one-pass maps. The synthesis is copied: its hash vouches for it."""
    old = bundle.manifest
    if "synthesis" not in old.graphs:
        raise BundleError(f"{bundle.path} has no synthesis, so its exam cannot be repeated: export the generator again")
    facts = bundle.generator if guidance is None else replace(bundle.generator, guidance=float(guidance))
    added, sharpened = split_stacks(stacks, bundle)
    check_heads(added, facts, known=set(bundle.attributes))
    heads, attributes = records(added, facts)
    heads, attributes = sharpen(old.heads + heads, old.attributes + attributes, sharpened)
    check_oneshots(maps, bundle)
    refuse_stale(bundle, {a.name for stack in sharpened.values() for a in stack.attributes})
    kept, golden = without(bundle.field, sharpened), without(bundle.golden, sharpened)
    tensors = kept | head_tensors(added) | sharp_tensors(sharpened)
    tensors |= {key: tensor for part in maps for key, tensor in part.field.items()}
    new = {stack.name for stack in added} | {f"{s.name}.sharp" for s in added if s.sharp}
    new |= {f"{name}.sharp" for name in sharpened}
    manifest = replace(old, generator=facts, heads=heads, attributes=attributes,
                       oneshots=(*old.oneshots, *(part.record for part in maps)),
                       provenance={**old.provenance, **provenance})
    with writing(target, overwrite=overwrite) as folder:
        progress("field graphs")
        save_tensors(folder / FIELD, tensors)
        graphs = write_field_graphs(folder, facts, manifest.heads, manifest.oneshots)
        manifest = replace(manifest, graphs={"synthesis": old.graphs["synthesis"], **graphs})
        shutil.copyfile(bundle.graph("synthesis"), folder / "synthesis.onnx")
        for name in FOR_PEOPLE:
            if (bundle.path / name).is_file() and not (bundle.path / name).is_symlink():
                shutil.copyfile(bundle.path / name, folder / name)
        progress("golden answers")
        answers = golden | twin_answers(tensors, manifest.heads, new, golden, normalise=facts.normalise)
        for part in maps:
            answers |= golden_oneshot(tensors, part.record, answers["z"], normalise=facts.normalise)
        save_tensors(folder / GOLDEN, answers)
        finish(folder, target.name, manifest, progress, parts=("field",))
    return Bundle(target)


def without(tensors: Mapping[str, Array], sharpened: Collection[str]) -> dict[str, Array]:
    """Without what sharp stacks of these heads left, which may have more layers than those that replace them."""
    old = tuple(f"head.{name}.sharp." for name in sharpened)
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(old)}


def with_heads(bundle, stacks: Sequence, *, out: str | PathLike) -> Bundle:
    """Write the bundle ``out``: the generator of ``bundle`` with these heads and nothing else.

    A sharp stack that comes alone serves the flow too.
    """
    bare = copy.copy(find_bundle(bundle))

    def others(tensors: Mapping[str, Array]) -> dict[str, Array]:
        return {name: tensor for name, tensor in tensors.items() if not name.startswith(("head.", "oneshot."))}

    bare.golden, bare.field = others(bare.golden), others(bare.field)
    bare.manifest = replace(bare.manifest, heads=(), attributes=(), oneshots=())
    bare.heads, bare.attributes = {}, {}
    whole = [stack if stack.layers else replace(stack, layers=stack.sharp.layers) for stack in stacks]
    return add_stacks(bare, whole, Path(out), False, {}, None, lambda phase: None)


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


def read_stacks(heads: Sequence, labels: str | Path | None, centre: Array) -> list:
    """HeadStacks, from paths where they are paths. ``centre``: the generator's mean w."""
    wishes = read_labels(labels)
    stacks = [head if isinstance(head, HeadStack | OneshotPart) else read_part(head, labels=wishes, centre=centre)
              for head in heads]
    known = [attribute.name for stack in stacks if not isinstance(stack, OneshotPart) for attribute in stack.attributes]
    for name in wishes:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"they have: {', '.join(known[:20]) or 'none'}"
            raise BundleError(f"--labels names the attribute {name[:60]!r}, which none of the heads has; {hint}")
    return stacks


def refuse_for_plain(options: dict) -> None:
    if given := [option for option, value in options.items() if value is not None]:
        raise BundleError(f"{', '.join(given)}: is of StyleGAN's layers; this generator keeps the types of its file, "
                          "so leave it out")


def only_heads(parts: list) -> list:
    """The parts, which are heads. BundleError for a one-pass map among them: it is of a bundle that exists."""
    if maps := [part.record.name for part in parts if isinstance(part, OneshotPart)]:
        raise BundleError(f"{', '.join(maps)}: a one-pass map is no head, and belongs to a bundle that is there: "
                          "lace-export --bundle B --add PART --out B2")
    return parts


def refuse_lonely(stacks: Sequence) -> None:
    """A sharp stack alone has no flow."""
    if lonely := [stack.name for stack in stacks if not stack.layers]:
        raise BundleError(f"{', '.join(lonely)}: a head needs a smooth stack; a sharp one alone can only be added to a "
                          "bundle that has the head: lace-export --bundle B --add PART --out B2")
