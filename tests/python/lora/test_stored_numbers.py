from __future__ import annotations

import numpy as np
import pytest
import torch

from lora_serve.lora.stored_numbers import BITS_OF, FILE_DTYPE_OF, convert, is_all_finite, largest_magnitude

DTYPES = list(FILE_DTYPE_OF)


def bits_of(tensor):
    return (
        tensor.view(torch.int16 if tensor.dtype.itemsize == 2 else torch.int32)
        .numpy()
        .view(BITS_OF[FILE_DTYPE_OF[tensor.dtype]])
    )


def finite_numbers(dtype):
    """Every finite number of a 16-bit dtype; of float32 those around each bfloat16 and random ones."""
    if dtype.itemsize == 2:
        numbers = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    else:
        upper = torch.arange(-(2**15), 2**15, dtype=torch.int32) << 16
        near = [upper + low for low in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF)]
        generator = torch.Generator().manual_seed(0)
        random_bits = torch.randint(-(2**31), 2**31, (100_000,), generator=generator)
        numbers = torch.cat([*near, random_bits.to(torch.int32)]).view(dtype)
    return numbers[torch.isfinite(numbers)].contiguous()


@pytest.mark.parametrize("target", DTYPES, ids=str)
@pytest.mark.parametrize("source", DTYPES, ids=str)
def test_conversion_gives_the_bits_that_torch_gives(source, target):
    numbers = finite_numbers(source)
    converted = convert(bits_of(numbers), FILE_DTYPE_OF[source], FILE_DTYPE_OF[target])
    assert converted.dtype == BITS_OF[FILE_DTYPE_OF[target]]
    assert np.array_equal(converted, bits_of(numbers.to(target)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_number_that_is_not_finite_is_found_and_no_other(dtype):
    name = FILE_DTYPE_OF[dtype]
    finite = finite_numbers(dtype)
    assert is_all_finite(bits_of(finite), name)
    worst = [torch.finfo(dtype).max, torch.finfo(dtype).min, 0.0, -0.0]
    assert is_all_finite(bits_of(torch.tensor(worst, dtype=dtype)), name)
    for value in (float("inf"), float("-inf"), float("nan")):
        spoilt = finite[:1000].clone()
        spoilt[777] = value
        assert not is_all_finite(bits_of(spoilt), name)
    negative_nan = bits_of(torch.tensor([1.0, float("nan")], dtype=dtype)).copy()
    negative_nan[1] |= 1 << (negative_nan.dtype.itemsize * 8 - 1)
    assert not is_all_finite(negative_nan, name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_largest_magnitude_is_that_of_either_sign(dtype):
    assert (
        largest_magnitude(bits_of(torch.tensor([1.5, -3.0, 2.0], dtype=dtype)), FILE_DTYPE_OF[dtype]) == 3.0
    )
