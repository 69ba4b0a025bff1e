"""Log probabilities of chosen tokens under the model's raw logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenLogprobs:
    """Log probabilities at one position, of the raw model distribution (before bias, penalties, temperature).

    Parameters
    ----------
    token_id : int
        The token that stands at the position (sampled, or given by the prompt).
    logprob : float
        Its natural log probability, in (-inf, 0].
    rank : int
        1 + the number of tokens that are more probable.
    top_token_ids : numpy.ndarray
        [k] int32, the k most probable tokens, most probable first, equal ones by token id. k as requested,
        at most the vocabulary; 0 = none.
    top_logprobs : numpy.ndarray
        [k] float32, their log probabilities. Entry i has rank i + 1.
    """

    token_id: int
    logprob: float
    rank: int
    top_token_ids: npt.NDArray[np.int32]
    top_logprobs: npt.NDArray[np.float32]


def compute_token_logprobs(
    logits: Tensor, token_ids: Sequence[int], num_top: Sequence[int]
) -> list[TokenLogprobs]:
    """Log probability and rank of one token a row, and the most probable tokens of the row.

    Parameters
    ----------
    logits : Tensor
        [N, V] float32, unmodified model output; not changed.
    token_ids : sequence of int
        N tokens in [0, V).
    num_top : sequence of int
        N counts of most probable tokens to report; 0 = none.

    Returns
    -------
    list of TokenLogprobs
        One a row.

    Notes
    -----
    Waits for the device. O(N * V); a [N, V] log_softmax is never stored, only its normaliser.
    """
    if not token_ids:
        return []
    chosen = torch.tensor(token_ids, dtype=torch.int64, device=logits.device)
    num_kept = min(max(num_top), logits.shape[1])
    return read_logprobs(gather_logprobs(logits, chosen, num_kept).cpu().numpy(), token_ids, num_top)


def gather_logprobs(logits: Tensor, token_ids: Tensor, num_kept: int) -> Tensor:
    """Compute what `read_logprobs` reads, without waiting for the device.

    Parameters
    ----------
    logits : Tensor
        [N, V] float32; not changed.
    token_ids : Tensor
        [N] int64 in [0, V).
    num_kept : int
        Most probable tokens to find, in [0, V].

    Returns
    -------
    Tensor
        [N, 2 + 2 * num_kept] int32: the token's log probability, its rank, the log probabilities of the most
        probable tokens, their ids. Log probabilities are the bits of float32.
    """
    normaliser = torch.logsumexp(logits, dim=-1, keepdim=True)
    chosen_logits = logits.gather(1, token_ids.unsqueeze(1))
    ranks = (logits > chosen_logits).sum(dim=-1, keepdim=True, dtype=torch.int32) + 1
    top_logits, top_ids = logits.topk(num_kept, dim=-1)
    logprobs = (chosen_logits - normaliser).view(torch.int32)
    top_logprobs = (top_logits - normaliser).view(torch.int32)
    return torch.cat([logprobs, ranks, top_logprobs, top_ids.to(torch.int32)], dim=1)


def read_logprobs(
    entries: npt.NDArray[np.int32], token_ids: Sequence[int], num_top: Sequence[int]
) -> list[TokenLogprobs]:
    """Turn what `gather_logprobs` gave for the same tokens into objects, `num_top` tokens each."""
    num_kept = entries.shape[1] // 2 - 1
    logprobs = entries[:, 0].copy().view(np.float32).tolist()
    ranks = entries[:, 1].tolist()
    top_logprobs = entries[:, 2 : 2 + num_kept].copy().view(np.float32)
    top_ids = entries[:, 2 + num_kept :]
    order = np.lexsort((top_ids, -top_logprobs), axis=-1)
    top_logprobs = np.take_along_axis(top_logprobs, order, axis=-1)
    top_ids = np.take_along_axis(top_ids, order, axis=-1)
    return [
        TokenLogprobs(
            token_id=int(token_id),
            logprob=logprobs[row],
            rank=ranks[row],
            top_token_ids=top_ids[row, : num_top[row]].copy(),
            top_logprobs=top_logprobs[row, : num_top[row]].copy(),
        )
        for row, token_id in enumerate(token_ids)
    ]
