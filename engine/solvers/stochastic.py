"""Langevin dynamics and the predictor-corrector of the VP diffusion, on the joint energy log p(c|z) - |z|^2/2.

Noise is a pure function of (seed, stream) with one stream per draw; stream 0 is the start z.

Nie, Vahdat, Anandkumar, NeurIPS 2021; Song et al., "Score-based generative modeling through stochastic
differential equations", ICLR 2021.
"""

from dataclasses import dataclass

import numpy as np
from numpy import ndarray as Array

from engine.batch import Batch, Status
from engine.clock import BETA, T_END
from engine.errors import SolveError
from engine.flow import Flow
from engine.reference.noise import normals_many


def draw(batch: Batch, rows: Array, stream: Array) -> Array:
    """Fresh normals (n, width): row i takes stream[i] of its own seed."""
    seeds = [batch.seeds[row] for row in rows]
    return normals_many(seeds, [int(s) for s in stream], batch.z.shape[1]).astype(batch.dtype)


def score(flow: Flow, batch: Batch, rows: Array, z: Array) -> Array:
    """grad of log p(c|z) + log p(z), of the flow's prior."""
    point = flow.evaluate(batch, rows, z, linear=False)
    batch.evaluations[rows] += 1
    batch.logp[rows] = point.logp
    return point.gradient + flow.prior.score(z, batch.truncation[rows])


def advance(batch: Batch, rows: Array, z: Array, steps: int) -> None:
    """Accept z; a row that is no longer finite stops there, one that took its last step is done."""
    finite = np.isfinite(z).all(axis=1)
    good = rows[finite]
    batch.z[good] = z[finite]
    batch.steps[good] += 1
    batch.status[rows[~finite]] = Status.NONFINITE
    batch.status[good[batch.steps[good] >= steps]] = Status.DONE


@dataclass(frozen=True, slots=True)
class Langevin:
    """z <- z + rate * score + noise * eps, ``steps`` times. Defaults are those of the paper's scripts."""

    steps: int = 100
    rate: float = 0.01
    noise: float = 0.01

    def __post_init__(self):
        if self.steps < 1 or self.rate <= 0 or self.noise < 0:
            raise SolveError("langevin needs steps >= 1, rate > 0 and noise >= 0")

    def begin(self, flow: Flow, batch: Batch, rows: Array) -> None:
        """Nothing to prepare."""

    def step(self, flow: Flow, batch: Batch, rows: Array) -> None:
        z = batch.z[rows]
        eps = draw(batch, rows, 1 + batch.steps[rows])
        dtype = z.dtype.type
        advance(batch, rows, z + dtype(self.rate) * score(flow, batch, rows, z) + dtype(self.noise) * eps, self.steps)


@dataclass(frozen=True, slots=True)
class PredictorCorrector:
    """The discretised VP-SDE with ``steps`` levels and ``corrections`` Langevin steps at each.

    The reference reuses a stale score in the corrector and takes its norms over the batch; here the score is
    evaluated anew and the norms are the row's own.
    """

    steps: int = 1000
    corrections: int = 2
    snr: float = 0.16

    def __post_init__(self):
        # The largest rate is BETA[1] / steps, and sqrt(1 - rate) must exist.
        if self.steps < BETA[1] or self.corrections < 0 or self.snr <= 0:
            raise SolveError(f"predictor-corrector needs steps >= {BETA[1]:g}, corrections >= 0 and snr > 0")

    def begin(self, flow: Flow, batch: Batch, rows: Array) -> None:
        """Nothing to prepare."""

    def step(self, flow: Flow, batch: Batch, rows: Array) -> None:
        n = self.steps
        t = np.linspace(1.0, T_END, n)[batch.steps[rows]]
        betas = np.linspace(BETA[0] / n, BETA[1] / n, n)
        rate = betas[np.floor(t * (n - 1)).astype(int)][:, None].astype(batch.dtype)
        stream = 1 + batch.steps[rows] * (1 + self.corrections)
        z = batch.z[rows]
        drift = (2 - np.sqrt(1 - rate)) * z + rate * score(flow, batch, rows, z)
        z = drift + np.sqrt(rate) * draw(batch, rows, stream)
        for k in range(self.corrections):
            gradient, eps = score(flow, batch, rows, z), draw(batch, rows, stream + 1 + k)
            ratio = np.linalg.norm(eps, axis=1) / np.maximum(np.linalg.norm(gradient, axis=1), 1e-12)
            h = (2 * (1 - rate[:, 0]) * (self.snr * ratio) ** 2)[:, None].astype(batch.dtype)
            z = z + h * gradient + np.sqrt(2 * h) * eps
        advance(batch, rows, z, self.steps)
