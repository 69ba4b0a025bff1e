"""What the server's own process does without: torch, which takes seconds to import and 300 MB of memory."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import sys
import lora_serve.cli.main
import lora_serve.server.launch
print("torch" in sys.modules)
"""


def test_modules_of_the_server_import_no_torch():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False"]
