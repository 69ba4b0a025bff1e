"""Changes of logits before temperature: bias, banned stop tokens, penalties, grammars."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lora_serve.executor.sampling_state import SamplingState


class LogitChanges(NamedTuple):
    """What is to be changed in logits [N, V], on the host. Places are ``row * V + token id``.

    Parameters
    ----------
    biased_places : numpy.ndarray
        [A] int32, no two alike.
    biases : numpy.ndarray
        [A] float32, what is added there.
    banned_places : numpy.ndarray
        [S] int32, logits that become -inf.
    counted_places : numpy.ndarray
        [U] int32, tokens of the prompts and outputs of rows with penalties; no two alike.
    output_counts : numpy.ndarray
        [U] float32, how often each occurs in the output.
    penalties : numpy.ndarray
        [3 * N] float32: for each row its repetition, frequency and presence penalty.
    masked_rows : numpy.ndarray
        [M] int32, rows under a grammar, no two alike.
    masks : numpy.ndarray
        [M * ceil(V / 32)] int32: for each its allowed tokens, a bit each; the others become -inf.
    """

    biased_places: npt.NDArray[np.int32]
    biases: npt.NDArray[np.float32]
    banned_places: npt.NDArray[np.int32]
    counted_places: npt.NDArray[np.int32]
    output_counts: npt.NDArray[np.float32]
    penalties: npt.NDArray[np.float32]
    masked_rows: npt.NDArray[np.int32]
    masks: npt.NDArray[np.int32]


def adjust_logits(logits: Tensor, states: Sequence[SamplingState]) -> None:
    """Apply logit_bias, the min_tokens ban, penalties and grammars in turn, each to the rows that have it.

    Parameters
    ----------
    logits : Tensor
        [N, V] float32, contiguous, changed in place.
    states : sequence of SamplingState
        N, aligned with the rows; their outputs are known.

    Notes
    -----
    O(entries touched): tokens with a bias, banned tokens, the distinct tokens of rows with penalties, all of
    rows under a grammar.
    """
    num_outputs = [len(state.output_token_ids) for state in states]
    changes = collect_changes(states, num_outputs, logits.shape[1])
    apply_changes(logits, [torch.from_numpy(array).to(logits.device) for array in changes])


def collect_changes(
    states: Sequence[SamplingState], num_outputs: Sequence[int], vocab_size: int
) -> LogitChanges:
    """Say what the parameters change.

    Parameters
    ----------
    states : sequence of SamplingState
        N. Their outputs, and grammars, are read only where `needs_outputs` is true.
    num_outputs : sequence of int
        N, tokens that each has sampled before.
    vocab_size : int
        V.
    """
    biased: list[int] = []
    biases: list[float] = []
    banned: list[int] = []
    counted: list[npt.NDArray[np.int64]] = []
    counts: list[npt.NDArray[np.float32]] = []
    penalties = np.zeros((len(states), 3), dtype=np.float32)
    masked: list[int] = []
    masks: list[npt.NDArray[np.int32]] = []
    for row, (state, num_output) in enumerate(zip(states, num_outputs, strict=True)):
        params, start = state.params, row * vocab_size
        if params.logit_bias:
            biased.extend(start + token_id for token_id in params.logit_bias)
            biases.extend(params.logit_bias.values())
        if state.bans_stop_tokens_at(num_output):
            banned.extend(start + token_id for token_id in state.stop_ids)
        if state.token_counts is not None:
            counted.append(start + state.token_counts.token_ids)
            counts.append(state.token_counts.output_counts)
            penalties[row] = params.repetition_penalty, params.frequency_penalty, params.presence_penalty
        if state.restriction is not None and state.restriction.restricts:
            masked.append(row)
            masks.append(state.restriction.next_mask())
    return LogitChanges(
        np.array(biased, dtype=np.int32),
        np.array(biases, dtype=np.float32),
        np.array(banned, dtype=np.int32),
        np.concatenate(counted, dtype=np.int32, casting="same_kind") if counted else np.empty(0, np.int32),
        np.concatenate(counts) if counts else np.empty(0, np.float32),
        penalties.reshape(-1),
        np.array(masked, dtype=np.int32),
        np.concatenate(masks) if masks else np.empty(0, np.int32),
    )


def apply_changes(logits: Tensor, changes: Sequence[Tensor]) -> None:
    """Change logits as `collect_changes` says.

    Parameters
    ----------
    logits : Tensor
        [N, V] float32, contiguous, changed in place.
    changes : sequence of Tensor
        The arrays of a `LogitChanges`, on the logits' device.

    Notes
    -----
    Does not wait for the device. Semantics of penalties, for a token of count c in the output:
        l = l / repetition if l > 0 else l * repetition     (token in prompt or output)
        l = l - frequency * c - presence * [c > 0]
    """
    biased, biases, banned, counted, counts, penalties, masked, masks = changes
    flat = logits.view(-1)
    if len(biased):
        flat.index_add_(0, biased.long(), biases)
    if len(banned):
        flat.index_fill_(0, banned.long(), -torch.inf)
    if len(counted):
        places = counted.long()
        of_token = penalties.view(-1, 3).index_select(0, places // logits.shape[1])
        repetition, frequency, presence = of_token.unbind(1)
        values = flat.index_select(0, places)
        values = torch.where(values > 0, values / repetition, values * repetition)
        values -= frequency * counts + presence * (counts > 0)
        flat.index_copy_(0, places, values)
    if len(masked):
        rows = masked.long()
        is_allowed = _unpack(masks.view(len(masked), -1), logits.shape[1])
        logits.index_copy_(0, rows, logits.index_select(0, rows).masked_fill_(~is_allowed, -torch.inf))


def _unpack(masks: Tensor, vocab_size: int) -> Tensor:
    """[M, ceil(V / 32)] int32 to [M, V] bool, the lowest bit first; machines here are little-endian."""
    shifts = torch.arange(8, dtype=torch.uint8, device=masks.device)
    bits = masks.view(torch.uint8).unsqueeze(-1).bitwise_right_shift(shifts).bitwise_and_(1)
    return bits.view(len(masks), -1)[:, :vocab_size].bool()
