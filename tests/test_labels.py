"""Anybody's labels: classifiers of others beside ours, tables, boundaries, and what is said of each attribute."""

import csv
import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from engine.classifier import ImageClassifier
from engine.cli.console import BAD_INPUT, OK
from engine.errors import LaceError
from engine.sampler import Sampler
from exporter.heads import load_heads
from lace_trainer.attributes import Attribute
from lace_trainer.cli import main
from lace_trainer.heads import advice, drawn, labelled
from lace_trainer.heads.agreement import agreement
from lace_trainer.heads.boundaries import logistic
from lace_trainer.heads.labellers import Labellers
from lace_trainer.heads.sharp import SharpConfig, train_sharp
from lace_trainer.judges import classifier
from lace_trainer.judges.onnx_export import export_classifier
from lace_trainer.tables import column_name, labels_of, read_table
from tests.classifiers import linear, write_spec
from tests.evaluation import made_once, make_judge
from tests.test_trainer_sharp import SMILE, logistic_world

PICTURES = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3), dtype=np.uint8)


@pytest.fixture
def bundle(tmp_path_factory):
    return made_once(tmp_path_factory)[0]


def bright(path, **attributes):
    """Whether a picture is reddish, and how bright it is: what a random generator's pictures do show."""
    weight, bias = np.array([[20.0, 0.3], [-20.0, 0.3], [0.0, 0.3]]), np.array([0.0, 0.05])
    return write_spec(linear(path, weight, bias), {
        "reddish": {"output": "y", "columns": [0, 1], "activation": "sigmoid"},
        "bright": {"output": "y", "columns": [1, 2], "kind": "value"}, **attributes})


# --- our classifiers as ONNX -----------------------------------------------------------------------------------------


def test_our_classifier_as_onnx_says_what_torch_says(tmp_path):
    classifier.save(make_judge(), tmp_path / "judge.safetensors")
    model = classifier.load(tmp_path / "judge.safetensors")
    path = export_classifier(model, tmp_path / "judge.onnx", same_as=tmp_path / "judge.safetensors")
    ours, theirs = Labellers([tmp_path / "judge.safetensors"]), Labellers([path])
    assert theirs.attributes == ours.attributes
    np.testing.assert_allclose(theirs.opinions(PICTURES), ours.opinions(PICTURES), atol=1e-5)
    assert ours.hashes[0] in theirs.hashes  # the same network: who labels with one must not judge with the other
    np.testing.assert_allclose(ImageClassifier(path).predict(PICTURES), model.predict(PICTURES), atol=1e-5)


def test_labellers_of_both_kinds_are_asked_about_what_each_knows(tmp_path):
    model = make_judge()
    classifier.save(model, tmp_path / "ours.safetensors")
    smile = {"smile": {"output": "y", "columns": [0, 1], "activation": "sigmoid"}}
    both = Labellers([tmp_path / "ours.safetensors", bright(tmp_path / "theirs.onnx", **smile)])
    names = [a.name for a in both.attributes]
    assert names[-2:] == ["reddish", "bright"]
    assert [len(voters) for voters in both.voters] == [2 if name == "smile" else 1 for name in names]
    opinions = both.opinions(PICTURES)
    likely, votes = both.likely(opinions), both.votes(opinions)
    low, high = both.spans[names.index("smile")]
    ours, theirs = opinions[0, :, low:high], opinions[1, :, low:high]
    np.testing.assert_allclose(likely[:, low:high], (ours + theirs) / 2, atol=1e-6)
    assert set(np.unique(votes[:, low:high])) <= {0, 0.5, 1}
    labels = both.label(PICTURES, np.random.default_rng(0))
    np.testing.assert_array_equal(labels[:, -2], opinions[1][:, both.spans[-2][0] :][:, :2].argmax(axis=1))
    assert np.isnan(labels[:, names.index("smile")]).any()  # two that disagree give no label


def test_labellers_that_mean_different_things_by_a_name_are_refused(tmp_path):
    first = bright(tmp_path / "a.onnx")
    other = write_spec(linear(tmp_path / "b.onnx", np.eye(3), np.zeros(3)),
                       {"reddish": {"output": "y", "classes": ["a", "b", "c"]}})
    with pytest.raises(LaceError, match="'reddish' as class"):
        Labellers([first, other])


def test_heads_are_trained_from_a_classifier_of_others(tmp_path, bundle, capsys):
    path = bright(tmp_path / "bright.onnx")
    options = ("heads", "--bundle", str(bundle.path), "--labeller", str(path), "--samples", "1500", "--epochs", "2",
               "--sharp-epochs", "100", "--hidden", "24", "24", "--threads", "1", "--json")
    assert main([*options, "--out", str(tmp_path / "heads")]) == OK
    facts = json.loads(capsys.readouterr().out)
    worth = facts["worth"]
    assert worth["reddish"]["skill"] > 0.3
    assert worth["reddish"]["mirrored"] > 0.99  # a mean has no sides
    assert worth["bright"]["skill"] > 0.3
    assert {"reliability.png", "confusion.png"} <= {file.name for file in (tmp_path / "heads").iterdir()}
    sharp = load_heads(tmp_path / "heads" / "reddish.safetensors").attributes[0].provenance["sharp"]
    assert ImageClassifier(path).hash in sharp["trained_on"]["labellers"]
    assert sharp["worth"] == worth["reddish"]["worth"]


def test_a_labeller_without_a_spec_ends_with_one_sentence(tmp_path, bundle, capsys):
    path = linear(tmp_path / "mood.onnx", np.eye(3), np.zeros(3))
    arguments = ["heads", "--bundle", str(bundle.path), "--labeller", str(path), "--out", str(tmp_path / "heads")]
    assert main(arguments) == BAD_INPUT
    said = capsys.readouterr().err
    assert "mood.spec.json" in said
    assert (tmp_path / "mood.spec.json").is_file()
    assert not (tmp_path / "heads").exists()


# --- tables -----------------------------------------------------------------------------------------------------------


def fill_in(folder, name, say):
    """Write what ``say`` finds in each picture into a column of a drawn table."""
    with open(folder / drawn.TABLE, encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        row[name] = say(np.asarray(Image.open(folder / row["file"])))
    rows.reverse()  # the order of a table does not matter
    with open(folder / drawn.TABLE, "w", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)


def test_drawn_samples_are_labelled_by_hand_and_become_heads(tmp_path, bundle, capsys):
    folder = tmp_path / "drawn"
    assert main(["draw", str(bundle.path), "--count", "400", "--out", str(folder), "--attributes", "tint",
                 "--threads", "1", "--seed", "5"]) == OK
    assert len(list(folder.glob("*.png"))) == 400
    assert "tint" in (folder / drawn.TABLE).read_text().splitlines()[0]
    options = ("heads", "--bundle", str(bundle.path), "--table", str(folder / drawn.TABLE), "--epochs", "1",
               "--sharp-epochs", "100", "--hidden", "16", "--threads", "1", "--json")
    assert main([*options, "--out", str(tmp_path / "no")]) == BAD_INPUT
    assert "the column 'tint'" in capsys.readouterr().err
    fill_in(folder, "tint", lambda picture: "red" if picture[..., 0].mean() > picture[..., 1].mean() else "green")
    capsys.readouterr()
    assert main([*options, "--out", str(tmp_path / "heads")]) == OK
    facts = json.loads(capsys.readouterr().out)
    assert facts["worth"]["tint"]["skill"] > 0.3
    assert any("only" in said and "labels" in said for said in facts["worth"]["tint"]["warnings"])
    head = load_heads(tmp_path / "heads" / "tint.safetensors")
    assert head.attributes[0].classes == ("green", "red")
    assert head.attributes[0].provenance["sharp"]["trained_on"]["kind"] == "table"


def test_a_table_speaks_of_seeds_or_of_latents(tmp_path, bundle):
    folder = tmp_path / "drawn"
    sampler = Sampler(bundle, threads=1)
    drawn.draw(sampler, folder, count=80, first=3)
    fill_in(folder, "light", lambda picture: f"{picture.mean() / 255:.3f}")
    table = read_table(folder / drawn.TABLE)
    by_seed = drawn.labelled_table(sampler, table)
    latents = load_file(folder / drawn.LATENTS)
    np.save(tmp_path / "w.npy", latents["w"][::-1])
    by_latent = drawn.labelled_table(sampler, table, latents=tmp_path / "w.npy")
    np.testing.assert_allclose(by_seed.w, by_latent.w, atol=1e-6)
    np.testing.assert_array_equal(by_seed.votes, by_latent.votes)
    assert set(by_seed.psi[-by_seed.held_out :].tolist()) <= {0.5, np.float32(0.7).item(), 1.0}
    numbered = replace(table, columns={**table.columns, "latent": [str(79 - i) for i in range(80)]})
    np.save(tmp_path / "w.npy", latents["w"])
    by_number = drawn.labelled_table(sampler, numbered, latents=tmp_path / "w.npy")
    np.testing.assert_allclose(by_number.w, by_seed.w, atol=1e-6)
    np.save(tmp_path / "few.npy", latents["w"][:9])
    with pytest.raises(LaceError, match="holds 9 latents"):
        drawn.labelled_table(sampler, table, latents=tmp_path / "few.npy")
    other = load_file(folder / drawn.LATENTS)
    from safetensors.numpy import save_file

    save_file(other, folder / drawn.LATENTS, metadata={"bundle": "0" * 64})
    with pytest.raises(LaceError, match="drawn by a bundle with the hash 000000000000"):
        drawn.labelled_table(sampler, table)


def table_of(tmp_path, text, name="t.csv"):
    (tmp_path / name).write_text(text, encoding="utf-8")
    return read_table(tmp_path / name)


def test_columns_become_classes_and_values(tmp_path):
    table = table_of(tmp_path, "seed;smile;hair;age;stars;5_o'Clock\n1;yes;red;30;3;-1\n2;no;;41;1;1\n"
                               "3;yes;black;nan;2;1\n")
    attributes, labels = labels_of(table, None, {"age": (0.01, 0.0)})
    assert attributes == (
        Attribute("smile", "class", ("no", "yes")), Attribute("hair", "class", ("black", "red")),
        Attribute("age", "value"), Attribute("stars", "class", ("1", "2", "3")),
        Attribute("_5_o_Clock", "class", ("no", "yes")))
    np.testing.assert_allclose(labels[:, 0], [1, 0, 1])
    np.testing.assert_allclose(labels[:, 1], [1, np.nan, 0])
    np.testing.assert_allclose(labels[:, 2], [0.3, 0.41, np.nan], rtol=1e-6)
    np.testing.assert_allclose(labels[:, 3:], [[2, 0], [0, 1], [1, 1]])


@pytest.mark.parametrize(("text", "said"), [
    ("", "0 rows"), ("a,b\n", "0 rows"), ("a,a\n1,2\n", "a different name"), ("a,b\n1\n", "1 entries in row 1"),
    ("seed,mood\n1,\n2,\n", "is empty"), ("seed,mood\n1,x\n2,x\n", "says 'x' of every picture"),
    ("seed,age\n" + "".join(f"{i},{i}\n" for i in range(40)), "--scale age=0.01"),
    ("seed\n1\n", "no column of labels"),
    ("seed,mood\n" + "".join(f"{i},text {i}\n" for i in range(300)), "300 different texts"),
])
def test_a_table_that_says_nothing_is_one_sentence(tmp_path, text, said):
    with pytest.raises(LaceError, match=said):
        labels_of(table_of(tmp_path, text), None, {})


def test_the_list_of_celeba_is_read(tmp_path):
    text = "2\n5_o_Clock_Shadow Smiling \n000001.jpg -1  1\n000002.jpg  1 -1\n"
    table = table_of(tmp_path, text, "list_attr_celeba.txt")
    assert table.columns["file"] == ["000001.jpg", "000002.jpg"]
    attributes, labels = labels_of(table, ["Smiling"], {})
    assert attributes == (Attribute("Smiling", "class", ("no", "yes")),)
    np.testing.assert_array_equal(labels, [[1], [0]])
    assert column_name("image_id", 0) == "file"


# --- boundaries -------------------------------------------------------------------------------------------------------


def test_a_boundary_becomes_a_head_and_labels_calibrate_it(tmp_path, bundle, capsys):
    labeller = bright(tmp_path / "bright.onnx")
    data = labelled.labelled_samples(labelled.BundleSource(bundle.path, threads=1), Labellers([labeller]), count=1200,
                                     directory=tmp_path / "pairs")
    w, yes = data.w[:1200], data.votes[:1200, 1] > 0.5
    normal = w[yes].mean(axis=0) - w[~yes].mean(axis=0)
    np.save(tmp_path / "red.npy", 7 * normal[None])
    options = ["heads", "--bundle", str(bundle.path), "--boundary", f"reddish={tmp_path / 'red.npy'}", "--threads", "1",
               "--json"]
    assert main([*options, "--out", str(tmp_path / "plain")]) == OK
    plain = load_heads(tmp_path / "plain" / "reddish.safetensors")
    assert plain.sharp is None
    capsys.readouterr()
    assert main([*options, "--labeller", str(labeller), "--samples", "1200", "--attributes", "reddish", "--no-smooth",
                 "--cache", str(tmp_path / "pairs"), "--sharp-epochs", "1", "--out", str(tmp_path / "sharp")]) == OK
    facts = json.loads(capsys.readouterr().out)
    head = load_heads(tmp_path / "sharp" / "reddish.safetensors")
    assert head.sharp.calibrated
    assert len(head.layers) == len(head.sharp.layers) == 1
    unit = normal / np.linalg.norm(normal)
    np.testing.assert_allclose(np.abs(head.layers[0][0][1] @ unit), np.linalg.norm(head.layers[0][0][1]), rtol=1e-4)
    share = yes.mean()
    guess = -(share * np.log(share) + (1 - share) * np.log(1 - share))
    assert facts["calibration"]["reddish"]["log_loss"]["1"] < 0.95 * guess
    assert main([*options[:3], "--boundary", "reddish", "--out", str(tmp_path / "x")]) == BAD_INPUT
    np.save(tmp_path / "red.npy", np.ones(5))
    assert main([*options, "--out", str(tmp_path / "x")]) == BAD_INPUT
    assert "this bundle's boundaries have (1, 16) numbers" in capsys.readouterr().err


def test_place_and_scale_of_a_boundary_are_found_where_they_are_known():
    rng = np.random.default_rng(0)
    x = rng.normal(size=20_000) * 3
    yes = rng.random(20_000) < 1 / (1 + np.exp(-(1.5 * x - 2)))
    slope, place = logistic(x, yes.astype(float))
    assert slope == pytest.approx(1.5, rel=0.05)
    assert place == pytest.approx(-2, rel=0.05)
    slope, _ = logistic(x, (x > 0).astype(float))  # separable: sure, and finite
    assert 10 < slope < 1000


# --- what is said of an attribute -------------------------------------------------------------------------------------


def test_a_labeller_agrees_with_itself_on_mirrored_pictures_also_where_sides_change():
    side = Attribute("side", "class", ("left", "front", "right"))
    rng = np.random.default_rng(0)
    plain = rng.integers(3, size=2000)
    turned = np.where(rng.random(2000) < 0.9, 2 - plain, rng.integers(3, size=2000))
    found = agreement(side, np.eye(3)[plain], np.eye(3)[turned])
    assert found.sides == ("left", "right")
    assert found.rate == pytest.approx(0.933, abs=0.02)
    yaw = Attribute("yaw", "value")
    values = rng.uniform(size=(500, 1))
    assert agreement(yaw, values, 1 - values).sides == ("low", "high")
    assert agreement(yaw, values, 1 - values).rate > 0.97
    assert agreement(yaw, values, values).sides == ()
    noise = agreement(SMILE, np.eye(2)[rng.integers(2, size=4000)], np.eye(2)[rng.integers(2, size=4000)])
    assert noise.rate == pytest.approx(0.5, abs=0.05)


def judged(**world) -> advice.Report:
    data, _ = logistic_world(**world)
    data = data.select(["smile"])
    trained = train_sharp(data, SharpConfig(hidden=(16, 16), epochs=12, batch=128, learning_rate=1e-2))
    return advice.reports(data, trained.stacks, list(trained.calibration.values()))[0]


def test_an_attribute_that_the_latent_decides_is_worth_offering():
    report = judged(sharpness=12.0)
    assert report.worth == advice.YES
    assert not report.warnings
    assert min(report.sure.values()) > 0.2
    assert abs(report.promised - report.kept) < 0.03


def test_an_attribute_that_the_latent_does_not_decide_is_not():
    report = judged(sharpness=0.1)
    assert report.worth == advice.NO
    assert any("can hardly be read from the latent" in said for said in report.warnings)


def test_few_and_one_sided_labels_are_said():
    few = judged(count=300, held=400)
    assert any(said.startswith("only 300 labels") for said in few.warnings)
    data, _ = logistic_world(sharpness=9.0)
    rare = data.w[:, 0] < -2.6
    votes = np.stack([rare, ~rare, data.votes[:, 2]], axis=1).astype(np.float32)
    data = replace(data, votes=votes, likely=votes).select(["smile"])
    trained = train_sharp(data, SharpConfig(hidden=(16,), epochs=4, batch=128, learning_rate=1e-2))
    report = advice.reports(data, trained.stacks, list(trained.calibration.values()))[0]
    assert any("say 'no'" in said for said in report.warnings)


@pytest.mark.parametrize("arguments", [
    ("--bundle", "demo"), ("--gan", "x"), ("--gan", "x", "--table", "t.csv", "--labeller", "l.onnx"),
    ("--bundle", "demo", "--labeller", "l.onnx", "--table", "t.csv"), ("--bundle", "demo", "--labeller", "l.onnx",
                                                                       "--latents", "w.npy"),
    ("--bundle", "demo", "--labeller", "l.onnx", "--scale", "age=0.01"),
])
def test_sources_of_labels_that_do_not_fit_are_refused(tmp_path, arguments, capsys):
    assert main(["heads", *arguments, "--out", str(tmp_path / "x")]) == BAD_INPUT
    assert capsys.readouterr().err.count("\n") <= 3
