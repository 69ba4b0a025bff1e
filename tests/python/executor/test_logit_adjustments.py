from __future__ import annotations

import math

import pytest
import torch

from lora_serve.executor.logit_adjustments import adjust_logits
from lora_serve.executor.sampling_state import SamplingState

from .states import make_state

VOCAB = 32


def _reference(logits: list[float], state: SamplingState) -> list[float]:
    """One row, token by token, from the definition."""
    params, output = state.params, state.output_token_ids
    adjusted = list(logits)
    for token_id in range(len(adjusted)):
        value = adjusted[token_id] + (params.logit_bias or {}).get(token_id, 0.0)
        is_stop = token_id in params.stop_token_ids or token_id in state.eos_token_ids
        if is_stop and len(output) < params.min_tokens:
            value = -math.inf
        if token_id in state.prompt_token_ids or token_id in output:
            value = value / params.repetition_penalty if value > 0 else value * params.repetition_penalty
        count = output.count(token_id)
        value -= params.frequency_penalty * count
        value -= params.presence_penalty * (count > 0)
        adjusted[token_id] = value
    return adjusted


def _random_state(generator: torch.Generator) -> SamplingState:
    def integers(count: int) -> list[int]:
        return torch.randint(0, VOCAB, (count,), generator=generator).tolist()

    def flag() -> bool:
        return bool(torch.randint(0, 2, (1,), generator=generator))

    params: dict = {"temperature": 0.0}
    if flag():
        params["repetition_penalty"] = 1.7
    if flag():
        params["frequency_penalty"] = -0.4
    if flag():
        params["presence_penalty"] = 0.9
    if flag():
        params["logit_bias"] = {token_id: 3.5 - token_id for token_id in integers(4)}
    if flag():
        params |= {"min_tokens": 6, "stop_token_ids": integers(2)}
    return make_state(
        integers(9), integers(int(torch.randint(0, 12, (1,), generator=generator))), eos=(3,), **params
    )


@pytest.mark.parametrize("seed", range(8))
def test_adjusted_logits_equal_the_row_by_row_reference(seed):
    generator = torch.Generator().manual_seed(seed)
    states = [_random_state(generator) for _ in range(17)]
    logits = torch.randn(17, VOCAB, generator=generator) * 4
    expected = torch.tensor([_reference(row, s) for row, s in zip(logits.tolist(), states, strict=True)])

    adjust_logits(logits, states)

    torch.testing.assert_close(logits, expected, rtol=1e-6, atol=1e-5)


def test_rows_without_features_keep_their_bits():
    states = [
        make_state([1, 2], [3], repetition_penalty=1.5),
        make_state([1, 2], [3]),
        make_state([1, 2], [3], logit_bias={4: 2.0}, min_tokens=9, stop_token_ids=[5]),
    ]
    logits = torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(0))
    before = logits.clone()

    adjust_logits(logits, states)

    assert torch.equal(logits[1], before[1])
    changed = (logits != before).nonzero().tolist()
    assert changed == [[0, 1], [0, 2], [0, 3], [2, 4], [2, 5]]


def test_banned_token_stays_banned_under_bias_and_penalties():
    state = make_state(
        [3],
        [3, 3],
        min_tokens=5,
        eos=(3,),
        logit_bias={3: 100.0},
        repetition_penalty=0.5,
        frequency_penalty=-2.0,
    )
    logits = torch.ones(1, VOCAB)

    adjust_logits(logits, [state])

    assert logits[0, 3] == -torch.inf
