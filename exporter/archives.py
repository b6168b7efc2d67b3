"""From a file to its content: recognises the container by its bytes and reads it with the restricted unpickler."""

import io
import json
import math
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engine.errors import CheckpointError
from exporter.passive import Budget, Foreign, Storage, need, shown
from exporter.unpickle import (
    guarded,
    is_foreign_storage,
    is_legacy_torch,
    loads,
    loads_legacy_torch,
    storage_identity,
)
from exporter.vocabulary import itemsize

MAX_BYTES = 8 * 2**30
# Members of a torch archive that are read or may safely be there; anything else means another kind of zip.
HARMLESS = re.compile(
    r"version|byteorder|\.format_version|\.storage_alignment|\.data/serialization_id|data/\d+|data\.pkl"
)
NUMPY_MAGIC = b"\x93NUMPY"
SUPPORTED = (
    "what is read: StyleGAN2 and StyleGAN3 of NVIDIA (pickles and state_dicts, TensorFlow's too), of rosinality, of "
    "BasicSR and inside pSp, e4e, ReStyle and HyperStyle; other generators as ONNX files, or with --module; heads of "
    "LACE, of lace-train and of InterFaceGAN"
)


@dataclass(frozen=True, slots=True)
class Archive:
    """A loaded file.

    container   'pickle', 'torch-zip', 'torch-legacy', 'numpy' or 'safetensors'
    content     what was read: objects, an array of numpy, the bytes of safetensors
    foreign     names in a pickle that stand for nothing here; what they made are inert records
    """

    container: str
    content: Any
    foreign: tuple[str, ...] = ()


def read_bytes(path: Path) -> bytes:
    if str(path) in ("", "."):
        raise CheckpointError("the name of the checkpoint is empty; a file was expected")
    if path.is_dir():
        kind = "a lace bundle, which is already exported" if (path / "manifest.json").exists() else "a folder"
        raise CheckpointError(f"{path} is {kind}; a checkpoint file was expected")
    if not path.is_file():
        raise CheckpointError(f"{path} is not an ordinary file" if path.exists() else f"there is no file {path}")
    size = path.stat().st_size
    if size == 0:
        raise CheckpointError(f"{path} is empty; download it again")
    if size > MAX_BYTES:
        raise CheckpointError(f"{path} has {size / 2**30:.1f} GiB; checkpoints of up to 8 GiB are read")
    return guarded(str(path), path.read_bytes)


def read_archive(path: str | Path) -> Archive:
    """Load any supported container. The file name plays no part."""
    path = Path(path)
    data = read_bytes(path)
    budget = Budget.of_file(len(data))
    try:
        container, content = load(data, budget)
    except CheckpointError as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error
    return Archive(container, content, tuple(sorted(name.name for name in budget.foreign.values())))


def load(data: bytes, budget: Budget) -> tuple[str, Any]:
    """(container, content), by what the bytes begin with."""
    if data[:2] == b"PK":
        return "torch-zip", guarded("the zip archive", lambda: load_zip(data, budget))
    if data[:6] == NUMPY_MAGIC:
        return "numpy", guarded("the numpy file", lambda: load_array(data))
    if is_legacy_torch(data):
        return "torch-legacy", loads_legacy_torch(data, budget=budget)
    # Before pickles: the length in front may start with any byte, PROTO included.
    if is_safetensors(data):
        return "safetensors", data
    if data[:1] == b"\x80":
        return "pickle", loads(data, budget=budget)
    raise CheckpointError(describe(data))


def load_array(data: bytes) -> np.ndarray:
    """A .npy file of numbers. Its header is a literal, which numpy parses without evaluating it."""
    file = io.BytesIO(data)
    version = np.lib.format.read_magic(file)
    need(version in ((1, 0), (2, 0)), f"version {version} of numpy's format")
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, is_fortran, dtype = read(file)
    if dtype.kind not in "biuf" or dtype.names is not None:
        raise CheckpointError(f"it holds an array of the type {shown(str(dtype))}; only numbers are read")
    size = math.prod(shape) * dtype.itemsize
    need(min(shape, default=1) >= 0 and size == len(data) - file.tell(), "an array whose shape does not fit its bytes")
    return np.frombuffer(data, dtype, offset=file.tell()).reshape(shape, order="F" if is_fortran else "C").copy()


def is_safetensors(data: bytes) -> bool:
    length = int.from_bytes(data[:8], "little")
    return 2 <= length <= len(data) - 8 and data[8:9] == b"{" and data[7 + length : 8 + length] in (b"}", b" ")


def describe(data: bytes) -> str:
    """What a file is that is no checkpoint."""
    head = data[:512].lstrip()
    if head.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer, not the file itself; run `git lfs pull` and try again"
    if head[:1] == b"<" or b"<html" in head.lower():
        return "it is a web page: the download failed (a login, a quota or a moved link); download it again"
    if head.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"7z\xbc\xaf")):
        return "it is a compressed archive; unpack it first"
    if head.startswith(b"\x89HDF"):
        return f"it is an HDF5 file; {SUPPORTED}"
    try:
        text = data[:64].decode("ascii")
    except UnicodeDecodeError:
        return f"its content is unknown (it starts with {data[:8].hex(' ')}); {SUPPORTED}"
    if text.isprintable() or text.strip().replace("\n", " ").isprintable():
        return f"it is a text file that starts with {text[:40]!r}, not a checkpoint; {SUPPORTED}"
    return f"its content is unknown (it starts with {data[:8].hex(' ')}); {SUPPORTED}"


def load_zip(data: bytes, budget: Budget | None = None) -> Any:
    """What torch.save writes since 1.6: <root>/data.pkl and <root>/data/<key>, stored without compression."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        root, names = check_members(archive.infolist(), len(data))
        if "byteorder" in names:
            need(archive.read(f"{root}byteorder").strip() == b"little", "a file of a big-endian machine")
        read: dict[str, Storage] = {}

        def persistent(identity: Any) -> Storage | Foreign:
            if is_foreign_storage(identity):
                return Foreign("torch.storage")
            dtype, key, numel = storage_identity(identity)
            need(re.fullmatch(r"\d{1,9}", key) and f"data/{key}" in names, "a storage that the archive does not hold")
            if key not in read:
                read[key] = Storage(dtype, numel, archive.read(f"{root}data/{key}"))
            storage = read[key]
            need(storage.dtype == dtype and storage.numel == numel, "two sizes of one storage")
            need(len(storage.data or b"") == numel * itemsize(dtype), "a storage of another size than announced")
            return storage

        pickled = archive.read(f"{root}data.pkl")
        return loads(pickled, persistent=persistent, budget=budget or Budget.of_file(len(data)))


def check_members(members: list[zipfile.ZipInfo], size: int) -> tuple[str, set[str]]:
    """(the common folder, the names within) of a sane torch archive."""
    names = [member.filename for member in members]
    if any(name.endswith("/constants.pkl") or "/code/" in name for name in names):
        raise CheckpointError("this is a TorchScript archive; save the state_dict of the module instead")
    pickles = [name for name in names if name == "data.pkl" or re.fullmatch(r"[^/\\]+/data\.pkl", name)]
    if len(pickles) != 1:
        found = ", ".join(map(shown, names[:5])) or "nothing"
        raise CheckpointError(f"this zip archive was not written by torch.save (it holds {found}); unpack it first")
    root = pickles[0].removesuffix("data.pkl")
    need(root.strip("/.") or not root, "a folder outside of the archive")
    need(len(set(names)) == len(names), "an archive with two members of one name")
    for member in members:
        inner = member.filename.removeprefix(root)
        need(member.filename.startswith(root) and HARMLESS.fullmatch(inner), f"the member {shown(member.filename, 60)}")
        need(not member.flag_bits & 0x41, "an encrypted archive")
        # torch never compresses; without compression there are no zip bombs.
        need(member.compress_type == zipfile.ZIP_STORED, "a compressed member")
        need(member.file_size == member.compress_size, "a member whose sizes disagree")
    need(sum(member.file_size for member in members) <= size, "an archive that claims more data than it has")
    return root, {name.removeprefix(root) for name in names}


def safetensors_metadata(data: bytes) -> dict[str, str]:
    """The free metadata of a safetensors file: text by name."""
    length = int.from_bytes(data[:8], "little")
    header = guarded("the safetensors header", lambda: json.loads(data[8 : 8 + length]))
    found: Any = header.get("__metadata__", {}) if type(header) is dict else None
    need(type(found) is dict and all(type(value) is str for value in found.values()), "a safetensors header")
    return found
