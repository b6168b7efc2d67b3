"""An embedding that tells the renderer's people apart: does an edit change who it is?

Identity is what no attribute names: the fifteen factors of ``lace_trainer.faces.IDENTITY`` (skin, iris, spacing of the
eyes, nose, mouth, jaw, cut of the hair, ...). Two pictures of one person share them and differ in all twelve attributes
and in the scene. Gender, age, hair colour and width of the face are attributes here, for they are what an edit may ask
for: an embedding that reacted to them would count every obeyed edit as a loss of identity.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engine.errors import LaceError
from lace_trainer import judges
from lace_trainer.judges.classifier import Block, Shape, augment, one_cycle
from lace_trainer.judges.metrics import inputs
from lace_trainer.weights import fill, read_weights, round_weights, save_weights

FORMAT = "lace-engine identity"
SHAPE = Shape((20, 40, 80, 112), (1, 1, 1))
PEOPLE_SEED, HELD_OUT_SEED = 31, 931  # of the people to learn from, and of those to be judged by
TEMPERATURE = 0.1


class Network(nn.Module):
    """A small residual network.  picture (n, 3, R, R) in [-1, 1] -> unit rows (n, dim)."""

    def __init__(self, shape: Shape, dim: int):
        super().__init__()
        widths = shape.widths
        self.stem = nn.Conv2d(3, widths[0], shape.stem, 2, shape.stem // 2, bias=False)
        self.stem_norm = nn.BatchNorm2d(widths[0])
        blocks = []
        for n_in, n_out, depth in zip(widths[:-1], widths[1:], shape.depths, strict=True):
            blocks += [Block(n_in if i == 0 else n_out, n_out, 2 if i == 0 else 1) for i in range(depth)]
        self.blocks = nn.Sequential(*blocks)
        side = shape.size >> len(widths)
        self.out = nn.Linear(widths[-1] * side * side, dim)

    def forward(self, picture: Tensor) -> Tensor:
        x = self.blocks(F.relu(self.stem_norm(self.stem(picture))))
        return F.normalize(self.out(x.flatten(1)).float(), dim=1)


@dataclass(slots=True, eq=False)
class Identity:
    """The trained network and the facts of its training, among them its verification scores."""

    network: Network
    shape: Shape
    metadata: dict[str, Any] = field(default_factory=dict)

    @torch.inference_mode()
    def embed(self, pictures: np.ndarray, *, batch: int = 256) -> np.ndarray:
        """Unit rows (n, dim) float32 whose products are the cosines of identities.

        pictures   (n, R, R, 3) uint8; resized to what the network reads if they have another size
        """
        self.network.eval()
        found = [np.empty((0, self.network.out.out_features), np.float32)]
        for x in inputs(pictures, self.shape.size, self.network.out.weight.device, batch):
            found.append(self.network(x).cpu().numpy())
        return np.concatenate(found)


@dataclass(frozen=True, slots=True)
class IdentityConfig:
    """What decides the result: ``people`` per step, each in ``views`` pictures."""

    dim: int = 64
    steps: int = 1200
    people: int = 48
    views: int = 4
    learning_rate: float = 3e-3
    weight_decay: float = 0.02
    seed: int = 0
    precision: str = "bf16"
    device: str = "cpu"


def contrast(embedded: Tensor, temperature: float = TEMPERATURE) -> Tensor:
    """Supervised contrastive loss; Khosla et al., NeurIPS 2020, equation 2.  embedded (people, views, dim) unit rows

    Mean over pictures and their partners of -log softmax of the cosine over all other pictures of the batch.
    """
    people, views = embedded.shape[:2]
    rows = embedded.flatten(0, 1)
    own = torch.eye(len(rows), dtype=torch.bool, device=rows.device)
    logits = (rows @ rows.T / temperature).masked_fill(own, -torch.inf)
    who = torch.arange(people, device=rows.device).repeat_interleave(views)
    partners = (who[:, None] == who) & ~own
    return -logits.log_softmax(dim=1)[partners].mean()


def train(
    people: Tensor, config: IdentityConfig, *, held_out: Tensor, shape: Shape = SHAPE,
    progress: Callable[[int, int, str], None] | None = None,
) -> Identity:
    """Learn from ``people`` (n, views, R, R, 3) uint8; judged on ``held_out``, of which no person is among them.

    progress   called after every step with (step, steps, text)
    """
    if people.shape[0] < config.people or people.shape[1] < config.views:
        raise LaceError(f"{people.shape[0]} people in {people.shape[1]} views are too few; expected at least "
                        f"{config.people} in {config.views}")
    began = time.perf_counter()
    torch.manual_seed(config.seed)
    network = Network(shape, config.dim).to(config.device).to(memory_format=torch.channels_last).train()
    optimiser = torch.optim.AdamW(network.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: one_cycle(step, config.steps))
    rng = torch.Generator().manual_seed(config.seed)
    for step in range(config.steps):
        who = torch.randperm(len(people), generator=rng)[: config.people].sort().values
        seen = torch.randperm(people.shape[1], generator=rng)[: config.views]
        x = augment(people[who][:, seen].flatten(0, 1), rng).to(config.device)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=config.precision == "bf16"):
            embedded = network(x)
        loss = contrast(embedded.unflatten(0, (config.people, config.views)))
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        schedule.step()
        if progress:
            progress(step + 1, config.steps, f"loss {loss.item():.3f}")
    round_weights(network)
    identity = Identity(network, shape)
    identity.metadata = {
        "verification": verify(identity, held_out.numpy()), "people": len(people), "views": people.shape[1],
        "held_out": len(held_out), "seconds": round(time.perf_counter() - began, 1), "training": asdict(config),
    }
    return identity


def verify(identity: Identity, people: np.ndarray) -> dict[str, float]:
    """How well a cosine tells whether two pictures show one person.  people (n, views, R, R, 3) uint8

    auc         chance that a pair of one person has the greater cosine than a pair of two
    accuracy    of both kinds of pairs alike, on the second half of the people
    threshold   of that accuracy, chosen on the first half
    same, different   mean cosines
    """
    rows = identity.embed(people.reshape(-1, *people.shape[2:])).reshape(*people.shape[:2], -1)
    same, different = pairs(rows)
    threshold = best_threshold(*pairs(rows[: len(rows) // 2]))
    later_same, later_different = pairs(rows[len(rows) // 2 :])
    accuracy = ((later_same > threshold).mean() + (later_different <= threshold).mean()) / 2
    found = {"auc": auc(same, different), "accuracy": accuracy, "threshold": threshold,
             "same": same.mean(), "different": different.mean()}
    return {name: round(float(value), 5) for name, value in found.items()}


def pairs(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cosines of all pairs of one person, and of all pairs of two.  rows (people, views, dim)"""
    people, views = rows.shape[:2]
    flat = rows.reshape(people * views, -1)
    first, second = np.triu_indices(len(flat), 1)
    cosines, same = (flat @ flat.T)[first, second], first // views == second // views
    return cosines[same], cosines[~same]


def auc(same: np.ndarray, different: np.ndarray) -> float:
    """Area under the ROC curve: the share of (same, different) in which the first is greater, ties half."""
    ordered = np.sort(different)
    below = np.searchsorted(ordered, same, "left") + np.searchsorted(ordered, same, "right")
    return float(below.mean() / (2 * len(ordered)))


def best_threshold(same: np.ndarray, different: np.ndarray) -> float:
    """Between the cosines at which as many of one kind are wrong as of the other, in their shares."""
    candidates = np.linspace(-1, 1, 401)
    missed = np.searchsorted(np.sort(same), candidates, "right") / len(same)
    taken = 1 - np.searchsorted(np.sort(different), candidates, "right") / len(different)
    return float(candidates[np.argmin(missed + taken)])


def save(identity: Identity, path: Path) -> None:
    """Write a safetensors file: kernels in float16, the facts in the metadata."""
    facts = {"format": FORMAT, "version": 1, "shape": asdict(identity.shape),
             "dim": identity.network.out.out_features, **identity.metadata}
    save_weights(identity.network, path, facts)


def load(path: Path = judges.IDENTITY) -> Identity:
    """Read what ``save`` wrote, the package's own if no path is given; ``metadata`` holds the facts."""
    facts, state = read_weights(path, FORMAT)
    shape = facts["shape"]
    shape = Shape(tuple(shape["widths"]), tuple(shape["depths"]), shape["stem"], shape["size"])
    network = Network(shape, facts["dim"])
    fill(network, state, path)
    metadata = {k: v for k, v in facts.items() if k not in ("format", "version", "shape", "dim")}
    return Identity(network, shape, metadata)
