"""One-pass maps in a bundle: added, examined, run on every runtime, polished, refused where they do not fit."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from engine import Request, RequestError, Sampler
from engine.bundle import FIELD, GOLDEN, Bundle, Oneshot, save_tensors, write_manifest, writing
from engine.cli.sample import main as lace_sample
from engine.condition import attr
from engine.errors import BundleError, CheckpointError, ConditionError
from engine.oneshot import Wish
from engine.reference.field import layers as field_layers
from engine.reference.noise import normals
from engine.reference.oneshot import golden_answers, push
from engine.reference.posterior import Settings, polish
from engine.sampler import find_bundle
from engine.verify import check_bundle
from exporter.exporting import add_parts, export
from exporter.field_graphs import write_field_graphs
from exporter.heads import HeadAttribute, HeadStack, SharpStack
from exporter.oneshots import OneshotPart, fingerprint, load_oneshot, save_oneshot
from tests.worlds import random_world

RUNTIMES = ("native", "onnxruntime", "numpy", "openvino")
DIM, BLOCKS = 16, 2


def part_of(bundle: Bundle, name: str, condition: str, targets=None, seed: int = 0) -> OneshotPart:
    """A map that was not fitted: small random layers."""
    g, rng = bundle.generator, np.random.default_rng(seed)
    widths = (g.z_dim + g.w_dim + len(targets or {}), 11, g.z_dim)
    tensors = {}
    for block in range(BLOCKS):
        for layer, (n_in, n_out) in enumerate(pairwise(widths)):
            weight = rng.standard_normal((n_out, n_in)) / np.sqrt(n_in)
            tensors[f"{block}.{layer}.weight"] = weight.astype(np.float32)
            tensors[f"{block}.{layer}.bias"] = (rng.standard_normal(n_out) * 0.1).astype(np.float32)
    record = Oneshot(name, condition, (widths,) * BLOCKS, 0.7, targets or {}, 1 if bundle.generator.labels else 0,
                     confidence=0.6, measured={"holds": 0.5, "others": 0.2})
    return OneshotPart(record, tensors, fingerprint(bundle, Wish(condition, targets or {}).names))


@pytest.fixture(scope="module", params=[0, 3], ids=["unconditional", "labels"])
def bundle(request, tmp_path_factory) -> Bundle:
    """A small world with two maps."""
    folder = tmp_path_factory.mktemp("world")
    plain = random_world(folder / "plain", dim=DIM, layers=2, labels=request.param, graphs=True, sharp=True)
    parts = [part_of(plain, "smiling", "smile"), part_of(plain, "aged", "smile & age=?", {"age": (-1.0, 1.0)}, seed=1)]
    records = tuple(part.record for part in parts)
    tensors, answers = dict(plain.field), dict(plain.golden)
    for part in parts:
        tensors |= part.field
        answers |= golden_answers(tensors, part.record, answers["z"])
    with writing(folder / "maps") as target:
        save_tensors(target / FIELD, tensors)
        save_tensors(target / GOLDEN, answers)
        graphs = write_field_graphs(target, plain.generator, plain.manifest.heads, records)
        write_manifest(target, replace(plain.manifest, oneshots=records, graphs=graphs))
    return Bundle(folder / "maps")


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Bundle:
    """The demo with the same two maps, which came as parts."""
    folder, plain = tmp_path_factory.mktemp("demo"), find_bundle("demo")
    save_oneshot(folder / "smiling.safetensors", part_of(plain, "smiling", "smile"))
    aged = part_of(plain, "aged", "smile & age=?", {"age": (0.2, 0.8)}, seed=1)
    return add_parts(plain, [folder / "smiling.safetensors", aged], out=folder / "maps.lace")


def test_a_map_is_added_with_its_record_its_graph_and_its_answers(demo):
    record = demo.oneshots["smiling"]
    assert (record.condition, record.confidence, record.measured["holds"]) == ("smile", 0.6, 0.5)
    assert demo.oneshots["aged"].targets == {"age": (0.2, 0.8)}
    assert {"oneshot.smiling.onnx", "oneshot.aged.onnx"} <= set(demo.files)
    names = {check["name"] for check in demo.manifest.provenance["parity"]}
    assert {"oneshot.smiling", "oneshot.aged"} <= names
    assert Sampler(demo).sample(oneshot="smiling", seeds=2)[0].image.shape == (64, 64, 3)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_every_runtime_makes_the_latents_of_the_definition(bundle, runtime):
    pytest.importorskip({"numpy": "numpy", "openvino": "openvino"}.get(runtime, "onnxruntime"))
    sampler = Sampler(bundle, runtime=runtime)
    samples = sampler.solve(oneshot="aged", targets={"age": 0.4}, seeds=range(5))
    exact = {name: tensor.astype(float) for name, tensor in bundle.field.items()}
    noise = np.stack([normals(seed, 0, DIM) for seed in range(5)]).astype(float)
    expected = push(exact, bundle.oneshots["aged"], noise, np.full((5, 1), np.float32(0.4), float))
    assert np.abs(np.stack([s.z for s in samples]) - expected).max() < 1e-5
    assert all((s.candidates, s.corrections, s.exact) == (1, 0, False) for s in samples)
    assert set(samples[0].logits) == {"smile", "age"}
    checks = [check for check in check_bundle(bundle, runtime, parts=("field",)) if "oneshot" in check.name]
    assert [check.passed for check in checks] == [True, True]


def test_a_map_that_answers_otherwise_does_not_pass_the_exam(bundle, monkeypatch):
    from engine.runtimes.native import NativeSolving

    right = NativeSolving.oneshot
    monkeypatch.setattr(NativeSolving, "oneshot", lambda *args: right(*args) + np.float32(1e-2))
    checks = [check for check in check_bundle(bundle, "native", parts=("field",)) if "oneshot" in check.name]
    assert [check.passed for check in checks] == [False, False]


def test_a_row_does_not_depend_on_its_neighbours_nor_on_the_way_it_is_asked_for(bundle):
    sampler = Sampler(bundle)
    together = sampler.solve(oneshot="smiling", seeds=range(9), polish=3)
    alone = [sampler.solve(oneshot="smiling", seeds=seed, polish=3)[0] for seed in range(9)]
    others = [Request("smile", seed=3, label=2 if bundle.generator.labels else None),
              Request(oneshot="aged", targets={"age": 0.1}, seed=1)]
    requests = [Request(oneshot="smiling", seed=seed, polish=3) for seed in range(9)]
    mixed = [sample.z for sample in sampler.solve([*others, *requests])[2:]]
    for a, b, c in zip(together, alone, mixed, strict=True):
        assert np.array_equal(a.z, b.z)
        assert np.array_equal(a.z, c)
        assert a.energy == b.energy


class Disc:
    """P = 0.9 within a disc of the plane, and falls outside: a posterior whose moments are known."""

    noise_dim = 2

    def log_p(self, rows, x):
        distance = np.maximum(np.linalg.norm(x - np.array([1.0, 0.0]), axis=1) - 0.8, 0)
        relaxed = np.log(0.9) - np.square(distance) / 0.02
        return relaxed, np.where(distance > 0, -1e4, relaxed)


def disc_samples(count: int, seed: int):
    x = np.random.default_rng(seed).standard_normal((40 * count, 2))
    inside = np.linalg.norm(x - np.array([1.0, 0.0]), axis=1) < 0.8
    return x[inside][:count].astype(np.float32)


def test_polishing_leaves_exact_samples_exact_and_moves_them():
    x = disc_samples(20_000, 0)
    ends = polish(Disc(), list(range(len(x))), Settings(0.8), x, 6)
    assert ends.entered.all()
    assert 0.2 < ends.accepted.mean() / 6 < 0.95
    # Standard errors of a mean and of a standard deviation of 20,000 rows; all within 4.
    assert np.abs(ends.x.mean(axis=0) - x.mean(axis=0)).max() < 4 * 0.5 / np.sqrt(10_000)
    assert np.abs(ends.x.std(axis=0) - x.std(axis=0)).max() < 4 * 0.5 / np.sqrt(10_000)
    assert np.abs(ends.x - x).max(axis=1).mean() > 0.2


def test_polishing_brings_wrong_rows_to_the_posterior():
    truth = disc_samples(4000, 1)
    wrong = np.tile(np.array([0.2, 0.9], np.float32), (4000, 1))  # all alike, and outside
    ends = polish(Disc(), list(range(4000)), Settings(0.8), wrong, 60)
    assert ends.entered.mean() > 0.995
    assert np.abs(ends.x.mean(axis=0) - truth.mean(axis=0)).max() < 0.05
    assert np.abs(ends.x.std(axis=0) - truth.std(axis=0)).max() < 0.05


def test_polishing_with_a_guidance_targets_the_prior_times_p_to_its_power():
    class Slope:
        noise_dim = 1

        def log_p(self, rows, x):
            log_p = np.minimum(x[:, 0] - 3.0, 0.0).astype(float)
            return log_p, log_p

    # N(0, 1) times exp(2 x) is N(2, 1), where log P is linear.
    start = np.random.default_rng(0).standard_normal((2000, 1)).astype(np.float32)
    ends = polish(Slope(), list(range(len(start))), Settings(None, 2.0), start, 250)
    below = ends.x[ends.x < 3]
    assert abs(np.median(below) - 1.80) < 0.1  # of N(2, 1) below 3: its 42 % quantile, and 3.5 standard errors


def test_more_steps_of_polish_satisfy_the_condition_more_often(bundle):
    sampler = Sampler(bundle)
    sure = [np.mean([s.energy < -np.log(0.6) for s in sampler.solve(oneshot="smiling", seeds=range(64), polish=steps)])
            for steps in (0, 32)]
    assert sure[0] < sure[1]
    assert sure[1] > 0.95


@pytest.mark.parametrize(("arguments", "says"), [
    ({"oneshot": "frowning"}, "has no one-pass map 'frowning'; it has: smiling, aged"),
    ({"oneshot": "aged"}, r"'smile & age=\?' needs: age \(-1 to 1\)"),
    ({"oneshot": "aged", "targets": {"age": 2.0}}, "out of range"),
    ({"oneshot": "aged", "targets": {"age": float("nan")}}, "finite"),
    ({"oneshot": "smiling", "targets": {"age": 0.1}}, "needs: none"),
    ({"oneshot": "smiling", "polish": -1}, "not a number of steps"),
    ({"polish": 4}, "belong to a one-pass map"),
    ({"wanted": "smile", "oneshot": "smiling"}, "a condition of its own"),
    ({"wanted": [Request("smile")], "polish": 2}, "each Request has its own"),
])
def test_what_does_not_fit_a_map_is_refused(bundle, arguments, says):
    with pytest.raises(RequestError, match=says):
        Sampler(bundle).solve(**arguments)


@pytest.mark.parametrize("name", ["z", "truncation", "guidance", "confidence", "steps", "label"])
def test_a_map_has_settings_of_its_own(name):
    with pytest.raises(RequestError, match=f"has a {name} of its own"):
        Request(oneshot="smiling", **{name: 1 if name != "z" else np.zeros(DIM)})


def test_a_map_of_even_classes_has_no_posterior_to_be_polished_to(demo, tmp_path):
    even = part_of(find_bundle("demo"), "even", "")
    even = replace(even, record=replace(even.record, even=("gender", "glasses")),
                   fitted_to=fingerprint(demo, ["gender", "glasses"]))
    sampler = Sampler(add_parts(demo, [even], out=tmp_path / "even.lace"))
    samples = sampler.solve(oneshot="even", seeds=range(3))
    assert [s.condition for s in samples] == [None] * 3
    assert not np.array_equal(samples[0].z, normals(0, 0, 128))
    with pytest.raises(RequestError, match="gender and glasses even"):
        sampler.solve(oneshot="even", polish=2)


def test_a_sample_of_a_map_is_edited_as_the_condition_that_it_granted(demo):
    sampler = Sampler(demo)
    (sample,) = sampler.sample(oneshot="aged", targets={"age": 0.3}, seeds=3)
    (edited,) = sampler.edit(sample, "hat")
    assert edited.request.oneshot is None
    assert edited.request.truncation == 0.7
    assert edited.condition.attributes() == ("hat", "smile", "age")


def test_open_targets_are_whole_statements_of_a_conjunction():
    wish = Wish("(hat | beard) & age=? & yaw = ?", {"age": (0, 1), "yaw": (0, 1)})
    assert wish.rest() == attr("hat") | attr("beard")
    assert wish.condition({"age": 0.25, "yaw": 0.5}).attributes() == ("hat", "beard", "age", "yaw")
    assert Wish("age=?", {"age": (0, 1)}).rest() is None
    for text in ("hat | age=?", "~(hat & age=?)", "age=? & age=0.4", "age=? & age=?", "(hat | age=?) & smile"):
        with pytest.raises(ConditionError):
            Wish(text, {"age": (0, 1)})


def test_a_map_of_another_generator_or_of_other_heads_is_not_added(demo, tmp_path):
    plain = find_bundle("demo")
    part = part_of(plain, "other", "smile")
    with pytest.raises(BundleError, match="fitted to another generator"):
        add_parts(plain, [replace(part, fitted_to="0" * 64)], out=tmp_path / "b.lace")
    with pytest.raises(BundleError, match="two one-pass maps are called 'smiling'"):
        add_parts(demo, [replace(part, record=replace(part.record, name="smiling"))], out=tmp_path / "b.lace")
    layers = tuple((weight.copy(), bias + 1) for weight, bias in field_layers(demo.field, "head.smile.sharp"))
    smile = demo.attributes["smile"]
    other = HeadStack("smile", "w", (), (HeadAttribute("smile", "class", smile.classes, (0, 2)),),
                      SharpStack(layers, calibrated=True))
    with pytest.raises(BundleError, match=r"'smiling'.*fitted to the sharp head of 'smile'"):
        add_parts(demo, [other], out=tmp_path / "b.lace")
    assert not (tmp_path / "b.lace").exists()


def test_a_map_is_no_head(tmp_path):
    part = part_of(find_bundle("demo"), "smiling", "smile")
    with pytest.raises(BundleError, match="a one-pass map is no head"):
        export(find_bundle("demo").path, [part], out=tmp_path / "b.lace")


def test_a_file_that_is_no_whole_map_is_refused(tmp_path):
    plain = find_bundle("demo")
    part, path = part_of(plain, "smiling", "smile"), tmp_path / "map.safetensors"
    save_oneshot(path, part)
    assert load_oneshot(path).record == part.record
    data = path.read_bytes()
    too_sure = data.replace(b'\\"confidence\\": 0.6', b'\\"confidence\\": 6.6')
    for damaged in (data[:-40], data.replace(b"smile", b"sm\\ne"), too_sure):
        assert damaged != data
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"map\.safetensors"):
            load_oneshot(path)
    with pytest.raises(CheckpointError, match="demands"):
        replace(part, tensors={name: tensor[:-1] for name, tensor in part.tensors.items()})


def test_a_map_is_asked_for_on_the_command_line_and_drawn_again(demo, tmp_path, capsys):
    out, again = str(tmp_path / "out"), str(tmp_path / "again")
    command = [str(demo.path), "--oneshot", "aged", "--target", "age=0.5", "--polish", "2", "--count", "3"]
    assert lace_sample([*command, "--out", out]) == 0
    assert lace_sample([str(demo.path), "--again", f"{out}/0002.png", "--out", again]) == 0
    for wrong, says in ((["smile"], "leave CONDITION out"), (["--truncation", "0.5"], "does not go with --oneshot"),
                        (["--label", "1"], "does not go with --oneshot")):
        assert lace_sample([*command[:1], *wrong[:1 if wrong[0] == "smile" else 0], *command[1:],
                            *(wrong if wrong[0] != "smile" else []), "--out", f"{out}2"]) == 2
        assert says in capsys.readouterr().err
