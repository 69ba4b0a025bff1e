"""Log probabilities of prompt tokens, gathered over the chunks of a prefill."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lora_serve.executor.logprobs import compute_token_logprobs
from lora_serve.executor.sampling_state import SamplingState
from lora_serve.kernels import LoRAMetadata, build_lora_metadata

if TYPE_CHECKING:
    from lora_serve.scheduler import ExecutionPlan

MAX_LOGIT_ROWS = 256
"""Rows of logits that exist at once: 256 rows of a vocabulary of 150,000 are 150 MB."""


def awaits_prompt_logprobs(state: SamplingState) -> bool:
    """Whether steps of a request's prompt still have to give log probabilities of its tokens."""
    return state.prompt_logprobs is not None and not state.output_token_ids


def needs_few_outputs(plan: ExecutionPlan, states: Sequence[SamplingState]) -> bool:
    """Whether few of a step's tokens are needed behind the last attention: those of rows that sample."""
    num_sampled, num_tokens = int(plan.samples_token.sum()), int(plan.num_scheduled_tokens.sum())
    return 2 * num_sampled <= num_tokens and not any(map(awaits_prompt_logprobs, states))


def fill_prompt_logprobs(
    plan: ExecutionPlan,
    states: Sequence[SamplingState],
    hidden: Tensor,
    query_start_loc: npt.NDArray[np.int64],
    compute_logits: Callable[[Tensor, LoRAMetadata], Tensor],
) -> dict[int, str]:
    """Write what this step has computed into the states that asked for prompt log probabilities.

    Parameters
    ----------
    plan : ExecutionPlan
        The step.
    states : sequence of SamplingState
        [B]; `prompt_logprobs` is written by position, so that a recomputed position is not written again.
    hidden : Tensor
        [T, H], all tokens of the step.
    query_start_loc : numpy.ndarray
        [B + 1]; row b's tokens are [query_start_loc[b], query_start_loc[b + 1]).
    compute_logits : callable
        [N, H], and these N rows grouped by adapter slot, to [N, V] float32.

    Returns
    -------
    dict from int to str
        Row to reason, for rows that cannot go on: logits that are not finite, or, when the row samples,
        prompt positions that no step has computed (a prefix was reused although it must not be).

    Notes
    -----
    The logits at position p give the log probability of prompt token p + 1, which may be the first of the
    next chunk. Logits are computed for at most 256 positions at a time.
    """
    row_errors: dict[int, str] = {}
    max_loras = len(plan.active_lora_ids) - 1
    for row, state in enumerate(states):
        if state.prompt_logprobs is None:
            continue
        start = int(plan.num_computed_tokens[row])
        end = min(start + int(plan.num_scheduled_tokens[row]), state.num_prompt_tokens - 1)
        positions = [p for p in range(start, end) if state.prompt_logprobs[p + 1] is None]
        offset = int(query_start_loc[row]) - start
        for first in range(0, len(positions), MAX_LOGIT_ROWS):
            piece = positions[first : first + MAX_LOGIT_ROWS]
            index = torch.tensor([offset + p for p in piece], device=hidden.device)
            slots = torch.full((len(piece),), int(plan.adapter_slots[row]), dtype=torch.int32)
            lora = build_lora_metadata(slots, max_loras, device=hidden.device)
            if not _fill(state, piece, compute_logits(hidden[index], lora)):
                row_errors[row] = "the model's logits of a prompt token are not finite"
                break
        if row not in row_errors and plan.samples_token[row] and (missing := state.missing_prompt_logprobs()):
            row_errors[row] = (
                f"prompt_logprobs were asked for, but {len(missing)} prompt tokens from {missing[0]} on were "
                "not computed by this request: it reused a prefix"
            )
    return row_errors


def _fill(state: SamplingState, positions: list[int], logits: Tensor) -> bool:
    """Store the entries after `positions`; False when a log probability is not finite."""
    assert state.prompt_logprobs is not None
    targets = [int(state.prompt_token_ids[p + 1]) for p in positions]
    num_top = [state.params.prompt_logprobs or 0] * len(positions)
    entries = compute_token_logprobs(logits, targets, num_top)
    if not all(math.isfinite(entry.logprob) for entry in entries):
        return False
    for position, entry in zip(positions, entries, strict=True):
        state.prompt_logprobs[position + 1] = entry
    return True
