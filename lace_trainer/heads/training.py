"""Attribute heads on w, trained as the paper trains them; all attributes in one batched run.

Every head is a network of its own with its own optimiser: the weights are stacked along a first axis, the loss
is the sum of the heads' losses, and Adam acts on every number by itself, so nothing passes between heads.

Nie, Vahdat, Anandkumar, NeurIPS 2021.
"""

import math
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engine.errors import LaceError
from exporter.heads import FFHQ_LAYERS, HeadAttribute, HeadStack, save_head
from lace_trainer.attributes import Attribute
from lace_trainer.heads.pairs import Pairs
from lace_trainer.judges.classifier import scores

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True, slots=True)
class HeadsConfig:
    """The paper's values. ``up_dim`` is the width of the last hidden layer (64 suits a w of 128).

    noise   standard deviation of Gaussian noise on w in training, in spreads of w, for classes only; 0 is the paper's.
            It smooths what a head says of w (Cohen, Rosenfeld, Kolter, ICML 2019), and a flow to a rare class meets
            fewer local optima. Values have none to speak of, and would lose precision
    """

    up_dim: int = 128
    batch: int = 128
    epochs: int = 50
    learning_rate: float = 1e-4
    warmup: int = 1000
    seed: int = 0
    noise: float = 0.0


def widths(w_dim: int, up_dim: int) -> list[int]:
    """Widths of the input and of the three hidden layers: 512, 384, 256, 128 for w of 512."""
    return [int(width) for width in np.linspace(w_dim, up_dim, 4)]


def warmup_factor(step: int, warmup: int) -> float:
    """Factor of the learning rate at a step counted from 0: from 0 up to 1 at ``warmup``."""
    return min(1.0, step / warmup) if warmup > 0 else 1.0


def initial(attribute: Attribute, dims: list[int], seed: int) -> list[tuple[Tensor, Tensor]]:
    """Weights (in, out) and biases (1, out) of one head: a function of its name and the seed, not of its neighbours."""
    rng = torch.Generator().manual_seed((seed << 32) + zlib.crc32(attribute.name.encode()))
    layers = []
    for n_in, n_out in pairwise(dims):
        bound = 1 / math.sqrt(n_in)  # torch's default for linear layers and 1x1 convolutions
        shapes = ((n_in, n_out), (1, n_out))
        layers.append(tuple((2 * torch.rand(shape, generator=rng) - 1) * bound for shape in shapes))
    return layers


class Heads(nn.Module):
    """All heads side by side.  w (n, w_dim), or (heads, n, w_dim) if each reads its own -> logits (heads, n, columns);
    columns beyond a head's own are unused."""

    def __init__(self, attributes: tuple[Attribute, ...], widths: Sequence[int], seed: int):
        """widths   of the input and of the hidden layers"""
        super().__init__()
        self.attributes = attributes
        self.sizes = [len(a.classes) or 1 for a in attributes]
        dims = [*widths, max(self.sizes)]
        single = [initial(a, [*dims[:-1], size], seed) for a, size in zip(attributes, self.sizes, strict=True)]
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for i, width in enumerate(dims[1:]):
            # Heads with fewer logits get columns of zeros, which no loss ever reaches.
            padded = [[F.pad(values, (0, width - values.shape[1])) for values in layers[i]] for layers in single]
            self.weights.append(nn.Parameter(torch.stack([weight for weight, _ in padded])))
            self.biases.append(nn.Parameter(torch.stack([bias for _, bias in padded])))

    def forward(self, w: Tensor) -> Tensor:
        x = w.expand(len(self.attributes), *w.shape[-2:])
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = torch.baddbmm(bias, F.leaky_relu(x, 0.2) if i else x, weight)
        return x

    def layers(self, i: int) -> tuple[tuple[np.ndarray, np.ndarray], ...]:
        """Weights (out, in) and biases (out,) of one head."""
        found = [(weight[i].T, bias[i, 0]) for weight, bias in zip(self.weights, self.biases, strict=True)]
        found[-1] = (found[-1][0][: self.sizes[i]], found[-1][1][: self.sizes[i]])
        return tuple((weight.detach().numpy().copy(), bias.detach().numpy().copy()) for weight, bias in found)

    def predict(self, w: Tensor) -> np.ndarray:
        """Labels (n, attributes): the likeliest class or the value."""
        with torch.no_grad():
            logits = self(w)
        columns = [
            part[:, :size].argmax(dim=1).float() if a.kind == "class" else part[:, 0]
            for a, size, part in zip(self.attributes, self.sizes, logits, strict=True)
        ]
        return torch.stack(columns, dim=1).numpy()


def loss(heads: Heads, logits: Tensor, labels: Tensor) -> Tensor:
    """Sum over heads of the mean cross-entropy, or of the mean of (l - y)^2 / 2, over the rows with a label.

    logits   (heads, n, columns)
    labels   (n, heads), NaN where missing
    """
    total = logits.new_zeros(())
    known = ~torch.isnan(labels)
    labels, counts = labels.nan_to_num(), known.sum(dim=0).clamp(min=1)
    for i, (attribute, size) in enumerate(zip(heads.attributes, heads.sizes, strict=True)):
        if attribute.kind == "class":
            each = F.cross_entropy(logits[i, :, :size], labels[:, i].long(), reduction="none")
        else:
            each = 0.5 * (logits[i, :, 0] - labels[:, i]).square()
        total = total + (each * known[:, i]).sum() / counts[i]
    return total


@dataclass(frozen=True, slots=True, eq=False)
class TrainedHeads:
    """One stack per attribute, and the accuracy of each (hit rate, or 1 - mean absolute error)."""

    stacks: tuple[HeadStack, ...]
    validation: dict[str, float]
    test: dict[str, float]
    best_epoch: dict[str, int]
    seconds: float


def train_heads(pairs: Pairs, config: HeadsConfig, *, progress: Progress | None = None) -> TrainedHeads:
    """Train a head for every attribute of ``pairs``; of each, the epoch with the best validation accuracy is kept.

    LACE drops a row that lacks the label of the head in training; here that label is masked, which is the same
    but for the composition of batches.
    """
    began = time.perf_counter()
    if not config.noise >= 0:
        raise LaceError(f"the noise is {config.noise}; expected a number of spreads from 0 upwards")
    for attribute, column in zip(pairs.attributes, pairs.labels.T, strict=True):
        if np.isnan(column).all():
            raise LaceError(f"all labels of {attribute.name!r} are missing; leave the attribute out")
    train, valid, test = pairs.split()
    w, labels = torch.from_numpy(pairs.w), torch.from_numpy(np.asarray(pairs.labels, np.float32))
    heads = Heads(pairs.attributes, widths(pairs.w.shape[1], config.up_dim), config.seed)
    best, best_score = [p.detach().clone() for p in heads.parameters()], np.full(len(pairs.attributes), -np.inf)
    best_epoch = np.zeros(len(pairs.attributes), int)
    optimiser = torch.optim.Adam(heads.parameters(), lr=config.learning_rate, fused=True)
    rng, shaken = (torch.Generator().manual_seed(config.seed) for _ in range(2))  # one for the order, one for the noise
    # One number for all dimensions: the root mean square of what lies between a w and the mean.
    blur, step = config.noise * float((w - w.mean(dim=0)).square().mean().sqrt()), 0
    is_class = torch.tensor([[[float(a.kind == "class")]] for a in pairs.attributes])
    for epoch in range(config.epochs):
        order = torch.from_numpy(train)[torch.randperm(len(train), generator=rng)]
        for rows in order.split(config.batch):
            if len(rows) < config.batch <= len(train):
                continue  # drop_last, unless there is but one batch
            optimiser.param_groups[0]["lr"] = config.learning_rate * warmup_factor(step, config.warmup)
            optimiser.zero_grad(set_to_none=True)
            batch = w[rows]
            if blur:
                batch = batch + blur * is_class * torch.randn(batch.shape, generator=shaken)
            loss(heads, heads(batch), labels[rows]).backward()
            optimiser.step()
            step += 1
        score = score_rows(heads, pairs, valid)
        better = np.array(list(score.values())) > best_score
        for kept, now in zip(best, heads.parameters(), strict=True):
            kept[better] = now.detach()[better]
        best_score[better], best_epoch[better] = np.array(list(score.values()))[better], epoch + 1
        if progress:
            progress(epoch + 1, config.epochs, f"mean accuracy {np.nanmean(list(score.values())):.4f}")
    with torch.no_grad():
        for parameter, kept in zip(heads.parameters(), best, strict=True):
            parameter.copy_(kept)
    names = [a.name for a in pairs.attributes]
    validation = score_rows(heads, pairs, valid)
    tested = score_rows(heads, pairs, test) if len(test) else {}
    seconds = round(time.perf_counter() - began, 1)
    stacks = to_stacks(heads, pairs, config, validation, tested)
    return TrainedHeads(stacks, validation, tested, dict(zip(names, best_epoch.tolist(), strict=True)), seconds)


def score_rows(heads: Heads, pairs: Pairs, rows: np.ndarray) -> dict[str, float]:
    return scores(pairs.attributes, heads.predict(torch.from_numpy(pairs.w[rows])), pairs.labels[rows])


def value_range(labels: np.ndarray) -> tuple[float, float]:
    """What may sensibly be asked for: from the 1 % to the 99 % quantile of the labels, within [0, 1]."""
    low, high = np.clip(np.round(np.nanquantile(labels, (0.01, 0.99)), 2), 0, 1)
    return (float(low), float(high)) if high - low >= 0.05 else (0.0, 1.0)


def to_stacks(
    heads: Heads, pairs: Pairs, config: HeadsConfig, validation: dict[str, float], test: dict[str, float]
) -> tuple[HeadStack, ...]:
    """One HeadStack per attribute, with the columns and the provenance that belong to it."""
    stacks = []
    for i, (attribute, size) in enumerate(zip(heads.attributes, heads.sizes, strict=True)):
        name = attribute.name
        provenance = {
            "trained_on": {k: v for k, v in pairs.source.items() if k != "labeller_accuracy"},
            "pairs": len(pairs.w), "validation_pairs": pairs.validation, "test_pairs": pairs.test,
            "validation_accuracy": round(validation[name], 5), "training": asdict(config),
        }
        if test:
            provenance["test_accuracy"] = round(test[name], 5)
        if name in pairs.source.get("labeller_accuracy", {}):
            provenance["labeller_accuracy"] = round(pairs.source["labeller_accuracy"][name], 5)
        reach = value_range(pairs.labels[:, i]) if attribute.kind == "value" else (0.0, 1.0)
        record = HeadAttribute(name, attribute.kind, attribute.classes, (0, size), range=reach,
                               layers=style_layers(name, pairs.source), provenance=provenance)
        stacks.append(HeadStack(name, "w", heads.layers(i), (record,)))
    return tuple(stacks)


def style_layers(name: str, source: Mapping) -> tuple[int, ...] | None:
    """Style layers that an edit may touch; known of FFHQ's own generator only."""
    if source.get("dataset") != "ffhq" or name not in FFHQ_LAYERS:
        return None
    first, last = FFHQ_LAYERS[name]
    return tuple(range(first, last + 1))


def save_heads(directory: Path, stacks: Sequence[HeadStack]) -> list[Path]:
    """One file per attribute: NAME.safetensors, or NAME.sharp.safetensors of what is sharp alone."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    paths = [directory / f"{stack.name}{'' if stack.layers else '.sharp'}.safetensors" for stack in stacks]
    for path, stack in zip(paths, stacks, strict=True):
        save_head(path, stack)
    return paths
