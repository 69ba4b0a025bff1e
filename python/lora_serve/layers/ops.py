"""The element-wise operations of a decoder, each of which exists twice: in torch and as CUDA kernels.

This is the only place that chooses. Tensors on the CPU go to :mod:`lora_serve.layers.torch_ops`, tensors on
CUDA to Triton kernels, which are imported with the first of them. The kernels round less often than torch in
16-bit types, so the two agree up to rounding. Inside :func:`torch_ops_only` everything goes to torch, but for
the deltas of adapters: to debug a kernel, or to test it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from torch import Tensor

from lora_serve.kernels import LoRADelta, LoRALayerTable, LoRAMetadata, add_lora_linear
from lora_serve.kernels.lora_delta import FEW_TOKENS
from lora_serve.layers import torch_ops
from lora_serve.layers.attention import KVLayer
from lora_serve.layers.step_context import StepContext


class HeadNorms(NamedTuple):
    """The norms of single heads before the rotation.

    Parameters
    ----------
    q_weight, k_weight
        [D], of queries and of keys.
    eps
        Added to the mean square.
    """

    q_weight: Tensor
    k_weight: Tensor
    eps: float


class _Ops(NamedTuple):
    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    add_rms_norm: Callable[[Tensor, Tensor, Tensor, float], Tensor]
    norm_rotary_store: Callable[
        [Tensor, Tensor, Tensor, Tensor, KVLayer, Tensor | None, Tensor | None, float], Tensor
    ]
    silu_mul: Callable[[Tensor], Tensor]
    linear: Callable[[Tensor, Tensor, Tensor | None, Tensor | None], Tensor]


class _TritonOps(NamedTuple):
    plain: _Ops
    lora_norm_rotary_store: Callable[
        [Tensor, LoRADelta, Tensor, Tensor, Tensor, KVLayer, Tensor | None, Tensor | None, float], Tensor
    ]
    lora_silu_mul: Callable[[Tensor, LoRADelta], Tensor]
    lora_linear: Callable[
        [Tensor, Tensor, Tensor | None, LoRALayerTable, LoRAMetadata], tuple[Tensor, LoRADelta | None]
    ]
    lora_linear_into: Callable[[Tensor, Tensor, Tensor, Tensor | None, LoRALayerTable, LoRAMetadata], Tensor]
    add_lora_delta: Callable[[Tensor, LoRADelta], None]


_TORCH_OPS = _Ops(
    torch_ops.rms_norm,
    torch_ops.add_rms_norm,
    torch_ops.norm_rotary_store,
    torch_ops.silu_mul,
    torch_ops.linear,
)
_torch_only = False

MANY_TOKENS = 2048
"""With more, activations do not stay in a GPU's L2 cache, and each pass over them costs."""


@functools.cache
def _triton_ops() -> _TritonOps:
    from lora_serve.kernels import cuda_lora, lora_rotary_store, rotary_store
    from lora_serve.kernels.cuda_linear import cuda_linear
    from lora_serve.kernels.lora_silu_mul import lora_silu_mul
    from lora_serve.kernels.rms_norm import add_rms_norm, rms_norm
    from lora_serve.kernels.silu_mul import silu_mul

    def norm_rotary_store(
        qkv: Tensor,
        positions: Tensor,
        cos_sin: Tensor,
        slot_mapping: Tensor,
        kv_layer: KVLayer,
        q_weight: Tensor | None,
        k_weight: Tensor | None,
        eps: float,
    ) -> Tensor:
        pages = (kv_layer.k, kv_layer.v)
        return rotary_store.norm_rotary_store(
            qkv, positions, cos_sin, slot_mapping, *pages, q_weight, k_weight, eps
        )

    def lora_norm_rotary_store(
        qkv: Tensor,
        delta: LoRADelta,
        positions: Tensor,
        cos_sin: Tensor,
        slot_mapping: Tensor,
        kv_layer: KVLayer,
        q_weight: Tensor | None,
        k_weight: Tensor | None,
        eps: float,
    ) -> Tensor:
        pages = (kv_layer.k, kv_layer.v)
        return lora_rotary_store.lora_norm_rotary_store(
            qkv, delta, positions, cos_sin, slot_mapping, *pages, q_weight, k_weight, eps
        )

    plain = _Ops(rms_norm, add_rms_norm, norm_rotary_store, silu_mul, cuda_linear)
    return _TritonOps(
        plain,
        lora_norm_rotary_store,
        lora_silu_mul,
        cuda_lora.linear,
        cuda_lora.linear_into,
        cuda_lora.add_delta,
    )


def _ops_of(x: Tensor) -> _Ops:
    return _triton_ops().plain if x.is_cuda and not _torch_only else _TORCH_OPS


@contextmanager
def torch_ops_only() -> Iterator[None]:
    """Compute with torch on every device until the block ends; for all threads of the process."""
    global _torch_only
    before, _torch_only = _torch_only, True
    try:
        yield
    finally:
        _torch_only = before


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalise the last axis: ``weight * x / sqrt(mean(x^2) + eps)``, mean and division in fp32.

    Parameters
    ----------
    x
        [T, H]; any strides of rows.
    weight
        [H] of the dtype of ``x``.
    eps
        Added to the mean square.

    Returns
    -------
    Tensor
        [T, H], contiguous, the dtype of ``x``, to which the quotient is rounded before the weight.
    """
    return _ops_of(x).rms_norm(x, weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Add to the residual stream in place, and normalise the sum.

    Parameters
    ----------
    x
        [T, H]: what a part of the model adds.
    residual
        [T, H], contiguous; becomes ``x + residual``, rounded to its dtype.
    weight, eps
        As for :func:`rms_norm`.

    Returns
    -------
    Tensor
        [T, H], contiguous: the norm of the rounded sum.
    """
    return _ops_of(x).add_rms_norm(x, residual, weight, eps)


def norm_rotary_store(
    qkv: Tensor,
    ctx: StepContext,
    cos_sin: Tensor,
    kv_layer: KVLayer,
    head_norms: HeadNorms | None,
    delta: LoRADelta | None = None,
) -> Tensor:
    """Make queries, keys and values of a step ready for attention.

    Heads of queries and keys are normalised (where the model does that) and turned by their positions; keys
    and values are stored in their pages.

    Parameters
    ----------
    qkv
        [T, (heads + 2 kv_heads) * D], contiguous: queries, keys and values side by side. Not to be read
        afterwards: the result may lie in it.
    ctx
        The step's positions, in [0, max_positions), and slot mapping.
    cos_sin
        [max_positions, D] float32: cosines of the D/2 planes, then sines.
    kv_layer
        The layer's pages, written at the slot mapping.
    head_norms
        None = the model has none.
    delta
        What adapters still have to add to ``qkv``; None = nothing.

    Returns
    -------
    Tensor
        [T, heads, D] of the dtype of ``qkv``; the last axis is contiguous.
    """
    q_weight, k_weight, eps = (None, None, 0.0) if head_norms is None else head_norms
    rest = (ctx.positions, cos_sin, ctx.slot_mapping, kv_layer, q_weight, k_weight, eps)
    delta = _left_of(delta, qkv)
    if delta is not None:
        return _triton_ops().lora_norm_rotary_store(qkv, delta, *rest)
    return _ops_of(qkv).norm_rotary_store(qkv, *rest)


def silu_mul(gate_up: Tensor, delta: LoRADelta | None = None) -> Tensor:
    """Give ``silu(gate) * up``; the silu is rounded to the dtype before the product.

    Parameters
    ----------
    gate_up
        [T, 2 I], contiguous: gate, then up. Not to be read afterwards: the delta may have been added to it.
    delta
        What adapters still have to add to ``gate_up``; None = nothing.

    Returns
    -------
    Tensor
        [T, I], contiguous.
    """
    delta = _left_of(delta, gate_up)
    if delta is not None:
        return _triton_ops().lora_silu_mul(gate_up, delta)
    return _ops_of(gate_up).silu_mul(gate_up)


def _left_of(delta: LoRADelta | None, y: Tensor) -> LoRADelta | None:
    """Give a delta that the next kernel is to take with it; any other is added to y here."""
    if delta is None or (_ops_of(y) is not _TORCH_OPS and len(y) > FEW_TOKENS):
        return delta
    add_lora_delta(y, delta)
    return None


def lora_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, table: LoRALayerTable, lora: LoRAMetadata
) -> tuple[Tensor, LoRADelta | None]:
    """Give ``x W^T + b`` with what the step's adapters add, or without it and with what is left to add.

    Parameters
    ----------
    x, weight, bias
        As for :func:`linear`.
    table
        The layer's weights by adapter slot.
    lora
        Grouping of the T tokens; the step has adapters.

    Returns
    -------
    y : Tensor
        [T, O].
    delta : LoRADelta or None
        For :func:`silu_mul`, :func:`norm_rotary_store` or :func:`add_lora_delta`; None = ``y`` is complete.
    """
    if _ops_of(x) is not _TORCH_OPS:
        return _triton_ops().lora_linear(x, weight, bias, table, lora)
    y = torch_ops.linear(x, weight, bias, None)
    add_lora_linear(y, x, table, lora)
    return y, None


def lora_linear_into(
    residual: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    table: LoRALayerTable,
    lora: LoRAMetadata,
) -> Tensor:
    """Give ``x W^T + b`` with what the step's adapters add, or add that to the residual stream already.

    Parameters
    ----------
    residual
        [T, O], contiguous, of the dtype of ``x``: what the result will be added to. Rows with an adapter may
        be changed in place, each sum rounded once.
    x, weight, bias, table, lora
        As for :func:`lora_linear`.

    Returns
    -------
    Tensor
        [T, O]: what is still to be added to the stream.
    """
    if _ops_of(x) is _TORCH_OPS:
        return lora_linear(x, weight, bias, table, lora)[0]
    return _triton_ops().lora_linear_into(residual, x, weight, bias, table, lora)


def add_lora_delta(y: Tensor, delta: LoRADelta) -> None:
    """Add what :func:`lora_linear` has left over to its ``y`` [T, O], in place."""
    _triton_ops().add_lora_delta(y, delta)


def add_linear(residual: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Add ``x W^T`` to the residual stream in place, where that saves a pass over it.

    The vendor's library adds a matrix to a product at no cost. The sum is rounded once; the product alone and
    then the sum would be rounded twice.

    Parameters
    ----------
    residual
        [T, O], contiguous, of the dtype of ``x``.
    x, weight, bias
        As for :func:`linear`.

    Returns
    -------
    bool
        False = nothing was done: few tokens, a bias, or no CUDA device.
    """
    if bias is not None or len(x) <= MANY_TOKENS or _ops_of(x) is _TORCH_OPS:
        return False
    residual.addmm_(x, weight.t())
    return True


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """Give ``x W^T + b``.

    Where a kernel of ours was measured to be faster on this GPU, for this shape and number of rows, it is
    taken; the vendor's library otherwise.

    Parameters
    ----------
    x
        [T, H]; the last axis is contiguous.
    weight
        [O, H] of the dtype of ``x``.
    bias
        [O] of the dtype of ``x``, or None.
    out
        [T, O] of the dtype of ``x``, contiguous, to write to; None = a new tensor.

    Returns
    -------
    Tensor
        [T, O], contiguous.
    """
    return _ops_of(x).linear(x, weight, bias, out)
