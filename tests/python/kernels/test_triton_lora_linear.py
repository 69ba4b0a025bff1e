"""Both halves together on a device, their scratch memory, and CUDA graphs over them."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from kernels.device_cases import DEVICE_DTYPES, DEVICES
from kernels.lora_cases import LAST_SLOT, MAX_LORAS, assert_within_bounds, make_case, random_weights, signed
from kernels.triton_lora_cases import (
    MIXED,
    MIXED_RANKS,
    NAN,
    OnDevice,
    assert_same_on_cpu,
    mixed_case,
    on_device,
    random_case,
    tables_on_device,
)
from lora_serve.kernels import LoRALayerTable, _triton, build_lora_metadata
from lora_serve.kernels import triton_lora_expand as triton_lora_expand_module
from lora_serve.kernels import triton_lora_shrink as triton_lora_shrink_module
from lora_serve.kernels.device_tables import DeviceTables
from lora_serve.kernels.lora_builder import install_weights
from lora_serve.kernels.reference import lora_expand_reference
from lora_serve.kernels.triton_lora_embedding import triton_lora_lookup
from lora_serve.kernels.triton_lora_expand import _MOST_CACHED_TOKENS, triton_lora_expand
from lora_serve.kernels.triton_lora_linear import (
    lora_scratch_elements,
    triton_add_lora_embedding,
    triton_add_lora_linear,
    warm_up_token_counts,
)
from lora_serve.kernels.triton_lora_shrink import triton_lora_shrink
from lora_serve.kernels.triton_lora_tiles import (
    TOKEN_CLASSES,
    choose_expand_tiles,
    choose_num_parts,
    choose_num_tile_programs,
    choose_shrink_tiles,
    token_class,
)

# The scratch memory is not filled. What lies beyond the rank of an adapter is added up and dropped; NumPy,
# which the interpreter computes with, warns where that happens not to be finite. A GPU does not.
pytestmark = [
    pytest.mark.filterwarnings("ignore:invalid value encountered in add:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:overflow encountered in add:RuntimeWarning"),
]


def add_linear(step: OnDevice, y: torch.Tensor, scratch: torch.Tensor | None = None) -> None:
    triton_add_lora_linear(
        y,
        step.x,
        step.arena,
        step.table,
        step.metadata,
        output_slices=step.output_slices,
        max_rank=step.max_rank,
        scratch=scratch,
    )


@pytest.mark.parametrize(("device", "dtype"), DEVICE_DTYPES)
@pytest.mark.parametrize("num_tokens", [3, 20])
def test_linear_is_expand_of_shrink_whatever_the_scratch_holds(device, dtype, num_tokens):
    case = random_case(num_tokens, dtype, in_features=1100)
    step = on_device(case, device)
    num_parts = choose_num_parts(token_class(num_tokens), 1, 1100, step.max_rank)
    assert num_parts > 1
    num_elements = lora_scratch_elements(num_tokens, 1, 1100, step.max_rank)
    scratch = torch.full((num_elements,), NAN, device=device)
    allocated, given = step.y.clone(), step.y.clone()

    add_linear(step, allocated)
    add_linear(step, given, scratch)

    v = step.new_v(num_parts)
    triton_lora_shrink(v, step.x, step.arena, step.table, step.metadata, fill_zeros=True)
    total = v.cpu().sum(0).to(dtype)
    # In another order, so within the oracle's bound of the expand and one more rounding of v.
    expected = lora_expand_reference(case.y, total, case.table, case.mapping)
    magnitude = lora_expand_reference(case.y.abs(), total.abs(), _positive(case.table), case.mapping).value
    rounding = 2 * torch.finfo(dtype).eps * (expected.bound > 0) * magnitude
    assert_within_bounds(allocated.cpu(), type(expected)(expected.value, expected.bound + rounding))
    assert_same_on_cpu(allocated, given)


def _positive(table: LoRALayerTable) -> LoRALayerTable:
    positive = LoRALayerTable(table.output_slices, table.in_features)
    positive.bind(table.arena.abs(), table.tables, table.layer)
    return positive


@pytest.mark.parametrize("device", DEVICES)
def test_layers_share_scratch_without_seeing_each_other(device):
    first, second = on_device(mixed_case(), device), on_device(mixed_case(seed=5), device)
    scratch = torch.full((lora_scratch_elements(len(MIXED), 3, 13, first.max_rank),), NAN, device=device)
    alone, together = second.y.clone(), second.y.clone()
    add_linear(second, alone, scratch)
    add_linear(first, first.y.clone(), scratch)
    add_linear(second, together, scratch)
    assert_same_on_cpu(together, alone)


def test_scratch_that_is_too_small_is_refused():
    step = on_device(mixed_case(), "cpu")
    with pytest.raises(ValueError, match="scratch has 5 elements"):
        add_linear(step, step.y, torch.empty(5))
    with pytest.raises(ValueError, match=r"of torch\.float64"):
        add_linear(step, step.y, torch.empty(10**5, dtype=torch.float64))


@pytest.mark.parametrize(("num_slices", "in_features"), [(1, 13), (3, 4096), (2, 12288)])
@pytest.mark.parametrize("max_rank", [1, 64, 512])
def test_scratch_is_enough_for_every_step_up_to_the_largest(num_slices, in_features, max_rank):
    needed = 0
    for tokens in range(1, 1200):
        parts = choose_num_parts(token_class(tokens), num_slices, in_features, max_rank)
        needed = max(needed, parts * num_slices * tokens * max_rank)
        assert lora_scratch_elements(tokens, num_slices, in_features, max_rank) >= needed


def test_warm_up_compiles_what_any_step_uses():
    def variant(tokens: int) -> tuple[object, ...]:
        limit = token_class(tokens)
        return (
            choose_shrink_tiles(limit, 4096, 64, 2),
            choose_expand_tiles(limit, 6144, 64),
            choose_num_parts(limit, 3, 4096, 64),
        )

    assert {_triton.MOST_EARLY_ROWS, _triton.MOST_EARLY_LORA_ROWS, _MOST_CACHED_TOKENS} <= set(TOKEN_CLASSES)
    for largest in (1, 7, 200, 3000):
        warm = {variant(tokens) for tokens in warm_up_token_counts(largest)}
        assert {variant(tokens) for tokens in range(1, largest + 1)} <= warm


@pytest.mark.parametrize("block_t", [16, 64])
@pytest.mark.parametrize(("num_tokens", "max_loras"), [(1, 64), (5, 2), (128, 64), (512, 8), (5000, 64)])
def test_programs_find_room_on_a_gpu_or_have_full_tiles(block_t, num_tokens, max_loras):
    metadata = build_lora_metadata(torch.arange(num_tokens) % 2, max_loras)
    most = metadata.most_tiles(block_t)
    assert most == num_tokens // block_t + min(num_tokens, max_loras + 1)
    for per_tile, num_bytes, num_warps in (
        (12, 128 << 10, 4),
        (24, 30000, 4),
        (5000, 1000, 8),
        (1, 10**6, 4),
    ):
        programs = choose_num_tile_programs(metadata, block_t, per_tile, num_bytes, num_warps)
        at_once = max(min((227 << 10) // num_bytes, 32 // num_warps), 1)
        assert 1 <= programs <= most
        assert programs * per_tile <= max(132 * at_once, -(-num_tokens // block_t) * per_tile)
        assert programs >= min(most, num_tokens // block_t)
        assert programs >= min(most, 132 * at_once // per_tile)


@pytest.mark.parametrize(("device", "dtype"), DEVICE_DTYPES)
def test_embedding_is_expand_of_look_up(device, dtype):
    generator = torch.Generator().manual_seed(2)
    layer = LoRALayerTable((70,), 29, is_embedding=True)
    ranks = {0: 3, 1: 16, 4: None, LAST_SLOT: 20}
    install_weights(
        {layer: {slot: random_weights(generator, (rank,), layer, dtype) for slot, rank in ranks.items()}}
    )
    arena, tables = tables_on_device(layer, device)
    metadata = build_lora_metadata(torch.tensor(MIXED), MAX_LORAS, device=torch.device(device))
    token_ids = torch.randint(0, 29, (len(MIXED),), generator=generator).to(device)
    y = signed(generator, len(MIXED), 70, dtype=dtype).to(device)
    expected, before = y.clone(), y.clone()
    v = torch.full((1, 1, len(MIXED), 22), NAN, dtype=dtype, device=device)
    table = tables.layers[0]
    triton_lora_lookup(v, token_ids, arena, table, metadata.token_lora_mapping, vocab_size=29)
    triton_lora_expand(expected, v, arena, table, metadata, output_slices=(70,))

    triton_add_lora_embedding(y, token_ids, arena, table, metadata, vocab_size=29, max_rank=22)

    assert_same_on_cpu(y, expected)
    changed = (y != before).any(dim=1).tolist()
    assert changed == [slot in (0, 1, LAST_SLOT) for slot in MIXED]


@pytest.mark.parametrize("device", DEVICES)
def test_row_of_a_slot_without_adapter_ends_as_nan(device):
    step = on_device(mixed_case(), device)
    expected, y = step.y.clone(), step.y.clone()
    add_linear(step, expected)
    step.tables.rows[1].copy_(step.tables.empty_row)
    add_linear(step, y)
    is_empty = torch.tensor(MIXED) == 1
    assert y[is_empty].isnan().all()
    assert_same_on_cpu(y[~is_empty], expected[~is_empty])


@pytest.mark.gpu
def test_graph_replay_with_other_groups_and_adapters_equals_eager():
    """One graph serves every mix: nothing of the host's view at capture time may stay in it."""
    mappings = [MIXED, [-1] * len(MIXED), [0] * len(MIXED), [*range(8), -1, 3, 2], MIXED[::-1]]
    ranks = MIXED_RANKS | dict.fromkeys((3, 5, 6), (4, 12, 40))
    case = make_case(MIXED, ranks, output_slices=(35, 16, 70), in_features=1100, dtype=torch.bfloat16)
    step = on_device(case, "cuda", max_rank=64)
    static = step.metadata
    tensors = [
        static.token_lora_mapping,
        static.token_indices_sorted_by_lora_ids,
        static.num_tokens_per_lora,
        static.lora_token_start_loc,
        static.active_lora_ids,
        static.lora_tiles,
    ]
    scratch = torch.full((lora_scratch_elements(len(MIXED), 3, 1100, 64),), NAN, device="cuda")
    base = step.y.clone()
    y = base.clone()
    add_linear(step, y, scratch)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        add_linear(step, y, scratch)
    rows = step.tables.rows.clone()
    for round_number, mapping in enumerate(mappings * 2):
        step.tables.rows.copy_(rows if round_number < len(mappings) else rows.roll(1, 0))
        source = build_lora_metadata(torch.tensor(mapping), MAX_LORAS, device=torch.device("cuda"))
        eager = base.clone()
        triton_add_lora_linear(
            eager,
            step.x,
            step.arena,
            step.table,
            source,
            output_slices=step.output_slices,
            max_rank=64,
        )
        new = [
            source.token_lora_mapping,
            source.token_indices_sorted_by_lora_ids,
            source.num_tokens_per_lora,
            source.lora_token_start_loc,
            source.active_lora_ids,
            source.lora_tiles,
        ]
        for to, given in zip(tensors, new, strict=True):
            to.copy_(given)
        y.copy_(base)
        graph.replay()
        assert_same_on_cpu(y, eager)
        is_base = torch.tensor(mapping) < 0
        assert_same_on_cpu(y[is_base], base[is_base])


@pytest.mark.gpu
def test_arena_offsets_beyond_32_bits_and_the_width_of_a_vocabulary():
    """Both matrices lie beyond element 2**31 of the arena; the logits are as wide as Qwen3's."""
    width, in_features, rank, base = 151_936, 1024, 64, 2**31 + 64
    arena = torch.zeros(base + rank * (width + in_features), dtype=torch.bfloat16, device="cuda")
    case = make_case(
        [0, -1, 0], {0: (rank,)}, output_slices=(width,), in_features=in_features, dtype=torch.bfloat16
    )
    step = on_device(case, "cuda", max_rank=rank)
    weights = case.table.get(0)
    assert weights is not None
    assert weights[0] is not None
    arena[base : base + rank * in_features] = weights[0].a.flatten().cuda()
    arena[base + rank * in_features :] = weights[0].b.flatten().cuda()
    step.table.a_offset[0] = base
    step.table.b_offset[0] = base + rank * in_features
    step.arena = arena
    logits = case.y.float()
    y = logits.cuda()

    add_linear(step, y)

    v = step.new_v()
    triton_lora_shrink(v, step.x, arena, step.table, step.metadata, fill_zeros=True)
    expected = lora_expand_reference(logits, v[0].cpu(), case.table, case.mapping)
    magnitude = lora_expand_reference(logits.abs(), v[0].cpu().abs(), _positive(case.table), case.mapping)
    # v was summed in parts: another order, each within H roundings of the other.
    slack = in_features * 2**-23 * magnitude.value * (expected.bound > 0)
    assert_within_bounds(y.cpu(), type(expected)(expected.value, expected.bound + slack))


@pytest.mark.gpu
def test_steps_of_a_class_and_layers_of_a_shape_compile_nothing_new():
    """Views of a step's block and of the tables lie at any alignment."""
    kernels = (triton_lora_shrink_module._lora_shrink_kernel, triton_lora_expand_module._lora_expand_kernel)

    def num_compiled() -> list[int]:
        return [len(kernel.device_caches[torch.cuda.current_device()][0]) for kernel in kernels]

    case = random_case(32, torch.bfloat16, in_features=48)
    step = on_device(case, "cuda")
    tables = DeviceTables([1, 2, 1, 1], 8, "cuda")
    compiled: list[int] = []
    for num_tokens in (32, *range(5, 32)):
        metadata = build_lora_metadata(case.mapping[:num_tokens], MAX_LORAS, device=torch.device("cuda"))
        for table in (tables.layers[0], tables.layers[2], tables.layers[3]):
            triton_add_lora_linear(
                step.y[:num_tokens],
                step.x[:num_tokens],
                step.arena,
                table,
                metadata,
                output_slices=(21,),
                max_rank=16,
            )
        compiled = compiled or num_compiled()
    assert num_compiled() == compiled
