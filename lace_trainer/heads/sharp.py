"""Sharp heads: what a latent shows, as probabilities that hold what they promise. The posterior is sampled by them.

The heads of training.py are smoothed with noise, which makes the way of a flow easy and its probabilities wrong: they
read correlated cues, and are unsure where a picture is not. Sharp heads see every latent as it is, learn the
labellers' probabilities, are kept from the epoch with the least log loss on held-out pairs, and are divided by the
temperature with which they foretell the labellers' votes on the same pairs.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from engine.errors import LaceError
from engine.reference.field import head
from exporter.heads import HeadAttribute, HeadStack, SharpStack
from lace_trainer.heads import calibration
from lace_trainer.heads.calibration import Calibration
from lace_trainer.heads.labelled import Labelled
from lace_trainer.heads.training import Heads, style_layers, value_range
from lace_trainer.judges.classifier import one_cycle

Progress = Callable[[int, int, str], None]

VALUE_SIGMA = 0.1  # puts the squared error of a value on the scale of a log loss


@dataclass(frozen=True, slots=True)
class SharpConfig:
    """hidden: widths of the hidden layers. average: decay of the mean of the weights that is judged and kept."""

    hidden: tuple[int, ...] = (96, 96, 96)
    epochs: int = 25
    batch: int = 256
    learning_rate: float = 2e-3
    weight_decay: float = 0.05
    dropout: float = 0.0
    average: float = 0.998
    seed: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class SharpHeads:
    """One stack for every attribute, without a smooth one; its calibration on held-out pairs that chose nothing, and
    the epoch that it is from."""

    stacks: tuple[HeadStack, ...]
    calibration: dict[str, Calibration]
    best_epoch: dict[str, int]
    seconds: float


def train_sharp(labelled: Labelled, config: SharpConfig, *, progress: Progress | None = None) -> SharpHeads:
    """Train a sharp head for every attribute. Half of the held-out pairs choose epochs and temperatures, the others
    say how well calibrated the heads then are."""
    began = time.perf_counter()
    count = len(labelled.w) - labelled.held_out
    if labelled.held_out < 2 or count < 1:
        raise LaceError(f"{len(labelled.w)} pairs of which {labelled.held_out} are held out are too few to train and "
                        "calibrate heads; label more samples")
    held = np.arange(count, len(labelled.w))
    choosing, telling = held[::2], held[1::2]
    centre, spread = labelled.w[:count].mean(axis=0), labelled.w[:count].std(axis=0) + 1e-6
    x = torch.from_numpy((labelled.w - centre) / spread)
    likely = torch.from_numpy(labelled.likely)
    heads = Heads(labelled.attributes, (x.shape[1], *config.hidden), config.seed)
    best, best_epoch = fit(heads, labelled, x, likely, count, choosing, config, progress)
    for parameter, kept in zip(heads.parameters(), best, strict=True):
        parameter.data.copy_(kept)
    stacks, found = finish(heads, labelled, centre, spread, choosing, telling, config)
    names = [a.name for a in labelled.attributes]
    return SharpHeads(stacks, found, dict(zip(names, best_epoch.tolist(), strict=True)),
                      round(time.perf_counter() - began, 1))


def fit(heads: Heads, labelled: Labelled, x: Tensor, likely: Tensor, count: int, choosing: np.ndarray,
        config: SharpConfig, progress: Progress | None) -> tuple[list[Tensor], np.ndarray]:
    """The weights of each head's best epoch, and which one it was (heads,)."""
    optimiser = torch.optim.AdamW(heads.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
    mean = [p.detach().clone() for p in heads.parameters()]
    best = [p.clone() for p in mean]
    least, best_epoch = np.full(len(heads.sizes), np.inf), np.zeros(len(heads.sizes), int)
    rng = torch.Generator().manual_seed(config.seed)
    torch.manual_seed(config.seed)  # dropout has no generator of its own
    batch = min(config.batch, count)
    per_epoch = count // batch
    steps = config.epochs * per_epoch
    for epoch in range(config.epochs):
        order = torch.randperm(count, generator=rng)
        for i in range(per_epoch):
            step = epoch * per_epoch + i
            rows = order[i * batch : (i + 1) * batch]
            optimiser.param_groups[0]["lr"] = config.learning_rate * one_cycle(step, steps)
            optimiser.zero_grad(set_to_none=True)
            loss(heads, run(heads, x[rows], config.dropout), likely[rows], labelled).sum().backward()
            optimiser.step()
            decay = min(config.average, (1 + step) / (10 + step))
            torch._foreach_lerp_(mean, [p.detach() for p in heads.parameters()], 1 - decay)
        losses = judged(heads, mean, x, likely, choosing, labelled)
        better = losses < least
        for kept, now in zip(best, mean, strict=True):
            kept[better] = now[better]
        least[better], best_epoch[better] = losses[better], epoch + 1
        if progress:
            progress(epoch + 1, config.epochs, f"mean log loss {losses.mean():.4f}")
    return best, best_epoch


def run(heads: Heads, x: Tensor, dropout: float) -> Tensor:
    """Logits (heads, n, columns) of x (n, w_dim), with dropout before all layers but the first."""
    if not dropout:
        return heads(x)
    x = x.expand(len(heads.attributes), *x.shape)
    for i, (weight, bias) in enumerate(zip(heads.weights, heads.biases, strict=True)):
        x = torch.baddbmm(bias, F.dropout(F.leaky_relu(x, 0.2), dropout) if i else x, weight)
    return x


def loss(heads: Heads, logits: Tensor, likely: Tensor, labelled: Labelled) -> Tensor:
    """Of each head (heads,) the mean cross-entropy, or of (l - y)^2 / 2 sigma^2, over the rows that are known.

    logits (heads, n, columns), likely (n, all columns), NaN where nothing is known
    """
    found = []
    for i, (low, high) in enumerate(labelled.spans):
        known = ~torch.isnan(likely[:, low])
        wanted = likely[:, low:high].nan_to_num()
        if labelled.attributes[i].kind == "class":
            each = -(wanted * logits[i, :, : heads.sizes[i]].log_softmax(dim=1)).sum(dim=1)
        else:
            each = (logits[i, :, 0] - wanted[:, 0]).square() / (2 * VALUE_SIGMA**2)
        found.append((each * known).sum() / known.sum().clamp(min=1))
    return torch.stack(found)


@torch.no_grad()
def judged(heads: Heads, weights: list[Tensor], x: Tensor, likely: Tensor, rows: np.ndarray,
           labelled: Labelled) -> np.ndarray:
    """The loss (heads,) of other weights on these rows."""
    own = [p.detach().clone() for p in heads.parameters()]
    for parameter, other in zip(heads.parameters(), weights, strict=True):
        parameter.copy_(other)
    found = loss(heads, heads(x[rows]), likely[rows], labelled).numpy()
    for parameter, former in zip(heads.parameters(), own, strict=True):
        parameter.copy_(former)
    return found


@torch.no_grad()
def finish(heads: Heads, labelled: Labelled, centre: np.ndarray, spread: np.ndarray, choosing: np.ndarray,
           telling: np.ndarray, config: SharpConfig) -> tuple[tuple[HeadStack, ...], dict[str, Calibration]]:
    """Stacks that read w as it is and give calibrated logits."""
    stacks, found = [], {}
    for i, (attribute, (low, high)) in enumerate(zip(labelled.attributes, labelled.spans, strict=True)):
        layers = unscaled(heads.layers(i), centre, spread)
        rows = [part[~np.isnan(labelled.votes[part, low])] for part in (choosing, telling)]
        if not all(map(len, rows)):
            raise LaceError(f"no held-out pair says anything of {attribute.name!r}; leave the attribute out")
        scale = 1.0
        if attribute.kind == "class":
            scale = calibration.temperature(logits_of(layers, labelled.w[rows[0]]), labelled.votes[rows[0], low:high])
            layers = (*layers[:-1], (layers[-1][0] / np.float32(scale), layers[-1][1] / np.float32(scale)))
        parts = {
            f"{psi:g}": (logits_of(layers, labelled.w[some]), labelled.votes[some, low:high])
            for psi in np.unique(labelled.psi[rows[1]]).tolist()
            for some in [rows[1][labelled.psi[rows[1]] == psi]]
        }
        name = attribute.name
        found[name] = (calibration.of_classes(name, parts, scale) if attribute.kind == "class"
                       else calibration.of_values(name, parts))
        values = labelled.votes[:, low]
        record = HeadAttribute(
            name, attribute.kind, attribute.classes, (0, high - low), layers=style_layers(name, labelled.source),
            range=value_range(values) if attribute.kind == "value" else (0.0, 1.0),
            provenance={"sharp": provenance(labelled, found[name], config)}, tolerance=found[name].tolerance,
        )
        temperature = {name: scale} if attribute.kind == "class" else {}
        sharp = SharpStack(layers, True, temperature, {name: dict(found[name].ece)})
        stacks.append(HeadStack(name, "w", (), (record,), sharp))
    return tuple(stacks), found


def unscaled(layers: tuple, centre: np.ndarray, spread: np.ndarray) -> tuple:
    """The same for inputs that are not standardised."""
    weight, bias = layers[0]
    weight = weight / spread
    return ((weight.astype(np.float32), (bias - weight @ centre).astype(np.float32)), *layers[1:])


def logits_of(layers: tuple, w: np.ndarray) -> np.ndarray:
    return head(layers, w)[0]


def provenance(labelled: Labelled, found: Calibration, config: SharpConfig) -> Mapping:
    facts = {
        "trained_on": {k: v for k, v in labelled.source.items() if k != "labeller_accuracy"},
        "pairs": len(labelled.w), "held_out": labelled.held_out, "training": asdict(config),
    }
    if found.kind == "class":
        return facts | {"log_loss": dict(found.log_loss), "held_out_accuracy": dict(found.accuracy)}
    return facts | {"held_out_error": dict(found.error)}


def join(smooth: Sequence[HeadStack], sharp: Sequence[HeadStack]) -> list[HeadStack]:
    """Both stacks of each attribute in one."""
    second = {stack.name: stack for stack in sharp}
    return [replace(stack, sharp=second[stack.name].sharp, attributes=tuple(
        replace(ours, tolerance=theirs.tolerance, provenance={**ours.provenance, **theirs.provenance})
        for ours, theirs in zip(stack.attributes, second[stack.name].attributes, strict=True)
    )) for stack in smooth]
