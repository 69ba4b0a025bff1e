"""The one place that imports triton; the kernel files take it from here.

In a kernel every argument is annotated ``tl.tensor`` (tensors come as the address of their first element,
numbers as blocks of one) or ``tl.constexpr``: the compiler looks annotations up, so they must be names of
triton's.

A machine without CUDA needs no triton: a kernel file is imported only where it is about to be launched.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, overload

import torch

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError(
        f"lora_serve's CUDA kernels need triton >= 3.6, which cannot be imported ({error}): "
        "pip install 'lora-serve[cuda]'"
    ) from error

__all__ = [
    "begin_after_wait",
    "begin_early",
    "ceil_div",
    "early_launch",
    "jit",
    "launches_early",
    "let_next_begin",
    "next_power_of_2",
    "set_early_launches",
    "tl",
    "wait_for_previous",
]

MOST_EARLY_ROWS, MOST_EARLY_LORA_ROWS = 128, 512
"""Of kernels that mostly follow a product of the library, which never lets them start early; and of LoRA's.

Both are bounds of the LoRA kernels' classes of T, so that what is compiled at start-up has both kinds.
"""
_is_early = True


@overload
def jit(function: Callable[..., Any]) -> Any: ...
@overload
def jit(*, do_not_specialize: Sequence[str]) -> Callable[[Callable[..., Any]], Any]: ...
def jit(function: Callable[..., Any] | None = None, *, do_not_specialize: Sequence[str] = ()) -> Any:
    """Make a function a kernel, or a part of kernels: ``triton.jit`` with types.

    Parameters
    ----------
    function
        The kernel.
    do_not_specialize
        Integers whose value, and tensors whose alignment, differ from step to step. All others are compiled
        anew for the value 1, multiples of 16 and addresses at multiples of 16, which makes rows fast to read,
        and would make the first request of a new size wait.
    """
    if function is None:
        names = list(do_not_specialize)
        return triton.jit(do_not_specialize=names, do_not_specialize_on_alignment=names)
    return triton.jit(function)


def ceil_div(numerator: int, denominator: int) -> int:
    """Quotient rounded up; both positive."""
    return -(-numerator // denominator)


def next_power_of_2(number: int) -> int:
    """The smallest power of two that is not below `number` (>= 1)."""
    return 1 << (number - 1).bit_length()


@jit
def let_next_begin(EARLY: tl.constexpr) -> None:
    """Let the next kernel of the stream start while this one runs, if it is launched early, too."""
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()


@jit
def wait_for_previous(EARLY: tl.constexpr) -> None:
    """Wait until the kernel before has ended, and with it all before that.

    Every program of a kernel that is launched early must wait at least once, also one that has nothing to do:
    the next kernel takes its end for the end of all before it. Ahead of the wait a program may read what was
    complete before the last kernel that was not launched early began: tiles, sorted order and tables,
    positions, weights of the base model. The kernel just before says nothing, as it may itself have begun
    early. It writes nothing ahead of the wait.
    """
    if EARLY:
        tl.extra.cuda.gdc_wait()


@jit
def begin_early(EARLY: tl.constexpr) -> None:
    """Let the next kernel start, and wait for the one before; ahead of all that another kernel writes."""
    let_next_begin(EARLY)
    wait_for_previous(EARLY)


@jit
def begin_after_wait(EARLY: tl.constexpr) -> None:
    """Wait for the kernel before, and only then let the next one start.

    So the next one, which begins while this one runs, may read without waiting whatever was written before
    this one: all of it is complete when this wait is over.
    """
    wait_for_previous(EARLY)
    let_next_begin(EARLY)


def set_early_launches(is_early: bool) -> None:
    """Allow or forbid early launches, for all threads of the process."""
    global _is_early
    _is_early = is_early


def launches_early(x: torch.Tensor, most_rows: int = MOST_EARLY_ROWS) -> bool:
    """Whether kernels over the rows of x [T, ...] are launched before the kernel ahead of them has ended.

    Above `most_rows` there is no pause between kernels worth saving, and each of many programs pays for it.
    """
    return _is_early and len(x) <= most_rows and can_launch_early(x)


def early_launch(x: torch.Tensor, most_rows: int = MOST_EARLY_ROWS) -> dict[str, Any]:
    """Give the arguments of a launch of a kernel that calls `wait_for_previous`, here or by `begin_early`."""
    return {"EARLY": True, "launch_pdl": True} if launches_early(x, most_rows) else {"EARLY": False}


def can_launch_early(x: torch.Tensor) -> bool:
    """Whether the device of x can start a kernel before the one ahead of it has ended: from Hopper on."""
    return x.is_cuda and _capability(x.device) >= (9, 0)


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)
