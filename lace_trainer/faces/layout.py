"""Factors -> positions, sizes and colours: everything about a face that is decided before the first pixel."""

from types import SimpleNamespace

import numpy as np
import torch

from lace_trainer.faces.factors import ATTRIBUTES, IDENTITY, SCENE, Factors

SKIN = ((1.00, 0.87, 0.76), (0.97, 0.79, 0.64), (0.87, 0.66, 0.48), (0.68, 0.47, 0.33), (0.47, 0.31, 0.22))
IRIS = ((0.30, 0.18, 0.10), (0.45, 0.28, 0.12), (0.36, 0.50, 0.22), (0.22, 0.48, 0.62), (0.25, 0.38, 0.75))
HAIR = ((0.09, 0.08, 0.10), (0.38, 0.22, 0.12), (0.95, 0.78, 0.36), (0.80, 0.30, 0.10), (0.74, 0.75, 0.79))
FRAME = ((0.08, 0.08, 0.10), (0.10, 0.16, 0.40), (0.55, 0.10, 0.12), (0.08, 0.08, 0.10))
WHITE = (1.0, 0.99, 0.97)


def layout(factors: Factors) -> SimpleNamespace:
    """Place the parts of every face.

    returns   a namespace whose lengths are (n, 1, 1), in canvas units, and whose colours are (n, 3)
    """
    f = _columns(factors)
    face = SimpleNamespace(n=len(factors), f=f)
    _place_head(face, f)
    _place_features(face, f)
    _place_hair(face, f)
    _choose_colours(face, f)
    return face


def _columns(factors: Factors) -> SimpleNamespace:
    """Every factor by name, (n, 1, 1); scene factors carry the prefix scene_."""
    names = [a.name for a in ATTRIBUTES] + list(IDENTITY) + [f"scene_{name}" for name in SCENE]
    table = np.concatenate([factors.labels, factors.identity, factors.scene], axis=1)
    columns = torch.from_numpy(np.ascontiguousarray(table.T, dtype=np.float32))
    return SimpleNamespace(**{name: column.view(-1, 1, 1) for name, column in zip(names, columns, strict=True)})


def mix(low, high, u):
    """low at u = 0, high at u = 1."""
    return low + (high - low) * u


def ramp(low, high, u):
    """Smooth step of u from 0 at `low` to 1 at `high`."""
    t = ((u - low) / (high - low)).clamp(0, 1)
    return t * t * (3 - 2 * t)


def plain(face, colour):
    """One colour for all faces.  returns (n, 3)"""
    return torch.tensor([colour]).expand(face.n, 3)


def _place_head(face, f) -> None:
    """The head is an egg on which the features are placed by longitude and latitude."""
    face.male = f.gender
    face.turn = 2 * f.yaw - 1
    face.nod = 2 * f.pitch - 1
    face.size = mix(0.96, 1.04, f.scene_scale)
    face.a = mix(0.405, 0.595, f.width) * face.size  # half width
    face.b = (mix(0.57, 0.61, f.height) + 0.02 * f.age) * face.size  # half height
    face.x = mix(-0.04, 0.04, f.scene_shift_x) + 0.03 * face.turn
    face.y = mix(0.05, 0.10, f.scene_shift_y)
    face.taper = mix(0.20, 0.06, face.male) + 0.10 * (f.jaw - 0.5) - 0.06 * ramp(0.5, 1.0, f.age)
    face.square = mix(2.05, 2.60, face.male) + 0.3 * (f.jaw - 0.5)  # exponent of the jaw's outline
    face.chin = 0.10 * face.turn  # sideways shift of the chin, grows from the eyes down


def on_head(face, longitude, latitude, bulge=1.0):
    """Where a point of the head appears.

    returns   x, y, stretch   each (n, 1, 1); stretch is the foreshortening of horizontal lengths
    """
    angle = longitude + 0.56 * face.turn
    x = face.x + bulge * face.a * torch.sin(angle)
    y = face.y + bulge * face.b * torch.sin(latitude - 0.27 * face.nod)
    return x, y, torch.cos(angle)


def _place_features(face, f) -> None:
    """Eyes, brows, nose, mouth, ears.  Young faces have larger and lower eyes and a smaller nose."""
    flat = torch.zeros_like(f.age)
    youth = 1 - f.age
    eye_height = 0.03 + 0.09 * youth
    spread = mix(0.42, 0.50, f.spacing)
    face.eye = mix(0.098, 0.118, f.eyes) * (0.92 + 0.26 * youth) * face.size
    face.eyes, face.brows = [], []
    for side in (-1, 1):
        face.eyes.append(on_head(face, flat + side * spread, eye_height))
        face.brows.append(on_head(face, flat + side * (spread + 0.02), eye_height - 0.27 - 0.06 * f.eyes))
    face.nose = on_head(face, flat, 0.36 + 0.05 * youth, 1.12)
    face.nose_size = mix(0.065, 0.095, f.nose) * (0.85 + 0.30 * f.age) * face.size
    face.mouth = on_head(face, flat, 0.78 + 0.03 * youth, 1.02)
    face.mouth_half = mix(0.15, 0.20, f.mouth) * mix(0.95, 1.3, f.smile) * face.mouth[2] * face.size
    face.ears = []
    for side in (-1, 1):
        # Turning the head hides the ear on that side and shows more of the other.
        shown = (1 - side * 1.2 * face.turn).clamp(0, 2)
        face.ears.append((face.x + side * (face.a + 0.045 * shown - 0.06), face.y + 0.06 + 0.10 * face.nod, shown))


def _place_hair(face, f) -> None:
    """One outline serves the hair behind the face and, cut along the hairline, the hair in front of it."""
    long = (1 - face.male) * mix(0.35, 1.0, f.length)  # 0 for men
    bald = f.bald
    face.hair_x = face.x - 0.035 * face.turn
    face.hair_a = face.a + mix(0.055, 0.10, f.curl) + 0.03 * torch.maximum(1 - face.male, bald)
    face.hair_top = mix(face.y - 0.03, face.y + 0.06, bald)  # centre of the upper arc
    face.hair_rise = mix(face.b + mix(0.05, 0.10, f.curl), face.b * 0 + 0.16, bald)
    face.hair_end = face.y + mix(0.05 + 0.75 * long, 0.12 + 0 * long, bald)  # where the sides stop
    face.hair_tail = mix(0.22 + 0.10 * (long > 0), 0.18 + 0 * long, bald)  # length of the rounding below
    face.wave = 0.035 * ramp(0.45, 1.0, f.curl) * (1 - bald)
    _, hairline, _ = on_head(face, torch.zeros_like(long), mix(-1.0, -0.58, f.fringe) - 0.06 * f.age)
    face.hairline = hairline
    face.hair_arch = mix(0.34, 0.05, ramp(0.2, 0.9, f.fringe))
    face.part = mix(-0.7, 0.7, f.parting)
    face.lock = mix(9.0, face.y, face.male)  # lowest point of the front hair; a woman's falls freely


def _choose_colours(face, f) -> None:
    """Colours (n, 3).  Age pales the skin and greys the hair a little, never enough to change the hair's class."""
    old = ramp(0.10, 1.0, f.age)[:, 0]
    skin = _gradient(SKIN, f.skin) * _tint(f.undertone, 0.035)
    pale = skin.mean(1, keepdim=True) * torch.tensor([[1.10, 1.0, 0.90]])
    face.skin = mix(skin, pale, 0.40 * old).clamp(0, 1)
    face.shadow = face.skin * torch.tensor([[0.72, 0.60, 0.60]])
    face.crease = face.skin * torch.tensor([[0.58, 0.46, 0.44]])
    face.blush = mix(face.skin, torch.tensor([[0.95, 0.35, 0.35]]), 0.55)
    hair = torch.tensor(HAIR)[f.haircolor[:, 0, 0].long()] * mix(0.90, 1.10, f.hairtone)[:, 0]
    face.hair = mix(hair, torch.tensor([[0.72, 0.72, 0.74]]), 0.28 * old).clamp(0, 1)
    face.hair_dark = face.hair * 0.68
    face.beard = face.hair * 0.86
    face.hair_light = mix(face.hair, torch.ones(1, 3), 0.35)
    # Brows of fair hair are drawn darker than the hair so that they show on fair skin, but keep its hue.
    face.brow = face.hair * 0.80
    face.iris = _gradient(IRIS, f.iris)
    face.lips = mix(mix(face.skin, torch.tensor([[0.80, 0.10, 0.20]]), 0.72), face.skin * 0.78, face.male[:, 0])
    face.frame = _gradient(FRAME, f.scene_glasses)
    face.hat = _hue(f.scene_hat, 0.65, 0.80)
    face.clothes = _hue(f.scene_clothes, 0.55, mix(0.35, 0.90, f.scene_clothes_tone)[:, 0])
    face.back_top = _hue(f.scene_background, 0.28, mix(0.60, 0.90, f.scene_background_tone)[:, 0])
    face.back_bottom = face.back_top * _tint(f.scene_background_glow, 0.10) * 0.80


def _gradient(stops, u):
    """Colour at u (n, 1, 1) of evenly spaced stops.  returns (n, 3)"""
    table = torch.tensor(stops)
    place = u[:, 0] * (len(stops) - 1)
    low = place.long().clamp(max=len(stops) - 2)
    return mix(table[low[:, 0]], table[low[:, 0] + 1], place - low)


def _tint(u, strength):
    """Warm (u = 1) or cool (u = 0) multiplier.  u (n, 1, 1), returns (n, 3)"""
    return 1 + strength * (2 * u[:, 0] - 1) * torch.tensor([[1.0, 0.1, -1.0]])


def _hue(u, saturation, value):
    """Colour of hue u (n, 1, 1) in turns.  returns (n, 3)"""
    wheel = (torch.remainder(u[:, 0] * 6 + torch.tensor([[0.0, 4.0, 2.0]]), 6) - 3).abs() - 1
    return value * (1 - saturation * (1 - wheel.clamp(0, 1)))
