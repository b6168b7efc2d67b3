"""Shared set-up of the tests."""

import contextlib
import sys

import pytest

with contextlib.suppress(ImportError):
    import torch

    # Two OpenMP threads that wait for each other beside other test processes are many times slower than one.
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def torch_settings():
    """The trainer's command line sets threads and switches denormal numbers off, for the whole process."""
    yield
    if "torch" in sys.modules:
        torch.set_num_threads(1)
        torch.set_flush_denormal(False)
