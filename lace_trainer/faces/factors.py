"""What a face is made of: twelve labelled attributes, its identity, and the scene around it."""

from dataclasses import dataclass

import numpy as np

from lace_trainer.attributes import Attribute

ATTRIBUTES = (
    Attribute("yaw", "value"),  # 0.5 = frontal
    Attribute("pitch", "value"),  # 0.5 = level, 1 = looking up
    Attribute("smile", "class", ("no", "yes")),
    Attribute("glasses", "class", ("no", "yes")),
    Attribute("beard", "class", ("no", "yes")),
    Attribute("bald", "class", ("no", "yes")),
    Attribute("haircolor", "class", ("black", "brown", "blond", "red", "grey")),
    Attribute("hat", "class", ("no", "yes")),
    Attribute("gender", "class", ("female", "male")),
    Attribute("age", "value"),  # 0 = young, 1 = old
    Attribute("light", "value"),  # 0 = lit from the left of the picture, 1 = from the right
    Attribute("width", "value"),  # 0 = narrow face, 1 = wide face
)

# Unlabelled factors, all in [0, 1]. Two pictures of one identity differ in labels and scene only.
IDENTITY = (
    "skin", "undertone", "iris", "spacing", "eyes", "nose", "mouth", "brows",
    "jaw", "height", "fringe", "parting", "length", "curl", "hairtone",
)
SCENE = (
    "background", "background_tone", "background_glow", "clothes", "clothes_tone", "collar",
    "glasses", "glasses_shape", "hat", "hat_shape", "shift_x", "shift_y", "scale",
)


@dataclass(frozen=True)
class Factors:
    """Everything a picture depends on; equal factors give equal pictures.

    labels     (n, 12) float32   class index or value, in the order of ATTRIBUTES
    identity   (n, 15) float32   in the order of IDENTITY
    scene      (n, 13) float32   in the order of SCENE
    """

    labels: np.ndarray
    identity: np.ndarray
    scene: np.ndarray

    def __post_init__(self):
        n = len(self.labels)
        wanted = {"labels": len(ATTRIBUTES), "identity": len(IDENTITY), "scene": len(SCENE)}
        for name, columns in wanted.items():
            shape = getattr(self, name).shape
            if shape != (n, columns):
                raise ValueError(f"{name} has shape {shape}; expected {(n, columns)}")

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, rows) -> "Factors":
        """The faces in `rows` (slice, mask or array of indices)."""
        return Factors(self.labels[rows], self.identity[rows], self.scene[rows])


def sample_factors(rng: np.random.Generator, n: int) -> Factors:
    """Draw n faces, as unbalanced and correlated as photographs are.

    returns   Factors with n rows; values follow wide beta laws, so that [0.1, 0.9] is well covered
    """
    labels = _sample_labels(rng, n)
    columns = [labels[a.name] for a in ATTRIBUTES]
    return Factors(
        np.stack(columns, axis=1).astype(np.float32),
        rng.random((n, len(IDENTITY)), dtype=np.float32),
        rng.random((n, len(SCENE)), dtype=np.float32),
    )


def _sample_labels(rng: np.random.Generator, n: int) -> dict[str, np.ndarray]:
    """Draw the labels of n faces, by name, each (n,).  Slopes are chosen so that the marginals hold:
    smile 55 %, glasses 18 %, hat 12 %, beard 18 %, bald 8 %, grey hair 10 %."""

    def happens(probability):
        return rng.random(n) < probability

    age = rng.beta(1.3, 1.6, n)  # mean 0.45, mean square 0.26
    male = happens(0.47)
    grey = happens(0.38 * age**2)
    colour = rng.choice(4, size=n, p=np.array([0.38, 0.27, 0.18, 0.07]) / 0.90)
    return {
        "yaw": rng.beta(1.5, 1.5, n),
        "pitch": rng.beta(1.5, 1.5, n),
        "smile": happens(np.where(male, 0.49, 0.60)),
        "glasses": happens(0.06 + 0.27 * age),
        "beard": happens(np.where(male, 0.25 + 0.29 * age, 0.003)),
        "bald": happens(np.where(male, 0.01 + 0.35 * age, 0.003)),
        "haircolor": np.where(grey, 4, colour),
        "hat": happens(0.12),
        "gender": male,
        "age": age,
        "light": rng.beta(1.2, 1.2, n),
        "width": rng.beta(1.5, 1.5, n),
    }
