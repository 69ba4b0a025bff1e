"""Numbers of a weights file as raw bits: conversion between types, and the test for NaN and infinity.

NumPy on purpose, and not torch: its loops release the interpreter lock and use one thread, while torch would
start a team of threads for every loader thread. NumPy has no bfloat16, hence the bits. Rounds to nearest,
ties to even, exactly as torch does.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

Bits = NDArray[Any]
"""An array of uint16 or uint32: the bits of floating-point numbers."""

FILE_DTYPE_OF = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
"""The file format's name of each dtype that a model can have."""

BITS_OF: dict[str, np.dtype[Any]] = {"F32": np.dtype("<u4"), "F16": np.dtype("<u2"), "BF16": np.dtype("<u2")}
"""Unsigned integers of the same size, by the file format's name of a dtype."""

# Exponent all ones, fraction zero: NaN has the same exponent and a greater fraction.
_INFINITY_BITS = {"F32": 0x7F800000, "F16": 0x7C00, "BF16": 0x7F80}

if sys.byteorder != "little":
    raise ImportError("safetensors files are little-endian; big-endian machines are not supported")


def is_all_finite(bits: Bits, dtype: str) -> bool:
    """Whether no number is NaN or infinite.

    Parameters
    ----------
    bits
        Any shape, at least one number, of ``BITS_OF[dtype]``.
    dtype
        ``F32``, ``F16`` or ``BF16``.

    Notes
    -----
    Two passes for the largest integer instead of one for each number's class, because these run at the speed
    of the cache: read as signed integers the positive numbers come last, read as unsigned the negative ones.
    """
    infinity = _INFINITY_BITS[dtype]
    sign = 1 << (bits.dtype.itemsize * 8 - 1)
    signed = bits.view(f"<i{bits.dtype.itemsize}")
    return int(signed.max()) < infinity and int(bits.max()) < sign | infinity


def convert(bits: Bits, source: str, target: str) -> Bits:
    """Convert numbers from one dtype to another.

    Parameters
    ----------
    bits
        Contiguous, of ``BITS_OF[source]``, all of them finite.
    source, target
        ``F32``, ``F16`` or ``BF16``.

    Returns
    -------
    Bits
        The same shape, of ``BITS_OF[target]``; may be ``bits`` itself or a strided view. A number beyond the
        target's range becomes infinite.
    """
    if source == target:
        return bits
    if source == "BF16":
        wide = bits.astype(np.uint32)
        wide <<= 16
        return convert(wide, "F32", target)
    if source == "F16":
        return convert(bits.view(np.float16).astype(np.float32).view(np.uint32), "F32", target)
    if target == "F16":
        with np.errstate(over="ignore"):
            return bits.view(np.float32).astype(np.float16).view(np.uint16)
    return _round_to_bfloat16(bits)


def largest_magnitude(bits: Bits, dtype: str) -> float:
    """The largest absolute value among finite numbers."""
    wide = convert(bits, dtype, "F32").view(np.float32)
    return float(np.abs(wide).max())


def _round_to_bfloat16(bits: Bits) -> Bits:
    """The upper half of each number, after adding half of its last place, or just less where it is even."""
    rounded = bits >> 16
    rounded &= 1
    rounded += 0x7FFF
    rounded += bits
    return rounded.view(np.uint16)[..., 1::2]
