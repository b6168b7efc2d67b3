"""Every format that the exporter reads, from tiny files: the pictures must survive the journey."""

import pickle
import zipfile

import numpy as np
import pytest
import torch

from engine.errors import CheckpointError
from exporter.checkpoints import load_generator
from exporter.generators.stylegan2 import Mapping, Synthesis
from tests import checkpoints as build
from tests import test_stylegan3 as three

ARCHITECTURES = ("skip", "resnet", "orig")


@pytest.fixture
def load(tmp_path):
    def loader(data: bytes):
        path = tmp_path / "file.bin"
        path.write_bytes(data)
        return load_generator(path)

    return loader


def same_pictures(net, parts, tolerance=1e-6):
    a, b = build.pictures(net.mapping, net.synthesis), build.pictures(parts.mapping, parts.synthesis)
    assert a.shape == b.shape
    assert float((a - b).abs().max()) <= tolerance * max(1.0, float(a.abs().max()))


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_nvidia_pickles_give_the_same_pictures(load, architecture, protocol):
    net = build.generator(architecture, conv_clamp=4.0, c_dim=3 if protocol == 4 else 0)
    parts = load(build.nvidia_pickle(net, protocol=protocol, old_torch=protocol == 2))
    same_pictures(net, parts)
    facts = parts.facts
    assert (facts.architecture, facts.source) == (f"stylegan2-{architecture}", "nvidia")
    assert (facts.z_dim, facts.w_dim, facts.num_ws, facts.resolution, facts.img_channels) == (5, 6, 6, 16, 3)
    assert (facts.conv_clamp, facts.num_fp16_res, facts.c_dim) == (4.0, 1, net.mapping.c_dim)


def test_a_full_snapshot_gives_the_averaged_generator(load):
    net = build.generator(use_noise=False)
    parts = load(build.nvidia_pickle(net, snapshot="full"))
    same_pictures(net, parts)
    assert not parts.synthesis.training
    assert not any(layer.use_noise for layer in parts.synthesis.layers)
    assert parts.facts.conv_clamp is None


def pickled_again(record):
    """A passive record as NVIDIA's pickle would hold it: modules with parameters of torch."""
    state = dict(record.state)
    state["_modules"] = {name: pickled_again(inner) for name, inner in state["_modules"].items()}
    for table in ("_parameters", "_buffers"):
        state[table] = {k: None if v is None else torch.tensor(v) for k, v in state[table].items()}
    return build.Persistent(record.class_name, state, "raise SystemExit")


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_stylegan3_pickles_give_the_same_pictures(load, protocol):
    net, mapping = three.network("R", 32), Mapping(6, 8, num_layers=2)
    with build.foreign_names():
        data = pickle.dumps({"G_ema": pickled_again(three.generator_record(net, mapping))}, protocol)
    parts = load(data)
    ws = three.styles(net, 2)
    assert torch.equal(parts.synthesis(ws), net(ws))
    assert (parts.facts.architecture, parts.facts.source, parts.facts.resolution) == ("stylegan3-r", "nvidia", 32)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_module_saved_by_torch_is_read(load, legacy):
    net = build.generator("resnet")
    same_pictures(net, load(build.nvidia_zip(net, legacy=legacy)))


def test_a_bare_module_in_a_plain_pickle_is_read(load):
    net = build.generator()
    same_pictures(net, load(build.nvidia_pickle(net, snapshot="bare")))


def test_the_source_code_in_a_file_is_never_run(load, tmp_path):
    marker = tmp_path / "marker"
    load(build.nvidia_pickle(build.generator(), source=f"open({str(marker)!r}, 'w').write('run')"))
    assert not marker.exists()


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_tensorflow_pickles_give_the_same_pictures(load, protocol):
    for architecture in ARCHITECTURES:
        net = build.generator(architecture, c_dim=2)
        parts = load(build.tensorflow_pickle(net, protocol=protocol))
        same_pictures(net, parts)
        assert (parts.facts.source, parts.facts.num_fp16_res) == ("tensorflow", 0)


def test_tensorflow_weights_mean_what_tensorflow_computes(load):
    net = build.generator()
    parts = load(build.tensorflow_pickle(net))
    _, variables, _ = build.tensorflow_variables(net)
    w = np.random.default_rng(0).normal(size=6)
    expected = build.tensorflow_picture(variables, w, 16)
    ws = torch.tensor(w, dtype=torch.float32).expand(1, 6, 6)
    got = parts.synthesis(ws)[0].numpy()
    assert np.abs(got - expected).max() <= 1e-5 * np.abs(expected).max()


def test_the_picture_layer_of_tensorflow_may_be_numbered_by_level_of_detail(load):
    net = build.generator("orig", conv_clamp=3.0)
    data = build.tensorflow_pickle(net, picture="ToRGB_lod0", conv_clamp=3, num_fp16_res=2)
    parts = load(data)
    same_pictures(net, parts)
    assert (parts.facts.num_fp16_res, parts.facts.conv_clamp) == (2, 3.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fused_magic": 1}, "fused_magic"),
        ({"nonlinearity": "relu"}, "nonlinearity"),
        ({"resample_kernel": [1, 1]}, "resampling filter"),
        ({"resample_kernel": [1, 2, 3, 4]}, "resampling filter"),
        ({"resample_kernel": "wrong"}, "resample_kernel"),
        ({"architecture": "resnet"}, "architecture"),
        ({"mapping_lrmul": "much"}, "mapping_lrmul"),
    ],
)
def test_tensorflow_options_that_cannot_be_honoured_are_refused(load, options, message):
    with pytest.raises(CheckpointError, match=message):
        load(build.tensorflow_pickle(build.generator(), **options))


def test_another_symmetric_resampling_filter_is_honoured(load):
    net = build.generator()
    taps = torch.tensor([1.0, 2.0, 2.0, 1.0])
    kernel = torch.outer(taps, taps) / 36
    for name, buffer in net.named_buffers():
        if name.endswith("resample_filter"):
            buffer.copy_(kernel)
    same_pictures(net, load(build.tensorflow_pickle(net, resample_kernel=[1, 2, 2, 1])))
    same_pictures(net, load(build.nvidia_pickle(net)))


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_rosinality_files_give_the_same_pictures(load, training, legacy):
    net = build.generator()
    parts = load(build.rosinality_file(net, training=training, legacy=legacy))
    same_pictures(net, parts)
    assert parts.facts.source == "rosinality"


def test_a_missing_centre_is_sampled_the_same_way_each_time(load):
    net = build.generator(widths={4: 2, 8: 2})
    data = build.rosinality_file(net, centre=False)
    first, second = load(data).mapping, load(data).mapping
    assert torch.equal(first.w_avg, second.w_avg)
    z = torch.randn(20_000, 5, generator=torch.Generator().manual_seed(3))
    w = net.mapping(z)
    assert torch.all((first.w_avg - w.mean(dim=0)).abs() < 0.05 * w.std(dim=0) + 1e-3)


def test_swagan_is_refused_with_advice(load):
    state = build.rosinality_state(build.generator())
    state["to_rgbs.0.iwt.ll"] = torch.ones(2, 2)
    with pytest.raises(CheckpointError, match="swagan"):
        load(build.torch_bytes({"g_ema": state}))


def test_a_checkpoint_of_our_own_trainer_is_read(load):
    net = build.generator()
    parts = load(build.torch_bytes({"config": {"z_dim": 5}, "step": 3, "ema": net.state_dict()}))
    same_pictures(net, parts)
    assert parts.facts.source == "lace-train"


def rosinality_with(**changes):
    state = build.rosinality_state(build.generator())
    for key, value in changes.items():
        key = key.replace("__", ".")
        if value is None:
            del state[key]
        else:
            state[key] = value
    return build.torch_bytes({"g_ema": state, "latent_avg": torch.zeros(6)})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"conv1__activate__bias": None}, r"missing: synthesis.b4.conv1.bias"),
        ({"convs__0__conv__weight": torch.zeros(1, 5, 7, 3, 3)}, r"b8.conv0.weight \(5, 7, 3, 3\) instead of"),
        ({"surprise": torch.zeros(1)}, "surprise"),
        ({"noises__noise_9": torch.zeros(1, 1, 128, 128)}, "resolutions"),
        ({"style__9__bias": torch.zeros(6)}, r"unexpected: mapping.fc8.bias"),
        ({"style__1__bias": torch.full((6,), float("nan"))}, "NaN"),
        ({"to_rgbs__0__upsample__kernel": torch.ones(2, 2)}, "resampling filter"),
        ({"input__input": None}, "const"),
    ],
)
def test_tensors_that_do_not_fit_are_named(load, changes, message):
    with pytest.raises(CheckpointError, match=message):
        load(rosinality_with(**changes))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "empty"),
        (b"<!DOCTYPE html><html>quota exceeded</html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "Git LFS"),
        (b"Not found.\n", "text file"),
        (b"\x1f\x8b\x08\x00abc", "unpack"),
        (b"\x00\x01\x02\x03\x04\xff\xfe\x05\x06\x07", "unknown"),
        (pickle.dumps({"mean": 1, "cov": 2}), "cov, mean"),
        (pickle.dumps([1, 2]), "a list"),
        (pickle.dumps({"G_ema": {"a": 1}}), "G_ema"),
        (build.torch_bytes(build.lace_head()[0]), "head"),
        (build.torch_bytes({"style.1.weight": torch.ones(2, 2)}), "lacks|no mapping|missing"),
        (build.torch_bytes({"conv.weight": torch.ones(2)}), r"state_dict of an unknown network.*conv\.weight"),
        (build.torch_bytes({"g_ema": {"a": 3}}), "keys g_ema, and no generator"),
        (build.torch_bytes({"g_ema": {}}), "keys g_ema, and no generator"),
    ],
)
def test_what_is_no_generator_is_described(load, data, message):
    with pytest.raises(CheckpointError, match=message):
        load(data)


def test_a_bundle_and_a_missing_file_are_told_apart(tmp_path):
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(CheckpointError, match="bundle"):
        load_generator(tmp_path)
    with pytest.raises(CheckpointError, match="no file"):
        load_generator(tmp_path / "nowhere.pkl")


def test_a_zip_of_something_else_is_described(load, tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("photo.png", b"x")
    with pytest.raises(CheckpointError, match=r"photo\.png"):
        load((tmp_path / "a.zip").read_bytes())


def test_a_module_without_a_synthesis_is_described(load):
    with build.foreign_names():
        record = build.persistent(Mapping(5, 6), "")
        data = pickle.dumps({"G_ema": record})
    with pytest.raises(CheckpointError, match="mapping"):
        load(data)


def test_activations_other_than_ours_are_refused(load):
    with build.foreign_names():
        record = build.nvidia_record(build.generator())
        fc0 = record.meta["state"]["_modules"]["mapping"].meta["state"]["_modules"]["fc0"]
        fc0.meta["state"]["activation"] = "relu"
        data = pickle.dumps({"G_ema": record})
    with pytest.raises(CheckpointError, match="activation"):
        load(data)


def test_a_synthesis_of_an_unknown_family_is_described(load):
    with build.foreign_names():
        net = torch.nn.Module()
        net.mapping, net.synthesis = Mapping(5, 6), torch.nn.Module()
        net.synthesis.layer7 = Synthesis(6, {4: 2, 8: 2})
        data = pickle.dumps({"G_ema": build.nvidia_record(net)})
    with pytest.raises(CheckpointError, match="layer7"):
        load(data)
