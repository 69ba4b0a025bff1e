"""The look-up kernel against an exact oracle, element by element."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from kernels.device_cases import DEVICE_DTYPES, DEVICES
from kernels.lora_cases import LAST_SLOT, assert_within_bounds, has_same_bits, random_weights
from kernels.triton_lora_cases import MIXED, NAN, RANKS, assert_same_on_cpu, columns_of, tables_on_device
from lora_serve.kernels import LoRALayerTable
from lora_serve.kernels.device_tables import DeviceLayerTable, DeviceTables
from lora_serve.kernels.lora_builder import install_weights
from lora_serve.kernels.reference import lora_lookup_reference
from lora_serve.kernels.triton_lora_embedding import lora_lookup_op, triton_lora_lookup

VOCAB_SIZE = 29
RANK_OF_SLOT = {0: 3, 1: 64, 2: 8, 4: None, LAST_SLOT: 150}
TOKEN_IDS = [28, 3, 0, 28, 7, 0, 28, 1, 2, 19, 5]


def make_table(rank_of_slot: dict[int, int | None], dtype: torch.dtype = torch.float32) -> LoRALayerTable:
    generator = torch.Generator().manual_seed(1)
    table = LoRALayerTable((6,), VOCAB_SIZE, is_embedding=True)
    weights = {slot: random_weights(generator, (rank,), table, dtype) for slot, rank in rank_of_slot.items()}
    install_weights({table: weights})
    return table


def look_up(
    v: Tensor, token_ids: Tensor, arena: Tensor, tables: DeviceTables, mapping: Tensor, fill_zeros: bool
) -> None:
    triton_lora_lookup(
        v, token_ids, arena, tables.layers[0], mapping, vocab_size=VOCAB_SIZE, fill_zeros=fill_zeros
    )


def check(rank_of_slot: dict[int, int | None], mapping: list[int], device: str, dtype: torch.dtype) -> None:
    table = make_table(rank_of_slot, dtype)
    arena, tables = tables_on_device(table, device)
    slots = torch.tensor(mapping, dtype=torch.int32)
    token_ids = torch.tensor((TOKEN_IDS * len(mapping))[: len(mapping)], dtype=torch.int64)
    max_rank = 152
    expected = lora_lookup_reference(token_ids, table, slots, max_rank, dtype=dtype)
    token_ids[slots < 0] = 10**6  # not read
    complete, partial = (
        torch.full((1, 1, len(mapping), max_rank), NAN, dtype=dtype, device=device) for _ in range(2)
    )

    look_up(complete, token_ids.to(device), arena, tables, slots.to(device), True)
    look_up(partial, token_ids.to(device, torch.int32), arena, tables, slots.to(device), False)

    assert_within_bounds(complete[0].cpu(), expected)
    written = (expected.bound > 0)[None]
    assert has_same_bits(partial.cpu()[written], complete.cpu()[written])
    assert partial.cpu()[~written].isnan().all()


@pytest.mark.parametrize(("device", "dtype"), DEVICE_DTYPES)
@pytest.mark.parametrize("rank", RANKS)
def test_look_up_is_exact_to_rounding_for_every_rank(rank, device, dtype):
    check(dict.fromkeys(RANK_OF_SLOT, rank), MIXED, device, dtype)


@pytest.mark.parametrize(("device", "dtype"), DEVICE_DTYPES)
@pytest.mark.parametrize("mapping", [MIXED, [], [-1], [LAST_SLOT], [0, 1, -1, 2] * 10])
def test_look_up_is_exact_to_rounding_for_mixed_ranks_and_missing_modules(mapping, device, dtype):
    check(RANK_OF_SLOT, mapping, device, dtype)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("token_id", [-1, VOCAB_SIZE])
def test_token_id_outside_the_vocabulary_gives_nan_in_its_row_only(device, token_id):
    arena, tables = tables_on_device(make_table(RANK_OF_SLOT), device)
    v = torch.full((1, 1, 3, 152), NAN, device=device)
    token_ids = torch.tensor([1, token_id, 2], device=device)
    look_up(v, token_ids, arena, tables, torch.tensor([0, 1, 0], dtype=torch.int32, device=device), True)
    assert v[0, 0, 1, :64].isnan().all()
    assert v[0, 0, ::2].isfinite().all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("how", ["empty slot", "slot beyond the tables"])
def test_slot_without_adapter_gives_nan(device, how):
    arena, tables = tables_on_device(make_table(RANK_OF_SLOT), device)
    if how == "empty slot":
        tables.rows[LAST_SLOT].copy_(tables.empty_row)
    else:
        # The rows behind them hold an adapter, which a kernel that does not look would take.
        shortened = (column[:LAST_SLOT] for column in columns_of(tables.layers[0]))
        tables.layers = (DeviceLayerTable(*shortened),)
    v = torch.zeros(1, 1, 2, 152, device=device)
    mapping = torch.tensor([LAST_SLOT, 0], dtype=torch.int32, device=device)
    look_up(v, torch.tensor([1, 2], device=device), arena, tables, mapping, True)
    assert v[0, 0, 0].isnan().all()
    assert v[0, 0, 1].isfinite().all()


@pytest.mark.parametrize("device", DEVICES)
def test_rank_above_that_of_v_gives_nan_in_its_rows_only(device):
    arena, tables = tables_on_device(make_table(RANK_OF_SLOT), device)
    arena.nan_to_num_(nan=1.0)  # It must not be what lies behind A that makes them NaN.
    tables.layers[0].lora_rank[LAST_SLOT] = 153
    v = torch.zeros(1, 1, 2, 152, device=device)
    mapping = torch.tensor([LAST_SLOT, 0], dtype=torch.int32, device=device)
    look_up(v, torch.tensor([1, 2], device=device), arena, tables, mapping, True)
    assert v[0, 0, 0].isnan().all()
    assert v[0, 0, 1].isfinite().all()


@pytest.mark.parametrize("device", DEVICES)
def test_token_ids_may_lie_at_any_distance(device):
    arena, tables = tables_on_device(make_table(RANK_OF_SLOT), device)
    mapping = torch.tensor(MIXED, dtype=torch.int32, device=device)
    token_ids = torch.tensor(TOKEN_IDS, device=device)
    outer = torch.full((2 * len(TOKEN_IDS),), 10**6, device=device)
    outer[::2] = token_ids
    v, expected = (torch.full((1, 1, len(MIXED), 152), NAN, device=device) for _ in range(2))
    look_up(v, outer[::2], arena, tables, mapping, True)
    look_up(expected, token_ids, arena, tables, mapping, True)
    assert_same_on_cpu(v, expected)
    assert v.isfinite().all()


@pytest.mark.parametrize("device", DEVICES)
def test_operator_gives_what_the_function_gives_and_has_a_fake(device):
    arena, tables = tables_on_device(make_table(RANK_OF_SLOT), device)
    table = tables.layers[0]
    mapping = torch.tensor(MIXED, dtype=torch.int32, device=device)
    token_ids = torch.tensor(TOKEN_IDS, device=device)
    v, expected = (torch.full((1, 1, len(MIXED), 152), NAN, device=device) for _ in range(2))
    look_up(expected, token_ids, arena, tables, mapping, True)
    args = (v, token_ids, arena, table.a_offset, table.lora_rank, table.scaling, mapping, VOCAB_SIZE, True)
    torch.ops.lora_serve.lora_lookup(*args)
    assert_same_on_cpu(v, expected)
    torch.library.opcheck(lora_lookup_op, args, test_utils=("test_schema", "test_faketensor"))


def test_wrong_shapes_are_refused():
    arena, tables = tables_on_device(make_table(RANK_OF_SLOT), "cpu")
    v, ids, mapping = torch.zeros(1, 1, 2, 152), torch.tensor([1, 2]), torch.zeros(2, dtype=torch.int32)
    with pytest.raises(ValueError, match="token_ids has shape"):
        look_up(v, ids[:1], arena, tables, mapping, True)
    with pytest.raises(ValueError, match="int32 or int64"):
        look_up(v, ids.float(), arena, tables, mapping, True)
    with pytest.raises(ValueError, match="token_lora_mapping has shape"):
        look_up(v, ids, arena, tables, mapping[:1], True)
    with pytest.raises(ValueError, match="v has shape"):
        look_up(v.expand(2, 1, 2, 152), ids, arena, tables, mapping, True)
