"""Adaptive augmentation: the transformations, their probability, and its feedback."""

import math

import pytest
import torch
from torch.nn import functional as F

from lace_trainer.gan import ada
from lace_trainer.gan.ada import Augmentation, Chance, colour, geometry, rotation, scaling, shift


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pictures(n: int = 6, size: int = 16) -> torch.Tensor:
    return torch.rand(n, 3, size, size, generator=generator()) * 2 - 1


def switched(p: float, **settings) -> Augmentation:
    augmentation = Augmentation(0.6, **settings)
    augmentation.p = p
    return augmentation


def test_nothing_happens_at_probability_zero():
    x = pictures()
    rng = generator()
    before = rng.get_state()
    assert Augmentation(0.6)(x, rng) is x
    assert torch.equal(rng.get_state(), before)


def test_the_result_is_a_function_of_the_seed():
    x, augmentation = pictures(), switched(0.7)
    first = augmentation(x, generator(1))
    assert torch.equal(augmentation(x, generator(1)), first)
    assert not torch.equal(augmentation(x, generator(2)), first)
    assert first.shape == x.shape
    assert first.isfinite().all()


def test_about_as_many_pictures_are_touched_as_asked():
    x = pictures(400, 8)
    touched = ((switched(0.1)(x, generator()) - x).abs().amax(dim=(1, 2, 3)) > 1e-4).float().mean().item()
    # Two shifts, scale, stretch, rotation, four colours, and half the luma flips: 1 - 0.9^9.5 = 0.63.
    assert 0.56 < touched < 0.68
    drawn = (Chance(4000, 0.3, generator()).normal(1.0) != 0).float().mean().item()
    assert drawn == pytest.approx(0.3, abs=0.03)


@pytest.mark.parametrize(
    ("matrix", "expected"),
    [
        (scaling(-torch.ones(2), torch.ones(2)), lambda x: x.flip(3)),
        (rotation(torch.full((2,), math.pi / 2)), lambda x: x.rot90(1, (2, 3))),
        (shift(torch.full((2,), 2 / 8 * 3), torch.zeros(2)), lambda x: torch.cat([x[..., 3:], x[..., 5:].flip(3)], 3)),
    ],
    ids=["mirrored", "turned", "shifted"],
)
def test_pixel_blitting_moves_pixels_and_does_not_mix_them(matrix, expected):
    x = pictures(2, 8)
    grid = F.affine_grid(matrix[:, :2], list(x.shape), align_corners=False)
    moved = F.grid_sample(x, grid, padding_mode="reflection", align_corners=False)
    torch.testing.assert_close(moved, expected(x), rtol=0, atol=1e-5)


def test_pictures_are_mirrored_only_on_request():
    plain = geometry(200, 16, 0.9, generator(), flips=False, turns=True)
    assert (torch.linalg.det(plain) > 0).all()
    mirrored = torch.linalg.det(geometry(200, 16, 0.9, generator(), flips=True, turns=False)) < 0
    assert 0.35 < mirrored.float().mean() < 0.55


def test_greys_stay_greys_in_every_colour_map():
    matrix = colour(100, 1.0, generator())
    greys = torch.cat([torch.full((3,), 0.3), torch.ones(1)])
    mapped = matrix @ greys
    torch.testing.assert_close(mapped[:, 0], mapped[:, 1])
    torch.testing.assert_close(mapped[:, 0], mapped[:, 2])
    torch.testing.assert_close(mapped[:, 3], torch.ones(100))
    assert mapped[:, 0].std() > 0.1
    red = matrix @ torch.tensor([0.3, -0.1, -0.2, 1.0])  # no brightness of its own, so only hue and saturation show
    assert (red[:, :3] - red[:, :3].mean(dim=1, keepdim=True)).norm(dim=1).std() > 0.1


def test_the_generator_learns_through_the_augmentation():
    x = pictures().requires_grad_(True)
    switched(0.8)(x, generator(3)).square().sum().backward()
    assert x.grad.isfinite().all()
    assert (x.grad.abs().amax(dim=(1, 2, 3)) > 0).all()


def test_the_probability_follows_the_signs_of_the_reals(monkeypatch):
    monkeypatch.setattr(ada, "SPEED", 640)
    augmentation = Augmentation(0.5)
    for _ in range(8):
        augmentation.adapt(torch.ones(16))
    assert augmentation.p == pytest.approx(8 * 16 / 640)
    for _ in range(3):
        augmentation.adapt(torch.tensor([1.0, -1.0]))
    saved = augmentation.state_dict()
    again = Augmentation(0.5)
    again.load_state_dict(saved)
    for either in (augmentation, again):
        either.adapt(torch.tensor([1.0, -1.0]))
        assert either.p == pytest.approx(8 * 16 / 640 - 4 * 2 / 640)
    for _ in range(400):
        augmentation.adapt(-torch.ones(16))
    assert augmentation.p == 0
