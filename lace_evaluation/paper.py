"""The paper's solver: torchdiffeq's dopri5 on the VP clock, one step size for the whole batch.

    dz/dt = -1/2 beta(t) grad log p(c | z),   t from 1 to 1e-3

Nie, Vahdat, Anandkumar, NeurIPS 2021, with the tolerances and the batch of its published scripts. As there, the last
step goes past the end and is interpolated back. The field is ours, so the mapping runs once an evaluation and not once
for every attribute: the comparison is about the solver alone.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy import ndarray as Array
from torch import Tensor
from torchdiffeq import odeint

from engine.batch import Batch, Status
from engine.clock import T_END, T_START, beta
from engine.errors import SolveError
from engine.flow import Flow

BATCH = 16  # rows that share a step


@dataclass(frozen=True, slots=True)
class SharedDopri5:
    """A solver for ``Sampler(capacity=BATCH)``: one call of ``step`` brings all rows to the end of the flow."""

    rtol: float = 1e-3
    atol: float = 1e-3

    def __post_init__(self):
        if self.rtol <= 0 or self.atol <= 0:
            raise SolveError(f"tolerances must be positive: rtol={self.rtol}, atol={self.atol}")

    def begin(self, flow: Flow, batch: Batch, rows: Array) -> None:
        """Nothing to prepare."""

    def step(self, flow: Flow, batch: Batch, rows: Array) -> None:
        evaluations = 0

        def velocity(t: Tensor, z: Tensor) -> Tensor:
            nonlocal evaluations
            evaluations += 1
            point = flow.evaluate(batch, rows, z.numpy(), linear=False)
            return torch.from_numpy(point.gradient) * float(-0.5 * beta(float(t)))

        # Time is float64 whatever the state: dt may become shorter than float32 resolves near t = 1.
        times = torch.tensor([T_START, T_END], dtype=torch.float64)
        try:
            with torch.no_grad():
                path = odeint(velocity, torch.from_numpy(batch.z[rows]), times, rtol=self.rtol, atol=self.atol,
                              method="dopri5", options={"dtype": torch.float64})
            end, fate = path[-1].numpy(), Status.DONE
        except AssertionError:  # torchdiffeq's "underflow in dt"
            end, fate = batch.z[rows], Status.STEP_UNDERFLOW
        batch.z[rows] = end
        batch.evaluations[rows] += evaluations
        batch.steps[rows] += max(1, evaluations // 6)  # six evaluations a step, rejected ones among them
        batch.status[rows] = np.where(np.isfinite(end).all(axis=1), fate, Status.NONFINITE)
