"""StyleGAN3: every piece against a slow independent formula, then the whole network."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from engine.errors import CheckpointError
from exporter.generators import resampling, stylegan3, stylegan3_files
from exporter.generators import stylegan3_design as rules
from exporter.generators.nvidia import from_nvidia
from exporter.generators.stylegan2 import Mapping
from exporter.passive import Module

torch.set_num_threads(1)  # small pictures: threads cost more than they bring

SMALL = {"channel_base": 256, "channel_max": 8, "w_dim": 8}


def network(config="T", resolution=32, seed=0, **options):
    torch.manual_seed(seed)
    net = stylegan3.Synthesis3(stylegan3.design(resolution, config=config, **SMALL | options)).eval()
    net.requires_grad_(False)
    for layer in net.layers:
        layer.bias.copy_(torch.randn_like(layer.bias) * 0.2)
        layer.magnitude_ema.fill_(float(torch.rand([]) + 0.5))
    net.input.affine.weight.copy_(torch.randn_like(net.input.affine.weight) * 0.2)
    return net


def styles(net, rows, seed=1):
    return torch.randn(rows, net.num_ws, net.w_dim, generator=torch.Generator().manual_seed(seed))


# The judge: one picture, loops over the taps, float64.


def slow_filter(x, taps):
    """True convolution, valid part only. x (h, w), taps (n, m)."""
    n, m = taps.shape
    height, width = x.shape[0] - n + 1, x.shape[1] - m + 1
    return sum(taps[n - 1 - i, m - 1 - j] * x[i : i + height, j : j + width] for i in range(n) for j in range(m))


def slow_pad(x, edges):
    left, right, top, bottom = edges
    x = np.pad(x, [(max(top, 0), max(bottom, 0)), (max(left, 0), max(right, 0))])
    return x[max(-top, 0) : x.shape[0] - max(-bottom, 0), max(-left, 0) : x.shape[1] - max(-right, 0)]


def slow_filtered_lrelu(x, up_filter, down_filter, up, down, padding, clamp):
    inserted = np.zeros((x.shape[0] * up, x.shape[1] * up))
    inserted[::up, ::up] = x
    y = slow_filter(slow_pad(inserted, padding), np.outer(up_filter, up_filter)) * up**2
    y = np.clip(np.where(y < 0, 0.2 * y, y) * math.sqrt(2), -clamp, clamp)
    kernel = down_filter if down_filter.ndim == 2 else np.outer(down_filter, down_filter)
    return slow_filter(y, kernel)[::down, ::down]


def layer_spec(up, padding, radial, size=20):
    """A layer with asymmetric filters, so that a flip would be seen."""
    rng = np.random.default_rng(up)
    up_filter = rng.random(6 * up).astype(np.float32) / (3 * up)
    down_filter = rng.random((12, 12) if radial else 12).astype(np.float32) / (72 if radial else 6)
    return stylegan3.LayerSpec("L", 2, 3, size, 0, 3, up, 2, padding, up_filter, down_filter, conv_clamp=1.5)


PADDINGS = [(9, 8, 9, 8), (-6, -9, -6, -9), (3, -7, -5, 2), (0, 0, 0, 0), (30, 27, 14, 40), (-5, -12, -13, -1)]


@pytest.mark.parametrize("lowering", ["convt", "poly"])
@pytest.mark.parametrize("radial", [False, True])
@pytest.mark.parametrize("up", [2, 4, 3])
@pytest.mark.parametrize("padding", PADDINGS)
def test_filtered_leaky_relu_equals_the_slow_formula(up, padding, radial, lowering):
    spec = layer_spec(up, padding, radial)
    layer = stylegan3.FilteredLayer(spec, 4)
    layer.lowering = lowering
    x = torch.randn(2, 3, 22, 22, generator=torch.Generator().manual_seed(0))
    got = layer.activate(x, padding)
    expected = slow_filtered_lrelu(
        x[1, 2].double().numpy(), spec.up_filter, spec.down_filter, up, 2, padding, spec.conv_clamp
    )
    np.testing.assert_allclose(got[1, 2].numpy(), expected, atol=2e-5)


def fused_layer(layer, x, w):
    """The layer of one sample: style and demodulation in the weights, whole padding, float64, no cropping ahead."""
    spec = layer.spec
    style = layer.affine(w)[0].double().numpy()
    weight = layer.weight.detach().double().numpy()
    if spec.is_torgb:
        weight = weight * style[None, :, None, None] / math.sqrt(weight[0].size)
    else:
        weight = weight * style[None, :, None, None]
        weight = weight / np.sqrt((weight**2).sum(axis=(1, 2, 3), keepdims=True))
    weight = weight / math.sqrt(float(layer.magnitude_ema))
    k = spec.kernel - 1
    padded = np.pad(x[0].double().numpy(), [(0, 0), (k, k), (k, k)])
    # A convolution layer correlates: the kernel is flipped for the true convolution of slow_filter.
    y = np.stack([sum(slow_filter(padded[i], o[i, ::-1, ::-1]) for i in range(spec.n_in)) for o in weight])
    y = y + layer.bias.detach().double().numpy()[:, None, None]
    if spec.is_torgb:
        return y
    return np.stack([
        slow_filtered_lrelu(
            p, spec.up_filter, spec.down_filter, spec.up, spec.down, spec.padding, spec.conv_clamp)
        for p in y
    ])


@pytest.mark.parametrize("lowering", ["convt", "poly"])
@pytest.mark.parametrize("config", ["T", "R"])
def test_a_layer_equals_the_fused_formula_of_one_sample(config, lowering):
    net = network(config, 32)
    net.set_lowering(lowering)
    for i in (0, 5, 13, 14):  # plain, up 4, critically sampled with negative padding, picture
        layer = net.layers[i]
        assert layer.spec.up == {0: 2, 5: 4, 13: 2, 14: 1}[i]
        generator = torch.Generator().manual_seed(i)
        x = torch.randn(1, layer.spec.n_in, layer.spec.in_size, layer.spec.in_size, generator=generator)
        w = torch.randn(1, 8, generator=generator)
        with torch.no_grad():
            got = layer(x, w)
        assert got.shape[2] == layer.spec.out_size
        np.testing.assert_allclose(got[0].numpy(), fused_layer(layer, x, w), atol=5e-5)


def test_fourier_input_equals_the_matrix_formula():
    net = network()
    source, w = net.input, torch.randn(2, 8)
    source.transform.copy_(torch.tensor([[0.9, 0.3, 0.05], [-0.2, 1.1, -0.1], [0, 0, 1]]))
    with torch.no_grad():
        got = source(w).numpy()
    size, rate, band = source.spec.size, source.spec.sampling_rate, source.spec.bandwidth
    for row in range(2):
        t = source.affine(w)[row].detach().double().numpy()
        t = t / math.hypot(t[0], t[1])
        rotate = np.array([[t[0], -t[1], 0], [t[1], t[0], 0], [0, 0, 1]])
        translate = np.array([[1, 0, -t[2]], [0, 1, -t[3]], [0, 0, 1]])
        m = rotate @ translate @ source.transform.double().numpy()
        f = source.freqs.double().numpy()
        phases = source.phases.double().numpy() + f @ m[:2, 2]
        f = f @ m[:2, :2]
        amplitude = np.clip(1 - (np.linalg.norm(f, axis=1) - band) / (rate / 2 - band), 0, 1)
        axis = (np.arange(size) + 0.5 - size / 2) / rate
        y, x = np.meshgrid(axis, axis, indexing="ij")
        waves = np.sin(2 * np.pi * (x[..., None] * f[:, 0] + y[..., None] * f[:, 1] + phases)) * amplitude
        expected = waves @ (source.weight.detach().double().numpy().T / math.sqrt(len(f)))
        np.testing.assert_allclose(got[row], expected.transpose(2, 0, 1), atol=2e-5)


# Design rules


PUBLIC_NAMES = {
    (1024, "T"): "36_512 36_512 52_512 52_512 84_512 148_512 148_512 276_323 276_203 532_128 1044_81 1044_51 1044_32 "
    "1024_32 1024_3",
    (1024, "R"): "36_1024 36_1024 52_1024 52_1024 84_1024 148_1024 148_1024 276_645 276_406 532_256 1044_161 1044_102 "
    "1044_64 1024_64 1024_3",
    (256, "T"): "36_512 36_512 36_512 52_512 52_512 84_512 84_512 148_512 148_512 148_362 276_256 276_181 276_128 "
    "256_128 256_3",
}


@pytest.mark.parametrize(("resolution", "config"), list(PUBLIC_NAMES))
def test_designed_layer_names_are_those_of_public_checkpoints(resolution, config):
    expected = [f"L{i}_{name}" for i, name in enumerate(PUBLIC_NAMES[resolution, config].split())]
    assert rules.design(resolution, config=config).layer_names == expected


@pytest.mark.parametrize("config", ["T", "R"])
@pytest.mark.parametrize("resolution", [16, 64, 1024])
def test_designed_sizes_paddings_and_filters_fit_each_other(config, resolution):
    plan = rules.design(resolution, config=config)
    size = plan.input.size
    for spec in plan.layers:
        assert spec.in_size == size
        assert stylegan3_files.filtered_sizes(spec) == (spec.out_size, spec.out_size)
        size = spec.out_size
    assert sum(spec.down_filter is not None and spec.down_filter.ndim == 2 for spec in plan.layers) == (
        12 if config == "R" else 0
    )
    assert plan.layers[-1].use_fp16
    assert min(spec.padding[0] for spec in plan.layers) < 0


def test_low_pass_filters_equal_those_of_scipy():
    scipy_signal, special = pytest.importorskip("scipy.signal"), pytest.importorskip("scipy.special")
    x = np.linspace(0.01, 60, 500)
    np.testing.assert_allclose(rules.bessel_j1(x), special.j1(x), atol=1e-13)
    for taps, cutoff, width, rate in [(12, 2.0, 12.0, 32.0), (24, 5.0, 9.0, 128.0), (12, 16.0, 8.2, 64.0)]:
        expected = scipy_signal.firwin(taps, cutoff, width=width, fs=rate)
        np.testing.assert_allclose(rules.lowpass(taps, cutoff=cutoff, width=width, rate=rate), expected, atol=1e-7)
    radial = rules.lowpass(13, cutoff=5.0, width=8.0, rate=64.0, radial=True)
    near = rules.lowpass(12, cutoff=5.0, width=8.0, rate=64.0, radial=True)
    assert radial[6, 6] == radial.max()
    assert radial.sum() == pytest.approx(1, abs=1e-6)
    np.testing.assert_allclose(near, near.T, atol=1e-9)


# Whole networks


@pytest.mark.parametrize(("config", "resolution"), [("T", 32), ("T", 64), ("R", 32)])
def test_rows_are_independent_and_the_picture_has_its_shape(config, resolution):
    net = network(config, resolution)
    ws = styles(net, 3)
    with torch.no_grad():
        three, one = net(ws), net(ws[1:2])
    assert three.shape == (3, 3, resolution, resolution)
    assert three.dtype == torch.float32
    assert three.std() > 1e-3
    assert (three[1] - one[0]).abs().max() < 1e-5
    net.set_lowering("poly")
    with torch.no_grad():
        assert (net(ws) - three).abs().max() < 1e-5


@pytest.mark.parametrize("config", ["T", "R"])
def test_a_calibrated_network_keeps_the_scale_of_its_activations(config):
    net = network(config)
    net.calibrate(styles(net, 8))
    with torch.no_grad():
        deviation = net(styles(net, 8)).std() / net.output_scale
    assert 0.3 < deviation < 3
    assert net.layers[5].magnitude_ema != 1


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 0.01), (torch.bfloat16, 0.08)])
def test_reduced_precision_stays_close_and_does_not_overflow(dtype, tolerance):
    net = network("T", 32)
    net.set_lowering("poly")
    ws = styles(net, 2)
    with torch.no_grad():
        expected = net(ws)
        net.set_precision(dtype)
        got = net(ws)
        assert (got - expected).abs().max() < tolerance * expected.abs().max()
        assert torch.isfinite(net(ws * 1000)).all()


def test_moving_the_input_moves_the_picture():
    """An integer number of pixels, tried inside a border; T is equivariant to translation, nearly."""
    net = network("T", 32)
    net.input.affine.weight.zero_()
    ws, pixels = styles(net, 1), 3
    with torch.no_grad():
        still = net(ws)
        net.input.transform[0, 2] = -pixels / net.resolution
        moved = net(ws)
    inside = slice(8, 24)
    error = (moved[..., inside, 8 + pixels : 24 + pixels] - still[..., inside, inside]).square().mean()
    unmoved = (moved[..., inside, inside] - still[..., inside, inside]).square().mean()
    variance = still[..., inside, inside].var()
    assert error < 1e-4 * variance
    assert error < 1e-3 * unmoved


@pytest.mark.slow
@pytest.mark.parametrize(("config", "lowering"), [("T", "convt"), ("R", "poly")])
def test_the_exported_graph_runs_at_two_batch_sizes(config, lowering, tmp_path):
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    net = network(config, 32)
    net.set_lowering(lowering)
    path = tmp_path / "net.onnx"
    torch.onnx.export(
        net, (styles(net, 2),), path, dynamo=True, external_data=False, verbose=False, opset_version=18,
        input_names=["ws"], output_names=["image"], dynamic_shapes=({0: torch.export.Dim("rows")},),
    )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    assert isinstance(session.get_inputs()[0].shape[0], str)
    for rows in (1, 3):
        ws = styles(net, rows)
        with torch.no_grad():
            expected = net(ws).numpy()
        assert np.abs(session.run(None, {"ws": ws.numpy()})[0] - expected).max() < 1e-4


# Checkpoints


def passive(module, **facts):
    """The passive record of a module, as the restricted unpickler gives it."""

    def numbers(tensors):
        return {name: None if t is None else t.detach().numpy() for name, t in tensors.items()}

    children = {name: passive(child, **described(child)) for name, child in module._modules.items()}
    tensors = {"_parameters": numbers(module._parameters), "_buffers": numbers(module._buffers)}
    return Module(class_name=type(module).__name__, state=tensors | {"_modules": children} | facts)


def described(module):
    """The plain attributes that the reference stores, with its numpy types."""
    if isinstance(module, stylegan3.FilteredLayer):
        s = module.spec
        rate = s.out_size - (0 if s.out_size == 32 else 20)
        return {
            "up_factor": s.up, "down_factor": s.down, "padding": list(s.padding), "conv_clamp": 256,
            "in_size": np.array([s.in_size] * 2), "out_size": np.array([s.out_size] * 2), "is_torgb": s.is_torgb,
            "use_fp16": np.bool_(s.use_fp16), "out_sampling_rate": np.float64(rate),
        }
    if isinstance(module, stylegan3.FourierInput):
        return dataclasses.asdict(module.spec) | {"size": np.array([module.spec.size] * 2)}
    return {"bias_gain": getattr(module, "lr_multiplier", 1.0)}


def generator_record(net, mapping):
    synthesis = passive(
        net, layer_names=net.layer_names, w_dim=net.w_dim, output_scale=net.output_scale, num_ws=net.num_ws
    )
    facts = {name: getattr(mapping, name) for name in ("z_dim", "w_dim", "c_dim", "num_layers")}
    modules = {"mapping": passive(mapping, **facts), "synthesis": synthesis}
    state = {"_parameters": {}, "_buffers": {}, "_modules": modules, "num_ws": net.num_ws}
    return Module(class_name="Generator", state=state)


@pytest.mark.parametrize("config", ["T", "R"])
def test_a_checkpoint_reproduces_the_pictures(config):
    net, mapping = network(config, 32), Mapping(6, 8, c_dim=4, num_layers=2)
    mapping.w_avg.normal_()
    parts = from_nvidia(generator_record(net, mapping))
    again, synthesis = parts.mapping, parts.synthesis
    z, label = torch.randn(2, 6), torch.tensor([3, 0])
    with torch.no_grad():
        assert torch.equal(again(z, label), mapping(z, label))
        assert torch.equal(again.w_avg, mapping.w_avg)
        assert torch.equal(synthesis(styles(net, 2)), net(styles(net, 2)))
    assert [layer.spec.use_fp16 for layer in synthesis.layers] == [layer.spec.use_fp16 for layer in net.layers]


def test_a_checkpoint_becomes_parts():
    net = network("R", 32)
    parts = from_nvidia({"G_ema": generator_record(net, Mapping(6, 8, num_layers=2))})
    assert (parts.facts.architecture, parts.facts.resolution, parts.facts.num_ws) == ("stylegan3-r", 32, 16)
    assert (parts.facts.num_fp16_res, parts.facts.conv_clamp) == (2, 256)
    assert not any(p.requires_grad for p in parts.synthesis.parameters())


def test_a_damaged_checkpoint_is_refused_with_a_reason():
    record = generator_record(network(), Mapping(6, 8, num_layers=2)).state["_modules"]["synthesis"]
    layer = next(child for name, child in record.state["_modules"].items() if name.startswith("L3"))
    layer.state["padding"] = [9, 8, 9, 11]
    with pytest.raises(CheckpointError, match="do not fit"):
        stylegan3_files.read_plan(record)
    del layer.state["up_factor"]
    with pytest.raises(CheckpointError, match="up_factor"):
        stylegan3_files.read_plan(record)


def test_samples_that_a_negative_padding_removes_are_not_computed():
    assert resampling.unused_inputs((-6, -9, 9, 8), 4) == (2, 2, 0, 0)
    assert resampling.unused_inputs((-11, -12, -2, -1), 2) == (6, 6, 1, 0)
