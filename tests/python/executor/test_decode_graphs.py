"""Which captured step is replayed; capturing itself is left out, so that this runs anywhere."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from lora_serve.executor import decode_graphs
from lora_serve.executor.decode_graphs import DecodeGraphs
from lora_serve.executor.graph_capture import bytes_of_more_sizes


class Attention:
    """Suits steps of at most so many tokens; None = all."""

    def __init__(self, name: str, max_tokens: int | None) -> None:
        self.name, self.max_tokens = name, max_tokens
        self.planned: list[int] = []

    def suits(self, num_tokens: int) -> bool:
        return self.max_tokens is None or num_tokens <= self.max_tokens

    def plan(self, num_tokens: int) -> None:
        self.planned.append(num_tokens)


def make_step(num_rows: int, has_adapters: bool, num_tokens: int = 0) -> SimpleNamespace:
    return SimpleNamespace(
        page_table_rows=[0] * num_rows,
        context=SimpleNamespace(lora="adapters" if has_adapters else None),
        attention=num_tokens,
    )


@pytest.fixture
def free_bytes(monkeypatch) -> list[int]:
    """Free memory of the device; each capture takes 10 bytes, the first 100 more."""
    free = [10_000]

    def capture(run, pool):
        free[0] -= 110 if free[0] == 10_000 else 10
        name = run()
        return SimpleNamespace(graph=SimpleNamespace(replay=lambda: None), result=name)

    monkeypatch.setattr(decode_graphs, "capture_graph", capture)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free[0], 10_000))
    return free


def make_graphs(attention: dict[int, list[Attention]]) -> DecodeGraphs:
    def run_step(step, way: Attention):
        return f"{way.name}, {step.context.lora}"

    return DecodeGraphs(sorted(attention), make_step, attention.__getitem__, run_step)


@pytest.mark.parametrize("has_adapters", [False, True])
def test_step_is_replayed_the_first_way_that_suits_its_lengths(free_bytes, has_adapters):
    attention = {size: [Attention(f"{size} short", 50), Attention(f"{size} any", None)] for size in (1, 8)}
    graphs = make_graphs(attention)
    adapters = "adapters" if has_adapters else None

    for size, num_tokens, name in [(8, 50, "short"), (8, 51, "any"), (1, 3, "short"), (1, 900, "any")]:
        assert graphs.replay(make_step(size, has_adapters, num_tokens)) == f"{size} {name}, {adapters}"

    # Each way is planned for its two captures and for the step that it runs.
    assert [way.planned for way in attention[8]] == [[0, 0, 50], [0, 0, 51]]


def test_memory_of_graphs_is_known_by_size(free_bytes):
    graphs = make_graphs({size: [Attention("any", None)] for size in (1, 8)})

    assert graphs.num_bytes == {8: 120, 1: 20}
    assert graphs.has(8)
    assert not graphs.has(2)


def test_further_sizes_take_what_those_behind_the_largest_have():
    assert bytes_of_more_sizes({8: 1000, 4: 30, 2: 11}, 3) == 62
    assert bytes_of_more_sizes({8: 1000}, 2) == 2000
    assert bytes_of_more_sizes({8: 1000, 4: 30}, 0) == 0
