"""Part A of the findings: every kind of file that StyleGAN users have is read, or refused with advice that works."""

import argparse
import collections
import pathlib
import pickle

import numpy as np
import pytest
import torch

from engine.errors import CheckpointError
from engine.reference import field
from exporter.checkpoints import load_generator
from exporter.contents import field_tensors
from exporter.generators.stylegan2 import Dense, Generator, Mapping, Synthesis
from tests import checkpoints as build
from tests import test_stylegan3 as three
from tests.test_checkpoints import pickled_again, same_pictures

CONV_CLAMP = 256.0


@pytest.fixture
def load(tmp_path):
    def loader(data: bytes):
        (tmp_path / "file.bin").write_bytes(data)
        return load_generator(tmp_path / "file.bin")

    return loader


def prefixed(prefix, state):
    return {f"{prefix}{name}": value for name, value in state.items()}


# --- A1: bare state_dicts of NVIDIA --------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["skip", "resnet", "orig"])
@pytest.mark.parametrize("c_dim", [0, 3])
def test_A1_a_bare_state_dict_of_stylegan2_gives_the_same_pictures(load, architecture, c_dim):
    net = build.generator(architecture, c_dim=c_dim)
    parts = load(build.torch_bytes(net.state_dict()))
    same_pictures(net, parts)
    assert (parts.facts.source, parts.facts.architecture) == ("nvidia", f"stylegan2-{architecture}")
    assert parts.facts.conv_clamp == CONV_CLAMP
    assert "256" in " ".join(parts.remarks)


@pytest.mark.parametrize("config", ["T", "R"])
def test_A1_a_bare_state_dict_of_stylegan3_gives_the_same_pictures(load, config):
    net, mapping = three.network(config, 32), Mapping(6, 8, c_dim=2, num_layers=2)
    state = {**prefixed("mapping.", mapping.state_dict()), **prefixed("synthesis.", net.state_dict())}
    parts = load(build.torch_bytes({"G_ema": state}))
    ws = three.styles(net, 2)
    with torch.no_grad():
        assert torch.equal(parts.synthesis(ws), net(ws))
        z, label = torch.randn(2, 6), torch.tensor([1, 0])
        assert torch.equal(parts.mapping(z, label), mapping(z, label))
    assert (parts.facts.architecture, parts.facts.num_ws) == (f"stylegan3-{config.lower()}", 16)


def test_A1_a_stylegan3_of_other_rules_is_refused_with_advice_that_works(load):
    net, mapping = three.network("T", 32), Mapping(6, 8, num_layers=2)
    state = {**prefixed("mapping.", mapping.state_dict()), **prefixed("synthesis.", net.state_dict())}
    name = next(name for name in state if ".L3_" in name and name.endswith("up_filter"))
    state[name] = state[name] + 0.1
    with pytest.raises(CheckpointError, match=r"up_filter of layer L3.*give the \.pkl"):
        load(build.torch_bytes(state))
    with build.foreign_names():
        data = pickle.dumps({"G_ema": pickled_again(three.generator_record(net, mapping))})
    assert load(data).facts.architecture == "stylegan3-t"


@pytest.mark.parametrize("keys", [("g_ema",), ("G_ema",), ("G",), ("g",), ("generator",), ("state_dict",), ("ema",),
                                  ("params_ema",), ("model", "G_ema"), ("model_state_dict",)])
@pytest.mark.parametrize("family", ["nvidia", "rosinality"])
def test_A1_A6_state_dicts_are_found_under_the_usual_keys(load, keys, family):
    net = build.generator()
    content = net.state_dict() if family == "nvidia" else build.rosinality_state(net)
    if family == "rosinality":
        content["latent_avg"] = net.mapping.w_avg
    for key in reversed(keys):
        content = {key: content, "step": 3}
    parts = load(build.torch_bytes(content))
    same_pictures(net, parts)
    assert parts.facts.source == family
    is_raw = keys[-1] in ("G", "g", "generator")
    assert any("not in this file" in remark for remark in parts.remarks) == is_raw


@pytest.mark.parametrize("prefix", ["module.", "generator.", "G_ema.", "model.module.g_ema."])
@pytest.mark.parametrize("family", ["nvidia", "rosinality"])
def test_A1_A6_prefixes_of_whole_models_are_stripped_and_the_averaged_one_is_taken(load, prefix, family):
    net, other = build.generator(), build.generator(seed=9)
    states = [n.state_dict() if family == "nvidia" else build.rosinality_state(n) for n in (net, other)]
    content = prefixed(prefix, states[0])
    if "ema" in prefix:
        content |= prefixed("G.", states[1])
    data = build.torch_bytes({"state_dict": content, "latent_avg": net.mapping.w_avg})
    same_pictures(net, load(data))


def test_A1_safetensors_of_a_state_dict_are_read(load):
    import safetensors.torch

    net = build.generator()
    same_pictures(net, load(safetensors.torch.save({k: v.contiguous() for k, v in net.state_dict().items()})))


class Unknown:
    """Pickles as an object of a class that is not installed, with a state."""

    def __init__(self, home, name, state):
        self.home, self.name, self.state = home, name, state


def foreign_pickle(content, protocol=4) -> bytes:
    """``Unknown`` objects become objects of the classes that they name."""
    homes = {}

    def convert(value):
        if isinstance(value, Unknown):
            kind = homes.setdefault((value.home, value.name), type(value.name, (), {}))
            made = kind()
            made.__dict__.update({key: convert(inner) for key, inner in value.state.items()})
            return made
        if isinstance(value, dict):
            return type(value)((key, convert(inner)) for key, inner in value.items())
        return value

    content = convert(content)
    with build.foreign_names([(home, (kind, name)) for (home, name), kind in homes.items()]):
        return pickle.dumps(content, protocol)


def test_A1_the_advice_for_an_unknown_class_works_when_followed(load, tmp_path):
    net = build.generator()
    unknown = Unknown("training.secret", "SecretGenerator", {"anything": 1})
    with pytest.raises(CheckpointError, match=r"training\.secret\.SecretGenerator.*torch\.save\(G_ema\.state_dict\(\)"):
        load(foreign_pickle({"G_ema": unknown}))
    G_ema = net
    torch.save(G_ema.state_dict(), tmp_path / "generator.pt")
    same_pictures(net, load_generator(tmp_path / "generator.pt"))


# --- A2: TensorFlow ------------------------------------------------------------------------------------------------


def test_A2_width_and_height_that_equal_the_resolution_are_fine(load):
    net = build.generator()
    same_pictures(net, load(build.tensorflow_pickle(net, resolution_w=16, resolution_h=16)))


@pytest.mark.parametrize("sides", [{"resolution_w": 8}, {"resolution_h": 32, "resolution_w": 16}])
def test_A2_pictures_that_are_not_square_are_called_so(load, sides):
    with pytest.raises(CheckpointError, match="not square"):
        load(build.tensorflow_pickle(build.generator(), **sides))


def test_A2_only_options_of_stylegan1_are_blamed_on_it(load):
    with pytest.raises(CheckpointError, match="use_instance_norm of StyleGAN1"):
        load(build.tensorflow_pickle(build.generator(), use_instance_norm=True))
    with pytest.raises(CheckpointError, match="unknown here: fused_magic") as caught:
        load(build.tensorflow_pickle(build.generator(), fused_magic=1))
    assert "StyleGAN1" not in str(caught.value)


def test_A6_the_averaged_network_of_tensorflow_alone_is_read(load):
    net = build.generator()
    same_pictures(net, load(build.tensorflow_pickle(net, alone=True)))


# --- A3: encoders that carry their generator -----------------------------------------------------------------------


def encoder_file(net, rows=18, noise=0.0, **extra) -> bytes:
    """What pSp, e4e, ReStyle and HyperStyle write: the encoder, the decoder, latent_avg for each layer, options."""
    state = {"encoder.input_layer.0.weight": torch.ones(4, 3, 3, 3), "encoder.styles.0.linear.weight": torch.ones(2, 2),
             **prefixed("decoder.", build.rosinality_state(net))}
    average = net.mapping.w_avg.repeat(rows, 1) + noise * torch.randn(rows, len(net.mapping.w_avg))
    options = argparse.Namespace(stylegan_size=16, exp_dir=pathlib.PosixPath("/experiments/x"))
    return build.torch_bytes({"state_dict": state, "latent_avg": average, "opts": options, **extra})


def test_A3_the_decoder_of_an_encoder_is_the_generator(load):
    net = build.generator()
    parts = load(encoder_file(net))
    same_pictures(net, parts)
    assert parts.remarks == ()
    same_pictures(net, load(encoder_file(net, rows=1, w_encoder={"a": torch.ones(2)})))


def test_A3_a_centre_that_differs_from_layer_to_layer_is_averaged_and_said_so(load):
    net = build.generator()
    parts = load(encoder_file(net, noise=0.1))
    assert torch.allclose(parts.mapping.w_avg, net.mapping.w_avg, atol=0.2)
    assert "differs from layer to layer" in parts.remarks[0]


@pytest.mark.parametrize(("centre", "message"), [
    (torch.zeros(2, 3, 6), r"latent_avg has the shape \(2, 3, 6\)"), ("text", "latent_avg is 'text'"),
    (torch.zeros(7), "of another shape"), (torch.zeros(0), r"shape \(0,\)")])
def test_A3_a_centre_of_another_shape_is_blamed_itself(load, centre, message):
    data = build.torch_bytes({"g_ema": build.rosinality_state(build.generator()), "latent_avg": centre})
    with pytest.raises(CheckpointError, match=message):
        load(data)


# --- A4 and C11: foreign classes, and plain data of known ones -----------------------------------------------------


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_A4_a_foreign_discriminator_does_not_hinder_the_generator(load, protocol):
    net = build.generator()
    with build.foreign_names():
        record = build.nvidia_record(net)
    features = Unknown("timm.models.efficientnet", "EfficientNet", {"_modules": {}, "conv": np.ones(3)})
    foreign = Unknown("pg_modules.discriminator", "ProjectedDiscriminator", {"feature_network": features})
    parts = load(foreign_pickle({"G": None, "D": foreign, "G_ema": record}, protocol))
    same_pictures(net, parts)
    (remark,) = parts.remarks
    assert "pg_modules.discriminator.ProjectedDiscriminator" in remark
    assert "nothing was executed" in remark


def test_C11_common_objects_of_python_and_torch_are_plain_data(load):
    net = build.generator()
    counts = collections.defaultdict(list, a=[1])
    extra = {"path": pathlib.PurePosixPath("/a/b"), "size": torch.Size([2, 3]), "counts": counts,
             "histogram": collections.Counter("abca"), "queue": collections.deque([1, 2], maxlen=3),
             "device": torch.device("cpu"), "type": torch.float16, "when": frozenset({1, 2}), "pairs": {(1, 2): 3},
             "names": np.array(["a", "b"]), "things": np.array([None, {}], dtype=object), "complex": torch.ones(
                 2, dtype=torch.complex64), "partial": argparse.Namespace(x=slice(1, 2))}
    for legacy in (False, True):
        if legacy:
            del extra["complex"]  # of a storage whose size an old container does not state
        parts = load(build.torch_bytes({"g_ema": build.rosinality_state(net), "latent_avg": net.mapping.w_avg,
                                        "extra": extra}, legacy=legacy))
        same_pictures(net, parts)
    from exporter.archives import load_zip

    found = load_zip(build.torch_bytes(extra | {"complex": 0}))
    assert (found["path"], found["size"], found["counts"]) == ("/a/b", (2, 3), {"a": [1]})
    assert (found["histogram"], found["queue"], found["device"]) == ({"a": 2, "b": 1, "c": 1}, [1, 2], "cpu")
    assert (found["when"], found["pairs"]) == ({1, 2}, {})


def test_A4_a_whole_module_of_another_package_is_read_by_the_names_of_its_tensors(load):
    net = build.generator()
    state = {name: value.numpy() for name, value in build.rosinality_state(net).items()}

    def module(prefix=""):
        inner = {name.removeprefix(prefix).split(".")[0] for name in state if name.startswith(prefix)}
        leaves = {name: state[prefix + name] for name in inner if prefix + name in state}
        below = {name: module(f"{prefix}{name}.") for name in sorted(inner) if prefix + name not in state}
        return Unknown("model", f"Part{prefix.count('.')}", {"_parameters": leaves, "_buffers": {}, "_modules": below})

    parts = load(foreign_pickle({"g_ema": module(), "latent_avg": net.mapping.w_avg.numpy()}))
    same_pictures(net, parts)


# --- A5: families that are not supported ---------------------------------------------------------------------------


def persistent(class_name, **parts):
    return build.Persistent(class_name, {"_modules": parts, "_parameters": {}, "_buffers": {}}, "")


def plain_module(home, name, **parts):
    return Unknown(home, name, {"_modules": parts, "_parameters": {}, "_buffers": {}})


def unsupported_pickles():
    embedding = plain_module("torch.nn.modules.sparse", "Embedding")
    layer = persistent("SynthesisLayer")
    xl = persistent("Generator", mapping=persistent("MappingNetwork", embed=embedding, embed_proj=layer),
                    synthesis=persistent("SynthesisNetwork", input=layer))
    super_xl = persistent("SuperresGenerator", mapping=persistent("MappingNetwork", embed=embedding, embed_proj=layer),
                          synthesis=persistent("SynthesisNetwork", input=layer))
    backbone = persistent("Generator", mapping=layer, synthesis=persistent("SynthesisNetwork", b4=layer))
    eg3d = persistent("TriPlaneGenerator", renderer=plain_module("training.volumetric_rendering.renderer",
                                                                 "ImportanceRenderer"),
                      backbone=backbone, superresolution=persistent("SuperresolutionHybrid8XDC"),
                      decoder=plain_module("training.triplane", "OSGDecoder"))
    fastgan = plain_module("pg_modules.networks_fastgan", "Generator",
                           mapping=plain_module("pg_modules.networks_fastgan", "DummyMapping"),
                           synthesis=plain_module("pg_modules.networks_fastgan", "FastganSynthesis"))
    return {"StyleGAN-XL": (xl, super_xl), "EG3D": (eg3d,), "FastGAN": (fastgan,)}


@pytest.mark.parametrize("family", ["StyleGAN-XL", "EG3D", "FastGAN"])
def test_A5_pickles_of_other_families_are_called_by_their_name(load, family):
    for generator in unsupported_pickles()[family]:
        with pytest.raises(CheckpointError, match=rf"this is an? {family} generator.*give an ONNX file of it"):
            load(foreign_pickle({"G": generator, "D": None, "G_ema": generator}))


@pytest.mark.parametrize(("names", "family"), [
    (["mapping.embed.weight", "mapping.embed_proj.weight", "synthesis.input.freqs"], "StyleGAN-XL"),
    (["backbone.synthesis.b4.const", "backbone.mapping.fc0.weight", "decoder.net.0.weight"], "EG3D"),
    (["module.init.init.0.weight_orig", "module.feat_8.0.weight", "module.se_64.main.1.weight"], "FastGAN"),
    (["GE.S.net.0.weight", "GE.G.initial_block", "GE.G.blocks.0.to_noise1.weight"], "lucidrains"),
    (["mapping.dense0.weight", "synthesis.layer0.weight"], "StyleGAN1"),
    (["generator.gen_z.weight", "embeddings.weight"], "BigGAN"),
])
@pytest.mark.parametrize("key", [None, "g", "g_ema", "GAN", "state_dict"])
def test_A5_A6_state_dicts_of_other_families_are_called_by_their_name(load, names, family, key):
    state = {name: torch.ones(2, 2) for name in names}
    with pytest.raises(CheckpointError, match=f"this is an? .*{family}"):
        load(build.torch_bytes(state if key is None else {key: state, "version": "1.8.1"}))


# --- A6: BasicSR and others ----------------------------------------------------------------------------------------


def basicsr_state(net):
    renamed = {}
    for name, value in build.rosinality_state(net).items():
        if name.endswith("kernel"):
            continue  # BasicSR does not store them
        name = name.replace(".conv.", ".modulated_conv.").replace("input.input", "constant_input.weight")
        name = name.replace("style.", "style_mlp.").replace("noises.noise_", "noises.noise").replace(
            ".noise.weight", ".weight")
        renamed[f"style_{name}" if name.startswith("conv") else name] = value
    return renamed


def test_A6_basicsr_gives_the_same_pictures(load):
    net = build.generator()
    state = basicsr_state(net)
    assert {"style_conv1.modulated_conv.weight", "style_convs.1.weight", "style_mlp.3.bias", "noises.noise4",
            "style_conv1.activate.bias", "to_rgbs.0.modulated_conv.modulation.bias"} <= set(state)
    parts = load(build.torch_bytes({"params_ema": state, "latent_avg": net.mapping.w_avg}))
    same_pictures(net, parts)
    assert parts.facts.source == "basicsr"
    parts = load(build.torch_bytes({"params_ema": {"conv_body_first.weight": torch.ones(1),
                                                   **prefixed("stylegan_decoder.", state)},
                                    "latent_avg": net.mapping.w_avg}))
    same_pictures(net, parts)
    assert "GFPGAN" in parts.remarks[0]


def test_A6_the_clean_networks_of_gfpgan_are_refused_with_their_reason(load):
    state = basicsr_state(build.generator()) | {"style_conv1.bias": torch.zeros(1, 6, 1, 1)}
    with pytest.raises(CheckpointError, match="'clean' StyleGAN2 of GFPGAN"):
        load(build.torch_bytes({"params_ema": prefixed("stylegan_decoder.", state)}))


def test_A6_pictures_that_are_not_square_are_called_so(load):
    state = build.generator().state_dict()
    state["synthesis.b4.const"] = torch.zeros(6, 4, 2)
    with pytest.raises(CheckpointError, match="not square"):
        load(build.torch_bytes(state))
    human = build.rosinality_state(build.generator())
    human["input.input"] = torch.zeros(1, 6, 8, 4)
    with pytest.raises(CheckpointError, match="not square"):
        load(build.torch_bytes({"g_ema": human}))
    record = three.generator_record(three.network("T", 32), Mapping(6, 8, num_layers=2))
    record.state["_modules"]["synthesis"].state["_modules"]["input"].state["size"] = np.array([36, 18])
    with build.foreign_names():
        data = pickle.dumps({"G_ema": pickled_again(record)})
    with pytest.raises(CheckpointError, match="not square"):
        load(data)


# --- A7 ------------------------------------------------------------------------------------------------------------


def test_A7_a_centre_that_was_estimated_is_noted(load):
    (remark,) = load(build.rosinality_file(build.generator(widths={4: 2, 8: 2}), centre=False)).remarks
    assert "mean of w over 50,000 samples" in remark
    assert load(build.rosinality_file(build.generator())).remarks == ()


def test_A7_narrow_layers_and_embeddings_of_the_mapping_are_exact_in_a_bundle(load):
    torch.manual_seed(0)
    mapping = Mapping(5, 8, c_dim=3, num_layers=3, hidden=6, embedded=4)
    net = Generator(mapping, Synthesis(8, {4: 4, 8: 4}))
    for layer in (module for module in net.modules() if isinstance(module, Dense)):
        layer.bias.data.add_(torch.randn_like(layer.bias))
    mapping.w_avg.normal_()
    net.eval().requires_grad_(False)
    parts = load(build.torch_bytes({"G_ema": net.state_dict()}))
    same_pictures(net, parts)
    tensors = field_tensors(parts.mapping)
    assert tensors["mapping.0.weight"].shape == (8, 5 + 8)
    assert tensors["mapping.embedding"].shape == (3, 8)
    z, label = torch.randn(6, 5), torch.arange(6) % 3
    w, _ = field.mapping(tensors, z.numpy(), np.ones((6, 1)), label.numpy())
    assert np.abs(w - mapping(z, label).numpy()).max() < 1e-5


@pytest.mark.parametrize("options", [{"hidden": 9}, {"embedded": 9, "c_dim": 2}])
def test_A7_layers_wider_than_w_are_refused_by_their_option(load, options):
    net = Generator(Mapping(5, 8, num_layers=3, **options), Synthesis(8, {4: 4, 8: 4}))
    with pytest.raises(CheckpointError, match=r"wider than w.*layer_features, embed_features"):
        load(build.torch_bytes(net.state_dict()))
