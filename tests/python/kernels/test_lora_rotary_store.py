"""Norm, rotation and storing after the adapters' deltas: against an oracle, and against its two halves."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from kernels import device_cases
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
from kernels.triton_lora_cases import MIXED, MIXED_RANKS, NAN, assert_same_on_cpu
from lora_serve.kernels import LoRADelta
from lora_serve.kernels import lora_rotary_store as lora_rotary_store_module
from lora_serve.kernels.lora_rotary_store import lora_norm_rotary_store
from lora_serve.kernels.reference import ReferenceResult
from lora_serve.kernels.reference_lora_elementwise import lora_norm_rotary_reference
from lora_serve.kernels.rotary_store import norm_rotary_store
from lora_serve.kernels.triton_lora_expand import triton_lora_expand
from lora_serve.kernels.triton_lora_linear import warm_up_token_counts
from lora_serve.kernels.triton_lora_tiles import choose_rotary_store_launch, token_class
from lora_serve.kernels.tuned_lora_tiles import LoRARotaryStoreLaunch

EPS = 1e-6
PAGE_SIZE = 4
NUM_POSITIONS = 400
RANDOM_RANKS: dict[int, tuple[int | None, ...]] = {
    0: (5, 9, 1),
    1: (16, None, 16),
    2: (None, None, None),
    LAST_SLOT: (20, 4, 33),
}


@dataclass
class RotaryCase:
    """One step on one layer of a pool of pages that is full of NaN. Some tokens have no slot."""

    step: DeltaCase
    positions: Tensor
    slots: Tensor
    cos_sin: Tensor
    pool: Tensor
    q_weight: Tensor | None
    k_weight: Tensor | None
    num_heads: int

    @property
    def k_pages(self) -> Tensor:
        return self.pool[:, 1, 0]

    @property
    def v_pages(self) -> Tensor:
        return self.pool[:, 1, 1]

    @property
    def stored(self) -> Tensor:
        """Tokens that have a slot."""
        return self.slots >= 0

    @property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.positions, self.cos_sin, self.slots

    @property
    def norms(self) -> tuple[Tensor | None, Tensor | None, float]:
        return self.q_weight, self.k_weight, EPS

    def run(
        self,
        out: Tensor | None = None,
        *,
        qkv: Tensor | None = None,
        launch: LoRARotaryStoreLaunch | None = None,
    ) -> list[Tensor]:
        """Queries, and keys and values of the tokens with a slot, read from pages that were NaN before."""
        self.pool.fill_(NAN)
        qkv = self.step.y.clone() if qkv is None else qkv
        pages = self.k_pages, self.v_pages
        query = lora_norm_rotary_store(
            qkv, self.step.delta, *self.inputs, *pages, *self.norms, out, launch=launch
        )
        return [query, *self.take_stored()]

    def run_halves(self) -> list[Tensor]:
        """What the expand and the plain kernel give, one after the other."""
        self.pool.fill_(NAN)
        qkv, delta = self.step.y.clone(), self.step.delta
        table = delta.table
        triton_lora_expand(
            qkv, delta.v, table.arena, table, delta.metadata, output_slices=table.output_slices
        )
        return [
            norm_rotary_store(qkv, *self.inputs, self.k_pages, self.v_pages, *self.norms),
            *self.take_stored(),
        ]

    def run_plain(self) -> list[Tensor]:
        """What the plain kernel gives without any delta."""
        self.pool.fill_(NAN)
        qkv = self.step.y.clone()
        return [
            norm_rotary_store(qkv, *self.inputs, self.k_pages, self.v_pages, *self.norms),
            *self.take_stored(),
        ]

    def take_stored(self) -> tuple[Tensor, Tensor]:
        """Keys and values of the tokens with a slot; everything else in the pool must be what it was."""
        slots = self.slots[self.stored]
        pages, offsets = slots // PAGE_SIZE, slots % PAGE_SIZE
        keys, values = self.k_pages[pages, offsets], self.v_pages[pages, offsets]
        self.k_pages[pages, offsets] = NAN
        self.v_pages[pages, offsets] = NAN
        assert self.pool.isnan().all()
        return keys, values


def make(
    device: str,
    dtype: torch.dtype,
    mapping: list[int] = MIXED,
    *,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    head_dim: int = 16,
    has_norm: bool = True,
    ranks: dict[int, tuple[int | None, ...]] | None = None,
    **options: int,
) -> RotaryCase:
    if ranks is None:
        ranks = MIXED_RANKS if mapping is MIXED else RANDOM_RANKS
    widths = (num_heads * head_dim, num_kv_heads * head_dim, num_kv_heads * head_dim)
    num_tokens = len(mapping)
    num_pages = num_tokens // PAGE_SIZE + 2
    generator = torch.Generator().manual_seed(num_tokens)
    slots = torch.randperm(num_pages * PAGE_SIZE, generator=generator)[:num_tokens]
    slots[3::5] = -1
    if num_tokens:
        slots[0] = num_pages * PAGE_SIZE - 1
        slots[1:][slots[1:] == slots[0]] = -1
    angles = torch.arange(float(NUM_POSITIONS))[:, None] * 100.0 ** (-torch.arange(0, head_dim, 2) / head_dim)
    return RotaryCase(
        step=make_delta_case(mapping, ranks, widths, dtype, device, **options),
        positions=torch.randint(0, NUM_POSITIONS, (num_tokens,), generator=generator).to(device),
        slots=slots.to(device),
        cos_sin=torch.cat([angles.cos(), angles.sin()], dim=1).to(device),
        pool=torch.full(
            (num_pages, 3, 2, PAGE_SIZE, num_kv_heads, head_dim), NAN, dtype=dtype, device=device
        ),
        q_weight=device_cases.signed(device, dtype, head_dim, seed=1) if has_norm else None,
        k_weight=device_cases.signed(device, dtype, head_dim, seed=2) if has_norm else None,
        num_heads=num_heads,
    )


def oracle(rotary: RotaryCase) -> list[ReferenceResult]:
    """Queries of all tokens, keys and values of those with a slot."""
    case = rotary.step.case
    on_cpu = [None if tensor is None else tensor.cpu() for tensor in (rotary.q_weight, rotary.k_weight)]
    query, *stored = lora_norm_rotary_reference(
        case.y,
        rotary.step.v,
        case.table,
        case.mapping,
        rotary.positions.cpu(),
        rotary.cos_sin.cpu(),
        *on_cpu,
        EPS,
    )
    has_slot = rotary.stored.cpu()
    return [query, *(ReferenceResult(each.value[has_slot], each.bound[has_slot]) for each in stored)]


def check(rotary: RotaryCase, launch: LoRARotaryStoreLaunch | None = None) -> None:
    """Two runs have the same bits, in place and into a tensor of their own."""
    shape = (len(rotary.slots), rotary.num_heads, rotary.cos_sin.shape[1])
    out = torch.full(shape, NAN, dtype=rotary.step.y.dtype, device=rotary.step.y.device)
    in_place = rotary.run(launch=launch)
    apart = rotary.run(out, launch=launch)
    assert apart[0] is out
    for found, again, expected in zip(in_place, apart, oracle(rotary), strict=True):
        assert_within_bounds(found.cpu(), expected)
        assert_same_on_cpu(found, again)


@pytest.mark.parametrize(("device", "dtype"), DEVICE_DTYPES)
@pytest.mark.parametrize("rank", [1, 3, 16, 64, 100, 150, 300])
def test_heads_are_exact_to_rounding_for_every_rank(rank, device, dtype):
    ranks = {0: (rank, rank, rank), LAST_SLOT: (None, rank, 1)}
    check(make(device, dtype, [LAST_SLOT, -1, 0, 0, LAST_SLOT], ranks=ranks, seed=rank))


@pytest.mark.parametrize(("device", "dtype"), DEVICE_DTYPES)
@pytest.mark.parametrize("head_dim", [2, 6, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("has_norm", [True, False])
def test_heads_are_exact_to_rounding_for_every_head_size(head_dim, has_norm, device, dtype):
    check(make(device, dtype, head_dim=head_dim, has_norm=has_norm, num_heads=2, num_kv_heads=1))


@pytest.mark.parametrize(("device", "dtype", "num_tokens"), STEPS)
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(1, 1), (7, 1), (6, 6)])
def test_heads_are_exact_to_rounding_for_every_number_of_heads(
    num_heads, num_kv_heads, num_tokens, device, dtype
):
    mapping = [LAST_SLOT, -1, 0, 1, 0] if num_tokens == 11 else mapping_of(num_tokens)
    check(make(device, dtype, mapping, num_heads=num_heads, num_kv_heads=num_kv_heads))


@pytest.mark.parametrize(("device", "dtype"), DEVICE_DTYPES)
@pytest.mark.parametrize("num_tokens", [1, 17, 75])
@pytest.mark.parametrize("num_parts", [1, 3])
def test_every_row_of_every_group_is_found(num_tokens, num_parts, device, dtype):
    check(
        make(
            device,
            dtype,
            random_mapping(num_tokens),
            num_parts=num_parts,
            num_heads=2,
            num_kv_heads=1,
            has_norm=False,
        )
    )


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("num_tokens", [129, 1025, 4099])
def test_every_row_of_large_steps_is_found(num_tokens, dtype):
    check(make("cuda", dtype, random_mapping(num_tokens), num_heads=8, head_dim=128))


@pytest.mark.parametrize(("device", "dtype"), DEVICE_DTYPES)
@pytest.mark.parametrize("mapping", [[LAST_SLOT] * 9, [-1, 0, 1, 2, LAST_SLOT], [-1], [-1] * 20])
def test_one_adapter_many_or_none(mapping, device, dtype):
    check(make(device, dtype, mapping))


# With norms a GPU may add the squares of a head in another order than the plain kernel does.
_NORMS = [False] if torch.cuda.is_available() else [False, True]


@pytest.mark.parametrize(("device", "dtype", "num_tokens"), STEPS)
@pytest.mark.parametrize("num_parts", [1, 3])
@pytest.mark.parametrize("has_norm", _NORMS)
def test_result_has_the_bits_of_expand_and_the_plain_kernel(has_norm, num_tokens, num_parts, device, dtype):
    mapping = mapping_of(num_tokens)
    rotary = make(
        device,
        dtype,
        mapping,
        num_parts=num_parts,
        is_exact=True,
        head_dim=64,
        num_heads=2,
        num_kv_heads=1,
        has_norm=has_norm,
    )
    # A delta that is not there must not even turn -0 into 0.
    rotary.step.y[:, ::7] = -0.0
    for found, expected in zip(rotary.run(), rotary.run_halves(), strict=True):
        assert_same_on_cpu(found, expected)


@pytest.mark.parametrize(("device", "dtype", "num_tokens"), STEPS)
@pytest.mark.parametrize("has_norm", _NORMS)
def test_rows_and_slices_without_a_module_have_the_bits_of_the_plain_kernel(
    has_norm, num_tokens, device, dtype
):
    mapping = (MIXED * 30)[:num_tokens]
    rotary = make(
        device, dtype, mapping, ranks=MIXED_RANKS, head_dim=64, num_heads=2, num_kv_heads=1, has_norm=has_norm
    )
    rotary.step.y[:, ::7] = -0.0
    is_plain = ((rotary.step.case.mapping < 0) | (rotary.step.case.mapping == 4)).to(device)
    rows = [is_plain, is_plain[rotary.stored], is_plain[rotary.stored]]
    for found, expected, is_row in zip(rotary.run(), rotary.run_plain(), rows, strict=True):
        assert is_row.any()
        assert_same_on_cpu(found[is_row], expected[is_row])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("how", BAD_SLOTS)
@pytest.mark.parametrize("num_tokens", [11, LARGE])
def test_rows_that_cannot_have_their_adapter_become_nan_and_no_others(num_tokens, how, device):
    """They must fail at sampling, not answer as the base model."""
    mapping = mapping_of(num_tokens)
    rotary = make(device, torch.float16, mapping)
    before = [each.clone() for each in rotary.run()]
    make_bad(rotary.step.delta, how)
    is_bad = (rotary.step.case.mapping == LAST_SLOT).to(device)
    rows = [is_bad, is_bad[rotary.stored], is_bad[rotary.stored]]
    for found, expected, is_row in zip(rotary.run(), before, rows, strict=True):
        assert is_row.any()
        assert found[is_row].isnan().all()
        assert expected.isfinite().all()
        assert_same_on_cpu(found[~is_row], expected[~is_row])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("num_padded", [1, 20])
def test_padded_rows_are_neither_read_nor_written(num_padded, device):
    rotary = make(device, torch.float16)
    expected = rotary.run()
    num_tokens = len(MIXED)
    qkv = torch.cat([rotary.step.y, rotary.step.y.new_full((num_padded, rotary.step.y.shape[1]), NAN)])
    out = rotary.step.y.new_full((len(qkv), 4, 16), 7.0)
    rotary.step.delta = padded(rotary.step.delta, num_padded)
    rotary.positions = torch.cat([rotary.positions, rotary.positions.new_zeros(num_padded)])
    rotary.slots = torch.cat([rotary.slots, rotary.slots.new_full((num_padded,), -1)])

    found = rotary.run(out, qkv=qkv)

    assert (out[num_tokens:] == 7.0).all()
    assert_same_on_cpu(out[:num_tokens], expected[0])
    for one, other in zip(found[1:], expected[1:], strict=True):
        assert_same_on_cpu(one, other)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("num_tokens", [11, LARGE])
def test_tokens_without_a_slot_store_nothing(num_tokens, device):
    mapping = mapping_of(num_tokens)
    rotary = make(device, torch.float16, mapping)
    query = rotary.run()[0]
    rotary.slots.fill_(-1)
    again, keys, _ = rotary.run()  # Which looks that the pool is NaN.
    assert len(keys) == 0
    assert_same_on_cpu(query, again)


@pytest.mark.parametrize("device", DEVICES)
def test_queries_go_to_out_and_leave_the_input(device):
    rotary = make(device, torch.float16)
    qkv = rotary.step.y.clone()
    rotary.run(torch.empty(len(MIXED), 4, 16, dtype=torch.float16, device=device), qkv=qkv)
    assert_same_on_cpu(qkv, rotary.step.y)


@pytest.mark.parametrize("device", DEVICES)
def test_queries_without_out_are_a_view_of_the_input_and_the_rest_stays(device):
    rotary = make(device, torch.float16)
    wide = torch.full((len(MIXED), 300), NAN, dtype=torch.float16, device=device)
    qkv = wide[:, 50:178]
    qkv.copy_(rotary.step.y)
    expected = rotary.run()

    found = rotary.run(qkv=qkv)

    assert found[0].data_ptr() == qkv.data_ptr()
    assert found[0].stride() == (300, 16, 1)
    for one, other in zip(found, expected, strict=True):
        assert_same_on_cpu(one, other)
    assert_same_on_cpu(qkv[:, 64:], rotary.step.y[:, 64:])
    assert wide[:, :50].isnan().all()
    assert wide[:, 178:].isnan().all()


@pytest.mark.gpu
def test_pages_behind_two_to_the_31_elements_are_reached():
    rotary = make("cuda", torch.float16, [LAST_SLOT, -1], head_dim=128, num_heads=8, num_kv_heads=8)
    num_pages = 2**31 // (64 * 2 * PAGE_SIZE * 8 * 128) + 3
    rotary.pool = torch.full((num_pages, 64, 2, PAGE_SIZE, 8, 128), NAN, dtype=torch.float16, device="cuda")
    rotary.slots = torch.tensor([num_pages * PAGE_SIZE - 1, -1], device="cuda")
    for found, expected in zip(rotary.run(), oracle(rotary), strict=True):
        assert_within_bounds(found.cpu(), expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("num_tokens", [11, LARGE])
def test_programs_that_take_several_tiles_of_tokens_do_them_all(num_tokens, device, monkeypatch):
    mapping = mapping_of(num_tokens)
    rotary = make(device, torch.float16, mapping)
    expected = [each.clone() for each in rotary.run()]
    monkeypatch.setattr(lora_rotary_store_module, "choose_num_tile_programs", lambda *_: 2)
    for found, each in zip(rotary.run(), expected, strict=True):
        assert_same_on_cpu(found, each)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "launch",
    [
        LoRARotaryStoreLaunch(32, 16, heads=3, num_warps=4, num_stages=1),
        LoRARotaryStoreLaunch(16, 32, heads=8, num_warps=4, num_stages=3),
        LoRARotaryStoreLaunch(64, 64, heads=2, num_warps=8, num_stages=2),
        LoRARotaryStoreLaunch(16, 64, heads=4, num_warps=4, num_stages=3),
    ],
)
def test_every_launch_gives_a_right_result(launch, device):
    check(make(device, torch.float16, num_heads=7, num_kv_heads=3), launch)


@pytest.mark.parametrize("device", DEVICES)
def test_step_without_tokens_gives_no_queries(device):
    rotary = make(device, torch.float16, [], has_norm=False)
    assert rotary.run()[0].shape == (0, 4, 16)


def test_warm_up_compiles_what_any_step_uses():
    def variant(num_tokens: int) -> LoRARotaryStoreLaunch:
        return choose_rotary_store_launch(token_class(num_tokens), 128, 64, 2)

    for largest in (1, 7, 200, 3000):
        warm = {variant(tokens) for tokens in warm_up_token_counts(largest)}
        assert {variant(tokens) for tokens in range(1, largest + 1)} <= warm


def test_unfit_shapes_are_refused_by_name():
    rotary = make("cpu", torch.float32)
    with pytest.raises(ValueError, match=r"\(11, 126\)"):
        rotary.run(qkv=rotary.step.y[:, :-2])
    with pytest.raises(ValueError, match=r"\(11, 4, 15\)"):
        rotary.run(torch.empty(11, 4, 15))
    with pytest.raises(ValueError, match=r"expected \(48, 32, 32\)"):
        rotary.run(qkv=rotary.step.y[:, 16:])
    delta = rotary.step.delta
    rotary.step.delta = LoRADelta(delta.v[:, :2], delta.table, delta.metadata)
    with pytest.raises(ValueError, match="v has shape"):
        rotary.run()
    other = make("cpu", torch.float16)
    other.step.delta = delta
    with pytest.raises(ValueError, match=r"float32, expected .* of torch\.float16"):
        other.run()
