"""A small model, and the bench commands run on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lora_serve.cli.main import main
from lora_serve.testing.models import make_random_model

MODEL = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "head_dim": 16}


def make_model(folder: Path, **others: Any) -> Path:
    make_random_model(folder, "Qwen3ForCausalLM", **{**MODEL, **others})
    return folder


def run_bench(command: str, model: Path, *arguments: object, device: str | None = "cpu") -> int:
    """Run a command; with the device None it chooses one itself."""
    sizes = ("--num-device-pages", 256, "--max-model-len", 128, "--max-num-seqs", 8)
    chosen = () if device is None else ("--device", device)
    return main(["bench", command, *map(str, ("--model", model, *sizes, *chosen, *arguments))])
