"""Chooses the next token of every row from its logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lora_serve.executor.logit_adjustments import adjust_logits
from lora_serve.executor.logprobs import TokenLogprobs, compute_token_logprobs
from lora_serve.executor.sampling_state import SamplingState
from lora_serve.executor.truncation import truncate
from lora_serve.executor.uniform_stream import seeded_uniforms


@dataclass(frozen=True)
class SampledTokens:
    """The sampler's answer for N rows.

    Parameters
    ----------
    token_ids : numpy.ndarray
        [N] int32; -1 for rows in `row_errors`.
    logprobs : list of (TokenLogprobs or None)
        [N]; None where the request did not ask for them.
    row_errors : dict from int to str
        Row to reason, for rows that no token can be chosen for.
    """

    token_ids: npt.NDArray[np.int32]
    logprobs: list[TokenLogprobs | None]
    row_errors: dict[int, str]


def sample(logits: Tensor, states: Sequence[SamplingState]) -> SampledTokens:
    """Choose one token a row: bias, min_tokens ban, penalties, form, temperature, min_p, top_k, top_p, draw.

    A row's token is a function of its logits, its parameters, its earlier tokens and, for random rows, of
    (seed, number of its earlier tokens). It does not depend on the other rows or on preemptions.

    Parameters
    ----------
    logits : Tensor
        [N, V] float32, the model's output; not changed.
    states : sequence of SamplingState
        N, aligned with the rows; not changed. Those that draw have a seed.

    Returns
    -------
    SampledTokens
        Greedy rows take the best token, the lowest id among equals.

    Notes
    -----
    Waits for the device. When every row is greedy with nothing else asked for, the cost is one pass of `max`
    over the logits, which finds rows that are not finite as well.
    """
    num_rows = len(states)
    if num_rows == 0:
        return SampledTokens(np.empty(0, dtype=np.int32), [], {})
    best_values, best_ids = logits.max(dim=-1)
    token_ids = best_ids.to(torch.int32).cpu().numpy()
    logprobs: list[TokenLogprobs | None] = [None] * num_rows
    row_errors = _find_bad_rows(best_values, "the model's logits are not finite")
    if row_errors or not all(state.is_plain_greedy for state in states):
        good = [row for row in range(num_rows) if row not in row_errors]
        _choose_special_rows(logits, states, good, token_ids, row_errors)
        good = [row for row in good if row not in row_errors]
        _fill_logprobs(logits, states, good, token_ids, logprobs)
    for row in row_errors:
        token_ids[row] = -1
    return SampledTokens(token_ids, logprobs, row_errors)


def _choose_special_rows(
    logits: Tensor,
    states: Sequence[SamplingState],
    good: list[int],
    token_ids: npt.NDArray[np.int32],
    row_errors: dict[int, str],
) -> None:
    """Overwrite the tokens of rows that are random or whose logits are adjusted."""
    rows = [row for row in good if states[row].adjusts_logits or not states[row].params.is_greedy]
    if not rows:
        return
    chosen = [states[row] for row in rows]
    adjusted = logits[torch.tensor(rows, device=logits.device)]  # a copy: log probabilities stay raw
    adjust_logits(adjusted, chosen)
    best_values, best_ids = adjusted.max(dim=-1)
    bad = _find_bad_rows(best_values, "logit_bias, min_tokens, penalties and the form leave none to sample")
    row_errors.update({rows[i]: reason for i, reason in bad.items()})
    token_ids[rows] = best_ids.to(torch.int32).cpu().numpy()

    is_random = [i for i, state in enumerate(chosen) if i not in bad and not state.params.is_greedy]
    if is_random:
        index = torch.tensor(is_random, device=logits.device)
        scores = adjusted[index] - best_values[index].unsqueeze(1)
        token_ids[[rows[i] for i in is_random]] = _draw(scores, [chosen[i] for i in is_random])


def _draw(scores: Tensor, states: list[SamplingState]) -> npt.NDArray[np.int32]:
    """Draw from softmax(scores / temperature), cut by min_p, top_k, top_p; `scores` [N, V], best = 0.

    The inverse of the cumulative distribution in token order, at one uniform number a row: a token of
    probability 0 is never drawn, because its cumulative sum equals the one before.
    """
    temperatures = [state.params.temperature for state in states]
    scores /= torch.tensor(temperatures, dtype=scores.dtype, device=scores.device).unsqueeze(1)
    truncate(scores, [state.params for state in states])
    uniforms = seeded_uniforms(
        [state.drawing_seed for state in states], [len(state.output_token_ids) for state in states]
    )
    cumulative = scores.exp_().cumsum(dim=-1, dtype=torch.float64)
    targets = torch.from_numpy(uniforms).to(scores.device).unsqueeze(1) * cumulative[:, -1:]
    drawn = torch.searchsorted(cumulative, targets, right=True).squeeze(1)
    tokens: npt.NDArray[np.int32] = drawn.to(torch.int32).cpu().numpy()
    return tokens


def _find_bad_rows(best_values: Tensor, reason: str) -> dict[int, str]:
    """Rows whose maximum is NaN (any NaN makes it so) or infinite."""
    is_finite = torch.isfinite(best_values)
    if bool(is_finite.all()):
        return {}
    return {int(row): reason for row in (~is_finite).nonzero().flatten().tolist()}


def _fill_logprobs(
    logits: Tensor,
    states: Sequence[SamplingState],
    good: list[int],
    token_ids: npt.NDArray[np.int32],
    logprobs: list[TokenLogprobs | None],
) -> None:
    wanted = [(row, states[row].params.logprobs) for row in good]
    rows = [row for row, num_top in wanted if num_top is not None]
    if not rows:
        return
    selected = logits if len(rows) == len(states) else logits[torch.tensor(rows, device=logits.device)]
    num_top = [count for _, count in wanted if count is not None]
    results = compute_token_logprobs(selected, [int(token_ids[row]) for row in rows], num_top)
    for row, result in zip(rows, results, strict=True):
        logprobs[row] = result
