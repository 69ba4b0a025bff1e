from __future__ import annotations

import pytest
import torch

from lora_serve.common.sampling_params import SamplingParams
from lora_serve.executor import truncation
from lora_serve.executor.truncation import truncate


def _scores(num_rows: int, vocab_size: int, seed: int = 0, scale: float = 3.0) -> torch.Tensor:
    logits = torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * scale
    return logits - logits.max(dim=-1, keepdim=True).values


def _kept_by_definition(scores: torch.Tensor, params: SamplingParams) -> set[int]:
    """Tokens that survive, one row, in fp64, from the definition."""
    kept = {token_id: float(score) for token_id, score in enumerate(scores.double())}

    def probabilities() -> dict[int, float]:
        weights = {
            token_id: float(torch.tensor(s, dtype=torch.float64).exp()) for token_id, s in kept.items()
        }
        total = sum(weights.values())
        return {token_id: weight / total for token_id, weight in weights.items()}

    if params.min_p > 0:
        p = probabilities()
        kept = {t: s for t, s in kept.items() if p[t] >= params.min_p * max(p.values())}
    if params.top_k > 0:
        kept = dict(sorted(kept.items(), key=lambda item: -item[1])[: params.top_k])
    if params.top_p < 1:
        nucleus: dict[int, float] = {}
        reached = 0.0
        for token_id, probability in sorted(probabilities().items(), key=lambda item: -item[1]):
            nucleus[token_id] = kept[token_id]
            reached += probability
            if reached >= params.top_p:
                break
        kept = nucleus
    return set(kept)


def _kept(scores: torch.Tensor) -> set[int]:
    return set(torch.isfinite(scores).nonzero().flatten().tolist())


@pytest.mark.parametrize("seed", range(4))
def test_kept_tokens_equal_the_definition_in_a_mixed_batch(seed, monkeypatch):
    monkeypatch.setattr(truncation, "_FIRST_TOP_P_WIDTH", 5)  # some nuclei need the second, full sort
    choices = [
        {},
        {"min_p": 0.05},
        {"top_k": 1},
        {"top_k": 7},
        {"top_k": 1000},
        {"top_k": -1},
        {"top_p": 0.3},
        {"top_p": 0.9},
        {"top_p": 0.999},
        {"top_p": 1e-6},
        {"top_k": 9, "top_p": 0.8},
        {"min_p": 0.02, "top_k": 6, "top_p": 0.95},
        {"min_p": 1.0},
    ]
    params = [SamplingParams(**choice) for choice in choices]
    scores = _scores(len(params), 51, seed)
    expected = [_kept_by_definition(row, p) for row, p in zip(scores, params, strict=True)]
    before = scores.clone()

    truncate(scores, params)

    assert [_kept(row) for row in scores] == expected
    finite = torch.isfinite(scores)
    assert torch.equal(scores[finite], before[finite])


def test_nucleus_does_not_depend_on_the_width_of_the_first_look(monkeypatch):
    params = [SamplingParams(top_p=p) for p in (0.1, 0.5, 0.9, 0.99)]
    results = []
    for width in (1, 3, 64, 4096):
        monkeypatch.setattr(truncation, "_FIRST_TOP_P_WIDTH", width)
        scores = _scores(4, 3000, seed=5)
        truncate(scores, params)
        results.append(scores)

    for result in results[1:]:
        assert torch.equal(results[0], result)


def test_tokens_equal_to_the_last_kept_one_are_kept():
    scores = torch.tensor([[-1.0, 0.0, -1.0, -2.0], [-1.0, 0.0, -1.0, -2.0]])

    truncate(scores, [SamplingParams(top_k=2), SamplingParams(top_p=0.6)])

    assert [_kept(row) for row in scores] == [{0, 1, 2}, {0, 1, 2}]


def test_tokens_dropped_before_do_not_come_back():
    scores = torch.tensor([[0.0, -0.1, -torch.inf, -0.2]])

    truncate(scores, [SamplingParams(top_k=4, top_p=0.9999, min_p=1e-9)])

    assert _kept(scores[0]) == {0, 1, 3}
