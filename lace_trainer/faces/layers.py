"""The drawing, back to front.  Every layer is a function of the canvas and the layout; LAYERS is the order."""

import torch

from lace_trainer.faces.features import beard, brows, cheeks, eyes, mouth, nose, wrinkles
from lace_trainer.faces.layout import WHITE, mix, plain, ramp
from lace_trainer.faces.shapes import Canvas


def background(canvas: Canvas, face) -> None:
    down = ((canvas.y + 1) / 2).expand(face.n, -1, -1)
    canvas.rgb.copy_(mix(face.back_top[:, :, None, None], face.back_bottom[:, :, None, None], down[:, None]))
    glow = canvas.ellipse(face.x, face.y, 1.0, 1.0, softness=1.2)
    canvas.paint(glow * 0.28, plain(face, WHITE))


def hair_outline(canvas: Canvas, face):
    """Opacity of the whole hair: an arc on top, straight sides, a rounded end.  returns (n, h, w)"""
    above = (face.hair_top - canvas.y).clamp(min=0) / face.hair_rise
    below = (canvas.y - face.hair_end).clamp(min=0) / face.hair_tail
    half = face.hair_a * (1 + face.wave * torch.sin(18 * canvas.y + 9 * face.part))
    across = (canvas.x - face.hair_x).abs() / half
    radius = (across.square() + (above.square() + below.square())).sqrt_()
    return canvas.fill((radius - 1) * (0.8 * face.hair_a))


def back_hair(canvas: Canvas, face) -> None:
    face.hair_window = canvas.window(
        face.hair_x - face.hair_a - 0.03,
        face.hair_x + face.hair_a + 0.03,
        face.hair_top - face.hair_rise,
        face.hair_end + face.hair_tail,
    )
    face.hair_alpha = hair_outline(face.hair_window, face)
    face.hair_window.paint(face.hair_alpha, face.hair_dark, solid=True)


def body(canvas: Canvas, face) -> None:
    window = canvas.window(-1, 1, face.y + 0.2, 1)
    neck = mix(0.17, 0.24, face.male) * face.size
    top = face.y + face.b
    shoulders = window.ellipse(face.x * 0.5, top + 0.62, mix(0.72, 0.92, face.male), 0.50)
    skin = window.fill(torch.maximum((window.x - face.x).abs() - neck, face.y + 0.2 - window.y))
    window.paint(skin, face.skin, solid=True)
    shade = window.ellipse(face.x + face.chin, top - 0.10, face.a * 0.9, 0.28, softness=0.12) * skin
    window.paint(shade * 0.75, face.shadow)
    window.paint(shoulders, face.clothes, solid=True)
    depth = mix(0.05, 0.20, face.f.scene_collar)
    collar = window.ellipse(face.x, top + 0.10, neck * 1.12, depth + 0.03)
    window.paint(collar * shoulders, face.clothes * 0.72)
    collar = window.ellipse(face.x, top + 0.08, neck, depth)
    window.paint(collar, face.skin)
    window.paint(collar * 0.55, face.shadow)


def ears(canvas: Canvas, face) -> None:
    for side, (x, y, shown) in zip((-1, 1), face.ears, strict=True):
        rx, ry = 0.075 + 0.015 * shown, 0.13 * face.size
        window = canvas.window(x - rx, x + rx, y - ry, y + ry + 0.12)
        window.paint(window.ellipse(x, y, rx, ry), face.skin, solid=True)
        window.paint(window.ellipse(x, y, rx * 0.5, ry * 0.6, softness=0.05) * 0.6, face.shadow)
        ring = window.ellipse(x + side * 0.01, y + ry + 0.03, 0.030, 0.045)  # women wear earrings
        window.paint(ring * (1 - face.male), plain(face, (0.98, 0.80, 0.25)))


def head(canvas: Canvas, face) -> None:
    """The face itself: an egg whose lower half tapers and leans with the turn of the head."""
    window = canvas.window(face.x - face.a - 0.12, face.x + face.a + 0.12, face.y - face.b, face.y + face.b)
    t = (window.y - face.y) / face.b
    low = t.clamp(min=0)
    half = face.a * (1 - face.taper * low.square() * (3 - 2 * low).clamp(min=0))
    vertical = torch.where(t > 0, low.pow(face.square), t.square())
    across = (window.x - (face.x + face.chin * low)) / half
    radius = across.square_().add_(vertical).sqrt_()
    window.skin.copy_(window.fill((radius - 1) * (0.95 * face.a)))
    window.paint(window.skin, face.skin, solid=True)
    rim = ((radius - 0.72) * 2.2).clamp_(0, 1).mul_(window.skin)
    face.head_window = window
    window.paint(rim * 0.35, face.shadow)


def front_hair(canvas: Canvas, face) -> None:
    if bool(face.f.bald.all()):
        return
    window, hair = face.hair_window, 1 - face.f.bald
    u = (window.x - face.x - 0.12 * face.turn) / face.a
    side = u.square() * u.square()
    # The fringe ends above the brows, which must show the hair's colour under a hat as well.
    fringe = face.hairline + face.hair_arch * (u - face.part).square() + 0.6 * face.wave * torch.sin(18 * u)
    fringe = torch.minimum(fringe, face.brows[0][1] - 0.055)
    line = torch.minimum(fringe + mix(0.62, 0.45, face.male) * side * u.square(), face.lock)
    shade = window.fill(window.y - line - 0.05, softness=0.12) * window.skin * hair
    window.paint(shade * 0.40, face.shadow)
    alpha = window.fill(window.y - line).mul_(face.hair_alpha).mul_(hair)
    window.paint(alpha, face.hair)
    strands = (0.5 + 0.5 * torch.sin(26 * u - 12 * face.part)) * (0.16 + 0.2 * face.wave / 0.035)
    window.paint(alpha * strands, face.hair_dark)
    top = face.hair_top - face.hair_rise
    gloss = window.stroke(face.hair_x + 0.05 * face.part, top + 0.13, face.a * 0.75, 0.10, 0.045, softness=0.06)
    window.paint(gloss * alpha * 0.55, face.hair_light)
    aside = ((window.x - face.hair_x) / face.hair_a).abs()
    temple = ramp(0.3, 1.0, face.f.age) * ramp(0.35, 1.0, aside) * 0.22
    window.paint(alpha * temple, plain(face, (0.80, 0.80, 0.82)))


def bald_head(canvas: Canvas, face) -> None:
    if not bool(face.f.bald.any()):
        return
    y = face.y - face.b * 0.74
    window = canvas.window(face.x - 0.40, face.x + 0.40, y - 0.2, y + 0.2)
    shine = window.ellipse(face.x - 0.05 * face.turn, y, 0.20, 0.09, softness=0.12)
    window.paint(shine * 0.45 * face.f.bald, plain(face, WHITE))


def glasses(canvas: Canvas, face) -> None:
    if not bool(face.f.glasses.any()):
        return
    on, square = face.f.glasses, face.f.scene_glasses_shape > 0.5
    r = 0.175 * face.size
    for side, (x, y, stretch) in zip((-1, 1), face.eyes, strict=True):
        rx, ry = r * stretch.clamp(min=0.4), r * 0.86
        ear_x = face.ears[(side + 1) // 2][0]
        ends = torch.minimum(x - rx, ear_x) - 0.04, torch.maximum(x + rx, ear_x) + 0.04
        window = canvas.window(*ends, y - ry - 0.04, y + ry + 0.04)
        u2, v2 = ((window.x - x) / rx).square(), ((window.y - y - 0.01) / ry).square()
        radius = torch.where(square, (u2.square() + v2.square()).sqrt_(), u2 + v2).sqrt_()
        window.paint(window.fill((radius - 1) * ry) * (0.16 * on), plain(face, (0.85, 0.95, 1.0)))
        window.paint(window.fill(((radius - 1) * ry).abs_() - 0.019) * on, face.frame)
        inner, outer = torch.minimum(x + side * rx, ear_x), torch.maximum(x + side * rx, ear_x)
        arm = torch.maximum((window.y - y + 0.02).abs() - 0.016, torch.maximum(inner - window.x, window.x - outer))
        window.paint(window.fill(arm) * on, face.frame)
    (x0, y0, s0), (x1, _, s1) = face.eyes
    left, right = x0 + r * s0.clamp(min=0.4), x1 - r * s1.clamp(min=0.4)
    middle, half = (left + right) / 2, (right - left).clamp(min=0.02) / 2 + 0.04
    window = canvas.window(middle - half, middle + half, y0 - 0.1, y0 + 0.1)
    window.paint(window.stroke(middle, y0 - 0.03, half, 0.03, 0.026) * on, face.frame)


def hat(canvas: Canvas, face) -> None:
    """A woollen cap that ends above the hairline, so that fringe and temples stay in sight."""
    if not bool(face.f.hat.any()):
        return
    on, x = face.f.hat, face.hair_x
    half, brim = face.a + 0.135, face.y - face.b * 0.60 - 0.05 * face.nod
    top = face.y - face.b - 0.16
    window = canvas.window(x - half - 0.1, x + half + 0.1, top - 0.16, brim + 0.15)
    u = (window.x - x) / half
    edge = brim + 0.07 * u.square() - 0.03
    dome = window.ellipse(x, brim, half, brim - top) * window.fill(window.y - edge) * on
    pompom = (face.f.scene_hat_shape > 0.5) * on
    window.paint(window.ellipse(x, top - 0.02, 0.10, 0.09) * pompom, mix(face.hat, torch.ones(1, 3), 0.6), solid=True)
    window.paint(dome, face.hat, solid=True)
    window.paint(dome * (0.5 + 0.5 * torch.sin(22 * u)) * 0.22, face.hat * 0.5)
    band = window.fill(torch.maximum((window.y - edge).abs() - 0.068, (window.x - x).abs() - half - 0.02)) * on
    window.paint(band, face.hat * 0.72, solid=True)


def light(canvas: Canvas, face) -> None:
    """Brighten the lit side of the person and darken the other; the wall behind follows faintly."""
    direction = 2 * face.f.light - 1
    across = (canvas.x - face.x) / face.a
    across = across / (1 + 0.5 * across.abs())
    gain = 0.75 * direction * across - 0.12 * across.square() - 0.06 * direction.abs() + 0.04
    tone = torch.tensor([0.95, 1.0, 0.97]).view(1, 3, 1, 1)  # shadows are a little warm
    weight = (canvas.person * 0.75).add_(0.25).mul_(gain)
    canvas.rgb.addcmul_(canvas.rgb * weight[:, None], tone)


LAYERS = (
    background, back_hair, body, ears, head, cheeks, wrinkles, nose, beard, mouth,
    eyes, brows, bald_head, front_hair, glasses, hat, light,
)
