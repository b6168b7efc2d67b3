"""Plans: real builds with TensorRT-RTX, which needs no GPU for them, and the cache that keeps them."""

import json
import logging
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
import torch
from onnx import TensorProto, helper

from engine import BackendError
from engine.bundle import Bundle
from engine.runtimes import MissingRuntime, compiling, plans
from engine.runtimes.compiling import Plan, build, target
from engine.runtimes.plans import find, obtain, plan_of, resolve
from engine.sampler import find_bundle
from exporter import cli
from exporter.generators.stylegan2 import Synthesis, channel_widths
from exporter.synthesis_graph import export_synthesis

RTX = "sm80+sm86+sm89+sm120"


@pytest.fixture(scope="module")
def demo() -> Bundle:
    return find_bundle("demo")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache of plans."""
    monkeypatch.delenv("LACE_PLANS", raising=False)
    monkeypatch.setenv("LACE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "plans"


def plan(**changes) -> Plan:
    return replace(Plan("tensorrt_rtx", "1.7", RTX, "fp32", (1, 4, 8), "0" * 64), **changes)


def random_synthesis(width: int, channels: dict[int, int]) -> Synthesis:
    torch.manual_seed(0)
    synthesis = Synthesis(width, channels).eval().requires_grad_(False)
    for layer in synthesis.layers:
        layer.noise_strength.fill_(0.1)
    return synthesis


def refuse(*_, **__):
    raise AssertionError("a plan was built again")


# --- real builds -----------------------------------------------------------------------------------------------------


@pytest.fixture
def rtx():
    return pytest.importorskip("tensorrt_rtx")


def test_plans_are_built_ahead_for_a_bundle_that_is_there(rtx, demo, cache, capsys, monkeypatch):
    before = sorted(demo.path.iterdir())
    assert cli.main(["--bundle", "demo", "--tensorrt", "sm89", "sm86", "--json"]) == 0
    (path,) = json.loads(capsys.readouterr().out)["plans"]  # one plan serves both
    assert path.startswith(f"{cache}/synthesis.tensorrt_rtx-{rtx.__version__}.{RTX}.fp32.rows1-4-8.")
    assert Path(path).stat().st_size > 4e6
    assert sorted(demo.path.iterdir()) == before
    monkeypatch.setattr(plans, "build", refuse)
    assert cli.main(["--bundle", "demo", "--tensorrt", "sm120", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["plans"] == [path]


def test_a_plan_is_for_any_number_of_rows_and_for_types_of_the_graph(rtx, demo, monkeypatch):
    """What is handed to the builder: read back from the real network and configuration."""
    seen = {}
    real = rtx.Builder.build_serialized_network

    def spy(self, network, config):
        tensors = [network.get_input(0), network.get_output(0)]
        seen.update({tensor.name: (tuple(tensor.shape), tensor.dtype) for tensor in tensors})
        seen["tf32"] = config.get_flag(rtx.BuilderFlag.TF32)
        seen["targets"] = [config.get_compute_capability(i).name for i in range(config.num_compute_capabilities)]
        return real(self, network, config)

    monkeypatch.setattr(rtx.Builder, "build_serialized_network", spy)
    build(plan(), demo.graph("synthesis"))
    assert seen["ws"] == ((-1, 10, 128), rtx.float32)
    assert seen["image"] == ((-1, 3, 64, 64), rtx.float32)
    assert seen["targets"] == ["SM80", "SM86", "SM89", "SM120"]
    assert not seen["tf32"]
    build(plan(precision="tf32"), demo.graph("synthesis"))
    assert seen["tf32"]


@pytest.mark.parametrize(
    ("precision", "channels"),
    [("fp16", {4: 128, 8: 128, 16: 96, 32: 64, 64: 32}), ("bf16", {4: 16, 8: 16})],
    ids=["fp16-as-large-as-the-demo", "bf16-tiny"],
)
def test_half_precision_builds(rtx, tmp_path, precision, channels):
    path = tmp_path / "synthesis.onnx"
    export_synthesis(random_synthesis(128, channels), path, precision=precision)
    assert len(build(plan(precision=precision), path)) > path.stat().st_size / 2


@pytest.mark.parametrize(
    ("size", "precision"), [(256, "fp32"), (256, "fp16"), pytest.param(1024, "fp16", marks=pytest.mark.slow)]
)
def test_a_config_f_builds(rtx, tmp_path, size, precision):
    path = tmp_path / "synthesis.onnx"
    export_synthesis(random_synthesis(512, channel_widths(size)), path, precision=precision)
    content = build(plan(precision=precision), path)
    assert 0.9 < len(content) / path.stat().st_size < 1.2  # all weights, in the types of the graph


def graph_of(path: Path, rows: int | str, operator: str = "Relu") -> Path:
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [rows, 4, 8]) for name in ("ws", "image")]
    node = helper.make_node(operator, ["ws"], ["image"], name="the node")
    graph = helper.make_graph([node], "synthesis", values[:1], values[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.save(model, path)
    return path


@pytest.mark.parametrize(
    ("rows", "operator", "message"),
    [
        ("rows", "Bernoulli", r"cannot build .*synthesis\.onnx for sm80.*: node 'the node' \(Bernoulli\): UNSUPPORTED"),
        (3, "Relu", "the number of rows of 'ws' is fixed to 3: export it again"),
    ],
)
def test_a_graph_that_cannot_be_built_is_named_with_its_node(rtx, tmp_path, rows, operator, message):
    with pytest.raises(BackendError, match=message):
        build(plan(), graph_of(tmp_path / "synthesis.onnx", rows, operator))


def test_a_file_that_is_no_graph_is_named(rtx, tmp_path):
    (tmp_path / "synthesis.onnx").write_bytes(b"not a graph")
    with pytest.raises(BackendError, match=r"TensorRT-RTX .* cannot build .*synthesis\.onnx.*: the file: "):
        build(plan(), tmp_path / "synthesis.onnx")


def test_what_a_target_cannot_compile_is_told(rtx, demo):
    with pytest.raises(BackendError, match="FP32 GEMM is not supported"):
        build(plan(target="sm75"), demo.graph("synthesis"))


# --- the cache -------------------------------------------------------------------------------------------------------


@pytest.fixture
def bundle(demo, monkeypatch) -> Bundle:
    """The demo bundle, and builds that take no time."""
    count = iter(range(100))
    monkeypatch.setattr(plans, "build", lambda plan, path: f"build {next(count)} of {path.name}".encode())
    return demo


def test_a_plan_is_built_once_and_found_by_all_that_it_depends_on(bundle, cache):
    first = plan()
    assert obtain(bundle, first) == obtain(bundle, first) == b"build 0 of synthesis.onnx"
    others = [plan(version="1.8"), plan(target="sm121"), plan(precision="tf32"), plan(rows=(8, 8, 8)),
              plan(graph="1" * 64), plan(library="tensorrt")]
    assert [find(other) for other in others] == [None] * len(others)
    assert len({obtain(bundle, other) for other in [first, *others]}) == 1 + len(others)
    assert not list(cache.glob(".*"))  # nothing half-written stays


def test_a_damaged_plan_is_built_again_with_a_notice(bundle, cache, caplog):
    obtain(bundle, plan())
    (path,) = cache.iterdir()
    path.write_bytes(path.read_bytes()[:-1])
    with caplog.at_level(logging.WARNING):
        assert obtain(bundle, plan()) == b"build 1 of synthesis.onnx"
    assert f"{path} is damaged: the plan is built again" in caplog.text
    assert find(plan()) == b"build 1 of synthesis.onnx"
    assert not path.exists()


def test_a_cache_that_cannot_be_written_still_gives_a_plan(bundle, caplog, monkeypatch):
    monkeypatch.setattr(plans, "write_atomically", lambda *_: Path("/proc/nothing").write_bytes(b""))
    with caplog.at_level(logging.WARNING):
        assert obtain(bundle, plan()) == b"build 0 of synthesis.onnx"
    assert "the plan cannot be kept" in caplog.text


def test_the_cache_may_be_deleted(bundle, cache):
    obtain(bundle, plan())
    shutil.rmtree(cache)
    assert obtain(bundle, plan()) == b"build 1 of synthesis.onnx"


def test_B16_a_plan_that_a_bundle_brings_is_not_opened(bundle, tmp_path, monkeypatch):
    """A stranger can give a plan its right name and hash. It is opened where the user says that he trusts it."""
    copied = Bundle(shutil.copytree(bundle.path, tmp_path / "stranger.lace"))
    hostile = b"code for a GPU"
    (copied.path / "plans").mkdir()
    (copied.path / "plans" / plan().file(hostile)).write_bytes(hostile)
    assert obtain(copied, plan()) == b"build 0 of synthesis.onnx"
    monkeypatch.setenv("LACE_PLANS", str(copied.path / "plans"))
    assert obtain(copied, plan()) == hostile


def test_a_plan_names_the_graph_and_the_version(rtx, demo):
    found = plan_of(demo, "tensorrt_rtx", RTX)
    assert found.graph == demo.files["synthesis.onnx"]["sha256"]
    assert (found.version, found.precision) == (rtx.__version__, "fp32")


# --- targets ---------------------------------------------------------------------------------------------------------


def test_targets_that_share_a_plan_are_resolved_to_one(rtx):
    assert resolve(["sm80", "sm120"]) == [("tensorrt_rtx", RTX)]
    assert resolve(["sm121", "sm86"]) == [("tensorrt_rtx", "sm121"), ("tensorrt_rtx", RTX)]
    assert target("tensorrt", "sm90", "NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3-sm90"


def test_without_a_target_the_installed_libraries_decide(monkeypatch):
    there = {"tensorrt_rtx"}

    def load(library):
        if library not in there:
            raise MissingRuntime(library)

    monkeypatch.setattr(plans, "load", load)
    monkeypatch.setattr(plans, "target_on", lambda library, device: "this-gpu")
    monkeypatch.setattr("engine.cuda.driver.Device", lambda: None)
    assert resolve() == [("tensorrt_rtx", RTX)]
    there.add("tensorrt")
    assert resolve() == [("tensorrt_rtx", RTX), ("tensorrt", "this-gpu")]
    there.clear()
    with pytest.raises(MissingRuntime, match=r"neither .* is installed: pip install 'lace-engine\[tensorrt\]'"):
        resolve()


def test_targets_are_refused_before_the_export_begins(rtx, demo, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cli, "exported", refuse)
    wanted = ["--gan", "g.pkl", "--out", str(tmp_path / "g.lace"), "--tensorrt"]
    assert cli.main([*wanted, "sm90"]) == 2
    assert "TensorRT-RTX does not run on sm90; it runs on: sm80" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    compiling.load.cache_clear()
    assert cli.main([*wanted, "sm89"]) == 3
    assert "pip install 'lace-engine[tensorrt-rtx]'" in capsys.readouterr().err
    monkeypatch.undo()
    assert cli.main(["--bundle", "demo", "--tensorrt", "sm89", "--precision", "fp16"]) == 2
    assert "--precision: " in capsys.readouterr().err
