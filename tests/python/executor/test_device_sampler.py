"""Sampling on the device against the torch sampler, which is the reference."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from kernels.device_cases import DEVICES
from lora_serve.common.errors import InternalError
from lora_serve.executor import uploads as uploads_module
from lora_serve.executor.device_sampler import DeviceSampler, RowsToSample
from lora_serve.executor.last_tokens import FAILED
from lora_serve.executor.logprobs import TokenLogprobs, read_logprobs
from lora_serve.executor.sampler import sample
from lora_serve.executor.sampling_state import SamplingState
from lora_serve.executor.uploads import Uploads
from lora_serve.kernels.greedy_sample import greedy_sample
from lora_serve.kernels.host_copy import copy_small
from support.device_waits import device_waits_are_errors

from .states import make_state

VOCAB = 64
PENALTIES: dict[str, Any] = {"repetition_penalty": 1.3, "frequency_penalty": 0.4, "presence_penalty": 0.2}


def _logits(num_rows: int, seed: int = 0) -> Tensor:
    return torch.randn(num_rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * 3


def _states() -> list[SamplingState]:
    """One of each kind."""
    params: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 0.0, "logprobs": 3},
        {"temperature": 1.0, "seed": 1},
        {"temperature": 0.7, "seed": 2, "top_k": 9, "top_p": 0.9, "logprobs": 0},
        {"temperature": 0.0, **PENALTIES},
        {"temperature": 1.4, "seed": 3, "min_p": 0.05, **PENALTIES, "logprobs": 5},
        {"temperature": 0.0, "logit_bias": {5: 4.0, 9: -50.0}},
        {"temperature": 1.2, "seed": 4, "logit_bias": {7: 2.5}, "top_p": 0.8},
        {"temperature": 1.0, "seed": 5, "min_tokens": 3, "stop_token_ids": [4, 8], "top_k": 1},
        {"temperature": 0.0, "min_tokens": 2, "stop_token_ids": [11]},
    ]
    return [make_state([3, 9, 9], [5, 12], vocab_size=VOCAB, **one) for one in params]


def _choose(
    logits: Tensor,
    states: list[SamplingState],
    device: str,
    *,
    places: list[int] | None = None,
    num_outputs: list[int] | None = None,
    failed: tuple[int, ...] = (),
) -> tuple[list[int], list[TokenLogprobs | None]]:
    """Tokens of all rows of logits, and log probabilities of the states."""
    logits = logits.to(device)
    num_rows = len(logits)
    places = places or list(range(num_rows))
    zeros = torch.zeros(num_rows, dtype=torch.int32, device=device)
    tokens = torch.empty_like(zeros)
    greedy_sample(logits, zeros, zeros, torch.zeros_like(zeros), out=tokens)
    num_outputs = num_outputs or [len(state.output_token_ids) for state in states]
    rows = RowsToSample(places, states, num_outputs, list(failed))
    before = logits.clone()

    entries = DeviceSampler(2, torch.device(device)).sample(logits, rows, tokens)

    assert torch.equal(logits.nan_to_num(), before.nan_to_num())
    logprobs: list[TokenLogprobs | None] = [None] * len(states)
    if entries is not None:
        chosen = rows.with_logprobs()
        token_ids = [int(tokens[places[i]]) for i in chosen]
        num_top = [states[i].params.logprobs or 0 for i in chosen]
        for i, entry in zip(chosen, read_logprobs(entries.cpu().numpy(), token_ids, num_top), strict=True):
            logprobs[i] = entry
    return tokens.tolist(), logprobs


def _is_same(one: TokenLogprobs | None, other: TokenLogprobs | None) -> bool:
    if one is None or other is None:
        return one is other
    return (
        (one.token_id, one.rank) == (other.token_id, other.rank)
        and one.top_token_ids.tolist() == other.top_token_ids.tolist()
        and math.isclose(one.logprob, other.logprob, abs_tol=1e-5)
        and np.allclose(one.top_logprobs, other.top_logprobs, rtol=0, atol=1e-5)
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("seed", range(2))
def test_mixed_rows_get_the_tokens_and_logprobs_of_the_torch_sampler(device, seed):
    states = _states()
    logits = _logits(len(states), seed)
    expected = sample(logits, states)

    tokens, logprobs = _choose(logits, states, device)

    assert tokens == expected.token_ids.tolist()
    assert all(map(_is_same, logprobs, expected.logprobs))
    assert sum(entry is not None for entry in logprobs) == 3


@pytest.mark.parametrize("device", DEVICES)
def test_token_does_not_depend_on_company_places_and_what_the_others_ask_for(device):
    states = _states()
    logits = _logits(len(states), seed=5)
    expected = sample(logits, states).token_ids.tolist()
    wide = _logits(16, seed=6)
    for order in ([2, 3], [7], [3, 1, 8], [0, 7, 5, 2]):
        places = [2 + 3 * i for i in range(len(order))]
        for place, row in zip(places, order, strict=True):
            wide[place] = logits[row]
        best = wide.argmax(dim=-1).tolist()

        tokens, _ = _choose(wide, [states[row] for row in order], device, places=places)

        assert [tokens[place] for place in places] == [expected[row] for row in order]
        others = [row for row in range(16) if row not in places]
        assert [tokens[row] for row in others] == [best[row] for row in others]


@pytest.mark.parametrize("device", DEVICES)
def test_bans_and_uniform_numbers_follow_the_position_although_the_last_token_is_unknown(device):
    params: list[dict[str, Any]] = [
        {"temperature": 1.0, "seed": 9},
        {"temperature": 0.0, "min_tokens": 3, "stop_token_ids": [4]},
        {"temperature": 0.0, "min_tokens": 4, "stop_token_ids": [4]},
    ]
    logits = _logits(3, seed=2)
    logits[0] *= 0.1
    logits[1:, 4] = 30.0
    known = [make_state([1], [5, 6, 7], vocab_size=VOCAB, **one) for one in params]
    late = [make_state([1], [5, 6], vocab_size=VOCAB, **one) for one in params]
    expected = sample(logits, known).token_ids.tolist()

    tokens, _ = _choose(logits, late, device, num_outputs=[3, 3, 3])

    assert tokens == expected
    assert (tokens[1] == 4, tokens[2] == 4) == (True, False)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_rows_without_a_token_fail_alone(device, bad):
    states = _states()
    logits = _logits(len(states), seed=1)
    expected = sample(logits, states)
    logits[2, 7] = bad
    logits[4, 3] = bad
    logits[5] = -math.inf
    states[8] = make_state(
        vocab_size=VOCAB, temperature=1.0, seed=1, min_tokens=9, stop_token_ids=[*range(VOCAB)]
    )

    tokens, logprobs = _choose(logits, states, device, failed=(7,))

    good = [0, 1, 3, 6, 9]
    assert [row for row, token in enumerate(tokens) if token != FAILED] == good
    assert [tokens[row] for row in good] == [int(expected.token_ids[row]) for row in good]
    assert all(_is_same(logprobs[row], expected.logprobs[row]) for row in good)


@pytest.mark.parametrize("device", DEVICES)
def test_rows_whose_bans_are_over_keep_their_best_tokens(device):
    states = [
        make_state([1], [2, 3], vocab_size=VOCAB, temperature=0.0, min_tokens=2, stop_token_ids=[4])
    ] * 2
    logits = _logits(2)
    assert _choose(logits, states, device) == (logits.argmax(dim=-1).tolist(), [None, None])


def test_row_that_draws_without_a_seed_is_an_internal_error():
    with pytest.raises(InternalError, match="without a seed"):
        _choose(_logits(1), [make_state(vocab_size=VOCAB, temperature=1.0)], "cpu")


@pytest.mark.parametrize("device", DEVICES)
def test_uploads_keep_their_numbers_while_the_next_is_on_its_way(device, monkeypatch):
    late: list[tuple[Tensor, Tensor]] = []
    monkeypatch.setattr(uploads_module, "copy_small", lambda *copy: late.append(copy))
    uploads = Uploads(2, torch.device(device))
    given = [
        [
            np.arange(n, dtype=dtype) + scale
            for n, dtype in enumerate([np.int32, np.float64, np.float32] * scale)
        ]
        for scale in (30, 1)
    ]

    arrived = [uploads.upload(arrays) for arrays in given]
    for copy in late:
        copy_small(*copy)

    for arrays, tensors in zip(given, arrived, strict=True):
        assert all(
            np.array_equal(array, tensor.cpu().numpy()) and array.dtype == tensor.cpu().numpy().dtype
            for array, tensor in zip(arrays, tensors, strict=True)
        )


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_nothing_waits_for_the_device(dtype):
    states = _states()
    logits = _logits(len(states)).to(dtype).cuda()
    sampler = DeviceSampler(2, torch.device("cuda"))
    num_outputs = [2] * len(states)
    rows = RowsToSample(list(range(len(states))), states, num_outputs, [1])

    def run() -> Tensor:
        tokens = logits.float().argmax(dim=-1).to(torch.int32)
        sampler.sample(logits, rows, tokens)
        return tokens

    expected = run()  # Compiles, and takes the pinned memory.
    run()
    torch.cuda.synchronize()
    with device_waits_are_errors():
        tokens = run()
    assert torch.equal(tokens, expected)
