"""torchdiffeq on the flow's clock, with the mapping and every head computed once; also with a compiled field."""

import torch
from numpy import ndarray as Array
from torchdiffeq import odeint

from benchmarks.peers.torch_field import LogP, Velocity, check_compiler
from engine.bench.problem import Problem
from engine.clock import CLOCKS

TOLERANCE = 1e-3


def open_solver(problem: Problem, method: str, *, compiled: bool = False):
    """z0 -> the end of the flow and the number of evaluations; one step size for the batch.

    compiled   log p and its gradient go through torch.compile, for this number of rows
    """
    logp = LogP(problem)
    if compiled:
        check_compiler()
        logp = torch.compile(logp, dynamic=False)
    func, span = Velocity(logp), torch.tensor([0.0, CLOCKS["flow"][0]])
    if compiled:
        func(span[0], torch.from_numpy(problem.z0))

    def solve(z0: Array) -> tuple[Array, int]:
        func.evaluations = 0
        ends = odeint(func, torch.from_numpy(z0), span, method=method, rtol=TOLERANCE, atol=TOLERANCE)
        return ends[-1].numpy(), func.evaluations

    return solve
