"""Builders of tiny checkpoints of every format that the exporter reads, from generators of our own.

The conversions here go the other way than those of the exporter and were written apart from them.
"""

import argparse
import contextlib
import io
import itertools
import math
import pickle
import sys
import types
from collections import OrderedDict

import numpy as np
import torch

from exporter.generators.stylegan2 import Dense, Generator, Mapping, Skip, Synthesis, SynthesisLayer, ToRGB

WIDTHS = {4: 6, 8: 5, 16: 4}


def generator(architecture="skip", *, c_dim=0, use_noise=True, conv_clamp=None, widths=WIDTHS, seed=0) -> Generator:
    """A random generator whose every tensor matters to the picture."""
    torch.manual_seed(seed)
    mapping = Mapping(5, 6, c_dim=c_dim, num_layers=3)
    synthesis = Synthesis(6, widths, architecture=architecture, use_noise=use_noise, conv_clamp=conv_clamp)
    result = Generator(mapping, synthesis)
    with torch.no_grad():
        for name, p in result.named_parameters():
            if name.endswith("bias") or name.endswith("noise_strength"):
                p.add_(0.3 * torch.randn(p.shape) * (100 if name.startswith("mapping.fc") else 1))
        mapping.w_avg.copy_(torch.randn(6))
    return result.eval().requires_grad_(False)


@torch.no_grad()
def pictures(mapping, synthesis, rows=2):
    z = torch.randn(rows, mapping.z_dim, generator=torch.Generator().manual_seed(5))
    label = torch.arange(rows) % mapping.c_dim if mapping.c_dim else None
    w = mapping.w_avg + 0.7 * (mapping(z, label) - mapping.w_avg)
    return synthesis(w[:, None].expand(-1, synthesis.num_ws, -1))


# --- names that the files refer to, without the packages ----------------------------------------------------------


class EasyDict(dict):
    pass


class Network:
    pass


def reconstruct(meta):
    raise AssertionError("the reference's loader must never run")


class Persistent:
    """Pickles as NVIDIA's decorated modules do."""

    def __init__(self, class_name, state, source, version=6):
        self.meta = {"type": "class", "version": version, "module_src": source, "class_name": class_name,
                     "state": state}

    def __reduce__(self):
        return reconstruct, (self.meta,)


HOMES = {"torch_utils.persistence": (reconstruct, "_reconstruct_persistent_obj"), "dnnlib.util": (EasyDict, "EasyDict"),
         "dnnlib.tflib.network": (Network, "Network")}


@contextlib.contextmanager
def foreign_names(others=()):
    """Inside, pickling writes the foreign names; outside there is no trace of them.

    ``others``: (home, (thing, name)) beside those that NVIDIA's files refer to.
    """
    added, before, hidden = [], {}, []
    for home, (thing, name) in (*HOMES.items(), *others):
        parts = home.split(".")
        for end in range(1, len(parts) + 1):
            path = ".".join(parts[:end])
            if path not in sys.modules:
                sys.modules[path] = types.ModuleType(path)
                added.append(path)
        hidden.append((sys.modules[home], name, getattr(sys.modules[home], name, None)))
        setattr(sys.modules[home], name, thing)
        before[thing] = (thing.__module__, thing.__name__, thing.__qualname__)
        thing.__module__, thing.__name__, thing.__qualname__ = home, name, name
    try:
        yield
    finally:
        for thing, (module, name, qualname) in before.items():
            thing.__module__, thing.__name__, thing.__qualname__ = module, name, qualname
        for module, name, thing in hidden:  # of packages that are really there
            setattr(module, name, thing)
        for path in added:
            del sys.modules[path]


# --- NVIDIA -------------------------------------------------------------------------------------------------------

CLASSES = {"Dense": "FullyConnectedLayer", "Mapping": "MappingNetwork", "Synthesis": "SynthesisNetwork",
           "Block": "SynthesisBlock", "ToRGB": "ToRGBLayer", "Skip": "Conv2dLayer"}


def persistent(module, source, *, name="", old_torch=False):
    """A torch module as a record with the attributes that NVIDIA's classes have."""
    table = OrderedDict if old_torch else dict
    state = {key: value for key, value in module.__dict__.items() if key.startswith("_") or key == "training"}
    state["_modules"] = table((k, persistent(m, source, name=k, old_torch=old_torch)) for k, m in
                              module._modules.items())
    state["_parameters"] = table(module._parameters)
    state["_buffers"] = table(module._buffers)
    if isinstance(module, Dense):
        state.update(activation="lrelu" if name.startswith("fc") else "linear", bias_gain=module.lr_multiplier,
                     weight_gain=np.float64(module.lr_multiplier / math.sqrt(module.weight.shape[1])))
    elif isinstance(module, (SynthesisLayer, ToRGB)):
        state.update(conv_clamp=module.conv_clamp, act_gain=np.float64(math.sqrt(2)))
        if isinstance(module, SynthesisLayer):
            state.update(activation="lrelu", up=1 + module.up, use_noise=module.use_noise, padding=1)
            memory = torch.nn.Parameter(module.weight.to(memory_format=torch.channels_last), requires_grad=False)
            state["_parameters"] = table({**module._parameters, "weight": memory})
    elif isinstance(module, Skip):
        state.update(activation="linear")
    elif hasattr(module, "resolution") and hasattr(module, "conv1"):
        state.update(architecture=module.architecture, use_fp16=module.resolution >= 16)
    state["_init_args"], state["_init_kwargs"] = (), EasyDict(channel_base=64)
    return Persistent(CLASSES.get(type(module).__name__, type(module).__name__), state, source)


def nvidia_record(net, source="", **options):
    return persistent(net, source, **options)


def nvidia_pickle(net, *, protocol=4, snapshot="ema", source="raise SystemExit", old_torch=False) -> bytes:
    """snapshot: 'ema' (G_ema only), 'full' (with G, D and the data set), or 'bare' (the module itself)."""
    with foreign_names():
        record = nvidia_record(net, source, old_torch=old_torch)
        content = {"G_ema": record}
        if snapshot == "full":
            other = nvidia_record(generator(seed=9), source)
            content = {"training_set_kwargs": EasyDict(path="x.zip", max_size=3, xflip=False), "G": other,
                       "D": other, "G_ema": record, "augment_pipe": None}
        return pickle.dumps(record if snapshot == "bare" else content, protocol=protocol)


def torch_bytes(content, *, legacy=False) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=not legacy)
    return buffer.getvalue()


def nvidia_zip(net, *, legacy=False, source="raise SystemExit") -> bytes:
    with foreign_names():
        return torch_bytes(nvidia_record(net, source), legacy=legacy)


# --- TensorFlow ---------------------------------------------------------------------------------------------------


def tensorflow_layer(layer, part) -> dict:
    """Variables of a modulated convolution, without the layer's own name in front."""
    weight = layer.weight.numpy()
    found = {"mod_weight": layer.affine.weight.numpy().T, "mod_bias": layer.affine.bias.numpy() - 1,
             "bias": layer.bias.numpy(), "weight": np.einsum("oihw->hwio", weight)}
    if part == "Conv0_up":
        found["weight"] = np.rot90(found["weight"], 2, axes=(0, 1))
    if hasattr(layer, "noise_strength"):
        found["noise_strength"] = np.float32(layer.noise_strength.item())
    return found


def tensorflow_variables(net, *, picture="ToRGB") -> tuple[dict, dict, dict]:
    """(mapping, synthesis, top) by local name."""
    mapping, synthesis = {}, {}
    for i, layer in enumerate(net.mapping.layers):
        mapping[f"Dense{i}/weight"], mapping[f"Dense{i}/bias"] = layer.weight.numpy().T, layer.bias.numpy()
    if net.mapping.c_dim:
        mapping["LabelEmbed/weight"] = net.mapping.embed.weight.numpy().T
        mapping["LabelEmbed/bias"] = net.mapping.embed.bias.numpy()
    synthesis["4x4/Const/const"] = net.synthesis.b4.const.numpy()[None]
    noise = 0
    for block in net.synthesis.blocks:
        r = block.resolution
        names = ["Conv"] if r == 4 else ["Conv0_up", "Conv1"]
        for part, layer in zip(names, block.layers, strict=True):
            synthesis.update({f"{r}x{r}/{part}/{k}": v for k, v in tensorflow_layer(layer, part).items()})
            if layer.use_noise:
                synthesis[f"noise{noise}"] = layer.noise_const.numpy()[None, None]
            noise += 1
        if hasattr(block, "skip"):
            synthesis[f"{r}x{r}/Skip/weight"] = np.einsum("oihw->hwio", block.skip.weight.numpy())
        if hasattr(block, "torgb"):
            home = f"{r}x{r}/ToRGB" if picture == "ToRGB" else picture
            synthesis.update({f"{home}/{k}": v for k, v in tensorflow_layer(block.torgb, home).items()})
    return mapping, synthesis, {"dlatent_avg": net.mapping.w_avg.numpy()}


def tensorflow_network(name, variables, components=(), **options):
    network = Network()
    network.__dict__.update(
        version=5, name=name, static_kwargs=EasyDict(options), components=OrderedDict(components),
        build_module_src="raise SystemExit", build_func_name="G_main", variables=list(variables.items()),
    )
    return network


def tensorflow_pickle(net, *, protocol=4, picture="ToRGB", alone=False, **options) -> bytes:
    mapping, synthesis, top = tensorflow_variables(net, picture=picture)
    options = {"num_channels": 3, "resolution": net.synthesis.resolution, "fmap_base": 16384,
               "architecture": net.synthesis.architecture} | options
    with foreign_names():
        parts = {"synthesis": tensorflow_network("G_synthesis", synthesis),
                 "mapping": tensorflow_network("G_mapping", mapping)}
        whole = tensorflow_network("Gs", top, parts.items(), **options)
        other = tensorflow_network("G", {})
        return pickle.dumps(whole if alone else (other, other, whole), protocol=protocol)


# --- rosinality and LACE ------------------------------------------------------------------------------------------


def rosinality_layer(layer, home, is_picture) -> dict:
    found = {f"{home}.conv.weight": layer.weight[None], f"{home}.conv.modulation.weight": layer.affine.weight,
             f"{home}.conv.modulation.bias": layer.affine.bias}
    if is_picture:
        return found | {f"{home}.bias": layer.bias.reshape(1, -1, 1, 1)}
    return found | {f"{home}.noise.weight": layer.noise_strength.reshape(1), f"{home}.activate.bias": layer.bias}


def rosinality_state(net) -> OrderedDict:
    state = OrderedDict()
    for i, layer in enumerate(net.mapping.layers):
        state[f"style.{i + 1}.weight"], state[f"style.{i + 1}.bias"] = layer.weight, layer.bias
    state["input.input"] = net.synthesis.b4.const[None]
    kernel = torch.outer(torch.tensor([1.0, 3, 3, 1]), torch.tensor([1.0, 3, 3, 1])) / 16
    for i, layer in enumerate(net.synthesis.layers):
        home = "conv1" if i == 0 else f"convs.{i - 1}"
        state.update(rosinality_layer(layer, home, False))
        state[f"noises.noise_{i}"] = layer.noise_const[None, None]
        if layer.up:
            state[f"{home}.conv.blur.kernel"] = kernel
    for i, block in enumerate(net.synthesis.blocks):
        home = "to_rgb1" if i == 0 else f"to_rgbs.{i - 1}"
        state.update(rosinality_layer(block.torgb, home, True))
        if i:
            state[f"{home}.upsample.kernel"] = kernel
    state._metadata = OrderedDict(version=1)
    return state


def rosinality_file(net, *, centre=True, training=False, legacy=False) -> bytes:
    content = {"g_ema": rosinality_state(net)}
    if centre:
        content["latent_avg"] = net.mapping.w_avg
    if training:
        optimiser = {"state": {0: {"step": 3, "exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 0.1}]}
        arguments = argparse.Namespace(size=16, lr=0.002, path="x")
        content |= {"args": arguments, "ada_aug_p": 0.1, "g_optim": optimiser}
    return torch_bytes(content, legacy=legacy)


def lace_head(widths=(6, 5, 4, 3), logits=2, *, last="heads", seed=0) -> tuple[dict, list]:
    """(the checkpoint's content, its plain layers)."""
    torch.manual_seed(seed)
    layers = [(torch.randn(o, i), torch.randn(o)) for i, o in itertools.pairwise(widths)]
    layers.append((torch.randn(logits, widths[-1]), torch.randn(logits)))
    state = OrderedDict()
    for i, (weight, bias) in enumerate(layers[:-1]):
        state[f"net.{3 * i}.weight"], state[f"net.{3 * i}.bias"] = weight[:, :, None, None], bias
    state[f"{last}.weight"], state[f"{last}.bias"] = layers[-1]
    prefixed = OrderedDict((f"f.{key}", value) for key, value in state.items())
    return {"state_dict": state, "model_state_dict": prefixed}, [(w.numpy(), b.numpy()) for w, b in layers]


# --- the mathematics of the TensorFlow format, straight from its variables ----------------------------------------


def correlate(x, weight, start):
    """y[n] = sum_m w[m] x[n + start + m] on a zero-extended signal.  x (h, w, I), weight (k, k, I, O)."""
    k, pad = weight.shape[0], 8
    padded = np.pad(x, ((pad, pad), (pad, pad), (0, 0)))
    size = x.shape[0]
    y = np.zeros((size, size, weight.shape[3]))
    for a in range(k):
        for b in range(k):
            i, j = pad + start + a, pad + start + b
            y += padded[i : i + size, j : j + size] @ weight[a, b]
    return y


def upsample(x):
    """Zero insertion and the FIR with gain 4, on a margin wide enough that nothing is cut. Returns (signal, margin)."""
    margin = 4
    wide = np.zeros((2 * x.shape[0] + 2 * margin, 2 * x.shape[1] + 2 * margin, x.shape[2]))
    wide[margin:-margin:2, margin:-margin:2] = x
    taps = np.outer([1, 3, 3, 1], [1, 3, 3, 1]) / 16
    return correlate(wide, taps[:, :, None, None] * np.eye(x.shape[2]), -2), margin


def tensorflow_picture(variables, w, resolution):
    """One picture of the skip architecture from TensorFlow's variables.  w (w_dim,) -> (3, R, R)."""

    def layer(x, home, up=False, demodulate=True):
        get = {k: variables[f"{home}/{k}"] for k in ("weight", "mod_weight", "mod_bias")}
        style = w @ get["mod_weight"] / math.sqrt(len(w)) + get["mod_bias"] + 1
        weight = get["weight"].astype(np.float64) * style[:, None]
        if not demodulate:
            return correlate(x, weight / math.sqrt(weight.shape[2]), 0)
        weight = weight / np.sqrt((weight**2).sum(axis=(0, 1, 2)) + 1e-8)
        if not up:
            return correlate(x, weight, -1)
        wide, margin = upsample(x)
        return correlate(wide, weight, -1)[margin:-margin, margin:-margin]

    def finish(y, home, noise):
        y = y + variables[f"{home}/noise_strength"] * variables[noise][0, 0][:, :, None] + variables[f"{home}/bias"]
        return np.where(y > 0, y, 0.2 * y) * math.sqrt(2)

    x = np.moveaxis(variables["4x4/Const/const"][0], 0, 2)
    x = finish(layer(x, "4x4/Conv"), "4x4/Conv", "noise0")
    image = layer(x, "4x4/ToRGB", demodulate=False) + variables["4x4/ToRGB/bias"]
    for k, r in enumerate(2**i for i in range(3, int(math.log2(resolution)) + 1)):
        x = finish(layer(x, f"{r}x{r}/Conv0_up", up=True), f"{r}x{r}/Conv0_up", f"noise{2 * k + 1}")
        x = finish(layer(x, f"{r}x{r}/Conv1"), f"{r}x{r}/Conv1", f"noise{2 * k + 2}")
        wide, margin = upsample(image)
        image = wide[margin:-margin, margin:-margin]
        image = image + layer(x, f"{r}x{r}/ToRGB", demodulate=False) + variables[f"{r}x{r}/ToRGB/bias"]
    return np.moveaxis(image, 2, 0)
