"""Least squares with coefficients that may not be negative."""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[np.float64]]


def nonnegative_least_squares(matrix: Array, target: Array) -> Array:
    """Lawson and Hanson's active sets: argmin |matrix x - target| with x >= 0."""
    x = np.zeros(matrix.shape[1])
    is_free = np.zeros(matrix.shape[1], dtype=bool)
    for _ in range(20 * matrix.shape[1]):
        gradient = np.where(is_free, -np.inf, matrix.T @ (target - matrix @ x))
        if gradient.max() <= 1e-10:
            return x
        is_free[int(gradient.argmax())] = True
        while True:
            candidate = np.zeros_like(x)
            candidate[is_free] = np.linalg.lstsq(matrix[:, is_free], target, rcond=None)[0]
            below = is_free & (candidate <= 0)
            if not below.any():
                break
            step = np.min(x[below] / (x[below] - candidate[below]))
            x = x + step * (candidate - x)
            is_free &= x > 1e-14
            x[~is_free] = 0.0
        x = candidate
    raise ArithmeticError("the fit does not converge")
