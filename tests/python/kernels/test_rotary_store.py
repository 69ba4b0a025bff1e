"""Norm of heads, rotation and storing into pages, against intervals of exact arithmetic."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from kernels.device_cases import DEVICE_DTYPES, DEVICES, signed
from kernels.lora_cases import assert_within_bounds, has_same_bits
from lora_serve.kernels import rotary_store
from lora_serve.kernels.reference import ReferenceResult
from lora_serve.kernels.reference_elementwise import norm_rotary_reference
from lora_serve.kernels.rotary_store import norm_rotary_store

EPS = 1e-6
NUM_PAGES, PAGE_SIZE = 6, 4
SLOTS = [23, -1, 0, 9, 10]
POSITIONS = [31, 0, 4, 17, 18]


@dataclass
class RotaryCase:
    """One step on one layer of a pool of pages that is full of NaN."""

    qkv: Tensor
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

    def run(self, out: Tensor | None = None) -> Tensor:
        return norm_rotary_store(
            self.qkv,
            self.positions,
            self.cos_sin,
            self.slots,
            self.k_pages,
            self.v_pages,
            self.q_weight,
            self.k_weight,
            EPS,
            out,
        )

    def split(self) -> tuple[Tensor, Tensor, Tensor]:
        """Copies of the query, key and value heads [T, heads, D]."""
        num_kv_heads, head_dim = self.pool.shape[-2:]
        heads = self.qkv.clone().view(len(self.qkv), -1, head_dim)
        query, key, value = heads.split([self.num_heads, num_kv_heads, num_kv_heads], dim=1)
        return query, key, value


def make_cos_sin(head_dim: int, device: str) -> Tensor:
    frequencies = 10000.0 ** (-torch.arange(0, head_dim, 2) / head_dim)
    angles = torch.arange(32.0)[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1).to(device)


def make_case(
    device: str,
    dtype: torch.dtype,
    *,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    head_dim: int = 16,
    has_norm: bool = True,
    slots: list[int] | None = None,
) -> RotaryCase:
    slots = SLOTS if slots is None else slots
    width = (num_heads + 2 * num_kv_heads) * head_dim
    pool_shape = (NUM_PAGES, 3, 2, PAGE_SIZE, num_kv_heads, head_dim)
    return RotaryCase(
        qkv=signed(device, dtype, len(slots), width, seed=head_dim, scale=3.0),
        positions=torch.tensor(POSITIONS[: len(slots)], device=device),
        slots=torch.tensor(slots, dtype=torch.int64, device=device),
        cos_sin=make_cos_sin(head_dim, device),
        pool=torch.full(pool_shape, float("nan"), dtype=dtype, device=device),
        q_weight=signed(device, dtype, head_dim, seed=1) if has_norm else None,
        k_weight=signed(device, dtype, head_dim, seed=2) if has_norm else None,
        num_heads=num_heads,
    )


def check(case: RotaryCase, *, in_place: bool = True) -> None:
    query, key, value = case.split()
    expected_query = norm_rotary_reference(query, case.positions, case.cos_sin, case.q_weight, EPS)
    expected_key = norm_rotary_reference(key, case.positions, case.cos_sin, case.k_weight, EPS)
    out = None if in_place else torch.full_like(query.contiguous(), float("nan"))

    found = case.run(out)

    assert_within_bounds(found, expected_query)
    has_slot = case.slots >= 0
    slots = case.slots[has_slot]
    pages, offsets = slots // PAGE_SIZE, slots % PAGE_SIZE
    stored = ReferenceResult(expected_key.value[has_slot], expected_key.bound[has_slot])
    assert_within_bounds(case.k_pages[pages, offsets], stored)
    assert has_same_bits(case.v_pages[pages, offsets], value[has_slot])
    # Everything else in the pool, other layers included, is what it was.
    case.k_pages[pages, offsets] = float("nan")
    case.v_pages[pages, offsets] = float("nan")
    assert case.pool.isnan().all()


@pytest.mark.parametrize(("device", "dtype"), DEVICE_DTYPES)
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim"), [(4, 2, 16), (40, 3, 64), (33, 1, 128)])
def test_programs_of_a_prefill_have_more_heads(monkeypatch, device, dtype, num_heads, num_kv_heads, head_dim):
    monkeypatch.setattr(rotary_store, "_MOST_DECODE_TOKENS", 2)
    check(make_case(device, dtype, num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim))


@pytest.mark.parametrize(("device", "dtype"), DEVICE_DTYPES)
@pytest.mark.parametrize("head_dim", [2, 6, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("has_norm", [True, False])
def test_heads_are_rotated_and_stored_for_every_head_size(device, dtype, head_dim, has_norm):
    check(make_case(device, dtype, head_dim=head_dim, has_norm=has_norm))


@pytest.mark.parametrize(("device", "dtype"), DEVICE_DTYPES)
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(1, 1), (7, 1), (14, 2), (32, 8), (9, 9)])
def test_heads_are_rotated_and_stored_for_every_number_of_heads(device, dtype, num_heads, num_kv_heads):
    check(make_case(device, dtype, num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=128))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("slots", [[5], [-1], [-1, -1, -1]])
def test_tokens_without_a_slot_store_nothing(device, slots):
    check(make_case(device, torch.float16, slots=slots))


@pytest.mark.parametrize("device", DEVICES)
def test_queries_go_to_out_and_leave_the_input(device):
    case = make_case(device, torch.float16)
    before = case.qkv.clone()
    check(case, in_place=False)
    assert has_same_bits(case.qkv, before)


@pytest.mark.parametrize("device", DEVICES)
def test_queries_without_out_are_a_view_of_the_input_and_keys_stay(device):
    case = make_case(device, torch.float16)
    before = case.qkv.clone()
    query = case.run()
    assert query.data_ptr() == case.qkv.data_ptr()
    assert query.stride()[1:] == (16, 1)
    assert has_same_bits(case.qkv[:, 64:], before[:, 64:])


@pytest.mark.parametrize("device", DEVICES)
def test_rows_at_a_distance_are_read_at_their_distance(device):
    case = make_case(device, torch.float16)
    wide = signed(device, torch.float16, len(case.qkv), 3 * case.qkv.shape[1])
    middle = wide[:, case.qkv.shape[1] : 2 * case.qkv.shape[1]]
    middle.copy_(case.qkv)
    before = wide.clone()
    case.qkv = middle
    check(case)
    assert has_same_bits(wide[:, : middle.shape[1]], before[:, : middle.shape[1]])
    assert has_same_bits(wide[:, 2 * middle.shape[1] :], before[:, 2 * middle.shape[1] :])


@pytest.mark.gpu
def test_pages_behind_two_to_the_31_elements_are_reached():
    case = make_case("cuda", torch.float16, head_dim=128, num_kv_heads=8, num_heads=8, slots=[-1, 23])
    num_pages = 2**31 // (64 * 2 * PAGE_SIZE * 8 * 128) + NUM_PAGES
    pool = torch.full((num_pages, 64, 2, PAGE_SIZE, 8, 128), 1.0, dtype=torch.float16, device="cuda")
    case.pool = pool
    case.slots[1] = num_pages * PAGE_SIZE - 1
    _, _, value = case.split()
    case.run()
    assert has_same_bits(pool[-1, 1, 1, -1], value[1])
    assert int((pool != 1.0).any(-1).any(-1).sum()) == 2


@pytest.mark.parametrize("device", DEVICES)
def test_step_without_tokens_gives_no_queries(device):
    assert make_case(device, torch.float16, slots=[]).run().shape == (0, 4, 16)


def test_unfit_shapes_are_refused_by_name():
    case = make_case("cpu", torch.float32)
    case.k_weight = None
    with pytest.raises(ValueError, match="both None or both"):
        case.run()
    case = make_case("cpu", torch.float32)
    case.qkv = case.qkv[:, :-2]
    with pytest.raises(ValueError, match=r"\(5, 126\)"):
        case.run()
    case = make_case("cpu", torch.float32)
    case.pool = case.pool.transpose(-3, -2).contiguous().transpose(-3, -2)
    with pytest.raises(ValueError, match="no gaps"):
        case.run()
    case = make_case("cpu", torch.float32)
    case.slots = case.slots[1:]
    with pytest.raises(ValueError, match=r"slot_mapping \(4,\)"):
        case.run()
    case = make_case("cpu", torch.float32)
    with pytest.raises(ValueError, match=r"\(5, 4, 16\)"):
        case.run(torch.empty(5, 4, 15))
    case.pool = case.pool.half()
    with pytest.raises(ValueError, match="dtype"):
        case.run()
