"""The expand kernel against an exact oracle, element by element."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from kernels.device_cases import DEVICE_DTYPES, DEVICES
from kernels.lora_cases import (
    LAST_SLOT,
    LoRACase,
    assert_within_bounds,
    has_same_bits,
    make_case,
    signed,
)
from kernels.triton_lora_cases import (
    MIXED,
    MIXED_RANKS,
    NAN,
    RANKS,
    OnDevice,
    assert_same_on_cpu,
    columns_of,
    mixed_case,
    on_device,
    random_case,
    rank_case,
)
from lora_serve.kernels.device_tables import DeviceLayerTable
from lora_serve.kernels.reference import lora_expand_reference
from lora_serve.kernels.triton_lora_expand import lora_expand_op, triton_lora_expand


def random_v(case: LoRACase, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(len(case.x))
    return signed(generator, case.table.num_slices, len(case.x), case.max_rank, dtype=dtype)


def expand(step: OnDevice, y: Tensor, v: Tensor, **options: int) -> None:
    triton_lora_expand(
        y, v, step.arena, step.table, step.metadata, output_slices=step.output_slices, **options
    )


def check(case: LoRACase, device: str, *, offset_start: int = 0, y_dtype: torch.dtype | None = None) -> None:
    """Rows of slot -1, slices without a module and columns around the slices keep their bits."""
    step = on_device(case, device)
    y = case.y.to(y_dtype or case.y.dtype)
    v = random_v(case, y.dtype)
    y[case.mapping < 0] = NAN
    around = y.new_full((len(y), offset_start), NAN)
    wide = torch.cat([around, y, around], dim=1)
    expected = lora_expand_reference(wide, v, case.table, case.mapping, offset_start=offset_start)
    first, second = (wide.to(device, copy=True) for _ in range(2))

    expand(step, first, step.v_of(v), offset_start=offset_start)
    expand(step, second, step.v_of(v), offset_start=offset_start)

    assert_within_bounds(first.cpu(), expected)
    untouched = expected.bound == 0
    assert has_same_bits(first.cpu()[untouched], wide[untouched])
    assert_same_on_cpu(first, second)


@pytest.mark.parametrize(("device", "dtype"), DEVICE_DTYPES)
@pytest.mark.parametrize("rank", RANKS)
def test_expand_is_exact_to_rounding_for_every_rank(rank, device, dtype):
    check(rank_case(rank, dtype), device)


@pytest.mark.parametrize(("device", "dtype"), DEVICE_DTYPES)
@pytest.mark.parametrize("offset_start", [0, 3])
def test_expand_is_exact_to_rounding_for_mixed_ranks_and_missing_modules(device, dtype, offset_start):
    check(mixed_case(dtype), device, offset_start=offset_start)


@pytest.mark.parametrize(("device", "dtype"), DEVICE_DTYPES)
@pytest.mark.parametrize("output_slices", [(1,), (64, 16), (33, 2, 2, 70), (9, 66, 2, 11, 1)])
def test_expand_is_exact_to_rounding_for_unequal_slices(device, dtype, output_slices):
    ranks = {slot: (rank,) * len(output_slices) for slot, rank in ((0, 5), (LAST_SLOT, 8))}
    check(make_case([0, LAST_SLOT, -1], ranks, output_slices=output_slices, dtype=dtype), device)


@pytest.mark.parametrize(("device", "dtype"), DEVICE_DTYPES)
@pytest.mark.parametrize("num_tokens", [1, 17, 75, 300])
def test_expand_finds_every_row_of_every_group(device, dtype, num_tokens):
    check(random_case(num_tokens, dtype), device)


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [129, 1025, 4099])
def test_expand_finds_every_row_of_large_steps(num_tokens):
    check(random_case(num_tokens, torch.bfloat16), "cuda")


@pytest.mark.parametrize(("device", "dtype"), DEVICE_DTYPES)
@pytest.mark.parametrize("rank", [1, 20, 150])
def test_fp32_logits_over_narrower_weights_are_exact_to_fp32(device, dtype, rank):
    case = make_case(
        [LAST_SLOT, -1, 0], {0: (rank,), LAST_SLOT: (3,)}, output_slices=(203,), dtype=dtype, seed=rank
    )
    check(case, device, y_dtype=torch.float32)


@pytest.mark.parametrize(("device", "dtype"), DEVICE_DTYPES)
def test_parts_are_added_before_they_are_rounded(device, dtype):
    case = mixed_case(dtype)
    step = on_device(case, device)
    parts = torch.stack([random_v(case, torch.float32) for _ in range(3)])
    parts *= torch.tensor([1000.0, -999.0, 1.5]).view(3, 1, 1, 1)
    total = ((parts[0] + parts[1]) + parts[2]).to(dtype)
    padded = torch.full((3, 3, len(MIXED), step.max_rank), NAN)
    padded[..., : case.max_rank] = parts
    from_parts, from_total = step.y.clone(), step.y.clone()
    expand(step, from_parts, padded.to(device))
    expand(step, from_total, step.v_of(total))
    assert_same_on_cpu(from_parts, from_total)


@pytest.mark.parametrize("device", DEVICES)
def test_expand_without_add_inputs_overwrites_nan_in_adapter_rows_only(device):
    case = mixed_case()
    step = on_device(case, device)
    v = random_v(case, torch.float32)
    y = torch.full((len(MIXED), 2 + 121 + 2), NAN)
    expected = lora_expand_reference(y, v, case.table, case.mapping, offset_start=2, add_inputs=False)
    actual = y.to(device, copy=True)

    expand(step, actual, step.v_of(v), offset_start=2, add_inputs=False)

    assert_within_bounds(actual.cpu(), expected)
    assert actual[case.mapping >= 0, 2:-2].isfinite().all()
    assert (actual[MIXED.index(4), 2:-2] == 0).all()


@pytest.mark.parametrize("device", DEVICES)
def test_rows_and_columns_of_the_output_may_lie_at_any_distance(device):
    case = mixed_case()
    step = on_device(case, device)
    v = step.v_of(random_v(case, torch.float32))
    outer = torch.full((len(MIXED) * 2, 300), NAN, device=device)
    view = outer[1::2, 7 : 7 + 242 : 2]
    view.copy_(step.y)
    expand(step, view, v)
    expand(step, step.y, v)
    assert_same_on_cpu(view, step.y)
    view.fill_(NAN)
    assert outer.isnan().all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("add_inputs", [True, False])
@pytest.mark.parametrize("how", ["empty slot", "slot beyond the tables", "rank above that of v"])
def test_rows_that_cannot_have_their_adapter_become_nan_on_all_slices(device, add_inputs, how):
    """They must fail at sampling, not answer as the base model."""
    case = mixed_case()
    step = on_device(case, device)
    v = step.v_of(random_v(case, torch.float32))
    expected, y = step.y.clone(), step.y.clone()
    expand(step, expected, v, add_inputs=add_inputs)
    is_bad = case.mapping == LAST_SLOT
    if how == "empty slot":
        step.tables.rows[LAST_SLOT].copy_(step.tables.empty_row)
    elif how == "slot beyond the tables":
        # The rows behind them hold an adapter, which a kernel that does not look would take.
        shortened = (column[:LAST_SLOT] for column in columns_of(step.table))
        step.tables.layers = (DeviceLayerTable(*shortened),)
    else:
        step.table.lora_rank[LAST_SLOT] = step.max_rank + 1
        for numbers in (step.arena, v):  # It must not be what lies behind them that makes the rows NaN.
            numbers.nan_to_num_(nan=1.0)

    expand(step, y, v, add_inputs=add_inputs)

    assert y[is_bad].isnan().all()
    assert_same_on_cpu(y[~is_bad], expected[~is_bad])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("mapping", [[], [-1], [-1] * 20])
@pytest.mark.parametrize("add_inputs", [True, False])
def test_step_without_adapters_changes_nothing(device, mapping, add_inputs):
    case = make_case(mapping, MIXED_RANKS)
    step = on_device(case, device)
    expand(step, step.y, step.new_v(), add_inputs=add_inputs)
    assert_same_on_cpu(step.y, case.y)


@pytest.mark.parametrize("device", DEVICES)
def test_operator_gives_what_the_function_gives_and_has_a_fake(device):
    case = mixed_case()
    step = on_device(case, device)
    v = step.v_of(random_v(case, torch.float32))
    expected, y = step.y.clone(), step.y.clone()
    expand(step, expected, v)
    args = (
        v,
        step.arena,
        step.table.b_offset,
        step.table.lora_rank,
        step.metadata.token_indices_sorted_by_lora_ids,
        step.metadata.lora_tiles,
        list(step.output_slices),
        0,
        True,
    )
    torch.ops.lora_serve.lora_expand(y, *args)
    assert_same_on_cpu(y, expected)
    torch.library.opcheck(lora_expand_op, (y, *args), test_utils=("test_schema", "test_faketensor"))


def test_wrong_shapes_are_refused():
    step = on_device(mixed_case(), "cpu")
    v = step.new_v()
    with pytest.raises(ValueError, match="O >= 121"):
        expand(step, step.y[:, :-1], v)
    with pytest.raises(ValueError, match="offset_start 1"):
        expand(step, step.y, v, offset_start=1)
    with pytest.raises(ValueError, match="offset_start -1"):
        expand(step, step.y, v, offset_start=-1)
    with pytest.raises(ValueError, match="y has shape"):
        expand(step, step.y[:-1], v)
    with pytest.raises(ValueError, match=r"y is torch\.float16"):
        expand(step, step.y.half(), v)
    with pytest.raises(ValueError, match="v has shape"):
        expand(step, step.y, v[:, :-1])
    with pytest.raises(ValueError, match=r"v has 2 parts of torch\.bfloat16, expected float32"):
        expand(step, step.y, step.new_v(2, torch.bfloat16))
    with pytest.raises(ValueError, match="the metadata 11 tokens"):
        expand(step, step.y[:2], v[:, :, :2].contiguous())


def test_metadata_of_another_dtype_or_device_is_refused():
    step = on_device(mixed_case(), "cpu")
    order = step.metadata.token_indices_sorted_by_lora_ids
    for wrong, message in (
        (order.long(), r"metadata is torch\.int64 on cpu, expected int32 on cpu as y"),
        (order.to("meta"), r"metadata is torch\.int32 on meta, expected int32 on cpu as y"),
    ):
        step.metadata = replace(step.metadata, token_indices_sorted_by_lora_ids=wrong)
        with pytest.raises(ValueError, match=message):
            expand(step, step.y, step.new_v())
