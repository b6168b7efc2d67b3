"""Shared set-up of the tests."""

import contextlib

with contextlib.suppress(ImportError):
    import torch

    # Two OpenMP threads that wait for each other beside other test processes are many times slower than one.
    torch.set_num_threads(1)
