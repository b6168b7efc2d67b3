"""diffrax: the whole solve is one compiled XLA program, with one step size for the batch or one for every row."""

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
from numpy import ndarray as Array

from engine.bench.problem import Problem
from engine.bench.timing import timed
from engine.clock import CLOCKS
from engine.reference import field as twin

TOLERANCE = 1e-3
MOST_STEPS = 100_000
VMAP_ROWS = 16  # up to which vmap is tried: it was slower everywhere, and doubles the time of compiling
# Evaluations of a step: bosh3 and dopri5 keep the last stage for the next step.
METHODS = {"heun": (diffrax.Heun, 2), "bosh3": (diffrax.Bosh3, 3), "dopri5": (diffrax.Dopri5, 6)}


def make_logp(problem: Problem):
    """z (rows, z_dim) -> log p (rows,)."""
    bundle = problem.bundle
    mapping = [(jnp.asarray(w), jnp.asarray(b)) for w, b in twin.layers(bundle.field, "mapping")]
    average, psi = jnp.asarray(bundle.field["mapping.w_avg"]), bundle.generator.truncation
    terms = [(bundle.attributes[target.attribute], target.wanted) for target in problem.targets]
    names = dict.fromkeys(attribute.head for attribute, _ in terms)
    heads = {n: [(jnp.asarray(w), jnp.asarray(b)) for w, b in twin.layers(bundle.field, f"head.{n}")] for n in names}

    def logp(z):
        x = z / jnp.sqrt(jnp.mean(z * z, axis=1, keepdims=True) + 1e-8)
        for weight, bias in mapping:
            x = jax.nn.leaky_relu(x @ weight.T + bias, 0.2)
        w = average + psi * (x - average)
        logits = {}
        for name, layers in heads.items():
            x = w
            for weight, bias in layers[:-1]:
                x = jax.nn.leaky_relu(x @ weight.T + bias, 0.2)
            logits[name] = x @ layers[-1][0].T + layers[-1][1]
        return sum(term(logits[a.head][:, slice(*a.columns)], a, wanted) for a, wanted in terms)

    return logp


def term(logits, attribute, wanted: float):
    if attribute.kind == "class":
        return jax.nn.log_softmax(logits, axis=1)[:, int(wanted)]
    return -jnp.square((logits[:, 0] - wanted) / attribute.sigma) / 2


def open_gradient(problem: Problem):
    """z (rows, z_dim) -> grad log p (rows, z_dim), compiled."""
    logp = make_logp(problem)
    compiled = jax.jit(jax.grad(lambda z: logp(z).sum()))
    return lambda z: np.asarray(compiled(jnp.asarray(z)))


def open_solver(problem: Problem, method: str):
    """z0 -> the end of the flow and the evaluations of the batch, compiled for this number of rows.

    One step size for the batch, or vmap with one for each row: what a trial finds faster is taken, and noted.
    """
    shared = compiled_solver(problem, method, per_row=False)
    shared.note = "one step size for the batch"
    if not 1 < problem.rows <= VMAP_ROWS:
        return shared
    single = compiled_solver(problem, method, per_row=True)
    single.note = "vmap over the rows"
    return min((shared, single), key=lambda solve: timed(lambda: solve(problem.z0))[1])


def compiled_solver(problem: Problem, method: str, *, per_row: bool):
    logp = make_logp(problem)
    kind, stages = METHODS[method]
    gradient = jax.grad(lambda z: logp(z).sum())
    field = diffrax.ODETerm(lambda t, z, _: gradient(z[None])[0] if per_row else gradient(z))
    control = diffrax.PIDController(rtol=TOLERANCE, atol=TOLERANCE)

    def one(z0):
        found = diffrax.diffeqsolve(field, kind(), 0.0, CLOCKS["flow"][0], None, z0, stepsize_controller=control,
                                    max_steps=MOST_STEPS)
        return found.ys[0], found.stats["num_steps"]

    compiled = jax.jit(jax.vmap(one) if per_row else one).lower(jnp.asarray(problem.z0)).compile()

    def solve(z0: Array) -> tuple[Array, int]:
        end, steps = jax.block_until_ready(compiled(jnp.asarray(z0)))
        return np.asarray(end), int(stages * np.max(steps))

    return solve
