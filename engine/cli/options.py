"""Options that mean the same in every command, and what is told about samples."""

import argparse
import math
from collections.abc import Mapping

import numpy as np
from numpy import ndarray as Array

from engine.bundle import Attribute
from engine.errors import LaceError
from engine.reference.noise import SEED_LIMIT
from engine.requests import Sample
from engine.runtimes import AUTO, RUNTIMES
from engine.sampler import Sampler
from engine.solvers import SOLVERS
from engine.tape import LOGICS


class UsageError(LaceError):
    """Options that do not fit each other or the bundle."""


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return number


def seed(text: str) -> int:
    number = int(text)
    if not 0 <= number < SEED_LIMIT:
        raise argparse.ArgumentTypeError(f"{text} is not in 0..2**64-1")
    return number


def tolerance(text: str) -> float:
    number = float(text)
    if not (math.isfinite(number) and number > 0):
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return number


def finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"{text} is not a finite number")
    return number


def add_sampler_options(parser: argparse.ArgumentParser) -> None:
    """What decides how a request is solved."""
    group = parser.add_argument_group("solving")
    group.add_argument("--solver", choices=list(SOLVERS), default="gauss-newton", metavar="NAME",
                       help=f"{', '.join(SOLVERS)} (gauss-newton)")
    group.add_argument(
        "--rtol", type=tolerance, metavar="X", help="relative tolerance (0.15 for gauss-newton, 1e-3 for the others)"
    )
    group.add_argument(
        "--atol", type=tolerance, metavar="X", help="absolute tolerance (2e-3 for gauss-newton, 1e-3 for the others)"
    )
    group.add_argument("--steps", type=positive, metavar="N", help="that many fixed steps instead of adaptive ones")
    group.add_argument("--max-evaluations", type=positive, metavar="N", help="budget of a row (32 for gauss-newton)")
    group.add_argument("--clock", choices=["flow", "paper"], help="time of the Runge-Kutta solvers (flow)")
    group.add_argument("--logic", choices=LOGICS, default="product", help="product, or the paper's lace (product)")
    group.add_argument("--temperature", type=tolerance, default=1.0, metavar="T", help="of lace logic's classes (1)")
    group.add_argument("--guidance", type=tolerance, metavar="X", help="factor of a condition's log p: more obeys "
                       "better and moves farther (the bundle's; 1 with lace logic)")
    group.add_argument("--truncation", type=finite, metavar="PSI", help="pull towards the mean face (the bundle's)")
    group = parser.add_argument_group("running")
    group.add_argument("--runtime", choices=["auto", *RUNTIMES], default="auto", metavar="NAME",
                       help=f"auto, {', '.join(RUNTIMES)} (auto)")
    group.add_argument("--precision", metavar="P",
                       help="openvino: fp32, bf16, bf16-jacobian (fp32); on a GPU: tf32 (the bundle's)")
    group.add_argument("--device", choices=list(AUTO), default="cpu", help=f"{', '.join(AUTO)} (cpu)")
    group.add_argument("--capacity", type=positive, default=64, metavar="N", help="rows in flight (64)")
    group.add_argument("--threads", type=int, default=0, metavar="N", help="0: the runtime's own choice (0)")


def open_sampler(options: argparse.Namespace) -> Sampler:
    names = ("runtime", "device", "capacity", "solver", "rtol", "atol", "steps", "max_evaluations", "clock", "logic",
             "temperature", "guidance", "truncation", "threads", "precision")
    return Sampler(options.bundle, **{name: getattr(options, name) for name in names})


def softmax(logits: Array) -> Array:
    exponents = np.exp(logits - np.max(logits))
    return exponents / exponents.sum()


def reading(attribute: Attribute, logits: Array) -> float | dict[str, float]:
    """What a head says of one picture: a value, or the probability of each class."""
    if attribute.kind == "value":
        return round(float(logits[0]), 4)
    return {name: round(float(p), 4) for name, p in zip(attribute.classes, softmax(logits), strict=True)}


def readings(attributes: Mapping[str, Attribute], logits: Mapping[str, Array]) -> dict:
    return {name: reading(attributes[name], values) for name, values in logits.items()}


def record(sample: Sample, sampler: Sampler, logits: Mapping[str, Array]) -> dict:
    """One sample for samples.json."""
    return {
        "condition": None if sample.condition is None else str(sample.condition),
        "seed": sample.seed,
        "truncation": sampler.starts.psi(sample.request),
        "energy": round(sample.energy, 6),
        "status": sample.status.name,
        "steps": sample.steps,
        "evaluations": sample.evaluations,
        "forced": sample.forced,
        "attributes": readings(sampler.bundle.attributes, logits),
    }


def told(sampler: Sampler) -> dict[str, str]:
    """For samples.json: what computed the samples."""
    runtime = sampler.runtime
    return {
        "bundle": sampler.bundle.hash,
        "runtime": runtime.name,
        "version": runtime.version,
        "device": runtime.device,
        "precision": runtime.drawing.precision,
        "sampler": repr(sampler),
    }


def chunks(sample: Sample, sampler: Sampler) -> dict[str, str]:
    """The text chunks of a PNG: enough to draw the same picture again."""
    return {
        "Software": "lace-engine",
        "Condition": "" if sample.condition is None else str(sample.condition),
        "Seed": str(sample.seed),
        "Truncation": repr(sampler.starts.psi(sample.request)),
        "Bundle": sampler.bundle.hash,
    }
