"""A plan's rows as tensors on a CUDA device, in memory that never moves.

One small kernel brings the plan's block over (see `kernels.host_copy`), two more turn it into what the model
reads. Nothing here waits for the device, and nothing depends on what an earlier, still running step will
sample: tokens that are not known yet are taken from `last_tokens` on the device. CUDA graphs keep the
addresses, so every step of the same padded size finds its inputs at the same places.

What is copied in one piece, from pinned memory::

    [ plan.block | page_indptr [P + 1] | sampled rows [N] | last token of each [N] ]
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lora_serve.executor.last_tokens import NO_TOKEN
from lora_serve.executor.pinned_buffers import PinnedBuffers
from lora_serve.kernels import LoRAMetadata
from lora_serve.kernels.host_copy import copy_small
from lora_serve.kernels.lora_tiles import TILE_FIELDS, TILE_KINDS, as_lists, num_tile_entries
from lora_serve.kernels.step_inputs import apply_page_table_deltas, prepare_step
from lora_serve.layers.step_context import AttentionMetadata, HostLengths, StepContext

if TYPE_CHECKING:
    from lora_serve.scheduler import ExecutionPlan


@dataclass(frozen=True, eq=False)
class DeviceStep:
    """Input of one forward pass. Axes: P rows and T tokens, padding included; N rows that sample.

    Parameters
    ----------
    token_ids : Tensor
        [T] int64.
    context : StepContext
        Positions, KV places and adapters of the tokens.
    attention : AttentionMetadata
        Rows, lengths and pages.
    page_table_rows : Tensor
        [P] int32: row of the page table and of `last_tokens`; the one behind the last for padded rows.
    row_failed : Tensor
        [P] int32: 1 = the row has no input token, because it failed in the plan before.
    sampled_rows, sampled_tokens : Tensor
        [N] int32: the rows that sample, and the last token of each in the step.
    host_sampled_rows : numpy.ndarray
        [N] `sampled_rows` on the host.
    is_decode : bool
        Every row has one token.
    """

    token_ids: Tensor
    context: StepContext
    attention: AttentionMetadata
    page_table_rows: Tensor
    row_failed: Tensor
    sampled_rows: Tensor
    sampled_tokens: Tensor
    host_sampled_rows: npt.NDArray[np.int64]
    is_decode: bool


class DeviceInputs:
    """The static memory of a step's inputs.

    Owns the page table and the last token of each row on the device, which outlive a step; everything else
    is written anew in each, in the order of the execution stream.

    Parameters
    ----------
    max_num_seqs
        Rows of the page table. One more is there for padded rows.
    max_num_tokens
        Tokens of a step, padding included.
    max_pages_per_row
        Pages of the longest request.
    max_loras
        Distinct adapters in one step.
    page_size
        Tokens of a page.
    needs_row_pages
        True: `AttentionMetadata.page_table` is filled, which only the torch attention backend reads.
    num_buffers
        Plans that may be on their way.
    device
        Where; the CPU in tests.
    """

    def __init__(
        self,
        *,
        max_num_seqs: int,
        max_num_tokens: int,
        max_pages_per_row: int,
        max_loras: int,
        page_size: int,
        needs_row_pages: bool,
        num_buffers: int,
        device: torch.device,
    ) -> None:
        def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self._page_size = page_size
        self._needs_row_pages = needs_row_pages
        self._staging = PinnedBuffers(num_buffers, device)
        # Whatever deltas a plan has: each row's pages change at most as a whole.
        most_pages = (max_num_seqs + 1) * max_pages_per_row
        most_tiles = num_tile_entries(max_num_tokens, max_loras + 1)
        self._lora_tiles = zeros(len(TILE_KINDS), most_tiles, TILE_FIELDS)
        most_entries = 3 * max_num_tokens + 16 * max_num_seqs + 8 * max_loras + self._lora_tiles.numel()
        self._block = zeros(most_entries + most_pages + 1024)
        self.page_table = zeros(max_num_seqs + 1, max_pages_per_row)
        self.last_tokens = torch.full_like(zeros(max_num_seqs + 1), NO_TOKEN)
        self.page_indices = zeros(most_pages)
        self._row_failed = zeros(max_num_seqs + 1)
        self._token_ids = zeros(max_num_tokens, dtype=torch.int64)
        self._positions = zeros(max_num_tokens, dtype=torch.int64)
        self._slot_mapping = zeros(max_num_tokens, dtype=torch.int64)
        self._lora_of_tokens = zeros(2, max_num_tokens)
        # Sizes, starts and slots of the groups; see `LoRAMetadata`.
        self._lora_groups = (zeros(max_loras + 1), zeros(max_loras + 2), zeros(max_loras + 1))

    def load(self, plan: ExecutionPlan, *, adapts_embedding: bool) -> DeviceStep:
        """Bring a plan that has rows to the device, and change the page table.

        Parameters
        ----------
        plan
            No more plans than `num_buffers` are on their way, this one included. Its memory is not read any
            more when this returns.
        adapts_embedding
            Some adapter of the step has weights for the token embedding.

        Notes
        -----
        The result is valid until the execution stream reaches what the next call submits.
        """
        layout = plan.layout
        num_rows, num_tokens = plan.num_padded_rows, plan.num_padded_tokens
        is_decode = num_rows == num_tokens
        tail = _Tail.of(plan, self._page_size)
        block = self._copy(plan, tail)
        views = {name: block[place] for name, place in layout.items()}
        page_indptr, sampled_rows, sampled_tokens = tail.split(block[len(plan.block) :])
        if len(plan.delta_rows):
            apply_page_table_deltas(
                self.page_table,
                views["delta_rows"],
                views["delta_starts"],
                views["delta_offsets"],
                views["delta_pages"],
            )
        token_ids, row_failed = self._token_ids[:num_tokens], self._row_failed[:num_rows]
        context = StepContext(
            positions=self._positions[:num_tokens],
            slot_mapping=self._slot_mapping[:num_tokens],
            lora=self._lora_metadata(views, num_tokens, no_adapter=plan.num_adapters == 0),
            adapts_embedding=adapts_embedding,
        )
        prepare_step(
            views["num_scheduled_tokens"],
            views["num_computed_tokens"],
            views["query_start_loc"],
            views["page_table_rows"],
            views["token_ids"],
            self.page_table,
            self.last_tokens,
            page_indptr,
            page_size=self._page_size,
            token_ids_out=token_ids,
            positions_out=context.positions,
            slot_mapping_out=context.slot_mapping,
            page_indices_out=self.page_indices,
            row_failed_out=row_failed,
        )
        return DeviceStep(
            token_ids=token_ids,
            context=context,
            attention=self._attention_metadata(views, tail),
            page_table_rows=views["page_table_rows"],
            row_failed=row_failed,
            sampled_rows=sampled_rows,
            sampled_tokens=sampled_tokens,
            host_sampled_rows=tail.sampled_rows,
            is_decode=is_decode,
        )

    def prefill_step(self, num_tokens: int, *, has_adapters: bool) -> DeviceStep:
        """Give the tensors of a step of a padded number of tokens, as `pad` will leave them, for graphs.

        Parameters
        ----------
        num_tokens
            P of them.
        has_adapters
            Some token of the steps may have an adapter.

        Notes
        -----
        What depends on the rows is not there: no attention, nothing that samples. The tokens are written
        nowhere until `pad` says otherwise.
        """
        self._slot_mapping[:num_tokens].fill_(-1)
        context = StepContext(
            positions=self._positions[:num_tokens],
            slot_mapping=self._slot_mapping[:num_tokens],
            lora=self._padded_lora(num_tokens) if has_adapters else None,
            adapts_embedding=False,
        )
        nothing = self._block[:0]
        no_lengths = np.empty(0, dtype=np.int32)
        return DeviceStep(
            token_ids=self._token_ids[:num_tokens],
            context=context,
            attention=AttentionMetadata(*(nothing,) * 4, no_lengths, no_lengths),
            page_table_rows=nothing,
            row_failed=nothing,
            sampled_rows=nothing,
            sampled_tokens=nothing,
            host_sampled_rows=np.empty(0, dtype=np.int64),
            is_decode=False,
        )

    def pad(self, step: DeviceStep, num_tokens: int) -> None:
        """Put the step that was loaded last where graphs of a padded number of tokens read it.

        Parameters
        ----------
        step
            What `load` gave.
        num_tokens
            At least its own.

        Notes
        -----
        Padded tokens have the ids and positions of an earlier step, no adapter, and are written nowhere.
        """
        num_own = len(step.token_ids)
        self._slot_mapping[num_own:num_tokens].fill_(-1)
        if step.context.lora is None:
            return
        own, padded = step.context.lora, self._padded_lora(num_tokens)
        padded.token_lora_mapping[num_own:].fill_(-1)
        padded.token_lora_mapping[:num_own].copy_(own.token_lora_mapping)
        padded.token_indices_sorted_by_lora_ids[:num_own].copy_(own.token_indices_sorted_by_lora_ids)
        padded.num_tokens_per_lora.copy_(own.num_tokens_per_lora)
        padded.lora_token_start_loc.copy_(own.lora_token_start_loc)
        padded.active_lora_ids.copy_(own.active_lora_ids)
        padded.lora_tiles[:, : own.lora_tiles.shape[1]].copy_(own.lora_tiles)

    def decode_step(self, num_rows: int, layout: Mapping[str, slice], *, has_adapters: bool) -> DeviceStep:
        """Give the tensors of a decode step of a padded size, as `load` will give them, to capture a graph.

        Parameters
        ----------
        num_rows
            P, a padded size.
        layout
            `ExecutionPlan.layout` of a plan of this size.
        has_adapters
            Some row of the steps may have an adapter.

        Notes
        -----
        The arrays that follow the plan's block are not at fixed places, and are empty here.
        """
        views = {name: self._block[place] for name, place in layout.items()}
        context = StepContext(
            positions=self._positions[:num_rows],
            slot_mapping=self._slot_mapping[:num_rows],
            lora=self._lora_metadata(views, num_rows, no_adapter=not has_adapters),
            adapts_embedding=False,
        )
        ones = np.ones(num_rows, dtype=np.int32)
        nothing = np.empty(0, dtype=np.int64)
        tail = _Tail(np.arange(num_rows + 1, dtype=np.int32), nothing, nothing, ones, ones)
        return DeviceStep(
            token_ids=self._token_ids[:num_rows],
            context=context,
            attention=self._attention_metadata(views, tail),
            page_table_rows=views["page_table_rows"],
            row_failed=self._row_failed[:num_rows],
            sampled_rows=self._block[:0],
            sampled_tokens=self._block[:0],
            host_sampled_rows=nothing,
            is_decode=True,
        )

    def _copy(self, plan: ExecutionPlan, tail: _Tail) -> Tensor:
        """Copy the plan's block and its tail to the device in one piece."""
        num_entries = len(plan.block)
        total = num_entries + tail.num_entries
        staging = self._staging.take(total)
        array = staging.numpy()
        array[:num_entries] = plan.block
        tail.write(array[num_entries:total])
        copy_small(self._block[:total], staging[:total])
        return self._block[:total]

    def _padded_lora(self, num_tokens: int) -> LoRAMetadata:
        """The step that was padded last, for kernels alone: groups hold its own tokens, stale ones follow."""
        mapping, order = self._lora_of_tokens[:, :num_tokens]
        tiles = self._lora_tiles[:, : num_tile_entries(num_tokens, len(self._lora_groups[0]))]
        return LoRAMetadata(mapping, order, *self._lora_groups, tiles, no_adapter=False)

    def _lora_metadata(
        self, views: Mapping[str, Tensor], num_tokens: int, *, no_adapter: bool
    ) -> LoRAMetadata | None:
        if no_adapter:
            return None
        return LoRAMetadata(
            token_lora_mapping=views["token_lora_mapping"][:num_tokens],
            token_indices_sorted_by_lora_ids=views["token_indices_sorted_by_lora_ids"][:num_tokens],
            num_tokens_per_lora=views["num_tokens_per_lora"],
            lora_token_start_loc=views["lora_token_start_loc"],
            active_lora_ids=views["active_lora_ids"],
            lora_tiles=as_lists(views["lora_tiles"]),
            no_adapter=False,
        )

    def _attention_metadata(self, views: Mapping[str, Tensor], tail: _Tail) -> AttentionMetadata:
        row_pages = self.page_table[:0]
        query_lens: HostLengths = tail.query_lens
        seq_lens: HostLengths = tail.seq_lens
        if self._needs_row_pages:
            query_lens, seq_lens = tail.query_lens.tolist(), tail.seq_lens.tolist()
            width = int(np.diff(tail.page_indptr).max(initial=1))
            row_pages = self.page_table[:, :width].index_select(0, views["page_table_rows"])
        return AttentionMetadata(
            query_start_loc=views["query_start_loc"],
            num_computed_tokens=views["num_computed_tokens"],
            seq_lens=views["seq_lens"],
            page_table=row_pages,
            host_query_lens=query_lens,
            host_seq_lens=seq_lens,
            page_indices=self.page_indices,
            host_page_indptr=tail.page_indptr,
        )


@dataclass(frozen=True, eq=False)
class _Tail:
    """What is computed on the host beside the plan's own arrays.

    Padded rows have one token and one page here, so that nothing divides by zero; what they compute means
    nothing.
    """

    page_indptr: npt.NDArray[np.int32]  # [P + 1]
    sampled_rows: npt.NDArray[np.int64]  # [N]
    sampled_tokens: npt.NDArray[np.int64]  # [N]
    query_lens: npt.NDArray[np.int32]  # [P]
    seq_lens: npt.NDArray[np.int32]  # [P]

    @staticmethod
    def of(plan: ExecutionPlan, page_size: int) -> _Tail:
        num_rows, num_padded_rows = len(plan.request_ids), plan.num_padded_rows
        query_lens, seq_lens = np.ones((2, num_padded_rows), dtype=np.int32)
        query_lens[:num_rows] = plan.num_scheduled_tokens
        seq_lens[:num_rows] = plan.seq_lens
        page_indptr = np.zeros(num_padded_rows + 1, dtype=np.int32)
        np.cumsum(-(-seq_lens // page_size), out=page_indptr[1:])
        sampled_rows = np.flatnonzero(plan.samples_token)
        sampled_tokens = plan.query_start_loc[1:][sampled_rows].astype(np.int64) - 1
        return _Tail(page_indptr, sampled_rows, sampled_tokens, query_lens, seq_lens)

    @property
    def num_entries(self) -> int:
        return len(self.page_indptr) + 2 * len(self.sampled_rows)

    def write(self, entries: npt.NDArray[np.int32]) -> None:
        indptr, rows, tokens = self._places()
        entries[indptr], entries[rows], entries[tokens] = (
            self.page_indptr,
            self.sampled_rows,
            self.sampled_tokens,
        )

    def split(self, entries: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        indptr, rows, tokens = self._places()
        return entries[indptr], entries[rows], entries[tokens]

    def _places(self) -> tuple[slice, slice, slice]:
        num_indptr, num_sampled = len(self.page_indptr), len(self.sampled_rows)
        end = num_indptr + num_sampled
        return slice(num_indptr), slice(num_indptr, end), slice(end, end + num_sampled)
