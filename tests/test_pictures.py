"""Where training pictures come from: the renderer of faces, or a folder."""

import logging

import numpy as np
import pytest
import torch
from PIL import Image

from engine.errors import LaceError
from lace_trainer import data
from lace_trainer.data import folder
from lace_trainer.faces import ATTRIBUTES, render, sample_factors
from lace_trainer.faces.pictures import rendered
from lace_trainer.gan.cli import source


def test_equal_factors_give_equal_pictures():
    factors = sample_factors(np.random.default_rng(5), 6)
    whole = render(factors, size=16)
    assert np.array_equal(whole, render(factors, size=16))
    # A picture may differ by rounding when its neighbours change the window that it is drawn in, not by more.
    assert np.abs(whole[2:3].astype(int) - render(factors[2:3], size=16)).max() <= 1


def test_rendered_faces_come_with_their_labels_and_are_kept(tmp_path):
    pictures, labels = rendered(20, 16, 1, tmp_path)
    assert pictures.shape == (20, 16, 16, 3)
    assert pictures.dtype == torch.uint8
    assert labels.shape == (20, len(ATTRIBUTES))
    for i, attribute in enumerate(ATTRIBUTES):
        high = len(attribute.classes) - 1 if attribute.kind == "class" else 1
        assert labels[:, i].min() >= 0
        assert labels[:, i].max() <= high
    again, same = rendered(20, 16, 1, tmp_path)
    assert torch.equal(pictures, again)
    assert np.array_equal(labels, same)
    assert [p.name for p in tmp_path.iterdir()] == ["faces-16-20-1.npy"]


@pytest.mark.parametrize("spec", ["render:", "render:0", "render:many"])
def test_a_wrong_source_is_named(spec, tmp_path):
    with pytest.raises(LaceError, match="render:COUNT"):
        source(spec, 16, 0, tmp_path)


# --- a folder -----------------------------------------------------------------------------------------------------


@pytest.fixture
def album(tmp_path):
    """A folder with pictures of each kind, and files that are none."""
    path = tmp_path / "album"
    (path / "more").mkdir(parents=True)
    stripes = np.zeros((20, 40, 3), np.uint8)
    stripes[:, :10], stripes[:, 10:30], stripes[:, 30:] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    Image.fromarray(stripes).save(path / "a-wide.png")
    Image.new("L", (16, 16), 100).save(path / "b-grey.jpg", quality=95)
    Image.new("RGBA", (16, 16), (255, 0, 0, 0)).save(path / "c-transparent.png")
    Image.new("RGB", (16, 16), (51, 102, 255)).convert("P").save(path / "more" / "d-palette.PNG")
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright
    sideways = np.zeros((16, 16, 3), np.uint8)
    sideways[:, :8] = 255
    Image.fromarray(sideways).save(path / "more" / "e-turned.png", exif=exif)
    (path / "notes.txt").write_text("not a picture")
    (path / "labels.json").write_text("{}")
    return path


def test_a_folder_of_pictures_is_cropped_resized_and_made_rgb(album, tmp_path):
    pictures = folder(album, 8, tmp_path)
    assert pictures.shape == (5, 8, 8, 3)
    assert pictures.dtype == torch.uint8
    assert (pictures[0, :, 3:5] == torch.tensor([0, 255, 0])).all()  # the centre of the stripes; its rim is filtered
    assert (pictures[1].int() - 100).abs().max() <= 2
    assert (pictures[2] == 255).all()
    assert pictures[3, 0, 0].tolist() == [51, 102, 255]
    assert pictures[4, 0].min() == 255
    assert pictures[4, -1].max() == 0


def test_a_folder_is_read_once_until_it_changes(album, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(data, "CHUNK", 2)
    with caplog.at_level(logging.INFO):
        first = source(str(album), 8, 0, tmp_path)
    assert [record.args[0] for record in caplog.records] == [2, 4, 5]
    with monkeypatch.context() as patch:
        patch.setattr(data, "square", lambda *_: pytest.fail("read again"))
        assert torch.equal(source(str(album), 8, 0, tmp_path), first)
    Image.new("RGB", (8, 8), (9, 9, 9)).save(album / "z.png")
    assert source(str(album), 8, 0, tmp_path)[5, 0, 0].tolist() == [9, 9, 9]


def test_a_folder_that_cannot_serve_is_named(album, tmp_path):
    with pytest.raises(LaceError, match=r"there is no folder .*nowhere"):
        source(str(tmp_path / "nowhere"), 8, 0, tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").write_text("no picture")
    with pytest.raises(LaceError, match="no picture"):
        folder(tmp_path / "empty", 8, tmp_path)


@pytest.mark.parametrize("content", [b"nonsense", "half"])
def test_a_broken_picture_is_named_and_nothing_is_kept(content, album, tmp_path):
    if content == "half":
        Image.effect_noise((64, 64), 50).save(album / "broken.png")
        content = (album / "broken.png").read_bytes()[:2000]
    (album / "broken.png").write_bytes(content)
    cache = tmp_path / "cache"
    with pytest.raises(LaceError, match=r"cannot read the picture .*broken\.png"):
        folder(album, 8, cache)
    assert not list(cache.iterdir())


def test_sixteen_bits_are_refused_rather_than_cut(album, tmp_path):
    Image.fromarray(np.full((8, 8), 40_000, np.uint16)).save(album / "deep.png")
    with pytest.raises(LaceError, match="8 bits"):
        folder(album, 8, tmp_path)
