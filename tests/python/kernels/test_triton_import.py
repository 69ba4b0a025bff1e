"""Only what launches a Triton kernel needs triton."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import sys
sys.modules["triton"] = None  # every import of it raises ModuleNotFoundError
import lora_serve.executor.model_executor
import lora_serve.kernels
try:
    import lora_serve.kernels.rms_norm
except ImportError as error:
    print(error)
"""


def test_package_needs_no_triton_and_a_kernel_without_it_names_what_to_install() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "pip install 'lora-serve[cuda]'" in done.stdout
