"""From what a user has, a file or a module, to the parts of a plain generator."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

from engine.errors import CheckpointError
from exporter.generators import Parts
from exporter.generators.onnx_reading import is_onnx
from exporter.generators.plain import RANGES, parts_of
from exporter.generators.plain_onnx import network_of_onnx
from exporter.generators.plain_torch import network_of_module
from exporter.generators.plain_weights import load_weights, make_module


@dataclass(frozen=True, slots=True)
class Wishes:
    """What a user says of a plain generator: see exporter.export. Raises CheckpointError."""

    latent: int | Sequence[int] | None = None
    classes: int | None = None
    value_range: str | None = None
    module: str | None = None
    module_args: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        if self.value_range is not None and self.value_range not in RANGES:
            raise CheckpointError(f"the range is {self.value_range!r:.60}; expected one of: {', '.join(RANGES)}")
        if self.module_args and not self.module:
            raise CheckpointError("--module-args are of --module: give both")

    @property
    def sizes(self) -> tuple[int, ...] | None:
        """The latent's sizes behind the rows."""
        if self.latent is None:
            return None
        return (self.latent,) if isinstance(self.latent, int) else tuple(self.latent)

    def refused(self, path: Path) -> Path:
        """The path of a checkpoint that says all this itself. Raises CheckpointError."""
        given = {"--latent": self.latent, "--classes": self.classes, "--range": self.value_range}
        if names := [name for name, value in given.items() if value is not None]:
            raise CheckpointError(f"{', '.join(names)}: goes with an ONNX file, or with a checkpoint and its --module; "
                                  f"{path} is none of these, or lacks --module")
        return path


def is_onnx_file(path: Path) -> bool:
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        head = file.read(9)
    return is_onnx(head) and head[8:] != b"{"  # which is how safetensors begin


def load_plain(gan: Path | nn.Module, wishes: Wishes) -> Parts:
    """Raises CheckpointError for what is no plain generator, or not one that a bundle can hold."""
    if isinstance(gan, Path) and not wishes.module:
        return parts_of(network_of_onnx(gan, latent=wishes.sizes, classes=wishes.classes), gan.stem, wishes.value_range)
    remarks: tuple[str, ...] = ()
    if isinstance(gan, Path):
        if is_onnx_file(gan):
            raise CheckpointError(f"{gan} is an ONNX file, which needs no --module: leave it out")
        module = make_module(wishes.module or "", wishes.module_args)
        remarks = load_weights(module, gan)
    elif isinstance(gan, nn.Module):
        module = gan
    else:
        raise CheckpointError(f"a {type(gan).__name__} is no generator; expected a path or a torch module")
    if wishes.latent is None:
        raise CheckpointError("a module does not say what latent it takes: give latent= (--latent), such as 128 or "
                              "100,1,1")
    network = network_of_module(module, latent=wishes.latent, classes=wishes.classes)
    return parts_of(replace(network, remarks=remarks), type(module).__name__, wishes.value_range)
