"""Token embedding and the projection to logits, which may share one matrix, each with its LoRA seam.

Adapters change the layers, not the matrix: where both layers share it, LoRA on the embedding changes look-ups
only and LoRA on the projection changes logits only, as PEFT has it.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_serve.kernels import LoRALayerTable, LoRAMetadata, add_lora_embedding, add_lora_logits
from lora_serve.layers import ops
from lora_serve.layers.linear import LoRAKind, LoRATarget
from lora_serve.layers.step_context import StepContext


class TokenEmbedding(nn.Module):
    """Rows of a matrix by token id, then the adapters' deltas.

    Owns the weight and the LoRA table.

    Parameters
    ----------
    path
        Module path in checkpoints, such as ``model.embed_tokens``.
    vocab_size, hidden_size
        Shape of the matrix.
    dtype, device
        Of the weight, which is left uninitialised.
    """

    weight: Tensor

    def __init__(
        self, path: str, vocab_size: int, hidden_size: int, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        self.path = path
        weight = torch.empty(vocab_size, hidden_size, dtype=dtype, device=device)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.lora_table = LoRALayerTable((hidden_size,), vocab_size, is_embedding=True)

    def forward(self, token_ids: Tensor, ctx: StepContext) -> Tensor:
        """Look up tokens, each in its adapter's variant of the matrix.

        Parameters
        ----------
        token_ids
            [T] int32 or int64, in [0, vocab_size).
        ctx
            The step; ``ctx.lora`` says which token has which adapter slot.

        Returns
        -------
        Tensor
            [T, H] of the weight's dtype.

        Raises
        ------
        IndexError
            A token id is out of range (on the CPU; an accelerator does not check).
        LookupError
            A token names an adapter slot that holds no adapter.
        """
        hidden = F.embedding(token_ids, self.weight)
        if ctx.lora is not None and ctx.adapts_embedding:
            add_lora_embedding(hidden, token_ids, self.lora_table, ctx.lora)
        return hidden

    def lora_targets(self) -> Iterator[tuple[str, LoRATarget]]:
        """Yield the embedding's module path with its LoRA table."""
        vocab_size, hidden_size = self.weight.shape
        yield self.path, LoRATarget(self.lora_table, 0, vocab_size, hidden_size, LoRAKind.EMBEDDING)


class LogitsProjection(nn.Module):
    """Hidden states to logits, then the adapters' deltas.

    Owns the LoRA table; the weight may be another module's.

    Parameters
    ----------
    path
        Module path in checkpoints, such as ``lm_head``.
    weight
        [V, H]; the embedding's own parameter where the model ties both.
    """

    weight: Tensor

    def __init__(self, path: str, weight: Tensor) -> None:
        super().__init__()
        self.path = path
        self.weight = weight
        self.lora_table = LoRALayerTable((weight.shape[0],), weight.shape[1])

    def forward(self, hidden: Tensor, lora: LoRAMetadata | None) -> Tensor:
        """Give logits.

        Parameters
        ----------
        hidden
            [N, H] of the weight's dtype: the rows whose logits are wanted.
        lora
            Those N rows grouped by adapter slot; not the step's tokens. None = no row has an adapter.

        Returns
        -------
        Tensor
            [N, V] float32; the base product is in the weight's dtype, the delta is added in float32.

        Raises
        ------
        ValueError
            ``lora`` is of another number of rows.
        LookupError
            A row names an adapter slot that holds no adapter.
        """
        logits = ops.linear(hidden, self.weight).float()
        add_lora_logits(logits, hidden, self.lora_table, lora)
        return logits

    def lora_targets(self) -> Iterator[tuple[str, LoRATarget]]:
        """Yield the projection's module path with its LoRA table."""
        vocab_size, hidden_size = self.weight.shape
        yield self.path, LoRATarget(self.lora_table, 0, hidden_size, vocab_size, LoRAKind.LOGITS)
