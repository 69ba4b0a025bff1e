"""`place_matrices` of the C++ core against torch; its bounds are tested in tests/cpp/adapter_weights."""

from __future__ import annotations

import random
import re
import threading

import numpy as np
import pytest
import torch

from lora_serve._core import MatrixPlacement, NumbersFound, place_matrices
from lora_serve.common.errors import InternalError, InvalidArgumentError

FORMAT_OF = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
DTYPES = list(FORMAT_OF)
UNTOUCHED = 0xAA


def bytes_of(tensor):
    return tensor.contiguous().flatten().view(torch.uint8).numpy()


def finite_numbers(dtype):
    """[1, N] every finite number of a 16-bit dtype; of float32 those around each bfloat16, and others."""
    if dtype.itemsize == 2:
        numbers = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    else:
        upper = torch.arange(-(2**15), 2**15, dtype=torch.int32) << 16
        near = [upper + low for low in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF)]
        generator = torch.Generator().manual_seed(0)
        random_bits = torch.randint(-(2**31), 2**31, (100_000,), generator=generator)
        numbers = torch.cat([*near, random_bits.to(torch.int32)]).view(dtype)
    return numbers[torch.isfinite(numbers)][None]


def placement(matrix, parts, *, start=0, is_transposed=False):
    return MatrixPlacement(
        buffer_offset=start,
        num_rows=matrix.shape[0],
        num_columns=matrix.shape[1],
        number_format=FORMAT_OF[matrix.dtype],
        is_transposed=is_transposed,
        parts=parts,
    )


def place_one(matrix, dtype, *, is_transposed=False):
    """What the matrix becomes, and what was found in it."""
    block = np.full(matrix.numel() * dtype.itemsize, UNTOUCHED, np.uint8)
    placed = placement(matrix, [(matrix.shape[0], 0)], is_transposed=is_transposed)
    (found,) = place_matrices(bytes_of(matrix), [placed], block, FORMAT_OF[dtype])
    shape = matrix.shape[::-1] if is_transposed else matrix.shape
    return torch.from_numpy(block).view(dtype).reshape(shape), found


def same_bits(found, expected):
    return np.array_equal(bytes_of(found), bytes_of(expected))


@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("target", DTYPES, ids=str)
@pytest.mark.parametrize("source", DTYPES, ids=str)
def test_every_finite_number_is_converted_as_torch_does_it(source, target, is_transposed):
    numbers = finite_numbers(source)
    numbers = numbers[:, : numbers.numel() // 24 * 24].reshape(-1, 24)
    placed, found = place_one(numbers, target, is_transposed=is_transposed)
    expected = numbers.to(target)
    assert same_bits(placed, expected.T if is_transposed else expected)
    assert found == (NumbersFound.FINITE if expected.isfinite().all() else NumbersFound.TOO_LARGE)
    # Also without those that are too large: every other one is called finite.
    kept = numbers[expected.isfinite()][None]
    assert place_one(kept, target, is_transposed=is_transposed)[1] == NumbersFound.FINITE


@pytest.mark.parametrize("seed", range(40))
def test_random_matrices_lie_in_the_block_as_torch_makes_them(seed):
    chance = random.Random(seed)
    torch.manual_seed(seed)
    target = chance.choice(DTYPES)
    buffer, block, placements, expected = [], [], [], []
    start = offset = 0
    for _ in range(chance.randint(1, 8)):
        shape = [chance.choice((1, 2, 5, 8, 16, 31, 32, 33, 64, 100)) for _ in range(2)]
        shape[chance.randint(0, 1)] = chance.randint(1, 300)
        matrix = (torch.randn(shape) * 10 ** chance.uniform(-6, 3)).to(chance.choice(DTYPES))
        is_transposed = chance.random() < 0.7
        widths = [chance.randint(1, shape[0]) for _ in range(chance.randint(1, 3))]
        ends = sorted({min(sum(widths[: index + 1]), shape[0]) for index in range(len(widths))} | {shape[0]})
        parts = []
        for first, end in zip([0, *ends], ends, strict=False):
            part = matrix[first:end].to(target)
            placed = bytes_of(part.T if is_transposed else part)
            gap = np.full(chance.choice((0, 2, 16, 64)), UNTOUCHED, np.uint8)
            parts.append((end - first, offset + gap.size))
            expected += [gap, placed]
            offset += gap.size + placed.size
        placements.append(placement(matrix, parts, start=start, is_transposed=is_transposed))
        padding = np.full(chance.choice((0, 2, 14)), UNTOUCHED, np.uint8)
        buffer += [bytes_of(matrix), padding]
        start += buffer[-2].size + padding.size
    block = np.full(offset + 8, UNTOUCHED, np.uint8)
    stored = np.concatenate(buffer)
    stored.flags.writeable = False
    found = place_matrices(stored, placements, block, FORMAT_OF[target])
    assert found == [NumbersFound.FINITE] * len(placements)
    assert np.array_equal(block[:offset], np.concatenate(expected))
    assert (block[offset:] == UNTOUCHED).all()


@pytest.mark.parametrize("target", DTYPES, ids=str)
@pytest.mark.parametrize("source", DTYPES, ids=str)
def test_nan_and_infinity_are_found_and_not_taken_for_numbers_that_are_too_large(source, target):
    for value in (float("nan"), float("inf"), float("-inf")):
        matrix = torch.full((40, 50), torch.finfo(source).max, dtype=source)
        matrix[39, 7] = value
        assert place_one(matrix, target)[1] == NumbersFound.NOT_FINITE
        assert place_one(matrix, target, is_transposed=True)[1] == NumbersFound.NOT_FINITE


def test_other_threads_run_meanwhile():
    """The call goes on until the block is written; without the lock another thread sees it half written."""
    matrix = torch.ones(2**15, 512, dtype=torch.bfloat16)
    placed = placement(matrix, [(matrix.shape[0], 0)], is_transposed=True)
    buffer, block = bytes_of(matrix), np.empty(matrix.numel() * 2, np.uint8)
    seen_between = threading.Event()
    calls = threading.Thread(
        target=lambda: [
            place_matrices(buffer, [placed], block, "BF16") for _ in range(1000) if not seen_between.is_set()
        ]
    )
    calls.start()
    middle, end = block.size // 2, block.size - 1
    while calls.is_alive() and not seen_between.is_set():
        block[[middle, end]] = 0
        if block[middle] != 0 and block[end] == 0:
            seen_between.set()
    calls.join()
    assert seen_between.is_set()


class TestArguments:
    def refuse(self, message, buffer=None, matrices=(), block=None, number_format="BF16"):
        buffer = np.zeros(64, np.uint8) if buffer is None else buffer
        block = np.zeros(64, np.uint8) if block is None else block
        with pytest.raises(InvalidArgumentError, match=re.escape(message)):
            place_matrices(buffer, list(matrices), block, number_format)

    def test_arrays_of_other_kinds_are_refused(self):
        self.refuse("buffer has 1 dimensions and the dtype int8", buffer=np.zeros(64, np.int8))
        self.refuse("buffer has 2 dimensions", buffer=np.zeros((8, 8), np.uint8))
        self.refuse("expected a contiguous, flat array of uint8", buffer=np.zeros(128, np.uint8)[::2])
        self.refuse("block has 1 dimensions and the dtype uint16", block=np.zeros(64, np.uint16))
        read_only = np.zeros(64, np.uint8)
        read_only.flags.writeable = False
        self.refuse("and is read-only; expected a contiguous, writable, flat array of uint8", block=read_only)

    def test_number_formats_that_are_not_read_are_refused(self):
        self.refuse("number_format is 'F64'; expected 'F32', 'F16' or 'BF16'", number_format="F64")
        with pytest.raises(InvalidArgumentError, match="number_format is 'I8'"):
            MatrixPlacement(
                buffer_offset=0, num_rows=1, num_columns=1, number_format="I8", is_transposed=False, parts=[]
            )

    def test_matrix_outside_its_buffer_is_an_internal_error(self):
        matrix = placement(torch.zeros(4, 6), [(4, 0)])
        with pytest.raises(InternalError, match=r"matrix 0, 4 x 6 at byte 0, is not in the buffer of 64"):
            place_matrices(np.zeros(64, np.uint8), [matrix], np.zeros(64, np.uint8), "BF16")
