"""Adversarial training: steps, penalties, checkpoints, distances in training, the command line."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from engine.errors import BackendError, CheckpointError, LaceError
from exporter.checkpoints import load_generator, training_record
from lace_trainer import cli
from lace_trainer.faces import ATTRIBUTES
from lace_trainer.faces.pictures import rendered
from lace_trainer.gan import ada
from lace_trainer.gan.config import GanConfig
from lace_trainer.gan.feature_discriminator import FeatureDiscriminator
from lace_trainer.gan.generator_file import export_generator
from lace_trainer.gan.loop import resumed, train
from lace_trainer.gan.losses import path_lengths, r1_penalty
from lace_trainer.gan.record import Fid
from lace_trainer.gan.score import data_features
from lace_trainer.gan.training import Training, usable
from lace_trainer.judges import classifier
from lace_trainer.judges.metrics import moments

SMALL = GanConfig(z_dim=8, w_dim=8, mapping_layers=2, channels={4: 8, 8: 8, 16: 8}, batch=8, r1_interval=2,
                  precision="fp32")
FULL = replace(SMALL, path_length=2.0, ada=0.01, ada_flips=True, noise=True)


@pytest.fixture(scope="module")
def faces(tmp_path_factory):
    return rendered(64, 16, 3, tmp_path_factory.mktemp("faces"))[0]


@pytest.fixture(scope="module")
def run(faces, tmp_path_factory):
    directory = tmp_path_factory.mktemp("gan")
    return directory, train(SMALL, faces, directory, pictures=24, every=2)


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("judge") / "judge.safetensors"
    classifier.save(classifier.Classifier(classifier.Shape((4, 8), (1,), size=16), ATTRIBUTES), path)
    return path


def assert_same(ours: Training, theirs: Training) -> None:
    for network in ("generator", "discriminator", "ema"):
        for name, value in getattr(theirs, network).state_dict().items():
            torch.testing.assert_close(getattr(ours, network).state_dict()[name], value, rtol=1e-4, atol=1e-5)


# --- resuming -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [SMALL, FULL], ids=["plain", "full"])
def test_an_interrupted_training_equals_an_uninterrupted_one(config, faces, tmp_path, monkeypatch):
    monkeypatch.setattr(ada, "SPEED", 200)
    whole = train(config, faces, tmp_path / "whole", pictures=56, every=99)
    train(config, faces, tmp_path / "parts", pictures=40, every=99)
    parts = train(config, faces, tmp_path / "parts", pictures=56, every=99)
    assert parts.step == whole.step == 7
    assert_same(parts, whole)
    assert parts.augmentation.state_dict() == whole.augmentation.state_dict()
    assert (whole.augmentation.p > 0) == (config.ada > 0)
    assert parts.path_mean.item() == pytest.approx(whole.path_mean.item(), rel=1e-4)


def test_a_feature_discriminator_resumes_and_its_classifier_never_learns(faces, judge, tmp_path):
    config = replace(SMALL, features=4.0)

    def trained(directory, pictures):
        model = classifier.load(judge)
        return model, train(config, faces, tmp_path / directory, pictures=pictures, every=99, classifier=model)

    model, whole = trained("whole", 40)
    trained("parts", 24)
    _, parts = trained("parts", 40)
    assert_same(parts, whole)
    for name, value in whole.features.state_dict().items():
        torch.testing.assert_close(parts.features.state_dict()[name], value, rtol=1e-4, atol=1e-5)
    for name, value in classifier.load(judge).state_dict().items():
        assert torch.equal(model.state_dict()[name], value)
    assert not any("classifier" in name for name in whole.state_dict()["features"])


def test_a_feature_discriminator_may_be_taken_up_and_dropped(faces, run, judge, tmp_path):
    (tmp_path / "checkpoint.pt").write_bytes((run[0] / "checkpoint.pt").read_bytes())
    config = replace(SMALL, features=1.0)
    with pytest.raises(LaceError, match="needs a classifier"):
        train(config, faces, tmp_path, pictures=32)
    assert train(config, faces, tmp_path, pictures=32, classifier=classifier.load(judge)).step == 4
    assert train(SMALL, faces, tmp_path, pictures=40).step == 5


def test_stages_are_what_the_classifier_computes(judge):
    model = classifier.load(judge)
    picture = torch.rand(2, 3, 16, 16) * 2 - 1
    stages = FeatureDiscriminator(model).stages(picture)
    assert [stage.shape[1] for stage in stages] == list(model.shape.widths)
    torch.testing.assert_close(stages[-1], model.maps(picture))


def test_checkpoints_of_the_first_version_are_resumed(faces, tmp_path):
    training = train(SMALL, faces, tmp_path / "new", pictures=16)
    state = training.state_dict()
    for key in ("path_length", "ada", "ada_flips", "ada_turns"):
        del state["config"][key]
    for key in ("best_fid", "fid_at", "path_mean", "augmentation", "machine"):
        del state[key]
    (tmp_path / "old").mkdir()
    torch.save(state, tmp_path / "old" / "checkpoint.pt")
    old = train(SMALL, faces, tmp_path / "old", pictures=32)
    new = train(SMALL, faces, tmp_path / "new", pictures=32)
    assert_same(old, new)
    assert load_generator(tmp_path / "old" / "checkpoint.pt").facts.resolution == 16


def test_a_run_is_not_resumed_with_other_settings(faces, run):
    with pytest.raises(LaceError, match="start a new directory"):
        train(replace(SMALL, seed=1), faces, run[0], pictures=24)


def test_a_resumed_run_takes_its_rates_from_the_configuration(run):
    changed = resumed(replace(SMALL, learning_rate=1e-4, path_length=2.0), run[0] / "checkpoint.pt")
    generator, discriminator = (o.param_groups[0] for o in (changed.g_optimiser, changed.d_optimiser))
    assert (generator["lr"], *generator["betas"]) == pytest.approx((1e-4 * 4 / 5, 0.0, 0.99 ** (4 / 5)))
    assert discriminator["lr"] == pytest.approx(1e-4 * 2 / 3)
    plain = resumed(SMALL, run[0] / "checkpoint.pt").g_optimiser.param_groups[0]
    assert (plain["lr"], plain["betas"]) == (SMALL.learning_rate, (0.0, 0.99))


def test_a_damaged_checkpoint_is_reported(faces, tmp_path):
    (tmp_path / "checkpoint.pt").write_bytes(b"PK not a zip")
    with pytest.raises(CheckpointError, match="remove it to start again"):
        train(SMALL, faces, tmp_path, pictures=8)


# --- steps --------------------------------------------------------------------------------------------------------


def test_too_few_or_wrong_pictures_are_refused(faces, tmp_path):
    with pytest.raises(LaceError, match="do not fill a batch"):
        train(SMALL, faces[:4], tmp_path, pictures=8)
    with pytest.raises(LaceError, match="expected uint8"):
        train(SMALL, faces[:, :8], tmp_path, pictures=8)


def test_a_device_that_is_not_there_is_named():
    with pytest.raises(BackendError, match="expected cpu, cuda"):
        usable("cuda:99")


def test_the_r1_penalty_of_a_linear_discriminator_is_the_square_of_its_weights():
    class Linear(torch.nn.Module):
        def forward(self, x):
            return (x * weight).sum(dim=(1, 2, 3))

    weight = torch.randn(3, 4, 4)
    assert r1_penalty(Linear(), torch.randn(5, 3, 4, 4)).item() == pytest.approx(weight.square().sum().item(), rel=1e-5)


def test_path_lengths_of_a_linear_generator_are_known():
    ws, matrix = torch.randn(3, 4, 6, requires_grad=True), torch.randn(6, 3 * 8 * 8)
    pictures = (ws.sum(dim=1) @ matrix).view(3, 3, 8, 8)
    found = path_lengths(pictures, ws, torch.Generator().manual_seed(1))
    y = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1)) / 8
    torch.testing.assert_close(found, (y.flatten(1) @ matrix.T).norm(dim=1))


def test_every_part_of_a_full_step_reports(faces):
    training = Training(FULL)
    reals = (faces[:8].permute(0, 3, 1, 2).float() - 127.5) / 127.5
    report = training.train_step(reals)
    assert set(report) == {"d_loss", "g_loss", "real", "fake", "r1", "path", "p"}
    assert all(math.isfinite(value) for value in report.values())
    assert training.path_mean.item() == pytest.approx(0.01 * report["path"], rel=1e-5)
    assert set(training.train_step(reals)) == {"d_loss", "g_loss", "real", "fake", "p"}


def test_a_failed_compilation_is_an_error_that_says_what_to_do(monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("no compiler was found\nand a long trace")

    monkeypatch.setattr(torch, "compile", broken)
    with pytest.raises(BackendError, match=r"no compiler was found; .* train without --compile"):
        Training(SMALL).compile()


@pytest.mark.slow
def test_a_compiled_training_learns_the_same(faces):
    reals = (faces[:8].permute(0, 3, 1, 2).float() - 127.5) / 127.5
    plain, compiled = Training(FULL), Training(FULL)
    compiled.compile()
    for _ in range(2):
        assert compiled.train_step(reals) == pytest.approx(plain.train_step(reals), rel=1e-3, abs=1e-4)


# --- distances in training ----------------------------------------------------------------------------------------


class Given:
    """Distances that are known beforehand."""

    def __init__(self, *values: float, every: int = 0):
        self.values, self.every = list(values), every

    def __call__(self, generator) -> float:
        return self.values.pop(0)


def log_of(directory) -> list[dict]:
    return [json.loads(line) for line in (directory / "log.jsonl").read_text().splitlines()]


def test_the_best_generator_is_kept(faces, tmp_path):
    train(SMALL, faces, tmp_path, pictures=24, every=1, fid=Given(3, 1, 2))
    assert [line["fid"] for line in log_of(tmp_path)] == [3, 1, 2]
    best = torch.load(tmp_path / "best.pt", weights_only=True)
    assert (best["step"], best["best_fid"]) == (2, 1)
    train(SMALL, faces, tmp_path, pictures=40, every=1, fid=Given(1.5, 0.5))
    assert torch.load(tmp_path / "best.pt", weights_only=True)["step"] == 5
    assert load_generator(tmp_path / "best.pt").facts.resolution == 16


def test_distances_may_be_rarer_than_checkpoints(faces, tmp_path):
    train(SMALL, faces, tmp_path, pictures=40, every=1, fid=Given(5, 4, 3, every=16))
    assert [line["pictures"] for line in log_of(tmp_path) if "fid" in line] == [16, 32, 40]


def test_measuring_does_not_change_the_training(faces, run, judge, tmp_path):
    fixed = classifier.load(judge)
    fid = Fid(fixed, moments(data_features(fixed, faces.numpy())), samples=20)
    assert_same(train(SMALL, faces, tmp_path, pictures=24, every=2, fid=fid), run[1])
    assert all(line["fid"] > 0 for line in log_of(tmp_path))


# --- files and the command line -----------------------------------------------------------------------------------


def test_the_exported_generator_equals_the_average_of_the_run(run, tmp_path):
    directory, training = run
    parts = load_generator(export_generator(directory / "checkpoint.pt", tmp_path / "generator.safetensors"))
    z = torch.randn(2, 8)
    with torch.no_grad():
        w = parts.mapping(z)
        image = parts.synthesis(w[:, None].expand(-1, parts.synthesis.num_ws, -1))
        torch.testing.assert_close(image, training.ema(z))
        from_checkpoint = load_generator(directory / "checkpoint.pt")
        assert torch.equal(from_checkpoint.mapping(z), w)


@pytest.fixture
def album(tmp_path):
    """A folder of pictures of no fixed size."""
    path = tmp_path / "album"
    path.mkdir()
    rng = np.random.default_rng(0)
    for i in range(12):
        Image.fromarray(rng.integers(0, 256, (20 + i, 24, 3), dtype=np.uint8)).save(path / f"{i}.png")
    return path


def test_the_command_line_trains_on_a_folder_and_records_the_score(album, judge, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("lace_trainer.gan.score.COUNT", 24)
    out = tmp_path / "run"
    arguments = ["gan", "--data", str(album), "--size", "16", "--channels", "8,8,8", "--batch", "4", "--pictures", "8",
                 "--out", str(out), "--fid-samples", "16", "--judge", str(judge), "--ada", "0.6", "--path-length", "2",
                 "--threads", "1", "--json"]
    assert cli.main(arguments) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["of"] == "best.pt"
    assert (facts["samples"], facts["reference_pictures"]) == (24, 12)
    record = training_record(out / "generator.safetensors")["training"]
    assert record["score"]["fid"] == facts["fid"]
    assert record["pictures"] == 8
    assert "threads" in record["machine"]


def test_the_command_line_scores_a_checkpoint(run, album, judge, tmp_path, capsys):
    arguments = ["score", "--gan", str(run[0] / "checkpoint.pt"), "--judge", str(judge), "--samples", "20",
                 "--threads", "1", "--json"]
    assert cli.main([*arguments, "--cache", str(tmp_path), "--out", str(tmp_path / "g.safetensors")]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert training_record(tmp_path / "g.safetensors")["training"]["score"]["recall"] == facts["recall"]
    assert cli.main([*arguments, "--data", str(album), "--cache", str(tmp_path)]) == 0
    other = json.loads(capsys.readouterr().out)
    assert other["reference_pictures"] == 12
    assert other["fid"] != facts["fid"]
