"""The LoRA operators on CUDA: the layer's view of arena and tables, handed to the Triton kernels.

Imported only where a layer runs on CUDA, so that nothing else needs Triton.
"""

from __future__ import annotations

from torch import Tensor

from lora_serve.kernels.lora_metadata import LoRAMetadata
from lora_serve.kernels.lora_weights import LoRALayerTable
from lora_serve.kernels.triton_lora_linear import triton_add_lora_embedding, triton_add_lora_linear


def add_linear(y: Tensor, x: Tensor, table: LoRALayerTable, metadata: LoRAMetadata) -> None:
    """See `add_lora_linear`."""
    triton_add_lora_linear(
        y,
        x,
        table.arena,
        table,
        metadata,
        output_slices=table.output_slices,
        max_rank=table.tables.max_rank,
    )


def add_embedding(y: Tensor, token_ids: Tensor, table: LoRALayerTable, metadata: LoRAMetadata) -> None:
    """See `add_lora_embedding`."""
    triton_add_lora_embedding(
        y,
        token_ids,
        table.arena,
        table,
        metadata,
        vocab_size=table.in_features,
        max_rank=table.tables.max_rank,
    )
