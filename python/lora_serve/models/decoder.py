"""The decoder of the Llama, Mistral, Qwen2 and Qwen3 families: one code, differences in the configuration."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lora_serve.kernels import LoRAMetadata
from lora_serve.layers import (
    AttentionMetadata,
    KVLayer,
    LogitsProjection,
    LoRATarget,
    PackedLinear,
    RMSNorm,
    StepContext,
    TokenEmbedding,
    compute_cos_sin,
    make_attention_backend,
    ops,
)
from lora_serve.models.config import ModelConfig
from lora_serve.models.decoder_layer import DecoderLayer


class DecoderModel(nn.Module):
    """A whole model, from token ids to logits.

    Owns its weights and its LoRA tables, not the KV pages. Weights are uninitialised until they are loaded
    (:func:`lora_serve.models.load_model`).

    Parameters
    ----------
    config
        The model.
    device
        Of the weights.
    attention_backend
        Name of the attention implementation.
    max_positions
        Positions that a token may have, for the table of cosines and sines; None = the configuration's
        ``max_model_len``, which is never exceeded.

    Attributes
    ----------
    attention_backend : AttentionBackend
        Plans steps for :meth:`forward`.
    attention_specs : frozenset of AttentionSpec
        Every distinct spec among the layers.

    Raises
    ------
    InvalidArgumentError
        No attention backend has this name.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        device: torch.device,
        attention_backend: str = "torch",
        max_positions: int | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.device = device
        self.attention_backend = make_attention_backend(attention_backend)
        dtype = config.dtype
        self.embed_tokens = TokenEmbedding(
            "model.embed_tokens", config.vocab_size, config.hidden_size, dtype=dtype, device=device
        )
        layers = [
            DecoderLayer(config, layer, self.attention_backend, device) for layer in range(config.num_layers)
        ]
        self.layers = nn.ModuleList(layers)
        self._typed_layers = layers
        self.attention_specs = frozenset(layer.self_attn.spec for layer in layers)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype=dtype, device=device)
        logits_weight = self.embed_tokens.weight
        if not config.has_tied_embeddings:
            untied = torch.empty(config.vocab_size, config.hidden_size, dtype=dtype, device=device)
            logits_weight = nn.Parameter(untied, requires_grad=False)
        self.lm_head = LogitsProjection("lm_head", logits_weight)
        num_positions = min(max_positions or config.max_model_len, config.max_model_len)
        self._cos_sin = compute_cos_sin(config.rope, config.head_dim, num_positions, device)

    def plan_attention(self, metadata: AttentionMetadata, kv_layers: Sequence[KVLayer]) -> Any:
        """Plan a step for :meth:`forward`, outside of what a CUDA graph captures.

        Parameters
        ----------
        metadata
            Rows, lengths and pages of the step.
        kv_layers
            [num_layers], as for :meth:`forward`.

        Returns
        -------
        Any
            For :meth:`forward` of this step; only the attention backend knows what it is.
        """
        return self.attention_backend.plan(metadata, kv_layers[0], self.attention_specs)

    @torch.inference_mode()
    def forward(
        self, token_ids: Tensor, ctx: StepContext, kv_layers: Sequence[KVLayer], attention_plan: Any
    ) -> Tensor:
        """Run one step.

        Parameters
        ----------
        token_ids
            [T] int32 or int64, in [0, vocab_size), row after row; T at least 1.
        ctx
            Positions, places in the pages and adapter slots of the tokens.
        kv_layers
            [num_layers]; the pages at ``slot_mapping`` are written.
        attention_plan
            What :meth:`plan_attention`, or the attention backend itself, has made for this step.

        Returns
        -------
        Tensor
            [T, H] after the final norm, the model's dtype; [N, H] where the context names N outputs. An
            inference tensor: not for autograd.

        Raises
        ------
        ValueError
            The context or the plan does not fit the tokens, or there is not one KV layer a layer.
        LookupError
            A token names an adapter slot that holds no adapter (on the CPU; an accelerator does not check).

        Notes
        -----
        On CUDA nothing waits for the device, and with a backend that can be captured the whole step is
        capturable in a graph: shapes depend on the number of tokens alone.
        """
        places = ctx.slot_mapping.shape
        if token_ids.shape != ctx.positions.shape or token_ids.shape != places:
            raise ValueError(
                f"token_ids has shape {tuple(token_ids.shape)}, positions {tuple(ctx.positions.shape)}, "
                f"slot_mapping {tuple(places)}, expected the same"
            )
        if len(kv_layers) != len(self.layers):
            raise ValueError(f"there are {len(kv_layers)} KV layers, expected {len(self.layers)}")
        residual, query = self.begin(token_ids, ctx, kv_layers[0])
        attended = self.attend(0, query, kv_layers[0], attention_plan)
        for layer in range(1, len(kv_layers)):
            query = self.go_on(layer, attended, residual, ctx, kv_layers[layer])
            attended = self.attend(layer, query, kv_layers[layer], attention_plan)
        return self.finish(attended, residual, ctx)

    # --- The pieces of a step, between its attentions. The stream of hidden states is `residual + added`, and
    # the sum is part of a norm or of a product.

    @torch.inference_mode()
    def begin(self, token_ids: Tensor, ctx: StepContext, kv_layer: KVLayer) -> tuple[Tensor, Tensor]:
        """Run a step up to the first attention.

        Parameters
        ----------
        token_ids, ctx
            As for :meth:`forward`.
        kv_layer
            Of the first layer; written.

        Returns
        -------
        residual : Tensor
            [T, H]: the residual stream, which the other pieces change in place.
        query : Tensor
            [T, heads, D]: for :meth:`attend`.
        """
        residual = self.embed_tokens.forward(token_ids, ctx)
        return residual, self._typed_layers[0].begin(None, residual, self._cos_sin, ctx, kv_layer)

    @torch.inference_mode()
    def attend(
        self, layer: int, query: Tensor, kv_layer: KVLayer, attention_plan: Any, out: Tensor | None = None
    ) -> Tensor:
        """Run the attention of a layer; see :meth:`DecoderAttention.attend`."""
        return self._typed_layers[layer].self_attn.attend(query, kv_layer, attention_plan, out)

    @torch.inference_mode()
    def go_on(
        self, layer: int, attended: Tensor, residual: Tensor, ctx: StepContext, kv_layer: KVLayer
    ) -> Tensor:
        """Run a step from the attention before a layer up to the layer's own.

        Parameters
        ----------
        layer
            At least 1.
        attended
            [T, heads * D]: what the attention before gave.
        residual
            [T, H] from :meth:`begin`; changed in place.
        ctx
            As for :meth:`forward`.
        kv_layer
            Of the layer; written.

        Returns
        -------
        Tensor
            [T, heads, D]: for :meth:`attend`.
        """
        added = self._typed_layers[layer - 1].finish(attended, residual, ctx)
        return self._typed_layers[layer].begin(added, residual, self._cos_sin, ctx, kv_layer)

    @torch.inference_mode()
    def finish(self, attended: Tensor, residual: Tensor, ctx: StepContext) -> Tensor:
        """Run the rest of a step, behind the last attention; see :meth:`forward` for the result."""
        if ctx.outputs is not None:
            wanted = ctx.outputs.tokens
            if not len(wanted):
                return residual[:0]
            attended, residual = attended.index_select(0, wanted), residual.index_select(0, wanted)
            ctx = replace(ctx, lora=ctx.outputs.lora)
        added = self._typed_layers[-1].finish(attended, residual, ctx)
        return self.norm.add_and_normalise(added, residual)

    @torch.no_grad()
    def compute_logits(self, hidden: Tensor, lora: LoRAMetadata | None) -> Tensor:
        """Give logits of chosen tokens.

        Parameters
        ----------
        hidden
            [N, H]: rows of what :meth:`forward` gave.
        lora
            Those N rows grouped by adapter slot; not the step's tokens. None = no row has an adapter.

        Returns
        -------
        Tensor
            [N, V] float32; an ordinary tensor that may be changed in place.

        Raises
        ------
        ValueError
            ``lora`` is of another number of rows.
        LookupError
            A row names an adapter slot that holds no adapter.
        """
        return self.lm_head.forward(hidden, lora)

    @torch.no_grad()
    def compute_base_logits(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        """Give logits of tokens that no adapter changes, without the float32 copy of :meth:`compute_logits`.

        Parameters
        ----------
        hidden
            [N, H]: rows of what :meth:`forward` gave. No row's adapter has a module on ``lm_head``.
        out
            [N, V] of the model's dtype, contiguous, to write to; None = newly allocated.

        Returns
        -------
        Tensor
            [N, V] of the model's dtype; widened to float32 it equals what :meth:`compute_logits` gives.
        """
        return ops.linear(hidden, self.lm_head.weight, out=out)

    def lora_targets(self) -> dict[str, LoRATarget]:
        """Give every module that an adapter may have weights for by its full path.

        Returns
        -------
        dict[str, LoRATarget]
            Keys ``model.embed_tokens``, then the layers' linear projections, such as
            ``model.layers.3.self_attn.q_proj``, then ``lm_head``.
        """
        targets = dict(self.embed_tokens.lora_targets())
        for linear in self._packed_linears():
            targets.update(linear.lora_targets())
        targets.update(self.lm_head.lora_targets())
        return targets

    def fused_lora_targets(self) -> dict[str, tuple[str, ...]]:
        """Give the modules that other implementations of the model have in place of several LoRA targets.

        Returns
        -------
        dict[str, tuple[str, ...]]
            Paths such as ``model.layers.3.self_attn.qkv_proj`` to the LoRA targets that are their members, in
            the order of the fused module's output features.
        """
        return dict(fused for linear in self._packed_linears() for fused in linear.fused_lora_targets())

    def checkpoint_tensors(self) -> dict[str, Tensor]:
        """Give every tensor of a checkpoint by its name, with the (part of a) parameter that it fills.

        Returns
        -------
        dict[str, Tensor]
            The parts are disjoint and cover all parameters. ``lm_head.weight`` is absent where it is tied.
        """
        tensors = {
            "model.embed_tokens.weight": self.embed_tokens.weight,
            "model.norm.weight": self.norm.weight,
        }
        for layer in self._typed_layers:
            tensors.update(layer.checkpoint_tensors())
        if not self.config.has_tied_embeddings:
            tensors["lm_head.weight"] = self.lm_head.weight
        return tensors

    def _packed_linears(self) -> Iterator[PackedLinear]:
        for layer in self._typed_layers:
            yield from layer.packed_linears()
