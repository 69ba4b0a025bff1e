"""Layers of the decoder family and the interfaces that they share with the executor."""

from __future__ import annotations

from lora_serve.layers.attention import (
    AttentionBackend,
    AttentionSpec,
    KVLayer,
    make_attention_backend,
    register_attention_backend,
)
from lora_serve.layers.embedding import LogitsProjection, TokenEmbedding
from lora_serve.layers.flashinfer_attention import FlashInferAttentionBackend
from lora_serve.layers.linear import LoRAKind, LoRATarget, PackedLinear
from lora_serve.layers.ops import HeadNorms
from lora_serve.layers.rms_norm import RMSNorm
from lora_serve.layers.rotary import RopeParameters, compute_cos_sin
from lora_serve.layers.step_context import AttentionMetadata, StepContext
from lora_serve.layers.torch_attention import TorchAttentionBackend

__all__ = [
    "AttentionBackend",
    "AttentionMetadata",
    "AttentionSpec",
    "FlashInferAttentionBackend",
    "HeadNorms",
    "KVLayer",
    "LoRAKind",
    "LoRATarget",
    "LogitsProjection",
    "PackedLinear",
    "RMSNorm",
    "RopeParameters",
    "StepContext",
    "TokenEmbedding",
    "TorchAttentionBackend",
    "compute_cos_sin",
    "make_attention_backend",
    "register_attention_backend",
]
