"""The features drawn on the face: each a layer, called from the order in layers.py."""

import torch

from lace_trainer.faces.layout import WHITE, mix, plain, ramp
from lace_trainer.faces.shapes import Canvas


def cheeks(canvas: Canvas, face) -> None:
    """Blush, which fades with age."""
    x = face.nose[0]
    blush = 0.75 - 0.55 * face.f.age
    for ex, ey, stretch in face.eyes:
        cx, cy, rx = mix(ex, x, -0.12), ey + 0.24 * face.size, 0.13 * stretch.clamp(min=0.5)
        window = canvas.window(cx - 0.26, cx + 0.26, cy - 0.22, cy + 0.22)
        window.paint(window.ellipse(cx, cy, rx, 0.09, softness=0.16) * window.skin * blush, face.blush)


def wrinkles(canvas: Canvas, face) -> None:
    """Forehead lines, eye bags, crow's feet, folds beside the mouth; each deepens over its own span of age."""
    age, size = face.f.age, face.size
    _, top, _ = face.brows[0]
    x = mix(face.brows[0][0], face.brows[1][0], 0.5)
    for k, start in enumerate((0.02, 0.27, 0.50)):
        y = top - (0.10 + 0.062 * k) * size
        half = (0.26 - 0.03 * k) * size
        window = canvas.window(x - half, x + half, y - 0.05, y + 0.05)
        line = window.stroke(x, y, half, 0.025, 0.018 * size)
        window.paint(line * window.skin * (0.95 * ramp(start, start + 0.5, age)), face.crease)
    for side, (ex, ey, stretch) in zip((-1, 1), face.eyes, strict=True):
        reach = stretch.clamp(min=0.35)
        window = canvas.window(ex - 0.34, ex + 0.34, ey - 0.16, ey + 0.36)
        bag = window.stroke(ex, ey + face.eye * 1.55, face.eye * 1.2 * reach, -0.035, 0.022 * size, softness=0.035)
        window.paint(bag * window.skin * (0.95 * ramp(0.0, 0.8, age)), face.crease)
        for k in (-1, 0, 1):
            foot = window.stroke(
                ex + side * (face.eye * 1.6) * reach, ey + 0.045 * k, 0.055 * reach, 0.0, 0.012, slope=side * 0.022 * k
            )
            window.paint(foot * window.skin * (0.8 * ramp(0.45, 1.0, age)), face.crease)
    mx, my, stretch = face.mouth
    for side in (-1, 1):
        fx = mx + side * (face.mouth_half + 0.055 * stretch)
        window = canvas.window(fx - 0.14, fx + 0.14, my - 0.26, my + 0.14)
        fold = window.stroke(fx, my - 0.06, 0.15 * size, -side * 0.035, 0.017, slope=side * 0.02, upright=True)
        window.paint(fold * window.skin * (0.9 * ramp(0.2, 0.9, age)), face.crease)


def eyes(canvas: Canvas, face) -> None:
    for side, (x, y, stretch) in zip((-1, 1), face.eyes, strict=True):
        r = face.eye
        rx, ry = r * 1.12 * stretch.clamp(min=0.3), r * 0.86
        window = canvas.window(x - r * 1.8, x + r * 1.8, y - r * 2.0, y + r * 2.0)
        window.paint(window.ellipse(x, y, rx * 1.25, ry * 1.3, softness=0.06) * 0.45, face.shadow)
        white = window.ellipse(x, y, rx, ry)
        window.paint(white, plain(face, WHITE))
        gaze_x, gaze_y = x + 0.02 * face.turn, y - 0.012 * face.nod
        iris = r * 0.66
        window.paint(window.ellipse(gaze_x, gaze_y, iris * stretch.clamp(min=0.45), iris) * white, face.iris)
        window.paint(window.ellipse(gaze_x, gaze_y, iris * 0.5, iris * 0.5) * white, plain(face, (0.05, 0.04, 0.06)))
        lid = window.stroke(x, y - ry * 0.80, rx * 1.12, ry * 0.62, mix(0.030, 0.019, face.male))
        window.paint(lid, plain(face, (0.12, 0.08, 0.08)))
        lash = window.stroke(x + side * rx * 1.02, y - ry * 0.42, rx * 0.42, 0.01, 0.024, slope=-side * 0.055)
        window.paint(lash * (1 - face.male), plain(face, (0.10, 0.06, 0.08)))
        shine = window.ellipse(gaze_x - 0.03, gaze_y - 0.03, 0.022, 0.022)
        window.paint(shine * 0.95, plain(face, (1.0, 1.0, 1.0)))


def brows(canvas: Canvas, face) -> None:
    thick = mix(0.024, 0.042, face.male) + 0.010 * face.f.brows
    for side, (x, y, stretch) in zip((-1, 1), face.brows, strict=True):
        half = 0.155 * stretch.clamp(min=0.35) * face.size
        window = canvas.window(x - half, x + half, y - 0.10, y + 0.10)
        window.paint(window.stroke(x, y, half, 0.030, thick, slope=side * 0.012), face.brow)


def nose(canvas: Canvas, face) -> None:
    x, y, _ = face.nose
    r = face.nose_size
    window = canvas.window(x - 0.2, x + 0.2, y - 0.34, y + 0.14)
    # The flank away from the turn is in shade, so the nose tells the yaw as well as the light.
    flank = window.stroke(x - 0.06 * face.turn, y - 0.13, 0.18, 0.0, 0.035, softness=0.06, upright=True)
    window.paint(flank * 0.30, face.shadow)
    window.paint(window.ellipse(x, y + r * 0.25, r * 1.15, r * 0.80, softness=0.05) * 0.80, face.shadow)
    window.paint(window.ellipse(x, y - r * 0.1, r, r * 0.75, softness=0.04), face.skin)
    window.paint(window.ellipse(x, y - r * 0.2, r * 0.5, r * 0.4, softness=0.05) * 0.45, plain(face, WHITE))
    for side in (-1, 1):
        window.paint(window.ellipse(x + side * r * 0.55, y + r * 0.55, 0.024, 0.016) * 0.8, face.crease)


def beard(canvas: Canvas, face) -> None:
    if not bool(face.f.beard.any()):
        return
    jaw, (mx, my, _) = face.head_window, face.mouth
    # u is 0 at the mouth and 1 at either side of the head, where the beard climbs to the ears.
    away = jaw.x - mx
    u2 = (away / torch.where(away > 0, face.x + face.a - mx, mx - face.x + face.a)).square()
    edge = my - 0.07 - (my - 0.07 - face.y - 0.02) * (0.35 * u2 + 0.65 * u2 * u2).clamp(max=1)
    alpha = jaw.fill(edge - jaw.y, softness=0.05).mul_(jaw.skin).mul_(face.f.beard)
    jaw.paint(alpha, face.beard)
    jaw.paint(alpha * jaw.fill(my + 0.16 - jaw.y, softness=0.3) * 0.5, face.hair_dark)
    window = canvas.window(mx - 0.3, mx + 0.3, my - 0.15, my + 0.1)
    moustache = window.stroke(mx, my - 0.085 * face.size, face.mouth_half * 1.25, 0.06, 0.055)
    window.paint(moustache * window.skin * face.f.beard, face.hair_dark)


def mouth(canvas: Canvas, face) -> None:
    """A wide open mouth with teeth, or closed lips that droop a little."""
    x, y, _ = face.mouth
    half = face.mouth_half
    window = canvas.window(x - half * 1.2, x + half * 1.2, y - 0.15, y + 0.2)
    smile, shut = window.skin * face.f.smile, window.skin * (1 - face.f.smile)
    u2 = ((window.x - x) / half).square()
    # Open mouth: between an upper and a lower parabola that meet at the corners.
    upper, lower = y - 0.045 - 0.02 * u2, y + 0.115 - 0.18 * u2
    rim = (1.2 - u2).clamp(min=-1)
    lips = window.fill(torch.maximum(upper - 0.036 * rim - window.y, window.y - lower - 0.042 * rim)) * smile
    window.paint(lips, face.lips)
    hole = torch.maximum(upper - window.y, window.y - lower)
    inside = window.fill(hole) * smile
    window.paint(inside, plain(face, (0.42, 0.08, 0.10)))
    window.paint(inside * window.fill(window.y - y - 0.015), plain(face, WHITE))
    # Closed mouth.
    window.paint(window.stroke(x, y + 0.030, half * 0.85, -0.01, 0.042) * shut, face.lips)
    window.paint(window.stroke(x, y - 0.015, half * 0.92, 0.02, 0.034) * shut, face.lips * 0.90)
    window.paint(window.stroke(x, y, half, 0.038, 0.018) * shut, face.lips * 0.45)
