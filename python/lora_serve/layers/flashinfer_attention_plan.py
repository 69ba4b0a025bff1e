"""How a step's rows are divided among FlashInfer's kernels, and how the plan reaches the device.

One piece of memory on the device, and one like it on the host, hold a step's plan::

    | qo_indptr [B + 2] | page_indptr [B + 2] | last_page_len [B + 2] | kv_lens [B + 2] | launch 0 | ...
    |<----------------------- one copy --------------------------->|     host only     | one copy each

Decode rows come first. They have one token each, so that row i of them is token i; `qo_indptr` of the rows
behind begins anew at 0, one entry further.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lora_serve.layers.attention import KVLayer
from lora_serve.layers.flashinfer_attention_kernels import (
    KernelShape,
    PagedKernel,
    PlanMemory,
    Rows,
    StepSize,
    fa2_float_bytes,
    fa2_int_bytes,
    fa3_int_bytes,
)
from lora_serve.layers.flashinfer_attention_staging import StagingRing
from lora_serve.layers.step_context import AttentionMetadata

Int32Array = npt.NDArray[np.int32]

_QO_INDPTR, _PAGE_INDPTR, _LAST_PAGE_LEN, _KV_LENS = range(4)
_NUM_COPIED = 3


@dataclass(frozen=True, eq=False)
class HostRows:
    """Lengths of a step's rows on the host, all int32.

    Parameters
    ----------
    query_lens, seq_lens
        [B] tokens of this step, and of the pages with this step's.
    page_indptr
        [B + 1] where a row's page indices begin.
    """

    query_lens: Int32Array
    seq_lens: Int32Array
    page_indptr: Int32Array

    @staticmethod
    def of(metadata: AttentionMetadata, page_size: int) -> HostRows:
        """Take the lengths of a step."""
        query_lens = np.asarray(metadata.host_query_lens, dtype=np.int32)
        seq_lens = np.asarray(metadata.host_seq_lens, dtype=np.int32)
        page_indptr = metadata.host_page_indptr
        if page_indptr is None:
            page_indptr = np.zeros(len(seq_lens) + 1, dtype=np.int32)
            np.cumsum(-(-seq_lens // page_size), out=page_indptr[1:])
        return HostRows(query_lens, seq_lens, page_indptr)

    @property
    def num_rows(self) -> int:
        """B."""
        return len(self.seq_lens)

    @property
    def num_decodes(self) -> int:
        """Leading rows of one token."""
        longer = self.query_lens > 1
        return int(longer.argmax()) if longer.any() else self.num_rows

    @property
    def num_tokens(self) -> int:
        """T."""
        return int(self.query_lens.sum())


@dataclass(frozen=True)
class Piece:
    """Rows that one launch covers.

    Parameters
    ----------
    kernel
        Runs them.
    first_row
        They go on from here.
    first_token
        Of the first row.
    size
        How many they are.
    is_causal
        A row has several tokens.
    """

    kernel: PagedKernel
    first_row: int
    first_token: int
    size: StepSize
    is_causal: bool

    def int_bytes(self, num_multiprocessors: int) -> int:
        """Bytes of the launch's plan."""
        bound = fa2_int_bytes if self.kernel.name == "fa2" else fa3_int_bytes
        return bound(self.kernel.shape, self.size, num_multiprocessors)

    def float_bytes(self, num_multiprocessors: int) -> int:
        """Bytes of partial results."""
        if self.kernel.name == "fa2":
            return fa2_float_bytes(self.kernel.shape, self.size, num_multiprocessors)
        return 256


def decode_pieces(
    kernels: Sequence[PagedKernel], num_rows: int, *, is_fixed: bool, is_split: bool = True
) -> list[Piece]:
    """Divide a step of decode rows: one launch for each kernel shape."""
    spare_splits = num_rows if is_split else 0
    size = StepSize(num_rows, num_rows, spare_splits=spare_splits, is_fixed=is_fixed, is_split=is_split)
    return [Piece(kernel, 0, 0, size, is_causal=False) for kernel in kernels]


def mixed_pieces(
    decode_kernels: Sequence[PagedKernel], prefill_kernels: Sequence[PagedKernel], rows: HostRows
) -> list[Piece]:
    """Divide a step: decode rows and the rows behind them apart, for each kernel shape.

    A tile of fa3 holds 128 tokens of one query head, so that a decode row fills 1/128 of it, and fa3 never
    splits the keys of a row; fa2 packs the heads and splits.
    """
    num_decodes = rows.num_decodes
    pieces = decode_pieces(decode_kernels, num_decodes, is_fixed=False) if num_decodes else []
    if num_decodes < rows.num_rows:
        num_rows, num_tokens = rows.num_rows - num_decodes, rows.num_tokens - num_decodes
        size = StepSize(num_rows, num_tokens, spare_splits=0, is_fixed=False)
        pieces += [
            Piece(kernel, num_decodes, num_decodes, size, is_causal=True) for kernel in prefill_kernels
        ]
    return pieces


@dataclass(frozen=True, eq=False)
class Launch:
    """A planned launch.

    Parameters
    ----------
    piece
        What it covers.
    memory
        Where its plan is, and where its partial results go.
    rows
        Its rows on the device.
    plan_info
        The places of the plan's arrays.
    """

    piece: Piece
    memory: PlanMemory
    rows: Rows
    plan_info: Any

    def run(
        self,
        query: Tensor,
        kv_layer: KVLayer,
        output: Tensor,
        page_indices: Tensor,
        scaling: float,
        *,
        launches_early: bool,
    ) -> None:
        """Attend for the launch's tokens of [T, Hq, D] queries."""
        first, num_tokens = self.piece.first_token, self.piece.size.num_tokens
        if num_tokens < query.shape[0]:
            query, output = query[first : first + num_tokens], output[first : first + num_tokens]
        self.piece.kernel.run(
            query,
            kv_layer,
            output,
            memory=self.memory,
            plan_info=self.plan_info,
            rows=self.rows,
            page_indices=page_indices,
            is_causal=self.piece.is_causal,
            scaling=scaling,
            launches_early=launches_early,
        )


class StepMemory:
    """The device memory of one step's plan.

    Parameters
    ----------
    pieces
        The step's launches.
    num_rows
        B.
    float_workspace
        uint8 on the device: partial results, of each launch in turn.
    num_multiprocessors
        Of the device.

    Notes
    -----
    Only :meth:`submit` and :meth:`submit_rows` write to it, in the order of the stream: they may be called
    again while the step before still reads it.
    """

    def __init__(
        self, pieces: Sequence[Piece], num_rows: int, float_workspace: Tensor, num_multiprocessors: int
    ) -> None:
        self._pieces = pieces
        self._float_workspace = float_workspace
        self._width = num_rows + 2
        sizes = [4 * 4 * self._width, *(piece.int_bytes(num_multiprocessors) for piece in pieces)]
        self._starts = np.cumsum([0, *(-(-size // 256) * 256 for size in sizes)]).tolist()
        self._device = torch.empty(self._starts[-1], dtype=torch.uint8, device=float_workspace.device)
        self._rows = self._device[: 4 * 4 * self._width].view(torch.int32).view(4, self._width)

    def submit(self, rows: HostRows, page_size: int, ring: StagingRing) -> list[Launch]:
        """Plan the step on the host and submit the copies to the current stream."""
        with ring.buffer(self._starts[-1]) as pinned:
            host = self._copy_rows(rows, page_size, pinned)
            return [
                self._submit(piece, start, stop, host, pinned, page_size)
                for piece, start, stop in zip(self._pieces, self._starts[1:-1], self._starts[2:], strict=True)
            ]

    def submit_rows(self, rows: HostRows, page_size: int, ring: StagingRing) -> None:
        """Submit another step's rows alone: the plan of the last :meth:`submit` is that of this step, too."""
        with ring.buffer(self._starts[1]) as pinned:
            self._copy_rows(rows, page_size, pinned)

    def _copy_rows(self, rows: HostRows, page_size: int, pinned: Tensor) -> Tensor:
        host = pinned[: 4 * 4 * self._width].view(torch.int32).view(4, self._width)
        fill_rows(host.numpy(), rows, page_size)
        self._rows[:_NUM_COPIED].copy_(host[:_NUM_COPIED], non_blocking=True)
        return host

    def _submit(
        self, piece: Piece, start: int, stop: int, host: Tensor, pinned: Tensor, page_size: int
    ) -> Launch:
        memory = PlanMemory(pinned[start:stop], self._device[start:stop], self._float_workspace)
        plan_info = piece.kernel.plan(
            memory, _rows_of(host, piece), piece.size, page_size, is_causal=piece.is_causal
        )
        return Launch(piece, memory, _rows_of(self._rows, piece), plan_info)


def fill_rows(table: Int32Array, rows: HostRows, page_size: int) -> None:
    """Write a step's rows as the kernels read them.

    Parameters
    ----------
    table
        [4, B + 2], see the module's head; unused entries keep what they hold.
    rows
        The step.
    page_size
        Tokens of a page.
    """
    num_rows, num_decodes = rows.num_rows, rows.num_decodes
    table[_QO_INDPTR, : num_decodes + 1] = np.arange(num_decodes + 1, dtype=np.int32)
    table[_QO_INDPTR, num_decodes + 1] = 0
    np.cumsum(rows.query_lens[num_decodes:], out=table[_QO_INDPTR, num_decodes + 2 :])
    table[_PAGE_INDPTR, : num_rows + 1] = rows.page_indptr
    num_full_pages = np.diff(rows.page_indptr) - 1
    table[_LAST_PAGE_LEN, :num_rows] = rows.seq_lens - num_full_pages * page_size
    table[_KV_LENS, :num_rows] = rows.seq_lens


def _rows_of(table: Tensor, piece: Piece) -> Rows:
    """Give a launch's rows as views of [4, B + 2]."""
    first, last = piece.first_row, piece.first_row + piece.size.num_rows
    shift = 1 if first or piece.is_causal else 0
    return Rows(
        qo_indptr=table[_QO_INDPTR, first + shift : last + 1 + shift],
        page_indptr=table[_PAGE_INDPTR, first : last + 1],
        last_page_len=table[_LAST_PAGE_LEN, first:last],
        kv_lens=table[_KV_LENS, first:last],
    )


def flat_page_indices(metadata: AttentionMetadata, page_indptr: Int32Array) -> Tensor:
    """Give the step's page ids row after row, from its page table where nobody has made them before.

    Returns
    -------
    Tensor
        [>= page_indptr[B]] int32 on the device.
    """
    if metadata.page_indices is not None:
        return metadata.page_indices
    num_pages = np.diff(page_indptr)
    rows = np.repeat(np.arange(len(num_pages), dtype=np.int64), num_pages)
    columns = np.arange(len(rows), dtype=np.int64) - page_indptr[rows]
    table = metadata.page_table
    places = torch.from_numpy(rows * table.shape[1] + columns).to(table.device)
    return table.flatten().index_select(0, places)


def unique_shapes(shapes: Sequence[KernelShape]) -> list[KernelShape]:
    """Give each shape once, in a fixed order."""
    return sorted(set(shapes), key=lambda shape: (shape.head_dim, shape.num_heads, shape.window_left))
