"""Fitting one-pass maps: the twin of a bundle in torch, exact samples, distances, monitors, and the whole command."""

import numpy as np
import pytest
import torch

from engine import ConditionError, parse
from engine.errors import LaceError
from engine.oneshot import Wish
from engine.reference import field
from engine.reference.oneshot import push
from engine.reference.posterior import Settings
from engine.reference.probability import log_probability as defined
from engine.sampler import find_bundle
from engine.tape import lower, lower_crisp
from exporter.oneshots import load_oneshot
from lace_trainer.cli import main as lace_train
from lace_trainer.oneshot.distance import Features, distances, energy_distance
from lace_trainer.oneshot.making import make_oneshot
from lace_trainer.oneshot.monitors import Judge, TooFar, refuse
from lace_trainer.oneshot.training import MapConfig, ResidualMap
from lace_trainer.oneshot.truth import Picked, draw_truth, tape_of, tapes_of, tolerances_of
from lace_trainer.oneshot.world import World, log_probability, read_columns
from tests.worlds import random_world

PSI = 0.8
CONDITIONS = ("smile", "~glasses & age>0.1", "smile | colour=c1", "~(colour=c2 | smile)", "age=0.2 & ~smile",
              "~(-0.4<age<0.4) | glasses", "2 * smile & ~colour=c0")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return random_world(tmp_path_factory.mktemp("world") / "b", dim=16, layers=2, graphs=True, sharp=True)


@pytest.fixture(scope="module")
def world(bundle):
    return World(bundle, PSI)


def test_the_torch_world_has_the_w_and_the_logits_of_the_definition(bundle, world):
    z = np.random.default_rng(0).standard_normal((9, 16)).astype(np.float32)
    w, _ = field.mapping(bundle.field, z, np.full((9, 1), PSI, np.float32))
    found = world.map(torch.from_numpy(z))
    assert np.abs(found.numpy() - w).max() < 1e-5
    logits = world.logits(torch.from_numpy(z), found, list(bundle.attributes))
    for name, a in bundle.attributes.items():
        expected, _ = field.head(field.layers(bundle.field, f"head.{a.head}.sharp"), w)
        assert np.abs(logits[name].numpy() - expected[:, slice(*a.columns)]).max() < 1e-4


@pytest.mark.parametrize("text", CONDITIONS)
@pytest.mark.parametrize("relaxed", [False, True])
def test_log_p_is_that_of_the_definition(world, text, relaxed):
    logits = world.logits(z := torch.randn(64, 16, generator=torch.Generator().manual_seed(1)), world.map(z),
                          list(world.attributes))
    condition = parse(text)
    for tape in (lower(condition, world.attributes), lower_crisp(condition, world.attributes, tolerances_of(world))):
        u = read_columns(tape.columns, logits, 64)
        parameters = np.broadcast_to(tape.parameters, (64, len(tape.parameters)))
        expected = defined(tape.program, parameters, u.double().numpy(), relaxed=relaxed)
        found = log_probability(tape, u.double(), relaxed=relaxed).numpy()
        # Of an OR, P of the likelier branch counts as at most 1 - 1e-7, for the gradient.
        assert found == pytest.approx(expected, rel=1e-6, abs=2e-7)


def test_gradients_of_log_p_are_finite_where_probabilities_are_0_and_1(world):
    tape = lower(parse("smile | colour=c1"), world.attributes)
    u = (torch.tensor([[90.0], [-90.0], [0.0]]) * torch.ones(len(tape.columns))).requires_grad_()
    log_probability(tape, u).sum().backward()
    assert torch.isfinite(u.grad).all()


def test_exact_samples_are_those_of_the_restricted_prior(world):
    wish, settings = Wish("smile & ~glasses"), Settings(0.7)
    truth = draw_truth(world, wish, settings, least=100, most=4000)
    tape = tape_of(world, wish.rest(), settings)
    assert (world.log_p(truth.z, [tape])[0] > np.log(0.7)).all()
    plain = torch.randn(60_000, 16, generator=torch.Generator().manual_seed(5))
    kept = plain[world.log_p(plain, [tape])[0] > np.log(0.7)]
    assert abs(truth.rate / (len(kept) / len(plain)) - 1) < 0.15
    error = 4 * kept.std(dim=0) * (1 / len(kept) + 1 / len(truth.z)) ** 0.5
    assert ((truth.z.mean(dim=0) - kept.mean(dim=0)).abs() < error).all()


def test_open_targets_are_met_within_the_tolerance_and_spread_evenly(world):
    wish = Wish("smile & age=?", {"age": (-0.5, 0.5)})
    truth = draw_truth(world, wish, Settings(0.7), least=100, most=1600)
    age = world.logits(truth.z, world.map(truth.z), ["age"])["age"]
    assert ((age - truth.targets).abs() <= world.attributes["age"].tolerance + 1e-6).all()
    assert np.histogram(truth.targets[:, 0].numpy(), 8, (-0.5, 0.5))[0].tolist() == [200] * 8


def test_two_open_targets_fill_their_square_evenly():
    wish = Wish("age=? & yaw=?", {"age": (0, 1), "yaw": (0, 2)})
    picked = Picked(wish, 90)
    rng = torch.Generator().manual_seed(0)
    picked.add(torch.zeros(5000, 4), torch.rand(5000, 2, generator=rng) * torch.tensor([1.0, 2.0]))
    assert picked.is_full
    assert picked.count == 90


def test_even_classes_have_as_many_samples_each_and_of_each_the_exact_ones(world):
    wish, settings = Wish("age>-0.3", even=("smile", "glasses")), Settings(0.7)
    truth = draw_truth(world, wish, settings, least=100, most=2000)
    sure = (world.log_p(truth.z, tapes_of(world, wish, settings)) > np.log(0.7)).sum(dim=1)
    assert sure.tolist() == [500] * 4
    judge = Judge(world, wish, settings, truth)
    assert judge.uneven(judge.true.labels) < 1e-3
    plain = judge.look(torch.randn(4000, 16, generator=torch.Generator().manual_seed(3)), truth.targets[:1])
    assert judge.uneven(plain.labels) > 0.02
    with pytest.raises(TooFar, match="the divergence from even classes is"):
        refuse(judge.measure(plain))


def test_a_wish_that_is_too_rare_is_refused_after_a_pilot_and_says_how_rare(world):
    with pytest.raises(LaceError, match=r"too rare for a map: 65,536 plain latents hold about [\d,]+ exact samples"):
        draw_truth(world, Wish("smile"), Settings(0.7), least=10**6, budget=65_536)


def test_the_energy_distance_is_that_of_its_sum_and_tells_distributions_apart():
    rng = torch.Generator().manual_seed(0)
    a, b = torch.randn(40, 3, generator=rng), torch.randn(50, 3, generator=rng) + 1
    pairs = [(x - y).norm() for i, x in enumerate(a) for j, y in enumerate(a) if i != j]
    expected = 2 * torch.stack([(x - y).norm() for x in a for y in b]).mean() - torch.stack(pairs).mean()
    assert float(energy_distance(a, b)) == pytest.approx(float(expected), abs=2e-3)
    own = torch.randn(2000, 3, generator=rng), torch.randn(2000, 3, generator=rng)
    among = distances(own[1], own[1]).sum() / (2000 * 1999)
    assert abs(float(energy_distance(*own) - among)) < 0.01
    assert float(energy_distance(own[0] * 0.7, own[1]) - among) > 0.05


def test_features_have_gradients_at_the_noise_itself(world):
    wish, settings = Wish("smile & age=?", {"age": (-0.5, 0.5)}), Settings(0.7)
    truth = draw_truth(world, wish, settings, least=100, most=400)
    features = Features(world, tapes_of(world, wish, settings), ["age"], truth.z)
    z = truth.z[:20].clone().requires_grad_()
    shown = features(z, truth.targets[:20])
    (shown.asked.sum() + shown.sure.sum() + shown.others.sum() + shown.w.sum()).backward()
    assert torch.isfinite(z.grad).all()
    assert (z.grad.norm(dim=1) > 0).all()


def test_a_map_begins_as_the_identity_and_its_layers_are_those_of_the_definition(bundle, world):
    wish = Wish("smile & age=?", {"age": (-0.5, 0.5)})
    truth = draw_truth(world, wish, Settings(0.7), least=100, most=400)
    network = ResidualMap(world, MapConfig(hidden=(12, 9)), truth)
    noise = torch.randn(7, 16, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        assert torch.equal(network(noise, truth.targets[:7]), noise)
        for block in network.blocks:
            torch.nn.init.normal_(block[-1].weight, std=0.2)
        made = network(noise, truth.targets[:7])
    tensors = {f"oneshot.x.{i}.{j}.{key}": tensor for i, stack in enumerate(network.layers())
               for j, pair in enumerate(stack) for key, tensor in zip(("weight", "bias"), pair, strict=True)}
    from engine.bundle import Oneshot

    record = Oneshot("x", wish.text, ((33, 12, 9, 16),) * 2, PSI, wish.targets, confidence=0.7)
    expected = push(dict(bundle.field) | tensors, record, noise.numpy(), truth.targets[:7].numpy())
    assert np.abs(made.numpy() - expected).max() < 1e-4


def test_monitors_see_a_lost_branch_duplicates_and_a_condition_that_does_not_hold(world):
    wish, settings = Wish("smile | colour=c1"), Settings(0.7)
    truth = draw_truth(world, wish, settings, least=100, most=4000)
    judge = Judge(world, wish, settings, truth)
    fresh = draw_truth(world, wish, settings, least=100, most=4000, seed=1)
    good = judge.measure(judge.look(fresh.z, fresh.targets))
    refuse(good)
    assert good["holds"] == good["sure"] == 1.0
    assert good["duplicates"] < 0.04

    def measured(z):
        return judge.measure(judge.look(z, truth.targets[: len(z)]))

    plain = measured(torch.randn(4000, 16, generator=torch.Generator().manual_seed(3)))
    with pytest.raises(TooFar, match=r"the condition holds of 0\.\d+, expected at least 0\.95"):
        refuse(plain)
    colour = fresh.z[world.log_p(fresh.z, [lower(parse("~colour=c1"), world.attributes)])[0] > np.log(0.5)]
    with pytest.raises(TooFar, match="a branch of the OR is off by"):
        refuse(measured(colour))
    with pytest.raises(TooFar, match=r"its coverage is|near duplicates"):
        refuse(measured(fresh.z[:40].repeat(100, 1) + 0.001 * torch.randn(4000, 16)))


@pytest.mark.slow
def test_a_map_is_fitted_written_and_beats_plain_noise(bundle, tmp_path):
    config = MapConfig(hidden=(64, 64), steps=600, rows=192, truth_rows=384, learning_rate=2e-3)
    path = tmp_path / "smiling.safetensors"
    record = make_oneshot(bundle, Wish("smile & ~glasses"), path, name="smiling", config=config, confidence=0.7,
                          truncation=PSI, samples=6000)
    assert load_oneshot(path).record == record
    assert record.measured["holds"] > 0.95
    assert record.provenance["rate"] < 0.6


def test_a_map_that_is_too_far_is_not_written(bundle, tmp_path):
    with pytest.raises(TooFar, match="nothing was written"):
        make_oneshot(bundle, Wish("smile & ~glasses"), tmp_path / "p", name="p", config=MapConfig(steps=1, rows=32),
                     confidence=0.7)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("arguments", "says"), [
    (["smile", "--name", "1x"], "expected letters"),
    (["smile", "--name", "x", "--confidence", "0.9", "--guidance", "2"], "give one of them"),
    (["smile", "--name", "x", "--range", "age=0.2:0.8"], "does not leave open"),
    (["smile & age=?", "--name", "x", "--range", "age=0.8:0.2"], "NAME=LOW:HIGH"),
    (["smile & glasses=?", "--name", "x"], "leaves a class open"),
    (["smile & age=?", "--name", "x", "--guidance", "2"], "use a confidence"),
    (["frown", "--name", "x"], "no attribute 'frown'"),
    (["hat | age=?", "--name", "x"], "must be joined to everything else by &"),
    (["smile", "--name", "x", "--label", "2"], "unconditional"),
])
def test_the_command_refuses_what_does_not_fit_before_it_draws(arguments, says, tmp_path, capsys):
    condition, *options = arguments
    assert lace_train(["oneshot", "demo", condition, *options, "--out", str(tmp_path / "p")]) == 2
    assert says in " ".join(capsys.readouterr().err.split())
    assert not list(tmp_path.iterdir())


def test_the_demo_has_all_that_a_map_needs():
    bundle = find_bundle("demo")
    with pytest.raises(ConditionError):
        Wish("hat | age=?", {"age": (0, 1)})
    assert tolerances_of(World(bundle, 0.7))["age"] > 0
