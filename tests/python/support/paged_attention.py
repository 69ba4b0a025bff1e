"""Steps over a page-major KV pool, and what attention over them should give."""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lora_serve.layers import AttentionMetadata, AttentionSpec, KVLayer


class PagePool:
    """A pool [P, L, 2, G, Hkv, D] of NaN; one layer's pages are views with large strides."""

    def __init__(
        self,
        spec: AttentionSpec,
        dtype: torch.dtype,
        device: str,
        *,
        page_size: int = 16,
        num_pages: int = 2048,
        num_layers: int = 3,
        first_page: int = 0,
        seed: int = 0,
    ) -> None:
        shape = (num_pages, num_layers, 2, page_size, spec.num_kv_heads, spec.head_dim)
        self.pool = torch.empty(shape, dtype=dtype, device=device)
        self.pool[first_page:].fill_(torch.nan)
        self.pool[0].fill_(torch.nan)
        layer = num_layers // 2
        self.layer = KVLayer(self.pool[:, layer, 0], self.pool[:, layer, 1])
        self.spec = spec
        self._free = list(range(max(first_page, 1), num_pages))
        random.Random(seed).shuffle(self._free)
        self.generator = torch.Generator(device=device).manual_seed(seed)

    def random(self, *shape: int) -> Tensor:
        values = torch.randn(shape, generator=self.generator, device=self.pool.device)
        return values.to(self.pool.dtype)

    def pages_with(self, num_tokens: int, shared: list[int] | None = None) -> list[int]:
        """Take pages for a row and store random keys and values in its tokens' places, no further."""
        page_size = self.layer.page_size
        num_pages = -(-num_tokens // page_size)
        pages = list(shared or [])[:num_pages]
        while len(pages) < num_pages:
            page = self._free.pop()
            used = min(page_size, num_tokens - len(pages) * page_size)
            for tensor in (self.layer.k, self.layer.v):
                tensor[page, :used] = self.random(used, self.spec.num_kv_heads, self.spec.head_dim)
            pages.append(page)
        return pages


@dataclass
class PagedStep:
    """Rows of (tokens of this step, tokens in all, pages)."""

    pool: PagePool
    rows: list[tuple[int, int, list[int]]]

    @property
    def num_tokens(self) -> int:
        return sum(query_len for query_len, _, _ in self.rows)

    def query(self) -> Tensor:
        """A slice of a larger product, as the model hands it over."""
        spec = self.pool.spec
        heads = spec.num_heads + 2 * spec.num_kv_heads
        return self.pool.random(self.num_tokens, heads, spec.head_dim)[:, : spec.num_heads]

    def flat_pages(self) -> list[int]:
        return [page for _, _, pages in self.rows for page in pages]

    def metadata(self, page_indices: Tensor | None = None) -> AttentionMetadata:
        """With page indices, or with a page table whose unused entries are out of range."""
        device = self.pool.pool.device
        query_lens = [query_len for query_len, _, _ in self.rows]
        seq_lens = [seq_len for _, seq_len, _ in self.rows]
        width = max(len(pages) for _, _, pages in self.rows) + 3
        table = torch.full((len(self.rows), width), 10**9, dtype=torch.int32)
        for row, (_, _, pages) in enumerate(self.rows):
            table[row, : len(pages)] = torch.tensor(pages, dtype=torch.int32)
        indptr = np.cumsum([0, *(len(pages) for _, _, pages in self.rows)], dtype=np.int32)
        starts = np.cumsum([0, *query_lens], dtype=np.int32)
        return AttentionMetadata(
            query_start_loc=torch.from_numpy(starts).to(device),
            num_computed_tokens=torch.tensor(seq_lens, dtype=torch.int32, device=device),
            seq_lens=torch.tensor(seq_lens, dtype=torch.int32, device=device),
            page_table=table.to(device),
            host_query_lens=query_lens,
            host_seq_lens=seq_lens,
            page_indices=page_indices,
            host_page_indptr=None if page_indices is None else indptr,
        )

    def expected(self, query: Tensor) -> tuple[Tensor, Tensor]:
        """fp32 attention, and its error bound for each element."""
        outputs, bounds = [], []
        start = 0
        for query_len, seq_len, pages in self.rows:
            output, bound = self._expected_row(query[start : start + query_len], seq_len, pages)
            outputs.append(output)
            bounds.append(bound)
            start += query_len
        return torch.cat(outputs), torch.cat(bounds)

    def _expected_row(self, query: Tensor, seq_len: int, pages: list[int]) -> tuple[Tensor, Tensor]:
        spec, layer = self.pool.spec, self.pool.layer
        index = torch.tensor(pages, device=query.device)
        keys, values = (x[index].flatten(0, 1)[:seq_len].float() for x in (layer.k, layer.v))
        group = spec.num_heads // spec.num_kv_heads
        keys, values = (x.repeat_interleave(group, dim=1) for x in (keys, values))
        scores = torch.einsum("qhd,khd->hqk", query.float(), keys) * spec.scaling
        position = torch.arange(seq_len - len(query), seq_len, device=query.device)[:, None]
        key_position = torch.arange(seq_len, device=query.device)[None]
        hidden = key_position > position
        if spec.sliding_window is not None:
            hidden |= key_position <= position - spec.sliding_window
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        output = torch.einsum("hqk,khd->qhd", weights, values)
        # Rounded to 16 bits: the weights, a partial result, the output. Twice that, for what is not counted.
        unit = torch.finfo(query.dtype).eps / 2
        bound = 6 * unit * torch.einsum("hqk,khd->qhd", weights, values.abs()) + 1e-5
        return output, bound


def assert_attention(found: Tensor, step: PagedStep, query: Tensor) -> None:
    """Compare element by element with the fp32 attention."""
    expected, bound = step.expected(query)
    error = (found.float() - expected).abs()
    worst = float((error / bound).max())
    assert bool((error <= bound).all()), f"{worst:.1f} times the bound, NaN: {bool(found.isnan().any())}"
