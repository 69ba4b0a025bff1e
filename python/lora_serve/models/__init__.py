"""Decoder models, their configurations and their checkpoints."""

from __future__ import annotations

from lora_serve.models.config import ModelConfig, read_model_config
from lora_serve.models.decoder import DecoderModel
from lora_serve.models.loader import load_model, resolve_model_directory

__all__ = ["DecoderModel", "ModelConfig", "load_model", "read_model_config", "resolve_model_directory"]
