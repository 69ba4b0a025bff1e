"""The oracle executor's KV pages of both tiers, and the copies between them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from lora_serve.common.errors import InternalError

if TYPE_CHECKING:
    from lora_serve.scheduler import ExecutionPlan

NEVER_WRITTEN = -1
HALF_COPIED = -2

DEVICE, HOST = 0, 1
_TIER_NAMES = ("device", "host")
#: Source and destination tier of each kind of copy.
_DIRECTIONS = ((DEVICE, HOST), (HOST, DEVICE))
_ADAPTER, _TOKEN, _POSITION = 0, 1, 2


@dataclass(frozen=True)
class _Copy:
    source_tier: int
    destination_tier: int
    source_pages: npt.NDArray[np.int32]
    destination_pages: npt.NDArray[np.int32]
    content: npt.NDArray[np.int64]  # [N, page_size, 3], the source pages when the copy started


class OraclePages:
    """Entries (adapter, token, position) of the pages of both tiers.

    A copy takes from `start` to `end`. In between its source pages may not be written and its destination
    pages not be touched, by rows or by other copies; that, and a copy of a page that is not full, is an
    InternalError.

    Parameters
    ----------
    num_device_pages, num_host_pages, page_size : int
        Sizes.
    """

    def __init__(self, num_device_pages: int, num_host_pages: int, page_size: int) -> None:
        self._page_size = page_size
        sizes = (num_device_pages, num_host_pages)
        self._pages = [np.full((size, page_size, 3), NEVER_WRITTEN, dtype=np.int64) for size in sizes]
        self._num_readers = [np.zeros(size, dtype=np.int64) for size in sizes]
        self._is_destination = [np.zeros(size, dtype=bool) for size in sizes]
        self._copies: dict[int, _Copy] = {}

    @property
    def copies_under_way(self) -> list[int]:
        """Ids of the copies that have started and not ended, lowest first."""
        return sorted(self._copies)

    def write(
        self,
        slots: npt.NDArray[np.int64],
        adapters: npt.NDArray[np.int64],
        tokens: npt.NDArray[np.int64],
        positions: npt.NDArray[np.int64],
    ) -> None:
        """Write one entry a token.

        Parameters
        ----------
        slots : numpy.ndarray
            [T] position in the flat device pages, as the slot mapping has it.
        adapters, tokens, positions : numpy.ndarray
            [T] what to write.
        """
        pages = slots // self._page_size
        busy = self._is_destination[DEVICE][pages] | (self._num_readers[DEVICE][pages] > 0)
        if busy.any():
            raise InternalError(f"a row writes device page {pages[busy][0]} while it is copied")
        entries = self._pages[DEVICE].reshape(-1, 3)
        entries[slots, _ADAPTER] = adapters
        entries[slots, _TOKEN] = tokens
        entries[slots, _POSITION] = positions

    def read(
        self, slots: npt.NDArray[np.int64]
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Give adapters, tokens and positions, each [T], of entries of the flat device pages."""
        pages = slots // self._page_size
        busy = self._is_destination[DEVICE][pages]
        if busy.any():
            raise InternalError(f"a row reads device page {pages[busy][0]} before the copy to it is done")
        entries = self._pages[DEVICE].reshape(-1, 3)[slots]
        return entries[:, _ADAPTER], entries[:, _TOKEN], entries[:, _POSITION]

    def start(self, plan: ExecutionPlan) -> None:
        """Start the plan's copies, in their order."""
        kinds, offsets = plan.transfer_kinds.tolist(), plan.transfer_offsets.tolist()
        for index, transfer_id in enumerate(plan.transfer_ids.tolist()):
            pairs = slice(offsets[index], offsets[index + 1])
            source_pages = plan.transfer_source_pages[pairs]
            destination_pages = plan.transfer_destination_pages[pairs]
            source_tier, destination_tier = _DIRECTIONS[kinds[index]]
            if transfer_id in self._copies or not len(source_pages):
                raise InternalError(f"copy {transfer_id} is under way already, or copies nothing")
            self._check_ends(transfer_id, source_tier, source_pages, destination_tier, destination_pages)
            self._copies[transfer_id] = _Copy(
                source_tier,
                destination_tier,
                source_pages.copy(),
                destination_pages.copy(),
                self._pages[source_tier][source_pages],
            )
            self._num_readers[source_tier][source_pages] += 1
            self._is_destination[destination_tier][destination_pages] = True
            self._pages[destination_tier][destination_pages] = HALF_COPIED

    def end(self, transfer_id: int, *, failed: bool) -> None:
        """End a copy; one that failed leaves something that must not be read.

        Raises
        ------
        InternalError
            A source page changed while it was copied.
        """
        copy = self._copies.pop(transfer_id)
        if not np.array_equal(self._pages[copy.source_tier][copy.source_pages], copy.content):
            raise InternalError(f"a source page of copy {transfer_id} changed while it was copied")
        self._num_readers[copy.source_tier][copy.source_pages] -= 1
        self._is_destination[copy.destination_tier][copy.destination_pages] = False
        if not failed:
            self._pages[copy.destination_tier][copy.destination_pages] = copy.content

    def _check_ends(
        self,
        transfer_id: int,
        source_tier: int,
        source_pages: npt.NDArray[np.int32],
        destination_tier: int,
        destination_pages: npt.NDArray[np.int32],
    ) -> None:
        if len(np.unique(destination_pages)) != len(source_pages):
            raise InternalError(
                f"copy {transfer_id} has source pages {source_pages.tolist()} and destination pages "
                f"{destination_pages.tolist()}"
            )
        if self._is_destination[source_tier][source_pages].any():
            raise InternalError(f"copy {transfer_id} reads what another copy writes")
        busy = self._is_destination[destination_tier][destination_pages]
        if (busy | (self._num_readers[destination_tier][destination_pages] > 0)).any():
            raise InternalError(f"copy {transfer_id} writes what another copy touches")
        content = self._pages[source_tier][source_pages]
        first = content[:, :1]
        steps = content - first
        is_full = (
            (content[:, 0, _ADAPTER] >= 0)
            & (content[:, 0, _POSITION] % self._page_size == 0)
            & (steps[:, :, _ADAPTER] == 0).all(axis=1)
            & (steps[:, :, _POSITION] == np.arange(self._page_size)).all(axis=1)
        )
        if not is_full.all():
            page = source_pages[~is_full][0]
            raise InternalError(
                f"copy {transfer_id} reads {_TIER_NAMES[source_tier]} page {page}, which is not full"
            )
