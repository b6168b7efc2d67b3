"""The trainer: classifiers, heads, LACE's data files, and the command line."""

import copy
import json
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch

from engine.bundle import Attribute as BundleAttribute
from engine.errors import CheckpointError, LaceError
from exporter.checkpoints import load_generator
from exporter.heads import FFHQ, load_heads
from lace_trainer import cli
from lace_trainer.attributes import Attribute
from lace_trainer.faces import ATTRIBUTES
from lace_trainer.faces.pictures import rendered
from lace_trainer.gan.config import GanConfig
from lace_trainer.gan.generator_file import export_generator
from lace_trainer.gan.loop import train
from lace_trainer.heads import training as heads
from lace_trainer.heads.labellers import SURE, Labellers
from lace_trainer.heads.lace_data import lace_pairs, read_array
from lace_trainer.heads.pairs import Pairs, sampled_pairs
from lace_trainer.heads.steered import joined, random_conditions, steered_pairs
from lace_trainer.judges import classifier

SMALL = GanConfig(z_dim=8, w_dim=8, mapping_layers=2, channels={4: 8, 8: 8, 16: 8}, batch=8, r1_interval=2,
                  precision="fp32")
TINY_SHAPE = classifier.Shape((4, 8), (1,), size=16)


@pytest.fixture(scope="module")
def faces(tmp_path_factory):
    return rendered(96, 16, 3, tmp_path_factory.mktemp("faces"))


@pytest.fixture(scope="module")
def tiny_classifier(faces):
    config = classifier.ClassifierConfig(epochs=1, batch=32, precision="fp32")
    return classifier.train(TINY_SHAPE, ATTRIBUTES, faces, config, validation=faces)


@pytest.fixture(scope="module")
def gan_run(faces, tmp_path_factory):
    directory = tmp_path_factory.mktemp("gan")
    return directory, train(SMALL, faces[0], directory, pictures=8)


# --- the classifier -----------------------------------------------------------------------------------------------


def test_a_classifier_survives_its_file(tiny_classifier, faces, tmp_path):
    path = tmp_path / "classifier.safetensors"
    classifier.save(tiny_classifier, path)
    loaded = classifier.load(path)
    np.testing.assert_allclose(loaded.predict(faces[0]), tiny_classifier.predict(faces[0]), rtol=1e-5, atol=1e-5)
    assert loaded.attributes == ATTRIBUTES
    assert set(loaded.metadata["accuracy"]) == {a.name for a in ATTRIBUTES}
    assert loaded.metadata["training"]["batch"] == 32


def test_another_file_is_not_taken_for_a_classifier(gan_run, tmp_path):
    path = export_generator(gan_run[0] / "checkpoint.pt", tmp_path / "generator.safetensors")
    with pytest.raises(CheckpointError, match="holds no classifier"):
        classifier.load(path)
    path.write_bytes(b"nonsense")
    with pytest.raises(CheckpointError, match="cannot read"):
        classifier.load(path)


def test_labeller_and_judge_share_nothing():
    labeller, judge = classifier.ROLES["labeller"], classifier.ROLES["judge"]
    assert labeller.seed != judge.seed
    assert labeller.pictures_seed != judge.pictures_seed
    assert labeller.shape.widths != judge.shape.widths
    assert classifier.VALIDATION_SEED not in (labeller.pictures_seed, judge.pictures_seed)


def test_predictions_of_bytes_and_of_floats_agree(tiny_classifier, faces):
    floats = (faces[0].permute(0, 3, 1, 2).float() - 127.5) / 127.5
    np.testing.assert_allclose(tiny_classifier.predict(floats), tiny_classifier.predict(faces[0]), atol=1e-5)


def test_augmentation_keeps_the_side_of_the_light():
    pictures = torch.zeros(4, 16, 16, 3, dtype=torch.uint8)
    pictures[:, :, 8:] = 200
    x = classifier.augment(pictures, torch.Generator().manual_seed(0))
    assert x.shape == (4, 3, 16, 16)
    assert (x[:, :, :, 12:].mean(dim=(1, 2, 3)) > x[:, :, :, :4].mean(dim=(1, 2, 3))).all()


def test_missing_labels_do_not_count_in_a_score():
    attributes = (Attribute("smile", "class", ("no", "yes")), Attribute("age", "value"))
    found = classifier.scores(attributes, np.array([[1, 0.5], [0, 0.5]]), np.array([[1, np.nan], [1, 0.75]]))
    assert found == {"smile": 0.5, "age": 0.75}


# --- heads --------------------------------------------------------------------------------------------------------


def linear_pairs(n: int = 1500, w_dim: int = 8) -> Pairs:
    """A class, a value and a three-class attribute that are simple functions of w; some labels are missing."""
    w = np.random.default_rng(0).standard_normal((n, w_dim)).astype(np.float32)
    value = 0.5 + 0.15 * w[:, 1]
    labels = np.stack([w[:, 0] > 0, value, w[:, 2:5].argmax(axis=1)], axis=1).astype(np.float32)
    labels[::7, 0] = np.nan
    attributes = (Attribute("smile", "class", ("no", "yes")), Attribute("age", "value"),
                  Attribute("hair", "class", ("a", "b", "c")))
    return Pairs(w, labels, attributes, test=100, validation=100, source={"kind": "made up"})


def test_heads_have_the_widths_of_the_paper():
    assert heads.widths(512, 128) == [512, 384, 256, 128]
    assert heads.widths(128, 64) == [128, 106, 85, 64]


def test_the_learning_rate_rises_linearly_from_zero():
    assert [heads.warmup_factor(step, 1000) for step in (0, 250, 1000, 5000)] == [0, 0.25, 1, 1]
    assert heads.warmup_factor(0, 0) == 1


def test_heads_learn_a_linear_rule_and_survive_their_file(tmp_path):
    pairs = linear_pairs()
    config = heads.HeadsConfig(up_dim=8, epochs=25, learning_rate=5e-3, warmup=20, batch=64)
    trained = heads.train_heads(pairs, config)
    assert trained.validation["smile"] > 0.95
    assert trained.validation["age"] > 0.95
    assert trained.validation["hair"] > 0.9
    assert trained.test["smile"] > 0.95
    paths = heads.save_heads(tmp_path, trained.stacks)
    assert [p.name for p in paths] == ["smile.safetensors", "age.safetensors", "hair.safetensors"]
    stack = load_heads(paths[1])
    assert stack.space == "w"
    low, high = stack.attributes[0].range
    assert 0 <= low < 0.3 < 0.7 < high <= 1
    assert stack.attributes[0].provenance["validation_accuracy"] == pytest.approx(trained.validation["age"], abs=1e-4)
    x = logits_of(stack, pairs.w[-100:])
    assert 1 - np.abs(x[:, 0] - pairs.labels[-100:, 1]).mean() == pytest.approx(trained.test["age"], abs=1e-4)


def test_noise_flattens_what_a_head_says_of_a_class_and_leaves_values_alone():
    pairs = linear_pairs()
    config = heads.HeadsConfig(up_dim=8, epochs=15, learning_rate=5e-3, warmup=20, batch=64)
    plain, noisy = (heads.train_heads(pairs, replace(config, noise=noise)).stacks for noise in (0.0, 2.0))
    smile, age = ([logits_of(stacks[i], pairs.w) for stacks in (plain, noisy)] for i in (0, 1))
    margin_plain, margin_noisy = (np.abs(logits[:, 1] - logits[:, 0]).mean() for logits in smile)
    assert margin_noisy < 0.5 * margin_plain
    assert np.array_equal(*age)
    with pytest.raises(LaceError, match="noise is -1"):
        heads.train_heads(pairs, replace(config, noise=-1))


def logits_of(stack, x):
    for i, (weight, bias) in enumerate(stack.layers):
        x = (np.where(x > 0, x, 0.2 * x) if i else x) @ weight.T + bias
    return x


def test_a_head_does_not_depend_on_its_neighbours():
    pairs = linear_pairs(400)
    config = heads.HeadsConfig(up_dim=8, epochs=2, learning_rate=1e-2, warmup=3)
    whole = heads.train_heads(pairs, config).stacks[0]
    alone = heads.train_heads(pairs.select(["smile"]), config).stacks[0]
    for ours, theirs in zip(whole.layers, alone.layers, strict=True):
        np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-4, atol=1e-5)


def test_a_missing_label_gives_no_gradient():
    pairs = linear_pairs(400)
    model = heads.Heads(pairs.attributes, heads.widths(8, 8), 0)
    labels = torch.from_numpy(pairs.labels[:50]).clone()
    labels[:, 0] = torch.nan
    heads.loss(model, model(torch.from_numpy(pairs.w[:50])), labels).backward()
    for parameter in model.parameters():
        assert not parameter.grad[0].any()
        assert parameter.grad[1].any()


def test_labels_that_cannot_be_are_refused():
    w, smile = np.zeros((4, 2), np.float32), (Attribute("smile", "class", ("no", "yes")),)
    with pytest.raises(LaceError, match="from 0 to 1"):
        Pairs(w, np.array([[0.0], [1], [2], [0]]), smile, validation=1)
    with pytest.raises(LaceError, match="too few"):
        Pairs(w, np.zeros((4, 1)), smile, validation=4)
    missing = Pairs(w, np.full((4, 1), np.nan), smile, validation=1)
    with pytest.raises(LaceError, match="all labels"):
        heads.train_heads(missing, heads.HeadsConfig())
    with pytest.raises(LaceError, match="there are some for: smile"):
        missing.select(["simle"])


def test_samples_are_labelled_once(gan_run, tiny_classifier, tmp_path):
    generator = export_generator(gan_run[0] / "checkpoint.pt", tmp_path / "generator.safetensors")
    classifier.save(tiny_classifier, tmp_path / "labeller.safetensors")
    arguments = (generator, Labellers([tmp_path / "labeller.safetensors"]))
    calls = []
    pairs = sampled_pairs(*arguments, count=20, directory=tmp_path, batch=8, progress=lambda *a: calls.append(a))
    assert calls[-1][:2] == (20, 20)
    again = sampled_pairs(*arguments, count=20, directory=tmp_path, batch=8, progress=lambda *a: pytest.fail("redone"))
    assert np.array_equal(pairs.w, again.w)
    assert np.array_equal(pairs.labels, again.labels)
    more = sampled_pairs(*arguments, count=24, directory=tmp_path, batch=8)
    assert np.array_equal(more.w[:20], pairs.w)


def test_several_labellers_give_their_mean_opinion(tiny_classifier, tmp_path):
    for name, certainty in (("a", 1.0), ("b", 3.0)):
        member = copy.deepcopy(tiny_classifier)
        with torch.no_grad():  # sure of the first attributes, not of the others
            member.out.bias[:10] += certainty * torch.arange(10)
        classifier.save(member, tmp_path / f"{name}.safetensors")
    pictures = np.random.default_rng(3).integers(0, 256, (2, 16, 16, 3), np.uint8).repeat(2000, axis=0)
    both = Labellers([tmp_path / "a.safetensors", tmp_path / "b.safetensors"])
    labels = both.label(pictures, np.random.default_rng(0))
    outputs = [member.model.outputs(pictures[[0, -1]]) for member in both.members]
    drawn = 0
    for i, (attribute, (low, high)) in enumerate(zip(both.attributes, tiny_classifier.spans, strict=True)):
        opinions = torch.stack([output[:, low:high] for output in outputs])
        mean = (opinions.softmax(dim=-1) if attribute.kind == "class" else opinions).mean(dim=0).numpy()
        for part, wanted in zip((labels[:2000, i], labels[2000:, i]), mean, strict=True):
            if attribute.kind == "value":
                assert part == pytest.approx(wanted[0], abs=1e-5)
            elif wanted.max() < SURE:
                assert np.isnan(part).all()
            else:
                shares = np.bincount(part.astype(int), minlength=high - low) / len(part)
                assert np.abs(shares - wanted).max() < 5 * 0.5 / 2000**0.5
                drawn += 1
    assert 0 < drawn < 14  # both happen


def test_steered_samples_join_the_pairs(gan_run, tiny_classifier, tmp_path):
    generator = export_generator(gan_run[0] / "checkpoint.pt", tmp_path / "generator.safetensors")
    classifier.save(tiny_classifier, tmp_path / "labeller.safetensors")
    labellers = Labellers([tmp_path / "labeller.safetensors"])
    pairs = sampled_pairs(generator, labellers, count=200, directory=tmp_path).select(["smile", "age"])
    trained = heads.train_heads(pairs, heads.HeadsConfig(up_dim=4, epochs=1))
    steered = steered_pairs(generator, trained.stacks, labellers, count=70, seed=1)
    assert steered.w.shape == (70, pairs.w.shape[1])
    again = steered_pairs(generator, trained.stacks, labellers, count=70, seed=1)
    assert np.array_equal(steered.w, again.w)
    both = joined(pairs, steered)
    assert both.source["steered"] == 70
    assert np.array_equal(both.w[70:], pairs.w)
    assert np.array_equal(both.labels[:70], steered.select(["smile", "age"]).labels)


def test_random_conditions_ask_for_all_classes_and_values_alike():
    smile = BundleAttribute("smile", "class", "smile", (0, 2), ("no", "yes"))
    age = BundleAttribute("age", "value", "age", (0, 1), range=(0.2, 0.9))
    asked = random_conditions([smile, age], 6400, np.random.default_rng(0))
    leaves = [leaf for condition in asked for leaf in getattr(condition, "parts", (condition,))]
    classes = [leaf.choice for leaf in leaves if leaf.name == "smile"]
    values = np.array([leaf.choice for leaf in leaves if leaf.name == "age"])
    assert len(asked) == 6400
    assert abs(classes.count("yes") / len(classes) - 0.5) < 0.05
    assert 0.2 <= values.min() < 0.21 and 0.89 < values.max() <= 0.9  # noqa: PT018
    assert abs(np.mean(values) - 0.55) < 0.02


# --- LACE's data files --------------------------------------------------------------------------------------------


@pytest.fixture
def ffhq(tmp_path):
    rng = np.random.default_rng(0)
    latents = rng.standard_normal((60, 1, 18, 6)).astype(np.float32)
    labels = np.empty((60, len(FFHQ)), object)
    for i, classes in enumerate(FFHQ.values()):
        labels[:, i] = rng.integers(0, len(classes), 60).tolist() if classes else rng.random(60).astype("f4")
    labels[3, 2] = None
    labels[4, 7] = np.float64(0.25)
    labels[5, 2] = -1
    (tmp_path / "all_latents.pickle").write_bytes(pickle.dumps({"Latent": latents}, protocol=4))
    (tmp_path / "att_light.pickle").write_bytes(pickle.dumps({"att_light": [labels]}, protocol=2))
    return tmp_path, latents


def test_the_data_of_ffhq_is_read_with_its_gaps(ffhq):
    directory, latents = ffhq
    pairs = lace_pairs(directory, "ffhq")
    assert np.array_equal(pairs.w, latents[:, 0, 0])
    assert [a.name for a in pairs.attributes] == list(FFHQ)
    assert np.isnan(pairs.labels[[3, 5], 2]).all()
    assert np.isnan(pairs.labels).sum() == 2
    assert pairs.labels[4, 7] == pytest.approx(0.25)
    train_rows, valid, test = pairs.split()
    assert test.tolist() == list(range(54, 60))
    assert sorted([*train_rows, *valid]) == list(range(54))
    assert valid.tolist() == np.random.RandomState(1234).permutation(54)[:6].tolist()


def test_other_data_sets_are_read(tmp_path):
    ws, pred = np.zeros((30, 18, 4), np.float32), np.zeros((30, 12))
    (tmp_path / "ws_latent.pickle").write_bytes(pickle.dumps({"ws_latent": [ws]}))
    (tmp_path / "pred.pickle").write_bytes(pickle.dumps({"pred": [pred]}))
    assert lace_pairs(tmp_path, "metfaces").labels.shape == (30, 12)
    (tmp_path / "pred0.3.pickle").write_bytes(pickle.dumps({"pred0.3": [np.full((30, 4), -1)]}))
    assert np.isnan(lace_pairs(tmp_path, "afhq").labels).all()


class Hostile:
    def __reduce__(self):
        return print, ("executed",)


@pytest.mark.parametrize("value", [Hostile(), "text", [1.0], np.zeros(2)])
def test_a_label_file_with_anything_but_numbers_is_refused(value, tmp_path, capsys):
    labels = np.empty((2, 2), object)
    labels[0, 0] = value
    (tmp_path / "labels.pickle").write_bytes(pickle.dumps({"labels": labels}))
    with pytest.raises(CheckpointError, match="cannot read"):
        read_array(tmp_path / "labels.pickle", "labels")
    assert capsys.readouterr().out == ""


# --- the command line ---------------------------------------------------------------------------------------------


def test_the_command_line_trains_heads(ffhq, capsys):
    directory, _ = ffhq
    arguments = ["heads", "--lace-data", str(directory), "--dataset", "ffhq", "--out", str(directory / "heads"),
                 "--attributes", "smile", "age", "--epochs", "1", "--threads", "1", "--json"]
    assert cli.main(arguments) == 0
    facts = json.loads(capsys.readouterr().out)
    assert set(facts["accuracy"]) == {"smile", "age"}
    assert load_heads(directory / "heads" / "smile.safetensors").attributes[0].classes == ("no", "yes")


def test_the_command_line_trains_a_generator(tmp_path, capsys):
    out = tmp_path / "run"
    assert cli.main(["gan", "--data", "render:32", "--size", "16", "--channels", "8,8,8", "--batch", "8", "--pictures",
                     "8", "--out", str(out), "--fid-samples", "0", "--threads", "1", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["pictures"] == 8
    assert load_generator(facts["generator"]).facts.resolution == 16


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["heads", "--gan", "x", "--out", "y"], "needs --labeller"),
        (["gan", "--data", "render:8", "--out", "y", "--size", "48"], "power of two"),
        (["gan", "--data", "render:8", "--out", "y", "--channels", "8,8"], "expected 5"),
        (["gan", "--data", "render:8", "--out", "y", "--size", "16", "--batch", "16"], "do not fill a batch"),
        (["gan", "--data", "render:8", "--out", "y", "--ada-flips"], "give --ada"),
        (["gan", "--data", "render:8", "--out", "y", "--tf32"], "leave one of them out"),
        (["score", "--gan", "nowhere.pt"], "nowhere.pt"),
        (["heads", "--lace-data", "nowhere", "--dataset", "ffhq", "--out", "y"], "there is no file"),
    ],
)
def test_bad_input_ends_with_2_and_one_message(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(arguments) == 2
    assert message in capsys.readouterr().err


def test_bad_usage_ends_with_2(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["classifier", "--role", "referee", "--out", "x"])
    assert caught.value.code == 2
    assert "judge" in capsys.readouterr().err
