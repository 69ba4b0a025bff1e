"""A real server with little room for adapters and pages, and the probe of its engine."""

from __future__ import annotations

import json
import socket
import tempfile
import time
from pathlib import Path
from typing import Any

from lora_serve.executor.kv_tensors import page_num_bytes
from lora_serve.models.config import read_model_config
from support.life_cycle.catalogue import Catalogue
from support.life_cycle.probe import ADDRESS_VARIABLE, FAULT_VARIABLE
from support.server_process import ServerProcess

BASE = "tiny"
PAGE_SIZE = 8
NUM_DEVICE_PAGES = 36
NUM_HOST_PAGES = 80
NUM_ON_DEVICE = 6
NUM_ON_HOST = 12
_ALIGNMENT = 256


class FuzzServer(ServerProcess):
    """Holds 6 adapters of middling size on the device and 12 on the host, and few KV pages."""

    def __init__(self, model: Path, catalogue_bytes: int, folder: Path, fault: str = "") -> None:
        self.device_bytes = _round(NUM_ON_DEVICE * catalogue_bytes)
        self.host_bytes = _round(NUM_ON_HOST * catalogue_bytes)
        self._probe = str(Path(tempfile.mkdtemp(dir=folder)) / "probe")
        page_bytes = page_num_bytes(read_model_config(model), PAGE_SIZE)
        super().__init__(
            *(model, "--served-model-name", BASE, "--max-model-len", "96", "--page-size", str(PAGE_SIZE)),
            *("--num-device-pages", str(NUM_DEVICE_PAGES), "--max-num-seqs", "8"),
            *("--kv-host-memory-gb", repr(NUM_HOST_PAGES * page_bytes / 2**30)),
            *("--max-num-batched-tokens", "64", "--lora-allowed-roots", str(folder)),
            *("--lora-memory-gb", repr(self.device_bytes / 2**30)),
            *("--lora-host-memory-gb", repr(self.host_bytes / 2**30)),
            *("--adapter-patience-ms", "10", "--adapter-pause-ms", "30"),
            environment={ADDRESS_VARIABLE: self._probe, FAULT_VARIABLE: fault},
        )
        self._command[self._command.index("lora_serve.cli.main")] = "support.life_cycle.serve"

    def memory(self) -> dict[str, Any]:
        """What the engine's memory holds; see `probe`."""
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(60)
            connection.connect(self._probe)
            data = b""
            while part := connection.recv(65536):
                data += part
        memory: dict[str, Any] = json.loads(data)
        return memory

    def memory_when(self, expected: dict[str, Any], timeout_s: float = 60.0) -> dict[str, Any]:
        """The memory as soon as it is as expected, or as it is in the end."""
        deadline = time.monotonic() + timeout_s
        while (memory := self.memory()) != expected and time.monotonic() < deadline:
            time.sleep(0.02)
        return memory


def _round(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT


def make_server(catalogue: Catalogue, fault: str = "") -> FuzzServer:
    """A server for the adapters of a catalogue."""
    return FuzzServer(catalogue.model, catalogue.mean_bytes, catalogue.folder, fault)
