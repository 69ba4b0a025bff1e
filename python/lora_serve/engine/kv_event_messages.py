"""The bytes of KV events, as routers decode them.

The words of this module are the protocol's: a block is a page here. A message has three frames: topic,
sequence number (8 bytes, big-endian), and a batch in msgpack, `[time, events, data_parallel_rank]`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from lora_serve.scheduler import KVEvent

END_OF_REPLAY = (-1).to_bytes(8, "big", signed=True)
"""In place of a sequence number: the replay is complete; its payload is empty."""
DATA_PARALLEL_RANK = 0
_DEVICE, _HOST = "GPU", "CPU"
_STORED_FIELDS = (
    "block_hashes",
    "parent_block_hash",
    "token_ids",
    "block_size",
    "lora_id",
    "medium",
    "lora_name",
)
_REMOVED_FIELDS = ("block_hashes", "medium")


@dataclass(frozen=True)
class NamedEvent:
    """An event of the cache, with its adapter's name.

    Parameters
    ----------
    event : KVEvent
        As the scheduler gave it.
    lora_name : str or None
        The adapter's name; None = the base model, and of removed pages.
    """

    event: KVEvent
    lora_name: str | None


def sequence_frame(sequence: int) -> bytes:
    """Give the second frame of a message."""
    return sequence.to_bytes(8, "big")


class BatchEncoder:
    """Makes the payload of a message.

    Parameters
    ----------
    page_size : int
        Tokens of a page.
    as_maps : bool
        Events as maps of their fields with the name of their kind under 'type', instead of arrays of the kind
        and the fields.
    """

    def __init__(self, page_size: int, *, as_maps: bool) -> None:
        self._page_size = page_size
        self._as_maps = as_maps
        self._encoder = msgspec.msgpack.Encoder()

    def encode(self, time_s: float, events: Sequence[NamedEvent]) -> bytes:
        """Give the batch of these events."""
        return self._batch(time_s, [self._event(named) for named in events])

    def encode_cleared(self, time_s: float) -> bytes:
        """Give the batch that says: there is nothing, whatever was said before."""
        return self._batch(time_s, [self._fields("AllBlocksCleared", (), ())])

    def _batch(self, time_s: float, events: list[Any]) -> bytes:
        return self._encoder.encode([time_s, events, DATA_PARALLEL_RANK])

    def _event(self, named: NamedEvent) -> Any:
        event = named.event
        medium = _HOST if event.is_on_host else _DEVICE
        if not event.is_stored:
            return self._fields("BlockRemoved", _REMOVED_FIELDS, (event.page_hashes, medium))
        values = (
            event.page_hashes,
            event.parent_hash,
            event.token_ids,
            self._page_size,
            event.adapter_id or None,
            medium,
            named.lora_name,
        )
        return self._fields("BlockStored", _STORED_FIELDS, values)

    def _fields(self, kind: str, names: tuple[str, ...], values: tuple[Any, ...]) -> Any:
        if self._as_maps:
            return {"type": kind, **dict(zip(names, values, strict=True))}
        return [kind, *values]
