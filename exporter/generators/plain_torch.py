"""Plain generators as modules of torch: in memory, or of an importable class with the weights of a file."""

import copy
import importlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import safetensors.numpy
import torch
from numpy import ndarray as Array
from torch import Tensor, nn

from engine.errors import CheckpointError
from exporter.archives import read_archive
from exporter.checkpoints import is_state
from exporter.generators.onnx_reading import all_tensors, bring_inside, check, renew
from exporter.generators.plain import INTEGER, ONE_HOT, Latent, Network
from exporter.generators.records import is_network, named_arrays
from exporter.generators.state import check_finite, named_list
from exporter.passive import Foreign, Module, is_a
from exporter.synthesis_graph import trace_rows


def network_of_module(module: nn.Module, *, latent: int | Sequence[int], classes: int | None = None) -> Network:
    """The network of a module in memory: forward(z), or forward(z, label) with ``classes``. Raises CheckpointError.

    latent    d: its rows are (n, d), or (n, d, 1, 1) where the module takes only that; or the sizes behind the rows
    """
    module = copy.deepcopy(module).cpu().float().eval().requires_grad_(False)
    found = takes(module, latent, classes or 0)

    @torch.no_grad()
    def original(z: Array, labels: Array | None) -> Array:
        return picture_of(module(*inputs_for(found, torch.from_numpy(z), labels))).float().numpy()

    model = trace_module(module, found)
    names = [value.name for value in model.graph.input]
    return Network(model, found, (names[0], names[1] if found.classes else None), original, "torch")


def inputs_for(latent: Latent, z: Tensor, labels: Array | None) -> tuple[Tensor, ...]:
    z = z.reshape(-1, *latent.shape)
    if not latent.classes:
        return (z,)
    label = torch.as_tensor(np.zeros(len(z), np.int64) if labels is None else np.asarray(labels, np.int64))
    return (z, label if latent.class_input == INTEGER else torch.eye(latent.classes)[label])


def picture_of(output: Any) -> Tensor:
    """A module's picture; of several results the first, as diffusers and VAEs give them."""
    if isinstance(output, tuple | list) and output:
        output = output[0]
    if not isinstance(output, Tensor):
        raise CheckpointError(f"the module gives a {type(output).__name__}; expected a tensor of pictures")
    return output


@torch.no_grad()
def takes(module: nn.Module, latent: int | Sequence[int], classes: int) -> Latent:
    """In which of the known ways the module takes its inputs: the first that it does not refuse."""
    shapes = [(latent,), (latent, 1, 1)] if isinstance(latent, int) else [tuple(latent)]
    reasons = []
    for shape in shapes:
        for class_input in (INTEGER, ONE_HOT) if classes else (INTEGER,):
            found = Latent(shape, classes, class_input)
            try:
                output = picture_of(module(*inputs_for(found, torch.zeros(2, shape[0]), None)))
                if output.ndim in (3, 4) and len(output) == 2:
                    return found
                reasons.append(f"{shape}: gives the sizes {tuple(output.shape)}")
            except CheckpointError:
                raise
            except Exception as error:  # whatever a stranger's forward raises
                reasons.append(f"{shape}: {' '.join(str(error).split())[:120]}")
    raise CheckpointError(f"the module takes no latent of {latent}{f' with {classes} classes' if classes else ''} "
                          f"({'; '.join(reasons[:2])}): say its sizes with --latent, such as 128 or 100,1,1")


class Alone(nn.Module):
    """A module whose result is its picture."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, z: Tensor, label: Tensor | None = None) -> Tensor:
        return picture_of(self.module(z) if label is None else self.module(z, label))


def trace_module(module: nn.Module, latent: Latent) -> onnx.ModelProto:
    """The module's graph, with free rows. Raises CheckpointError."""
    arguments = inputs_for(latent, torch.zeros(3, latent.width), None)
    try:
        model = trace_rows(Alone(module).eval(), arguments)
    except Exception as error:  # torch raises many private types
        raise CheckpointError(f"torch cannot trace this module ({' '.join(str(error).split())[:200]}): export it to "
                              "ONNX yourself, and give the file") from error
    for node in model.graph.node:
        node.domain = "" if node.domain == "ai.onnx" else node.domain
    model.functions.clear()
    check(model)
    for tensor in all_tensors(model):
        bring_inside(tensor, Path())
    return renew(model)


# --- an importable class, and a file of weights -----------------------------------------------------------------------

# Where files keep a plain generator's tensors, averaged ones first.
STATES = ("g_ema", "G_ema", "ema", "params_ema", "netG_state_dict", "generator_state_dict", "generator", "netG", "G",
          "state_dict", "model_state_dict", "model", "params")
PREFIXES = ("module.", "_orig_mod.", "netG.", "generator.", "decoder.", "G.")
# What training counts, and inference does not read.
UNREAD = "num_batches_tracked"


def make_module(name: str, arguments: Mapping[str, Any]) -> nn.Module:
    """``package.module:Class`` called with the arguments. It imports that module, whose code runs: it is the user's
    own, or a package that he installed. Raises CheckpointError."""
    module, _, path = name.partition(":")
    if not re.fullmatch(r"\w+(\.\w+)*", module) or not re.fullmatch(r"\w+(\.\w+)*", path):
        raise CheckpointError(f"--module is {name[:80]!r}; expected package.module:Class")
    try:
        found: Any = importlib.import_module(module)
        for part in path.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise CheckpointError(f"there is no {name}: {error}. Is its folder on PYTHONPATH, or its package installed?"
                              ) from error
    try:
        made = found(**arguments)
    except Exception as error:  # whatever its constructor raises
        raise CheckpointError(f"{name} cannot be made with {dict(arguments)}: {error}. Give its arguments with "
                              "--module-args") from error
    if not isinstance(made, nn.Module):
        raise CheckpointError(f"{name} made a {type(made).__name__}; expected a torch module")
    return made


def load_weights(module: nn.Module, path: Path) -> tuple[str, ...]:
    """Fill a module with the tensors of a file, which is read without running anything in it; remarks for the user.

    Raises CheckpointError, unless the file has all tensors of the module with their shapes.
    """
    state, keys, left_out = read_state(path)
    wanted = module.state_dict()
    arrays = best_named(state, wanted)
    missing = [name for name in wanted if name not in arrays and not name.endswith(UNREAD)]
    misshapen = [f"{name} {arrays[name].shape} instead of {tuple(wanted[name].shape)}" for name in wanted
                 if name in arrays and arrays[name].shape != tuple(wanted[name].shape)]
    if missing or misshapen:
        problems = {"missing": missing, "of another shape": misshapen}
        text = "; ".join(f"{kind}: {named_list(names)}" for kind, names in problems.items() if names)
        raise CheckpointError(f"the tensors of {path} do not fill {type(module).__name__} ({text}; the file has "
                              f"{named_list(list(state)) or 'nothing'}): other arguments with --module-args, or "
                              "another class")
    check_finite({name: array for name, array in arrays.items() if array.dtype.kind == "f"})
    kept = {name: torch.from_numpy(np.array(arrays[name])).reshape(tensor.shape).to(tensor.dtype)
            if name in arrays else tensor for name, tensor in wanted.items()}
    module.load_state_dict(kept)
    remarks = [f"weights are those under {'.'.join(keys)}"] if keys else []
    if unused := [name for name in arrays if name not in wanted]:
        remarks.append(f"tensors that the class does not have were left out: {named_list(unused)}")
    if left_out:
        remarks.append(f"objects of other classes in the file were left out, and nothing was executed: "
                       f"{named_list(left_out)}")
    return tuple(remarks)


def read_state(path: Path) -> tuple[dict[str, np.ndarray], tuple[str, ...], list[str]]:
    """Tensors by name, the keys that lead there in the file, and the classes that stand for nothing here."""
    archive = read_archive(path)
    if archive.container == "safetensors":
        return safetensors.numpy.load(archive.content), (), []
    content, keys = archive.content, []
    while not is_state(content):
        if is_a(content, Foreign, Module) and is_network(content):  # a whole module, saved by torch.save
            content = named_arrays(content)
            break
        known = STATES if is_a(content, dict) else ()
        key = next((key for key in known if is_a(content.get(key), dict, Foreign, Module)), None)  # type: ignore
        if key is None or len(keys) > 3:
            shown = named_list([str(name)[:80] for name in content]) if is_a(content, dict) else type(content).__name__
            raise CheckpointError(f"{path} has no tensors of a generator: it holds {shown}; expected a state_dict, "
                                  f"perhaps under {', '.join(STATES[:8])}")
        content = content[key]  # type: ignore[index]
        keys.append(key)
    arrays = {name: value for name, value in content.items() if is_a(value, np.ndarray)}
    return arrays, tuple(keys), list(archive.foreign)


def best_named(state: Mapping[str, np.ndarray], wanted: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """The tensors by the module's names: without what wrappers put in front of all of them."""
    found = [dict(state)]
    for prefix in PREFIXES:
        for names in list(found):
            inner = {name.removeprefix(prefix): array for name, array in names.items() if name.startswith(prefix)}
            if inner:
                found.append(inner)
    return max(found, key=lambda names: len(wanted.keys() & names.keys()))
