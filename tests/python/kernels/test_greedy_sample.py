"""Greedy sampling and the record of last tokens, exactly."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from kernels.device_cases import DEVICE_DTYPES, DEVICES, int32, signed
from lora_serve.kernels.greedy_sample import greedy_sample, set_last_tokens
from lora_serve.kernels.reference_elementwise import greedy_sample_reference

UNWRITTEN = -77
NAN, INF = float("nan"), float("inf")


def check_greedy(logits: Tensor, failed: list[int] | None = None) -> list[int]:
    """Sample, compare with the reference, and give the tokens; rows of the table are taken from the end."""
    device, num_rows = str(logits.device), len(logits)
    row_failed = int32(device, failed or [0] * num_rows)
    rows = int32(device, [num_rows + 2 - b for b in range(num_rows)])
    last_tokens = int32(device, [UNWRITTEN] * (num_rows + 4))
    out = int32(device, [UNWRITTEN] * num_rows)
    before = logits.clone()

    greedy_sample(logits, rows, row_failed, last_tokens, out)

    tokens: list[int] = out.tolist()
    assert tokens == greedy_sample_reference(logits.cpu(), row_failed.cpu())
    expected_last = [UNWRITTEN] * (num_rows + 4)
    for row, token in zip(rows.tolist(), tokens, strict=True):
        expected_last[row] = token
    assert last_tokens.tolist() == expected_last
    assert torch.equal(logits.nan_to_num(0.5), before.nan_to_num(0.5))
    return tokens


@pytest.mark.parametrize(("device", "dtype"), DEVICE_DTYPES)
@pytest.mark.parametrize("size", [1, 2, 1000, 4096, 4097, 13_001])
def test_best_token_is_found_for_every_vocabulary(device, dtype, size):
    check_greedy(signed(device, dtype, 3, size, seed=size))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("at", [0, 4095, 4096, 8191, 8192, 9999])
def test_best_token_is_found_at_the_edges_of_blocks(device, at):
    logits = -signed(device, torch.float32, 2, 10_000).abs() - 1.0
    logits[1, at] = -0.5
    assert check_greedy(logits)[1] == at


@pytest.mark.parametrize(("device", "dtype"), DEVICE_DTYPES)
def test_lowest_id_wins_among_equals_in_one_block_and_across_blocks(device, dtype):
    logits = torch.full((4, 9000), -3.0, dtype=dtype, device=device)
    logits[1, [8999, 4096, 5000]] = 2.0
    logits[2, [300, 299]] = 2.0
    logits[3, 10] = -0.0
    logits[3, 8000] = 0.0
    assert check_greedy(logits) == [0, 4096, 299, 10]


@pytest.mark.parametrize(("device", "dtype"), DEVICE_DTYPES)
def test_rows_that_are_not_finite_fail_alone(device, dtype):
    logits = signed(device, dtype, 7, 5000, seed=3)
    logits[1, 4999] = NAN
    logits[2, 0] = INF
    logits[3] = -INF
    logits[4, :] = -INF
    logits[4, 4321] = -5.0
    logits[5, 7] = NAN
    logits[5, 8] = INF
    tokens = check_greedy(logits)
    assert [token < 0 for token in tokens] == [False, True, True, True, False, True, False]
    assert tokens[4] == 4321


@pytest.mark.parametrize("device", DEVICES)
def test_row_that_failed_before_fails_again(device):
    tokens = check_greedy(signed(device, torch.float32, 3, 64), failed=[0, 1, 0])
    assert tokens[1] == -2
    assert min(tokens[0], tokens[2]) >= 0


@pytest.mark.parametrize("device", DEVICES)
def test_rows_at_a_distance_are_read_at_their_distance(device):
    wide = signed(device, torch.float16, 3, 300)
    check_greedy(wide[:, 100:237])


@pytest.mark.parametrize(("device", "dtype"), DEVICE_DTYPES)
def test_largest_number_of_the_dtype_is_a_token(device, dtype):
    logits = torch.full((2, 50), torch.finfo(dtype).min, dtype=dtype, device=device)
    logits[0, 33] = torch.finfo(dtype).max
    assert check_greedy(logits) == [33, 0]


@pytest.mark.gpu
def test_full_vocabulary_and_batch_give_the_same_tokens_each_time():
    logits = signed("cuda", torch.bfloat16, 128, 151_936)
    first = check_greedy(logits)
    assert all(check_greedy(logits) == first for _ in range(3))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("num_rows", [1, 3, 300])
def test_tokens_chosen_elsewhere_are_recorded(device, num_rows):
    tokens = [b * 7 % 1000 for b in range(num_rows)]
    failed = [int(b % 5 == 2) for b in range(num_rows)]
    tokens[0] = -1
    rows = [num_rows - 1 - b for b in range(num_rows)]
    last_tokens = int32(device, [UNWRITTEN] * (num_rows + 1))
    out = int32(device, [UNWRITTEN] * num_rows)

    set_last_tokens(int32(device, tokens), int32(device, rows), int32(device, failed), last_tokens, out)

    expected = [-2 if token < 0 or bad else token for token, bad in zip(tokens, failed, strict=True)]
    assert out.tolist() == expected
    assert last_tokens.tolist() == [*expected[::-1], UNWRITTEN]


@pytest.mark.parametrize("device", DEVICES)
def test_step_without_rows_writes_nothing(device):
    none, last_tokens = int32(device, []), int32(device, [5])
    greedy_sample(torch.empty(0, 9, device=device), none, none, last_tokens, none)
    set_last_tokens(none, none, none, last_tokens, none)
    assert last_tokens.tolist() == [5]


def test_unfit_shapes_are_refused_by_name():
    rows = int32("cpu", [0, 0])
    with pytest.raises(ValueError, match="for 3 rows"):
        greedy_sample(torch.ones(3, 9), rows, rows, rows, rows)
    with pytest.raises(ValueError, match=r"\(2, 0\)"):
        greedy_sample(torch.ones(2, 0), rows, rows, rows, rows)
    with pytest.raises(ValueError, match="contiguous"):
        greedy_sample(torch.ones(9, 2).t(), rows, rows, rows, rows)
    with pytest.raises(ValueError, match="for 1 rows"):
        set_last_tokens(rows[:1], rows, rows, rows, rows)
