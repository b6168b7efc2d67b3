"""ONNX Runtime's CUDA provider without a GPU: sessions that decode on the host, in the order of a stream."""

from typing import ClassVar

import numpy as np

from tests.fake_cuda import FakeCuda
from tests.fake_tensorrt import on_the_host, run_onnx

CUDA = "CUDAExecutionProvider"


class FakeSession:
    """A session on the CUDA provider: keeps what it was opened with, and decodes on the host in the stream's order."""

    opened: ClassVar[list["FakeSession"]] = []
    cuda: FakeCuda
    lacks_provider = False

    def __init__(self, path, options, *, providers, enable_fallback):
        assert enable_fallback == 0  # else a failure would be run again on the CPU
        self.path, self.config = path, options.get_session_config_entry
        ((self.provider, self.options),) = providers
        self.session = on_the_host(path)
        self.get_inputs, self.get_outputs, self.run = (
            self.session.get_inputs, self.session.get_outputs, self.session.run)
        FakeSession.opened.append(self)

    def get_providers(self) -> list[str]:
        return ["CPUExecutionProvider"] if self.lacks_provider else [CUDA, "CPUExecutionProvider"]

    def io_binding(self) -> "FakeBinding":
        return FakeBinding()

    def run_with_iobinding(self, binding: "FakeBinding", options) -> None:
        keys = ("gpu_graph_id", "disable_synchronize_execution_providers")
        rows = {shape[0] for shape in binding.shapes.values()}
        assert [options.get_run_config_entry(key) for key in keys] == [str(*rows), "1"]
        shapes = {name: shape[1:] for name, shape in binding.shapes.items()}
        stream = int(self.options["user_compute_stream"])
        for name, shape in binding.shapes.items():
            self.cuda.block(binding.addresses[name], 4 * int(np.prod(shape)))
        self.cuda.add(stream, "kernel", lambda: run_onnx(self.session, *rows, shapes, binding.addresses))


class FakeBinding:
    def __init__(self):
        self.shapes, self.addresses = {}, {}

    def bind_input(self, name, device_type, device_id, element_type, shape, buffer_ptr):
        assert (device_type, device_id, element_type) == ("cuda", 0, np.float32)
        self.shapes[name], self.addresses[name] = shape, buffer_ptr

    bind_output = bind_input
