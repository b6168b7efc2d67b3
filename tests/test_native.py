"""The field in C++ against its numpy twin: every variant that this processor runs, in float32 and in bfloat16."""

import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from engine import BackendError, Request, Sampler
from engine.native import build, library
from engine.native.library import CpuField, CpuNetwork, packed, to_half
from engine.reference import field as twin
from engine.runtimes import MissingRuntime, open_runtime, warn_slow
from engine.sampler import find_bundle
from tests.worlds import head_tensors, mapping_tensors, random_world

KNOWN = library.instructions() or set()
RUNNABLE = [name for name in build.variants() if KNOWN.issuperset(build.VARIANTS[name][0])]
# Widths that fill no register, no panel and no pair; heads without, with one and with several hidden layers.
Z_DIM, W_DIM, LABELS = 37, 51, 3
HEADS = {"deep": (W_DIM, 45, 33, 17, 2), "flat": (W_DIM, 5), "short": (W_DIM, 130, 3), "on_z": (Z_DIM, 29, 1)}

pytestmark = pytest.mark.skipif(
    build.compiler() is None and "CI" not in os.environ, reason="runtime 'native' needs a C++ compiler"
)


@pytest.fixture(params=RUNNABLE)
def variant(request, monkeypatch):
    """Chosen by $LACE_CPU, as a user may."""
    monkeypatch.setenv("LACE_CPU", request.param)
    return request.param


@pytest.fixture(scope="module")
def tensors():
    rng = np.random.default_rng(0)
    found = mapping_tensors(rng, Z_DIM, W_DIM, 3, LABELS)
    for name, widths in HEADS.items():
        found |= head_tensors(rng, name, widths, 2.0, 0.3)
    return {name: tensor.astype(np.float32) for name, tensor in found.items()}


def open_network(tensors, threads=2, half=False) -> CpuNetwork:
    return CpuNetwork(tensors, {name: name == "on_z" for name in HEADS}, Z_DIM, W_DIM, threads=threads, half=half)


class Question:
    """A call for ``rows`` rows: heads for all or some of them, and near for two; and the twin's answer."""

    def __init__(self, tensors, rows, seed=1):
        rng = np.random.default_rng(seed)
        self.tensors = {name: tensor.astype(float) for name, tensor in tensors.items()}
        self.z = rng.standard_normal((rows, Z_DIM)).astype(np.float32)
        self.psi = rng.uniform(0.5, 1, (rows, 1)).astype(np.float32)
        self.label = rng.integers(LABELS, size=rows)
        every, even = None, np.arange(0, rows, 2)
        self.heads = {"deep": (every, np.float32([[-1, 1]])), "flat": (even, np.eye(5, dtype=np.float32)[[3, 0]]),
                      "short": (every, np.eye(3, dtype=np.float32))}
        self.near_row = np.arange(min(2, rows))
        self.near_anchor = rng.standard_normal((len(self.near_row), W_DIM)).astype(np.float32)
        # Where each slope of a head comes from, and then of near; backwards, because any order may be asked for.
        owner = [
            np.repeat(np.arange(rows) if some is None else some, len(seeds)) for some, seeds in self.heads.values()
        ]
        self.owner = np.concatenate([*owner, self.near_row])
        self.source = np.arange(len(self.owner))[::-1].copy()
        self.pair_row = self.owner[self.source]

    @property
    def pairs(self):
        return self.pair_row, self.source, self.near_row, self.near_anchor

    def exact(self):
        z, psi = self.z.astype(float), self.psi.astype(float)
        w, hidden = twin.mapping(self.tensors, z, psi, self.label)
        logits, slopes = {}, []
        for name, (some, seeds) in self.heads.items():
            x, stack = w if some is None else w[some], twin.layers(self.tensors, f"head.{name}")
            logits[name], inside = twin.head(stack, x)
            slopes.append(twin.head_rows(stack, inside, seeds, rows=len(x)).reshape(-1, W_DIM))
        on_w = np.concatenate([*slopes, w[self.near_row] - self.near_anchor])[self.source]
        hidden = [activation[self.pair_row] for activation in hidden]
        back = twin.pullback(self.tensors, z[self.pair_row], psi[self.pair_row], hidden, on_w[:, None])
        return w, logits, back[:, 0]

    def ask(self, network):
        w, found, jacobian = CpuField(network).forward(self.z, self.psi, self.label, self.heads, pairs=self.pairs)
        return w, {name: logits for name, (logits, _) in found.items()}, jacobian


def errors(found, exact):
    """The greatest of w and logits; the median of the rows of Jacobian: rounding may move a unit across its kink."""
    forward = [np.abs(found[0] - exact[0]).max(), *(np.abs(found[1][name] - u).max() for name, u in exact[1].items())]
    lengths = np.linalg.norm(exact[2], axis=1)
    return max(forward), np.median(np.linalg.norm(found[2] - exact[2], axis=1) / lengths)


@pytest.mark.parametrize("rows", [1, 2, 7, 130])
def test_it_answers_as_its_twin(variant, tensors, rows):
    question = Question(tensors, rows)
    network = open_network(tensors)
    assert network.variant == variant
    forward, backward = errors(question.ask(network), question.exact())
    assert forward < 2e-5
    assert backward < 2e-6


def test_in_bfloat16_only_the_way_back_is_coarse(tensors):
    network = open_network(tensors)
    if not network.library.lace_has_half():
        with pytest.raises(ValueError, match="no bfloat16"):
            open_network(tensors, half=True)
        pytest.skip("this processor has no bfloat16 instructions")
    question = Question(tensors, 40)
    forward, backward = errors(question.ask(open_network(tensors, half=True)), question.exact())
    assert forward < 2e-5
    assert 5e-4 < backward < 1e-2


@pytest.mark.parametrize("half", [False, True])
def test_a_row_has_the_same_bits_in_any_batch_with_any_threads(variant, tensors, half):
    network = open_network(tensors, threads=3)
    if half and not network.library.lace_has_half():
        pytest.skip("this processor has no bfloat16 instructions")
    networks = [open_network(tensors, threads, half) for threads in (1, 2, 3)]
    whole = Question(tensors, 40)
    expected = whole.ask(networks[0])
    for network in networks[1:]:
        w, logits, jacobian = whole.ask(network)
        assert np.array_equal(w, expected[0])
        assert all(np.array_equal(logits[name], u) for name, u in expected[1].items())
        assert np.array_equal(jacobian, expected[2])
    part = Question(tensors, 40)
    for rows in (1, 2, 5, 6, 11):
        part.z, part.psi, part.label = whole.z[:rows], whole.psi[:rows], whole.label[:rows]
        part.heads = {"deep": whole.heads["deep"]}
        # The slopes of "deep" are one a row, in the order of rows.
        part.pair_row = part.source = np.arange(rows)
        part.near_row, part.near_anchor = part.near_row[:0], part.near_anchor[:0]
        w, logits, jacobian = part.ask(networks[1])
        assert np.array_equal(w, expected[0][:rows])
        assert np.array_equal(logits["deep"], expected[1]["deep"][:rows])
        whole_place = [int(np.flatnonzero(whole.source == row)[0]) for row in range(rows)]
        assert np.array_equal(jacobian, expected[2][whole_place])


def test_the_way_back_alone_and_heads_on_z(variant, tensors):
    question, field = Question(tensors, 9), CpuField(open_network(tensors))
    heads = {"on_z": (None, np.ones((1, 1), np.float32)), "deep": (None, np.eye(2, dtype=np.float32))}
    w, found, none = field.forward(question.z, question.psi, question.label, heads, slopes=True)
    assert none.shape == (0, Z_DIM)
    exact = {name: tensor.astype(float) for name, tensor in tensors.items()}
    full_w, hidden = twin.mapping(exact, question.z.astype(float), question.psi.astype(float), question.label)
    for name, x in (("on_z", question.z.astype(float)), ("deep", full_w)):
        stack = twin.layers(exact, f"head.{name}")
        logits, inside = twin.head(stack, x)
        assert found[name][0] == pytest.approx(logits, abs=2e-5)
        assert np.median(np.abs(found[name][1] - twin.head_rows(stack, inside, heads[name][1]))) < 1e-6
    cotangent = np.random.default_rng(3).standard_normal((4, W_DIM)).astype(np.float32)
    rows = np.array([8, 0, 8, 3])
    expected = twin.pullback(exact, question.z[rows].astype(float), question.psi[rows].astype(float),
                             [h[rows] for h in hidden], cotangent[:, None].astype(float))[:, 0]
    np.testing.assert_allclose(field.back(cotangent, rows), expected, atol=1e-5)
    same = field.forward(w, None, None, {"deep": heads["deep"]}, is_w=True, slopes=True)
    assert np.array_equal(same[1]["deep"][0], found["deep"][0])
    assert np.array_equal(same[1]["deep"][1], found["deep"][1])


def test_threads_share_the_weights_and_the_pool(tensors):
    network = open_network(tensors, threads=2)
    questions = [Question(tensors, 5 + seed, seed) for seed in range(4)]
    expected = [question.ask(network) for question in questions]

    def again(i):
        for _ in range(50):
            w, _, jacobian = questions[i].ask(network)
            assert np.array_equal(w, expected[i][0])
            assert np.array_equal(jacobian, expected[i][2])

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(again, range(4)))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_forked_process_goes_on_alone():
    """Threads do not survive a fork: the child must neither wait for them nor at its end."""
    code = """
import os
from engine import Sampler
sampler = Sampler("demo", runtime="native", threads=2)
before = sampler.solve("smile", 3)[0]
child = os.fork()
same = (sampler.solve("smile", 3)[0].w == before.w).all()
del sampler
if not child:
    os._exit(0 if same else 1)
assert os.waitpid(child, 0)[1] == 0 and same
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, timeout=60)


def test_weights_in_panels():
    weight = np.arange(6, dtype=np.float32).reshape(3, 2) + 1
    assert packed(weight, 4)[..., 0].tolist() == [[[1, 2, 0, 0], [3, 4, 0, 0], [5, 6, 0, 0]]]
    halves = packed(weight, 4, half=True)
    assert halves.shape == (1, 2, 4, 2)
    assert halves[0, 0, :2].tolist() == [[bits(1), bits(3)], [bits(2), bits(4)]]
    assert halves[0, 1, :2].tolist() == [[bits(5), 0], [bits(6), 0]]  # the second of an odd pair is zero
    assert packed(weight, 4).ctypes.data % 64 == 0


def bits(number: float) -> int:
    return int(to_half(np.float32([number]))[0])


def test_halves_are_rounded_to_the_nearest_even():
    numbers = np.float32([1.0, -2.0, 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20])
    assert (to_half(numbers).astype(np.uint32) << 16).view(np.float32).tolist() == [1, -2, 1, 1 + 2**-6, 1 + 2**-7]


# --- building and choosing ----------------------------------------------------------------------------------------


def test_every_variant_is_built_and_the_fastest_is_taken():
    assert [name for name in build.variants() if not build.library_path(name).exists()] == []
    assert library.chosen() == os.environ.get("LACE_CPU", RUNNABLE[0])


def test_without_a_library_the_reason_is_told_and_auto_goes_on(tmp_path, monkeypatch):
    bundle = random_world(tmp_path / "b", graphs=True)
    monkeypatch.setattr(library, "library_path", lambda name: tmp_path / name)
    message = r"'native' is not there: .* was not built.*python -m engine\.native\.build"
    with pytest.raises(MissingRuntime, match=message):
        open_runtime(bundle, "native")
    assert open_runtime(bundle, "auto").name == "onnxruntime"


@pytest.mark.parametrize("content", [b"", b"\x7fELF of another processor"])
def test_C3_a_library_that_cannot_be_loaded_is_a_sentence_and_auto_goes_on(tmp_path, monkeypatch, caplog, content):
    bundle = random_world(tmp_path / "b", graphs=True)
    for name in build.variants():
        build.library_path(name, tmp_path).write_bytes(content)
    monkeypatch.setenv("LACE_NATIVE", str(tmp_path))
    monkeypatch.setattr(library, "library", library.library.__wrapped__)
    message = r"'native' is not there: lace-\w+-\w+\.so cannot be loaded here \(.*\): build it anew .* --again"
    with pytest.raises(MissingRuntime, match=message):
        open_runtime(bundle, "native")
    warn_slow.cache_clear()
    for _ in range(3):
        assert open_runtime(bundle, "auto").name == "onnxruntime"
        assert Sampler(bundle, runtime="openvino").runtime.solving.name == "onnxruntime"
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("solving about 8 times slower than with the compiled field: runtime 'native' is not there")
    assert "\n" not in line


def test_C3_the_fallback_is_told_on_stderr_once_a_process(tmp_path):
    code = "from engine import Sampler\nfor _ in range(3): print(Sampler('demo').runtime.name)"
    found = subprocess.run([sys.executable, "-c", code], env=os.environ | {"LACE_NATIVE": str(tmp_path)},
                           capture_output=True, text=True, check=True, timeout=120)
    assert found.stdout.split() == ["onnxruntime"] * 3
    (line,) = found.stderr.splitlines()
    assert "8 times slower" in line
    assert "python -m engine.native.build" in line


def test_C3_building_where_it_cannot_be_done_ends_with_a_sentence(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("not a folder")
    place = tmp_path / "file" / "below"
    assert re.fullmatch(r".*below cannot be written \(Not a directory\): run this as the owner .* LACE_NATIVE .*",
                        build.main(["--folder", str(place)]) or "")
    assert "give --folder" in (build.main(["--sanitize", "thread"]) or "")
    monkeypatch.setenv("CXX", shutil.which("false") or "false")
    assert (build.main(["--folder", str(tmp_path)]) or "").endswith("compiled no variant: its messages are above")
    monkeypatch.setattr(build, "compiler", lambda: None)
    assert build.main(["--folder", str(tmp_path)]) == "no C++ compiler was found: install g++ or clang++, or set CXX"


def test_a_variant_that_cannot_run_is_refused(monkeypatch):
    monkeypatch.setenv("LACE_CPU", "avx1024")
    with pytest.raises(BackendError, match=r"LACE_CPU='avx1024' does not run here; these were built and do: .*plain"):
        open_runtime(find_bundle("demo"))


def test_bfloat16_is_refused_without_its_instructions(tmp_path, monkeypatch):
    bundle = random_world(tmp_path / "b", graphs=True)
    monkeypatch.setenv("LACE_CPU", "plain")
    with pytest.raises(BackendError, match=r"bf16-jacobian.*no bfloat16 instructions in 'plain': leave precision out"):
        Sampler(bundle, runtime="native", precision="bf16-jacobian")
    sampler = Sampler(bundle, runtime="native")
    assert sampler.runtime.solving.jacobian == "fp32"
    assert "(plain)" in repr(sampler)
    assert np.isfinite(sampler.solve(Request("smile", seed=1))[0].energy)


def test_what_was_built_from_other_sources_goes(tmp_path):
    old = tmp_path / "lace-plain-0123456789abcdef.so"
    old.write_bytes(b"")
    (built,) = build.build(tmp_path, ["plain"])
    assert list(tmp_path.iterdir()) == [built]
    stamp = built.stat().st_mtime_ns
    assert build.build(tmp_path, ["plain"]) == [built]
    assert built.stat().st_mtime_ns == stamp


def test_a_compiler_that_fails_leaves_nothing(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("CXX", shutil.which("false") or "false")
    assert build.build(tmp_path, ["plain"]) == []
    assert "does not compile variant 'plain': left out" in capfd.readouterr().err
    assert list(tmp_path.iterdir()) == []
