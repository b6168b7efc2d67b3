"""What each graph of a bundle takes and gives, and the check that a file is such a graph.

The check parses the file without running it (engine/onnx_file.py), follows all shapes (engine/operators.py), and
compares inputs and outputs with what the manifest's sizes demand.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from engine.errors import BundleError
from engine.manifest import FIELD, GeneratorFacts, Manifest, Oneshot
from engine.onnx_file import FLOAT, INT64, Malformed, Tensor, Value, read_model
from engine.operators import Shape, Shapes
from engine.text import visible

# Numbers that a result may have for each row, and multiplications that a graph may take: what the largest generators
# need. StyleGAN3-R of 1024 px, 3e8 and 2e11; the term in pixels is for it, the other for wide ones of few pixels.
MOST_NUMBERS, NUMBERS_PER_PIXEL = 1 << 24, 1 << 10
MOST_WORK, WORK_PER_PIXEL = 1 << 36, 1 << 20

Values = dict[str, tuple[int, Shape]]
ROWS = "rows"


@dataclass(frozen=True, slots=True)
class Signature:
    """Inputs and outputs by name: element type and dimensions. Symbols may be called otherwise in the file."""

    inputs: Values
    outputs: Values


def floats(**dims: Shape) -> Values:
    return {name: (FLOAT, shape) for name, shape in dims.items()}


def latents(facts: GeneratorFacts) -> Values:
    label: Values = {"label": (INT64, (ROWS,))} if facts.labels else {}
    return floats(z=(ROWS, facts.z_dim), psi=(ROWS, 1)) | label


def hidden(facts: GeneratorFacts) -> Values:
    return {f"hidden.{i}": (FLOAT, (ROWS, facts.w_dim)) for i in range(facts.mapping_layers)}


def mapping(manifest: Manifest) -> Signature:
    facts = manifest.generator
    return Signature(latents(facts), floats(w=(ROWS, facts.w_dim)) | hidden(facts))


def pullback(manifest: Manifest) -> Signature:
    facts = manifest.generator
    inputs = floats(z=(ROWS, facts.z_dim), psi=(ROWS, 1), cotangent=(ROWS, "r", facts.w_dim)) | hidden(facts)
    return Signature(inputs, floats(dz=(ROWS, "r", facts.z_dim)))


def linearise(manifest: Manifest) -> Signature:
    facts = manifest.generator
    inputs = latents(facts) | {
        "near_row": (INT64, ("near",)), "near_anchor": (FLOAT, ("near", facts.w_dim)),
        "pair_row": (INT64, ("pairs",)), "source": (INT64, ("pairs",)),
    }
    outputs = floats(w=(ROWS, facts.w_dim), jacobian=("pairs", facts.z_dim))
    for head in manifest.heads:
        if head.space == "w":
            name, logits = head.name, head.widths[-1]
            inputs |= {f"rows.{name}": (INT64, (f"m.{name}",)), f"seeds.{name}": (FLOAT, (f"k.{name}", logits))}
            outputs[f"logits.{name}"] = (FLOAT, (f"m.{name}", logits))
    return Signature(inputs, outputs)


def head(manifest: Manifest, widths: tuple[int, ...]) -> Signature:
    """Seeds are each row's own from format 2.0 on."""
    dim, logits = widths[0], widths[-1]
    seeds = ("k", logits) if manifest.format[0] == 1 else (ROWS, "k", logits)
    return Signature(floats(x=(ROWS, dim), seeds=seeds), floats(logits=(ROWS, logits), slopes=(ROWS, "k", dim)))


def synthesis(manifest: Manifest) -> Signature:
    facts = manifest.generator
    noises = manifest.graphs["synthesis"].get("noises", {})
    inputs = floats(ws=(ROWS, facts.num_ws, facts.w_dim)) | floats(
        **{name: (ROWS, 1, *sides) for name, sides in noises.items()})
    return Signature(inputs, floats(image=(ROWS, facts.img_channels, facts.resolution, facts.resolution)))


def oneshot(manifest: Manifest, entry: Oneshot) -> Signature:
    width = manifest.generator.z_dim
    targets = floats(targets=(ROWS, len(entry.targets))) if entry.targets else {}
    return Signature(floats(noise=(ROWS, width)) | targets, floats(latent=(ROWS, width)))


SIGNATURES: dict[str, Callable[[Manifest], Signature]] = {
    "mapping": mapping, "pullback": pullback, "linearise": linearise, "synthesis": synthesis,
}


def signatures(manifest: Manifest) -> dict[str, Callable[[], Signature]]:
    """Of all graphs that a bundle with this manifest may have, by name."""
    found = {name: partial(make, manifest) for name, make in SIGNATURES.items()}
    for entry in manifest.heads:
        found[f"head.{entry.name}"] = partial(head, manifest, entry.widths)
        if entry.sharp:
            found[f"head.{entry.name}.sharp"] = partial(head, manifest, entry.sharp.widths)
    for record in manifest.oneshots:
        found[f"oneshot.{record.name}"] = partial(oneshot, manifest, record)
    return dict(found)


def check_graph(path: Path, signature: Signature, facts: GeneratorFacts, weights: int) -> None:
    """Raises BundleError unless the file is a graph of this signature that our exporter could have written.

    weights   bytes of field.safetensors beside it, which its initialisers may point into
    """
    try:
        model = read_model(path)
        compare("input", model.graph.inputs, signature.inputs)
        compare("output", model.graph.outputs, signature.outputs)
        area = facts.resolution**2
        found = Shapes(model, {name: shape for name, (_, shape) in signature.inputs.items()},
                       most=MOST_NUMBERS + NUMBERS_PER_PIXEL * area, work=MOST_WORK + WORK_PER_PIXEL * area,
                       weight=lambda tensor: check_place(tensor, weights)).shapes
        for name, (_, shape) in signature.outputs.items():
            if found.get(name) != shape:
                raise Malformed(f"its output {name!r} comes out as {found.get(name)}; expected {shape}")
    except Malformed as error:
        reason = visible(str(error)[:300])
        raise BundleError(f"{path} is no graph that lace-export writes: {reason}. Get the bundle from its authors "
                          "again, or export it again") from error


def compare(what: str, found: Sequence[Value], expected: Mapping[str, tuple[int, Shape]]) -> None:
    names = [value.name for value in found]
    if sorted(names) != sorted(expected):
        raise Malformed(f"its {what}s are {listed(names)}; expected {listed(expected)}")
    for value in found:
        kind, shape = expected[value.name]
        fits = len(value.dims) == len(shape) and all(
            isinstance(dim, str) if isinstance(wanted, str) else dim == wanted
            for dim, wanted in zip(value.dims, shape, strict=True))
        if value.kind != kind or not fits:
            raise Malformed(f"its {what} {value.name!r} is of type {value.kind}, {value.dims}; expected type {kind}, "
                            f"{shape}")


def listed(names: Iterable[str]) -> str:
    return ", ".join(f"{name!r:.40}" for name in sorted(names)[:8]) or "none"


def check_place(tensor: Tensor, weights: int) -> None:
    location, offset, length = tensor.external  # type: ignore[misc]
    if location != FIELD:
        raise Malformed(f"the numbers of {tensor.name!r} lie in {location!r:.80}; expected {FIELD}")
    if offset + length > weights:
        raise Malformed(f"the numbers of {tensor.name!r} end at byte {offset + length} of {FIELD}, which has {weights}")
