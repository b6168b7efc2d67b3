"""An importable class of torch, and the weights that a file has for it. Of the file nothing is executed."""

import importlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import torch
from torch import Tensor, nn

from engine.errors import CheckpointError
from exporter.archives import read_archive
from exporter.checkpoints import is_state
from exporter.generators.records import is_network, named_arrays
from exporter.generators.state import check_finite, named_list
from exporter.passive import Foreign, Module, is_a

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
    except Exception as error:  # whatever importing it raises
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
