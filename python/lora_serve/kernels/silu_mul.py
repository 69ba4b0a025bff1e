"""The gated activation between the two halves of an MLP on CUDA.

Semantics
---------
For token t and feature i of I::

    y[t, i] = round(round(silu(gate_up[t, i])) * gate_up[t, I + i])        silu(g) = g / (1 + exp(-g))

`round` is to the dtype of gate_up: silu, computed in fp32, is rounded before the product, as torch does for
``silu(gate) * up``. A LoRA delta that was expanded already is added to gate_up first, see `add_expanded`.

Layout: rows of 2 I neighbouring elements with any distance between rows. Grid: (tokens, blocks of features).
No token: nothing is launched. Tokens do not see each other, so padded ones need no care.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lora_serve.kernels._triton import begin_early, ceil_div, early_launch, jit, tl
from lora_serve.kernels.expanded_delta import add_expanded, expanded_tensors
from lora_serve.kernels.lora_delta import LoRADelta

_BLOCK = 1024
_NUM_WARPS = 4


@jit
def silu_times(gate: tl.tensor, up: tl.tensor) -> tl.tensor:
    """``silu(gate) * up`` of numbers that are already loaded, both roundings included."""
    wide = gate.to(tl.float32)
    silu = (wide / (1.0 + tl.exp(-wide))).to(gate.dtype)
    return (silu.to(tl.float32) * up.to(tl.float32)).to(gate.dtype)


@jit(do_not_specialize=["mapping_ptr"])
def _silu_mul_kernel(
    gate_up: tl.tensor,
    out: tl.tensor,
    delta: tl.tensor,
    mapping_ptr: tl.tensor,
    gate_up_stride: tl.tensor,
    out_stride: tl.tensor,
    I: tl.constexpr,  # noqa: E741
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
) -> None:
    t = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = i < I
    row = gate_up + t * gate_up_stride + i
    if delta is not None:
        slot = tl.load(mapping_ptr + t)
    begin_early(EARLY)
    gate = tl.load(row, mask=mask, other=0.0)
    up = tl.load(row + I, mask=mask, other=0.0)
    if delta is not None:
        delta_row = delta + t * (2 * I) + i
        gate = add_expanded(gate, delta_row, mask, slot)
        up = add_expanded(up, delta_row + I, mask, slot)
    tl.store(out + t * out_stride + i, silu_times(gate, up), mask=mask)


def silu_mul(gate_up: Tensor, out: Tensor | None = None, delta: LoRADelta | None = None) -> Tensor:
    """``silu(gate) * up`` for gate and up side by side.

    Parameters
    ----------
    gate_up
        [T, 2 I] on CUDA, fp32, fp16 or bf16; neighbouring elements of a row lie side by side.
    out
        [T, I], the dtype of ``gate_up``. None = a new tensor.
    delta
        What adapters add to ``gate_up``, expanded already. None = nothing.

    Returns
    -------
    Tensor
        ``out``, or [T, I] contiguous.

    Raises
    ------
    ValueError
        Shapes, dtypes or strides are not these.

    Notes
    -----
    Runs on the current stream.
    """
    out = check_silu_mul(gate_up, out)
    num_tokens, size = out.shape
    added = expanded_tensors(delta, gate_up)
    if num_tokens and size:
        _silu_mul_kernel[(num_tokens, ceil_div(size, _BLOCK))](
            gate_up,
            out,
            *added,
            gate_up.stride(0),
            out.stride(0),
            I=size,
            BLOCK=_BLOCK,
            num_warps=_NUM_WARPS,
            **early_launch(gate_up),
        )
    return out


def check_silu_mul(gate_up: Tensor, out: Tensor | None) -> Tensor:
    """``out``, or a new one where it is None; raises as `silu_mul` does."""
    if gate_up.dim() != 2 or gate_up.shape[1] % 2 or gate_up.stride(1) != 1:
        raise ValueError(
            f"gate_up is {tuple(gate_up.shape)} with strides {gate_up.stride()}, expected [T, 2 I] with a "
            "contiguous last axis"
        )
    num_tokens, size = gate_up.shape[0], gate_up.shape[1] // 2
    if out is None:
        return torch.empty((num_tokens, size), dtype=gate_up.dtype, device=gate_up.device)
    if out.shape != (num_tokens, size) or out.dtype != gate_up.dtype or out.stride(1) != 1:
        raise ValueError(
            f"out is {tuple(out.shape)} {out.dtype} with strides {out.stride()}, expected "
            f"{(num_tokens, size)} {gate_up.dtype} with a contiguous last axis"
        )
    return out
