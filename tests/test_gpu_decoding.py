"""Decoding on a GPU by TensorRT and by ONNX Runtime's CUDA provider, with stand-ins for driver and library.

Pictures are computed on the host, so they must be those of ONNX Runtime's CPU provider, bit for bit.
"""

import logging
import shutil
import sys

import numpy as np
import onnxruntime as ort
import pytest

from engine import BackendError, Sampler
from engine.bundle import Bundle
from engine.runtimes import MissingRuntime, UnfitDevice, compiling, open_runtime, to_pixels
from engine.runtimes import onnxruntime as runtime
from engine.runtimes.decoding import Pictures, picture_precision, pictures_in, sizes
from engine.runtimes.tensorrt import TensorRtDecoder
from exporter import export
from tests import fake_tensorrt, tiny

pytest.importorskip("cuda.bindings")

from engine.cuda import driver
from tests.fake_cuda import FakeCuda
from tests.fake_memory import viewed
from tests.fake_onnxruntime import CUDA, FakeSession
from tests.fake_tensorrt import Ada, install


def pictures_by(bundle, gpu, make, kernel=None) -> Pictures:
    return Pictures(bundle, gpu, make, kernel, name="fake", version="0", precision="fp32")


@pytest.fixture
def cuda() -> FakeCuda:
    return Ada()


@pytest.fixture
def gpu(cuda):
    return driver.Device(api=cuda)


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Bundle:
    return export(tiny.parts(), tiny.heads(), out=tmp_path_factory.mktemp("world") / "tiny.lace", noise="input")


@pytest.fixture
def bundle(exported, tmp_path, monkeypatch) -> Bundle:
    """A copy whose folder of plans is trusted, and empty."""
    monkeypatch.setenv("LACE_PLANS", str(tmp_path / "tiny.lace" / "plans"))
    shutil.copytree(exported.path, tmp_path / "tiny.lace")
    return Bundle(tmp_path / "tiny.lace")


@pytest.fixture(params=["tensorrt", "tensorrt_rtx"])
def library(request, monkeypatch, cuda):
    """The name of a library whose package is a stand-in; ``install`` makes another one."""
    install(monkeypatch, cuda, request.param)
    return request.param


@pytest.fixture(autouse=True)
def no_stand_in_stays():
    yield
    compiling.load.cache_clear()


def latents(bundle: Bundle, rows: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    rng = np.random.default_rng(rows)
    ws = rng.standard_normal((rows, bundle.generator.num_ws, bundle.generator.w_dim)).astype(np.float32)
    return ws, {f"noise.{i}": rng.standard_normal((rows, 1, 8, 8)).astype(np.float32) for i in (1, 2)}


def test_sizes_are_few_and_reach_from_the_fewest_to_the_most_rows():
    assert sizes(1, 8) == (8, 4, 2, 1)
    assert sizes(8, 8) == (8,)
    assert sizes(2, 6) == (6, 4, 2)


# --- TensorRT --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 2, 7, 21])
def test_tensorrt_decodes_any_number_of_rows(bundle, cuda, gpu, library, rows):
    pictures = pictures_by(bundle, gpu, lambda device: TensorRtDecoder(bundle, library, device))
    reference = open_runtime(bundle, "onnxruntime", threads=1)
    ws, noises = latents(bundle, rows)
    for _ in range(2):
        np.testing.assert_array_equal(pictures.synthesize(ws, noises), reference.drawing.synthesize(ws, noises))
    np.testing.assert_array_equal(pictures.synthesize(ws), reference.drawing.synthesize(ws))
    # One graph for each size that occurs, however often it is decoded.
    used = {n for n in (8, 4, 2, 1) if (rows % (2 * n) if n < 8 else rows) >= n}
    assert sorted(pictures.decoder.calls) == sorted(used)
    assert len(cuda.objects["executable"]) == len(used)


def test_a_plan_of_one_fixed_shape_decodes_spare_rows(bundle, gpu, library):
    pictures = pictures_by(bundle, gpu, lambda device: TensorRtDecoder(bundle, library, device, rows=(4, 4, 4)))
    reference = open_runtime(bundle, "onnxruntime", threads=1)
    ws, noises = latents(bundle, 6)
    np.testing.assert_array_equal(pictures.synthesize(ws, noises), reference.drawing.synthesize(ws, noises))
    assert list(pictures.decoder.calls) == [4]


def test_a_context_that_cannot_be_captured_runs_without_a_graph(bundle, cuda, gpu, monkeypatch):
    install(monkeypatch, cuda, "tensorrt_rtx", capturable=False)
    pictures = pictures_by(bundle, gpu, lambda device: TensorRtDecoder(bundle, "tensorrt_rtx", device))
    ws, noises = latents(bundle, 3)
    expected = open_runtime(bundle, "onnxruntime", threads=1).drawing.synthesize(ws, noises)
    np.testing.assert_array_equal(pictures.synthesize(ws, noises), expected)
    assert cuda.objects["executable"] == {}


def test_plans_are_built_for_the_gpu_once_and_kernels_are_kept(bundle, gpu, library):
    fake = sys.modules[library]
    for _ in range(2):
        decoder = TensorRtDecoder(bundle, library, gpu)
        decoder.enqueue(2)
    (config,) = fake.builds
    assert "TF32" not in config.flags
    assert config.profile.shapes["ws"] == ((1, 4, 16), (4, 4, 16), (8, 4, 16))
    assert config.max_aux_streams == 0
    names = sorted(path.name for path in (bundle.path / "plans").iterdir())
    if library == "tensorrt":
        assert config.capabilities == []
        assert len(names) == 1
        assert names[0].startswith("synthesis.tensorrt-0.1.nvidia-l40s-sm89.fp32.rows1-4-8.")
    else:
        assert "REQUIRE_USER_ALLOCATION" in config.flags
        assert config.capabilities == ["SM80", "SM86", "SM89", "SM120"]
        kernels = [path for path in (bundle.path / "plans").glob("*.sm89.kernels")]
        assert len(names) == 2
        assert kernels[0].read_bytes() == b"kernels;kernels;"  # the second process continued the first one's


def test_a_plan_that_the_library_refuses_is_built_again(bundle, gpu, library, caplog):
    fake = sys.modules[library]
    decoder = TensorRtDecoder(bundle, library, gpu)
    (path,) = (bundle.path / "plans").glob("*.plan")
    fake.refused.add(path.read_bytes())
    with caplog.at_level(logging.WARNING):
        decoder = TensorRtDecoder(bundle, library, gpu)
    assert "refuses its plan of tiny.lace: it is built again" in caplog.text
    assert len(fake.builds) == 2
    decoder.enqueue(1)
    fake.refused.update(path.read_bytes() for path in (bundle.path / "plans").glob("*.plan"))
    fake.Builder.build_serialized_network = lambda *_: b"nothing that it knows"
    with pytest.raises(BackendError, match=r"cannot open the plan .* on NVIDIA L40S \(sm89\): .*another driver"):
        TensorRtDecoder(bundle, library, gpu)


def test_tf32_is_a_choice_where_the_graph_is_float32(bundle, gpu, library):
    decoder = TensorRtDecoder(bundle, library, gpu, precision="tf32")
    assert (decoder.precision, "TF32" in sys.modules[library].builds[0].flags) == ("tf32", True)
    bundle.manifest.graphs["synthesis"]["precision"] = "fp16"
    assert pictures_in(bundle, "tf32") is None
    assert picture_precision(bundle, None) == "fp16"
    with pytest.raises(BackendError, match=r"the synthesis of .*tiny\.lace is typed fp16: leave precision out"):
        picture_precision(bundle, "tf32")


def test_the_decoder_frees_its_memory(bundle, cuda, gpu, library):
    decoder = TensorRtDecoder(bundle, library, gpu)
    before = sum(memory.is_live for memory in cuda.memory)
    assert before == 5  # ws, two noises, image, activations
    del decoder
    assert sum(memory.is_live for memory in cuda.memory) == 0


def test_a_gpu_that_tensorrt_rtx_does_not_know_is_refused(bundle, monkeypatch):
    hopper = FakeCuda()
    install(monkeypatch, hopper, "tensorrt_rtx")
    with pytest.raises(UnfitDevice, match=r"TensorRT-RTX does not run on sm90 \(Fake GPU\); it runs on: sm80, sm86"):
        TensorRtDecoder(bundle, "tensorrt_rtx", driver.Device(api=hopper))


def test_the_stand_in_has_no_function_that_the_package_lacks(cuda):
    real = pytest.importorskip("tensorrt_rtx")
    fake = fake_tensorrt.package(cuda, portable=True)
    pairs = {"ILogger": "ILogger", "OnnxParser": "OnnxParser", "Builder": "Builder", "Runtime": "Runtime",
             "Context": "IExecutionContext", "RuntimeConfig": "IRuntimeConfig", "RuntimeCache": "IRuntimeCache",
             "Profile": "IOptimizationProfile"}
    for stand_in, true in pairs.items():
        for name in vars(getattr(fake, stand_in)):
            if not name.startswith("_") and name != "content":
                assert hasattr(getattr(real, true), name), f"{true}.{name}"
    for enumeration, names in {
        "BuilderFlag": ["TF32", "REQUIRE_USER_ALLOCATION"],
        "ExecutionContextAllocationStrategy": ["USER_MANAGED"],
        "DynamicShapesKernelSpecializationStrategy": ["EAGER"],
        "ComputeCapability": ["SM80", "SM86", "SM89", "SM120", "SM121"],
    }.items():
        assert set(names) <= set(getattr(real, enumeration).__members__)


def test_pixels_are_rounded_on_the_device(bundle, monkeypatch):
    def pixels_f32(launch, images, pixels, rows, channels, area):
        assert launch.grid[0] * launch.block >= rows * area
        floats = viewed(images, 4 * rows * channels * area).view(np.float32).reshape(rows, channels, -1, 8)
        viewed(pixels, rows * channels * area)[:] = to_pixels(floats).ravel()

    cuda = Ada({"pixels_f32": pixels_f32})
    install(monkeypatch, cuda, "tensorrt")
    gpu = driver.Device(api=cuda)
    kernel = gpu.load(b"cubin")("pixels_f32")
    pictures = pictures_by(bundle, gpu, lambda device: TensorRtDecoder(bundle, "tensorrt", device), (kernel, 256))
    ws, noises = latents(bundle, 11)
    expected = to_pixels(open_runtime(bundle, "onnxruntime", threads=1).drawing.synthesize(ws, noises))
    np.testing.assert_array_equal(pictures.pixels(ws, noises), expected)


# --- ONNX Runtime's CUDA provider ------------------------------------------------------------------------------------


@pytest.fixture
def provider(monkeypatch, cuda):
    """An onnxruntime with the CUDA provider."""
    monkeypatch.setattr(ort, "get_available_providers", lambda: [CUDA, "CPUExecutionProvider"])
    monkeypatch.setattr(ort, "InferenceSession", FakeSession)
    monkeypatch.setattr(driver.Device.__init__, "__defaults__", (0, cuda))
    monkeypatch.setattr(FakeSession, "opened", [])
    monkeypatch.setattr(FakeSession, "cuda", cuda, raising=False)
    return FakeSession


@pytest.mark.parametrize("rows", [1, 13])
def test_onnxruntime_decodes_on_our_stream_from_fixed_addresses(bundle, cuda, gpu, provider, monkeypatch, rows):
    pictures = pictures_by(bundle, gpu, lambda device: runtime.CudaDecoder(bundle, device))
    ws, noises = latents(bundle, rows)
    found = [pictures.synthesize(ws, noises) for _ in range(2)]
    (session,) = provider.opened
    monkeypatch.undo()
    expected = open_runtime(bundle, "onnxruntime", threads=1).drawing.synthesize(ws, noises)
    for images in found:
        np.testing.assert_array_equal(images, expected)
    assert session.provider == CUDA
    assert session.options == {"device_id": "0", "use_tf32": "0", "cudnn_conv_algo_search": "HEURISTIC",
                               "user_compute_stream": str(gpu.stream), "enable_cuda_graph": "1"}
    assert session.config("session.disable_cpu_ep_fallback") == "1"


def test_everything_runs_on_the_provider_that_was_asked_for(bundle, provider):
    sampler = Sampler(bundle, runtime="onnxruntime", device="cuda", precision="tf32")
    (sample,) = sampler.sample("smile", seeds=[1])
    assert sample.image.shape == (8, 8, 3)
    assert {session.provider for session in provider.opened} == {CUDA}
    used = {session.path.rpartition("/")[2]: session.options["use_tf32"] for session in provider.opened}
    # Targets are sharp: logits in TF32 would be off by a hundredth of them.
    assert used == {"mapping.onnx": "0", "pullback.onnx": "0", "head.smile.onnx": "0", "synthesis.onnx": "1"}
    assert f"runtime=onnxruntime {ort.__version__}, device=cuda, precision=tf32, jacobian=fp32" in repr(sampler)
    assert not sampler.runtime.solving.row_independent


def test_without_the_provider_nothing_runs(bundle, monkeypatch):
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(MissingRuntime, match=r"has no CUDAExecutionProvider here.*pip install 'lace-engine\[gpu\]'"):
        Sampler(bundle, runtime="onnxruntime", device="cuda")


def test_a_provider_that_does_not_start_is_an_error(bundle, gpu, provider, monkeypatch):
    """onnxruntime itself would warn, and decode on the CPU."""
    monkeypatch.setattr(provider, "lacks_provider", True)
    with pytest.raises(BackendError, match="could not start its CUDAExecutionProvider"):
        runtime.CudaDecoder(bundle, gpu)
