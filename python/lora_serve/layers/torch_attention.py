"""Attention in plain torch: the reference, and the backend of the CPU and of 32-bit types.

Keys and values of one KV head serve several query heads. Decode rows fold those heads into the query axis
(one query token leaves it free); prefill rows spread the KV head over them with stride 0. Neither copies.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_serve.layers.attention import (
    AttentionSpec,
    DecodeGraphAttention,
    KVLayer,
    register_attention_backend,
)
from lora_serve.layers.step_context import AttentionMetadata
from lora_serve.layers.torch_attention_plan import DecodeGroup, PrefillRow, TorchAttentionPlan


class TorchAttentionBackend:
    """Causal attention by ``scaled_dot_product_attention`` over gathered pages.

    Any head size, dtype and device that torch has. Keeps no state.
    """

    name = "torch"
    supports_graphs = False

    def plan(
        self, metadata: AttentionMetadata, kv_layer: KVLayer, specs: Collection[AttentionSpec]
    ) -> TorchAttentionPlan:
        """Group the step's rows; see :class:`AttentionBackend`.

        Raises
        ------
        ValueError
            The rows' lengths do not fit together.
        """
        return TorchAttentionPlan(metadata, kv_layer, {spec.sliding_window for spec in specs})

    def make_decode_graph_states(
        self,
        num_padded_rows: int,
        kv_layer: KVLayer,
        specs: Collection[AttentionSpec],
        page_indices: Tensor,
    ) -> list[DecodeGraphAttention]:
        """Raise: the work of a step depends on its lengths; see :class:`AttentionBackend`."""
        raise NotImplementedError("the torch attention backend has no decode graphs")

    def attend(
        self,
        query: Tensor,
        kv_layer: KVLayer,
        spec: AttentionSpec,
        plan: TorchAttentionPlan,
        out: Tensor | None = None,
    ) -> Tensor:
        """Attend row by row; see :class:`AttentionBackend`.

        Raises
        ------
        ValueError
            The plan is of another number of tokens.
        """
        if query.shape[0] != plan.num_tokens:
            raise ValueError(f"query has {query.shape[0]} tokens, the plan's rows have {plan.num_tokens}")
        output = torch.empty_like(query, memory_format=torch.contiguous_format) if out is None else out
        work = plan.by_window[spec.sliding_window]
        for group in work.decode_groups:
            output.index_copy_(0, group.tokens, _decode(query, kv_layer, spec, group))
        for row in work.prefill_rows:
            keys = kv_layer.k.index_select(0, row.pages).flatten(0, 1)[: row.num_keys]
            values = kv_layer.v.index_select(0, row.pages).flatten(0, 1)[: row.num_keys]
            output[row.start : row.stop] = _prefill(query[row.start : row.stop], keys, values, spec, row)
        return output


def _decode(query: Tensor, kv_layer: KVLayer, spec: AttentionSpec, group: DecodeGroup) -> Tensor:
    num_rows = group.tokens.shape[0]

    def gathered(pages: Tensor) -> Tensor:
        flat = pages.index_select(0, group.pages).flatten(0, 1).index_fill_(0, group.tail, 0)
        return flat.view(num_rows, -1, spec.num_kv_heads, spec.head_dim).transpose(1, 2)

    queries = query.index_select(0, group.tokens).view(num_rows, spec.num_kv_heads, -1, spec.head_dim)
    attended = F.scaled_dot_product_attention(
        queries, gathered(kv_layer.k), gathered(kv_layer.v), attn_mask=group.mask, scale=spec.scaling
    )
    return attended.reshape(num_rows, spec.num_heads, spec.head_dim)


def _prefill(query: Tensor, keys: Tensor, values: Tensor, spec: AttentionSpec, row: PrefillRow) -> Tensor:
    heads_per_kv = spec.num_heads // spec.num_kv_heads
    queries = query.view(len(query), -1, heads_per_kv, spec.head_dim).permute(1, 2, 0, 3)

    def spread(x: Tensor) -> Tensor:
        return x.transpose(0, 1)[:, None].expand(-1, heads_per_kv, -1, -1)

    attended = F.scaled_dot_product_attention(
        queries,
        spread(keys),
        spread(values),
        attn_mask=row.mask,
        is_causal=row.mask is None,
        scale=spec.scaling,
    )
    return attended.permute(2, 0, 1, 3).reshape(-1, spec.num_heads, spec.head_dim)


register_attention_backend(TorchAttentionBackend.name, TorchAttentionBackend)
