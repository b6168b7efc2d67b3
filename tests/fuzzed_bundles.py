"""Bundles of a stranger: small ones that were changed at random and given new hashes, and what runs them.

``python -m tests.fuzzed_bundles BASE FIRST COUNT RUNTIME`` opens COUNT cases from seed FIRST on, and solves what opens.
It prints a line for each case before and after, so that whoever started it knows which one killed it. A case is a
function of its seed.
"""

import contextlib
import copy
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import load, save

from engine.bundle import FIELD, FOR_PEOPLE, GOLDEN, MANIFEST, Bundle, GeneratorFacts, Head, Sharp
from engine.errors import LaceError
from exporter.field_graphs import write_field_graphs
from tests.worlds import head_tensors, random_world, write_bundle

Files = dict[str, bytes]
LIMIT = 10.0  # seconds of a case
ENDS = ("refused", "failed", "answered")
DIM, SIDE, CHANNELS, WS = 8, 4, 3, 2


# --- the bundle that is changed ---------------------------------------------------------------------------------------


def write_base(path: Path) -> Bundle:
    """Conditional, with heads on w and z, a sharp stack, all graphs, and a synthesis of one layer."""
    world = random_world(path.with_name("world"), dim=DIM, layers=2, labels=2, z_head=True)
    rng = np.random.default_rng(0)
    widths = (DIM, 6, 2)
    sharp = {name.replace("head.smile.", "head.smile.sharp."): tensor
             for name, tensor in head_tensors(rng, "smile", widths, 1.0, 0.0).items()}
    heads = [replace(h, sharp=Sharp(widths, True, {"smile": 1.1}, {"smile": {"0.7": 0.01}})) if h.name == "smile" else h
             for h in world.manifest.heads]
    write_bundle(path, world.field | sharp, heads, list(world.manifest.attributes), world.generator, graphs=True)
    shutil.rmtree(world.path)
    files = read_files(path)
    files["synthesis.onnx"] = synthesis(world.generator).SerializeToString()
    golden = load(files[GOLDEN])
    golden["synthesis.image"] = np.zeros((1, CHANNELS, SIDE, SIDE), np.float32)
    golden["synthesis.images"] = np.zeros((len(golden["z"]), CHANNELS, SIDE, SIDE), np.float32)
    files[GOLDEN] = save(golden)
    body = json.loads(files[MANIFEST])
    body["graphs"]["synthesis"] = {"file": "synthesis.onnx", "precision": "fp32", "noise": "none"}
    body["files"]["synthesis.onnx"] = {"kind": "synthesis"}
    files[MANIFEST] = json.dumps(body).encode()
    shutil.rmtree(path)
    write_files(path, files)
    return Bundle(path)


def synthesis(facts: GeneratorFacts) -> onnx.ModelProto:
    """A picture is a linear function of the first layer's w."""
    numbers = CHANNELS * SIDE * SIDE
    weight = np.random.default_rng(1).standard_normal((numbers, facts.w_dim)).astype(np.float32)
    constants = {"first": np.array(0, np.int64), "weight": weight, "shape": np.array([-1, CHANNELS, SIDE, SIDE])}
    nodes = [helper.make_node("Gather", ["ws", "first"], ["w"], axis=1),
             helper.make_node("Gemm", ["w", "weight"], ["flat"], transB=1),
             helper.make_node("Reshape", ["flat", "shape"], ["image"])]
    ws = helper.make_tensor_value_info("ws", TensorProto.FLOAT, ["rows", WS, facts.w_dim])
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, ["rows", CHANNELS, SIDE, SIDE])
    initialisers = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    graph = helper.make_graph(nodes, "synthesis", [ws], [image], initialisers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def as_format_1(files: Files) -> Files:
    """The same bundle as 0.1 would have written it, without graphs of heads, whose seeds were others."""
    files = {name: data for name, data in files.items() if not name.startswith("head.") and name not in FOR_PEOPLE}
    body, golden = json.loads(files[MANIFEST]), load(files[GOLDEN])
    facts = GeneratorFacts(**body["generator"])
    body["format"] = "1.0"
    body["generator"] = {k: v for k, v in body["generator"].items() if k not in ("mapping_layers", "normalise")}
    body["heads"] = [{k: v for k, v in head.items() if k != "sharp"} for head in body["heads"]]
    body["graphs"] = {name: graph for name, graph in body["graphs"].items() if graph["file"] in files}
    body["files"] = {name: {} for name in files if name != MANIFEST}
    old = {name.removeprefix("mapping.").removeprefix("synthesis."): answer for name, answer in golden.items()
           if not name.startswith("head.")}
    for attribute in body["attributes"]:
        for kind in ("logits", "gradient"):
            columns = slice(*attribute["columns"])
            answer = golden[f"head.{attribute['head']}.{kind}"][:, columns]
            old[f"{attribute['name']}.{kind}"] = np.ascontiguousarray(answer)  # or safetensors writes other numbers
    field = {name: tensor for name, tensor in load(files[FIELD]).items() if ".sharp." not in name}
    return {**files, MANIFEST: json.dumps(body).encode(), GOLDEN: save(old), **regraphed(facts, body, field)}


def regraphed(facts: GeneratorFacts, body: dict, field: dict) -> Files:
    """The field and the graphs that point into it."""
    heads = [Head(head["name"], head["space"], tuple(head["widths"])) for head in body["heads"]]
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / FIELD).write_bytes(save(field))
        write_field_graphs(Path(folder), facts, heads)
        return {name: data for name, data in read_files(Path(folder)).items() if not name.startswith("head.")}


def read_files(path: Path) -> Files:
    return {file.name: file.read_bytes() for file in sorted(path.iterdir())}


def write_files(path: Path, files: Files) -> None:
    """With the sizes and hashes that the files have now: a stranger can make those."""
    path.mkdir(parents=True)
    for name, data in files.items():
        if name != MANIFEST:
            (path / name).write_bytes(data)
    try:
        body = json.loads(files[MANIFEST])
        for name, facts in body["files"].items():
            if isinstance(facts, dict) and name in files:
                facts |= {"bytes": len(files[name]), "sha256": hashlib.sha256(files[name]).hexdigest()}
        data = json.dumps(body).encode()
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        data = files[MANIFEST]
    (path / MANIFEST).write_bytes(data)


# --- changes ----------------------------------------------------------------------------------------------------------

HOSTILE = (None, True, False, -1, 0, 1, 2, 3, 7, 9, 65, 2**16, 2**31, 2**63, 10**30, -2**63, 0.5, -0.0, 1e308, 1e-320,
           float("nan"), float("inf"), "", "x", "\x1b[31m", "../../etc/passwd", "a" * 5000, [], [1], [0, 0], [1e9], {},
           {"a": 1}, [[]], "field.safetensors", "smile", "w", "z", "class", "value")
OPERATORS = ("Loop", "Scan", "If", "Resize", "Tile", "Pad", "ConstantOfShape", "Expand", "Range", "NonZero", "Add",
             "MatMul", "Conv", "Concat", "Transpose", "Size", "RandomNormal", "Einsum", "Reshape")
TENSOR_CHANGES = ("remove", "extra", "layer", "grow", "shrink", "type", "scalar", "nan", "inf", "huge", "label")
PLACES = ("../golden.safetensors", "/etc/passwd", "*/_ORT_MEM_ADDR_/*", "golden.safetensors", "", "field.safetensors")
NUMBERS = (-(2**63), -(2**31), -2, -1, 0, 1, 2, 3, 8, 17, 255, 65536, 2**31 - 1, 2**40, 2**63 - 1)


def pick(rng: np.random.Generator, choices: Sequence):
    return choices[int(rng.integers(len(choices)))]


def change_manifest(rng: np.random.Generator, files: Files) -> str:
    """One to three values of the manifest replaced, removed, repeated or added."""
    body = json.loads(files[MANIFEST])
    done = []
    for _ in range(rng.integers(1, 4)):
        place, way = body, []
        while True:
            key = pick(rng, list(place)) if isinstance(place, dict) else int(rng.integers(len(place)))
            way.append(key)
            inner = place[key]
            if not isinstance(inner, (dict, list)) or not inner or rng.random() < 0.15:
                break
            place = inner
        action = pick(rng, ("replace", "replace", "replace", "near", "remove", "repeat", "add"))
        if action == "replace":
            place[key] = copy.deepcopy(pick(rng, HOSTILE))
        elif action == "near" and isinstance(inner, (int, float)):
            place[key] = inner + pick(rng, (-1, 1, 0.5, 7))
        elif action == "remove":
            del place[key]
        elif action == "repeat" and isinstance(place, list):
            place.append(copy.deepcopy(inner))
        elif isinstance(place, dict):
            place[f"{key}.2"] = copy.deepcopy(inner)
        done.append(f"{action} {'.'.join(map(str, way))}")
        if not body:
            break
    files[MANIFEST] = json.dumps(body).encode()
    return "manifest: " + "; ".join(done)


def change_tensors(rng: np.random.Generator, files: Files) -> str:
    """One or two tensors of the field or of the golden answers."""
    file = pick(rng, (FIELD, FIELD, GOLDEN))
    tensors = load(files[file])
    done = []
    for _ in range(rng.integers(1, 3)):
        name = pick(rng, list(tensors))
        tensor = tensors[name]
        action = pick(rng, TENSOR_CHANGES)
        if action == "remove":
            del tensors[name]
        elif action == "extra":
            tensors[pick(rng, ("mapping.embedding", "mapping.9.weight", "head.nose.0.weight", "x"))] = np.ones(
                (1, 4), np.float32)
        elif action == "layer":
            stem, _, leaf = name.rpartition(".")
            tensors[f"{stem.rpartition('.')[0]}.{rng.integers(12)}.{leaf}"] = np.ones((1000, 2), np.float32)
        elif action == "grow":
            tensors[name] = np.concatenate([tensor, tensor]) if tensor.ndim else np.ones(3, np.float32)
        elif action == "shrink":
            tensors[name] = tensor[:0] if rng.random() < 0.3 else tensor[: max(len(tensor) - 1, 0)]
        elif action == "type":
            tensors[name] = tensor.astype(pick(rng, (np.float64, np.float16, np.int64, np.uint8, np.bool_)))
        elif action == "scalar":
            tensors[name] = np.float32(1).reshape(())
        elif action == "label" and "label" in tensors:
            tensors["label"] = np.array([10**9, -1])
        else:
            value = {"nan": np.nan, "inf": -np.inf}.get(action, 1e38)
            tensors[name] = np.full_like(tensor, 3) if tensor.dtype.kind == "i" else np.full_like(tensor, value)
        done.append(f"{action} {name}")
        if not tensors:
            break
    files[file] = save({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()})
    return f"{file}: " + "; ".join(done)


def change_bytes(rng: np.random.Generator, files: Files) -> str:
    """Bytes of the beginning of a file (headers), or anywhere in a graph."""
    file = pick(rng, [name for name in files if name != MANIFEST])
    data = bytearray(files[file])
    reach = min(len(data), 2000) if file.endswith(".safetensors") else len(data)
    for _ in range(rng.integers(1, 5)):
        at = int(rng.integers(max(reach, 1)))
        action = pick(rng, ("flip", "set", "insert", "cut", "end"))
        if action == "flip":
            data[at % len(data)] ^= 1 << int(rng.integers(8))
        elif action == "set":
            data[at % len(data)] = int(rng.integers(256))
        elif action == "insert":
            data[at:at] = rng.bytes(int(rng.integers(1, 9)))
        elif action == "cut":
            del data[at : at + int(rng.integers(1, 9))]
        else:
            del data[max(1, len(data) - int(rng.integers(1, 50))) :]
        if not data:
            data = bytearray(b"\0")
    files[file] = bytes(data)
    return f"{file}: bytes"


def change_graph(rng: np.random.Generator, files: Files) -> str:
    """A graph that is still one, and says something else."""
    file = pick(rng, [name for name in files if name.endswith(".onnx")])
    model = onnx.load_from_string(files[file])
    graph, done = model.graph, []
    for _ in range(rng.integers(1, 3)):
        action = pick(rng, list(GRAPH_CHANGES))
        GRAPH_CHANGES[action](rng, model, graph)
        done.append(action)
    files[file] = model.SerializeToString()
    return f"{file}: " + "; ".join(done)


def operator(rng, model, graph):
    node = pick(rng, graph.node)
    node.op_type = pick(rng, OPERATORS)
    if rng.random() < 0.2:
        node.domain = pick(rng, ("com.microsoft", "ai.onnx.ml", "ai.onnx", "x"))


def attribute(rng, model, graph):
    found = [a for node in graph.node for a in node.attribute if a.type in (2, 7)]
    if found:
        chosen = pick(rng, found)
        if chosen.type == 2:
            chosen.i = pick(rng, NUMBERS)
        else:
            chosen.ints[:] = [pick(rng, NUMBERS) for _ in chosen.ints]


def wiring(rng, model, graph):
    node = pick(rng, graph.node)
    names = [name for other in graph.node for name in (*other.input, *other.output)] + ["", "nothing"]
    side = pick(rng, (node.input, node.output))
    if side:
        side[int(rng.integers(len(side)))] = pick(rng, names)


def shape(rng, model, graph):
    value = pick(rng, [*graph.input, *graph.output])
    dims = value.type.tensor_type.shape.dim
    if dims:
        dim = pick(rng, dims)
        if rng.random() < 0.5:
            dim.dim_value = pick(rng, NUMBERS)
        else:
            dim.dim_param = "other"


def name(rng, model, graph):
    pick(rng, [*graph.input, *graph.output, *graph.initializer]).name = pick(rng, ("x", "", "w", "image", "ws"))


def place(rng, model, graph):
    external = [t for t in graph.initializer if t.external_data]
    if not external:
        return
    entry = pick(rng, pick(rng, external).external_data)
    entry.value = pick(rng, PLACES) if entry.key == "location" else str(pick(rng, NUMBERS))


def initialiser(rng, model, graph):
    tensor = pick(rng, graph.initializer)
    if rng.random() < 0.5 and tensor.dims:
        tensor.dims[int(rng.integers(len(tensor.dims)))] = pick(rng, NUMBERS)
    elif tensor.data_type == TensorProto.INT64 and not tensor.external_data:
        values = numpy_helper.to_array(tensor)
        tensor.CopyFrom(numpy_helper.from_array(np.full_like(values, pick(rng, NUMBERS)), tensor.name))
    else:
        tensor.data_type = int(rng.integers(0, 25))


def wide(rng, model, graph):
    """Doubling, thirty times over."""
    last = graph.node[-1]
    old, x = last.output[0], "grown"
    last.output[0] = x
    for i in range(30):
        graph.node.append(helper.make_node("Concat", [x, x], [f"grown.{i}"], axis=int(rng.integers(2))))
        x = f"grown.{i}"
    graph.node.append(helper.make_node("Mul", [x, x], [old]))


def loop(rng, model, graph):
    """A loop without end before the first node."""
    one = helper.make_tensor("one", TensorProto.BOOL, [], [True])
    body = helper.make_graph(
        [helper.make_node("Identity", ["going"], ["on"])], "body",
        [helper.make_tensor_value_info("i", TensorProto.INT64, []), helper.make_tensor_value_info("going", 9, [])],
        [helper.make_tensor_value_info("on", 9, [])])
    graph.initializer.append(one)
    node = helper.make_node("Loop", ["", "one"], [], name="forever", body=body)
    graph.node.insert(0, node)


def function(rng, model, graph):
    model.functions.append(helper.make_function("x", "F", ["a"], ["b"], [helper.make_node("Identity", ["a"], ["b"])],
                                                [helper.make_opsetid("", 18)]))


def version(rng, model, graph):
    model.opset_import[0].version = pick(rng, NUMBERS)
    if rng.random() < 0.5:
        model.opset_import.append(helper.make_opsetid("com.microsoft", 1))


GRAPH_CHANGES: dict[str, Callable] = {
    change.__name__: change
    for change in (operator, attribute, wiring, shape, name, place, initialiser, wide, loop, function, version)
}
CHANGES = (change_manifest, change_manifest, change_tensors, change_tensors, change_bytes, change_graph, change_graph)


def make_case(bases: Sequence[Files], seed: int) -> tuple[Files, str]:
    """The files of a case, and what was done to them. ``bases``: of format 2.0 and of 1.0."""
    rng = np.random.default_rng([20_281_128, seed])
    files = dict(bases[rng.random() < 0.2])
    said = [pick(rng, CHANGES)(rng, files)]
    if rng.random() < 0.2:
        with contextlib.suppress(Exception):  # the first change left nothing that the second could read
            said.append(pick(rng, CHANGES)(rng, files))
    return files, " and ".join(said)


# --- running them -----------------------------------------------------------------------------------------------------


def try_bundle(path: Path, runtime: str) -> str:
    """Open it and, if that works, solve and decode: 'refused', 'failed' or 'answered'. Other errors come through."""
    from engine import Request, Sampler

    try:
        bundle = Bundle(path)
    except LaceError as error:
        check_sentence(error)
        return "refused"
    try:
        with Sampler(bundle, runtime=runtime, threads=1, capacity=4) as sampler:
            label = bundle.generator.labels - 1 if bundle.generator.labels else None
            on_w = [a for a in bundle.attributes.values() if len(a.classes) in (0, 2)]
            wishes = [f"{a.name}=0.5" if a.kind == "value" else a.name for a in on_w] or [None]
            requests = [Request(wish, seed=i, label=label) for i, wish in enumerate(wishes)]
            samples = sampler.solve(requests)
            if bundle.generator.resolution <= 64 and "synthesis" in bundle.manifest.graphs:
                sampler.render(samples[:1])
    except LaceError as error:
        check_sentence(error)
        return "failed"
    return "answered"


def check_sentence(error: LaceError) -> None:
    text = str(error)
    assert "\n" not in text, f"more than one line: {text[:300]!r}"
    assert len(text) < 1200, f"{len(text)} characters: {text[:300]!r}"
    assert text.isprintable(), f"control characters: {text[:300]!r}"


def run_cases(base: Path, first: int, count: int, runtime: str) -> None:
    files = read_files(base)
    bases = files, as_format_1(files)
    for seed in range(first, first + count):
        case, said = make_case(bases, seed)
        sys.stdout.write(f"case {seed}: {said:.300}\n")
        sys.stdout.flush()  # whoever reads it knows the case that killed this process
        with tempfile.TemporaryDirectory() as folder:
            write_files(Path(folder) / "b", case)
            start = time.process_time()
            try:
                ended = try_bundle(Path(folder) / "b", runtime)
            except Exception:
                ended = f"traceback {traceback.format_exc()[-900:]!r}"
        seconds = time.process_time() - start
        sys.stdout.write(f"end {seed}: {ended if seconds < LIMIT else f'slow {seconds:.1f} s'}\n")


def run_child(base: Path, first: int, count: int, runtime: str, timeout: float = 600) -> Counter:
    """How the cases ended, counted; raises AssertionError with the case that died, hung or raised something else."""
    command = [sys.executable, "-m", "tests.fuzzed_bundles", str(base), str(first), str(count), runtime]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=timeout)
    return read_ends(done.stdout, done.returncode, done.stderr, count)


def read_ends(said: str, code: int, complaint: str, count: int) -> Counter:
    """What a child said, see ``run_child``."""
    lines = said.splitlines()
    assert code == 0, f"died with {code} after: {'; '.join(lines[-2:])}\n{complaint[-2000:]}"
    ends = [(before, line) for before, line in pairwise(lines) if line.startswith("end ")]
    known = Counter(line.partition(": ")[2] for _, line in ends)
    bad = [f"{before} -> {line}" for before, line in ends if line.partition(": ")[2] not in ENDS]
    assert not bad, f"{len(bad)} of {len(ends)} cases: {bad[0]}"
    assert len(ends) == count, f"{len(ends)} of {count} cases ended"
    return known


if __name__ == "__main__":
    run_cases(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
