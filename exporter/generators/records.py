"""Passive records of pickled modules: their parts, their tensors and their attributes."""

from typing import Any

import numpy as np

from engine.errors import CheckpointError
from exporter.generators.state import named_list
from exporter.passive import Foreign, Module, is_a, shown

# Far above any generator: 1024 px have 19 layers and some 200 tensors.
MAX_PARTS, MAX_TENSORS, MAX_NAME = 256, 20_000, 500

Record = Module | Foreign


def attributes(record: Record) -> dict:
    """The record's ``__dict__``, empty if it has none."""
    return record.state if is_a(record.state, dict) else {}


def class_of(record: Record) -> str:
    return shown(record.class_name if isinstance(record, Module) else record.name, 60)


def is_network(value: object) -> bool:
    """Whether a record has the tables of a torch module."""
    return is_a(value, Module, Foreign) and is_a(attributes(value).get("_modules"), dict)  # type: ignore[arg-type]


def children(record: Record) -> dict[str, Record]:
    found = attributes(record).get("_modules")
    if not is_a(found, dict):
        raise CheckpointError(f"the record of {class_of(record)} has no _modules: the file is damaged")
    if len(found) > MAX_PARTS:
        raise CheckpointError(f"the record of {class_of(record)} has {len(found)} parts; at most {MAX_PARTS} are sane")
    return {str(name)[:200]: module for name, module in found.items() if is_a(module, Module, Foreign)}


def child(record: Record, name: str) -> Record:
    found = children(record)
    if name not in found:
        raise CheckpointError(
            f"{class_of(record)} has no part {name!r}; it has: {named_list(list(found)) or 'none'}. "
            f"Expected a generator (G_ema) with mapping and synthesis"
        )
    return found[name]


def named_arrays(record: Record, prefix: str = "") -> dict[str, np.ndarray]:
    """Parameters and buffers of a module and of all below it, by their dotted names."""
    arrays: dict[str, np.ndarray] = {}
    waiting, seen = [(prefix, record)], {id(record)}
    while waiting:
        start, module = waiting.pop()
        if len(start) > MAX_NAME:
            raise CheckpointError(f"the checkpoint has modules with names of over {MAX_NAME} letters; it was refused")
        for table in ("_parameters", "_buffers"):
            arrays |= table_arrays(attributes(module).get(table), start)
        for name, inner in children(module).items():
            # A module in two places, or inside itself, could be unfolded without end.
            if id(inner) in seen:
                raise CheckpointError(f"the part {start}{name} is in two places; expected a tree of modules")
            seen.add(id(inner))
            waiting.append((f"{start}{name}.", inner))
        if len(arrays) + len(seen) > MAX_TENSORS:
            raise CheckpointError(f"the checkpoint has more than {MAX_TENSORS} tensors or modules; it was refused")
    return arrays


def table_arrays(table: Any, start: str) -> dict[str, np.ndarray]:
    entries = {name: value for name, value in table.items() if value is not None} if is_a(table, dict) else {}
    if len(entries) > MAX_TENSORS:
        raise CheckpointError(f"a module has {len(entries)} tensors; at most {MAX_TENSORS} are sane")
    for name, value in entries.items():
        if not is_a(value, np.ndarray):
            raise CheckpointError(f"{start}{str(name)[:60]} is {shown(value)} where a tensor was expected")
    return {f"{start}{name}": value for name, value in entries.items()}


def uniform(modules: list[Record], attribute: str, expected: object = None) -> Any:
    """The one number or text that all modules have for an attribute (None where they have none)."""
    values = [plain(attributes(module).get(attribute)) for module in modules] or [None]
    if any(not is_a(value, int, float, str, bool, type(None)) or value != values[0] for value in values):
        raise CheckpointError(f"the modules of this file differ in {attribute!r}; only one value for all is supported")
    if expected is not None and values[0] not in (None, expected):
        raise CheckpointError(f"the file uses {attribute} {shown(values[0])}; only {expected!r} is supported")
    return values[0]


def plain(value: Any) -> Any:
    """A numpy number as one of Python."""
    return value.item() if isinstance(value, np.generic) else value
