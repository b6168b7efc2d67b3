"""Peers on the same weights: what else one would solve, differentiate and decode with.

Each file opens contestants of one package, and is imported only when its contestant is opened: a missing package makes
that contestant unavailable, and its line says why. A solver is a function z0 (rows, z_dim) -> (end, evaluations of the
batch); what compiles has done so when it has been opened.
"""

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

from numpy import ndarray as Array

from engine.bench.contest import Answer, Openers, Peers, Run, Unavailable
from engine.bench.problem import Problem
from engine.bundle import Bundle

# Rows at which a peer races, by the number of attributes. They bound the benchmark's time: slow ones race where a goal
# names them and where the fast ones can be told from them.
ENDS = {3: (1, 16)}
MOST = {1: (1, 16, 64), 3: (1, 4, 16, 64), 12: (1, 16)}
ALL = {1: (1, 16, 64), 3: (1, 4, 16, 64, 256), 12: (1, 16, 64)}
LEFT_OUT = "left out at this size, to bound the benchmark's time"
# name: (file, arguments of its open_solver, rows).
SOLVERS: dict[str, tuple[str, dict[str, Any], dict[int, tuple[int, ...]]]] = {
    "paper": ("paper", {}, {1: (1,), 3: (1, 16), 12: (1, 16)}),
    "torchdiffeq dopri5": ("hoisted", {"method": "dopri5"}, ENDS),
    "torchdiffeq adaptive_heun": ("hoisted", {"method": "adaptive_heun"}, MOST),
    "torchdiffeq bosh3": ("hoisted", {"method": "bosh3"}, MOST),
    "torchdiffeq bosh3, torch.compile": ("hoisted", {"method": "bosh3", "compiled": True}, ENDS),
    "torchode dopri5": ("per_row", {"method": "dopri5"}, ENDS),
    "torchode tsit5": ("per_row", {"method": "tsit5"}, ENDS),
    "torchode heun": ("per_row", {"method": "heun"}, {3: (1, 4, 16, 64)}),
    "diffrax heun": ("with_diffrax", {"method": "heun"}, ALL),
    "diffrax bosh3": ("with_diffrax", {"method": "bosh3"}, ALL),
    "diffrax dopri5": ("with_diffrax", {"method": "dopri5"}, ENDS),
}
FIELDS = {"torch": "torch_field", "torch, as in the paper": "paper", "jax": "with_diffrax"}
COMPILED = "torch.compile"
DECODERS = ("torch", "torch, grouped convolutions", COMPILED)
COMPILED_SIZES, END_TO_END_SIZES = (256, 1024), (1024,)  # compiling takes a minute, the paper's solve five seconds


def open_peers(threads: int) -> Peers:
    """All peers, with ``threads`` threads each. (jax takes as many as the process has processors.)"""
    return Peers(partial(solvers, threads), partial(fields, threads), partial(picture_decoders, threads),
                 partial(pictures, threads))


def load(file: str, threads: int) -> Any:
    """A file of this folder. Raises ImportError if its package is missing."""
    module = import_module(f"benchmarks.peers.{file}")
    if file != "with_diffrax":
        import_module("torch").set_num_threads(threads)
    return module


def solvers(threads: int, problem: Problem) -> Openers:
    return {name: partial(open_solver, threads, problem, name) for name in SOLVERS}


def open_solver(threads: int, problem: Problem, name: str) -> Run:
    file, settings, entered = SOLVERS[name]
    if problem.rows not in entered.get(len(problem.targets), ()):
        raise Unavailable(LEFT_OUT)
    solve = load(file, threads).open_solver(problem, **settings)
    note = getattr(solve, "note", "")
    return lambda: Answer(*solve(problem.z0), note=note)


def fields(threads: int, problem: Problem) -> Openers:
    """The gradient at the start of every row."""

    def opened(file: str) -> Run:
        gradient = load(file, threads).open_gradient(problem)
        return lambda: gradient(problem.z0)

    return {name: partial(opened, file) for name, file in FIELDS.items()}


def picture_decoders(threads: int, bundle: Bundle, ws: Array) -> Openers:
    def opened(name: str) -> Run:
        if name == COMPILED and bundle.generator.resolution not in COMPILED_SIZES:
            raise Unavailable(LEFT_OUT)
        draw = load("decoders", threads).open_decoder(bundle, name)
        if name == COMPILED:
            draw(ws)
        return lambda: draw(ws)

    return {name: partial(opened, name) for name in DECODERS}


def pictures(threads: int, bundle: Bundle, problem: Problem) -> Openers:
    """The paper's way to one PNG: its solve, and the decode in eager torch."""

    def opened() -> Run:
        if bundle.generator.resolution not in END_TO_END_SIZES:
            raise Unavailable(LEFT_OUT)
        solve: Callable = load("paper", threads).open_solver(problem)
        draw = load("decoders", threads).open_png(problem)

        def run() -> Answer:
            z, evaluations = solve(problem.z0)
            draw(z)
            return Answer(z, evaluations)

        return run

    return {"paper": opened}
