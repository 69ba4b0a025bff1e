"""Cuts the tail of a distribution: min_p, top_k, top_p."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lora_serve.common.sampling_params import SamplingParams

_FIRST_TOP_P_WIDTH = 1024
"""Most nuclei are smaller than this; its top-k costs a twentieth of sorting a vocabulary of 150,000."""
_TOP_P_WIDTH_GROWTH = 8


def truncate(scores: Tensor, params: Sequence[SamplingParams]) -> None:
    """Set the tokens that min_p, top_k and then top_p drop to -inf, each only in the rows that use it.

    Parameters
    ----------
    scores : Tensor
        [N, V] float32, logits divided by the temperature, less their row's maximum (so the best is 0);
        changed in place.
    params : sequence of SamplingParams
        N, aligned with the rows.

    Notes
    -----
    Semantics, with p the softmax of what the cut before has left:
        min_p keeps tokens of p >= min_p * max(p);
        top_k keeps the k best;
        top_p keeps the fewest best tokens that together reach top_p.
    A token exactly as good as the last one kept is kept too, so the result never depends on a sort's order.
    """
    vocab_size = scores.shape[1]
    with_min_p = [row for row, p in enumerate(params) if p.min_p > 0]
    if with_min_p:
        thresholds = [math.log(params[row].min_p) for row in with_min_p]
        _drop_below(scores, with_min_p, _column(thresholds, scores))
    with_top_k = [row for row, p in enumerate(params) if 0 < p.top_k < vocab_size]
    if with_top_k:
        _drop_below(scores, with_top_k, _top_k_thresholds(scores, with_top_k, params))
    with_top_p = [row for row, p in enumerate(params) if p.top_p < 1]
    if with_top_p:
        _apply_top_p(scores, with_top_p, [params[row].top_p for row in with_top_p])


def _column(values: list[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device).unsqueeze(1)


def _drop_below(scores: Tensor, rows: list[int], thresholds: Tensor) -> None:
    """Set scores[rows] to -inf where they are below thresholds [len(rows), 1]."""
    if len(rows) == scores.shape[0]:
        scores.masked_fill_(scores < thresholds, -torch.inf)
        return
    index = torch.tensor(rows, device=scores.device)
    kept = scores[index]
    scores[index] = kept.masked_fill_(kept < thresholds, -torch.inf)


def _top_k_thresholds(scores: Tensor, rows: list[int], params: Sequence[SamplingParams]) -> Tensor:
    counts = torch.tensor([params[row].top_k for row in rows], device=scores.device)
    best = scores[torch.tensor(rows, device=scores.device)].topk(int(counts.max()), dim=-1).values
    return best.gather(1, (counts - 1).unsqueeze(1))


def _apply_top_p(scores: Tensor, rows: list[int], top_p: list[float]) -> None:
    """Widen the sorted head of each row until it holds the nucleus, then cut at the nucleus' last score."""
    width = min(_FIRST_TOP_P_WIDTH, scores.shape[1])
    while rows:
        selected = scores[torch.tensor(rows, device=scores.device)]
        totals = selected.exp().sum(dim=-1, keepdim=True, dtype=torch.float64)
        best = selected.topk(width, dim=-1).values
        cumulative = best.exp().cumsum(dim=-1, dtype=torch.float64) / totals
        wanted = torch.tensor(top_p, dtype=torch.float64, device=scores.device).unsqueeze(1)
        # Token i is needed when the ones before it do not reach top_p; the best one always is.
        last = (cumulative[:, :-1] < wanted).sum(dim=-1, keepdim=True)
        thresholds = best.gather(1, last)
        is_complete = (cumulative[:, -1:] >= wanted) | (width == scores.shape[1])
        done = [i for i, complete in enumerate(is_complete.squeeze(1).tolist()) if complete]
        if done:
            _drop_below(scores, [rows[i] for i in done], thresholds[torch.tensor(done, device=scores.device)])
        done_set = set(done)
        rows, top_p = (
            [row for i, row in enumerate(rows) if i not in done_set],
            [p for i, p in enumerate(top_p) if i not in done_set],
        )
        width = min(width * _TOP_P_WIDTH_GROWTH, scores.shape[1])
