"""The gated activation against intervals of exact arithmetic."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from kernels.device_cases import DEVICE_DTYPES, DEVICES, signed
from kernels.lora_cases import assert_within_bounds, has_same_bits
from lora_serve.kernels.reference_elementwise import silu_mul_reference
from lora_serve.kernels.silu_mul import silu_mul

# NumPy, which the interpreter computes with, warns where exp gives infinity. A GPU does not.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")


@pytest.mark.parametrize(("device", "dtype"), DEVICE_DTYPES)
@pytest.mark.parametrize("size", [1, 33, 1024, 1500])
@pytest.mark.parametrize("scale", [1.0, 20.0])
def test_product_is_exact_to_rounding_for_every_size_and_scale(device, dtype, size, scale):
    gate_up = signed(device, dtype, 4, 2 * size, seed=size, scale=scale)
    out = torch.full((4, size), float("nan"), dtype=dtype, device=device)

    assert silu_mul(gate_up, out=out) is out

    assert_within_bounds(out, silu_mul_reference(gate_up))


@pytest.mark.parametrize(("device", "dtype"), DEVICE_DTYPES)
def test_large_gates_neither_overflow_nor_leave_a_rest(device, dtype):
    gate = torch.tensor([[-1000.0, -88.8, -87.5, -20.0, 20.0, 88.8, 1000.0]], dtype=dtype, device=device)
    gate_up = torch.cat([gate, torch.full_like(gate, -1.5)], dim=1)
    assert_within_bounds(silu_mul(gate_up), silu_mul_reference(gate_up))


@pytest.mark.parametrize("device", DEVICES)
def test_rows_at_a_distance_leave_what_lies_between(device):
    wide = signed(device, torch.float16, 3, 100, seed=1)
    out = torch.full((3, 60), float("nan"), dtype=torch.float16, device=device)
    gate_up = wide[:, 10:80]

    silu_mul(gate_up, out=out[:, 5:40])

    assert has_same_bits(out[:, 5:40], silu_mul(gate_up.contiguous()))
    assert out[:, :5].isnan().all()
    assert out[:, 40:].isnan().all()


@pytest.mark.parametrize("device", DEVICES)
def test_not_a_number_stays_in_its_element(device):
    gate_up = signed(device, torch.float32, 2, 8)
    gate_up[0, 1] = float("nan")
    gate_up[1, 6] = float("nan")
    out = silu_mul(gate_up)
    assert out.isnan().nonzero().tolist() == [[0, 1], [1, 2]]


@pytest.mark.parametrize("device", DEVICES)
def test_step_without_tokens_gives_none(device):
    assert silu_mul(torch.empty(0, 8, device=device)).shape == (0, 4)


def test_unfit_shapes_are_refused_by_name():
    with pytest.raises(ValueError, match=r"\(2, 5\)"):
        silu_mul(torch.ones(2, 5))
    with pytest.raises(ValueError, match=r"\(2, 4\)"):
        silu_mul(torch.ones(2, 6), out=torch.ones(2, 4))
