"""RMS norm, alone and with the residual addition, against intervals of exact arithmetic."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from kernels.device_cases import DEVICE_DTYPES, DEVICES, signed
from kernels.lora_cases import assert_within_bounds, has_same_bits
from lora_serve.kernels.reference_elementwise import rms_norm_reference
from lora_serve.kernels.rms_norm import add_rms_norm, rms_norm

EPS = 1e-6
SIZES = [1, 67, 128, 1000, 4096]


@pytest.mark.parametrize(("device", "dtype"), DEVICE_DTYPES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("scale", [1.0, 1e-3, 30.0])
def test_norm_is_exact_to_rounding_for_every_size_and_scale(device, dtype, size, scale):
    x = signed(device, dtype, 5, size, seed=size, scale=scale)
    weight = signed(device, dtype, size, seed=1)
    out = torch.full_like(x, float("nan"))

    assert rms_norm(x, weight, EPS, out=out) is out

    assert_within_bounds(out, rms_norm_reference(x, weight, EPS))


@pytest.mark.parametrize(("device", "dtype"), DEVICE_DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_add_norm_stores_the_rounded_sum_and_norms_it(device, dtype, size):
    x = signed(device, dtype, 5, size, seed=2)
    residual = signed(device, dtype, 5, size, seed=3, scale=7.0)
    weight = signed(device, dtype, size, seed=4)
    x_before, expected_sum = x.clone(), x + residual

    out = add_rms_norm(x, residual, weight, EPS)

    assert has_same_bits(residual, expected_sum)
    assert has_same_bits(x, x_before)
    assert_within_bounds(out, rms_norm_reference(expected_sum, weight, EPS))


@pytest.mark.parametrize(("device", "dtype"), DEVICE_DTYPES)
def test_result_may_take_the_place_of_the_input(device, dtype):
    x, residual = signed(device, dtype, 3, 96, seed=5), signed(device, dtype, 3, 96, seed=6)
    weight = signed(device, dtype, 96, seed=7)
    expected = add_rms_norm(x, residual.clone(), weight, EPS)

    assert add_rms_norm(x, residual, weight, EPS, out=x) is x

    assert has_same_bits(x, expected)


@pytest.mark.parametrize("device", DEVICES)
def test_rows_at_a_distance_leave_what_lies_between(device):
    wide = signed(device, torch.float16, 4, 3 * 50, seed=8)
    out = torch.full_like(wide, float("nan"))
    weight = signed(device, torch.float16, 50, seed=9)
    x, target = wide[:, 50:100], out[:, 50:100]

    rms_norm(x, weight, EPS, out=target)

    assert_within_bounds(target, rms_norm_reference(x, weight, EPS))
    assert out[:, :50].isnan().all()
    assert out[:, 100:].isnan().all()


@pytest.mark.parametrize("device", DEVICES)
def test_rows_do_not_see_each_other(device):
    x = signed(device, torch.float16, 3, 64, seed=10)
    weight = signed(device, torch.float16, 64, seed=11)
    alone = rms_norm(x[:1], weight, EPS)
    x[1] = float("nan")
    together = rms_norm(x, weight, EPS)
    assert has_same_bits(together[:1], alone)
    assert together[1].isnan().all()
    assert together[2].isfinite().all()


@pytest.mark.parametrize("device", DEVICES)
def test_row_of_zeros_stays_zero(device):
    weight = signed(device, torch.float32, 16)
    assert (rms_norm(torch.zeros(1, 16, device=device), weight, EPS) == 0).all()


@pytest.mark.parametrize("device", DEVICES)
def test_step_without_rows_gives_none(device):
    empty, weight = torch.empty(0, 16, device=device), torch.ones(16, device=device)
    assert rms_norm(empty, weight, EPS).shape == (0, 16)
    assert add_rms_norm(empty, empty.clone(), weight, EPS).shape == (0, 16)


def test_unfit_shapes_are_refused_by_name():
    x, weight = torch.ones(2, 16), torch.ones(16)
    with pytest.raises(ValueError, match=r"weight \(8,\)"):
        rms_norm(x, torch.ones(8), EPS)
    with pytest.raises(ValueError, match=r"\(3, 16\)"):
        add_rms_norm(x, torch.ones(3, 16), weight, EPS)
    with pytest.raises(ValueError, match="strides"):
        rms_norm(torch.ones(16, 2).t(), weight, EPS)
    with pytest.raises(ValueError, match="float16"):
        rms_norm(x.half(), weight, EPS)
