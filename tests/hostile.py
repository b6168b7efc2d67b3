"""Pickles and archives that a loader must refuse, by what is wrong with them: ``HOSTILE``."""

import array
import builtins
import functools
import io
import operator
import os
import pickle
import struct
import subprocess
import zipfile

import numpy as np
import torch

from exporter import unpickle
from tests import checkpoints as build

MARKER = "lace_marker_of_a_hostile_file"


class Call:
    """Pickles as a call of ``function`` with ``args``; ``state`` follows as BUILD."""

    def __init__(self, function, *args, state=None):
        self.result = (function, args) if state is None else (function, args, state)

    def __reduce__(self):
        return self.result


def text(value: str) -> bytes:
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def by_name(module: str, name: str, *args: bytes) -> bytes:
    """A protocol-4 call of any name: STACK_GLOBAL, MARK, arguments, TUPLE, REDUCE, STOP."""
    return b"\x80\x04" + text(module) + text(name) + b"\x93(" + b"".join(args) + b"tR."


COMMAND = f"touch {MARKER}"


def nested(table=b"ctorch\nFloatStorage\n", *, magic=unpickle.LEGACY_MAGIC, numel=4, stored=4, data=16, version=1001,
           endian=True) -> bytes:
    """The stream of one storage, with something wrong in it."""
    head = b"".join(pickle.dumps(v, 2) for v in (magic, version, {"little_endian": endian, "type_sizes": {}}))
    body = b"\x80\x02(" + text("storage") + table + text("0") + text("cpu") + b"J" + struct.pack("<i", numel) + b"NtQ."
    return head + body + pickle.dumps(["0"], 2) + struct.pack("<q", stored) + b"\0" * data


def storage(stream: bytes) -> bytes:
    """The opcodes that push a storage."""
    return b"ctorch.storage\n_load_from_bytes\n" + b"B" + struct.pack("<I", len(stream)) + stream + b"\x85R"


def integers(*values: int) -> bytes:
    return b"(" + b"".join(b"\x8a\x08" + struct.pack("<q", v) for v in values) + b"t"


def tensor(offset=0, size=(4,), stride=(1,), *, stream=None) -> bytes:
    args = integers(offset)[1:-1] + integers(*size) + integers(*stride) + b"\x89" + b"ccollections\nOrderedDict\n)R"
    return b"\x80\x03ctorch._utils\n_rebuild_tensor_v2\n(" + storage(stream or nested()) + args + b"tR."


def numpy_state(shape: bytes, dtype: bytes, data: bytes) -> bytes:
    """A numpy array by _reconstruct and BUILD."""
    start = b"\x80\x03cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85C\x01b\x87R"
    return start + b"(K\x01" + shape + dtype + b"\x89" + data + b"tb."


def dtype(code: str) -> bytes:
    return (
        b"cnumpy\ndtype\n"
        + text(code)
        + b"\x89\x88\x87R(K\x03"
        + text("<")
        + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\0tb"
    )


def zipped(edit=None, *, members=None, compression=zipfile.ZIP_STORED) -> bytes:
    """A torch archive with other members, another compression, or bytes changed afterwards."""
    source = zipfile.ZipFile(io.BytesIO(build.torch_bytes({"g_ema": {"a": torch.ones(3)}})))
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name in source.namelist():
            archive.writestr(name, source.read(name))
        for name, data in (members or {}).items():
            archive.writestr(name, data)
    return edit(buffer.getvalue()) if edit else buffer.getvalue()


def torch_zip(content: bytes, members=None) -> bytes:
    """A torch archive of nothing but a pickle."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in {"archive/data.pkl": content, "archive/version": b"3", **(members or {})}.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def with_central_bytes(offset: int, value: bytes):
    """Overwrites a field of the first member in the central directory."""

    def edit(data: bytes) -> bytes:
        at = data.index(b"PK\x01\x02") + offset
        return data[:at] + value + data[at + len(value) :]

    return edit


def recursive_module() -> bytes:
    """A module that is its own child, three times over."""
    meta = text("type") + text("class") + text("version") + b"K\x06" + text("class_name") + text("Generator")
    state = text("state") + b"}" + text("_modules") + b"h\x00s"
    module = b"ctorch_utils.persistence\n_reconstruct_persistent_obj\n}(" + meta + state + b"u\x85Rq\x01"
    loops = b"".join(text(name) + b"h\x01s" for name in ("mapping", "synthesis", "b4"))
    return b"\x80\x03}q\x000" + module + b"h\x00" + loops + b"0."


GOOD = build.nvidia_pickle(build.generator(), protocol=4)
DEEP = 100_000
HOSTILE = {
    "os.system": pickle.dumps(Call(os.system, COMMAND)),
    "posix by protocol 2": pickle.dumps(Call(os.system, COMMAND), 2),
    "posix by protocol 0": pickle.dumps(Call(os.system, COMMAND), 0),
    "eval": pickle.dumps(Call(eval, f"open('{MARKER}', 'w')")),
    "exec": pickle.dumps(Call(exec, f"open('{MARKER}', 'w')")),
    "getattr": pickle.dumps(Call(getattr, "a", "upper")),
    "__import__": pickle.dumps(Call(__import__, "this")),
    "compile": pickle.dumps(Call(compile, "1", "a", "eval")),
    "open": pickle.dumps(Call(open, MARKER, "w")),
    "globals": pickle.dumps(Call(builtins.globals)),
    "bytearray of a huge size": pickle.dumps(Call(bytearray, 2**40)),
    "subprocess": pickle.dumps(Call(subprocess.Popen, ["touch", MARKER])),
    "numpy.load": pickle.dumps(Call(np.load, "a.npy")),
    "torch.load": pickle.dumps(Call(torch.load, "a.pt")),
    "torch.hub": by_name("torch.hub", "load", text("a/b")),
    "functools.partial": pickle.dumps(Call(functools.partial, len)),
    "attrgetter": pickle.dumps(Call(operator.attrgetter, "a.b")),
    "array.array": pickle.dumps(array.array("b", [1])),
    "copyreg": by_name("copyreg", "_reconstructor", text("a")),
    "runpy": by_name("runpy", "run_path", text("a.py")),
    "import of a module never loaded": by_name("antigravity", "fly"),
    "the real persistence package": by_name("torch_utils.persistence", "_src_to_module", text("import this")),
    "dotted os.path": by_name("os", "path.join", text("a")),
    "dotted under a known module": by_name("collections", "OrderedDict.fromkeys", text("a")),
    "dunder of a known name": by_name("numpy", "ndarray.__class__", text("a")),
    "subclasses": by_name("builtins", "set.__base__.__subclasses__"),
    "a call of a storage type": b"\x80\x03ctorch\nFloatStorage\n)R.",
    "a call of ndarray": b"\x80\x03cnumpy\nndarray\nJ\xff\xff\xff\x7f\x85\x85R.",
    "a call of text": b"\x80\x03" + text("os") + b")R.",
    "arguments that are no tuple": b"\x80\x03ccollections\nOrderedDict\n]R.",
    "NEWOBJ of a foreign class": b"\x80\x03csubprocess\nPopen\n)\x81.",
    "NEWOBJ_EX with keywords": b"\x80\x04cargparse\nNamespace\n)}" + text("a") + b"K\x01s\x92.",
    "BUILD on a name": b"\x80\x03ccollections\nOrderedDict\n}" + text("make") + text("x") + b"sb.",
    "BUILD on a list": b"\x80\x03]}" + text("__class__") + b"K\x01sb.",
    "BUILD on a number": b"\x80\x03K\x01}b.",
    "BUILD with a tuple of states": b"\x80\x03cargparse\nNamespace\n)\x81}}" + text("__class__") + b"K\x01s\x86b.",
    "BUILD on a module": build.nvidia_pickle(build.generator(), snapshot="bare")[:-1] + b"}b.",
    "EXT1": b"\x80\x02\x82\x01.",
    "EXT2": b"\x80\x02\x83\x01\x00.",
    "EXT4": b"\x80\x02\x84\x01\x00\x00\x00.",
    "INST": b"(S'touch x'\nios\nsystem\n.",
    "INST behind a protocol": b"\x80\x02(S'touch x'\nios\nsystem\n.",
    "OBJ": b"\x80\x02(cos\nsystem\n" + text(COMMAND) + b"o.",
    "PERSID": b"\x80\x02Pabc\n.",
    "BINPERSID": b"\x80\x02" + text("a") + b"Q.",
    "out-of-band buffer": b"\x80\x05\x97.",
    "nested foreign name": b"\x80\x03" + storage(nested(b"cos\nsystem\n")) + b".",
    "nested known name": b"\x80\x03" + storage(nested(b"ccollections\nOrderedDict\n")) + b".",
    "nested call": b"\x80\x03" + storage(nested(b"ctorch\nFloatStorage\n)R")) + b".",
    "nested wrong magic": b"\x80\x03" + storage(nested(magic=7)) + b".",
    "nested wrong version": b"\x80\x03" + storage(nested(version=1002)) + b".",
    "nested big endian": b"\x80\x03" + storage(nested(endian=False)) + b".",
    "nested numel too large": b"\x80\x03" + storage(nested(numel=2**30, stored=2**30)) + b".",
    "nested numel negative": b"\x80\x03" + storage(nested(numel=-4, stored=-4)) + b".",
    "nested numel differs": b"\x80\x03" + storage(nested(numel=4, stored=5)) + b".",
    "nested truncated": b"\x80\x03" + storage(nested()[:-20]) + b".",
    "nested in itself": b"\x80\x03" + storage(b"\x80\x03" + storage(nested()) + b".") + b".",
    "storage from text": b"\x80\x03ctorch.storage\n_load_from_bytes\n" + text("abc") + b"\x85R.",
    "tensor: oversized": tensor(size=(2**40,)),
    "tensor: overflowing product": tensor(size=(2**31, 2**31, 2**31), stride=(0, 0, 0)),
    "tensor: expanded from nothing": tensor(size=(2**40,), stride=(0,)),
    "tensor: negative size": tensor(size=(-4,)),
    "tensor: negative offset": tensor(offset=-1),
    "tensor: offset too large": tensor(offset=2),
    "tensor: stride too large": tensor(size=(2, 2), stride=(3, 1)),
    "tensor: negative stride": tensor(stride=(-1,)),
    "tensor: strides of another rank": tensor(stride=(1, 1)),
    "tensor: 100 dimensions": tensor(size=(1,) * 100, stride=(1,) * 100),
    "tensor without a storage": b"\x80\x03ctorch._utils\n_rebuild_tensor_v2\n(NK\x00))\x89}tR.",
    "parameter of text": b"\x80\x03ctorch._utils\n_rebuild_parameter\n" + text("a") + b"\x88}\x87R.",
    "object array": pickle.dumps(np.array([Call(os.system, COMMAND)], dtype=object)),
    "object array by protocol 2": pickle.dumps(np.array([None, {}], dtype=object), 2),
    "structured array": pickle.dumps(np.zeros(2, dtype=[("a", "f4")]), 3),
    "text array": pickle.dumps(np.array(["abc"]), 3),
    "dates": pickle.dumps(np.array(["2020-01-01"], dtype="datetime64"), 3),
    "huge array": numpy_state(integers(2**40), dtype("f4"), b"C\x04abcd"),
    "negative array": numpy_state(integers(-1, -1), dtype("f4"), b"C\x04abcd"),
    "array with a list as data": numpy_state(integers(1), dtype("f4"), b"]"),
    "array of another class": b"\x80\x03cnumpy.core.multiarray\n_reconstruct\ncargparse\nNamespace\n"
                              b"K\x00\x85C\x01b\x87R.",
    "dtype by expression": b"\x80\x03cnumpy\ndtype\n" + text("f4,O") + b"\x85R.",
    "dtype of no number": b"\x80\x03cnumpy\ndtype\n" + text("O8") + b"\x85R.",
    "scalar of a wrong length": b"\x80\x03cnumpy.core.multiarray\nscalar\n" + dtype("f8") + b"C\x01a\x86R.",
    "encode with another codec": by_name("_codecs", "encode", text("abc"), text("unicode_escape")),
    "encode amplified": b"\x80\x03" + text("a" * 2**20) + b"q\x000" + b"(" + (
        b"c_codecs\nencode\nh\x00" + text("latin1") + b"\x86R") * 200 + b"l.",
    "module of another type": by_name("torch_utils.persistence", "_reconstruct_persistent_obj", b"}" + text("type") +
                                      text("module") + b"s"),
    "module of an old version": GOOD.replace(b"\x8c\x07version\x94K\x06", b"\x8c\x07version\x94K\x01"),
    "module without state": by_name("torch_utils.persistence", "_reconstruct_persistent_obj", b"}"),
    "module that is its own child": recursive_module(),
    "set of a list": b"\x80\x03cbuiltins\nset\n]]a\x85R.",
    "tuple as a key": b"\x80\x03}" + b")" + b"\x85" * DEEP + b"K\x01s.",
    "unhashable key": b"\x80\x03}]K\x01s.",
    "recursion bomb of lists": b"\x80\x03" + b"]" * DEEP + b"a" * (DEEP - 1) + b".",
    "recursion bomb of tuples": b"\x80\x03)" + b"\x85" * DEEP + b".",
    "recursion bomb of marks": b"\x80\x03" + b"(" * DEEP + b"t" * DEEP + b".",
    "memo of a huge index": b"\x80\x03]r\xff\xff\xff\xff" + b"j\xfe\xff\xff\xff.",
    "memo of a negative index": b"\x80\x03]p-1\n.",
    "memo never written": b"\x80\x03h\x07.",
    "bytes of a huge size": b"\x80\x04\x8e" + struct.pack("<Q", 2**60) + b"abc.",
    "bytearray of a huge announced size": b"\x80\x05\x96" + struct.pack("<Q", 2**62) + b"abc.",
    "text of a huge size": b"\x80\x04\x8d" + struct.pack("<Q", 2**63 - 1) + b"abc.",
    "frame of a huge size": b"\x80\x04\x95" + struct.pack("<Q", 2**63 - 1) + b".",
    "number of too many digits": b"\x80\x02L" + b"9" * 100_000 + b"L\n.",
    "text that is not UTF-8": b"\x80\x03X\x02\x00\x00\x00\xff\xfe.",
    "unknown protocol": b"\x80\x63N.",
    "unknown opcode": b"\x80\x03\xff.",
    "nothing on the stack": b"\x80\x03.",
    "two results": b"\x80\x03NN.",
    "unbalanced mark": b"\x80\x03(N.",
    "POP of nothing": b"\x80\x030.",
    "TUPLE without a mark": b"\x80\x03t.",
    "APPEND to a dict": b"\x80\x03}K\x01a.",
    "SETITEM on a list": b"\x80\x03]K\x00K\x01s.",
    "odd SETITEMS": b"\x80\x03}(K\x01u.",
    "STACK_GLOBAL of numbers": b"\x80\x04K\x01K\x02\x93.",
    "STACK_GLOBAL of lists": b"\x80\x04]]\x93.",
    "truncated at once": b"\x80",
    "truncated in the middle": GOOD[: len(GOOD) // 2],
    "truncated at the end": GOOD[:-1],
    "zip with path traversal": zipped(members={"../../etc/data/0": b"x"}),
    "zip with an absolute path": zipped(members={"/data/0": b"x"}),
    "zip with another member": zipped(members={"archive/run.py": b"x"}),
    "zip with two pickles": zipped(members={"other/data.pkl": b"x"}),
    "zip with compression": zipped(compression=zipfile.ZIP_DEFLATED),
    "zip of a declared huge size": zipped(with_central_bytes(24, struct.pack("<I", 2**31))),
    "zip of two huge sizes": zipped(with_central_bytes(20, struct.pack("<II", 2**31, 2**31))),
    "zip encrypted": zipped(with_central_bytes(8, b"\x01\x00")),
    "zip truncated": zipped()[:-30],
    "zip of garbage": b"PK\x03\x04" + b"\0" * 100,
    "zip with a hostile pickle": torch_zip(pickle.dumps(Call(os.system, COMMAND))),
    "zip with a nested storage key": torch_zip(b"\x80\x02(" + text("storage") + b"ctorch\nFloatStorage\n"
                                               + text("../version") + text("cpu") + b"K\x01tQ."),
    "zip of a big-endian machine": torch_zip(pickle.dumps({}), {"archive/byteorder": b"big"}),
    "TorchScript": zipped(members={"archive/constants.pkl": b"x"}),
    "zip without its data": build.torch_bytes({"a": torch.ones(3)}).replace(b"data/0", b"data/7"),
    "legacy torch truncated": build.rosinality_file(build.generator(), legacy=True)[:-50],
    "legacy torch with foreign name": build.torch_bytes({"a": Call(os.system, COMMAND)}, legacy=True),
    "legacy torch without storages": build.torch_bytes({"a": torch.ones(3)}, legacy=True)[:-40],
}
