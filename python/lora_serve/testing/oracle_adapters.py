"""Adapter memory without weights, for the oracle executor."""

from __future__ import annotations

import hashlib

from lora_serve.common.errors import AdapterNotFoundError, InternalError
from lora_serve.lora.manager import NO_SLOT, AdapterResidency
from lora_serve.lora.peft_adapter import HostAdapter


class OracleAdapterStore:
    """Adapters that are only a path: equal paths have equal content. Implements `AdapterStore`.

    Owns which generations were added and the slot of each. `install` accepts generations that were never
    added, so that an oracle can be driven by a scheduler alone.

    Parameters
    ----------
    num_bytes : int
        Reported size of every adapter.
    """

    def __init__(self, num_bytes: int = 1024) -> None:
        self._num_bytes = num_bytes
        self._adapters: dict[int, HostAdapter] = {}
        self._slots: dict[int, int] = {}

    def read(self, path: str, name: str | None = None) -> HostAdapter:  # noqa: ARG002
        """Give an adapter whose content is a function of the path; no file is touched."""
        digest = hashlib.sha256(path.encode()).hexdigest()
        return HostAdapter(
            path=path, modules={}, content_digest=digest, num_bytes=self._num_bytes, lora_rank=1
        )

    def add(self, adapter_id: int, adapter: HostAdapter) -> None:
        """Keep a generation.

        Raises
        ------
        InternalError
            The id was added before.
        """
        if adapter_id in self._adapters:
            raise InternalError(f"adapter generation {adapter_id} was added before; ids are never reused")
        self._adapters[adapter_id] = adapter

    def install(self, adapter_id: int, slot: int) -> None:
        """Put a generation into a slot; what was in it is in none from now on."""
        self._slots = {a: s for a, s in self._slots.items() if s != slot}
        self._slots[adapter_id] = slot

    def remove(self, adapter_id: int) -> None:
        """Forget a generation and empty its slot.

        Raises
        ------
        AdapterNotFoundError
            It was neither added nor installed.
        """
        if adapter_id not in self:
            raise AdapterNotFoundError(f"adapter generation {adapter_id} was neither added nor installed")
        self._adapters.pop(adapter_id, None)
        self._slots.pop(adapter_id, None)

    def adapter_in(self, slot: int) -> int | None:
        """Give the generation in a slot, None where it is empty."""
        return next((adapter_id for adapter_id, held in self._slots.items() if held == slot), None)

    def __contains__(self, adapter_id: int) -> bool:
        """Whether the generation was added or installed, and not removed."""
        return adapter_id in self._adapters or adapter_id in self._slots

    def snapshot(self) -> list[AdapterResidency]:
        """Give every generation that was added, ordered by id."""
        return [
            AdapterResidency(
                adapter_id=adapter_id,
                adapter_slot=self._slots.get(adapter_id, NO_SLOT),
                num_bytes=adapter.num_bytes,
                lora_rank=adapter.lora_rank,
                target_modules=adapter.target_modules,
            )
            for adapter_id, adapter in sorted(self._adapters.items())
        ]
