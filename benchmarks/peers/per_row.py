"""torchode: every row with its own step size, eager."""

import torch
import torchode
from numpy import ndarray as Array

from benchmarks.peers.torch_field import LogP, Velocity
from engine.bench.problem import Problem
from engine.clock import CLOCKS

TOLERANCE = 1e-3
METHODS = {"dopri5": torchode.Dopri5, "tsit5": torchode.Tsit5, "heun": torchode.Heun}


def open_solver(problem: Problem, method: str):
    """z0 -> the end of the flow and the number of evaluations of the batch."""
    velocity = Velocity(LogP(problem))
    term = torchode.ODETerm(velocity)
    control = torchode.IntegralController(atol=TOLERANCE, rtol=TOLERANCE, term=term)
    adjoint = torchode.AutoDiffAdjoint(METHODS[method](term=term), control)

    def solve(z0: Array) -> tuple[Array, int]:
        velocity.evaluations = 0
        rows = len(z0)
        span = torch.zeros(rows), torch.full((rows,), CLOCKS["flow"][0])
        with torch.no_grad():
            solution = adjoint.solve(torchode.InitialValueProblem(torch.from_numpy(z0), *span))
        return solution.ys[:, -1].numpy(), velocity.evaluations

    return solve
