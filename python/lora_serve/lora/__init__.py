"""Adapter files, names, generations and memory."""

from __future__ import annotations

from lora_serve.lora.adapter_reader import HostAdapter
from lora_serve.lora.allowed_roots import AllowedRoots
from lora_serve.lora.manager import NO_SLOT, AdapterResidency, LoRAManager
from lora_serve.lora.peft_modules import AdapterLimits
from lora_serve.lora.registry import (
    AdapterContent,
    AdapterGeneration,
    AdapterRegistry,
    check_adapter_name,
    digest_seed,
)

__all__ = [
    "NO_SLOT",
    "AdapterContent",
    "AdapterGeneration",
    "AdapterLimits",
    "AdapterRegistry",
    "AdapterResidency",
    "AllowedRoots",
    "HostAdapter",
    "LoRAManager",
    "check_adapter_name",
    "digest_seed",
]
