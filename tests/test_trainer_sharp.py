"""Sharp heads: probabilities that hold what they promise, from votes on a generator's samples."""

import json
from dataclasses import replace

import numpy as np
import pytest

from engine.cli.console import BAD_INPUT, OK
from engine.errors import LaceError
from engine.reference.field import head
from exporter.heads import load_heads
from lace_trainer.attributes import Attribute
from lace_trainer.cli import main
from lace_trainer.heads import calibration, labelled, sharp
from lace_trainer.heads.labelled import Labelled, from_pairs, labelled_samples
from lace_trainer.heads.labellers import Labellers
from lace_trainer.heads.pairs import Pairs
from lace_trainer.heads.sharp import SharpConfig, train_sharp
from lace_trainer.judges import classifier
from tests.evaluation import made_once

SMILE, AGE = Attribute("smile", "class", ("no", "yes")), Attribute("age", "value")
CONFIG = SharpConfig(hidden=(16, 16), epochs=12, batch=128, learning_rate=1e-2)


def logistic_world(count=6000, held=2000, sharpness=3.0, seed=0, flipped=0.0):
    """w of 6 numbers; a smile as likely as a logistic curve of w[0] says, age = w[1] / 4 + 1/2. One labeller votes."""
    rng = np.random.default_rng(seed)
    psi = np.concatenate([np.ones(count), np.repeat([0.5, 1.0], held // 2)]).astype(np.float32)
    w = (rng.normal(size=(count + held, 6)) * psi[:, None]).astype(np.float32)
    truth = 1 / (1 + np.exp(-sharpness * w[:, 0]))
    smiles = (rng.random(len(w)) < truth) ^ (rng.random(len(w)) < flipped)
    votes = np.stack([1 - smiles, smiles, w[:, 1] / 4 + 0.5], axis=1).astype(np.float32)
    return Labelled(w, psi, votes, votes, (SMILE, AGE), held), truth


def promised(stack, w):
    return np.exp(calibration.log_softmax(head(stack.sharp.layers, w)[0]))[:, 1]


def test_a_sharp_head_knows_the_probability_and_not_only_the_class():
    data, truth = logistic_world()
    trained = train_sharp(data, CONFIG)
    assert np.abs(promised(trained.stacks[0], data.w[-2000:]) - truth[-2000:]).mean() < 0.03
    smile, age = trained.calibration["smile"], trained.calibration["age"]
    assert set(smile.ece) == {"0.5", "1"}
    assert max(smile.ece.values()) < 0.04
    assert 0.8 < smile.temperature < 1.25
    assert max(age.error.values()) < 0.02
    assert age.tolerance == calibration.LEAST_TOLERANCE


def test_noisy_labels_do_not_make_a_sharp_head_promise_too_much():
    """The recipe without a guard learns 500 labels by heart, of which 3 in 10 are wrong; latent.md, section 9."""
    data, _ = logistic_world(count=500, flipped=0.3, sharpness=9.0)
    config = replace(CONFIG, hidden=(96, 96, 96), epochs=60)
    trained = train_sharp(data, config)
    assert trained.best_epoch["smile"] < 30
    assert trained.calibration["smile"].temperature < calibration.WARN
    assert max(trained.calibration["smile"].ece.values()) < 0.08
    unguarded = logits_of_last_epoch(data, config)
    known = data.votes[-2000:, :2]
    assert calibration.temperature(unguarded[-2000:], known) > 2
    best = head(trained.stacks[0].sharp.layers, data.w[-2000:])[0]
    assert calibration.log_loss(best, known) < calibration.log_loss(unguarded[-2000:], known)


def logits_of_last_epoch(data, config):
    """The same training, of which the last epoch is taken and no temperature."""
    import torch

    kept = sharp.judged
    sharp.judged = lambda heads, *rest: -np.full(len(heads.sizes), next(counter))
    counter = iter(range(1000))
    try:
        trained = train_sharp(data, config)
    finally:
        sharp.judged = kept
    assert trained.best_epoch["smile"] == config.epochs
    assert torch.is_grad_enabled()
    return head(trained.stacks[0].sharp.layers, data.w)[0] * trained.calibration["smile"].temperature


def test_a_temperature_is_found_where_it_is_known():
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(40_000, 3)) * 2
    p = np.exp(calibration.log_softmax(logits))
    labels = np.eye(3)[(p.cumsum(axis=1) < rng.random((len(p), 1))).sum(axis=1).clip(max=2)]
    for wrong in (0.4, 1.0, 3.0):
        found = calibration.temperature(wrong * logits, labels)
        assert found == pytest.approx(wrong, rel=0.03)
        before, after = (calibration.expected_error(calibration.reliability(wrong * logits / t, labels))
                         for t in (1.0, found))
        assert after < 0.01
        assert before > 0.1 or wrong == 1.0


def test_the_reliability_of_the_likeliest_class_is_counted_in_bins():
    logits = np.log(np.array([[0.9, 0.1], [0.9, 0.1], [0.2, 0.8], [0.5, 0.5]]))
    votes = np.array([[1, 0], [0, 1], [0, 1.0], [0.5, 0.5]])
    found = calibration.reliability(logits, votes, bins=10)
    assert [b.count for b in found] == [1, 1, 2]
    np.testing.assert_allclose([b.accuracy for b in found], [0.5, 1.0, 0.5])
    assert calibration.expected_error(found) == pytest.approx((0.2 + 2 * 0.4) / 4)


def test_a_tolerance_is_twice_the_error_and_at_least_three_hundredths():
    assert calibration.tolerance(0.01) == 0.03
    assert calibration.tolerance(0.04) == 0.08


def test_sharp_heads_of_one_attribute_do_not_depend_on_the_others(tmp_path):
    data, _ = logistic_world(count=600, held=200)
    both = train_sharp(data, replace(CONFIG, epochs=2)).stacks[0]
    alone = train_sharp(data.select(["smile"]), replace(CONFIG, epochs=2)).stacks[0]
    for a, b in zip(both.sharp.layers, alone.sharp.layers, strict=True):
        np.testing.assert_allclose(a[0], b[0], rtol=1e-3, atol=1e-4)


def test_pairs_are_unanimous_votes_and_gaps_count_nothing():
    rng = np.random.default_rng(0)
    labels = np.stack([rng.integers(2, size=80), rng.random(80)], axis=1).astype(np.float32)
    labels[::4, 0] = np.nan
    pairs = Pairs(rng.normal(size=(80, 4)).astype(np.float32), labels, (SMILE, AGE), validation=20)
    data = from_pairs(pairs)
    assert data.held_out == 20
    assert np.isnan(data.votes[:, :2]).all(axis=1).sum() == 20
    assert set(np.unique(data.votes[~np.isnan(data.votes[:, 0]), :2])) == {0, 1}
    trained = train_sharp(data, replace(CONFIG, epochs=1))
    assert all(np.isfinite(weight).all() for stack in trained.stacks for weight, _ in stack.sharp.layers)


def test_too_few_pairs_are_refused():
    data, _ = logistic_world(count=10, held=2)
    with pytest.raises(LaceError, match="label more samples"):
        train_sharp(replace(data, held_out=0), CONFIG)
    data.votes[-2:, :2] = np.nan
    with pytest.raises(LaceError, match="'smile'"):
        train_sharp(data, CONFIG)


@pytest.fixture(scope="module")
def labellers(tmp_path_factory):
    """Two untrained labellers of the tiny world's pictures."""
    import torch

    folder, paths = tmp_path_factory.mktemp("labellers"), []
    for seed in (1, 2):
        torch.manual_seed(seed)
        model = classifier.Classifier(classifier.Shape((4, 8), (1,), size=8), classifier_attributes())
        paths.append(folder / f"{seed}.safetensors")
        classifier.save(model, paths[-1])
    return paths


def classifier_attributes():
    from lace_trainer.faces import ATTRIBUTES

    return ATTRIBUTES


def test_samples_of_a_bundle_are_labelled_once_at_all_truncations(labellers, tmp_path, tmp_path_factory, monkeypatch):
    bundle, _ = made_once(tmp_path_factory)
    source = labelled.BundleSource(bundle.path, threads=1)
    data = labelled_samples(source, Labellers(labellers), count=100, directory=tmp_path)
    assert data.held_out == 30
    assert np.unique(data.psi[-30:]).tolist() == pytest.approx([0.5, 0.7, 1.0])
    assert data.psi[:-30].min() >= 0.5
    sample = source.sampler.solve(None, [labelled.FIRST_SEED + 3])[0]
    average = bundle.field["mapping.w_avg"]
    np.testing.assert_allclose(data.w[3], average + data.psi[3] * (sample.w - average) / 0.7, atol=1e-5)
    for attribute, (low, high) in zip(data.attributes, data.spans, strict=True):
        if attribute.kind == "class":
            np.testing.assert_allclose(data.votes[:, low:high].sum(axis=1), 1, atol=1e-5)
    monkeypatch.setattr(labelled, "look", None)
    again = labelled_samples(source, Labellers(labellers), count=100, directory=tmp_path)
    np.testing.assert_array_equal(again.votes, data.votes)
    pairs = data.pairs(0)
    assert len(pairs.w) == 100


def test_samples_are_sought_where_the_posterior_goes_and_never_held_out(labellers, tmp_path, tmp_path_factory):
    bundle, _ = made_once(tmp_path_factory)
    plain = labelled_samples(labelled.BundleSource(bundle.path, threads=1), Labellers(labellers), count=100,
                             directory=tmp_path).select(["smile", "age"])
    stacks = train_sharp(plain, replace(CONFIG, epochs=1)).stacks
    sought = labelled.sought_samples(bundle.path, stacks, Labellers(labellers), count=70, seed=1, threads=1)
    again = labelled.sought_samples(bundle.path, stacks, Labellers(labellers), count=70, seed=1, threads=1)
    np.testing.assert_array_equal(again.likely, sought.likely)
    assert sought.w.shape == (70, plain.w.shape[1])
    both = labelled.joined(plain, sought)
    assert (len(both.w), both.held_out, both.source["sought"]) == (200, plain.held_out, 70)
    np.testing.assert_array_equal(both.w[-plain.held_out :], plain.w[-plain.held_out :])
    np.testing.assert_array_equal(both.votes[:70], sought.select(["smile", "age"]).votes)


def test_the_command_line_trains_both_stacks_from_a_bundle(labellers, tmp_path, tmp_path_factory, capsys):
    bundle, _ = made_once(tmp_path_factory)
    options = ("heads", "--bundle", str(bundle.path), "--labeller", str(labellers[0]), "--samples", "600",
               "--attributes", "smile", "age", "--epochs", "1", "--sharp-epochs", "2", "--hidden", "8", "8",
               "--threads", "1", "--json")
    assert main([*options, "--sought", "64", "--out", str(tmp_path)]) == OK
    facts = json.loads(capsys.readouterr().out)
    assert facts["sharp_pairs"] == 600 + 3 * 60 + 64
    assert set(facts["calibration"]) == {"smile", "age"}
    names = {path.name for path in tmp_path.iterdir()}
    assert {"smile.safetensors", "age.safetensors", "reliability.png"} <= names
    stack = load_heads(tmp_path / "smile.safetensors")
    assert len(stack.layers) == 4
    assert [weight.shape[0] for weight, _ in stack.sharp.layers] == [8, 8, 2]
    assert stack.sharp.calibrated
    assert set(stack.sharp.ece["smile"]) == {"0.5", "0.7", "1"}
    assert stack.attributes[0].provenance["sharp"]["trained_on"]["bundle"] == bundle.hash
    assert load_heads(tmp_path / "age.safetensors").attributes[0].tolerance >= calibration.LEAST_TOLERANCE
    assert main([*options, "--no-smooth", "--sought", "64", "--out", str(tmp_path)]) == OK
    assert load_heads(tmp_path / "smile.safetensors").layers  # what was there stays
    alone = load_heads(tmp_path / "smile.sharp.safetensors")
    assert not alone.layers
    assert all(np.array_equal(a, b) for a, b in zip(alone.sharp.layers[0], stack.sharp.layers[0], strict=True))
    assert main([*options, "--no-sharp", "--sought", "64", "--out", str(tmp_path / "x")]) == BAD_INPUT
    assert "--sought" in capsys.readouterr().err
    assert main([*options, "--no-smooth", "--no-sharp", "--out", str(tmp_path / "x")]) == BAD_INPUT
    assert main(["heads", "--bundle", str(bundle.path), "--out", str(tmp_path / "x")]) == BAD_INPUT
    assert "needs --labeller" in capsys.readouterr().err
