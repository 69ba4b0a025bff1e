"""Linear layers whose outputs may be several projections in one matrix, with the LoRA seam after each."""

from __future__ import annotations

import enum
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lora_serve.kernels import LoRADelta, LoRALayerTable, add_lora_linear
from lora_serve.layers import ops
from lora_serve.layers.step_context import StepContext


class LoRAKind(enum.Enum):
    """What a module does with its input, and so what an adapter's A and B mean there.

    Shapes are those that the operators read; R rank, H input features, O output features, V vocabulary.
    """

    LINEAR = "linear"
    """A projection of hidden states: A [R, H], B [R, O]."""
    EMBEDDING = "embedding"
    """Look-up by token id: A [V, R], a row a token; B [R, O], O the width of the hidden states."""
    LOGITS = "logits"
    """Hidden states to logits, on the sampled rows only: A [R, H], B [R, V]."""


@dataclass(frozen=True, eq=False)
class LoRATarget:
    """One projection that an adapter may have a module on.

    Parameters
    ----------
    table
        Table of the packed layer that holds the projection.
    slice_index
        Which slice of the packed layer it is, from 0.
    in_features
        H, columns of the adapter's A; V, rows of its A, for an embedding.
    out_features
        O, width of the slice.
    kind
        What the module does; it decides the shape of A and which operator reads the table.
    """

    table: LoRALayerTable
    slice_index: int
    in_features: int
    out_features: int
    kind: LoRAKind = LoRAKind.LINEAR

    def a_shape(self, lora_rank: int) -> tuple[int, int]:
        """Shape of an adapter's A of this rank: [R, H], or [V, R] for an embedding."""
        if self.kind is LoRAKind.EMBEDDING:
            return self.in_features, lora_rank
        return lora_rank, self.in_features


class PackedLinear(nn.Module):
    """Projections of the same input in one matrix product: ``y = x W^T + b``, then the adapters' deltas.

    Owns the weight, the bias and the LoRA table. Does not know what its slices mean.

    Parameters
    ----------
    prefix
        Checkpoint path of the slices' parent module, such as ``model.layers.0.self_attn``.
    slices
        Name and width O_s of each slice, in the order of the output's columns. One slice is an ordinary
        linear layer.
    in_features
        H, the width of the input.
    bias
        True: every slice has a bias.
    dtype, device
        Of the weights, which are left uninitialised.
    fused_name
        Name of the one module that other implementations of the model have in place of the slices, such as
        ``qkv_proj``; adapters may be trained on it. None = there is none.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(
        self,
        prefix: str,
        slices: Mapping[str, int],
        in_features: int,
        *,
        bias: bool,
        dtype: torch.dtype,
        device: torch.device,
        fused_name: str | None = None,
    ) -> None:
        super().__init__()
        self.prefix = prefix
        self.fused_name = fused_name
        self.slice_names = tuple(slices)
        self.output_slices = tuple(slices.values())
        self.in_features = in_features
        self.out_features = sum(self.output_slices)
        weight = torch.empty(self.out_features, in_features, dtype=dtype, device=device)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None
        if bias:
            self.bias = nn.Parameter(torch.empty(self.out_features, dtype=dtype, device=device), False)
        self.lora_table = LoRALayerTable(self.output_slices, in_features)

    def forward(self, x: Tensor, ctx: StepContext) -> Tensor:
        """Give the base product plus the delta of each token's adapter.

        Parameters
        ----------
        x
            [T, H] of the layer's dtype.
        ctx
            The step; ``ctx.lora`` says which token has which adapter slot.

        Returns
        -------
        Tensor
            [T, sum(O_s)]: the slices' outputs side by side.

        Raises
        ------
        LookupError
            A token names an adapter slot that holds no adapter.
        """
        y, delta = self.forward_deferred(x, ctx)
        if delta is not None:
            ops.add_lora_delta(y, delta)
        return y

    def forward_deferred(self, x: Tensor, ctx: StepContext) -> tuple[Tensor, LoRADelta | None]:
        """Give the base product, and what the adapters still have to add to it.

        For callers whose next operation reads the output anyway, and takes the delta with it
        (:func:`ops.silu_mul`, :func:`ops.norm_rotary_store`).

        Parameters
        ----------
        x, ctx
            As for :meth:`forward`.

        Returns
        -------
        y : Tensor
            [T, sum(O_s)].
        delta : LoRADelta or None
            None = ``y`` is complete.
        """
        if ctx.lora is None or ctx.lora.no_adapter:
            return ops.linear(x, self.weight, self.bias), None
        return ops.lora_linear(x, self.weight, self.bias, self.lora_table, ctx.lora)

    def forward_into(self, residual: Tensor, x: Tensor, ctx: StepContext) -> Tensor | None:
        """Add :meth:`forward` to the residual stream, or give what the next norm is to add.

        Parameters
        ----------
        residual
            [T, sum(O_s)], contiguous, of the layer's dtype.
        x, ctx
            As for :meth:`forward`.

        Returns
        -------
        Tensor or None
            [T, sum(O_s)]: what is still to be added. None = ``residual`` is complete.
        """
        lora = None if ctx.lora is None or ctx.lora.no_adapter else ctx.lora
        if ops.add_linear(residual, x, self.weight, self.bias):
            add_lora_linear(residual, x, self.lora_table, lora)
            return None
        if lora is None:
            return ops.linear(x, self.weight, self.bias)
        return ops.lora_linear_into(residual, x, self.weight, self.bias, self.lora_table, lora)

    def checkpoint_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield each slice's checkpoint names with the part of the fused parameter that it fills."""
        start = 0
        for name, width in zip(self.slice_names, self.output_slices, strict=True):
            yield f"{self.prefix}.{name}.weight", self.weight[start : start + width]
            if self.bias is not None:
                yield f"{self.prefix}.{name}.bias", self.bias[start : start + width]
            start += width

    def lora_targets(self) -> Iterator[tuple[str, LoRATarget]]:
        """Yield each slice's full module path with its place in the LoRA table."""
        for index, (name, width) in enumerate(zip(self.slice_names, self.output_slices, strict=True)):
            yield f"{self.prefix}.{name}", LoRATarget(self.lora_table, index, self.in_features, width)

    def fused_lora_targets(self) -> Iterator[tuple[str, tuple[str, ...]]]:
        """Yield the slices' module path as one module with the paths of its members, in order.

        An adapter trained on the one module has one A, which all members share, and a B whose output features
        are the members' side by side.
        """
        if self.fused_name is not None:
            members = tuple(f"{self.prefix}.{name}" for name in self.slice_names)
            yield f"{self.prefix}.{self.fused_name}", members
