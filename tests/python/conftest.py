"""Set before any test module is imported."""

from __future__ import annotations

import os
import signal

import torch

from support.quick_interpreter import make_interpreter_quick

# Without a GPU, Triton's kernels run in its interpreter, which must be chosen before triton is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
    make_interpreter_quick()

# A shell that starts the tests in the background has interrupts ignored, also in processes that tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)
