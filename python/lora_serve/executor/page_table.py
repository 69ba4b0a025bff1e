"""Which KV pages each page-table row refers to; changed only by the deltas of plans."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from lora_serve.common.errors import InternalError

if TYPE_CHECKING:
    from lora_serve.scheduler import ExecutionPlan


class PageTable:
    """Host copy of the scheduler's page tables.

    Entry `i` of a row is the page that holds the request's tokens [i * page_size, (i + 1) * page_size).
    Entries behind a row's last delta are left over from earlier requests and mean nothing.

    Parameters
    ----------
    max_num_seqs : int
        Rows.
    max_pages_per_row : int
        Entries of a row: pages of the longest request.
    num_device_pages : int
        Page ids are in [0, num_device_pages).
    """

    def __init__(self, max_num_seqs: int, max_pages_per_row: int, num_device_pages: int) -> None:
        self._pages = np.zeros((max_num_seqs, max_pages_per_row), dtype=np.int32)
        self._num_pages = np.zeros(max_num_seqs, dtype=np.int32)
        self._num_device_pages = num_device_pages

    def apply_deltas(self, plan: ExecutionPlan) -> None:
        """Write a plan's changes: a row becomes its old entries before the start, then the pages given.

        Raises
        ------
        InternalError
            A row, start or page id lies outside the table, or a start leaves a gap.

        Notes
        -----
        O(changed entries), never O(context).
        """
        num_pages = self._num_device_pages
        if len(plan.delta_pages) and (plan.delta_pages.min() < 0 or plan.delta_pages.max() >= num_pages):
            raise InternalError(
                f"plan {plan.plan_id} names pages {plan.delta_pages.min()} to {plan.delta_pages.max()} "
                f"but page ids are in [0, {num_pages})"
            )
        offsets = plan.delta_offsets.tolist()
        num_rows, num_entries = self._pages.shape
        for index, (row, start) in enumerate(
            zip(plan.delta_rows.tolist(), plan.delta_starts.tolist(), strict=True)
        ):
            pages = plan.delta_pages[offsets[index] : offsets[index + 1]]
            end = start + len(pages)
            if not (0 <= row < num_rows and 0 <= start <= self._num_pages[row] and end <= num_entries):
                raise InternalError(
                    f"plan {plan.plan_id} sets entries [{start}, {end}) of page-table row {row}, but there "
                    f"are {num_rows} rows of {num_entries} entries and this one has {self._held_by(row)}"
                )
            self._pages[row, start:end] = pages
            self._num_pages[row] = end

    def _held_by(self, row: int) -> str:
        return f"{self._num_pages[row]} pages" if 0 <= row < len(self._num_pages) else "no entry"

    def rows(
        self, page_table_rows: npt.NDArray[np.int32], num_pages: npt.NDArray[np.int32]
    ) -> npt.NDArray[np.int32]:
        """Entries of some rows, as many columns as the longest needs.

        Parameters
        ----------
        page_table_rows : numpy.ndarray
            [B] int32.
        num_pages : numpy.ndarray
            [B] int32, entries that each row is about to use.

        Returns
        -------
        numpy.ndarray
            [B, max(num_pages)] int32, a copy. Entries of a row beyond its `num_pages` mean nothing, but are
            valid page ids.

        Raises
        ------
        InternalError
            A row has fewer pages than it is about to use: a delta is missing.
        """
        held = self._num_pages[page_table_rows]
        if bool((held < num_pages).any()):
            index = int(np.argmax(held < num_pages))
            raise InternalError(
                f"page-table row {page_table_rows[index]} has {held[index]} pages but the plan's tokens need "
                f"{num_pages[index]}"
            )
        width = int(num_pages.max(initial=0))
        selected: npt.NDArray[np.int32] = self._pages[page_table_rows, :width]
        return selected
