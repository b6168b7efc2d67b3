"""An image classifier of all attributes: picture -> class logits and values.

It plays two roles that must not share a network. The *labeller* labels samples of the generator, on which the
attribute heads are trained. The *judge* measures how often a request was met; it sees other training pictures,
has another shape and another seed, and no part in training the heads.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lace_trainer.attributes import Attribute
from lace_trainer.weights import fill, read_weights, round_weights, save_weights

FORMAT = "lace-engine classifier"
VALUE_SIGMA = 0.1  # puts the squared error of a value on the scale of a cross-entropy


@dataclass(frozen=True, slots=True)
class Shape:
    """widths[0] belongs to the stem; stage i halves the resolution, has widths[i + 1] and depths[i] blocks."""

    widths: tuple[int, ...]
    depths: tuple[int, ...]
    stem: int = 3  # kernel of the stem
    size: int = 64  # side of a picture


@dataclass(frozen=True, slots=True)
class Role:
    """What sets one classifier apart; ``pictures_seed`` draws its training pictures."""

    shape: Shape
    seed: int
    pictures_seed: int


ROLES = {
    "labeller": Role(Shape((24, 48, 96, 128), (1, 1, 1)), seed=11, pictures_seed=1),
    "judge": Role(Shape((20, 40, 72, 112), (1, 2, 2), stem=5), seed=97, pictures_seed=2),
}
VALIDATION_SEED = 900  # no role may train on these pictures


class Block(nn.Module):
    """Two 3x3 convolutions with a shortcut.  (n, I, h, w) -> (n, O, h / stride, w / stride)"""

    def __init__(self, n_in: int, n_out: int, stride: int):
        super().__init__()
        self.stride = stride
        self.conv0 = nn.Conv2d(n_in, n_out, 3, stride, 1, bias=False)
        self.norm0 = nn.BatchNorm2d(n_out)
        self.conv1 = nn.Conv2d(n_out, n_out, 3, 1, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(n_out)
        self.skip = nn.Conv2d(n_in, n_out, 1, bias=False) if n_in != n_out else None

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm0(self.conv0(x)))
        y = self.norm1(self.conv1(y))
        x = F.avg_pool2d(x, self.stride) if self.stride > 1 else x
        return F.relu(y + (x if self.skip is None else self.skip(x)))


class Classifier(nn.Module):
    """A small residual network.  picture (n, 3, R, R) in [-1, 1] -> outputs (n, columns), see ``spans``."""

    def __init__(self, shape: Shape, attributes: tuple[Attribute, ...]):
        super().__init__()
        self.shape, self.attributes, self.metadata = shape, tuple(attributes), {}
        widths = shape.widths
        self.stem = nn.Conv2d(3, widths[0], shape.stem, 2, shape.stem // 2, bias=False)
        self.stem_norm = nn.BatchNorm2d(widths[0])
        blocks = []
        for n_in, n_out, depth in zip(widths[:-1], widths[1:], shape.depths, strict=True):
            blocks += [Block(n_in if i == 0 else n_out, n_out, 2 if i == 0 else 1) for i in range(depth)]
        self.blocks = nn.Sequential(*blocks)
        # Flattened rather than pooled: where a feature lies tells the yaw and the pitch.
        side = shape.size >> len(widths)
        self.out = nn.Linear(widths[-1] * side * side, self.spans[-1][1])

    @property
    def spans(self) -> list[tuple[int, int]]:
        """(first, past-last) output column of every attribute."""
        ends = np.cumsum([len(a.classes) or 1 for a in self.attributes]).tolist()
        return list(zip([0, *ends], ends, strict=False))

    def maps(self, picture: Tensor) -> Tensor:
        """What the last stage sees, (n, widths[-1], side, side)."""
        return self.blocks(F.relu(self.stem_norm(self.stem(picture))))

    def forward(self, picture: Tensor) -> Tensor:
        return self.out(self.maps(picture).flatten(1)).float()

    def labels(self, outputs: Tensor) -> Tensor:
        """outputs (n, columns) -> labels (n, attributes): index of the likeliest class, or the value."""
        columns = []
        for attribute, (low, high) in zip(self.attributes, self.spans, strict=True):
            part = outputs[:, low:high]
            columns.append(part.argmax(dim=1).float() if attribute.kind == "class" else part[:, 0])
        return torch.stack(columns, dim=1)

    @torch.inference_mode()
    def outputs(self, pictures: Tensor | np.ndarray, *, batch: int = 256) -> Tensor:
        """Outputs (n, columns) for pictures: uint8 (n, R, R, 3), or float (n, 3, R, R) in about [-1, 1]."""
        pictures = torch.as_tensor(pictures)
        device = self.out.weight.device
        self.eval()
        return torch.cat([self(as_input(p.to(device)).clamp(-1, 1)) for p in pictures.split(batch)])

    def predict(self, pictures: Tensor | np.ndarray, *, batch: int = 256) -> np.ndarray:
        """Labels (n, attributes) float32 of pictures, see ``outputs``."""
        return self.labels(self.outputs(pictures, batch=batch)).cpu().numpy()


def as_input(pictures: Tensor) -> Tensor:
    """uint8 (n, R, R, 3) -> float32 (n, 3, R, R) in [-1, 1]; floats are taken as they are."""
    if pictures.dtype == torch.uint8:
        pictures = (pictures.permute(0, 3, 1, 2).float() - 127.5) / 127.5
    return pictures.contiguous(memory_format=torch.channels_last)


def augment(pictures: Tensor, rng: torch.Generator, *, mirror: bool = False) -> Tensor:
    """Make pictures as imperfect as samples of a generator.

    pictures   (n, R, R, 3) uint8
    mirror     half of them, too: only where no attribute has a side, as yaw and light have
    returns    (n, 3, R, R) float32: shifted, blurred, noisy, with other brightness, contrast and saturation
    """
    n, size = pictures.shape[:2]

    def uniform(low: float, high: float) -> Tensor:
        return torch.rand(n, 1, 1, 1, generator=rng) * (high - low) + low

    most = max(2, size // 32)
    shift = torch.randint(-most, most + 1, (2, n, 1), generator=rng)
    rows, columns = (torch.arange(size)[None] + shift).clamp(0, size - 1)
    x = as_input(pictures[torch.arange(n)[:, None, None], rows[:, :, None], columns[:, None, :]])
    taps = torch.tensor([1.0, 2.0, 1.0]) / 4
    kernel = torch.outer(taps, taps)[None, None].repeat(3, 1, 1, 1)
    blurred = F.conv2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), kernel, groups=3)
    x = x + uniform(-0.5, 1.0).clamp(min=0) * (blurred - x)
    grey = x.mean(dim=1, keepdim=True)
    x = grey + uniform(0.85, 1.15) * (x - grey)
    x = x * uniform(0.88, 1.12) + uniform(-0.08, 0.08)
    x = x + uniform(-0.04, 0.06).clamp(min=0) * torch.randn(x.shape, generator=rng)
    return torch.where(uniform(0, 1) < 0.5, x.flip(3), x) if mirror else x


def loss(classifier: Classifier, outputs: Tensor, labels: Tensor, weights: Sequence[Tensor | None] = ()) -> Tensor:
    """Sum over attributes of the cross-entropy or of (l - y)^2 / 2 sigma^2, over the rows with a label.

    labels    (n, attributes), NaN where missing
    weights   of each attribute what its classes count (C,), None: all the same
    """
    total = outputs.new_zeros(())
    for i, (attribute, (low, high)) in enumerate(zip(classifier.attributes, classifier.spans, strict=True)):
        known = ~torch.isnan(labels[:, i])
        if not known.any():
            continue
        said, wanted = outputs[known, low:high], labels[known, i]
        if attribute.kind == "class":
            weight = weights[i] if weights else None
            weight = None if weight is None else weight.to(said.device)
            total = total + F.cross_entropy(said, wanted.long(), weight=weight)
        else:
            total = total + (said[:, 0] - wanted).square().mean() / (2 * VALUE_SIGMA**2)
    return total


def scores(attributes: tuple[Attribute, ...], predicted: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Per attribute: hit rate, or 1 - mean absolute error; rows without a label (NaN) do not count."""
    result = {}
    for i, attribute in enumerate(attributes):
        known = ~np.isnan(labels[:, i])
        ours, theirs = predicted[known, i], labels[known, i]
        score = (ours == theirs) if attribute.kind == "class" else 1 - np.abs(ours - theirs)
        result[attribute.name] = float(score.mean()) if known.any() else float("nan")
    return result


@dataclass(frozen=True, slots=True)
class ClassifierConfig:
    """What decides the result of a training."""

    epochs: int = 8
    batch: int = 128
    learning_rate: float = 3e-3
    weight_decay: float = 0.02
    seed: int = 0
    precision: str = "bf16"
    device: str = "cpu"


def train(
    shape: Shape, attributes: tuple[Attribute, ...], data: tuple[Tensor, np.ndarray], config: ClassifierConfig, *,
    validation: tuple[Tensor, np.ndarray], weights: Sequence[Tensor | None] = (), mirror: bool = False,
    progress: Callable[[int, int, str], None] | None = None,
) -> Classifier:
    """Train on (pictures (n, R, R, 3) uint8, labels (n, attributes)); the last weights are kept.

    weights, mirror   see ``loss`` and ``augment``
    progress   called after every step with (step, steps, text)
    """
    began = time.perf_counter()
    pictures, labels = data[0], torch.from_numpy(np.asarray(data[1], np.float32))
    torch.manual_seed(config.seed)
    model = Classifier(shape, attributes).to(config.device).to(memory_format=torch.channels_last).train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
    per_epoch = len(pictures) // config.batch
    steps = config.epochs * per_epoch
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: one_cycle(step, steps))
    rng = torch.Generator().manual_seed(config.seed)
    for step in range(steps):
        if step % per_epoch == 0:
            order = torch.randperm(len(pictures), generator=rng)
        rows = order[step % per_epoch * config.batch :][: config.batch].sort().values
        x = augment(pictures[rows], rng, mirror=mirror).to(config.device)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=config.precision == "bf16"):
            outputs = model(x)
        value = loss(model, outputs, labels[rows].to(config.device), weights)
        optimiser.zero_grad(set_to_none=True)
        value.backward()
        optimiser.step()
        schedule.step()
        if progress:
            progress(step + 1, steps, f"loss {value.item():.3f}")
    round_weights(model)
    accuracy = scores(model.attributes, model.predict(validation[0]), validation[1])
    model.metadata = {
        "accuracy": accuracy, "pictures": len(pictures), "validation_pictures": len(validation[0]),
        "seconds": round(time.perf_counter() - began, 1), "training": asdict(config),
    }
    return model


def one_cycle(step: int, steps: int) -> float:
    """Factor of the learning rate: linear rise over the first tenth, then a cosine down to zero."""
    rise = max(1, steps // 10)
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


def save(model: Classifier, path: Path) -> None:
    """Write a safetensors file: kernels in float16, the rest in float32, the facts as JSON in the metadata."""
    facts = {
        "format": FORMAT, "version": 1, "shape": asdict(model.shape),
        "attributes": [asdict(a) for a in model.attributes], **model.metadata,
    }
    save_weights(model, path, facts)


def load(path: Path) -> Classifier:
    """Read what ``save`` wrote; ``metadata`` holds the facts."""
    facts, state = read_weights(path, FORMAT)
    shape = facts["shape"]
    attributes = tuple(Attribute(a["name"], a["kind"], tuple(a["classes"])) for a in facts["attributes"])
    shape = Shape(tuple(shape["widths"]), tuple(shape["depths"]), shape["stem"], shape["size"])
    model = Classifier(shape, attributes)
    fill(model, state, path)
    model.metadata = {k: v for k, v in facts.items() if k not in ("format", "version", "shape", "attributes")}
    return model
