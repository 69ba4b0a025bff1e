"""What the layers of a model need to know about one step, beside the hidden states.

The executor builds one :class:`StepContext` a step; layers read it and never change it. No request id and no
adapter name appears here: rows are positions in the batch, adapters are slots.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lora_serve.kernels import LoRAMetadata


@dataclass(frozen=True, eq=False)
class AttentionMetadata:
    """Where the tokens of a step lie in their sequences and in the KV pages.

    Parameters
    ----------
    query_start_loc
        [B + 1] int32: tokens of row i are ``query_start_loc[i] : query_start_loc[i + 1]``.
    num_computed_tokens
        [B] int32: tokens of the row whose KV was in its pages before this step.
    seq_lens
        [B] int32: computed plus scheduled tokens of the row.
    page_table
        [B, max_pages] int32: page ids of this batch's rows in order; entries beyond a row's last page are
        never read as pages and may hold anything.
    slot_mapping
        [T] int64: flat position in the KV tensors (page id * page_size + offset) that each token is written
        to; all different.
    host_query_lens
        [B] scheduled tokens of each row, each at least 1; the same numbers on the host.
    host_seq_lens
        [B] ``seq_lens`` on the host.
    """

    query_start_loc: Tensor
    num_computed_tokens: Tensor
    seq_lens: Tensor
    page_table: Tensor
    slot_mapping: Tensor
    host_query_lens: list[int]
    host_seq_lens: list[int]

    @property
    def num_tokens(self) -> int:
        """T, the number of tokens in the step."""
        return self.slot_mapping.shape[0]


@dataclass(frozen=True, eq=False)
class StepContext:
    """Everything that the layers share in one step.

    Parameters
    ----------
    positions
        [T] int64: position of each token in its sequence, from 0.
    attention
        Rows, lengths and pages.
    lora
        Tokens grouped by adapter slot; None = no token of this step has an adapter.
    """

    positions: Tensor
    attention: AttentionMetadata
    lora: LoRAMetadata | None
