"""Whether code waits for the CUDA device."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def device_waits_are_errors() -> Iterator[None]:
    """Make what waits for the CUDA device raise RuntimeError, as far as torch notices it."""
    with warnings.catch_warnings():
        # What torch says once in each process, when the mode is set for the first time.
        warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype", UserWarning)
        try:
            torch.cuda.set_sync_debug_mode("error")
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")
