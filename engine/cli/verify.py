"""lace-verify: is this bundle whole, and does this machine compute it right?"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict

from rich.console import Console

from engine.cli.console import CHECK_FAILED, EXIT_CODES, OK, checks_table, guarded, parse, write_json
from engine.runtimes import AUTO, RUNTIMES, open_runtime
from engine.sampler import find_bundle
from engine.verify import check_bundle


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lace-verify",
        description="Check the hashes of a bundle and replay its golden answers on a runtime.",
        epilog=EXIT_CODES,
        allow_abbrev=False,
    )
    parser.add_argument("bundle", metavar="BUNDLE", help="a folder made by lace-export, or demo")
    parser.add_argument("--runtime", metavar="NAME", default="auto", help=f"auto, {', '.join(RUNTIMES)} (auto)")
    parser.add_argument("--device", choices=list(AUTO), default="cpu", help=f"{', '.join(AUTO)} (cpu)")
    parser.add_argument("--precision", metavar="P",
                        help="openvino: fp32, bf16, bf16-jacobian (fp32); on a GPU: tf32 (the bundle's)")
    parser.add_argument("--json", action="store_true", help="write the results as JSON")
    return parser


def verify(options: argparse.Namespace) -> int:
    bundle = find_bundle(options.bundle)
    runtime = open_runtime(bundle, options.runtime, device=options.device, precision=options.precision)
    checks = check_bundle(bundle, runtime)
    failed = [check for check in checks if check.passed is False]
    skipped = [check for check in checks if check.passed is None]
    if options.json:
        facts = {"bundle": str(bundle.path), "hash": bundle.hash, "runtime": runtime.name, "version": runtime.version,
                 "device": runtime.device, "precision": runtime.drawing.precision, "passed": not failed,
                 "checks": [asdict(c) for c in checks]}
        write_json(json.dumps(facts, indent=1))
        return CHECK_FAILED if failed else OK
    console = Console()
    where = f"{runtime.name} {runtime.version} ({runtime.device}, {runtime.drawing.precision})"
    console.print(f"{bundle!r} on {where}", markup=False, highlight=False)
    console.print(checks_table(checks))
    for check in skipped:
        console.print(f"{check.name} not checked: {check.note}", style="yellow", markup=False, soft_wrap=True)
    if failed:
        console.print(f"{len(failed)} of {len(checks)} checks failed: do not use this bundle with {runtime.name} here",
                      style="bold red")
    return CHECK_FAILED if failed else OK


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(build_parser(), arguments)
    return guarded(lambda: verify(options))


if __name__ == "__main__":
    raise SystemExit(main())
