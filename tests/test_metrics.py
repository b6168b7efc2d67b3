"""Fréchet distance, precision and recall, and the features they are made of."""

import math

import numpy as np
import pytest
import torch
from scipy import linalg

from engine.errors import LaceError
from exporter.generators.stylegan2 import Mapping, Synthesis
from lace_trainer.faces import ATTRIBUTES
from lace_trainer.faces.pictures import reference_features
from lace_trainer.gan.score import data_features, sampled_features, score
from lace_trainer.judges import classifier, metrics
from lace_trainer.judges.metrics import (
    Moments,
    features,
    frechet_distance,
    moments,
    precision_recall,
)


@pytest.fixture(scope="module")
def judge():
    torch.manual_seed(0)
    return classifier.Classifier(classifier.Shape((4, 8), (1,), size=16), ATTRIBUTES).eval()


@pytest.fixture(scope="module")
def generator():
    torch.manual_seed(0)
    return Mapping(8, 8, num_layers=2), Synthesis(8, {4: 8, 8: 8, 16: 8})


def pictures(n: int, size: int = 16) -> np.ndarray:
    return np.random.default_rng(n).integers(0, 256, (n, size, size, 3), dtype=np.uint8)


# --- features -----------------------------------------------------------------------------------------------------


def test_features_are_the_mean_of_the_last_stage(judge):
    shown = pictures(10)
    found = features(judge, shown, batch=3)
    maps = judge.maps(classifier.as_input(torch.from_numpy(shown)))
    torch.testing.assert_close(torch.from_numpy(found), maps.mean(dim=(2, 3)))
    assert found.dtype == np.float32
    # What is averaged is what the classifier's last layer reads.
    torch.testing.assert_close(judge.out(maps.flatten(1)), judge(classifier.as_input(torch.from_numpy(shown))))


def test_pictures_of_another_size_are_resized(judge):
    plain = np.repeat(pictures(4, 1), 16, axis=1).repeat(16, axis=2)
    large = plain.repeat(2, axis=1).repeat(2, axis=2)
    np.testing.assert_allclose(features(judge, large), features(judge, plain), rtol=1e-4, atol=1e-6)
    assert features(judge, plain[:0]).shape == (0, 8)


def test_the_reference_is_kept_for_each_judge(judge, tmp_path, monkeypatch):
    first = reference_features(judge, 6, cache=tmp_path)
    other = classifier.Classifier(judge.shape, ATTRIBUTES).eval()
    assert not np.array_equal(reference_features(other, 6, cache=tmp_path), first)
    monkeypatch.setattr("lace_trainer.faces.pictures.features", lambda *_: pytest.fail("computed again"))
    assert np.array_equal(reference_features(judge, 6, cache=tmp_path), first)
    assert len(list(tmp_path.iterdir())) == 2


def test_no_training_sees_the_reference():
    seeds = {classifier.VALIDATION_SEED, *(role.pictures_seed for role in classifier.ROLES.values())}
    assert metrics.REFERENCE_SEED not in seeds


# --- the Fréchet distance -----------------------------------------------------------------------------------------


def test_the_distance_of_independent_normals_has_a_closed_form():
    a = Moments(np.zeros(3), np.diag([1.0, 4.0, 9.0]), 100)
    b = Moments(np.array([1.0, 2.0, 2.0]), np.diag([4.0, 4.0, 0.0]), 100)
    assert frechet_distance(a, b) == pytest.approx(9 + 1 + 0 + 9)


def test_the_distance_is_that_of_the_matrix_root():
    rng = np.random.default_rng(0)
    a, b = moments(rng.standard_normal((60, 5)) @ rng.random((5, 5))), moments(rng.standard_normal((70, 5)) + 0.3)
    overlap = linalg.sqrtm(a.covariance @ b.covariance).real
    expected = np.square(a.mean - b.mean).sum() + np.trace(a.covariance + b.covariance - 2 * overlap)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-9)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)


def test_nearly_singular_covariances_give_a_number():
    rng = np.random.default_rng(1)
    few, many = rng.standard_normal((6, 40)), rng.standard_normal((50, 40))
    many[:, 20:] = 1e-9 * many[:, :20]
    distance = frechet_distance(moments(few), moments(many))
    assert math.isfinite(distance)
    assert distance > 1
    assert frechet_distance(moments(few), moments(few[::-1])) == pytest.approx(0, abs=1e-7)


@pytest.mark.parametrize("rows", [np.zeros((1, 3)), np.full((4, 3), np.nan), np.zeros(5)])
def test_features_without_a_covariance_are_refused(rows):
    with pytest.raises(LaceError, match="two or more finite rows"):
        moments(rows)


# --- precision and recall -----------------------------------------------------------------------------------------


def by_definition(real: np.ndarray, fake: np.ndarray, k: int) -> tuple[float, float]:
    """Share of b that lies within a ball of a, both ways, one pair at a time."""

    def covered(a, b):
        reach = [sorted(np.linalg.norm(x - y) for j, y in enumerate(a) if j != i)[k - 1] for i, x in enumerate(a)]
        return np.mean([any(np.linalg.norm(y - x) <= r for x, r in zip(a, reach, strict=True)) for y in b])

    return covered(real, fake), covered(fake, real)


@pytest.mark.parametrize("block", [7, 1000])
def test_precision_and_recall_follow_their_definition(block, monkeypatch):
    monkeypatch.setattr(metrics, "BLOCK", block)
    rng = np.random.default_rng(2)
    real, fake = rng.standard_normal((40, 3)).astype("f4"), rng.normal(1.2, 0.8, (30, 3)).astype("f4")
    found = precision_recall(real, fake)
    assert found == pytest.approx(by_definition(real, fake, 3))
    assert 0.2 < min(found) < max(found) < 1


def test_a_lost_mode_costs_recall_and_a_wrong_one_precision():
    rng = np.random.default_rng(3)
    left, right = rng.standard_normal((2, 100, 4)).astype("f4") + np.array([0, 50], "f4")[:, None, None]
    both = np.concatenate([left, right])
    precision, recall = precision_recall(both, left + 0.01)
    assert precision == 1
    assert 0.49 < recall <= 0.5
    precision, recall = precision_recall(left, both)
    assert precision == pytest.approx(0.5)
    assert recall == 1


def test_too_few_features_have_no_neighbours():
    with pytest.raises(LaceError, match="more than k = 3"):
        precision_recall(np.zeros((3, 2), "f4"), np.zeros((9, 2), "f4"))


# --- the score of a generator -------------------------------------------------------------------------------------


def test_a_sample_does_not_depend_on_their_number(judge, generator):
    few = sampled_features(judge, *generator, 5, batch=4)
    many = sampled_features(judge, *generator, 9, batch=4)
    np.testing.assert_allclose(few, many[:5], rtol=1e-4, atol=1e-5)
    assert not np.array_equal(sampled_features(judge, *generator, 5, batch=4, seed=1), few)


def test_a_score_says_what_it_compared(judge, generator):
    calls = []
    reference = data_features(judge, pictures(40), 32)
    found = score(judge, *generator, reference, count=24, progress=lambda *call: calls.append(call))
    assert found["samples"] == 24
    assert found["reference_pictures"] == 32
    assert found["fid"] > 0
    assert 0 <= found["precision"] <= 1
    assert calls[-1][:2] == (24, 24)


def test_a_generator_with_classes_has_no_single_score(judge):
    with pytest.raises(LaceError, match="has classes"):
        sampled_features(judge, Mapping(8, 8, c_dim=3), Synthesis(8, {4: 8, 8: 8}), 4)
