"""The embedding that tells people apart."""

import json

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from engine.errors import CheckpointError, LaceError
from lace_trainer import cli
from lace_trainer.faces import ATTRIBUTES, IDENTITY
from lace_trainer.faces.pictures import portraits
from lace_trainer.judges import classifier, identity
from lace_trainer.judges.identity import IdentityConfig, auc, contrast, pairs

TINY = classifier.Shape((4, 8), (1,), size=16)
CONFIG = IdentityConfig(dim=8, steps=4, people=6, views=2, precision="fp32")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    directory = tmp_path_factory.mktemp("people")
    people, held_out = portraits(8, 3, 16, 1, directory), portraits(6, 3, 16, 2, directory)
    return identity.train(people, CONFIG, held_out=held_out, shape=TINY)


def test_views_of_a_person_share_the_identity_and_nothing_else(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr("lace_trainer.faces.pictures.render", lambda factors, size: seen.append(factors) or np.zeros(
        (len(factors), size, size, 3), np.uint8))
    assert portraits(5, 3, 16, 1, tmp_path).shape == (5, 3, 16, 16, 3)
    people = seen[0].identity.reshape(5, 3, len(IDENTITY))
    assert (people == people[:, :1]).all()
    assert len(np.unique(people[:, 0, 0])) == 5
    assert (seen[0].labels.reshape(5, 3, len(ATTRIBUTES)).std(axis=1)[:, 0] > 0).all()
    assert (seen[0].scene.reshape(5, 3, -1).std(axis=1) > 0).all()


def test_the_contrast_is_the_mean_over_partners():
    embedded = F.normalize(torch.randn(3, 2, 5), dim=2)
    rows, losses = embedded.flatten(0, 1), []
    for i in range(6):
        partner = i ^ 1
        others = torch.stack([rows[i] @ rows[j] / 0.1 for j in range(6) if j != i])
        losses.append(torch.logsumexp(others, 0) - rows[i] @ rows[partner] / 0.1)
    torch.testing.assert_close(contrast(embedded), torch.stack(losses).mean())
    together = F.normalize(torch.eye(3)[:, None].expand(3, 2, 3), dim=2)
    assert contrast(together) < 1e-3


def test_the_verification_counts_pairs():
    same, different = np.array([0.9, 0.5]), np.array([0.1, 0.5, 0.6, 0.2])
    assert auc(same, different) == pytest.approx((4 + 2 + 0.5) / 8)
    rows = np.eye(3, dtype=np.float32)[:, None].repeat(2, axis=1)
    alike, unlike = pairs(rows)
    assert alike.tolist() == [1, 1, 1]
    assert unlike.tolist() == [0] * 12


def test_an_embedding_survives_its_file(trained, tmp_path):
    identity.save(trained, tmp_path / "identity.safetensors")
    loaded = identity.load(tmp_path / "identity.safetensors")
    pictures = np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3), dtype=np.uint8)
    rows = loaded.embed(pictures, batch=2)
    np.testing.assert_allclose(rows, trained.embed(pictures), atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, rtol=1e-5)
    assert loaded.metadata["training"]["dim"] == 8
    assert set(loaded.metadata["verification"]) == {"auc", "accuracy", "threshold", "same", "different"}
    assert loaded.embed(pictures.repeat(2, axis=1).repeat(2, axis=2)).shape == (5, 8)
    with pytest.raises(CheckpointError, match="expected a file of `lace-train classifier`"):
        classifier.load(tmp_path / "identity.safetensors")


def test_another_file_is_not_taken_for_an_embedding(tmp_path):
    classifier.save(classifier.Classifier(TINY, ATTRIBUTES), tmp_path / "classifier.safetensors")
    with pytest.raises(CheckpointError, match="expected a file of `lace-train identity`"):
        identity.load(tmp_path / "classifier.safetensors")


def test_too_few_people_are_refused(tmp_path):
    with pytest.raises(LaceError, match="at least 6 in 2"):
        identity.train(portraits(4, 3, 16, 1, tmp_path), CONFIG, held_out=torch.empty(0), shape=TINY)


def test_the_embedding_of_the_package_knows_people_it_never_saw(tmp_path):
    shipped = identity.load()
    assert shipped.metadata["verification"]["auc"] > 0.98
    people = portraits(24, 4, 64, 77, tmp_path)
    assert identity.verify(shipped, people.numpy())["auc"] > 0.95


def test_the_command_line_trains_an_embedding(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(identity, "SHAPE", TINY)
    monkeypatch.setattr(identity.train, "__kwdefaults__", identity.train.__kwdefaults__ | {"shape": TINY})
    arguments = ["identity", "--people", "48", "--views", "4", "--held-out", "8", "--steps", "2", "--precision", "fp32",
                 "--out", str(tmp_path / "identity.safetensors"), "--threads", "1", "--json"]
    assert cli.main(arguments) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["auc"] == identity.load(tmp_path / "identity.safetensors").metadata["verification"]["auc"]
