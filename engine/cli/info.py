"""lace-info: what a bundle knows, how well, and where it comes from. Nothing is computed."""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.filesize import decimal

from engine.bundle import Attribute, Bundle
from engine.cli.console import OK, Parser, Terminal, add_rows, guarded, new_table, parse, write_json
from engine.condition import Is
from engine.sampler import find_bundle
from engine.solvers.posterior import CONFIDENCE

LICENCE = ("LICENSE", "LICENSE.txt", "LICENCE")
ACCURACY = ("accuracy: of the head on pairs that it was not trained on; hit rate of a class, 1 - mean absolute error "
            "of a value")
MOST_LINE = 200  # characters of a licence's first line


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="lace-info",
        description="Say what a bundle knows: attributes with their classes or ranges and accuracy, sizes, files, "
        "defaults, provenance and licence. Its hashes are checked.",
    )
    parser.add_argument("bundle", metavar="BUNDLE", help="a folder made by lace-export, or demo")
    parser.add_argument("--json", action="store_true", help="write all of it as JSON")
    return parser


def facts_of(bundle: Bundle) -> dict[str, Any]:
    """All that is shown, ready for JSON."""
    g, provenance = bundle.generator, dict(bundle.manifest.provenance)
    sizes = {name: entry["bytes"] for name, entry in bundle.files.items()}
    return {
        "bundle": str(bundle.path), "hash": bundle.hash, "bytes": sum(sizes.values()),
        "generator": {name: getattr(g, name) for name in g.__dataclass_fields__},
        "synthesis": dict(bundle.manifest.graphs.get("synthesis", {})),
        "defaults": {"truncation": g.truncation, **strengths(bundle)},
        "attributes": [attribute_facts(bundle, attribute) for attribute in bundle.attributes.values()],
        "oneshots": [asdict(entry) for entry in bundle.oneshots.values()],
        "files": sizes,
        "licence": licence(bundle),
        "provenance": {name: value for name, value in provenance.items() if name != "parity"},
        "checks": list(provenance.get("parity", ())),
    }


def strengths(bundle: Bundle) -> dict[str, Any]:
    """The solver that a Sampler takes, and how strongly it holds to a condition."""
    is_sharp = any(head.sharp and head.sharp.calibrated for head in bundle.heads.values())
    found = {"solver": "posterior" if is_sharp else "gauss-newton", "guidance": bundle.generator.guidance}
    return {**found, "confidence": CONFIDENCE} if is_sharp else found


def attribute_facts(bundle: Bundle, attribute: Attribute) -> dict[str, Any]:
    """Kind, classes or range, where it is read, and how often its head was right on pairs that it had not seen."""
    provenance, head = dict(attribute.provenance), bundle.heads[attribute.head]
    values: dict[str, Any] = {"classes": list(attribute.classes)}
    if attribute.kind == "value":
        values = {"range": list(attribute.range), "sigma": attribute.sigma}
    return {
        "name": attribute.name, "kind": attribute.kind, **values,
        "accuracy": provenance.get("test_accuracy", provenance.get("validation_accuracy")),
        "labeller_accuracy": provenance.get("labeller_accuracy"),
        "head": attribute.head, "space": head.space, "widths": list(head.widths),
        "layers": None if attribute.layers is None else list(attribute.layers),
        "example": example(attribute), "provenance": provenance,
    }


def example(attribute: Attribute) -> str:
    """A condition that the attribute understands, as text."""
    if attribute.kind == "class":
        return str(Is(attribute.name, attribute.classes[-1]))
    low, high = attribute.range
    return str(Is(attribute.name, round(low + 0.75 * (high - low), 2)))


def licence(bundle: Bundle) -> str | None:
    """What the manifest says, or the first line of the bundle's licence."""
    if stated := bundle.manifest.provenance.get("licence", bundle.manifest.provenance.get("license")):
        return str(stated)
    for name in LICENCE:
        path = Path(bundle.path) / name
        if path.is_file() and not path.is_symlink():
            with open(path, encoding="utf-8", errors="replace") as file:
                lines = (line.strip()[:MOST_LINE] for line in file.read(20 * MOST_LINE).splitlines())
                return f"{next((line for line in lines if line), 'empty')} ({name})"
    return None


def show(facts: Mapping[str, Any], console: Terminal) -> None:
    g = facts["generator"]
    kind = f"{g['labels']} classes (--label)" if g["labels"] else "unconditional"
    console.say(f"{g['name']}: {g['architecture']}, {g['resolution']} px, {g['img_channels']} channels, {kind}", "bold")
    console.say(f"{facts['bundle']} ({decimal(facts['bytes'])}, hash {facts['hash'][:12]})")
    latents = f"z {g['z_dim']}, w {g['w_dim']}, {g['num_ws']} style layers"
    console.say(f"latents: {latents}; synthesis: {facts['synthesis'].get('precision', 'none')}")
    console.say(f"defaults: {', '.join(f'{name} {value}' for name, value in facts['defaults'].items())}")
    console.say(f"licence: {facts['licence'] or 'not stated'}")
    if facts["attributes"]:
        table = new_table("attributes", "name", "classes, or range", "accuracy>", "read from", "for example")
        console.print(add_rows(table, map(attribute_row, facts["attributes"])))
        console.print(ACCURACY, style="dim")
    else:
        console.say("no attributes: add heads with lace-export --bundle BUNDLE --add FILE ... --out DIR")
    if facts["oneshots"]:
        table = new_table("one-pass maps", "name", "condition", "targets", "holds>", "others off by>")
        console.print(add_rows(table, map(oneshot_row, facts["oneshots"])))
    console.print(add_rows(new_table("files", "file", "size>"),
                           ([name, decimal(size)] for name, size in facts["files"].items())))
    for name, value in facts["provenance"].items():
        console.say(f"{name}: {', '.join(words(value))}")


def attribute_row(a: Mapping[str, Any]) -> list[str]:
    known = ", ".join(a["classes"]) if a["kind"] == "class" else "{:g} to {:g}".format(*a["range"])
    accuracy = a["accuracy"]
    return [a["name"], known, f"{accuracy:.3f}" if isinstance(accuracy, float) else "not stated", a["space"],
            a["example"]]


def oneshot_row(entry: Mapping[str, Any]) -> list[str]:
    targets = ", ".join(f"{name} {low:g} to {high:g}" for name, (low, high) in entry["targets"].items())
    measured = [f"{entry['measured'][name]:.3f}" if name in entry["measured"] else "not stated"
                for name in ("holds", "others")]
    return [entry["name"], entry["condition"], targets, *measured]


def words(value: Any, prefix: str = "") -> Iterator[str]:
    """Every text and number of a value, those of tables with their names."""
    if isinstance(value, Mapping):
        for name, part in value.items():
            yield from words(part, f"{prefix}{name} ")
    elif isinstance(value, list | tuple):
        for part in value:
            yield from words(part, prefix)
    else:
        yield f"{prefix}{value}"


def info(options: argparse.Namespace) -> int:
    facts = facts_of(find_bundle(options.bundle))
    if options.json:
        write_json(facts)
    else:
        show(facts, Terminal())
    return OK


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(build_parser(), arguments)
    return guarded(lambda: info(options))


if __name__ == "__main__":
    raise SystemExit(main())
