"""What a StyleGAN2 of full size costs: export, verify, a 3-attribute solve of 16 rows, one picture.

    python benchmarks/config_f.py --out benchmarks/results/config_f.json [--precision fp32] [--small]

The generator has the sizes of config-f at 1024 pixels and random weights, the twelve heads have those of LACE
(512-384-256-128-C). Every phase is a process of its own, so that its peak memory is its own. Timings are written only
if the results were right: the bundle passes lace-verify, all rows arrive, and their energies are finite and fell.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from engine.folders import write_atomically
from engine.origin import commit, machine, versions

ROOT = Path(__file__).resolve().parent.parent
# The phases run from anywhere, with the code beside this file.
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}
ATTRIBUTES = ("yaw", "light3", "smile", "gender", "age", "glasses", "pitch", "haircolor", "beard", "bald", "light0",
              "width")
CONDITION = "smile & glasses & age=0.5"
ROWS = 16
NOISE = 0.1  # noise strength of every layer: with the zero that weights start from, the graph would leave noise out


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the .json file to write")
    parser.add_argument("--precision", choices=("fp32", "fp16", "bf16"), default="fp32", help="of the export (fp32)")
    parser.add_argument("--small", action="store_true", help="64 pixels: the same path in seconds, to try the script")
    parser.add_argument("--phase", choices=sorted(PHASES), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser


# --- phases: each runs in a process of its own and returns what it found ------------------------------------------


def checkpoint(folder: Path, resolution: int) -> dict:
    """Write generator.pt and one file a head, as rosinality's and LACE's scripts save them."""
    import numpy as np
    import torch

    from exporter.generators.stylegan2 import Generator, Mapping, Synthesis, channel_widths
    from exporter.heads import FFHQ
    from tests.checkpoints import lace_head, rosinality_file, torch_bytes

    torch.manual_seed(0)
    net = Generator(Mapping(512, 512, num_layers=8), Synthesis(512, channel_widths(resolution)))
    net.eval().requires_grad_(False)
    for layer in net.synthesis.layers:
        layer.noise_strength.fill_(NOISE)
    (folder / "generator.pt").write_bytes(rosinality_file(net))
    for seed, name in enumerate(ATTRIBUTES):
        content, _ = lace_head((512, 384, 256, 128), len(FFHQ[name]) or 1, seed=seed)
        for key, tensor in content["state_dict"].items():
            tensor *= np.sqrt(2 / tensor.shape[1]) if key.endswith("weight") else 0.1
        (folder / f"best_valid_ckpt_{name}.pt").write_bytes(torch_bytes(content))
    return {"parameters": sum(p.numel() for p in net.parameters()), "versions": versions()}


def solve(folder: Path) -> dict:
    """Open the bundle and solve, once with cold and once with warm sessions."""
    import numpy as np

    from engine import Sampler, Status

    start = time.perf_counter()
    sampler = Sampler(folder / "config_f.lace")
    opened = time.perf_counter()
    samples = sampler.solve(CONDITION, seeds=range(ROWS))
    first = time.perf_counter()
    again = sampler.solve(CONDITION, seeds=range(ROWS))
    end = time.perf_counter()
    before, after = start_energies(sampler), np.array([s.energy for s in samples])
    return {
        "open_seconds": opened - start, "first_seconds": first - opened, "again_seconds": end - first,
        "evaluations": {"mean": float(np.mean([s.evaluations for s in samples])),
                        "most": max(s.evaluations for s in samples)},
        "energy": {"start": float(before.mean()), "end": float(after.mean())},
        "checks": {
            "all rows arrived": all(s.status == Status.DONE for s in samples),
            "energies are finite": bool(np.isfinite(after).all()),
            "energies fell": bool((after < before).all()),
            "a second solve gives the same bits": all(
                np.array_equal(a.z, b.z) for a, b in zip(samples, again, strict=True)
            ),
        },
    }


def start_energies(sampler):
    """-log p of the condition at the start of every row, from measured logits and the numpy tape."""
    import numpy as np

    from engine import parse
    from engine.reference.tape import evaluate

    tape = sampler.starts.lower(parse(CONDITION))
    logits = sampler.measure(sampler.solve(None, seeds=range(ROWS)))
    u = [[float(row[c.attribute][1] - row[c.attribute][0] if c.index is None else row[c.attribute][c.index])
          for c in tape.columns] for row in logits]
    logp, _, _ = evaluate(tape.program, np.tile(tape.parameters, (len(u), 1)), np.array(u))
    return -logp


def decode(folder: Path) -> dict:
    """One picture, with the session's opening and without."""
    import numpy as np

    from engine import Sampler

    sampler = Sampler(folder / "config_f.lace")
    plain = sampler.solve(None, seeds=[0, 1])
    start = time.perf_counter()
    picture = sampler.render(plain[:1])[0].image
    first = time.perf_counter()
    other = sampler.render(plain[1:])[0].image
    end = time.perf_counter()
    return {"first_seconds": first - start, "again_seconds": end - first,
            "checks": {"pictures differ between seeds": not np.array_equal(picture, other)}}


PHASES = {
    "checkpoint": lambda folder, options: checkpoint(folder, resolution(options)),
    "solve": lambda folder, options: solve(folder),
    "decode": lambda folder, options: decode(folder),
}


# --- the process that starts them; it stays small, because a child's peak begins with its parent's -----------------


def resolution(options: argparse.Namespace) -> int:
    return 64 if options.small else 1024


def timed(name: str, command: list[str]) -> dict:
    """Run one phase: its seconds, its peak memory, and the JSON that it wrote to standard output."""
    say(f"{name} ...")
    start = time.perf_counter()
    with tempfile.TemporaryFile("w+") as errors:  # a file, because a second pipe without a reader may fill up
        process = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=errors, text=True)
        assert process.stdout is not None
        output = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        errors.seek(0)
        message = errors.read()
    process.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.perf_counter() - start
    if process.returncode:
        raise SystemExit(f"{name} ended with {process.returncode}:\n{message}{output}")
    say(f"{name}: {seconds:.1f} s, {usage.ru_maxrss / 2**20:.2f} GiB")
    return {"seconds": seconds, "peak_gib": usage.ru_maxrss / 2**20, "found": json.loads(output)}


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def python(*arguments: object) -> list[str]:
    return [sys.executable, *map(str, arguments)]


def own_phase(name: str, folder: Path, options: argparse.Namespace) -> dict:
    small = ["--small"] if options.small else []
    return timed(name, python(__file__, "--out", options.out, "--phase", name, "--folder", folder, *small))


def measure(folder: Path, options: argparse.Namespace) -> dict:
    bundle = folder / "config_f.lace"
    load = os.getloadavg()[0]
    made = own_phase("checkpoint", folder, options)
    heads = [folder / f"best_valid_ckpt_{name}.pt" for name in ATTRIBUTES]
    export = timed("export", python("-m", "exporter.cli", "--gan", folder / "generator.pt", "--heads", *heads,
                                    "--out", bundle, "--precision", options.precision, "--json"))
    verify = timed("verify", python("-m", "engine.cli.verify", bundle, "--json"))
    solved, decoded = own_phase("solve", folder, options), own_phase("decode", folder, options)
    checks = {"lace-verify passed": verify["found"]["passed"], **solved["found"].pop("checks"),
              **decoded["found"].pop("checks")}
    phases = {"export": export, "verify": verify, "solve": solved, "decode": decoded}
    return {
        "benchmark": "config_f",
        "what": {"resolution": resolution(options), "precision": options.precision, "heads": len(ATTRIBUTES),
                 "condition": CONDITION, "rows": ROWS, "parameters": made["found"]["parameters"]},
        "checks": checks,
        "phases": {
            name: {"seconds": phase["seconds"], "peak_gib": phase["peak_gib"],
                   **(phase["found"] if name in ("solve", "decode") else {})}
            for name, phase in phases.items()
        },
        "bytes": {"generator": (folder / "generator.pt").stat().st_size, "heads": sum(h.stat().st_size for h in heads),
                  "bundle": sum(f.stat().st_size for f in bundle.iterdir())},
        "machine": machine() | {"load_before": load},
        "versions": made["found"]["versions"],
        "commit": commit(),
    }


def rounded(value):
    if isinstance(value, dict):
        return {key: rounded(part) for key, part in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value


def main() -> int:
    options = build_parser().parse_args()
    if options.phase:
        json.dump(PHASES[options.phase](options.folder, options), sys.stdout)
        return 0
    with tempfile.TemporaryDirectory(prefix="config-f-") as folder:
        body = measure(Path(folder), options)
    failed = [name for name, passed in body["checks"].items() if not passed]
    if failed:
        say(f"nothing was written, these checks failed: {', '.join(failed)}")
        return 1
    write_atomically(options.out, json.dumps(rounded(body), indent=1) + "\n")
    say(f"written: {options.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
