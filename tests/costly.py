"""Small files that would cost much to read, by what they make expensive: ``costly``."""

import pickle
import struct

import numpy as np
import torch

from exporter import unpickle
from exporter.generators.stylegan2 import Mapping
from tests import checkpoints as build
from tests.hostile import by_name, dtype, nested, text, torch_zip


def shared_tuples(depth: int, leaf: bytes = b")") -> bytes:
    """The opcodes of a tuple that holds the one before it twice, and so on: 2^depth leaves in 3 bytes a level."""
    return leaf + b"2\x86" * depth


def shared_lists(depth: int, leaf: bytes = b"K\x01") -> bytes:
    opcodes = leaf
    for i in range(depth):
        opcodes += b"q" + bytes([i]) + b"0](" + b"h" + bytes([i]) + b"h" + bytes([i]) + b"e"
    return opcodes


def number(value: int) -> bytes:
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8b" + struct.pack("<i", len(data)) + data


def many(size: int, opcodes: bytes, prefix: bytes = b"", suffix: bytes = b"") -> bytes:
    """A pickle of about ``size`` bytes that repeats opcodes."""
    return b"\x80\x03" + prefix + opcodes * ((size - len(prefix) - len(suffix)) // len(opcodes)) + suffix + b"."


def keys(values) -> bytes:
    return b"\x80\x03}(" + b"".join(b"\x8a\x0a" + value.to_bytes(10, "little") + b"N" for value in values) + b"u."


def state(**shapes: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """Tensors by name, '__' for a dot."""
    return {name.replace("__", "."): torch.zeros(shape) for name, shape in shapes.items()}


def announced(resolution: int, width: int = 1) -> dict[str, torch.Tensor]:
    """The names of a generator of any size; its tensors hold next to nothing."""
    found = state(mapping__w_avg=(1,), mapping__fc0__weight=(1, 1), mapping__fc0__bias=(1,),
                  synthesis__b4__const=(width, 4, 4))
    r = 4
    while r <= resolution:
        for layer in ("conv0", "conv1"):
            if r > 4 or layer == "conv1":
                home = f"synthesis.b{r}.{layer}."
                found |= {f"{home}weight": torch.zeros(width, 1, 1, 1), f"{home}noise_const": torch.zeros(1, 1)}
        found[f"synthesis.b{r}.torgb.weight"] = torch.zeros(3, 1, 1, 1)
        r *= 2
    return found


def wide_mapping(width: int) -> bytes:
    """A rosinality file whose centre must be sampled from a network as wide as the bytes allow."""
    net = build.generator(widths={4: 2, 8: 2})
    tensors = build.rosinality_state(net)
    shared = torch.zeros(width, width, dtype=torch.int8)
    for i in (1, 2, 3):
        tensors[f"style.{i}.weight"], tensors[f"style.{i}.bias"] = shared, torch.zeros(width)
    for name in [name for name in tensors if name.endswith("modulation.weight")]:
        tensors[name] = torch.zeros(len(tensors[name]), width, dtype=torch.int8)
    return build.torch_bytes({"g_ema": tensors})


def components(depth: int, fan: int) -> bytes:
    """TensorFlow networks that hold the one before them ``fan`` times."""
    with build.foreign_names():
        network = build.tensorflow_network("leaf", {})
        for i in range(depth):
            network = build.tensorflow_network(f"n{i}", {}, {f"c{j}": network for j in range(fan)}.items())
        return pickle.dumps((network, network, network))


def tensorflow_with(**options) -> bytes:
    return build.tensorflow_pickle(build.generator(), **options)


def tangle(depth: int = 60):
    value = ()
    for _ in range(depth):
        value = (value, value)
    return value


def two_tangles() -> bytes:
    """Two equal values that share nothing with each other: comparing them unfolds both."""
    net = build.generator()
    with build.foreign_names():
        record = build.nvidia_record(net)
        blocks = record.meta["state"]["_modules"]["synthesis"].meta["state"]["_modules"]
        for name in ("b4", "b8"):
            blocks[name].meta["state"]["architecture"] = tangle()
        return pickle.dumps({"G_ema": record})


def stylegan3_with(**attributes) -> bytes:
    from tests import test_stylegan3 as three
    from tests.test_checkpoints import pickled_again

    record = three.generator_record(three.network("T", 32), Mapping(6, 8, num_layers=2))
    synthesis = record.state["_modules"]["synthesis"]
    synthesis.state["_modules"]["input"].state.update(attributes)
    with build.foreign_names():
        return pickle.dumps({"G_ema": pickled_again(record)})


def stylegan3_of_channels(count: int) -> bytes:
    """The input's weight says how many waves there are; a square matrix of that size is 10 GB."""
    from tests import test_stylegan3 as three
    from tests.test_checkpoints import pickled_again

    record = three.generator_record(three.network("T", 32), Mapping(6, 8, num_layers=2))
    record.state["_modules"]["synthesis"].state["_modules"]["input"].state["_parameters"]["weight"] = np.zeros(
        (count, 1), np.float32)
    with build.foreign_names():
        return pickle.dumps({"G_ema": pickled_again(record)})


def crowded(count: int) -> bytes:
    """A synthesis of very many layers."""
    def record(class_name: str, **parts):
        return build.Persistent(class_name, {"_modules": parts, "_parameters": {}, "_buffers": {}}, "")

    with build.foreign_names():
        layers = {f"L{i}": record("SynthesisLayer") for i in range(count)}
        whole = record("Generator", mapping=record("MappingNetwork", fc0=record("FullyConnectedLayer")),
                       synthesis=record("SynthesisNetwork", input=record("SynthesisInput"), **layers))
        return pickle.dumps({"G_ema": whole})


def stream_of(opcodes: bytes) -> bytes:
    """The opcode that pushes a nested storage with opcodes in front of its content."""
    start = nested().index(b"\x80\x02(") + 2
    stream = nested()[:start] + opcodes + nested()[start:]
    return b"B" + struct.pack("<I", len(stream)) + stream


def loops(parts: int) -> bytes:
    """A module that is each of its own parts."""
    record = b"ctorch_utils.persistence\n_reconstruct_persistent_obj\n}(" + text("type") + text("class") + text(
        "version") + b"K\x06" + text("class_name") + text("Generator") + text("state") + b"}" + text(
        "_modules") + b"h\x00su\x85Rq\x01"
    names = ["mapping", "synthesis", "b4", "input", *(f"m{i}" for i in range(parts))]
    return b"\x80\x03}q\x000" + record + b"h\x00" + b"".join(text(name) + b"h\x01s" for name in names) + b"0."


def towers(depth: int, fan: int) -> bytes:
    with build.foreign_names():
        record = build.nvidia_record(build.generator())
        for _ in range(depth):
            record = build.Persistent("Block", {"_modules": {f"m{j}": record for j in range(fan)}}, "")
        parts = {"mapping": record, "synthesis": build.Persistent("S", {"_modules": {"b4": record}}, "")}
        return pickle.dumps({"G_ema": build.Persistent("Generator", {"_modules": parts}, "")})


def variable_of_a_tangle() -> bytes:
    with build.foreign_names():
        network = build.tensorflow_network("Gs", {})
        network.variables = [(tangle(), np.zeros(1, np.float32))]
        return pickle.dumps(network)


def legacy(opcodes: bytes) -> bytes:
    """torch.save's old container around a pickle of opcodes."""
    head = b"".join(pickle.dumps(v, 2) for v in (unpickle.LEGACY_MAGIC, 1001, {"little_endian": True}))
    return head + b"\x80\x02" + opcodes + b"." + pickle.dumps([], 2)


def safetensors(header: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header


def sharing(count: int) -> bytes:
    """Tensors that are views of one storage."""
    storage_of_all = torch.zeros(50_000)
    return build.torch_bytes({f"t{i}": storage_of_all[i:] for i in range(count)})


PRIME = 2**61 - 1  # Python's numbers have the same hash modulo this


def costly(size: int) -> dict[str, bytes]:
    """Files of about ``size`` bytes where a case can fill them."""
    return {**TANGLES, **ANNOUNCED, **repeated(size)}


TANGLES = {
    "shared tuples where a type was expected": by_name(
        "torch_utils.persistence", "_reconstruct_persistent_obj", b"}" + text("type") + shared_tuples(40) + b"s"),
    "shared tuples as a whole": b"\x80\x03" + shared_tuples(60) + b".",
    "shared lists as a whole": b"\x80\x03" + shared_lists(60) + b".",
    "shared tuples as a TensorFlow version": b"\x80\x03cdnnlib.tflib.network\nNetwork\n)\x81}" + text("version")
                                             + shared_tuples(60) + b"sb\x85.",
    "shared tuples as taps": tensorflow_with(resample_kernel=tangle()),
    "shared lists as taps": tensorflow_with(resample_kernel=[tangle(), tangle(), 1, 1]),
    "shared tuples as an architecture": tensorflow_with(architecture=tangle()),
    "shared tuples as a nonlinearity": tensorflow_with(nonlinearity=tangle()),
    "shared tuples as a variable's name": variable_of_a_tangle(),
    "two tangles that are compared": two_tangles(),
    "shared tuples as a size": stylegan3_with(size=tangle()),
    "shared tuples as a rate": stylegan3_with(sampling_rate=tangle()),
    "shared tuples as a latent_avg": pickle.dumps({"g_ema": {"input.input": np.zeros(1, np.float32)},
                                                   "latent_avg": tangle()}),
    "a module inside itself": loops(200),
    "modules that hold the one before eight times": towers(40, 8),
    "a synthesis of 3000 layers": crowded(3000),
    "TensorFlow components 8^8": components(8, 8),
    "TensorFlow components 2^40": components(40, 2),
}
ANNOUNCED = {
    "names that announce 16384 px": build.torch_bytes({"G_ema": announced(16384)}),
    "names that announce 4096 px": build.torch_bytes({"G_ema": announced(4096)}),
    "a constant that announces 1000 channels": build.torch_bytes({"G_ema": announced(1024, 1000)}),
    "a Fourier input of 50000 channels": stylegan3_of_channels(50_000),
    "an array that announces a terabyte": b"\x93NUMPY\x01\x00v\x00" + (
        b"{'descr': '<f4', 'fortran_order': False, 'shape': (500000, 500000), }".ljust(117) + b"\n") + b"\0" * 8,
}


def repeated(size: int) -> dict[str, bytes]:
    shell = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85C\x01b\x87R"
    return {
        "a wide mapping that must be sampled": wide_mapping(int((0.8 * size) ** 0.5)),
        "an array with many memo numbers that is built again and again": many(
            size, b"2(K\x01K\x00\x85h\x02\x89C\x00tb0", prefix=dtype("f4") + b"q\x020" + shell + b"".join(
                b"r" + struct.pack("<I", i) for i in range(3, size // 10))),
        "one long number as every key": many(
            size, b"h\x00N", prefix=number(1 << (4 * size)) + b"q\x000}(", suffix=b"u"),
        "numbers that collide as keys": keys(PRIME * i for i in range(1, size // 14)),
        "far numbers as keys": keys(i << 40 for i in range(1, size // 14)),
        "floats that collide as keys": b"\x80\x03}(" + b"".join(
            b"G" + struct.pack(">d", 2.0 ** (61 + i % 900) * (1 + i // 900)) + b"N" for i in range(size // 11)) + b"u.",
        "numbers that collide in a set": b"\x80\x04\x8f(" + b"".join(
            b"\x8a\x0a" + (i << 40).to_bytes(10, "little") for i in range(1, size // 13)) + b"\x90.",
        "memo numbers that collide": b"\x80\x03N" + b"".join(
            b"r" + struct.pack("<I", i << 14) for i in range(1, size // 6)) + b".",
        "a long list as the items of every OrderedDict": many(
            size, b"h\x01h\x02R0", suffix=b"N",
            prefix=b"ccollections\nOrderedDict\nq\x010](" + b"K\x01N\x86" * (size // 20) + b"e\x85q\x020"),
        "a long list as the items of every set": many(
            size, b"h\x01h\x02R0", suffix=b"N",
            prefix=b"c__builtin__\nset\nq\x010](" + b"K\x01" * (size // 20) + b"e\x85q\x020"),
        "a long dict as every state": many(
            size, b"h\x01h\x02b0", prefix=b"cargparse\nNamespace\n)\x81q\x010}(" + b"".join(
                text(f"k{i}") + b"N" for i in range(size // 50)) + b"uq\x020", suffix=b"N"),
        "a long text as every encoded text": many(
            size, b"h\x01h\x02R0", suffix=b"N",
            prefix=b"c_codecs\nencode\nq\x010" + text("a" * (size // 2)) + text("latin1") + b"\x86q\x020"),
        "one stream as every storage": many(
            size, b"h\x01h\x02R0", suffix=b"N",
            prefix=b"ctorch.storage\n_load_from_bytes\nq\x010" + stream_of(b"") + b"\x85q\x020"),
        "a stream of opcodes as every storage": many(
            size, b"h\x01h\x02R0", prefix=b"ctorch.storage\n_load_from_bytes\nq\x010"
            + stream_of(b"N0" * (size // 9)) + b"\x85q\x020", suffix=b"N"),
        "tensors that share all the bytes": sharing(2000),
        "sets without end": many(size, b"\x8f", prefix=b"(", suffix=b"l").replace(b"\x80\x03", b"\x80\x04", 1),
        "dicts without end": many(size, b"}", prefix=b"(", suffix=b"l"),
        "OrderedDicts without end": many(size, b"h\x00)R", prefix=b"ccollections\nOrderedDict\nq\x000(", suffix=b"l"),
        "foreign objects without end": many(size, b"h\x00)R", prefix=b"cos\nsystem\nq\x000(", suffix=b"l"),
        "foreign names without end": b"\x80\x03(" + b"".join(b"cm\nn%d\n" % i for i in range(size // 10)) + b"l.",
        "opcodes without effect": many(size, b"N0", suffix=b"N"),
        "a wide text": b"\x80\x03" + text("\U0001f600" + "a" * (size - 100)) + b".",
        "an opcode in two bytes of a zip": torch_zip(many(size, b"N0", suffix=b"N")),
        "opcodes without effect in a legacy file": legacy(b"N0" * (size // 2) + b"N"),
        "a header of brackets": safetensors(b'{"a":' + b"[" * (size // 2) + b"]" * (size // 2) + b"}"),
    }
