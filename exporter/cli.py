"""lace-export: make a bundle from a generator's checkpoint and heads."""

import argparse
import ast
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
from engine.cli.options import real
from engine.errors import BundleError
from engine.runtimes.plans import build_ahead, resolve
from engine.sampler import find_bundle
from engine.verify import Check

RANGES = ("signed", "unit", "byte")
PLAIN = ("module", "module_args", "latent", "classes", "range")  # options of generators without a mapping
PACKAGES = ("torch", "onnx", "onnxscript", "onnxruntime")  # onnxruntime: the exam at the end
EPILOG = f"""parts that a training wrote (heads of lace-train, or of LACE) are added to a bundle with
--bundle B --add PART... --out B2: a new bundle, with its exam and hashes; B itself is never changed

with --tensorrt and a bundle alone (--bundle B), plans are built for the bundle and kept in this machine's cache

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
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--gan", metavar="FILE", help="checkpoint of a StyleGAN2 or StyleGAN3 generator, an ONNX file "
                        "from a latent to a picture, or the weights of --module")
    source.add_argument("--bundle", metavar="DIR", help="a bundle that parts are added to, or demo")
    add("--heads", metavar="FILE", nargs="+", action="extend", default=[],
        help="with --gan: files of attribute heads, or boundaries of InterFaceGAN (.npy)")
    add("--add", metavar="PART", nargs="+", action="extend", default=[], help="with --bundle: files of parts")
    add("--out", metavar="DIR", help="the bundle to write (the name of --gan with .lace)")
    add("--name", help="name of the generator in the bundle (the name of --gan)")
    add("--truncation", metavar="PSI", type=real, help="default truncation of requests (0.7)")
    add("--guidance", metavar="X", type=real, help="default factor of a condition's log p (1)")
    add("--precision", choices=("fp32", "fp16", "bf16"), help="of the synthesis blocks from 8x8 upwards (fp32)")
    add("--noise", choices=("const", "none", "input"), help="noise of the synthesis layers (const)")
    add("--module", metavar="PACKAGE.MODULE:CLASS", help="torch class that --gan has the weights of; it is imported")
    add("--module-args", metavar="NAME=VALUE,...", type=settings, help="what the class is made with, such as nz=100")
    add("--latent", metavar="D[,1,1]", type=sizes, help="sizes of a latent of --module; an ONNX file says them itself")
    add("--classes", metavar="N", type=int, help="number of classes of --module, or of an ONNX file with an integer")
    add("--range", choices=RANGES, help="values of the pictures: [-1, 1], [0, 1] or [0, 255] (found out)")
    add("--labels", metavar="FILE", help="names of the heads' attributes and classes")
    add("--tensorrt", metavar="TARGET", nargs="*", help="build plans for decoding on a GPU before they are needed")
    add("--overwrite", action="store_true", help="replace --out if it is a bundle")
    add("--json", action="store_true", help="write the result as JSON")
    return parser


def settings(text: str) -> dict[str, object]:
    """'nz=100,norm=batch' as a dictionary; numbers and words of Python are read as such."""
    found: dict[str, object] = {}
    for entry in filter(None, text.split(",")):
        name, sign, value = entry.partition("=")
        if not sign or not name.strip().isidentifier():
            raise argparse.ArgumentTypeError(f"{entry!r:.60} is no NAME=VALUE, such as nz=100")
        try:
            found[name.strip()] = ast.literal_eval(value.strip())
        except (ValueError, SyntaxError):
            found[name.strip()] = value.strip()
    return found


def sizes(text: str) -> int | tuple[int, ...]:
    try:
        found = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r:.60} is no size of a latent, such as 128 or 100,1,1") from None
    return found[0] if len(found) == 1 else found


class Progress:
    """One line per phase, with the seconds that it took. A call ends the phase before."""

    def __init__(self, console: Terminal):
        self.console, self.phase, self.start = console, "", time.perf_counter()

    def __call__(self, phase: str) -> None:
        now = time.perf_counter()
        if self.phase:
            self.console.print(f"{self.phase:<24}{now - self.start:7.1f} s")
        self.phase, self.start = phase, now

    def note(self, text: str) -> None:
        self.console.say(f"note: {text}")


def run(options: argparse.Namespace) -> int:
    progress = Progress(Terminal(stderr=True))
    # A target that cannot be built for is refused before the export, which takes a minute.
    targets = [] if options.tensorrt is None else resolve(options.tensorrt)
    is_bundle = options.bundle is not None or holds_bundle(options.gan)
    is_made = is_bundle and options.tensorrt is not None and not (options.heads or options.add)
    make = extended if options.bundle else exported
    bundle = opened(options) if is_made else make(options, progress)
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


def holds_bundle(path: str) -> bool:
    try:
        return (Path(path) / MANIFEST).is_file()
    except (OSError, ValueError):  # a name that no file can have; who opens it says so
        return False


def extended(options: argparse.Namespace, progress: Progress) -> Bundle:
    """A new bundle with more parts."""
    from exporter import add_parts

    refuse_given(options, ("name", "truncation", "precision", "noise", "heads", *PLAIN),
                 "does not go with --bundle, which keeps its generator as it is (heads are parts: --add)")
    if options.out is None:
        raise BundleError("--out is missing: parts are added in a new bundle, never in place")
    return add_parts(options.bundle, options.add, out=options.out, labels=options.labels, guidance=options.guidance,
                     overwrite=options.overwrite, progress=progress)


def exported(options: argparse.Namespace, progress: Progress) -> Bundle:
    # Before the work, which takes a minute and ends with an exam on ONNX Runtime.
    require("export", *PACKAGES)
    from exporter import export

    refuse_given(options, ("add",), "goes with --bundle: a generator's heads are given with --heads")
    if holds_bundle(options.gan):
        progress.note("--gan with a bundle is deprecated and will go in 0.3: use --bundle B --add PART... --out B2")
    return export(options.gan, options.heads, out=options.out, truncation=options.truncation,
                  guidance=options.guidance, name=options.name, precision=options.precision, noise=options.noise,
                  labels=options.labels, overwrite=options.overwrite, latent=options.latent, classes=options.classes,
                  value_range=options.range, module=options.module, module_args=options.module_args,
                  progress=progress)


def opened(options: argparse.Namespace) -> Bundle:
    """The bundle that plans are built for; what would change it cannot be asked for at the same time."""
    refuse_given(options, ("out", "name", "truncation", "guidance", "precision", "noise", "labels", "overwrite",
                           *PLAIN),
                 "changes nothing where only plans are built: leave it out, or add parts with --add")
    return find_bundle(options.bundle or options.gan)


def refuse_given(options: argparse.Namespace, names: Sequence[str], why: str) -> None:
    if given := [f"--{name.replace('_', '-')}" for name in names if getattr(options, name) not in (None, False, [])]:
        raise BundleError(f"{', '.join(given)}: {why}")


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
