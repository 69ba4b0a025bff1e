from __future__ import annotations

import numpy as np
import pytest
import torch

from lora_serve.common.errors import InternalError
from lora_serve.executor import sampler
from lora_serve.executor.sampler import sample

from .states import make_state

VOCAB = 32


def _logits(num_rows: int, seed: int = 0, vocab_size: int = VOCAB) -> torch.Tensor:
    return torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * 3


def _chi_square_is_plausible(drawn: np.ndarray, expected: np.ndarray) -> bool:
    """Pearson's statistic within 5 standard deviations, and nothing drawn of probability 0."""
    counts = np.bincount(drawn, minlength=len(expected))
    possible = expected > 0
    if counts[~possible].any():
        return False
    means = expected[possible] * len(drawn)
    statistic = float(((counts[possible] - means) ** 2 / means).sum())
    degrees = int(possible.sum()) - 1
    return abs(statistic - degrees) < 5 * np.sqrt(2 * degrees)


def test_greedy_takes_the_best_token_and_the_lowest_id_among_equals():
    logits = _logits(4)
    logits[1, [5, 9, 30]] = 50.0
    logits[3] = 0.0

    result = sample(logits, [make_state(temperature=0.0)] * 4)

    assert result.token_ids.tolist() == [int(logits[0].argmax()), 5, int(logits[2].argmax()), 0]
    assert result.token_ids.dtype == np.int32
    assert result.logprobs == [None] * 4
    assert result.row_errors == {}


def test_adjusted_greedy_takes_the_lowest_id_among_equals():
    logits = torch.zeros(2, VOCAB)

    result = sample(
        logits, [make_state(temperature=0.0, logit_bias={9: 4.0, 3: 4.0}), make_state(temperature=0.0)]
    )

    assert result.token_ids.tolist() == [3, 0]


def test_greedy_is_chosen_from_adjusted_logits_and_logprobs_are_of_the_raw_ones():
    logits = _logits(1)
    best, second = logits[0].topk(2).indices.tolist()
    state = make_state([1], temperature=0.0, logit_bias={best: -100.0}, logprobs=2)
    before = logits.clone()

    result = sample(logits, [state])

    raw = torch.log_softmax(before[0], dim=-1)
    entry = result.logprobs[0]
    assert result.token_ids.tolist() == [second]
    assert (entry.token_id, entry.rank) == (second, 2)
    assert abs(entry.logprob - float(raw[second])) < 1e-5
    assert entry.top_token_ids.tolist() == [best, second]
    assert torch.equal(logits, before)


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 1.0},
        {"temperature": 0.5},
        {"temperature": 1.7},
        {"temperature": 1.0, "top_k": 4},
        {"temperature": 0.8, "top_p": 0.7},
        {"temperature": 1.0, "min_p": 0.1},
        {"temperature": 1.5, "top_k": 8, "top_p": 0.9, "min_p": 0.02},
    ],
)
def test_draws_follow_the_exact_distribution(params):
    num_draws = 20_000
    logits = _logits(1, seed=3, vocab_size=12)
    scaled = logits[0].double() / params["temperature"]
    kept = torch.ones(12, dtype=torch.bool)
    order = scaled.argsort(descending=True)
    if "min_p" in params:
        p = scaled.softmax(-1)
        kept &= p >= params["min_p"] * p.max()
    if "top_k" in params:
        kept[order[params["top_k"] :]] = False
    if "top_p" in params:
        p = scaled.masked_fill(~kept, -torch.inf).softmax(-1)[order]
        kept[order[(p.cumsum(-1) - p) >= params["top_p"]]] = False
    expected = scaled.masked_fill(~kept, -torch.inf).softmax(-1).numpy()
    states = [make_state(vocab_size=12, seed=seed, **params) for seed in range(num_draws)]

    result = sample(logits.expand(num_draws, -1), states)

    assert _chi_square_is_plausible(result.token_ids, expected)
    wrong = np.roll(expected, 1)
    assert not _chi_square_is_plausible(result.token_ids, wrong)


def test_tokens_drawn_at_the_positions_of_one_request_follow_the_distribution():
    num_draws = 5_000
    logits = _logits(1, seed=4, vocab_size=12)
    state = make_state([1], vocab_size=12, temperature=1.0, seed=11)

    for position in range(1, num_draws + 1):
        state.append_output(int(sample(logits, [state]).token_ids[0]), position)

    expected = logits[0].double().softmax(-1).numpy()
    assert _chi_square_is_plausible(np.array(state.output_token_ids), expected)


def test_seeded_token_does_not_depend_on_the_batch():
    target = _logits(1, seed=7)
    other = _logits(9, seed=8)
    params = {"temperature": 1.3, "top_p": 0.95, "top_k": 20, "seed": -77}
    alone = sample(target, [make_state([1], [4, 5], **params)]).token_ids[0]

    for row in (0, 4, 9):
        logits = torch.cat([other[:row], target, other[row:]])
        states = [
            make_state(temperature=0.0 if i % 2 else 0.9, top_k=i, repetition_penalty=1 + i / 9, seed=i)
            for i in range(9)
        ]
        states.insert(row, make_state([9, 9, 9], [4, 5], **params))
        result = sample(logits, states)
        assert result.token_ids[row] == alone


def test_seed_and_output_position_both_change_the_draw():
    logits = torch.zeros(1, 1000)

    def draw(seed: int, num_output: int) -> int:
        state = make_state([1], [2] * num_output, vocab_size=1000, temperature=1.0, seed=seed)
        return int(sample(logits, [state]).token_ids[0])

    drawn = [draw(seed, num_output) for seed in range(3) for num_output in range(3)]
    assert len(set(drawn)) > 5
    assert drawn == [draw(seed, num_output) for seed in range(3) for num_output in range(3)]


def test_request_that_draws_without_a_seed_is_an_internal_error():
    with pytest.raises(InternalError, match="without a seed"):
        sample(torch.zeros(1, VOCAB), [make_state(temperature=1.0)])


def test_stop_tokens_are_not_sampled_before_min_tokens():
    logits = torch.full((1, VOCAB), -20.0)
    logits[0, 4] = 20.0
    logits[0, 7] = 10.0
    logits[0, 9] = 0.0
    state = make_state([1], temperature=0.0, min_tokens=2, stop_token_ids=[7], eos=(4,), ignore_eos=True)

    for position in range(1, 4):
        state.append_output(int(sample(logits, [state]).token_ids[0]), position)

    assert state.output_token_ids == [9, 9, 4]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_row_without_finite_logits_is_an_error_and_the_others_go_on(bad):
    logits = _logits(4)
    logits[1, 6] = bad
    logits[2] = -torch.inf
    params = [{"temperature": 0.0}, {"temperature": 0.0}, {"temperature": 1.0, "logprobs": 1}]
    states = [make_state(seed=1, **p) for p in params] + [make_state(temperature=1.0, seed=2, logprobs=2)]
    expected = sample(logits[[0, 3]], [states[0], states[3]])

    result = sample(logits, states)

    assert sorted(result.row_errors) == [1, 2]
    assert "not finite" in result.row_errors[1]
    assert result.token_ids.tolist() == [expected.token_ids[0], -1, -1, expected.token_ids[1]]
    assert [entry is None for entry in result.logprobs] == [True, True, True, False]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_row_whose_every_token_is_banned_is_an_error(temperature):
    states = [
        make_state(temperature=temperature, vocab_size=3, min_tokens=3, stop_token_ids=[0, 1, 2]),
        make_state(temperature=temperature, vocab_size=3, min_tokens=3, stop_token_ids=[0, 1], seed=0),
    ]

    result = sample(torch.randn(2, 3, generator=torch.Generator().manual_seed(0)), states)

    assert list(result.row_errors) == [0]
    assert result.token_ids.tolist() == [-1, 2]


def test_smallest_temperature_draws_the_best_token():
    logits = _logits(5) * 1e4
    states = [make_state(temperature=1e-5, seed=seed) for seed in range(5)]

    result = sample(logits, states)

    assert result.token_ids.tolist() == logits.argmax(dim=-1).tolist()


@pytest.mark.parametrize(("uniform", "token_id"), [(0.0, 1), (0.5, 3), (1 - 2.0**-52, 3)])
def test_extreme_uniform_numbers_never_draw_a_dropped_token(uniform, token_id, monkeypatch):
    monkeypatch.setattr(sampler, "seeded_uniforms", lambda seeds, positions: np.full(len(seeds), uniform))
    logits = torch.tensor([[-1.0, 2.0, -3.0, 2.0, -2.0]])
    state = make_state(vocab_size=5, temperature=1.0, top_k=2, seed=0)

    result = sample(logits, [state])

    assert result.token_ids.tolist() == [token_id]


def test_no_rows_give_no_tokens():
    result = sample(torch.empty(0, VOCAB), [])

    assert result.token_ids.shape == (0,)
    assert (result.logprobs, result.row_errors) == ([], {})
