"""The driver layer on a simulated driver: order, lifetimes, errors; and that the simulation itself finds faults."""

import ctypes
import gc

import numpy as np
import pytest

pytest.importorskip("cuda.bindings.driver", reason="needs cuda-bindings")
import torch

from engine.cuda.dlpack import DeviceArray, borrow, empty
from engine.cuda.driver import Device, Launch, NoDevice, Pinned
from engine.errors import BackendError, RequestError
from tests.fake_cuda import FakeCuda
from tests.fake_memory import Violation, viewed


def add(launch, address: int, amount: int) -> None:
    viewed(address, 4).view(np.int32)[0] += amount


def opened(**kernels) -> tuple[Device, FakeCuda]:
    fake = FakeCuda({"add": add, **kernels})
    return Device(api=fake), fake


def adding(device: Device, address: int, amount: int, name: str = "add") -> Launch:
    kernel = device.load(b"cubin")(name)
    return Launch(name, kernel, (1,), 32, (ctypes.c_void_p(address), ctypes.c_int(amount)))


def read(device: Device, address: int) -> int:
    pinned = Pinned(device, 4)
    device.download(pinned.bytes, address)
    device.synchronize()
    return int(pinned.bytes.view(np.int32)[0])


def test_a_launch_runs_and_nothing_is_left_after_close():
    device, fake = opened()
    block = device.allocate(4)
    device.fill(block.address, 4)
    device.launch(adding(device, block.address, 5))
    assert read(device, block.address) == 5
    assert device.capability == (9, 0)
    assert device.name == "Fake GPU"
    device.close()
    device.close()
    fake.check_nothing_is_left()


def test_results_are_not_there_before_the_host_waits():
    device, _ = opened()
    block, pinned = device.allocate(4), Pinned(device, 4)
    device.fill(block.address, 4, 1)
    device.download(pinned.bytes, block.address)
    assert (pinned.bytes == 0xFF).all()
    device.synchronize()
    assert (pinned.bytes == 1).all()


def test_a_captured_graph_replays_what_was_launched():
    device, fake = opened()
    block = device.allocate(4)
    device.fill(block.address, 4)
    launches = [adding(device, block.address, amount) for amount in (1, 10)]
    graph = device.capture(lambda: [device.launch(launch) for launch in launches])
    assert read(device, block.address) == 0
    for _ in range(3):
        graph.launch()
    assert read(device, block.address) == 33
    assert fake.launched == ["add"] * 6
    graph.close()
    device.close()
    fake.check_nothing_is_left()


def test_a_loop_ends_on_the_device_and_starts_again():
    device, fake = opened()
    block = device.allocate(4)

    def until_seven(launch, address: int, handle: int) -> None:
        add(launch, address, 1)
        fake.set_condition(handle, int(viewed(address, 4).view(np.int32)[0] < 7))

    fake.kernels["until_seven"] = until_seven
    kernel = device.load(b"cubin")("until_seven")

    def body(handle: int) -> None:
        device.launch(Launch("until_seven", kernel, (1,), 1, (ctypes.c_void_p(block.address), ctypes.c_uint64(handle))))

    graph = device.capture_loop(body)
    for _ in range(2):
        device.fill(block.address, 4)
        graph.launch()
        assert read(device, block.address) == 7
    assert len(fake.launched) == 14


def test_an_error_in_a_recording_leaves_the_stream_usable():
    device, fake = opened()
    block = device.allocate(4)
    with pytest.raises(ZeroDivisionError):
        device.capture(lambda: 1 / 0)
    assert not fake.objects["graph"]
    device.fill(block.address, 4)
    assert read(device, block.address) == 0


@pytest.mark.parametrize("wrong", ["synchronize", "event"])
def test_what_a_conditional_body_may_not_hold_is_found(wrong):
    device, _ = opened()
    with pytest.raises(Violation, match=r"body may not|cannot be waited"):
        device.capture_loop(lambda _: device.synchronize() if wrong == "synchronize" else device.elapsed(lambda: None))


def test_use_after_free_is_found():
    device, fake = opened()
    block = device.allocate(4)
    launch = adding(device, block.address, 1)
    graph = device.capture(lambda: device.launch(launch))
    block.free()
    with pytest.raises(Violation, match="were freed"):
        device.launch(launch)
    graph.launch()
    with pytest.raises(Violation, match="were freed"):
        device.synchronize()
    with pytest.raises(Violation, match="were freed"):
        fake.cuMemFree(block.address)


def test_memory_goes_with_its_last_reference():
    device, fake = opened()
    for make in (device.allocate, lambda n: Pinned(device, n)):
        make(64)
    gc.collect()
    assert not any(memory.is_live for memory in fake.memory)
    kept = device.allocate(4)
    with pytest.raises(Violation, match="1 blocks"):
        fake.check_nothing_is_left()
    assert kept.nbytes == 4


def test_errors_name_the_function_the_error_and_what_to_do():
    device, fake = opened()
    fake.fail["cuMemAlloc"] = fake.CUresult.CUDA_ERROR_OUT_OF_MEMORY
    with pytest.raises(BackendError, match=r"cuMemAlloc failed with CUDA_ERROR_OUT_OF_MEMORY .*smaller capacity"):
        device.allocate(4)
    fake.fail["cuStreamSynchronize"] = fake.CUresult.CUDA_ERROR_ILLEGAL_ADDRESS
    with pytest.raises(BackendError, match="context is lost"):
        device.synchronize()


def test_without_a_driver_or_a_gpu_the_message_says_so():
    fake = FakeCuda()
    with pytest.raises(NoDevice, match=r"cuda:3.*no GPU of that number"):
        Device(3, fake)
    fake.fail["cuInit"] = fake.CUresult.CUDA_ERROR_NO_DEVICE
    with pytest.raises(NoDevice, match="CUDA_VISIBLE_DEVICES"):
        Device(0, fake)


# --- DLPack --------------------------------------------------------------------------------------------------------


def test_torch_and_numpy_see_the_memory_of_an_array():
    device, fake = opened()
    array = empty(device, (2, 3), np.float32)
    device.upload(array.address, np.arange(6, dtype=np.float32))
    tensor = torch.from_dlpack(array)
    assert tensor.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert tensor.data_ptr() == array.address
    assert np.from_dlpack(array)[1, 2] == 5
    del array
    gc.collect()
    assert tensor[0, 1] == 1  # it keeps the memory
    del tensor
    gc.collect()
    assert not any(memory.is_live for memory in fake.memory)


def test_a_capsule_that_nobody_takes_frees_its_tensor():
    device, fake = opened()
    empty(device, (2,), np.int32).__dlpack__()
    gc.collect()
    assert not any(memory.is_live for memory in fake.memory)


def test_a_tensor_of_torch_is_borrowed_without_a_copy_and_given_back():
    device, _ = opened()
    tensor = torch.arange(8, dtype=torch.float32).reshape(2, 4)
    array = borrow(device, tensor, 4, "z")
    assert isinstance(array, DeviceArray)
    assert (array.address, array.shape) == (tensor.data_ptr(), (2, 4))
    tensor = tensor.clone()
    assert viewed(array.address, 32).view(np.float32)[7] == 7  # still there
    with pytest.raises(RequestError, match=r"expected \(rows, 4\) float32"):
        borrow(device, tensor.double(), 4, "z")
    with pytest.raises(RequestError, match=r"expected \(rows, 4\) float32 in C order"):
        borrow(device, tensor.reshape(4, 2).t(), 4, "z")
    device.kind = 2
    with pytest.raises(RequestError, match="another device than cuda:0"):
        borrow(device, tensor, 4, "z")
