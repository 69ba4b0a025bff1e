"""The decoder of the Llama, Mistral, Qwen2 and Qwen3 families: one code, differences in the configuration."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lora_serve.layers import (
    KVLayer,
    LogitsProjection,
    LoRATarget,
    RMSNorm,
    RotaryEmbedding,
    StepContext,
    TokenEmbedding,
    make_attention_backend,
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

    Raises
    ------
    InvalidArgumentError
        No attention backend has this name.
    """

    def __init__(
        self, config: ModelConfig, *, device: torch.device, attention_backend: str = "torch"
    ) -> None:
        super().__init__()
        self.config = config
        self.device = device
        self.attention_backend = make_attention_backend(attention_backend)
        dtype = config.dtype
        self.embed_tokens = TokenEmbedding(config.vocab_size, config.hidden_size, dtype=dtype, device=device)
        layers = [
            DecoderLayer(config, layer, self.attention_backend, device) for layer in range(config.num_layers)
        ]
        self.layers = nn.ModuleList(layers)
        self._typed_layers = layers
        self._attention_specs = {layer.self_attn.spec for layer in layers}
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype=dtype, device=device)
        logits_weight = self.embed_tokens.weight
        if not config.has_tied_embeddings:
            untied = torch.empty(config.vocab_size, config.hidden_size, dtype=dtype, device=device)
            logits_weight = nn.Parameter(untied, requires_grad=False)
        self.lm_head = LogitsProjection(logits_weight)
        self._rotary = RotaryEmbedding(config.rope, config.head_dim, device)

    @torch.inference_mode()
    def forward(self, token_ids: Tensor, ctx: StepContext, kv_layers: Sequence[KVLayer]) -> Tensor:
        """Run one step.

        Parameters
        ----------
        token_ids
            [T] int32 or int64, in [0, vocab_size), row after row; T at least 1.
        ctx
            Positions, pages and adapter slots of the tokens.
        kv_layers
            [num_layers]; the pages at ``slot_mapping`` are written.

        Returns
        -------
        Tensor
            [T, H] after the final norm, the model's dtype. An inference tensor: not for autograd.

        Raises
        ------
        ValueError
            The context does not fit the tokens, or there is not one KV layer a layer.
        LookupError
            A token names an adapter slot that holds no adapter.
        """
        if token_ids.shape != ctx.positions.shape or len(kv_layers) != len(self.layers):
            raise ValueError(
                f"token_ids has shape {tuple(token_ids.shape)}, positions {tuple(ctx.positions.shape)}, "
                f"expected the same; {len(kv_layers)} KV layers, expected {len(self.layers)}"
            )
        plan = self.attention_backend.plan(ctx.attention, kv_layers[0], self._attention_specs)
        rotation = self._rotary.cos_sin(ctx.positions, self.config.dtype)
        hidden = self.embed_tokens.forward(token_ids)
        for layer, kv_layer in zip(self._typed_layers, kv_layers, strict=True):
            hidden = layer.forward(hidden, rotation, ctx, kv_layer, plan)
        return self.norm.forward(hidden)

    @torch.no_grad()
    def compute_logits(self, hidden: Tensor) -> Tensor:
        """Give logits of chosen tokens.

        Parameters
        ----------
        hidden
            [N, H]: rows of what :meth:`forward` gave.

        Returns
        -------
        Tensor
            [N, V] float32; an ordinary tensor that may be changed in place.
        """
        return self.lm_head.forward(hidden)

    def lora_targets(self) -> dict[str, LoRATarget]:
        """Give every linear projection of the layers by its full module path.

        Returns
        -------
        dict[str, LoRATarget]
            Keys such as ``model.layers.3.self_attn.q_proj``.
        """
        return {
            path: target
            for layer in self._typed_layers
            for linear in layer.packed_linears()
            for path, target in linear.lora_targets()
        }

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
