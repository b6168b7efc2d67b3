"""The restricted unpickler: hostile and damaged streams end in CheckpointError, and nothing of them runs."""

import argparse
import os
import pickle
import pickletools
import sys
import time
from collections import OrderedDict

import numpy as np
import pytest
import torch

from engine.errors import CheckpointError
from exporter import archives, unpickle, vocabulary
from exporter.archives import read_archive
from exporter.checkpoints import load_generator
from exporter.generators import basicsr, nvidia, records, rosinality, stylegan3_files, tensorflow, unsupported
from exporter.unpickle import Foreign, Module, loads
from tests import checkpoints as build
from tests.hostile import HOSTILE, MARKER, by_name, dtype, integers, numpy_state, tensor, text, zipped

# Imported here, so that a new module is the file's doing.
CONVERTERS = (basicsr, nvidia, records, rosinality, stylegan3_files, tensorflow, unsupported)


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_file_is_refused_and_nothing_runs(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "file"
    path.write_bytes(HOSTILE[kind])
    before, began = set(sys.modules), time.perf_counter()
    with pytest.raises(CheckpointError) as caught:
        load_generator(path)
    assert time.perf_counter() - began < 10
    assert len(str(caught.value)) < 1000
    assert not (tmp_path / MARKER).exists()
    assert sorted(os.listdir(tmp_path)) == ["file"]
    assert not {name for name in set(sys.modules) - before if not name.startswith("encodings")}


def test_the_pieces_that_the_hostile_streams_are_made_of_are_otherwise_good():
    assert np.array_equal(loads(tensor()), np.zeros(4, np.float32))
    assert loads(numpy_state(integers(1), dtype("f4"), b"C\x04\x00\x00\x80?")) == np.float32([1])
    assert read_archive_bytes(zipped())["g_ema"]["a"].tolist() == [1, 1, 1]
    assert loads(by_name("_codecs", "encode", text("abc"), text("latin1"))) == b"abc"


def read_archive_bytes(data):
    return archives.load_zip(data)


def test_the_foreign_name_and_the_advice_are_in_the_message(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(HOSTILE["os.system"])
    with pytest.raises(CheckpointError, match=r"posix\.system.*nothing was executed.*state_dict"):
        load_generator(path)


def test_A4_a_foreign_name_is_a_record_that_does_nothing():
    found = loads(HOSTILE["os.system"])
    assert found == Foreign("posix.system")
    chained = by_name("builtins", "getattr", text("a"), text("b"))[:-1] + b")R}" + text("x") + b"K\x01sb."
    assert loads(chained) == Foreign("builtins.getattr", {"x": 1})


def test_nested_storages_have_no_foreign_names():
    with pytest.raises(CheckpointError, match=r"os\.system.*nothing was executed"):
        loads(HOSTILE["nested foreign name"])


def test_names_resolve_in_one_fixed_table():
    allowed = {f"{module}.{name}" for module, name in unpickle.FULL_TABLE}
    assert allowed - {f"torch.{name}" for name in vocabulary.STORAGES} == {
        "torch_utils.persistence._reconstruct_persistent_obj", "dnnlib.tflib.network.Network", "dnnlib.util.EasyDict",
        "argparse.Namespace", "collections.OrderedDict", "collections.defaultdict", "collections.Counter",
        "collections.deque", "easydict.EasyDict", "torch.Size", "torch.device",
        "builtins.set", "__builtin__.set", "builtins.frozenset", "__builtin__.frozenset", "__builtin__.bytes",
        *(f"torch.{name}" for name in vocabulary.TORCH_TYPES),
        *(f"{home}.{name}" for home in ("pathlib", "pathlib._local") for name in vocabulary.PATHS),
        "_codecs.encode", "torch._utils._rebuild_parameter", "torch._utils._rebuild_tensor_v2",
        "torch.storage._load_from_bytes", "numpy.dtype", "numpy.ndarray", "numpy.core.multiarray.scalar",
        "numpy._core.multiarray.scalar", "numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct",
        "numpy.core.numeric._frombuffer", "numpy._core.numeric._frombuffer",
    }


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_plain_values_survive(protocol):
    value = {"a": [1, -2, 2**70, 1.5, True, None, "é", b"\xff\0"],
             "t": (1, (2, ()), (3, 4), (5, 6, 7), (1, 2, 3, 4)),
             "s": {1, 2}, "o": OrderedDict(x=1, y=[OrderedDict()]), "e": b"", 3: "number",
             "big": "x" * 70_000}
    assert loads(pickle.dumps(value, protocol)) == value


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_numpy_values_survive(protocol):
    rng = np.random.default_rng(0)
    values = {
        "c": rng.normal(size=(2, 3, 4)), "f": np.asfortranarray(rng.normal(size=(3, 2)).astype(np.float32)),
        "k": rng.normal(size=(2, 3, 4)).transpose(1, 0, 2), "big": np.arange(3, dtype=">i4"),
        "b": np.array([True, False]),
        "zero": np.array(2.5, np.float16), "empty": np.zeros((0, 3)), "i": np.int64(7), "g": np.float64(1.25),
        "y": np.bool_(True),
    }
    found = loads(pickle.dumps({"x": values, "again": [values["c"], values["c"]]}, protocol))
    for name, value in values.items():
        assert np.array_equal(found["x"][name], value), name
        assert np.asarray(found["x"][name]).dtype == np.asarray(value).dtype.newbyteorder("=")
    assert isinstance(found["again"][0], np.ndarray)
    assert isinstance(found["again"][1], np.ndarray)


def tensors():
    base = torch.arange(24.0).reshape(2, 3, 4)
    return {
        "plain": base, "half": base.half(), "bf16": base.bfloat16() / 3, "long": base.long(), "bool": base > 3,
        "uint8": base.byte(), "transposed": base.permute(2, 0, 1), "slice": base[1, 1:, ::2],
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 3), "view": base.view(-1)[5:9], "double": base.double(),
        "parameter": torch.nn.Parameter(base + 1),
        "channels_last": torch.rand(2, 3, 4, 5).to(memory_format=torch.channels_last),
    }


@pytest.mark.parametrize("form", ["zip", "legacy", 2, 3, 4, 5])
def test_tensors_survive_as_arrays_of_their_own(form, tmp_path):
    expected = tensors()
    path = tmp_path / "file"
    is_pickle = isinstance(form, int)
    path.write_bytes(
        pickle.dumps(expected, form) if is_pickle else build.torch_bytes(expected, legacy=form == "legacy")
    )
    archive = read_archive(path)
    assert archive.container == ("pickle" if is_pickle else f"torch-{form}")
    for name, value in expected.items():
        got = archive.content[name]
        want = value.detach().float().numpy() if name == "bf16" else value.detach().numpy()
        assert np.array_equal(got, want), name
        assert got.dtype == want.dtype
        assert got.flags.owndata or got.base.flags.owndata
        assert got.flags.writeable


@pytest.mark.parametrize("form", ["zip", "legacy"])
def test_state_dicts_with_namespace_and_metadata_are_read(form):
    content = {"net": torch.nn.Linear(2, 3).state_dict(), "args": argparse.Namespace(lr=0.1, name="a")}
    data = build.torch_bytes(content, legacy=form == "legacy")
    found = archives.load_zip(data) if form == "zip" else unpickle.loads_legacy_torch(data)
    assert found["args"].state == {"lr": 0.1, "name": "a"}
    assert np.array_equal(found["net"]["weight"], content["net"]["weight"].numpy())


def test_a_module_becomes_a_passive_record_without_its_source():
    with build.foreign_names():
        record = build.persistent(torch.nn.Linear(2, 1), "import this")
        data = pickle.dumps(record)
    assert b"import this" in data
    found = loads(data)
    assert type(found) is Module
    assert found.class_name == "Linear"
    assert "import this" not in repr(found)


def test_the_builder_leaves_no_foreign_packages_behind():
    assert not {name for name in sys.modules if name.startswith(("dnnlib", "torch_utils"))}


def test_damage_anywhere_is_one_kind_of_error():
    """Flip bytes and cut pieces of good files: they load, or raise CheckpointError, and nothing else."""
    rng = np.random.default_rng(0)
    small = build.generator(widths={4: 2, 8: 2})
    files = [build.nvidia_pickle(small), build.nvidia_zip(small),
             build.rosinality_file(small, legacy=True, training=True),
             build.tensorflow_pickle(small, protocol=2)]
    for data in files:
        for _ in range(60):
            damaged = bytearray(data)
            for at in rng.integers(0, len(data), size=3):
                damaged[at] = rng.integers(256)
            damaged = bytes(damaged[: rng.integers(1, len(data))] if rng.random() < 0.2 else damaged)
            try:
                if damaged[:2] == b"PK":
                    unpickle.guarded("zip", lambda data=damaged: archives.load_zip(data))
                elif unpickle.is_legacy_torch(damaged):
                    unpickle.loads_legacy_torch(damaged)
                else:
                    loads(damaged)
            except CheckpointError:
                pass


def test_every_opcode_is_either_known_or_refused_on_purpose():
    names = {opcode.name for opcode in pickletools.opcodes}
    refused = {"INST", "OBJ", "EXT1", "EXT2", "EXT4", "NEXT_BUFFER", "READONLY_BUFFER", "STOP"}
    assert names - set(unpickle.OPCODES) == refused
    assert set(unpickle.OPCODES) <= names
