"""The ways in which the end-to-end tests run an engine: device, dtype, attention, graphs.

Those that compute in fp32 answer exactly as their reference does; those of 16 bits within a bound of rounding
(see `support.reference`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

_MEMORY = {"lora_memory_gb": 2**-4, "lora_host_memory_gb": 2**-3}
"""Little: pinned memory takes its time."""
GRAPH_SIZES = [1, 2, 4, 8]
PREFILL_GRAPH_SIZES = [8, 64, 320]
"""Of a step of few, of some and of many tokens, as the LoRA kernels see it."""
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class EngineKind:
    """How an engine runs.

    Attributes
    ----------
    name
        What tests call it.
    options
        Fields of EngineConfig.
    """

    name: str
    options: dict[str, Any] = field(hash=False)

    def options_with(self, **options: Any) -> dict[str, Any]:
        """Its options and further ones, which win; no prefill graph is larger than a step may be."""
        merged = {**self.options, **options}
        if self.has_graphs and "max_num_batched_tokens" in merged:
            most = merged["max_num_batched_tokens"]
            merged["prefill_graph_sizes"] = [min(size, most) for size in merged["prefill_graph_sizes"]]
        return merged

    @property
    def device(self) -> str:
        """Where; references of the same test run there, too."""
        device: str = self.options["device"]
        return device

    @property
    def dtype(self) -> torch.dtype:
        """Of weights and KV."""
        return _DTYPES[self.options["dtype"]]

    @property
    def is_exact(self) -> bool:
        """Whether it computes in fp32."""
        return self.dtype == torch.float32

    @property
    def has_windows(self) -> bool:
        """Whether its attention takes any sliding window."""
        return self.options["attention_backend"] == "torch"

    @property
    def has_graphs(self) -> bool:
        """Whether steps are run from CUDA graphs."""
        return self.options["attention_backend"] == "flashinfer" and not self.options["enforce_eager"]


def _kind(name: str, dtype: str, backend: str, *, eager: bool = True) -> Any:
    device = "cpu" if name.startswith("cpu") else "cuda"
    options = {"device": device, "dtype": dtype, "attention_backend": backend, "enforce_eager": eager}
    if not eager:
        options |= {"cuda_graph_sizes": GRAPH_SIZES, "prefill_graph_sizes": PREFILL_GRAPH_SIZES}
    marks = [pytest.mark.gpu] if device == "cuda" else []
    return pytest.param(EngineKind(name, {**options, **_MEMORY}), id=name, marks=marks)


EXACT = [_kind("cpu", "float32", "torch"), _kind("cuda", "float32", "torch")]
GRAPHS = [
    _kind("cuda-bf16-graphs", "bfloat16", "flashinfer", eager=False),
    _kind("cuda-fp16-graphs", "float16", "flashinfer", eager=False),
]
ROUNDED_ON_CPU = [_kind("cpu-bf16", "bfloat16", "torch")]
ROUNDED_ON_CUDA = [
    _kind("cuda-bf16-torch", "bfloat16", "torch"),
    _kind("cuda-bf16", "bfloat16", "flashinfer"),
    _kind("cuda-fp16", "float16", "flashinfer"),
    *GRAPHS,
]
