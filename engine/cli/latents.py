"""Starting latents of other tools: files of numpy and safetensors, and the seed numbers of NVIDIA's scripts.

Nothing is unpickled, and no more is allocated than the file holds.
"""

import io
import math
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy import ndarray as Array
from numpy.lib import format as npy
from safetensors.numpy import load

from engine.cli.options import UsageError

MOST_BYTES = 2**30
NVIDIA_SEEDS = 2**32
# Under which a file of several arrays holds the latents: ours, those of NVIDIA's projector.py, of e4e and its kin.
NAMES = {"w": ("w", "ws", "latents", "latent"), "z": ("z", "zs", "latents", "latent")}


def nvidia_latent(seed: int, width: int) -> Array:
    """z (width,) float32 as NVIDIA's StyleGAN scripts draw it for ``--seeds``."""
    return np.random.RandomState(seed).randn(width).astype(np.float32)


def read_latents(path: Path, space: str, width: int) -> Array:
    """(n, width) float32 from a .npy, .npz or .safetensors file with (width,), (n, width) or (n, layers, width).

    Raises UsageError on any other file, on numbers that are not finite, and where the layers of a w differ.
    """
    if not path.is_file():
        raise UsageError(f"--{space}: there is no file {path}")
    if path.stat().st_size > MOST_BYTES:
        raise UsageError(f"{path} has {path.stat().st_size:,} bytes, more than {MOST_BYTES:,}: give fewer latents")
    try:
        arrays = read_arrays(path)
    except Exception as error:  # the parsers of numpy, zipfile and safetensors raise many types
        raise UsageError(f"{path} cannot be read as latents ({error}): expected numbers in a .npy, .npz or "
                         ".safetensors file, without pickled objects") from error
    return checked(chosen(arrays, path, space), path, space, width)


def read_arrays(path: Path) -> Mapping[str, Array]:
    data = path.read_bytes()
    if data.startswith(npy.MAGIC_PREFIX):
        return {"": read_npy(data)}
    if data.startswith(b"PK"):
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = [member for member in archive.infolist() if member.filename.endswith(".npy")]
            if sum(member.file_size for member in members) > MOST_BYTES:
                raise ValueError(f"its arrays have more than {MOST_BYTES:,} bytes")
            return {member.filename.removesuffix(".npy"): read_npy(archive.read(member)) for member in members}
    if path.suffix == ".safetensors":
        return load(data)
    raise ValueError("it is of none of these kinds")


def read_npy(data: bytes) -> Array:
    """numpy's own reader allocates what the header announces; this one looks first whether it is there."""
    file = io.BytesIO(data)
    version = npy.read_magic(file)
    headers = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
    if version not in headers:
        raise ValueError(f"version {version} of .npy is not known")
    shape, is_fortran, dtype = headers[version](file)
    if dtype.kind not in "fiu":
        raise ValueError(f"it holds {dtype}, not numbers")
    rest = data[file.tell():]
    if math.prod(shape) * dtype.itemsize != len(rest):
        raise ValueError(f"it announces {shape} numbers and holds {len(rest):,} bytes")
    return np.frombuffer(rest, dtype).reshape(shape, order="F" if is_fortran else "C")


def chosen(arrays: Mapping[str, Array], path: Path, space: str) -> Array:
    """The only array, or the one that is named as a latent."""
    if len(arrays) == 1:
        return next(iter(arrays.values()))
    for name in NAMES[space]:
        if name in arrays:
            return arrays[name]
    raise UsageError(f"{path} holds {', '.join(list(arrays)[:8]) or 'nothing'}: expected one array, or one that is "
                     f"named {' or '.join(NAMES[space])}")


def checked(array: Array, path: Path, space: str, width: int) -> Array:
    expected = f"expected ({width},), (n, {width})" + (f" or (n, layers, {width})" if space == "w" else "")
    shape = array.shape
    if array.ndim == 1:
        array = array[None]
    if array.ndim == 3 and (space == "w" or array.shape[1] == 1) and array.size:
        if not np.array_equal(array, np.broadcast_to(array[:, :1], array.shape)):
            raise UsageError(f"{path} holds a different w for each of {array.shape[1]} layers (W+); one w for all "
                             "layers is supported: give their mean, or invert the photograph in W")
        array = array[:, 0]
    if array.ndim != 2 or array.shape[1] != width or not len(array):
        raise UsageError(f"{path} holds {space} of shape {shape}: {expected}")
    with np.errstate(over="ignore"):
        array = np.ascontiguousarray(array, np.float32)
    if not np.isfinite(array).all():
        raise UsageError(f"{path} holds numbers that are not finite")
    return array
