"""Paged attention in torch against a dense fp64 computation of each token."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from lora_serve.common.errors import InvalidArgumentError
from lora_serve.layers import (
    AttentionSpec,
    KVLayer,
    TorchAttentionBackend,
    make_attention_backend,
    register_attention_backend,
)
from lora_serve.layers import torch_attention_plan as plan_module
from lora_serve.layers.torch_attention_plan import page_count_bucket
from support.paged_sequences import PagedSequences

HEAD_DIM = 16


class Harness:
    """Runs steps through the backend and remembers every sequence densely."""

    def __init__(
        self,
        spec: AttentionSpec,
        page_size: int,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
    ) -> None:
        self.spec = spec
        self.sequences = PagedSequences(page_size, num_pages=512, device=device)
        # As in the executor: the pages of all layers with one id lie together, so that pages have gaps.
        shape = (512, 3, 2, page_size, spec.num_kv_heads, spec.head_dim)
        pool = torch.full(shape, torch.nan, dtype=dtype, device=device)
        self.kv_layer = KVLayer(pool[:, 1, 0], pool[:, 1, 1])
        self.device = device
        self.dense: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self.generator = torch.Generator().manual_seed(5)
        self.dtype = dtype

    def random(self, num_tokens: int, heads: int) -> torch.Tensor:
        values = torch.randn(num_tokens, heads, self.spec.head_dim, generator=self.generator)
        return values.to(self.device, self.dtype)

    def step(self, chunks: list[tuple[str, int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Give the backend's output and the dense one."""
        query, key, value, context = self.inputs(chunks)
        found = self.run(query, key, value, context)
        return found, self.dense_attention(query, chunks)

    def inputs(self, chunks: list[tuple[str, int]]):
        num_tokens = sum(num for _, num in chunks)
        query, key, value = (
            self.random(num_tokens, heads)
            for heads in (self.spec.num_heads, self.spec.num_kv_heads, self.spec.num_kv_heads)
        )
        start = 0
        for name, num in chunks:
            old = self.dense.get(name, (key[:0], value[:0]))
            new = (key[start : start + num], value[start : start + num])
            self.dense[name] = (torch.cat((old[0], new[0])), torch.cat((old[1], new[1])))
            start += num
        return query, key, value, self.sequences.step(chunks)

    def run(self, query, key, value, context) -> torch.Tensor:
        backend = TorchAttentionBackend()
        plan = backend.plan(self.sequences.attention, self.kv_layer, {self.spec})
        self.kv_layer.write(key, value, context.slot_mapping)
        return backend.attend(query, self.kv_layer, self.spec, plan)

    def dense_attention(self, query: torch.Tensor, chunks: list[tuple[str, int]]) -> torch.Tensor:
        rows = []
        start = 0
        for name, num in chunks:
            keys, values = (x.double() for x in self.dense[name])
            for offset in range(num):
                last = len(keys) - num + offset
                window = self.spec.sliding_window or len(keys)
                first = max(0, last - window + 1)
                rows.append(self.one_token(query[start + offset].double(), keys, values, first, last + 1))
            start += num
        return torch.stack(rows)

    def one_token(self, query, keys, values, first: int, stop: int) -> torch.Tensor:
        shared = self.spec.num_heads // self.spec.num_kv_heads
        heads = []
        for head in range(self.spec.num_heads):
            scores = keys[first:stop, head // shared] @ query[head] * self.spec.scaling
            heads.append(scores.softmax(0) @ values[first:stop, head // shared])
        return torch.stack(heads)


def make_spec(num_heads: int = 4, num_kv_heads: int = 2, window: int | None = None) -> AttentionSpec:
    return AttentionSpec(num_heads, num_kv_heads, HEAD_DIM, HEAD_DIM**-0.5, window)


def assert_close(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(found.double(), expected, atol=tolerance, rtol=0)


MIXED_STEPS = [
    [("a", 5), ("b", 1), ("c", 33)],
    [("b", 1), ("a", 1), ("c", 4)],
    [("c", 1), ("d", 40), ("b", 19), ("a", 1)],
    [("a", 1), ("b", 1), ("c", 1), ("d", 1)],
    [("d", 2), ("a", 30), ("c", 1), ("b", 90)],
    [("d", 1), ("c", 1), ("b", 1), ("a", 1)],
]


@pytest.mark.parametrize("window", [None, 1, 4, 6, 64, 1000])
@pytest.mark.parametrize("page_size", [1, 4, 16])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1)])
def test_mixed_steps_equal_dense_attention(heads, page_size: int, window: int | None) -> None:
    harness = Harness(make_spec(*heads, window), page_size)

    for chunks in MIXED_STEPS:
        assert_close(*harness.step(chunks))


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.bfloat16, 0.03), (torch.float16, 0.03)]
)
def test_mixed_steps_on_cuda_equal_dense_attention(
    dtype: torch.dtype, tolerance: float, window: int | None
) -> None:
    harness = Harness(make_spec(6, 2, window), 4, dtype, "cuda")

    for chunks in MIXED_STEPS:
        assert_close(*harness.step(chunks), tolerance)


def test_lengths_may_be_arrays() -> None:
    harness = Harness(make_spec(), page_size=4)
    harness.step([("a", 70), ("b", 3)])
    chunks = [("a", 1), ("b", 5)]
    query, key, value, context = harness.inputs(chunks)
    lengths = harness.sequences.attention
    harness.sequences.attention = dataclasses.replace(
        lengths,
        host_query_lens=np.array(lengths.host_query_lens, dtype=np.int32),
        host_seq_lens=np.array(lengths.host_seq_lens, dtype=np.int32),
    )

    assert_close(harness.run(query, key, value, context), harness.dense_attention(query, chunks))


def test_many_decode_rows_split_into_several_gathers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_module, "_MAX_GATHERED_ELEMENTS", 8 * 4 * 2 * HEAD_DIM)
    harness = Harness(make_spec(), page_size=4)
    harness.step([(str(row), 3 + row * 5) for row in range(13)])
    query, key, value, context = harness.inputs([(str(row), 1) for row in range(13)])

    plan = TorchAttentionBackend().plan(harness.sequences.attention, harness.kv_layer, {harness.spec})

    assert len(plan.by_window[None].decode_groups) > 8
    expected = harness.dense_attention(query, [(str(row), 1) for row in range(13)])
    assert_close(harness.run(query, key, value, context), expected)


def test_what_an_earlier_owner_left_in_a_page_is_never_seen() -> None:
    # NaN and infinity survive a mask: 0 * NaN is NaN.
    for poison in (torch.nan, torch.inf, -torch.inf):
        harness = Harness(make_spec(), page_size=16)
        harness.kv_layer.k.fill_(poison)
        harness.kv_layer.v.fill_(poison)
        for chunks in [[("a", 5), ("b", 150)], [("a", 1), ("b", 1)], [("a", 3), ("b", 2)]]:
            assert_close(*harness.step(chunks))


def test_a_row_has_the_same_bits_alone_and_in_any_batch() -> None:
    prefill = [("a", 21), ("b", 140), ("c", 300)]
    decode = [("c", 1), ("a", 1), ("b", 1)]
    harness = Harness(make_spec(), page_size=16)
    harness.step(prefill)
    query, key, value, context = harness.inputs(decode)
    together = harness.run(query, key, value, context)

    for row, (name, _) in enumerate(decode):
        harness.sequences._lengths[name] -= 1
        alone = harness.sequences.step([(name, 1)])
        token = slice(row, row + 1)
        assert torch.equal(harness.run(query[token], key[token], value[token], alone), together[token])


def test_only_the_steps_own_slots_are_written() -> None:
    harness = Harness(make_spec(), page_size=4)
    harness.step([("a", 6)])
    before = harness.kv_layer.k.clone()
    query, key, value, context = harness.inputs([("a", 1), ("b", 3)])

    harness.run(query, key, value, context)

    slots = context.slot_mapping
    flat, old = harness.kv_layer.k.flatten(0, 1), before.flatten(0, 1)
    assert torch.equal(flat[slots], key)
    old[slots] = key
    assert torch.equal(flat.nan_to_num(7.0), old.nan_to_num(7.0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_types_stay_close_to_the_dense_result(dtype: torch.dtype) -> None:
    harness = Harness(make_spec(), page_size=4, dtype=dtype)

    for chunks in MIXED_STEPS:
        found, expected = harness.step(chunks)
        assert found.dtype == dtype
        assert_close(found, expected, tolerance=0.03)


def test_lengths_that_do_not_fit_the_tokens_are_refused() -> None:
    harness = Harness(make_spec(), page_size=4)
    query, *_ = harness.inputs([("a", 3), ("b", 2)])
    attention, backend = harness.sequences.attention, TorchAttentionBackend()
    for field, lengths in (
        ("host_query_lens", [3]),
        ("host_query_lens", [5, 0]),
        ("host_seq_lens", [2, 2]),
    ):
        good = getattr(attention, field)[:]
        getattr(attention, field)[:] = lengths
        with pytest.raises(ValueError, match="lengths"):
            backend.plan(attention, harness.kv_layer, {harness.spec})
        getattr(attention, field)[:] = good
    plan = backend.plan(attention, harness.kv_layer, {harness.spec})
    with pytest.raises(ValueError, match="query has 4 tokens, the plan's rows have 5"):
        backend.attend(query[1:], harness.kv_layer, harness.spec, plan)


def test_page_count_buckets_cover_the_count_with_at_most_a_quarter_more() -> None:
    for count in range(1, 5000):
        assert count <= page_count_bucket(count) <= max(8, 1.25 * count)
    assert len({page_count_bucket(count) for count in range(1, 5000)}) < 50


def test_backends_are_found_by_name_and_unknown_names_are_refused() -> None:
    assert isinstance(make_attention_backend("torch"), TorchAttentionBackend)
    with pytest.raises(InvalidArgumentError, match=r"'flash'.*expected one of .*torch"):
        make_attention_backend("flash")
    with pytest.raises(ValueError, match="'torch' is registered already"):
        register_attention_backend("torch", TorchAttentionBackend)
