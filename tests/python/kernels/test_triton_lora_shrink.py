"""The shrink kernel against an exact oracle, element by element."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from kernels.device_cases import DEVICE_DTYPES, DEVICES
from kernels.lora_cases import (
    LAST_SLOT,
    LoRACase,
    assert_within_bounds,
    has_same_bits,
    make_case,
)
from kernels.triton_lora_cases import (
    MIXED,
    NAN,
    RANKS,
    assert_same_on_cpu,
    mixed_case,
    on_device,
    random_case,
    rank_case,
)
from lora_serve.kernels.reference import lora_shrink_reference
from lora_serve.kernels.triton_lora_shrink import lora_shrink_op, triton_lora_shrink


def check(case: LoRACase, device: str, *, num_parts: int = 1, dtype: torch.dtype = torch.float32) -> None:
    """Complete v against the oracle; again without zeros, where nothing else may be written."""
    step = on_device(case, device)
    v, again, partial = (step.new_v(num_parts, dtype) for _ in range(3))
    triton_lora_shrink(v, step.x, step.arena, step.table, step.metadata, fill_zeros=True)
    triton_lora_shrink(again, step.x, step.arena, step.table, step.metadata, fill_zeros=True)
    triton_lora_shrink(partial, step.x, step.arena, step.table, step.metadata)

    total = v.cpu()[0] if num_parts == 1 else v.cpu().double().sum(0).float()
    expected = lora_shrink_reference(case.x, case.table, case.mapping, step.max_rank, dtype=dtype)
    assert_within_bounds(total, expected)
    assert_same_on_cpu(v, again)
    # The oracle's bound is 0 exactly where an adapter has no number.
    written = (expected.bound > 0).expand(num_parts, -1, -1, -1)
    assert has_same_bits(partial.cpu()[written], v.cpu()[written])
    assert partial.cpu()[~written].isnan().all()


@pytest.mark.parametrize(("device", "dtype"), DEVICE_DTYPES)
@pytest.mark.parametrize("rank", RANKS)
def test_shrink_is_exact_to_rounding_for_every_rank(rank, device, dtype):
    check(rank_case(rank, dtype), device, dtype=dtype)


@pytest.mark.parametrize(("device", "dtype"), DEVICE_DTYPES)
def test_shrink_is_exact_to_rounding_for_mixed_ranks_and_missing_modules(device, dtype):
    check(mixed_case(dtype), device)


@pytest.mark.parametrize(("device", "dtype"), DEVICE_DTYPES)
@pytest.mark.parametrize(("in_features", "num_parts"), [(1, 1), (601, 1), (601, 3), (512, 2), (40, 4)])
def test_parts_of_the_input_features_add_up(device, dtype, in_features, num_parts):
    """A tail of the features is not dropped, and a part without features is 0."""
    check(random_case(7, dtype, in_features=in_features), device, num_parts=num_parts)


@pytest.mark.parametrize(("device", "dtype"), DEVICE_DTYPES)
def test_each_part_holds_all_slices(device, dtype):
    check(mixed_case(dtype, in_features=601), device, num_parts=3)


@pytest.mark.parametrize(("device", "dtype"), DEVICE_DTYPES)
@pytest.mark.parametrize("num_tokens", [1, 17, 75, 300])
def test_shrink_finds_every_row_of_every_group(device, dtype, num_tokens):
    check(random_case(num_tokens, dtype), device)


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [129, 1025, 4099])
def test_shrink_finds_every_row_of_large_steps(num_tokens):
    check(random_case(num_tokens, torch.bfloat16, in_features=1100), "cuda", num_parts=2)


@pytest.mark.parametrize("device", DEVICES)
def test_rows_and_columns_of_the_input_may_lie_at_any_distance(device):
    case = mixed_case(in_features=40)
    step = on_device(case, device)
    outer = torch.full((len(MIXED) * 2, 90), NAN, device=device)
    outer[::2, 5:85:2] = step.x
    v, expected = step.new_v(), step.new_v()
    triton_lora_shrink(v, outer[::2, 5:85:2], step.arena, step.table, step.metadata)
    triton_lora_shrink(expected, step.x, step.arena, step.table, step.metadata)
    assert_same_on_cpu(v, expected)


@pytest.mark.parametrize("device", DEVICES)
def test_nan_in_rows_without_adapter_reaches_nothing(device):
    case = mixed_case()
    case.x[case.mapping < 0] = NAN
    case.x[torch.tensor(MIXED) == 4] = NAN
    step = on_device(case, device)
    v = step.new_v()
    triton_lora_shrink(v, step.x, step.arena, step.table, step.metadata, fill_zeros=True)
    assert v.isfinite().all()
    assert (v[:, :, case.mapping < 0] == 0).all()


@pytest.mark.parametrize("device", DEVICES)
def test_nan_in_a_row_with_adapter_stays_in_the_columns_of_its_rank(device):
    case = mixed_case()
    case.x[2] = NAN  # of slot 0, whose ranks are 3, none and 5
    step = on_device(case, device)
    v = step.new_v()
    triton_lora_shrink(v, step.x, step.arena, step.table, step.metadata, fill_zeros=True)
    assert v.isnan().sum(dim=3)[0].sum(dim=1).tolist() == [3, 0, 5]
    assert v[0, 0, 2, :3].isnan().all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("mapping", [[], [-1], [-1] * 20])
def test_step_without_adapters_writes_nothing(device, mapping):
    step = on_device(make_case(mapping, {0: (5, 5, 5)}), device)
    v = step.new_v()
    triton_lora_shrink(v, step.x, step.arena, step.table, step.metadata)
    assert v.isnan().all()


@pytest.mark.parametrize("device", DEVICES)
def test_slot_without_adapter_gives_nan_and_others_their_numbers(device):
    case = mixed_case()
    step = on_device(case, device)
    before, after = step.new_v(), step.new_v()
    triton_lora_shrink(before, step.x, step.arena, step.table, step.metadata, fill_zeros=True)
    step.tables.rows[1].copy_(step.tables.empty_row)
    triton_lora_shrink(after, step.x, step.arena, step.table, step.metadata, fill_zeros=True)
    is_empty = case.mapping == 1
    assert after[:, :, is_empty].isnan().all()
    assert_same_on_cpu(after[:, :, ~is_empty], before[:, :, ~is_empty])


@pytest.mark.parametrize(("device", "dtype"), DEVICE_DTYPES)
def test_scaling_is_applied_before_rounding(device, dtype):
    """A product that overflows or loses bits unscaled is right when it is scaled in fp32 first."""
    case = make_case([0], {0: (1,)}, output_slices=(1,), in_features=3, dtype=dtype)
    step = on_device(case, device)
    step.arena[step.table.a_offset[0, 0] :][:3] = 250.0
    step.table.scaling.fill_(1e-3)
    v = step.new_v(dtype=dtype)
    triton_lora_shrink(v, torch.full_like(step.x, 250.0), step.arena, step.table, step.metadata)
    assert v[0, 0, 0, 0].item() == pytest.approx(187.5, rel=1e-2)


@pytest.mark.parametrize("device", DEVICES)
def test_operator_gives_what_the_function_gives_and_has_a_fake(device):
    step = on_device(mixed_case(), device)
    v, expected = step.new_v(), step.new_v()
    triton_lora_shrink(expected, step.x, step.arena, step.table, step.metadata, fill_zeros=True)
    args = (
        v,
        step.x,
        step.arena,
        step.table.a_offset,
        step.table.lora_rank,
        step.table.scaling,
        step.metadata.token_indices_sorted_by_lora_ids,
        step.metadata.lora_tiles,
        True,
    )
    torch.ops.lora_serve.lora_shrink(*args)
    assert_same_on_cpu(v, expected)
    torch.library.opcheck(lora_shrink_op, args, test_utils=("test_schema", "test_faketensor"))


def test_wrong_shapes_are_refused():
    step = on_device(make_case([LAST_SLOT, 0], {0: (2, 2, 2), LAST_SLOT: (1, 1, 1)}), "cpu")
    v, rest = step.new_v(), (step.arena, step.table, step.metadata)
    with pytest.raises(ValueError, match="x has shape"):
        triton_lora_shrink(v, step.x[:1], *rest)
    with pytest.raises(ValueError, match="x has shape"):
        triton_lora_shrink(v, step.x.half(), *rest)
    with pytest.raises(ValueError, match="v has shape"):
        triton_lora_shrink(v[:, :2], step.x, *rest)
    with pytest.raises(ValueError, match=r"2 parts of torch\.float16"):
        triton_lora_shrink(step.new_v(2, torch.float16), step.x, *rest)
    with pytest.raises(ValueError, match="the metadata 2 tokens"):
        triton_lora_shrink(v[:, :, :1].contiguous(), step.x[:1], *rest)
