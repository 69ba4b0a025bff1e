"""What went wrong with LoRA kernels in engines before this one; README.md has the list."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from executor.plans import PlanStandIn
from kernels.device_cases import DEVICES
from kernels.lora_cases import LAST_SLOT, MAX_LORAS, has_same_bits
from kernels.triton_lora_cases import (
    MIXED,
    MIXED_RANKS,
    NAN,
    OnDevice,
    for_more_tokens,
    mixed_case,
    on_device,
)
from lora_serve.executor.device_inputs import DeviceInputs
from lora_serve.kernels import LoRAMetadata, build_lora_metadata
from lora_serve.kernels import triton_lora_expand as expand_module
from lora_serve.kernels import triton_lora_shrink as shrink_module
from lora_serve.kernels.triton_lora_linear import triton_add_lora_linear, warm_up_token_counts
from lora_serve.kernels.triton_lora_shrink import triton_lora_shrink
from lora_serve.kernels.triton_lora_tiles import NOT_SPECIALIZED

# What lies above the rank of an adapter in unfilled memory is added up and dropped; NumPy warns of it.
pytestmark = [
    pytest.mark.filterwarnings("ignore:invalid value encountered in add:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:overflow encountered in add:RuntimeWarning"),
]


def run(step: OnDevice, metadata: LoRAMetadata, *, arena: Tensor | None = None) -> Tensor:
    y = step.y.clone()
    triton_add_lora_linear(
        y,
        step.x,
        step.arena if arena is None else arena,
        step.table,
        metadata,
        output_slices=step.output_slices,
        max_rank=step.max_rank,
    )
    return y


@pytest.mark.parametrize("device", DEVICES)
def test_rows_beyond_the_batch_do_nothing_whatever_an_earlier_step_left_there(device):
    """41: a padded step has groups of its real rows alone; what else its arrays hold is not looked at."""
    num_real = 3
    step = on_device(mixed_case(), device)
    real = build_lora_metadata(torch.tensor(MIXED[:num_real]), MAX_LORAS, device=torch.device(device))
    before = build_lora_metadata(torch.tensor(MIXED), MAX_LORAS, device=torch.device(device))
    rest = torch.arange(num_real, len(MIXED), dtype=torch.int32, device=device)
    counts, ids = real.num_tokens_per_lora.clone(), real.active_lora_ids.clone()
    ids[counts == 0] = LAST_SLOT
    tiles = for_more_tokens(real.lora_tiles, num_real, len(MIXED))
    is_unused = torch.arange(tiles.shape[1], device=device) > tiles[:, :1, 0]
    tiles[is_unused] = before.lora_tiles[is_unused]
    metadata = LoRAMetadata(
        token_lora_mapping=torch.cat([real.token_lora_mapping, before.token_lora_mapping[num_real:]]),
        token_indices_sorted_by_lora_ids=torch.cat([real.token_indices_sorted_by_lora_ids, rest]),
        num_tokens_per_lora=counts,
        lora_token_start_loc=real.lora_token_start_loc,
        active_lora_ids=ids,
        lora_tiles=tiles,
        no_adapter=False,
    )
    step.x[num_real:] = NAN
    v = step.new_v()
    triton_lora_shrink(v, step.x, step.arena, step.table, metadata, fill_zeros=True)
    y = run(step, metadata)

    assert v[:, :, :num_real].isfinite().all()
    assert v[:, :, num_real:].isnan().all()
    assert not has_same_bits(y[0], step.y[0])
    assert has_same_bits(y[num_real:], step.y[num_real:])


def test_step_without_adapters_behind_one_with_them_leaves_none_of_their_groups():
    """42: a captured step with adapters reads the same memory again, and the next plan has written it."""
    inputs = DeviceInputs(
        max_num_seqs=len(MIXED),
        max_num_tokens=len(MIXED),
        max_pages_per_row=1,
        max_loras=MAX_LORAS,
        page_size=4,
        needs_row_pages=False,
        num_buffers=2,
        device=torch.device("cpu"),
    )
    step = on_device(mixed_case(), "cpu")
    captured = None
    for slots, changed in ((MIXED, True), ([-1] * len(MIXED), False), (MIXED[::-1], True)):
        plan = PlanStandIn(
            rows=[{"page_table_row": row, "adapter_slot": slot} for row, slot in enumerate(slots)],
            tokens=[1] * len(slots),
            max_loras=MAX_LORAS,
        )
        if captured is None:
            captured = inputs.decode_step(len(MIXED), plan.layout, has_adapters=True).context.lora
        loaded = inputs.load(plan, adapts_embedding=False)

        assert (loaded.context.lora is not None) == changed
        expected = run(step, build_lora_metadata(torch.tensor(slots), MAX_LORAS))
        assert has_same_bits(run(step, captured), expected)
        assert has_same_bits(expected, step.y) != changed


@pytest.mark.parametrize("device", DEVICES)
def test_weights_that_moved_are_read_where_they_are_now(device):
    """44: the same tables at the same addresses, but other offsets, another arena, other numbers in it."""
    step = on_device(mixed_case(), device)
    expected = run(step, step.metadata)
    moved = torch.cat([torch.full((64,), NAN, device=device), step.arena])
    step.table.a_offset.add_(64)
    step.table.b_offset.add_(64)
    step.arena.fill_(NAN)
    assert has_same_bits(run(step, step.metadata, arena=moved), expected)

    step.table.scaling.neg_()
    assert not has_same_bits(run(step, step.metadata, arena=moved), expected)
    moved.fill_(NAN)
    is_changed = run(step, step.metadata, arena=moved).isnan().any(dim=1)
    assert is_changed.tolist() == [slot in (0, 1, LAST_SLOT) for slot in MIXED]


class Launches:
    """In place of a kernel: notes all that it would be compiled for on a GPU, and does nothing."""

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel
        self.variants: set[tuple[Any, ...]] = set()

    def __getitem__(self, grid: Any) -> Any:
        def launch(*args: Any, **options: Any) -> None:
            named = dict(zip(self._kernel.arg_names, args, strict=False))
            traits = [(name, _traits(value)) for name, value in named.items() if name not in NOT_SPECIALIZED]
            self.variants.add((*traits, *sorted(options.items())))

        return launch


def _traits(value: Any) -> tuple[Any, ...]:
    if isinstance(value, Tensor):
        return value.dtype, value.data_ptr() % 16 == 0
    return type(value), value == 1, value % 16 == 0


def test_warm_up_launches_every_variant_that_real_adapters_need(monkeypatch):
    """50: it runs all sizes with no adapter in the tables; ranks, mixes and offsets compile nothing new."""
    kernels = [Launches(shrink_module._lora_shrink_kernel), Launches(expand_module._lora_expand_kernel)]
    monkeypatch.setattr(shrink_module, "_lora_shrink_kernel", kernels[0])
    monkeypatch.setattr(expand_module, "_lora_expand_kernel", kernels[1])
    largest, in_features = 600, 8192
    case = mixed_case(in_features=in_features)
    empty = on_device(case, "cpu")
    empty.tables.rows.copy_(empty.tables.empty_row)

    def run_rows(step: OnDevice, mapping: list[int]) -> None:
        num_tokens = len(mapping)
        metadata = build_lora_metadata(torch.tensor(mapping, dtype=torch.int32), max_loras=40)
        triton_add_lora_linear(
            torch.zeros(num_tokens, sum(step.output_slices)),
            torch.zeros(num_tokens, in_features),
            step.arena,
            step.table,
            metadata,
            output_slices=step.output_slices,
            max_rank=step.max_rank,
        )

    for num_tokens in warm_up_token_counts(largest):
        run_rows(empty, [0] * num_tokens)
    warm = [set(kernel.variants) for kernel in kernels]

    step = on_device(case, "cpu")
    for num_tokens in range(1, largest + 1, 7):
        run_rows(step, (MIXED * 60)[:num_tokens])
        run_rows(step, [sorted(MIXED_RANKS)[num_tokens % len(MIXED_RANKS)]] * num_tokens)

    assert [kernel.variants - known for kernel, known in zip(kernels, warm, strict=True)] == [set(), set()]
    assert all(len(known) > 1 for known in warm)
