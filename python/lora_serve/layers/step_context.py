"""What the layers of a model need to know about one step, beside the hidden states.

The executor builds one :class:`StepContext` a step, and has the attention backend plan it from its
:class:`AttentionMetadata`; layers read both and never change them. No request id and no
adapter name appears here: rows are positions in the batch, adapters are slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor

from lora_serve.kernels import LoRAMetadata

HostLengths = Sequence[int] | npt.NDArray[np.int32]


@dataclass(frozen=True, eq=False)
class AttentionMetadata:
    """What an attention backend plans a step with: rows, lengths and pages.

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
    host_query_lens
        [B] scheduled tokens of each row, each at least 1; the same numbers on the host.
    host_seq_lens
        [B] ``seq_lens`` on the host.
    page_indices
        [sum of the rows' pages or more] int32: the page ids of all rows, row after row, when the step runs.
        None where only ``page_table`` is given.
    host_page_indptr
        [B + 1] int32 on the host: row i's pages are ``page_indices[indptr[i] : indptr[i + 1]]``.
    """

    query_start_loc: Tensor
    num_computed_tokens: Tensor
    seq_lens: Tensor
    page_table: Tensor
    host_query_lens: HostLengths
    host_seq_lens: HostLengths
    page_indices: Tensor | None = None
    host_page_indptr: npt.NDArray[np.int32] | None = None

    @property
    def num_tokens(self) -> int:
        """T, the number of tokens in the rows."""
        return int(sum(self.host_query_lens))


@dataclass(frozen=True, eq=False)
class StepOutputs:
    """The tokens of a step whose hidden states are wanted: behind the last attention nobody needs others.

    Parameters
    ----------
    tokens
        [N] int32 or int64: which of the step's tokens. N may be 0.
    lora
        These N tokens grouped by adapter slot; None = none of them has an adapter.
    """

    tokens: Tensor
    lora: LoRAMetadata | None


@dataclass(frozen=True, eq=False)
class StepContext:
    """Everything that the layers share in one step; tensors only, so that a captured step can keep them.

    Parameters
    ----------
    positions
        [T] int64: position of each token in its sequence, from 0.
    slot_mapping
        [T] int64: flat position in the KV pages (page id * page_size + offset) that each token is written to;
        all different. -1 = written nowhere: a padded token of a captured step, on CUDA only.
    lora
        Tokens grouped by adapter slot; None = no token of this step has an adapter.
    adapts_embedding
        Some of the step's adapters may have weights for the token embedding. False saves a look at them.
    outputs
        The tokens that the last layer goes on with behind its attention; None = all.
    """

    positions: Tensor
    slot_mapping: Tensor
    lora: LoRAMetadata | None
    adapts_embedding: bool = True
    outputs: StepOutputs | None = None
