"""lace-export: make a bundle from a generator's checkpoint and heads."""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

from engine.bundle import MANIFEST, Bundle
from engine.cli.console import (
    EXIT_CODES,
    OK,
    Parser,
    Terminal,
    add_rows,
    checks_table,
    guarded,
    new_table,
    parse,
    require,
    write_json,
)
from engine.cli.options import finite, tolerance
from engine.errors import BundleError
from engine.runtimes.plans import build_ahead, resolve
from engine.verify import Check

PACKAGES = ("torch", "onnx", "onnxscript", "onnxruntime")  # onnxruntime: the exam at the end
EPILOG = f"""where --gan is a bundle already, the heads are added to it and the generator is not exported again
(give a new --out, or --overwrite to replace the bundle itself); with --tensorrt and no --heads, plans are built into
the bundle that is there, which does not change its content

targets of --tensorrt: sm80, sm86, sm89, sm120, sm121 (TensorRT-RTX; needs no GPU), gpu (TensorRT, for the GPU of this
machine); without one: what the installed of the two can do

{EXIT_CODES}"""


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="lace-export",
        description="Make a bundle: ONNX graphs, weights and golden answers, checked against the original network.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--gan", metavar="FILE", required=True, help="checkpoint of a StyleGAN2 or StyleGAN3 generator, or a bundle")
    add("--heads", metavar="FILE", nargs="+", action="extend", default=[],
        help="checkpoints of attribute heads, or boundaries of InterFaceGAN (.npy)")
    add("--out", metavar="DIR", help="the bundle to write (the name of --gan with .lace)")
    add("--name", help="name of the generator in the bundle (the name of --gan)")
    add("--truncation", metavar="PSI", type=finite, help="default truncation of requests (0.7)")
    add("--guidance", metavar="X", type=tolerance, help="default factor of a condition's log p (1)")
    add("--precision", choices=("fp32", "fp16", "bf16"), help="of the synthesis blocks from 8x8 upwards (fp32)")
    add("--noise", choices=("const", "none", "input"), help="noise of the synthesis layers (const)")
    add("--labels", metavar="FILE", help="names of the heads' attributes and classes")
    add("--tensorrt", metavar="TARGET", nargs="*", help="build plans for decoding on a GPU before they are needed")
    add("--overwrite", action="store_true", help="replace --out if it is a bundle")
    add("--json", action="store_true", help="write the result as JSON")
    return parser


class Progress:
    """One line per phase, with the seconds that it took. A call ends the phase before."""

    def __init__(self, console: Terminal):
        self.console, self.phase, self.start = console, "", time.perf_counter()

    def __call__(self, phase: str) -> None:
        now = time.perf_counter()
        if self.phase:
            self.console.print(f"{self.phase:<24}{now - self.start:7.1f} s")
        self.phase, self.start = phase, now


def run(options: argparse.Namespace) -> int:
    progress = Progress(Terminal(stderr=True))
    # A target that cannot be built for is refused before the export, which takes a minute.
    targets = [] if options.tensorrt is None else resolve(options.tensorrt)
    is_made = options.tensorrt is not None and not options.heads and (Path(options.gan) / MANIFEST).is_file()
    bundle = opened(options) if is_made else exported(options, progress)
    if targets:
        progress("plans")
    plans = build_ahead(bundle, targets)
    progress("")
    if options.json:
        manifest = bundle.manifest
        facts = {"bundle": str(bundle.path), "hash": bundle.hash, "attributes": sorted(bundle.attributes),
                 "files": bundle.files, "plans": [str(plan) for plan in plans],
                 "remarks": list(manifest.provenance.get("remarks", ())),
                 "checks": list(manifest.provenance["parity"])}
        write_json(facts)
        return OK
    console = Terminal()
    if not is_made:
        report(bundle, console)
    for plan in plans:
        console.say(f"plan: {plan} ({plan.stat().st_size / 1e6:.1f} MB)")
    return OK


def exported(options: argparse.Namespace, progress: Progress) -> Bundle:
    require("export", *PACKAGES)
    from exporter.export import export

    return export(options.gan, options.heads, out=options.out, truncation=options.truncation,
                  guidance=options.guidance, name=options.name, precision=options.precision, noise=options.noise,
                  labels=options.labels, overwrite=options.overwrite, progress=progress)


def opened(options: argparse.Namespace) -> Bundle:
    """The bundle that plans are added to; what would change it cannot be asked for at the same time."""
    names = ("out", "name", "truncation", "guidance", "precision", "noise", "labels", "overwrite")
    given = [f"--{name}" for name in names if getattr(options, name) not in (None, False)]
    if given:
        raise BundleError(f"{', '.join(given)}: {options.gan} is a bundle already, and without --heads only its plans "
                          "are built, in place")
    return Bundle(options.gan)


def report(bundle: Bundle, console: Terminal) -> None:
    """What was written: sizes, attributes, parity, remarks."""
    facts = bundle.generator
    console.say(f"{facts.name}: {facts.architecture}, {facts.resolution} px, z {facts.z_dim}, w {facts.w_dim}")
    sizes = add_rows(new_table("sizes", "file", "MB>"),
                     ([name, f"{file['bytes'] / 1e6:.2f}"] for name, file in bundle.files.items()))
    attributes = new_table("attributes", "attribute", "kind", "values", "head")
    for a in bundle.attributes.values():
        values = ", ".join(a.classes) if a.kind == "class" else f"{a.range[0]:g} to {a.range[1]:g}, sigma {a.sigma:g}"
        attributes.add_row(a.name, a.kind, values, f"{a.head} on {bundle.heads[a.head].space}")
    console.print(sizes)
    if bundle.attributes:
        console.print(attributes)
    console.print(checks_table([Check(**check) for check in bundle.manifest.provenance["parity"]]))
    for remark in bundle.manifest.provenance.get("remarks", ()):
        console.say(f"note: {remark}")
    console.say(f"written: {bundle.path}")


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(build_parser(), arguments)
    return guarded(lambda: run(options), options.out)


if __name__ == "__main__":
    raise SystemExit(main())
