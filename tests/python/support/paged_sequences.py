"""Sequences over paged KV without an engine: allocates shuffled pages and builds step contexts."""

from __future__ import annotations

import random

import torch

from lora_serve.kernels import build_lora_metadata
from lora_serve.layers import AttentionMetadata, KVLayer, StepContext
from lora_serve.models import DecoderModel, ModelConfig

# Stands behind a row's last page. Reading it as a page fails loudly.
GARBAGE_PAGE_ID = 10**6


class PagedSequences:
    """Grows sequences in steps of mixed chunks; KV pages start as NaN and are handed out shuffled.

    `attention` is what the newest step is planned with.
    """

    attention: AttentionMetadata

    def __init__(
        self, page_size: int, num_pages: int = 256, seed: int = 0, device: torch.device | str = "cpu"
    ) -> None:
        self.page_size = page_size
        self.num_pages = num_pages
        self.device = device
        self._free_pages = list(range(num_pages))
        random.Random(seed).shuffle(self._free_pages)
        self._pages: dict[str, list[int]] = {}
        self._lengths: dict[str, int] = {}

    def make_kv_layers(self, config: ModelConfig) -> list[KVLayer]:
        shape = (self.num_pages, self.page_size, config.num_kv_heads, config.head_dim)
        return [
            KVLayer(
                torch.full(shape, torch.nan, dtype=config.dtype, device=self.device),
                torch.full(shape, torch.nan, dtype=config.dtype, device=self.device),
            )
            for _ in range(config.num_layers)
        ]

    def step(self, chunks: list[tuple[str, int]], adapter_slots: list[int] | None = None) -> StepContext:
        """Advance each named sequence by a number of tokens, in one step; one row each."""
        positions: list[int] = []
        slots: list[int] = []
        computed: list[int] = []
        for name, num_tokens in chunks:
            start = self._lengths.get(name, 0)
            self._lengths[name] = start + num_tokens
            pages = self._pages.setdefault(name, [])
            while len(pages) * self.page_size < start + num_tokens:
                pages.append(self._free_pages.pop())
            computed.append(start)
            for position in range(start, start + num_tokens):
                positions.append(position)
                slots.append(pages[position // self.page_size] * self.page_size + position % self.page_size)
        self.attention = self._attention_metadata(chunks, computed)
        return StepContext(
            positions=torch.tensor(positions, device=self.device),
            slot_mapping=torch.tensor(slots, device=self.device),
            lora=self._lora_metadata(chunks, adapter_slots),
        )

    def _attention_metadata(self, chunks: list[tuple[str, int]], computed: list[int]) -> AttentionMetadata:
        query_lens = [num_tokens for _, num_tokens in chunks]
        seq_lens = [self._lengths[name] for name, _ in chunks]
        width = max(len(self._pages[name]) for name, _ in chunks) + 3
        table = torch.full((len(chunks), width), GARBAGE_PAGE_ID, dtype=torch.int32)
        for row, (name, _) in enumerate(chunks):
            pages = self._pages[name]
            table[row, : len(pages)] = torch.tensor(pages, dtype=torch.int32)
        starts = torch.tensor([0, *query_lens], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        return AttentionMetadata(
            query_start_loc=starts.to(self.device),
            num_computed_tokens=torch.tensor(computed, dtype=torch.int32, device=self.device),
            seq_lens=torch.tensor(seq_lens, dtype=torch.int32, device=self.device),
            page_table=table.to(self.device),
            host_query_lens=query_lens,
            host_seq_lens=seq_lens,
        )

    def run(self, model: DecoderModel, token_ids: torch.Tensor, ctx: StepContext, kv_layers) -> torch.Tensor:
        """Plan and run the step that `step` has just made; give the hidden states."""
        plan = model.plan_attention(self.attention, kv_layers)
        return model.forward(token_ids, ctx, kv_layers, plan)

    def _lora_metadata(self, chunks, adapter_slots):
        if adapter_slots is None:
            return None
        mapping = [slot for (_, num), slot in zip(chunks, adapter_slots, strict=True) for _ in range(num)]
        return build_lora_metadata(torch.tensor(mapping, dtype=torch.int32), max_loras=8, device=self.device)
