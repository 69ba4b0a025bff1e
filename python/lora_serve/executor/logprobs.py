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
    normaliser = torch.logsumexp(logits, dim=-1, keepdim=True)
    chosen = torch.tensor(token_ids, dtype=torch.int64, device=logits.device).unsqueeze(1)
    chosen_logits = logits.gather(1, chosen)
    ranks = (logits > chosen_logits).sum(dim=-1) + 1
    num_kept = min(max(num_top), logits.shape[1])
    top_logits, top_ids = logits.topk(num_kept, dim=-1)

    host_logprobs = (chosen_logits - normaliser).squeeze(1).tolist()
    host_ranks = ranks.tolist()
    host_top_logprobs = (top_logits - normaliser).cpu().numpy()
    host_top_ids = top_ids.to(torch.int32).cpu().numpy()
    order = np.lexsort((host_top_ids, -host_top_logprobs), axis=-1)
    host_top_logprobs = np.take_along_axis(host_top_logprobs, order, axis=-1)
    host_top_ids = np.take_along_axis(host_top_ids, order, axis=-1)
    return [
        TokenLogprobs(
            token_id=int(token_id),
            logprob=host_logprobs[row],
            rank=host_ranks[row],
            top_token_ids=host_top_ids[row, : num_top[row]].copy(),
            top_logprobs=host_top_logprobs[row, : num_top[row]].copy(),
        )
        for row, token_id in enumerate(token_ids)
    ]
