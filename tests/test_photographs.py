"""Classifiers of labelled photographs: tables and folders, balance, the report, ONNX and spec."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from engine.classifier import ImageClassifier
from engine.cli.console import BAD_INPUT, OK
from engine.errors import LaceError
from lace_trainer.attributes import Attribute
from lace_trainer.cli import main
from lace_trainer.judges import classifier, photographs
from lace_trainer.judges.photographs import Photographs
from lace_trainer.tables import folder_table, read_table

COUNT = 160


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Pictures of one colour with noise, and two tables of which colour and how bright."""
    folder, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    red, light = rng.random(COUNT) < 0.3, rng.integers(20, 90, COUNT)
    lines = []
    for i in range(COUNT):
        colour = np.array([1.0, 0.2, 0.2] if red[i] else [0.2, 0.2, 1.0]) * light[i] * 2.5
        pixels = np.clip(colour + rng.normal(0, 10, (48, 40, 3)), 0, 255).astype(np.uint8)
        place = folder / ("red" if red[i] else "blue")
        place.mkdir(exist_ok=True)
        Image.fromarray(pixels).save(place / f"{i}.png")
        lines.append((f"{place.name}/{i}.png", red[i], light[i]))
    (folder / "list.txt").write_text(f"{COUNT}\nRed Blue\n" + "".join(
        f"{name} {1 if red else -1} {-1 if red else 1}\n" for name, red, _ in lines))
    (folder / "table.csv").write_text("filename,colour,light\n" + "".join(
        f"{name},{'red' if red else 'blue'},{light}\n" for name, red, light in lines))
    return folder


def arguments(folder, out, *more):
    return ["classifier", "--data", str(folder), "--size", "32", "--epochs", "4", "--threads", "1", "--precision",
            "fp32", "--out", str(out), "--json", *more]


def test_a_classifier_is_learnt_from_photographs_and_written_with_its_spec(photos, tmp_path, capsys):
    more = ["--table", str(photos / "table.csv"), "--scale", "light=0.01"]
    assert main(arguments(photos, tmp_path / "colour.safetensors", *more)) == OK
    facts = json.loads(capsys.readouterr().out)
    assert list(facts["validation"]) == ["colour", "light"]
    first = facts["validation"]["colour"]
    assert first["accuracy"] > max(0.9, first["guess"])
    assert sum(map(sum, first["confusion"])) == COUNT // 10
    assert any("training pictures show" in said for said in first["warnings"])
    model = ImageClassifier(tmp_path / "colour.onnx")
    assert [a.name for a in model.attributes] == ["colour", "light"]
    assert model.spec.facts["accuracy"] == pytest.approx(facts["accuracy"])
    with Image.open(next(iter(sorted((photos / "red").iterdir())))) as picture:
        said = model.read(np.asarray(picture.resize((32, 32)))[None])[0]
    assert said[1] > 0.5
    assert (tmp_path / "colour.confusion.png").is_file()


def test_a_list_of_celeba_and_folders_of_classes_say_the_same(photos, tmp_path):
    listed = photographs.load_photographs(photos, read_table(photos / "list.txt"), size=32, cache=tmp_path)
    folders = photographs.load_photographs(photos, folder_table(photos, "colour"), size=32, cache=tmp_path)
    assert [a.name for a in listed.attributes] == ["Red", "Blue"]
    assert folders.attributes == (Attribute("colour", "class", ("blue", "red")),)
    for data in (listed, folders):
        looks_red = data.pictures[..., 0].float().mean(dim=(1, 2)) > data.pictures[..., 2].float().mean(dim=(1, 2))
        np.testing.assert_array_equal(data.labels[:, 0], looks_red.numpy())


def test_a_balanced_classifier_gives_probabilities_without_its_weights():
    """What learnt with weights w_c is right about the probabilities again when log w_c is taken away."""
    rng = np.random.default_rng(0)
    labels = (rng.random(4000) < 0.1).astype(np.float32)[:, None]
    pictures, rare = torch.zeros(4000, 32, 32, 3, dtype=torch.uint8), Attribute("rare", "class", ("no", "yes"))
    data = Photographs(pictures, labels, (rare,), 400)
    weights = photographs.class_weights(data)
    assert weights[0][1] > 2 * weights[0][0]
    model = classifier.Classifier(photographs.shape_for(32), data.attributes)
    bias = torch.zeros(2, requires_grad=True)
    optimiser = torch.optim.LBFGS([bias], max_iter=50)

    def step():
        optimiser.zero_grad()
        value = classifier.loss(model, bias.expand(4000, 2), torch.from_numpy(labels), weights)
        value.backward()
        return value

    optimiser.step(step)
    assert bias.softmax(0)[1] > 0.2  # what it says while it counts the rare ones more
    with torch.no_grad():
        model.out.bias.copy_(bias)
    photographs.unweighted(model, weights)
    assert model.out.bias.softmax(0)[1].item() == pytest.approx(labels.mean(), abs=0.003)


def test_missing_labels_teach_nothing():
    attributes = (Attribute("smile", "class", ("no", "yes")), Attribute("age", "value"))
    model = classifier.Classifier(photographs.shape_for(32), attributes)
    outputs = torch.randn(6, 3)
    labels = torch.tensor([[1, 0.5], [0, 0.2], [float("nan"), 0.1], [1, float("nan")], [0, 0.9], [1, 0.3]])
    whole = classifier.loss(model, outputs, labels)
    changed = outputs.clone()
    changed[2, :2] += 9
    changed[3, 2] += 9
    assert classifier.loss(model, changed, labels) == whole
    assert classifier.loss(model, outputs[2:3], torch.full((1, 2), float("nan"))) == 0


def test_mirroring_is_left_out_unless_it_is_asked_for():
    pictures = torch.zeros(64, 32, 32, 3, dtype=torch.uint8)
    pictures[:, :, 16:] = 200
    sides = [(x[..., 20:].mean(dim=(1, 2, 3)) > x[..., :12].mean(dim=(1, 2, 3))).float().mean().item()
             for x in (classifier.augment(pictures, torch.Generator().manual_seed(0), mirror=mirror)
                       for mirror in (False, True))]
    assert sides[0] == 1
    assert 0.2 < sides[1] < 0.8


@pytest.mark.parametrize(("more", "said"), [
    (["--table", "missing.csv"], "cannot read the table"), (["--size", "40"], "a multiple of 16"),
    (["--pictures", "3"], "the number of rendered faces"),
    (["--attribute", "x", "--table", "t.csv"], "its columns have names"),
    (["--validation", "500"], "leaves none"),
])
def test_what_does_not_fit_is_one_sentence(photos, tmp_path, capsys, more, said):
    assert main([*arguments(photos, tmp_path / "x.safetensors"), *more]) == BAD_INPUT
    assert said in capsys.readouterr().err


def test_pictures_that_are_not_there_are_named(photos, tmp_path):
    (tmp_path / "t.csv").write_text("file,mood\nred/none.png,a\nx.png,b\n")
    with pytest.raises(LaceError, match=r"row 1: there is no picture .*none\.png"):
        photographs.load_photographs(photos, read_table(tmp_path / "t.csv"), size=32, cache=tmp_path)
    (tmp_path / "secret.png").write_bytes(b"")
    folder = tmp_path / "inner"
    folder.mkdir()
    (tmp_path / "t.csv").write_text("file,mood\n../secret.png,a\n../secret.png,b\n")
    with pytest.raises(LaceError, match="lies outside"):
        photographs.load_photographs(folder, read_table(tmp_path / "t.csv"), size=32, cache=tmp_path)


def test_the_judge_of_the_package_becomes_onnx(tmp_path, capsys):
    from lace_trainer import judges

    out = tmp_path / "judge.onnx"
    assert main(["classifier", "--convert", str(judges.JUDGE), "--out", str(out), "--json"]) == OK
    model = ImageClassifier(out)
    assert "smile" in [a.name for a in model.attributes]
    assert model.spec.same_as
