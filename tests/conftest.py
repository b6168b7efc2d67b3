"""Shared set-up of the tests."""

import contextlib
import signal
import sys

import pytest

with contextlib.suppress(ImportError):
    import torch

    # Two OpenMP threads that wait for each other beside other test processes are many times slower than one.
    torch.set_num_threads(1)

# A shell starts what runs in its background with interrupts ignored, and children would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def torch_settings():
    """The trainer's command line sets threads and switches denormal numbers off, for the whole process."""
    yield
    if "torch" in sys.modules:
        torch.set_num_threads(1)
        torch.set_flush_denormal(False)


@pytest.fixture
def field_calls(monkeypatch):
    """The number of rows in each call of ``Flow.evaluate`` so far."""
    from engine.flow import Flow

    calls, evaluate = [], Flow.evaluate

    def counted(flow, batch, rows, z, *, linear):
        calls.append(len(rows))
        return evaluate(flow, batch, rows, z, linear=linear)

    monkeypatch.setattr(Flow, "evaluate", counted)
    return calls
