"""Changes of logits before temperature: bias, banned stop tokens, penalties."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from lora_serve.executor.sampling_state import SamplingState


def adjust_logits(logits: Tensor, states: Sequence[SamplingState]) -> None:
    """Apply logit_bias, then the min_tokens ban, then penalties, each only to the rows that have it.

    Parameters
    ----------
    logits : Tensor
        [N, V] float32, changed in place.
    states : sequence of SamplingState
        N, aligned with the rows.

    Notes
    -----
    O(entries touched): tokens with a bias, banned tokens, the distinct tokens of rows with penalties.
    """
    _add_logit_bias(logits, states)
    _ban_stop_tokens(logits, states)
    _apply_penalties(logits, states)


def _add_logit_bias(logits: Tensor, states: Sequence[SamplingState]) -> None:
    rows: list[int] = []
    token_ids: list[int] = []
    biases: list[float] = []
    for row, state in enumerate(states):
        if state.params.logit_bias:
            rows.extend([row] * len(state.params.logit_bias))
            token_ids.extend(state.params.logit_bias.keys())
            biases.extend(state.params.logit_bias.values())
    if rows:
        device = logits.device
        index = (torch.tensor(rows, device=device), torch.tensor(token_ids, device=device))
        logits[index] += torch.tensor(biases, dtype=logits.dtype, device=device)


def _ban_stop_tokens(logits: Tensor, states: Sequence[SamplingState]) -> None:
    rows: list[int] = []
    token_ids: list[int] = []
    for row, state in enumerate(states):
        if state.bans_stop_tokens:
            rows.extend([row] * len(state.stop_ids))
            token_ids.extend(state.stop_ids)
    if rows:
        device = logits.device
        logits[torch.tensor(rows, device=device), torch.tensor(token_ids, device=device)] = -torch.inf


def _apply_penalties(logits: Tensor, states: Sequence[SamplingState]) -> None:
    """Repetition over prompt and output, then frequency and presence over the output.

    Semantics, for a token of count c in the output:
        l = l / repetition if l > 0 else l * repetition     (token in prompt or output)
        l = l - frequency * c - presence * [c > 0]
    """
    penalised = [
        (row, state.params, state.token_counts)
        for row, state in enumerate(states)
        if state.token_counts is not None
    ]
    if not penalised:
        return
    sizes = [len(counts.token_ids) for _, _, counts in penalised]

    def spread(values: list[float]) -> Tensor:
        return torch.from_numpy(np.repeat(np.array(values, dtype=np.float32), sizes)).to(logits.device)

    rows = torch.from_numpy(np.repeat(np.array([row for row, _, _ in penalised]), sizes)).to(logits.device)
    token_ids = torch.from_numpy(np.concatenate([c.token_ids for _, _, c in penalised])).to(logits.device)
    counts = torch.from_numpy(np.concatenate([c.output_counts for _, _, c in penalised])).to(logits.device)
    repetition = spread([params.repetition_penalty for _, params, _ in penalised])
    frequency = spread([params.frequency_penalty for _, params, _ in penalised])
    presence = spread([params.presence_penalty for _, params, _ in penalised])

    values = logits[rows, token_ids]
    values = torch.where(values > 0, values / repetition, values * repetition)
    values -= frequency * counts + presence * (counts > 0)
    logits[rows, token_ids] = values
