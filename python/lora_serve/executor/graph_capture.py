"""Captures work of a step as a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch

Result = TypeVar("Result")


@dataclass(frozen=True, eq=False)
class CapturedGraph(Generic[Result]):
    """A graph, and what its work gave when it was captured: each replay leaves its own result there.

    Parameters
    ----------
    graph
        To be replayed on the stream of the step.
    result
        At fixed places.
    """

    graph: torch.cuda.CUDAGraph
    result: Result


def capture_graph(run: Callable[[], Result], pool: Any) -> CapturedGraph[Result]:
    """Run something three times, and keep it as a graph.

    Parameters
    ----------
    run
        Reads and writes at fixed places, and may be repeated; nothing in it waits for the device.
    pool
        ``torch.cuda.graph_pool_handle()``: memory that graphs share whose replays follow each other.
    """
    run()  # Compiles kernels, and lets libraries set up what they do not set up while they are captured.
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        result = run()
    # Once, so that the device's part of the graph is made now and not while somebody waits.
    graph.replay()
    torch.cuda.synchronize()
    return CapturedGraph(graph, result)


def bytes_taken(free_bytes_before: int) -> int:
    """How much less memory the device has free than before, at least 0."""
    return max(0, free_bytes_before - torch.cuda.mem_get_info()[0])
