"""lace-verify: is this bundle whole, and does this machine compute it right?"""

import argparse
from collections.abc import Sequence
from dataclasses import asdict

from engine.cli.console import CHECK_FAILED, NOT_CHECKED, OK, Parser, Terminal, checks_table, guarded, parse, write_json
from engine.cli.options import add_runtime_options, given
from engine.runtimes import open_runtime
from engine.sampler import find_bundle
from engine.verify import PARTS, Check, check_bundle


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="lace-verify",
                    description="Check the hashes of a bundle and replay its golden answers on a runtime.")
    parser.add_argument("bundle", metavar="BUNDLE", help="a folder made by lace-export, or demo")
    parser.add_argument("--part", action="append", choices=PARTS, metavar="PART",
                        help=f"check this only: {' or '.join(PARTS)}; a runtime that draws no pictures has field only")
    add_runtime_options(parser)
    parser.add_argument("--json", action="store_true", help="write the results as JSON")
    return parser


def verdict(checks: Sequence[Check]) -> int:
    """An exit code: what could not be checked is no success."""
    if any(check.passed is False for check in checks):
        return CHECK_FAILED
    return OK if checks and all(check.passed for check in checks) else NOT_CHECKED


def verify(options: argparse.Namespace) -> int:
    bundle = find_bundle(options.bundle)
    runtime = open_runtime(bundle, options.runtime or "auto", **given(options, ("device", "precision", "threads")))
    checks = check_bundle(bundle, runtime, parts=options.part or PARTS)
    code = verdict(checks)
    if options.json:
        write_json({"bundle": str(bundle.path), "hash": bundle.hash, "runtime": runtime.name,
                    "version": runtime.version, "device": runtime.device, "precision": runtime.drawing.precision,
                    "passed": {OK: True, CHECK_FAILED: False}.get(code), "checks": [asdict(c) for c in checks]})
        return code
    console = Terminal()
    console.say(f"{bundle!r} on {runtime.name} {runtime.version} ({runtime.device}, {runtime.drawing.precision})")
    console.print(checks_table(checks))
    for check in checks:
        if check.passed is None:
            console.say(f"{check.name} not checked: {check.note}", "yellow")
    failed = sum(check.passed is False for check in checks)
    if failed:
        console.say(f"{failed} of {len(checks)} checks failed: do not use this bundle with {runtime.name} here",
                    "bold red")
    return code


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(build_parser(), arguments)
    return guarded(lambda: verify(options))


if __name__ == "__main__":
    raise SystemExit(main())
