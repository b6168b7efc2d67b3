"""Baselines that solve nothing: rejection sampling, and arithmetic along the normals of linear classifiers.

Shen, Gu, Tang, Zhou, "Interpreting the Latent Space of GANs for Semantic Face Editing", CVPR 2020 (InterFaceGAN): an
attribute is edited along the normal of a linear boundary in w; conditionally, along its part orthogonal to the normals
of what shall stay. Own writing, with the same heads as labels and logistic instead of hinge loss.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy import ndarray as Array
from torch.nn import functional as F

from engine.batch import Status
from engine.bundle import Attribute
from engine.condition import Condition, Is
from engine.reference.noise import normals
from engine.requests import Request, Sample
from engine.sampler import Sampler
from engine.tape import class_index, satisfied
from lace_evaluation.questions import TOLERANCE, statements
from lace_evaluation.study import Pool, as_labels, at_end

TRIES = 1000  # proposals after which rejection sampling gives a row up
ROUNDS = 10  # of the search for the length of an arithmetic step
RIDGE = 1e-3
FIRST_MARGIN, SURE = 1.0, 2.0  # log-odds of the linear model to begin with; of the head that end the search
FARTHEST = 512.0  # log-odds of the linear model beyond which no step is tried
SLOPES = (0.2, 2.0)  # of a head's value along a normal, over that of the linear model: bounds of the secant's guess


def reject(sampler: Sampler, pool: Pool, requests: Sequence[Request]) -> tuple[list[Sample], Array]:
    """For each request the first plain sample that the heads accept, values within TOLERANCE.

    All rows share one stream of proposals, of which each row goes on where the row before it stopped; the stream is
    the pool, round and round. ``evaluations`` counts proposals.
    returns   samples, and which of them were accepted (n,); a row gives up after TRIES proposals with the last of them
    """
    attributes, samples, reached = sampler.bundle.attributes, [], []
    count, cursor = len(pool.seeds), 0
    for request in requests:
        tries = (cursor + np.arange(min(TRIES, count))) % count
        names = request.expression.attributes() if request.expression is not None else ()
        logits = {name: pool.logits[name][tries] for name in names} or {"": np.zeros((len(tries), 1))}
        good = np.flatnonzero(satisfied(request.expression, attributes, logits, tolerance=TOLERANCE))
        last = int(good[0]) if len(good) else len(tries) - 1
        chosen, cursor = tries[last], (cursor + last + 1) % count
        z = normals(int(pool.seeds[chosen]), 0, sampler.bundle.generator.z_dim)
        samples.append(Sample(request, z, pool.w[chosen], {}, 0.0, Status.DONE, 0, last + 1, last, 0))
        reached.append(len(good) > 0)
    return at_end(sampler, samples), np.array(reached)


@dataclass(frozen=True, slots=True, eq=False)
class Plane:
    """A linear model of an attribute in w.  weight (C, w_dim), bias (C,)

    A value: its prediction, C = 1. A class of two: log-odds of the second, C = 1. A class of more: log-odds of each
    against the rest.
    """

    weight: Array
    bias: Array

    def score(self, w: Array, index: int) -> float:
        return float(self.weight[index] @ w + self.bias[index])


def fit(pool: Pool, attributes: Mapping[str, Attribute]) -> dict[str, Plane]:
    """Linear models of what the heads read in the pool."""
    labels = as_labels(pool.logits, attributes)
    centre, spread = pool.w.mean(axis=0), pool.w.std(axis=0) + 1e-8
    x = ((pool.w - centre) / spread).astype(np.float64)
    planes = {}
    for i, (name, attribute) in enumerate(attributes.items()):
        if attribute.kind == "value":
            weight, bias = least_squares(x, labels[:, i : i + 1])
        else:
            classes = [1] if len(attribute.classes) == 2 else range(len(attribute.classes))
            weight, bias = logistic(x, np.stack([labels[:, i] == c for c in classes], axis=1))
        weight = weight / spread
        planes[name] = Plane(weight, bias - weight @ centre)
    return planes


def least_squares(x: Array, y: Array) -> tuple[Array, Array]:
    """Ridge regression.  x (n, d) centred, y (n, C) -> weight (C, d), bias (C,)"""
    gram = x.T @ x + RIDGE * len(x) * np.eye(x.shape[1])
    return np.linalg.solve(gram, x.T @ (y - y.mean(axis=0))).T, y.mean(axis=0)


def logistic(x: Array, y: Array) -> tuple[Array, Array]:
    """Logistic regression of every column of y by itself.  x (n, d), y (n, C) bool -> weight (C, d), bias (C,)"""
    inputs, targets = torch.from_numpy(x), torch.from_numpy(y.astype(np.float64))
    weight = torch.zeros(y.shape[1], x.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(y.shape[1], dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS([weight, bias], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimiser.zero_grad()
        logits = inputs @ weight.T + bias
        value = F.binary_cross_entropy_with_logits(logits, targets) * y.shape[1] + RIDGE * weight.square().sum()
        value.backward()
        return value

    optimiser.step(loss)
    return weight.detach().numpy(), bias.detach().numpy()


@dataclass(slots=True, eq=False)
class Move:
    """The arithmetic of one row: w + directions^T step, so that the linear models read ``wanted``.

    directions (k, w_dim): first what is asked for, then what shall stay;  scores, wanted (k,)
    asked      (attribute, class index or value, +-1) of each thing that is asked for
    before     of each value that is asked for: what was wanted of the linear model, and what the head then read
    """

    start: Array
    directions: Array
    scores: Array
    wanted: Array
    asked: list[tuple[Attribute, float, int]]
    before: dict[int, tuple[float, float]] = field(default_factory=dict)

    def at(self) -> Array:
        gram = self.directions @ self.directions.T
        ridge = 1e-6 * np.trace(gram) / len(gram) * np.eye(len(gram))
        return self.start + self.directions.T @ np.linalg.solve(gram + ridge, self.wanted - self.scores)

    def correct(self, logits: Mapping[str, Array]) -> None:
        """Set ``wanted`` anew by what the heads read (C,) each: values by a secant, classes by doubled log-odds."""
        for i, (attribute, choice, sign) in enumerate(self.asked):
            found = logits[attribute.name]
            if attribute.kind == "value":
                self.wanted[i] += self.secant(i, float(found[0]), choice)
            elif margin(found, int(choice)) < SURE and abs(self.wanted[i]) < FARTHEST:
                self.wanted[i] = sign * 2 * max(abs(self.wanted[i]), FIRST_MARGIN)

    def secant(self, i: int, found: float, choice: float) -> float:
        """By how much to change what is wanted of the linear model, so that the head reads ``choice``."""
        wanted, slope = float(self.wanted[i]), 1.0
        if i in self.before and abs(wanted - self.before[i][0]) > 1e-6:
            slope = float(np.clip((found - self.before[i][1]) / (wanted - self.before[i][0]), *SLOPES))
        self.before[i] = wanted, found
        return (choice - found) / slope


def margin(logits: Array, index: int) -> float:
    """How far one class is ahead of all others."""
    return float(logits[index] - np.delete(logits, index).max())


def move(sample: Sample, condition: Condition, planes: Mapping[str, Plane], attributes: Mapping[str, Attribute],
         stay: Sequence[str]) -> Move:
    """The first step towards ``condition``, a conjunction of classes and values, orthogonal to those that ``stay``."""
    directions, scores, wanted, asked = [], [], [], []
    for leaf in statements(condition):
        assert isinstance(leaf, Is)
        attribute, plane = attributes[leaf.name], planes[leaf.name]
        two = len(attribute.classes) == 2
        choice = class_index(attribute, leaf.choice) if attribute.kind == "class" else float(leaf.choice)
        index = int(choice) if len(attribute.classes) > 2 else 0
        sign = -1 if two and not choice else 1
        score = plane.score(sample.w, index)
        directions.append(plane.weight[index])
        scores.append(score)
        far_enough = sign * max(sign * score, FIRST_MARGIN)
        wanted.append(float(choice) if attribute.kind == "value" else far_enough)
        asked.append((attribute, float(choice), sign))
    for name in stay:
        for index in range(len(planes[name].weight)):
            directions.append(planes[name].weight[index])
            scores.append(planes[name].score(sample.w, index))
            wanted.append(scores[-1])
    return Move(sample.w, np.array(directions), np.array(scores), np.array(wanted), asked)


def arithmetic(sampler: Sampler, planes: Mapping[str, Plane], samples: Sequence[Sample],
               conditions: Sequence[Condition], *, stay: Sequence[str] = ()) -> list[Sample]:
    """Each sample moved in w towards its condition; the nearest of ROUNDS lengths that the heads like best.

    The directions are those of the linear models. How far to go along each is searched with the heads: a step too
    short for the class is doubled, a value that was missed is corrected, and the move of the least energy is kept.
    stay   attributes whose linear models shall not change, unless they are asked for
    ``evaluations`` counts looks of the heads.
    """
    attributes = sampler.bundle.attributes
    moves = [
        move(s, c, planes, attributes, [name for name in stay if name not in c.attributes()])
        for s, c in zip(samples, conditions, strict=True)
    ]
    requests = [replace(s.request, condition=c) for s, c in zip(samples, conditions, strict=True)]
    best: list[Sample] = []
    for _ in range(ROUNDS):
        tried = at_end(sampler, [
            Sample(r, None, m.at().astype(np.float32), {}, 0.0, Status.DONE, 0, ROUNDS, 0, 0)
            for r, m in zip(requests, moves, strict=True)
        ])
        best = [a if a.energy <= b.energy else b for a, b in zip(best or tried, tried, strict=True)]
        for m, logits in zip(moves, (s.logits for s in tried), strict=True):
            m.correct(logits)
    return best
