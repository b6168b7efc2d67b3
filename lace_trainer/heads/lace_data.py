"""The pairs (w, labels) that LACE published: pickles, read without running anything that they contain."""

import io
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from engine.errors import CheckpointError, LaceError
from exporter.heads import AFHQ_CATS, FFHQ
from exporter.passive import Budget, Foreign, Global, PendingArray, PendingDtype, need
from exporter.unpickle import FULL_TABLE, Machine, guarded, run
from exporter.vocabulary import numpy_dtype, shape_of
from lace_trainer.attributes import Attribute
from lace_trainer.heads.pairs import Pairs


@dataclass(frozen=True, slots=True)
class Dataset:
    """(file, key) of latents and labels, the attributes in the order of the columns, and the test rows."""

    latents: tuple[str, str]
    labels: tuple[str, str]
    columns: dict[str, tuple[str, ...]]
    test: int


METFACES_ORDER = "yaw light3 smile gender age glasses pitch haircolor beard bald light0 width"
METFACES = {name: FFHQ[name] for name in METFACES_ORDER.split()}
DATASETS = {
    "ffhq": Dataset(("all_latents.pickle", "Latent"), ("att_light.pickle", "att_light"), FFHQ, 1000),
    "metfaces": Dataset(("ws_latent.pickle", "ws_latent"), ("pred.pickle", "pred"), METFACES, 650),
    "afhq": Dataset(("ws_latent.pickle", "ws_latent"), ("pred0.3.pickle", "pred0.3"), AFHQ_CATS, 650),
}


def lace_pairs(directory: Path, dataset: str) -> Pairs:
    """The pairs that LACE's heads were trained on; the first style layer stands for w.

    Files without the full number of rows (an excerpt, a test) get proportionally smaller splits.
    """
    if dataset not in DATASETS:
        raise LaceError(f"unknown data set {dataset!r}; expected one of {', '.join(DATASETS)}")
    facts = DATASETS[dataset]
    latents = read_array(Path(directory) / facts.latents[0], facts.latents[1])
    latents = latents.reshape(len(latents), -1, latents.shape[-1])[:, 0]
    labels = read_array(Path(directory) / facts.labels[0], facts.labels[1]).astype(np.float32)
    labels = labels.reshape(len(labels), -1)
    if labels.shape != (len(latents), len(facts.columns)):
        raise LaceError(f"{facts.labels[0]} holds labels {labels.shape}; expected {(len(latents), len(facts.columns))}")
    labels = np.where(labels == -1, np.nan, labels)  # LACE's other mark of a missing label
    attributes = tuple(Attribute(name, "class" if c else "value", c) for name, c in facts.columns.items())
    n = len(latents)
    source = {"kind": "LACE data", "dataset": dataset, "count": n}
    return Pairs(np.ascontiguousarray(latents, np.float32), labels, attributes, test=min(facts.test, n // 10),
                 validation=min(500, n // 10), source=source)


def read_array(path: Path, key: str) -> np.ndarray:
    """The array at ``key`` of a pickled dict; a list of arrays is joined. Objects become floats, None becomes NaN."""
    if not path.is_file():
        raise LaceError(f"there is no file {path}; expected LACE's data files in {path.parent}")
    data = path.read_bytes()
    machine = LabelMachine(LABEL_TABLE, None, Budget.of_file(len(data)))
    try:
        content = guarded("the data file", lambda: run(io.BytesIO(data), machine))
    except CheckpointError as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error
    value = content.get(key) if type(content) is dict else None
    if type(value) is list and value and all(type(part) is np.ndarray for part in value):
        value = np.concatenate(value)
    if type(value) is not np.ndarray or value.ndim < 2:
        raise CheckpointError(f"{path} holds no table under {key!r}; expected LACE's {path.name}")
    return value


def _label_dtype(budget: Budget, args: tuple) -> PendingDtype | Foreign:
    return PendingDtype("O") if args and args[0] in ("O", "O8", "|O") else numpy_dtype(budget, args)


LABEL_TABLE = {**FULL_TABLE, ("numpy", "dtype"): Global("numpy.dtype", _label_dtype)}


class LabelMachine(Machine):
    """Also reads arrays of objects, if all of them are numbers or None: they become float64 arrays."""

    def build(self) -> None:
        need(len(self.stack) >= 2, "too little on the stack")
        target, state = self.stack[-2:]
        is_objects = (type(target) is PendingArray and type(state) is tuple and len(state) == 5
                      and isinstance(state[2], np.dtype) and state[2].kind == "O")
        if not is_objects:
            return super().build()
        self.take(2)
        array = _from_objects(self.budget, state)
        self.memo.update(dict.fromkeys(target.memo_keys, array))
        target.memo_keys = []
        self.stack.append(array)


def _from_objects(budget: Budget, state: tuple) -> np.ndarray:
    _, shape, _, is_fortran, items = state
    need(type(items) is list and math.prod(shape_of(shape)) == len(items), "an array of objects of the wrong size")
    for item in items:
        need(item is None or type(item) in (int, float, bool) or isinstance(item, np.number | np.bool_),
             f"an array of objects with a {type(item).__name__} in it")
    budget.charge(8 * len(items))
    flat = np.array([np.nan if item is None else float(item) for item in items])
    return flat.reshape(shape, order="F" if is_fortran else "C")
