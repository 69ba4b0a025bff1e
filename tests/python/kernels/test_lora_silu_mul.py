"""The gated activation after the adapters' deltas: against an exact oracle, and against its two halves."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from kernels.device_cases import DEVICE_DTYPES, DEVICES
from kernels.lora_cases import LAST_SLOT, assert_within_bounds
from kernels.lora_delta_cases import (
    BAD_SLOTS,
    LARGE,
    STEPS,
    DeltaCase,
    make_bad,
    make_delta_case,
    mapping_of,
    padded,
    random_mapping,
)
from kernels.triton_lora_cases import MIXED, NAN, assert_same_on_cpu
from lora_serve.kernels import lora_silu_mul as lora_silu_mul_module
from lora_serve.kernels.lora_silu_mul import lora_silu_mul
from lora_serve.kernels.reference_lora_elementwise import lora_silu_mul_reference
from lora_serve.kernels.silu_mul import silu_mul
from lora_serve.kernels.triton_lora_expand import triton_lora_expand
from lora_serve.kernels.triton_lora_linear import warm_up_token_counts
from lora_serve.kernels.triton_lora_tiles import choose_silu_mul_launch, token_class
from lora_serve.kernels.tuned_lora_tiles import LoRASiluMulLaunch
from lora_serve.kernels.tuned_tables import TUNING_FOLDER, read_table

# NumPy, which the interpreter computes with, warns where exp gives infinity. A GPU does not.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")

# Modules missing on either slice or both; slot 2 is installed but absent from the step.
MIXED_RANKS: dict[int, tuple[int | None, ...]] = {
    0: (3, None),
    1: (None, 33),
    2: (8, 8),
    4: (None, None),
    LAST_SLOT: (8, 40),
}
RANDOM_RANKS: dict[int, tuple[int | None, ...]] = {0: (5, 9), 1: (16, 16), 2: (None, 3), LAST_SLOT: (20, 4)}


def make(
    device: str, dtype: torch.dtype, size: int = 70, mapping: list[int] = MIXED, **options: int
) -> DeltaCase:
    ranks = MIXED_RANKS if mapping is MIXED else RANDOM_RANKS
    return make_delta_case(mapping, ranks, (size, size), dtype, device, **options)


def launches_that_ship() -> list[LoRASiluMulLaunch]:
    tables = map(read_table, sorted(TUNING_FOLDER.glob("*.json")))
    return [LoRASiluMulLaunch(**row["tiles"]) for table in tables for row in table.get("lora_silu_mul", [])]


def check(step: DeltaCase, launch: LoRASiluMulLaunch | None = None) -> None:
    """Rows of slot -1 are the plain kernel's, the input stays, and two runs have the same bits."""
    case, size = step.case, step.y.shape[1] // 2
    expected = lora_silu_mul_reference(case.y, step.v, case.table, case.mapping)
    first, second = (torch.full((len(case.y), size), NAN, dtype=case.y.dtype) for _ in range(2))
    first, second = first.to(step.y.device), second.to(step.y.device)

    assert lora_silu_mul(step.y, step.delta, first, launch=launch) is first
    lora_silu_mul(step.y, step.delta, second, launch=launch)

    assert_within_bounds(first.cpu(), expected)
    assert_same_on_cpu(first, second)
    assert_same_on_cpu(step.y, case.y)
    is_base = (case.mapping < 0).to(step.y.device)
    assert_same_on_cpu(first[is_base], silu_mul(step.y)[is_base])


def expand_then_silu_mul(step: DeltaCase) -> Tensor:
    y, delta = step.y.clone(), step.delta
    table = delta.table
    triton_lora_expand(y, delta.v, table.arena, table, delta.metadata, output_slices=table.output_slices)
    return silu_mul(y)


@pytest.mark.parametrize(("device", "dtype"), DEVICE_DTYPES)
@pytest.mark.parametrize("rank", [1, 3, 8, 16, 64, 100, 128, 150, 300])
def test_product_is_exact_to_rounding_for_every_rank(rank, device, dtype):
    ranks = {0: (rank, rank), LAST_SLOT: (None, rank)}
    check(make_delta_case([LAST_SLOT, -1, 0, 0, LAST_SLOT], ranks, (67, 67), dtype, device, seed=rank))


@pytest.mark.parametrize(("device", "dtype"), DEVICE_DTYPES)
@pytest.mark.parametrize("size", [1, 33, 64, 129, 300])
def test_product_is_exact_to_rounding_for_every_size_with_mixed_ranks(size, device, dtype):
    check(make(device, dtype, size))


@pytest.mark.parametrize(("device", "dtype"), DEVICE_DTYPES)
@pytest.mark.parametrize("num_tokens", [1, 17, 75, LARGE])
@pytest.mark.parametrize("num_parts", [1, 3])
def test_every_row_of_every_group_is_found(num_tokens, num_parts, device, dtype):
    check(make(device, dtype, 20, random_mapping(num_tokens), num_parts=num_parts))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("num_tokens", [129, 1025, 4099])
def test_every_row_of_large_steps_is_found(num_tokens, dtype):
    check(make("cuda", dtype, 328, random_mapping(num_tokens)))


@pytest.mark.parametrize(("device", "dtype"), DEVICE_DTYPES)
@pytest.mark.parametrize("mapping", [[LAST_SLOT] * 9, [-1, 0, 1, 2, LAST_SLOT], [-1], [-1] * 20])
def test_one_adapter_many_or_none(mapping, device, dtype):
    check(make(device, dtype, 40, mapping))


@pytest.mark.parametrize(("device", "dtype", "num_tokens"), STEPS)
@pytest.mark.parametrize("num_parts", [1, 3])
def test_result_has_the_bits_of_expand_and_silu_mul(num_tokens, num_parts, device, dtype):
    mapping = mapping_of(num_tokens)
    step = make(device, dtype, 70, mapping, num_parts=num_parts, is_exact=True)
    # A delta that is not there must not even turn -0 into 0.
    step.y[:, ::7] = -0.0
    assert_same_on_cpu(lora_silu_mul(step.y, step.delta), expand_then_silu_mul(step))


@pytest.mark.parametrize(("device", "dtype", "num_tokens"), STEPS)
def test_rows_and_slices_without_a_module_have_the_bits_of_silu_mul(num_tokens, device, dtype):
    mapping = (MIXED * 30)[:num_tokens]
    step = make_delta_case(mapping, {**MIXED_RANKS, 4: (None, None)}, (70, 70), dtype, device)
    step.y[:, ::7] = -0.0
    is_plain = ((step.case.mapping < 0) | (step.case.mapping == 4)).to(device)
    found = lora_silu_mul(step.y, step.delta)
    assert_same_on_cpu(found[is_plain], silu_mul(step.y)[is_plain])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("how", BAD_SLOTS)
@pytest.mark.parametrize("num_tokens", [11, LARGE])
def test_rows_that_cannot_have_their_adapter_become_nan_and_no_others(num_tokens, how, device):
    """They must fail at sampling, not answer as the base model."""
    mapping = mapping_of(num_tokens)
    step = make(device, torch.float16, 70, mapping)
    expected = lora_silu_mul(step.y, step.delta)
    make_bad(step.delta, how)
    is_bad = (step.case.mapping == LAST_SLOT).to(device)

    found = lora_silu_mul(step.y, step.delta)

    assert found[is_bad].isnan().all()
    assert expected.isfinite().all()
    assert_same_on_cpu(found[~is_bad], expected[~is_bad])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("num_padded", [1, 20, 300])
def test_padded_rows_are_neither_read_nor_written(num_padded, device):
    step = make(device, torch.float16)
    expected = lora_silu_mul(step.y, step.delta)
    y = torch.cat([step.y, step.y.new_full((num_padded, step.y.shape[1]), NAN)])
    out = step.y.new_full((len(y), 70), 7.0)

    lora_silu_mul(y, padded(step.delta, num_padded), out)

    assert (out[len(MIXED) :] == 7.0).all()
    if num_padded < 200:  # In one class of T with the step alone, so the same tiles.
        assert_same_on_cpu(out[: len(MIXED)], expected)
    else:
        case = step.case
        bounds = lora_silu_mul_reference(case.y, step.v, case.table, case.mapping)
        assert_within_bounds(out[: len(MIXED)].cpu(), bounds)


@pytest.mark.parametrize("device", DEVICES)
def test_rows_at_a_distance_leave_what_lies_between(device):
    step = make(device, torch.float16)
    expected = lora_silu_mul(step.y, step.delta)
    wide = torch.full((len(MIXED), 200), NAN, dtype=torch.float16, device=device)
    wide[:, 10:150] = step.y
    out = torch.full((len(MIXED), 100), NAN, dtype=torch.float16, device=device)

    lora_silu_mul(wide[:, 10:150], step.delta, out[:, 5:75])

    assert_same_on_cpu(out[:, 5:75], expected)
    assert out[:, :5].isnan().all()
    assert out[:, 75:].isnan().all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("num_tokens", [11, LARGE])
def test_programs_that_take_several_tiles_of_tokens_do_them_all(num_tokens, device, monkeypatch):
    mapping = mapping_of(num_tokens)
    step = make(device, torch.float16, 70, mapping)
    expected = lora_silu_mul(step.y, step.delta)
    monkeypatch.setattr(lora_silu_mul_module, "choose_num_tile_programs", lambda *_: 2)
    assert_same_on_cpu(lora_silu_mul(step.y, step.delta), expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "launch",
    [
        LoRASiluMulLaunch(32, 16, 16, n_tiles=3, num_warps=4, num_stages=1),
        LoRASiluMulLaunch(16, 128, 32, n_tiles=1, num_warps=4, num_stages=3),
        LoRASiluMulLaunch(64, 32, 64, n_tiles=2, num_warps=8, num_stages=2),
        LoRASiluMulLaunch(16, 64, 64, n_tiles=8, num_warps=4, num_stages=3),
    ],
)
def test_every_launch_gives_a_right_result(launch, device):
    check(make(device, torch.float16, 145), launch)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("launch", dict.fromkeys(launches_that_ship()), ids=str)
def test_every_launch_that_ships_does_a_run_of_tiles_and_a_rest(launch, device):
    check(make(device, torch.float16, launch.n_tiles * launch.block_n + 13), launch)


@pytest.mark.parametrize("device", DEVICES)
def test_step_without_tokens_gives_none(device):
    step = make(device, torch.float16, 8, [])
    assert lora_silu_mul(step.y, step.delta).shape == (0, 8)


def test_warm_up_compiles_what_any_step_uses():
    for largest in (1, 7, 200, 3000):
        warm = {choose_silu_mul_launch(token_class(n), 64, 2) for n in warm_up_token_counts(largest)}
        used = {choose_silu_mul_launch(token_class(n), 64, 2) for n in range(1, largest + 1)}
        assert used <= warm


def test_unfit_shapes_are_refused_by_name():
    step = make("cpu", torch.float32, 6)
    with pytest.raises(ValueError, match=r"\(11, 5\)"):
        lora_silu_mul(step.y[:, :5], step.delta)
    with pytest.raises(ValueError, match="expected twice 5"):
        lora_silu_mul(step.y[:, :10], step.delta)
    with pytest.raises(ValueError, match=r"out is \(11, 5\)"):
        lora_silu_mul(step.y, step.delta, torch.empty(11, 5))
    with pytest.raises(ValueError, match=r"float32, expected twice 6 of torch\.float16"):
        lora_silu_mul(step.y.half(), step.delta)
    with pytest.raises(ValueError, match=r"shape \(10, 12\)"):
        lora_silu_mul(step.y[:-1], step.delta)
    with pytest.raises(ValueError, match="v has shape"):
        lora_silu_mul(step.y, type(step.delta)(step.delta.v[:, :1], step.delta.table, step.delta.metadata))
