"""What the torch attention backend works out once a step: which rows go together, and which pages they read.

Decode rows (one query token) are put in groups that read the same number of pages, so that a group is one
gather and one product. The number is the row's own page count rounded up to a bucket, never that of its
neighbours: a row's arithmetic then does not depend on what else is in the batch. Prefill rows stand alone.

A group of n rows that read P pages of G tokens sees L = P * G keys a row::

    page:      first ............. last | padding, points to `first` again
    key:       [ before the window ][ visible ][ tail of `last` ][ padding ]
                        masked                  masked, zeroed      masked

The tail of a row's last page may hold what an earlier request left there, or NaN. A mask alone is not
enough, because 0 * NaN is NaN: the tail is zeroed after the gather, and padding repeats a page that is full.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_serve.layers.attention import KVLayer
from lora_serve.layers.step_context import AttentionMetadata

# Elements of K (and of V) gathered at once. Larger copies leave the cache and go back to the operating system
# after each layer: with 64 MiB instead of 4 MiB a decode step of 32 rows with 1,024 keys was 7 times slower.
_MAX_GATHERED_ELEMENTS = 1 << 20


@dataclass(frozen=True, eq=False)
class DecodeGroup:
    """Decode rows that are computed together.

    Parameters
    ----------
    tokens
        [n] int64: the rows' places in the step.
    pages
        [n * P] int64: page ids, row after row.
    tail
        [m] int64: places in the n * P * G gathered keys that hold no token of the row.
    mask
        [n, 1, 1, P * G] bool: True = visible.
    """

    tokens: Tensor
    pages: Tensor
    tail: Tensor
    mask: Tensor


@dataclass(frozen=True, eq=False)
class PrefillRow:
    """One row with several query tokens, or a first chunk.

    Parameters
    ----------
    start, stop
        The row's tokens in the step.
    pages
        [p] int64: pages to read.
    num_keys
        Leading keys of the gathered pages that are tokens of the row, those of this step included.
    mask
        [stop - start, num_keys] bool: True = visible; None = plain causal.
    """

    start: int
    stop: int
    pages: Tensor
    num_keys: int
    mask: Tensor | None


@dataclass(frozen=True, eq=False)
class WindowPlan:
    """A step's work for all layers with the same sliding window.

    Parameters
    ----------
    decode_groups
        Disjoint groups of decode rows.
    prefill_rows
        The other rows.
    """

    decode_groups: list[DecodeGroup]
    prefill_rows: list[PrefillRow]


class TorchAttentionPlan:
    """A step's plan: the work of the layers, by their sliding window (None = no window).

    Parameters
    ----------
    metadata
        Rows, lengths and pages of the step.
    kv_layer
        The pages of any layer, for their shape.
    windows
        Distinct sliding windows of the layers.

    Attributes
    ----------
    num_tokens : int
        T, of all rows.
    by_window : dict from int or None to WindowPlan
        The work.

    Raises
    ------
    ValueError
        There is not one sequence length a row, or a row is empty or shorter than its chunk.
    """

    def __init__(
        self, metadata: AttentionMetadata, kv_layer: KVLayer, windows: Collection[int | None]
    ) -> None:
        # Numbers of Python, whatever the caller has: numpy's lack bit_length, and overflow.
        query_lens = [int(length) for length in metadata.host_query_lens]
        seq_lens = [int(length) for length in metadata.host_seq_lens]
        if len(query_lens) != len(seq_lens):
            raise ValueError(
                f"the step has {len(query_lens)} query lengths and {len(seq_lens)} sequence lengths"
            )
        if any(query < 1 or query > seq for query, seq in zip(query_lens, seq_lens, strict=True)):
            raise ValueError(f"query lengths {query_lens} must be at least 1 and at most {seq_lens}")
        self.metadata = metadata
        self.num_tokens = sum(query_lens)
        self._query_lens, self._seq_lens = query_lens, seq_lens
        self._page_size = kv_layer.page_size
        self._max_gathered_pages = max(1, _MAX_GATHERED_ELEMENTS // kv_layer.k[0].numel())
        self.by_window = {window: self._make_window_plan(window) for window in windows}

    def _make_window_plan(self, window: int | None) -> WindowPlan:
        buckets: dict[int, list[tuple[int, int]]] = {}
        prefill_rows: list[PrefillRow] = []
        start = 0
        lens = zip(self._query_lens, self._seq_lens, strict=True)
        for row, (query_len, seq_len) in enumerate(lens):
            if query_len == 1:
                num_pages = self._num_pages(seq_len) - self._first_page(seq_len - 1, window)
                buckets.setdefault(page_count_bucket(num_pages), []).append((row, start))
            else:
                prefill_rows.append(self._make_prefill_row(row, start, window))
            start += query_len
        groups: list[DecodeGroup] = []
        for num_pages, members in sorted(buckets.items()):
            size = max(1, self._max_gathered_pages // num_pages)
            groups += [
                self._make_decode_group(members[begin : begin + size], num_pages, window)
                for begin in range(0, len(members), size)
            ]
        return WindowPlan(groups, prefill_rows)

    def _num_pages(self, num_tokens: int) -> int:
        return -(-num_tokens // self._page_size)

    def _first_page(self, position: int, window: int | None) -> int:
        """Page of the oldest token that the token at this position sees."""
        return 0 if window is None else max(0, position - window + 1) // self._page_size

    def _make_decode_group(
        self, members: list[tuple[int, int]], num_pages: int, window: int | None
    ) -> DecodeGroup:
        table = self.metadata.page_table
        device, page_size = table.device, self._page_size
        rows = [row for row, _ in members]
        seq_lens = [self._seq_lens[row] for row in rows]
        lens = torch.tensor(seq_lens, device=device)[:, None]
        first = torch.tensor([self._first_page(n - 1, window) for n in seq_lens], device=device)[:, None]
        last = torch.tensor([self._num_pages(n) - 1 for n in seq_lens], device=device)[:, None]

        columns = first + torch.arange(num_pages, device=device)
        is_padding = columns > last
        row_index = torch.tensor(rows, device=device)[:, None]
        pages = table[row_index, torch.where(is_padding, first, columns)].flatten().long()

        positions = first * page_size + torch.arange(num_pages * page_size, device=device)
        visible = positions < lens
        tail = ~visible & ~is_padding.repeat_interleave(page_size, dim=1)
        if window is not None:
            visible &= positions >= lens - window
        return DecodeGroup(
            tokens=torch.tensor([start for _, start in members], device=device),
            pages=pages,
            tail=tail.flatten().nonzero().flatten(),
            mask=visible[:, None, None, :],
        )

    def _make_prefill_row(self, row: int, start: int, window: int | None) -> PrefillRow:
        query_len = self._query_lens[row]
        seq_len = self._seq_lens[row]
        num_computed = seq_len - query_len
        first_page = self._first_page(num_computed, window)
        first_key = first_page * self._page_size
        pages = self.metadata.page_table[row, first_page : self._num_pages(seq_len)].long()
        mask = None
        if num_computed > 0 or (window is not None and window < query_len):
            device = self.metadata.page_table.device
            queries = torch.arange(num_computed, seq_len, device=device)[:, None]
            keys = torch.arange(first_key, seq_len, device=device)
            mask = keys <= queries
            if window is not None:
                mask &= keys > queries - window
        return PrefillRow(start, start + query_len, pages, seq_len - first_key, mask)


def page_count_bucket(num_pages: int) -> int:
    """Round a row's page count up so that few different counts occur, at most a quarter above.

    Counts up to 8 stay; above, the three leading bits are kept and rounded up (10, 12, 14, 16, 20, 24, ...).
    """
    step = 1 << max(0, (num_pages - 1).bit_length() - 3)
    return -(-num_pages // step) * step
