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
from lora_serve.kernels.lora_metadata import build_lora_metadata
from lora_serve.layers.step_context import AttentionMetadata, StepContext

if TYPE_CHECKING:
    from lora_serve.scheduler import ExecutionPlan


@dataclass(frozen=True)
class InputBatch:
    """Input of one forward pass. Axes: B rows, T tokens, row after row.

    Parameters
    ----------
    token_ids : Tensor
        [T] int64.
    context : StepContext
        Positions, attention and adapter metadata.
    query_start_loc : numpy.ndarray
        [B + 1] int64 on the host; row b's tokens are [query_start_loc[b], query_start_loc[b + 1]).
    """

    token_ids: Tensor
    context: StepContext
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


def build_input_batch(
    plan: ExecutionPlan, page_table: PageTable, *, page_size: int, max_loras: int, device: torch.device
) -> InputBatch:
    """Build the tensors of a plan that has rows; its deltas must be in the page table already.

    Raises
    ------
    InternalError
        The plan's arrays do not fit together, a row lacks pages, or a token is one that only an overlapping
        executor knows.
    """
    token_rows, positions = token_positions(plan)
    if len(token_rows) != len(plan.token_ids):
        raise InternalError(
            f"plan {plan.plan_id} schedules {len(token_rows)} tokens but gives {len(plan.token_ids)}"
        )
    if int(plan.token_ids.min()) < 0:
        raise InternalError(
            f"plan {plan.plan_id} has token id {plan.token_ids.min()}: it was planned before the step that "
            "it depends on had ended, but this executor does not overlap steps"
        )
    seq_lens = plan.num_computed_tokens + plan.num_scheduled_tokens
    row_pages = page_table.rows(plan.page_table_rows, -(-seq_lens // page_size))
    slots = slot_mapping(row_pages, token_rows, positions, page_size)
    query_start_loc = np.zeros(len(seq_lens) + 1, dtype=np.int64)
    np.cumsum(plan.num_scheduled_tokens, out=query_start_loc[1:])

    def to_device(values: npt.NDArray[np.int32] | npt.NDArray[np.int64]) -> Tensor:
        # A plan's arrays are read-only views of memory that the scheduler reuses: always a copy.
        return torch.from_numpy(np.array(values)).to(device)

    attention = AttentionMetadata(
        query_start_loc=to_device(query_start_loc.astype(np.int32)),
        num_computed_tokens=to_device(plan.num_computed_tokens),
        seq_lens=to_device(seq_lens),
        page_table=to_device(row_pages),
        slot_mapping=to_device(slots),
        host_query_lens=plan.num_scheduled_tokens.tolist(),
        host_seq_lens=seq_lens.tolist(),
    )
    lora = build_lora_metadata(to_device(plan.adapter_slots[token_rows]), max_loras)
    context = StepContext(positions=to_device(positions), attention=attention, lora=lora)
    return InputBatch(
        token_ids=to_device(plan.token_ids.astype(np.int64)), context=context, query_start_loc=query_start_loc
    )
