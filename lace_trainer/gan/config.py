"""What decides the result of an adversarial training."""

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class GanConfig:
    """What decides the result of a run.

    channels     {resolution: width}, the same for both networks
    noise        per-pixel noise in the generator: for data with random detail (hair, skin); it only stipples
                 pictures that have none
    path_length  weight of the path-length penalty, 0 for none; 2 is usual
    ada          mean sign of D(real) that adaptive augmentation aims at, 0 for no augmentation; 0.6 is usual
    ada_flips, ada_turns   mirror and turn by 90 degrees, too
    features     weight of the feature discriminator's opinion in the generator's loss, 0 for none
    """

    z_dim: int = 128
    w_dim: int = 128
    mapping_layers: int = 8
    channels: dict[int, int] = field(default_factory=lambda: {4: 128, 8: 128, 16: 128, 32: 96, 64: 48})
    batch: int = 32
    learning_rate: float = 2.5e-3
    r1_gamma: float = 0.1
    r1_interval: int = 16
    style_mixing: float = 0.9
    ema_pictures: float = 10_000.0
    noise: bool = False
    precision: str = "bf16"
    seed: int = 0
    path_length: float = 0.0
    ada: float = 0.0
    ada_flips: bool = False
    ada_turns: bool = False
    features: float = 0.0


# Settings that a resumed run may change: neither the shape of the networks nor the meaning of a step hangs on them.
MAY_CHANGE = ("precision", "learning_rate", "r1_gamma", "style_mixing", "ema_pictures", "path_length", "ada",
              "features")
