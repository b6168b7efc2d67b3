"""Options that mean the same in every command, their types and checks, and the sampler that they open."""

import argparse
import difflib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields

from engine.bundle import Bundle
from engine.errors import LaceError
from engine.reference.noise import SEED_LIMIT
from engine.runtimes import AUTO, RUNTIMES
from engine.sampler import MOST_ROWS, MOST_THREADS, Sampler, find_bundle
from engine.solvers import SOLVERS
from engine.tape import LOGICS

# What decides a sample, by the names of the Sampler's arguments; and what runs it. None: the Sampler's own default.
SOLVER_SETTINGS = ("rtol", "atol", "steps", "max_evaluations", "clock")
SOLVING = ("solver", *SOLVER_SETTINGS, "logic", "temperature", "guidance", "confidence", "truncation")
CHECKING = ("check", "max_decodes")
RUNNING = ("runtime", "precision", "device", "capacity", "threads")


class UsageError(LaceError):
    """Options that do not fit each other or the bundle."""


def whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None


def between(text: str, low: int, high: int, shown: str = "") -> int:
    number = whole(text)
    if not low <= number <= high:
        raise argparse.ArgumentTypeError(f"{text} is not in {low}..{shown or high}")
    return number


def positive(text: str) -> int:
    number = whole(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return number


def from_zero(text: str) -> int:
    number = whole(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{text} is negative")
    return number


def seed(text: str) -> int:
    return between(text, 0, SEED_LIMIT - 1, "2**64-1")


def threads(text: str) -> int:
    return between(text, 0, MOST_THREADS)


def capacity(text: str) -> int:
    return between(text, 1, MOST_ROWS)


def real(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None


def tolerance(text: str) -> float:
    number = real(text)
    if not (math.isfinite(number) and number > 0):
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return number


def share(text: str) -> float:
    number = real(text)
    if not 0 < number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number between 0 and 1")
    return number


def finite(text: str) -> float:
    number = real(text)
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"{text} is not a finite number")
    return number


def not_negative(text: str) -> float:
    number = finite(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{text} is negative")
    return number


def one_of(kind: str, names: Iterable[str]) -> Callable[[str], str]:
    """The type of an option that takes one of ``names``; a wrong one is answered with the nearest."""
    known = list(names)

    def choose(text: str) -> str:
        if text not in known:
            near = difflib.get_close_matches(text, known, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise argparse.ArgumentTypeError(f"there is no {kind} {text!r}; {hint}there are: {', '.join(known)}")
        return text

    return choose


def flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def add_sampler_options(parser: argparse.ArgumentParser) -> None:
    """What decides how a request is solved. What is not given is None: the Sampler's own default."""
    add = parser.add_argument_group("solving").add_argument
    add("--solver", type=one_of("solver", SOLVERS), metavar="NAME", help=f"{', '.join(SOLVERS)} (posterior "
        "where the heads are sharp and calibrated, else gauss-newton)")
    add("--rtol", type=tolerance, metavar="X", help="relative tolerance (0.15 for gauss-newton, 1e-3 for the others)")
    add("--atol", type=tolerance, metavar="X", help="absolute tolerance (2e-3 for gauss-newton, 1e-3 for the others)")
    add("--steps", type=positive, metavar="N", help="that many fixed steps instead of adaptive ones")
    add("--max-evaluations", type=positive, metavar="N", help="budget of a row (32 for gauss-newton)")
    add("--clock", choices=["flow", "paper"], help="time of the Runge-Kutta solvers (flow)")
    add("--logic", choices=LOGICS, help="product, or the paper's lace (product)")
    add("--temperature", type=tolerance, metavar="T", help="of lace logic's classes (1)")
    add("--guidance", type=tolerance, metavar="X", help="factor of a condition's log p: more obeys better and moves "
        "farther (the bundle's; 1 with lace logic)")
    add("--confidence", type=share, metavar="P", help="of the posterior: how sure the heads must be that the condition "
        "holds (0.9)")
    add("--truncation", type=finite, metavar="PSI", help="pull towards the mean face (the bundle's)")
    add_runtime_options(parser).add_argument("--capacity", type=capacity, metavar="N", help="rows in flight (64)")


def add_runtime_options(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """What computes. Returns the group, for more options of this kind."""
    group = parser.add_argument_group("running")
    add = group.add_argument
    add("--runtime", type=one_of("runtime", ["auto", *RUNTIMES]), metavar="NAME",
        help=f"auto, {', '.join(RUNTIMES)} (auto)")
    add("--precision", metavar="P", help="native: fp32, bf16-jacobian; openvino: fp32, bf16, bf16-jacobian; cuda, "
        "tensorrt, tensorrt_rtx: fp32, tf32, fp16; onnxruntime on a GPU: tf32 (the runtime's first)")
    add("--device", choices=list(AUTO), help=f"{', '.join(AUTO)} (cpu)")
    add("--threads", type=threads, metavar="N", help="0: the runtime's own choice (0)")
    return group


def given(options: argparse.Namespace, names: Sequence[str]) -> dict:
    """Those of the options that were given."""
    return {name: value for name in names if (value := getattr(options, name, None)) is not None}


def open_sampler(options: argparse.Namespace) -> Sampler:
    """A sampler as the options say. Raises UsageError where they do not fit each other, in words of options."""
    check_solving(options)
    return Sampler(options.bundle, **given(options, (*SOLVING, *CHECKING, *RUNNING)))


def check_solving(options: argparse.Namespace) -> None:
    if getattr(options, "max_decodes", None) is not None and options.check is None:
        raise UsageError("--max-decodes is a check's: add --check MODEL.onnx, or leave it out")
    if options.temperature not in (None, 1.0) and options.logic != "lace":
        raise UsageError("--temperature belongs to the paper's logic: add --logic lace, or leave it out")
    if getattr(options, "confidence", None) is not None:
        if options.guidance is not None:
            raise UsageError("--confidence and --guidance both say how sure the heads must be: give one of them")
        flow = given(options, SOLVER_SETTINGS) if options.solver is None else {}
        if options.solver not in (None, "posterior") or options.logic == "lace" or flow:
            raise UsageError("--confidence is the posterior's: leave out --solver, --logic and what the flow is set by")
    if isinstance(options.solver, str):  # lace-eval compares with solver records too
        kind, fixed = SOLVERS[options.solver]
        allowed = {f.name for f in fields(kind)} - set(fixed)
        for name in given(options, SOLVER_SETTINGS):
            if name not in allowed:
                known = ", ".join(flag(n) for n in SOLVER_SETTINGS if n in allowed)
                raise UsageError(f"--solver {options.solver} has no setting {flag(name)}; it has: {known}")


def check_label(bundle: Bundle, label: int | None, *, in_w: bool = False) -> None:
    """Raises UsageError where --label is missing, too much, or out of range."""
    labels = bundle.generator.labels
    if label is None:
        if labels and not in_w:
            raise UsageError(f"this generator is conditional: add --label N, a class in 0..{labels - 1}")
    elif not labels:
        raise UsageError(f"this generator is unconditional: leave --label {label} out")
    elif not 0 <= label < labels:
        raise UsageError(f"--label {label} is out of range: expected 0..{labels - 1}")


def opened(options: argparse.Namespace) -> Bundle:
    """The bundle of the options, opened once."""
    options.bundle = find_bundle(options.bundle)
    return options.bundle
