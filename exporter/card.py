"""The model card of a bundle: README.md, for people, from what the manifest says.

Its shape is that of the Hugging Face Hub: a table of facts in YAML at the top, then Markdown (Mitchell et al., "Model
cards for model reporting", FAT* 2019).
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from engine.manifest import Attribute, Head, Manifest

CARD = "README.md"
# A card that has this line is written again with the bundle; one that its owner wrote is kept.
MARK = "<!-- written by lace-export; remove this line to keep what you change -->"

TEXT = """---
library_name: lace-engine
tags:
- gan
- controllable-generation
- onnx
---
{mark}

# {name}

A {architecture} generator of {resolution} x {resolution} pixels{labels}, with {count}, for `lace-engine`:

```python
from engine import Sampler

sampler = Sampler("{folder}")
pictures = sampler.sample({example}, seeds=range(8))
```

{asking}## Attributes

{attributes}

{sharp}## Where it comes from

{origin}

Licence: that of the generator's checkpoint and of the pictures that it was trained on; `LICENSE` beside this file, if
there is one, says which. The bundle holds no code: ONNX graphs of listed operators, tensors, and `manifest.json`.
"""

SHARP = """Attributes with a calibration error or a tolerance have calibrated, *sharp* heads. Under conditions on them
`sample` draws from the posterior: latents of which the heads are more than 90 % sure (`confidence`), so that the
pictures are *right*, distributed like those plain pictures of which the condition is true. Under others, and with
`solver="gauss-newton"`, latents are taken uphill until the heads are content: such pictures *obey*, but they are no
fair sample of those that do.

"""
SMOOTH = """The heads are not calibrated: `sample` takes latents uphill until the heads are content. Such pictures
*obey*, but they are not *right*: no fair sample of those plain pictures of which the condition is true.

"""


def write_card(folder: Path, manifest: Manifest, name: str) -> None:
    """Into the folder of a bundle that will be called ``name``, unless its owner has written a card."""
    path = folder / CARD
    if not path.exists() or MARK in path.read_text(encoding="utf-8", errors="replace"):
        path.write_text(card(manifest, name), encoding="utf-8")


def card(manifest: Manifest, folder: str) -> str:
    g, attributes, heads = manifest.generator, manifest.attributes, {head.name: head for head in manifest.heads}
    rows = [row(a, heads[a.head]) for a in attributes]
    return TEXT.format(
        mark=MARK, name=g.name, architecture=g.architecture, resolution=g.resolution, folder=folder,
        labels=f", with {g.labels} classes" if g.labels else "",
        count=f"{len(attributes)} attribute{'s' * (len(attributes) != 1)}" if attributes else "no attributes",
        example=f'"{example(attributes)}"' if attributes else "None",
        asking="Conditions combine attributes by `&`, `|` and `~`.\n\n" if attributes else "",
        attributes=table(("attribute", "values", "head on", "accuracy or mean error", "calibration error"), rows)
        if rows else "None: pictures can be drawn, but not asked for.",
        sharp="" if not attributes else SHARP if any(r[-1] for r in rows) else SMOOTH,
        origin=origin(manifest.provenance))


def example(attributes: Sequence[Attribute]) -> str:
    """A condition on the first two attributes."""
    return " & ".join(f"{a.name}={a.classes[-1]}" if a.classes else f"{a.name}={sum(a.range) / 2:.2g}"
                      for a in attributes[:2])


def row(a: Attribute, head: Head) -> tuple[str, ...]:
    """An attribute; figures of held-out samples at truncation 0.7, where they are known."""
    values = ", ".join(a.classes) if a.classes else f"{a.range[0]:.2g} to {a.range[1]:.2g}"
    sharp = a.provenance.get("sharp", {})
    sharp = sharp if isinstance(sharp, Mapping) else {}
    found = at_default(sharp.get("held_out_error" if a.kind == "value" else "held_out_accuracy"))
    if found is None:
        found = number(a.provenance.get("validation_accuracy"))
    error = at_default(head.sharp.ece.get(a.name)) if head.sharp and head.sharp.calibrated else None
    tolerance = f"tolerance {a.tolerance:g}" if head.sharp and head.sharp.calibrated and a.tolerance else ""
    return a.name, values, head.space, "" if found is None else f"{found:.3f}", (
        tolerance if error is None else f"{error:.3f}")


def at_default(found: object) -> float | None:
    return number(found.get("0.7", next(iter(found.values()), None))) if isinstance(found, Mapping) else None


def number(found: object) -> float | None:
    return float(found) if isinstance(found, (int, float)) and not isinstance(found, bool) else None


def origin(facts: Mapping) -> str:
    rows = [("checkpoint", f"`{facts[key]}`") for key in ("source",) if isinstance(facts.get(key), str)]
    rows += [("its sha256", f"`{facts['sha256']}`")] if isinstance(facts.get("sha256"), str) else []
    versions = facts.get("versions")
    if isinstance(versions, Mapping):
        rows.append(("exported with", ", ".join(f"{name} {version}" for name, version in versions.items())))
    return table(("fact", "value"), rows) if rows else "The manifest does not say."


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
