"""Adapters of random numbers on all seven projections of a model, written in seconds."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path

import torch

from lora_serve.layers.linear import LoRATarget
from lora_serve.lora.adapter_layout import ModuleSize, lay_out, matrix_shapes
from lora_serve.models.config import read_model_config
from lora_serve.models.decoder import DecoderModel
from lora_serve.models.loader import resolve_model_directory

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_DTYPE_NAMES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}
_BLOCK_NUMBERS = (1 << 22) + 4099
"""Random numbers that a file repeats; prime to the sizes of matrices, so that no two begin alike."""


class GeneratedAdapters:
    """PEFT directories for one model, made when they are asked for and kept.

    Every file holds the same random numbers from another one on, so each adapter has its own content. They
    change each weight by about a tenth of a usual one: outputs stay finite, and speed does not depend on it.

    Parameters
    ----------
    folder
        Where they go.
    model
        A Hugging Face directory or hub id, of which the configuration is read.
    dtype
        As in EngineConfig.
    """

    def __init__(self, folder: Path, model: str, dtype: str) -> None:
        self._folder = folder
        config = read_model_config(resolve_model_directory(model, needs_weights=False), dtype)
        decoder = DecoderModel(config, device=torch.device("meta"))
        self._targets = {
            module: target
            for module, target in decoder.lora_targets().items()
            if module.rsplit(".", 1)[-1] in PROJECTIONS
        }
        self._dtype = config.dtype
        self._hidden_size = config.hidden_size

    def num_bytes(self, lora_rank: int) -> int:
        """Bytes of one adapter on the device."""
        sizes = []
        for module, target in self._targets.items():
            num_a, num_b = (math.prod(shape) for shape in matrix_shapes(target, lora_rank))
            itemsize = self._dtype.itemsize
            sizes.append(ModuleSize(module, lora_rank, 1.0, num_a * itemsize, num_b * itemsize))
        return lay_out(sizes).num_bytes

    def paths(self, lora_rank: int, num_adapters: int) -> list[Path]:
        """Give so many directories of a rank; those that are not there yet are written."""
        folders = [self._folder / f"r{lora_rank}-{index}" for index in range(num_adapters)]
        missing = [(index, folder) for index, folder in enumerate(folders) if not folder.exists()]
        if missing:
            header = _make_header(self._targets, lora_rank, _DTYPE_NAMES[self._dtype])
            num_bytes = self._num_file_bytes(lora_rank)
            block = self._make_block(lora_rank)
            for index, folder in missing:
                self._write(folder, lora_rank, header, block, num_bytes, first_number=1 + 64 * index)
        return folders

    def _num_file_bytes(self, lora_rank: int) -> int:
        shapes = (shape for target in self._targets.values() for shape in matrix_shapes(target, lora_rank))
        return sum(math.prod(shape) for shape in shapes) * self._dtype.itemsize

    def _make_block(self, lora_rank: int) -> bytes:
        # With scaling 2, an entry of 2 B A has 2 s^2 sqrt(R) as standard deviation.
        deviation = math.sqrt(0.1 / math.sqrt(self._hidden_size) / (2 * math.sqrt(lora_rank)))
        generator = torch.Generator().manual_seed(lora_rank)
        numbers = torch.randn(_BLOCK_NUMBERS, generator=generator) * deviation
        return numbers.to(self._dtype).view(torch.uint8).numpy().tobytes()

    def _write(
        self, folder: Path, lora_rank: int, header: bytes, block: bytes, num_bytes: int, *, first_number: int
    ) -> None:
        first_byte = first_number * self._dtype.itemsize
        turned = block[first_byte:] + block[:first_byte]
        folder.mkdir(parents=True)
        with (folder / "adapter_model.safetensors").open("wb") as file:
            file.write(header)
            for _ in range(num_bytes // len(turned)):
                file.write(turned)
            file.write(turned[: num_bytes % len(turned)])
        config = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": "random",
            "r": lora_rank,
            "lora_alpha": 2 * lora_rank,
            "lora_dropout": 0.0,
            "bias": "none",
            "target_modules": list(PROJECTIONS),
        }
        (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")


def _make_header(targets: dict[str, LoRATarget], lora_rank: int, dtype_name: str) -> bytes:
    """The beginning of a safetensors file: the header's length, and where each tensor lies."""
    itemsize = 4 if dtype_name == "F32" else 2
    entries: dict[str, object] = {}
    end = 0
    for module, target in targets.items():
        shape_a, (_, out_features) = matrix_shapes(target, lora_rank)
        for half, shape in (("A", shape_a), ("B", (out_features, lora_rank))):
            begin, end = end, end + math.prod(shape) * itemsize
            key = f"base_model.model.{module}.lora_{half}.weight"
            entries[key] = {"dtype": dtype_name, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text
