"""What every executor makes from the configuration."""

from __future__ import annotations

from lora_serve.common.config import EngineConfig
from lora_serve.lora.manager import LoRAManager
from lora_serve.lora.sources import AdapterSources
from lora_serve.models.decoder import DecoderModel
from lora_serve.models.loader import load_model

_GIB = 2**30


def load_configured_model(config: EngineConfig) -> DecoderModel:
    """Load the model that the configuration names, on its device.

    Raises
    ------
    InvalidArgumentError
        The model cannot be loaded.
    """
    return load_model(
        config.model,
        dtype=config.dtype,
        device=config.device,
        load_format=config.load_format,
        attention_backend=config.chosen_attention_backend,
        seed=config.seed,
        max_positions=config.max_model_len,
    )


def make_adapter_memory(config: EngineConfig, model: DecoderModel) -> LoRAManager:
    """Make the adapter memory of a model; its arena is taken from the device at once.

    Raises
    ------
    InvalidArgumentError
        The device or the host does not have that much memory.
    """
    return LoRAManager(
        model.lora_targets(),
        model.fused_lora_targets(),
        model.config.dtype,
        model.device,
        config.max_lora_rank,
        memory_bytes=int(config.lora_memory_gb * _GIB),
        host_memory_bytes=int(config.lora_host_memory_gb * _GIB),
        sources=AdapterSources(
            allowed_roots=config.lora_allowed_roots,
            allow_hub=config.lora_allow_hub,
            resolvers=config.lora_resolvers,
        ),
    )
