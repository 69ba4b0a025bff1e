"""A log line for each step in the life of an adapter's generation."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lora_serve.lora.adapter_reader import HostAdapter
    from lora_serve.lora.registry import AdapterGeneration, AdapterRegistry

logger = logging.getLogger(__name__)


class AdapterLog:
    """Says what becomes of adapters, by their names.

    What an operator asks for, and what is read from disk, is logged as INFO; what the scheduler brings in and
    takes off, often many a second, as DEBUG; failures as ERROR.

    Parameters
    ----------
    registry
        Knows the names.
    """

    def __init__(self, registry: AdapterRegistry) -> None:
        self._registry = registry

    def opened(self, generation: AdapterGeneration, adapter: HostAdapter) -> None:
        """It was read for the first time, and has a number now."""
        logger.info(
            "%s: disk to host, rank %d, %.1f MB, content %.12s from %s, %s",
            _title(generation),
            generation.lora_rank,
            generation.num_bytes / 1e6,
            generation.content_digest,
            generation.path,
            _stages(adapter.load_ms),
        )

    def published(self, generation: AdapterGeneration, replaced: AdapterGeneration | None) -> None:
        """Its name stands for it."""
        instead = "" if replaced is None else f" in place of generation {replaced.adapter_id}"
        logger.info("%s: serves%s", _title(generation), instead)

    def read_again(self, adapter_ids: Iterable[int]) -> None:
        """They were read once more, because requests want them."""
        self._each(adapter_ids, logging.INFO, "disk to host again")

    def evicted_from_host(self, adapter_ids: Iterable[int]) -> None:
        """Their room on the host went to others."""
        self._each(adapter_ids, logging.INFO, "off the host, to make room")

    def brought_in(self, adapter_ids: Iterable[int]) -> None:
        """They are on the device."""
        self._each(adapter_ids, logging.DEBUG, "host to device")

    def taken_off(self, adapter_ids: Iterable[int]) -> None:
        """Their room on the device goes to others."""
        self._each(adapter_ids, logging.DEBUG, "off the device, to make room")

    def retired(self, generation: AdapterGeneration, *, force: bool) -> None:
        """Its name does not stand for it any more, because of an unload."""
        how = "its requests are aborted" if force else "its requests run to their end"
        logger.info("%s: drains, %s", _title(generation), how)

    def gone(self, adapter_ids: Iterable[int]) -> None:
        """Nothing is left of them."""
        self._each(adapter_ids, logging.INFO, "gone")

    def _each(self, adapter_ids: Iterable[int], level: int, what: str) -> None:
        if logger.isEnabledFor(level):
            for adapter_id in adapter_ids:
                logger.log(level, "%s: %s", _title(self._registry.get(adapter_id)), what)


def _title(generation: AdapterGeneration) -> str:
    return f"adapter {generation.name!r} generation {generation.adapter_id}"


def _stages(load_ms: Mapping[str, float]) -> str:
    return ", ".join(f"{stage} {ms:.1f} ms" for stage, ms in load_ms.items())
