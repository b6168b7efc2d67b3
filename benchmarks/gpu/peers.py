"""Peers on the same GPU: those of benchmarks/peers with their tensors moved there, and CUDA graphs of torch.compile."""

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from numpy import ndarray as Array
from torchdiffeq import odeint, odeint_adjoint

from benchmarks.peers.decoders import random_synthesis
from benchmarks.peers.hoisted import TOLERANCE
from benchmarks.peers.paper import Energy, PaperClock
from benchmarks.peers.torch_field import LogP, Velocity, check_compiler
from engine.bench.contest import Answer, Openers, Run, Unavailable
from engine.bench.problem import Problem
from engine.bundle import Bundle
from engine.clock import CLOCKS, T_END, T_START

DEVICE = "cuda"
COMPILED = "torchdiffeq bosh3, torch.compile reduce-overhead"
HOISTED = {"torchdiffeq dopri5": "dopri5", "torchdiffeq adaptive_heun": "adaptive_heun", COMPILED: "bosh3"}
DIFFRAX = {"diffrax heun, jit": "heun", "diffrax bosh3, jit": "bosh3"}


def solvers(problem: Problem) -> Openers:
    return {
        "paper": partial(open_paper, problem),
        **{name: partial(open_hoisted, problem, method, compiled=name == COMPILED) for name, method in HOISTED.items()},
        **{name: partial(open_diffrax, problem, method) for name, method in DIFFRAX.items()},
    }


def check_torch() -> None:
    if not torch.cuda.is_available():
        raise Unavailable("torch was built without CUDA, or finds no GPU")


def moved(logp: LogP) -> LogP:
    """Its tensors are in plain lists, which ``Module.to`` does not see."""
    logp.mapping = [(w.to(DEVICE), b.to(DEVICE)) for w, b in logp.mapping]
    logp.heads = {name: [(w.to(DEVICE), b.to(DEVICE)) for w, b in layers] for name, layers in logp.heads.items()}
    logp.average = logp.average.to(DEVICE)
    return logp


def open_paper(problem: Problem) -> Run:
    check_torch()
    energy = Energy(problem).to(DEVICE)
    energy.average = energy.average.to(DEVICE)
    func, span = PaperClock(energy), torch.tensor([T_START, T_END], device=DEVICE)

    def solve(z0: torch.Tensor) -> torch.Tensor:
        (ends,) = odeint_adjoint(func, (z0,), span, method="dopri5", rtol=TOLERANCE, atol=TOLERANCE)
        return ends[-1].detach()

    return counted(func, solve, problem.z0)


def open_hoisted(problem: Problem, method: str, *, compiled: bool) -> Run:
    check_torch()
    logp: Callable = moved(LogP(problem))
    if compiled:
        check_compiler()
        logp = torch.compile(logp, mode="reduce-overhead", dynamic=False)
    func, span = Velocity(logp), torch.tensor([0.0, CLOCKS["flow"][0]], device=DEVICE)
    if compiled:
        evaluate = func.forward
        # What a CUDA graph of torch returns is overwritten by its next replay.
        func.forward = lambda t, z: evaluate(t, z).clone()  # type: ignore[method-assign]

    def solve(z0: torch.Tensor) -> torch.Tensor:
        return odeint(func, z0, span, method=method, rtol=TOLERANCE, atol=TOLERANCE)[-1]

    return counted(func, solve, problem.z0)


def counted(func: Velocity | PaperClock, solve: Callable[[torch.Tensor], torch.Tensor], z0: Array) -> Run:
    """Start on the host, end on the host, as ours; compiled and warm when it is returned."""

    def run() -> Answer:
        func.evaluations = 0
        ends = solve(torch.from_numpy(z0).to(DEVICE)).cpu().numpy()
        return Answer(ends, func.evaluations)

    run()
    return run


def open_diffrax(problem: Problem, method: str) -> Run:
    import jax

    if jax.default_backend() != "gpu":
        raise Unavailable("jax was installed without CUDA, or finds no GPU")
    from benchmarks.peers import with_diffrax

    solve = with_diffrax.open_solver(problem, method)
    return lambda: Answer(*solve(problem.z0), note=solve.note)


def drawers(bundle: Bundle, ws: Array) -> Openers:
    """The synthesis in torch: eager in both precisions, and compiled into CUDA graphs."""
    return {
        "torch fp32": partial(open_drawer, bundle, ws, torch.float32),
        "torch fp16": partial(open_drawer, bundle, ws, torch.float16),
        "torch fp16, torch.compile reduce-overhead": partial(open_drawer, bundle, ws, torch.float16, compiled=True),
    }


def open_drawer(bundle: Bundle, ws: Array, dtype: torch.dtype, *, compiled: bool = False) -> Run:
    check_torch()
    synthesis: Callable = random_synthesis(bundle).to(DEVICE, dtype)
    if compiled:
        check_compiler()
        synthesis = torch.compile(synthesis, mode="reduce-overhead", dynamic=False)

    def run() -> Array:
        with torch.inference_mode():
            given = torch.from_numpy(ws).to(DEVICE, dtype)
            parts = [synthesis(part).float().cpu().numpy() for part in given.split(8)]
        return np.concatenate(parts)

    run()
    return run
