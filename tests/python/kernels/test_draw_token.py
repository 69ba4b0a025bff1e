"""Floors by top_k and top_p against their definitions in fp64, and draws against the torch sampler's."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from kernels.device_cases import DEVICE_DTYPES, DEVICES, int32, signed
from lora_serve.executor.uniform_stream import seeded_uniforms
from lora_serve.kernels import draw_token as draw_module
from lora_serve.kernels import draw_token_floors as floors_module
from lora_serve.kernels.draw_token import draw_token
from lora_serve.kernels.draw_token_floors import raise_floors_by_count, raise_floors_by_mass

INF = math.inf
SUM_ERROR = 1e-5
"""Of a share of probability: fp32 exponentials of scores down to -30 are right to 2e-6."""


@pytest.fixture
def small_blocks(monkeypatch) -> None:
    """Several blocks in a small vocabulary."""
    monkeypatch.setattr(draw_module, "_BLOCK", 64)
    monkeypatch.setattr(floors_module, "_BLOCK", 64)


def best_of(logits: Tensor) -> Tensor:
    return logits.float().argmax(dim=-1).to(torch.int32)


def scores_of(logits: Tensor, temperature: Tensor) -> Tensor:
    logits = logits.float()
    return (logits - logits.max(dim=-1, keepdim=True).values) / temperature.unsqueeze(1)


def numbers(logits: Tensor, values: list[float], dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.tensor(values, dtype=dtype, device=logits.device)


def raise_floors(logits: Tensor, top_k: list[int], top_p: list[float], floors: Tensor, temperature: Tensor):
    """As the sampler does, one entry a row."""
    rows, best = int32(str(logits.device), list(range(len(logits)))), best_of(logits)
    wanted = numbers(logits, top_k, torch.float64)
    raise_floors_by_count(logits, rows, best, wanted, temperature, floors)
    wanted = numbers(logits, top_p, torch.float64)
    raise_floors_by_mass(logits, rows, best, wanted, temperature, floors)


def check_kept(row_scores: Tensor, floor: float, top_k: int, top_p: float, first_floor: float = -INF) -> None:
    """Check by definition, with p the softmax of what the cut before has left."""
    scores = row_scores.double()
    kept = row_scores >= floor
    assert bool((row_scores == floor).any()) or floor == first_floor
    before = row_scores >= first_floor
    if top_k:
        kth = scores.sort(descending=True).values[top_k - 1]
        before &= scores >= kth
    if not top_p:
        assert torch.equal(kept, before)
        return
    assert not bool((kept & ~before).any())
    p = scores.masked_fill(~before, -INF).softmax(-1)
    last = scores[kept].min()
    assert bool(kept[before & (scores >= last)].all())  # whoever equals the last one kept
    assert float(p[scores >= last].sum()) >= top_p - SUM_ERROR
    assert float(p[scores > last].sum()) < top_p + SUM_ERROR


@pytest.mark.parametrize(("device", "dtype"), DEVICE_DTYPES)
@pytest.mark.parametrize("size", [51, 140])
@pytest.mark.usefixtures("small_blocks")
def test_kept_tokens_are_those_of_the_definition(device, dtype, size):
    cases = [
        (0, 0.0, 1.0, -INF),
        (1, 0.0, 1.0, -INF),
        (7, 0.0, 0.3, -INF),
        (size - 1, 0.0, 2.0, -INF),
        (0, 0.3, 1.0, -INF),
        (0, 0.9, 2.5, -INF),
        (0, 0.999, 1.0, -3.0),
        (0, 1e-6, 1.0, -INF),
        (9, 0.8, 0.6, -INF),
        (30, 0.95, 1.5, -2.0),
        (2, 0.0, 1.0, 0.0),
    ]
    top_k, top_p, temperatures, first_floors = (list(column) for column in zip(*cases, strict=True))
    logits = signed(device, dtype, len(cases), size, seed=size, scale=3.0)
    temperature, floors = numbers(logits, temperatures), numbers(logits, first_floors)

    raise_floors(logits, top_k, top_p, floors, temperature)

    scores = scores_of(logits, temperature)
    for row, (k, p, _, first_floor) in enumerate(cases):
        check_kept(scores[row].cpu(), float(floors[row]), k, p, first_floor)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("row", "top_k", "num_kept"),
    [
        ([-1.0, 0.0, -0.0, -2.0], 1, 2),
        ([-3.0, -3.0, -3.0, -4.0], 2, 3),
        ([1.0, 1.0 + 2**-23, 0.0, -1.0], 1, 1),
        ([-1.0, -1.0 - 2**-23, -3.0, -9.0], 1, 1),
        ([3e38, -3e38, 1.0, 2.0], 3, 3),
        ([-INF, 5.0, -INF, -INF], 3, 4),
        ([1e-30, 2e-30, -1e-30, -5.0], 2, 2),
        ([0.5, 0.5, 0.5, 0.5], 1, 4),
    ],
)
def test_top_k_is_exact_among_equals_neighbours_and_extremes(device, row, top_k, num_kept):
    logits = torch.tensor([row], device=device)
    floors, ones = numbers(logits, [-INF]), numbers(logits, [1.0])

    raise_floors(logits, [top_k], [0.0], floors, ones)

    assert int((scores_of(logits, ones) >= floors.unsqueeze(1)).sum()) == num_kept


@pytest.mark.parametrize("device", DEVICES)
def test_rows_without_a_cut_and_failed_rows_keep_their_floors(device):
    logits = signed(device, torch.float32, 5, 40)
    logits[1] = math.nan
    best, rows = best_of(logits), int32(device, [4, 1, 2])
    best[1] = -2
    floors, ones = numbers(logits, [-5.0, -6.0, -7.0]), numbers(logits, [1.0] * 3)

    for raise_by in (raise_floors_by_count, raise_floors_by_mass):
        raise_by(logits, rows, best, numbers(logits, [0.0, 0.5, 0.0], torch.float64), ones, floors)
        raise_by(logits, rows[:0], best, ones[:0].double(), ones[:0], floors[:0])
    draw_token(logits, rows, best, ones, floors, numbers(logits, [0.5] * 3, torch.float64))

    assert floors.tolist() == [-5.0, -6.0, -7.0]
    assert best.tolist()[1] == -2
    assert [best.tolist()[row] for row in (0, 3)] == [best_of(logits).tolist()[row] for row in (0, 3)]


@pytest.mark.parametrize(("device", "dtype"), DEVICE_DTYPES)
@pytest.mark.usefixtures("small_blocks")
def test_draws_invert_the_cumulative_distribution(device, dtype):
    num_draws = 24
    logits = signed(device, dtype, 3, 333, seed=1, scale=2.0)[:, 20:320]
    rows, floors = int32(device, [2, 0]), numbers(logits, [-INF, -1.5])
    temperature = numbers(logits, [1.3, 0.7])
    scores = scores_of(logits[[2, 0]], temperature)
    kept = scores.double().masked_fill(scores < floors.unsqueeze(1), -INF)
    cumulative = kept.softmax(-1).cumsum(-1).cpu()

    for position in range(num_draws):
        uniforms = torch.from_numpy(seeded_uniforms([3, 4], [position, position]))
        tokens = best_of(logits)
        draw_token(logits, rows, tokens, temperature, floors, uniforms.to(device))
        assert int(tokens[1]) == int(best_of(logits)[1])
        for entry, row in enumerate([2, 0]):
            token = int(tokens[row])
            assert math.isfinite(kept[entry, token])
            before = float(cumulative[entry, token - 1]) if token else 0.0
            assert before - 1e-6 <= float(uniforms[entry]) <= float(cumulative[entry, token]) + 1e-6


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("uniform", "token"), [(0.0, 70), (0.49, 70), (0.51, 199), (1 - 2.0**-52, 199)])
@pytest.mark.usefixtures("small_blocks")
def test_no_uniform_number_draws_a_token_of_probability_zero(device, uniform, token):
    """Neither dropped ones nor -inf, nor those whose probability is too small to be represented."""
    logits = torch.full((1, 300), -INF, device=device)
    logits[0, [0, 70, 199, 299]] = torch.tensor([-40.0, 2.0, 2.0, -60.0], device=device)
    logits[0, [10, 250]] = 1.0
    tokens, ones = best_of(logits), numbers(logits, [1.0])

    draw_token(
        logits,
        int32(device, [0]),
        tokens,
        ones,
        numbers(logits, [-0.5]),
        numbers(logits, [uniform], torch.float64),
    )

    assert tokens.tolist() == [token]


@pytest.mark.parametrize("device", DEVICES)
def test_draws_follow_the_exact_distribution(device):
    """Pearson's statistic within 5 standard deviations; against a wrong distribution it is not."""
    num_draws, size = (250 if device == "cpu" else 50_000), 12
    logits = signed(device, torch.float32, 1, size, seed=3).expand(num_draws, size).contiguous()
    rows = int32(device, list(range(num_draws)))
    tokens, ones = best_of(logits), torch.ones(num_draws, device=device)
    floors = torch.full_like(ones, -1.7)
    uniforms = torch.from_numpy(seeded_uniforms([5] * num_draws, list(range(num_draws)))).to(device)

    draw_token(logits, rows, tokens, ones, floors, uniforms)

    scores = scores_of(logits[:1], ones[:1])[0].double()
    expected = scores.masked_fill(scores < -1.7, -INF).softmax(-1).cpu().numpy()
    counts = np.bincount(tokens.cpu().numpy(), minlength=size)

    def statistic(probabilities: np.ndarray) -> float:
        means = np.maximum(probabilities * num_draws, 1e-9)
        return float(((counts - means) ** 2 / means).sum())

    degrees = int((expected > 0).sum()) - 1
    assert degrees > 3
    assert not counts[expected == 0].any()
    assert abs(statistic(expected) - degrees) < 5 * math.sqrt(2 * degrees)
    assert abs(statistic(np.roll(expected, 1)) - degrees) > 5 * math.sqrt(2 * degrees)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("scale", [0.5, 4.0])
def test_full_vocabulary_and_batch_are_exact_and_the_same_each_time(dtype, scale):
    num_rows, size = 128, 151_936
    logits = signed("cuda", dtype, num_rows, size, scale=scale)
    top_k = [(0, 1, 20, 1000, 100_000)[row % 5] for row in range(num_rows)]
    top_p = [(0.0, 0.9, 0.5, 0.999)[row % 4] for row in range(num_rows)]
    temperature = torch.linspace(0.3, 2.0, num_rows, device="cuda")
    uniforms = torch.from_numpy(seeded_uniforms(list(range(num_rows)), [7] * num_rows)).cuda()

    def run(rows: list[int]) -> tuple[Tensor, Tensor]:
        floors, tokens = torch.full((len(rows),), -INF, device="cuda"), best_of(logits)
        index, heat = int32("cuda", rows), temperature[rows]
        wanted = torch.tensor([top_k[row] for row in rows], dtype=torch.float64, device="cuda")
        raise_floors_by_count(logits, index, tokens, wanted, heat, floors)
        wanted = torch.tensor([top_p[row] for row in rows], dtype=torch.float64, device="cuda")
        raise_floors_by_mass(logits, index, tokens, wanted, heat, floors)
        draw_token(logits, index, tokens, heat, floors, uniforms[rows])
        return floors, tokens[rows]

    floors, tokens = run(list(range(num_rows)))
    scores = scores_of(logits, temperature)
    for row in range(num_rows):
        check_kept(scores[row], float(floors[row]), top_k[row], top_p[row])
    kept = scores.double().masked_fill(scores < floors.unsqueeze(1), -INF)
    cumulative = torch.nn.functional.pad(kept.softmax(-1).cumsum(-1), (1, 0))
    chosen = tokens.long().unsqueeze(1)
    assert bool(kept.gather(1, chosen).isfinite().all())
    assert bool((cumulative.gather(1, chosen).squeeze(1) <= uniforms + SUM_ERROR).all())
    assert bool((cumulative.gather(1, chosen + 1).squeeze(1) >= uniforms - SUM_ERROR).all())
    for rows in (list(range(num_rows)), [17], [127, 3, 64], list(range(40, 90))):
        again = run(rows)
        assert torch.equal(again[0], floors[rows])
        assert torch.equal(again[1], tokens[rows])


def test_unfit_arguments_are_refused_by_name():
    logits, rows, best = torch.ones(2, 9), int32("cpu", [0, 1]), int32("cpu", [0, 0])
    ones, two = torch.ones(2), torch.ones(2, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"floors.*\(1,\)"):
        draw_token(logits, rows, best, ones, ones[:1], two)
    with pytest.raises(ValueError, match="for 2 rows of logits, best is"):
        draw_token(logits, rows, best[:1], ones, ones, two)
    with pytest.raises(ValueError, match="contiguous"):
        raise_floors_by_count(torch.ones(9, 2).t(), rows, best, two, ones, ones)
    with pytest.raises(ValueError, match="float64"):
        raise_floors_by_mass(logits.double(), rows, best, two, ones, ones)
