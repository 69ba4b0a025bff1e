"""Writes python/lora_serve/_core.pyi from the built extension; with --check, compares instead."""

from __future__ import annotations

import difflib
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STUB = ROOT / "python" / "lora_serve" / "_core.pyi"


def generate() -> str:
    """The stub of the extension as it is installed now, formatted like the rest of the sources."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pybind11_stubgen", "lora_serve._core", "--output-dir", folder]
        subprocess.run(command, check=True, capture_output=True, text=True)
        text = (Path(folder) / "lora_serve" / "_core.pyi").read_text(encoding="utf-8")
    command = [sys.executable, "-m", "ruff", "format", "--stdin-filename", str(STUB), "-"]
    return subprocess.run(command, input=text, check=True, capture_output=True, text=True).stdout


def main() -> int:
    generated = generate()
    if "--check" not in sys.argv[1:]:
        STUB.write_text(generated, encoding="utf-8")
        return 0
    found = STUB.read_text(encoding="utf-8") if STUB.exists() else ""
    if found == generated:
        print("stub: _core.pyi matches the extension")
        return 0
    diff = difflib.unified_diff(
        found.splitlines(), generated.splitlines(), "committed", "generated", lineterm=""
    )
    print("\n".join(diff))
    print("python/lora_serve/_core.pyi is not what the extension offers; run 'make stub' and commit it")
    return 1


if __name__ == "__main__":
    sys.exit(main())
