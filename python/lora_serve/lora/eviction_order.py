"""Which adapters leave host memory first, and the line of those that wait for the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

_WAITED_FOR = 2**62
"""Above every logical time of use."""


class AdapterLine(Protocol):
    """The adapters that requests wait for, in the order of their turns; really the `Scheduler`."""

    def adapters_to_stage(self) -> Sequence[int]:
        """Those to read from disk next, the first in front."""
        ...

    def waiting_adapters(self, adapter_ids: Sequence[int]) -> Sequence[int]:
        """Those of ``adapter_ids`` that are waited for, whose turn comes first in front."""
        ...


class NobodyWaits:
    """A line without anybody."""

    def adapters_to_stage(self) -> Sequence[int]:
        """None."""
        return ()

    def waiting_adapters(self, adapter_ids: Sequence[int]) -> Sequence[int]:  # noqa: ARG002
        """None."""
        return ()


class EvictionOrder:
    """Adapters that nobody waits for go first, the least recently used of them; then the last in line.

    Parameters
    ----------
    waiting
        Adapters that requests wait for, whose turn comes first in front.
    for_adapter
        For whom room is made: nobody goes whose turn comes before its own, and nobody at all who waits where
        it does not wait itself. None = everybody may go.
    """

    def __init__(self, waiting: Sequence[int] = (), *, for_adapter: int | None = None) -> None:
        self._turns = {adapter_id: turn for turn, adapter_id in enumerate(waiting)}
        self._first_turn = 0 if for_adapter is None else self._turns.get(for_adapter, len(waiting))

    def rank(self, adapter_id: int | None, last_use: int) -> int | None:
        """Where it stands: lower goes first, None = it must stay."""
        turn = None if adapter_id is None else self._turns.get(adapter_id)
        if turn is None:
            return last_use
        return _WAITED_FOR - turn if turn >= self._first_turn else None
