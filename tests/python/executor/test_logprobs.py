from __future__ import annotations

import numpy as np
import torch

from lora_serve.executor.logprobs import compute_token_logprobs

VOCAB = 50


def test_logprobs_equal_log_softmax_with_ranks_and_top_tokens():
    logits = torch.randn(6, VOCAB, generator=torch.Generator().manual_seed(0)) * 5
    token_ids = [0, 49, int(logits[2].argmax()), int(logits[3].argmin()), 7, 7]
    num_top = [0, 1, 5, 20, 50, 100]

    results = compute_token_logprobs(logits, token_ids, num_top)

    expected = torch.log_softmax(logits.double(), dim=-1)
    for row, result in enumerate(results):
        assert result.token_id == token_ids[row]
        assert abs(result.logprob - float(expected[row, token_ids[row]])) < 1e-5
        order = sorted(range(VOCAB), key=lambda token_id: -float(expected[row, token_id]))
        assert result.rank == order.index(token_ids[row]) + 1
        assert result.top_token_ids.tolist() == order[: num_top[row]]
        assert result.top_token_ids.dtype == np.int32
        np.testing.assert_allclose(
            result.top_logprobs, [float(expected[row, t]) for t in order[: num_top[row]]], atol=1e-5
        )
    assert results[2].rank == 1
    assert results[3].rank == VOCAB


def test_equal_tokens_are_listed_by_id_and_share_the_better_rank():
    logits = torch.tensor([[1.0, 2.0, 1.0, 2.0, -1.0]])

    (result,) = compute_token_logprobs(logits, [3], [4])

    assert result.rank == 1
    assert result.top_token_ids.tolist() == [1, 3, 0, 2]


def test_no_rows_give_no_results():
    assert compute_token_logprobs(torch.empty(0, VOCAB), [], []) == []


def test_logits_are_not_changed():
    logits = torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(1))
    before = logits.clone()

    compute_token_logprobs(logits, [1, 2, 3], [5, 0, 2])

    assert torch.equal(logits, before)
