"""One layer of the decoder: attention and gated feed-forward, with or without biases and head norms."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lora_serve.layers import (
    AttentionBackend,
    AttentionSpec,
    HeadNorms,
    KVLayer,
    PackedLinear,
    RMSNorm,
    StepContext,
    ops,
)
from lora_serve.models.config import ModelConfig

NamedTensors = Iterator[tuple[str, Tensor]]


class DecoderAttention(nn.Module):
    """Self-attention of one layer, from hidden states to hidden states.

    Parameters
    ----------
    config
        The model.
    layer
        Index of the layer.
    backend
        Computes the attention itself.
    device
        Of the weights.
    """

    def __init__(
        self, config: ModelConfig, layer: int, backend: AttentionBackend, device: torch.device
    ) -> None:
        super().__init__()
        self.prefix = f"model.layers.{layer}.self_attn"
        self.num_heads, self.num_kv_heads, self.head_dim = (
            config.num_heads,
            config.num_kv_heads,
            config.head_dim,
        )
        q_size, kv_size = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        self.qkv_proj = PackedLinear(
            self.prefix,
            {"q_proj": q_size, "k_proj": kv_size, "v_proj": kv_size},
            config.hidden_size,
            bias=config.has_qkv_bias,
            dtype=config.dtype,
            device=device,
            fused_name="qkv_proj",
        )
        self.o_proj = PackedLinear(
            self.prefix,
            {"o_proj": config.hidden_size},
            q_size,
            bias=config.has_o_bias,
            dtype=config.dtype,
            device=device,
        )
        self.q_norm: RMSNorm | None = None
        self.k_norm: RMSNorm | None = None
        if config.has_qk_norm:
            eps, dtype = config.rms_norm_eps, config.dtype
            self.q_norm = RMSNorm(self.head_dim, eps, dtype=dtype, device=device)
            self.k_norm = RMSNorm(self.head_dim, eps, dtype=dtype, device=device)
        self._backend = backend
        self.spec = AttentionSpec(
            self.num_heads,
            self.num_kv_heads,
            self.head_dim,
            scaling=self.head_dim**-0.5,
            sliding_window=config.layer_windows[layer],
        )

    def project(self, hidden: Tensor, cos_sin: Tensor, ctx: StepContext, kv_layer: KVLayer) -> Tensor:
        """Give the queries, and store the keys and values.

        Parameters
        ----------
        hidden
            [T, H], normalised.
        cos_sin
            [max_positions, D] float32: the model's table of cosines and sines.
        ctx
            The step.
        kv_layer
            The layer's KV pages; the step's tokens are written.

        Returns
        -------
        Tensor
            [T, heads, D]: the queries; the last axis is contiguous.
        """
        qkv, delta = self.qkv_proj.forward_deferred(hidden, ctx)
        return ops.norm_rotary_store(qkv, ctx, cos_sin, kv_layer, self._head_norms(), delta)

    def attend(self, query: Tensor, kv_layer: KVLayer, plan: Any, out: Tensor | None = None) -> Tensor:
        """Let each token's heads gather what they see.

        Parameters
        ----------
        query
            [T, heads, D] from :meth:`project`.
        kv_layer
            The layer's KV pages.
        plan
            The attention backend's plan of the step.
        out
            [T, heads, D], contiguous, to write to; None = newly allocated.

        Returns
        -------
        Tensor
            [T, heads * D].
        """
        return self._backend.attend(query, kv_layer, self.spec, plan, out).flatten(1)

    def finish(self, attended: Tensor, residual: Tensor, ctx: StepContext) -> Tensor | None:
        """Project what was gathered.

        Parameters
        ----------
        attended
            [T, heads * D]: what :meth:`attend` gave, or some of its rows.
        residual
            [T, H], contiguous: the residual stream of these tokens, which may be added to.
        ctx
            The step; adapters of these tokens.

        Returns
        -------
        Tensor or None
            [T, H]: what is still to be added to the stream. None = nothing.
        """
        return self.o_proj.forward_into(residual, attended, ctx)

    def _head_norms(self) -> HeadNorms | None:
        if self.q_norm is None or self.k_norm is None:
            return None
        return HeadNorms(self.q_norm.weight, self.k_norm.weight, self.q_norm.eps)

    def checkpoint_tensors(self) -> NamedTensors:
        """Yield checkpoint names with the tensors that they fill."""
        yield from self.qkv_proj.checkpoint_tensors()
        yield from self.o_proj.checkpoint_tensors()
        if self.q_norm is not None and self.k_norm is not None:
            yield f"{self.prefix}.q_norm.weight", self.q_norm.weight
            yield f"{self.prefix}.k_norm.weight", self.k_norm.weight


class DecoderMLP(nn.Module):
    """The gated feed-forward part of one layer: ``down(silu(gate(x)) * up(x))``.

    Parameters
    ----------
    config
        The model.
    layer
        Index of the layer.
    device
        Of the weights.
    """

    def __init__(self, config: ModelConfig, layer: int, device: torch.device) -> None:
        super().__init__()
        prefix, size = f"model.layers.{layer}.mlp", config.intermediate_size
        self.gate_up_proj = PackedLinear(
            prefix,
            {"gate_proj": size, "up_proj": size},
            config.hidden_size,
            bias=config.has_mlp_bias,
            dtype=config.dtype,
            device=device,
            fused_name="gate_up_proj",
        )
        self.down_proj = PackedLinear(
            prefix,
            {"down_proj": config.hidden_size},
            size,
            bias=config.has_mlp_bias,
            dtype=config.dtype,
            device=device,
        )

    def forward(self, hidden: Tensor, residual: Tensor, ctx: StepContext) -> Tensor | None:
        """Transform [T, H], normalised, as :meth:`DecoderAttention.finish` does."""
        gate_up, delta = self.gate_up_proj.forward_deferred(hidden, ctx)
        return self.down_proj.forward_into(residual, ops.silu_mul(gate_up, delta), ctx)


class DecoderLayer(nn.Module):
    """One layer: attention and feed-forward, each behind a norm and beside a residual.

    Parameters
    ----------
    config
        The model.
    layer
        Index of the layer.
    backend
        Computes the attention itself.
    device
        Of the weights.
    """

    def __init__(
        self, config: ModelConfig, layer: int, backend: AttentionBackend, device: torch.device
    ) -> None:
        super().__init__()
        self.prefix = f"model.layers.{layer}"
        size, eps, dtype = config.hidden_size, config.rms_norm_eps, config.dtype
        self.input_layernorm = RMSNorm(size, eps, dtype=dtype, device=device)
        self.self_attn = DecoderAttention(config, layer, backend, device)
        self.post_attention_layernorm = RMSNorm(size, eps, dtype=dtype, device=device)
        self.mlp = DecoderMLP(config, layer, device)

    def begin(
        self, added: Tensor | None, residual: Tensor, cos_sin: Tensor, ctx: StepContext, kv_layer: KVLayer
    ) -> Tensor:
        """Run the layer on ``added + residual``, up to its attention; the rest is :meth:`finish`.

        Parameters
        ----------
        added
            [T, H]: what the layer before left to add to the residual stream; None = nothing.
        residual
            [T, H], contiguous: the residual stream, changed in place.
        cos_sin, ctx, kv_layer
            As for :meth:`DecoderAttention.project`.

        Returns
        -------
        Tensor
            [T, heads, D]: queries for :meth:`DecoderAttention.attend`, behind which no token sees another.
        """
        normed = self.input_layernorm.add_and_normalise(added, residual)
        return self.self_attn.project(normed, cos_sin, ctx, kv_layer)

    def finish(self, attended: Tensor, residual: Tensor, ctx: StepContext) -> Tensor | None:
        """Run the rest of the layer, behind its attention.

        Parameters
        ----------
        attended, residual, ctx
            As for :meth:`DecoderAttention.finish`.

        Returns
        -------
        Tensor or None
            [T, H]: what is still to be added to the stream. The next norm does it, in one kernel. None =
            nothing.
        """
        added = self.self_attn.finish(attended, residual, ctx)
        normed = self.post_attention_layernorm.add_and_normalise(added, residual)
        return self.mlp.forward(normed, residual, ctx)

    def packed_linears(self) -> tuple[PackedLinear, ...]:
        """Give the layer's linear projections."""
        attention, mlp = self.self_attn, self.mlp
        return attention.qkv_proj, attention.o_proj, mlp.gate_up_proj, mlp.down_proj

    def checkpoint_tensors(self) -> NamedTensors:
        """Yield checkpoint names with the tensors that they fill."""
        yield f"{self.prefix}.input_layernorm.weight", self.input_layernorm.weight
        yield f"{self.prefix}.post_attention_layernorm.weight", self.post_attention_layernorm.weight
        yield from self.self_attn.checkpoint_tensors()
        yield from self.mlp.gate_up_proj.checkpoint_tensors()
        yield from self.mlp.down_proj.checkpoint_tensors()
