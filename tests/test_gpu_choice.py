"""Which runtime is taken on which device, and how they fit together."""

import sys

import numpy as np
import pytest

from engine import BackendError, Sampler
from engine.runtimes import AUTO, MissingRuntime, UnfitDevice, compiling, open_runtime, to_pixels
from engine.sampler import find_bundle


@pytest.fixture(autouse=True)
def no_stand_in_stays():
    compiling.load.cache_clear()
    yield
    compiling.load.cache_clear()


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    """The demo bundle, with an empty cache of plans."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LACE_PLANS", str(tmp_path_factory.mktemp("plans")))
        yield find_bundle("demo")


def test_auto_takes_the_first_that_is_installed_and_knows_the_gpu(bundle, monkeypatch):
    tried, reasons = [], {"tensorrt": MissingRuntime("not there"), "tensorrt_rtx": UnfitDevice("sm90")}

    def open_bundle(bundle, *, name, **_):
        tried.append(name)
        if name in reasons:
            raise reasons[name]
        return name

    monkeypatch.setattr("engine.runtimes.import_module", lambda _: type("module", (), {"open_bundle": open_bundle}))
    assert open_runtime(bundle, device="cuda") == "cuda"
    assert tried == list(AUTO["cuda"][:3])
    assert open_runtime(bundle) == "native"
    with pytest.raises(BackendError, match="there is no device 'tpu'; known are: cpu, cuda"):
        open_runtime(bundle, device="tpu")


@pytest.mark.parametrize("name", ["tensorrt", "tensorrt_rtx"])
def test_a_missing_tensorrt_names_its_extra(bundle, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingRuntime, match=rf"pip install 'lace-engine\[{name.replace('_', '-')}\]'"):
        Sampler(bundle, runtime=name, device="cuda")
    with pytest.raises(BackendError, match=f"runtime '{name}' does not run on device 'cpu'; it runs on: cuda"):
        Sampler(bundle, runtime=name)


@pytest.mark.parametrize("name", ["tensorrt", "tensorrt_rtx"])
def test_tensorrt_solves_by_our_kernels(bundle, monkeypatch, name):
    pytest.importorskip("cuda.bindings")
    from engine.cuda import driver
    from engine.runtimes import cuda as solving
    from tests.fake_tensorrt import Ada, install

    gpu, given = Ada(), {}
    install(monkeypatch, gpu, name)
    monkeypatch.setattr(solving, "open_bundle", lambda bundle, **options: given.update(options) or "runtime")
    monkeypatch.setattr(driver.Device.__init__, "__defaults__", (0, gpu))
    assert open_runtime(bundle, name, device="cuda", precision="tf32") == "runtime"
    assert (given["name"], given["drawer"], given["version"], given["precision"]) == (name, name, "0.1", "tf32")
    assert given["decoder"](driver.Device()).precision == "tf32"


def test_from_condition_to_pixels_on_stand_ins(bundle, monkeypatch):
    """auto, our kernels compiled for the host, TensorRT's stand-in, and bytes back: the pictures of the CPU."""
    pytest.importorskip("cuda.bindings")
    from engine.cuda import driver
    from engine.runtimes import cuda as solving
    from tests import fake_kernels
    from tests.fake_tensorrt import install

    gpu = fake_kernels.fake_cuda()
    install(monkeypatch, gpu, "tensorrt")
    monkeypatch.setattr(solving, "build", fake_kernels.build)
    monkeypatch.setattr(driver.Device.__init__, "__defaults__", (0, gpu))
    sampler = Sampler(bundle, device="cuda", capacity=4)
    assert "runtime=tensorrt 0.1 with cuda " in repr(sampler)
    found = sampler.sample("smile & age=0.7", seeds=range(3))
    reference = Sampler(bundle, threads=1, solver="gauss-newton")
    expected = reference.render(found)  # the same latents
    np.testing.assert_array_equal([s.image for s in found], [s.image for s in expected])
    energies = [sample.energy for sample in reference.solve("smile & age=0.7", seeds=range(3))]
    assert [sample.energy for sample in found] == pytest.approx(energies, rel=1e-2)


def test_a_sampler_takes_the_pixels_of_a_runtime_that_makes_them(bundle, monkeypatch):
    sampler = Sampler(bundle, runtime="onnxruntime", threads=1)
    expected = [sample.image for sample in sampler.sample("smile", seeds=range(2))]
    calls = []

    def pixels(ws, noises):
        calls.append(len(ws))
        return to_pixels(sampler.runtime.drawing.synthesize(ws, noises))

    monkeypatch.setattr(sampler.runtime.drawing, "pixels", pixels)
    for sample, image in zip(sampler.sample("smile", seeds=range(2)), expected, strict=True):
        np.testing.assert_array_equal(sample.image, image)
    assert calls == [2]
