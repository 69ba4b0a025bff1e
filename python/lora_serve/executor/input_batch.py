"""Turns a plan's rows into the model's input tensors: the only place where page ids become positions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lora_serve.common.errors import InternalError
from lora_serve.executor.page_table import PageTable
from lora_serve.kernels import LoRAMetadata
from lora_serve.kernels.lora_tiles import as_lists
from lora_serve.layers.step_context import AttentionMetadata, StepContext

if TYPE_CHECKING:
    from lora_serve.scheduler import ExecutionPlan


@dataclass(frozen=True)
class InputBatch:
    """Input of one forward pass. Axes: B rows, T tokens, row after row.

    Parameters
    ----------
    token_ids : Tensor
        [T] int64 in memory of its own. -1 = the token that the row sampled last: only the executor knows it,
        and fills it in before the model sees it.
    context : StepContext
        Positions, places in the KV tensors and adapter metadata.
    attention : AttentionMetadata
        Rows, lengths and pages.
    query_start_loc : numpy.ndarray
        [B + 1] int64 on the host; row b's tokens are [query_start_loc[b], query_start_loc[b + 1]).
    """

    token_ids: Tensor
    context: StepContext
    attention: AttentionMetadata
    query_start_loc: npt.NDArray[np.int64]


def token_positions(plan: ExecutionPlan) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Row and sequence position of every token of a plan.

    Returns
    -------
    tuple of numpy.ndarray
        [T] int64 row indices in [0, B), and [T] int64 positions; row b's run over
        [num_computed_tokens[b], num_computed_tokens[b] + num_scheduled_tokens[b]).
    """
    num_scheduled = plan.num_scheduled_tokens.astype(np.int64)
    token_rows = np.repeat(np.arange(len(num_scheduled), dtype=np.int64), num_scheduled)
    row_starts = np.cumsum(num_scheduled) - num_scheduled
    first_positions = plan.num_computed_tokens.astype(np.int64) - row_starts
    return token_rows, np.arange(len(token_rows), dtype=np.int64) + first_positions[token_rows]


def slot_mapping(
    row_pages: npt.NDArray[np.int32],
    token_rows: npt.NDArray[np.int64],
    positions: npt.NDArray[np.int64],
    page_size: int,
) -> npt.NDArray[np.int64]:
    """Flat position in the KV tensors of each token.

    Parameters
    ----------
    row_pages : numpy.ndarray
        [B, max_pages] int32 page ids.
    token_rows, positions : numpy.ndarray
        [T] int64 row and position of each token.
    page_size : int
        Tokens of a page.

    Returns
    -------
    numpy.ndarray
        [T] int64: page id * page_size + offset in the page.
    """
    page_ids = row_pages[token_rows, positions // page_size].astype(np.int64)
    slots: npt.NDArray[np.int64] = page_ids * page_size + positions % page_size
    return slots


class _BlockOnDevice:
    """The plan's block on the device, brought there by one copy."""

    def __init__(self, plan: ExecutionPlan, device: torch.device) -> None:
        self._plan = plan
        self._layout = plan.layout
        # A copy also on the CPU: the memory is read-only here, and a later plan is written into it.
        self._block = torch.from_numpy(plan.block.copy()).to(device)

    def __getitem__(self, name: str) -> Tensor:
        """An array of the plan, without padded entries, as a view of the block."""
        num_entries = len(getattr(self._plan, name))
        return self._block[self._layout[name]][:num_entries]


def _lora_metadata(plan: ExecutionPlan, block: _BlockOnDevice) -> LoRAMetadata:
    return LoRAMetadata(
        token_lora_mapping=block["token_lora_mapping"],
        token_indices_sorted_by_lora_ids=block["token_indices_sorted_by_lora_ids"],
        num_tokens_per_lora=block["num_tokens_per_lora"],
        lora_token_start_loc=block["lora_token_start_loc"],
        active_lora_ids=block["active_lora_ids"],
        lora_tiles=as_lists(block["lora_tiles"]),
        no_adapter=plan.num_adapters == 0,
    )


def _check_tokens(plan: ExecutionPlan) -> None:
    num_scheduled, num_tokens = int(plan.num_scheduled_tokens.sum()), len(plan.token_ids)
    if num_scheduled != num_tokens or int(plan.query_start_loc[-1]) != num_tokens:
        raise InternalError(
            f"plan {plan.plan_id} schedules {num_scheduled} tokens but gives {num_tokens}, and its rows end "
            f"at {plan.query_start_loc[-1]}"
        )
    if int(plan.token_ids.min()) < -1:
        raise InternalError(f"plan {plan.plan_id} has token id {plan.token_ids.min()}")


def build_input_batch(
    plan: ExecutionPlan,
    page_table: PageTable,
    *,
    page_size: int,
    device: torch.device,
    adapts_embedding: bool = True,
) -> InputBatch:
    """Build the tensors of a plan that has rows; its deltas must be in the page table already.

    Parameters
    ----------
    plan : ExecutionPlan
        The step.
    page_table : PageTable
        Of all rows.
    page_size : int
        Tokens of a page.
    device : torch.device
        Where the model is.
    adapts_embedding : bool
        Some adapter of the step may have weights for the token embedding.

    Raises
    ------
    InternalError
        The plan's arrays do not fit together, or a row lacks pages.

    Notes
    -----
    What the plan has computed (lengths, starts, adapter metadata) comes to the device in one copy of its
    block, without padded rows.
    """
    _check_tokens(plan)
    token_rows, positions = token_positions(plan)
    seq_lens = plan.seq_lens
    row_pages = page_table.rows(plan.page_table_rows, -(-seq_lens // page_size))
    slots = slot_mapping(row_pages, token_rows, positions, page_size)
    block = _BlockOnDevice(plan, device)
    attention = AttentionMetadata(
        query_start_loc=block["query_start_loc"],
        num_computed_tokens=block["num_computed_tokens"],
        seq_lens=block["seq_lens"],
        page_table=torch.from_numpy(row_pages).to(device),
        host_query_lens=plan.num_scheduled_tokens.tolist(),
        host_seq_lens=seq_lens.tolist(),
    )
    context = StepContext(
        positions=torch.from_numpy(positions).to(device),
        slot_mapping=torch.from_numpy(slots).to(device),
        lora=_lora_metadata(plan, block),
        adapts_embedding=adapts_embedding,
    )
    return InputBatch(
        token_ids=block["token_ids"].to(torch.int64),
        context=context,
        attention=attention,
        query_start_loc=plan.query_start_loc.astype(np.int64),
    )
