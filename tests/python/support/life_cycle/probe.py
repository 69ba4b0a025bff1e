"""Tells, from inside the engine process, what its memory holds: what HTTP does not show."""

from __future__ import annotations

import json
import os
import socket
import threading
from typing import Any

from lora_serve.common.config import EngineConfig
from lora_serve.engine.engine_core import EngineCore
from lora_serve.executor.model_executor import ModelExecutor
from support.life_cycle.faults import plant

ADDRESS_VARIABLE = "LIFE_CYCLE_PROBE"
FAULT_VARIABLE = "LIFE_CYCLE_FAULT"


def make_executor(config: EngineConfig) -> ModelExecutor:
    """The model's executor, in an engine with a probe."""
    cores: list[EngineCore] = []
    init = EngineCore.__init__

    def note_and_init(core: EngineCore, *args: Any, **options: Any) -> None:
        init(core, *args, **options)
        cores.append(core)

    EngineCore.__init__ = note_and_init  # type: ignore[method-assign]
    if os.environ.get(FAULT_VARIABLE):
        plant(os.environ[FAULT_VARIABLE])
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(os.environ[ADDRESS_VARIABLE])
    listener.listen()
    threading.Thread(target=_answer, args=[listener, cores], daemon=True).start()
    return ModelExecutor(config)


def _answer(listener: socket.socket, cores: list[EngineCore]) -> None:
    while True:
        with listener.accept()[0] as connection:
            connection.sendall(json.dumps(_memory(cores[0])).encode())


def _memory(core: EngineCore) -> dict[str, Any]:
    """Meant for an idle engine; while it runs, the numbers need not fit each other."""
    manager = core._executor.lora
    pool, device = manager._pool.snapshot(), manager._device
    stats = core._scheduler.stats()
    base = stats.adapters[0]
    return {
        "registered generations": [generation.adapter_id for generation in core._registry.generations()],
        "adapters in the scheduler": len(stats.adapters) - 1,
        "bytes of adapters in the scheduler": stats.num_adapter_bytes,
        "free bytes of the arena": device.num_free_bytes,
        "adapter slots": sorted(device.slots.items()),
        "copies to the device": len(device._arriving),
        "free bytes of the host pool": pool.num_free_bytes,
        "held bytes of the host pool": pool.num_held_bytes,
        "loads that wait for the host pool": pool.num_waiters,
        "adapters in the host pool": [block.adapter_id for block in pool.adapters],
        "host records": sorted(manager._host._records),
        "reads under way": sorted(manager._host._reads),
        "staged": sorted(manager._staged),
        "requests": stats.num_running_requests + stats.num_waiting_requests,
        "page transfers": stats.num_transfers,
        "pages": stats.num_device_pages - stats.num_free_pages - stats.num_tree_pages,
        "tree pages of adapters": stats.num_tree_pages - base.num_tree_pages,
        "host pages of adapters": stats.num_host_pages - stats.num_free_host_pages - base.num_host_pages,
    }
