"""Captures work of steps as CUDA graphs."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from tqdm import tqdm

logger = logging.getLogger(__name__)

Result = TypeVar("Result")
Captured = TypeVar("Captured")


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


def capture_sizes(
    kind: str, sizes: Sequence[int], capture: Callable[[int, bool, Any], Captured]
) -> tuple[dict[tuple[int, bool], Captured], dict[int, int]]:
    """Capture steps of every padded size, with and without adapters, in one memory pool.

    Parameters
    ----------
    kind
        Of the graphs, for the log.
    sizes
        Ascending.
    capture
        Size, whether the step has adapters, and pool to the step's graphs.

    Returns
    -------
    graphs : dict from tuple of (int, bool)
        What `capture` gave, by size and by whether it has adapters.
    num_bytes : dict from int to int
        By size, what the device's free memory has lost to its graphs, at least 0.
    """
    graphs: dict[tuple[int, bool], Captured] = {}
    num_bytes = dict.fromkeys(sizes, 0)
    begin = time.perf_counter()
    pool = torch.cuda.graph_pool_handle()
    # The largest first: the smaller ones work in what it has taken.
    steps = [(size, has_adapters) for has_adapters in (False, True) for size in reversed(sizes)]
    for size, has_adapters in tqdm(steps, desc=f"Capturing {kind} graphs", unit="step"):
        free_bytes = torch.cuda.mem_get_info()[0]
        graphs[size, has_adapters] = capture(size, has_adapters, pool)
        num_bytes[size] += max(0, free_bytes - torch.cuda.mem_get_info()[0])
    logger.info(
        "captured %s graphs of %d sizes in %.1f s, which take %.3f GiB",
        kind,
        len(sizes),
        time.perf_counter() - begin,
        sum(num_bytes.values()) / 2**30,
    )
    return graphs, num_bytes


def bytes_of_more_sizes(num_bytes: Mapping[int, int], num_more: int) -> int:
    """Foretell what graphs of further sizes take.

    Parameters
    ----------
    num_bytes
        What `capture_sizes` gave of some sizes, the largest of all among them.
    num_more
        Smaller sizes that are not among them.

    Returns
    -------
    int
        The largest has taken the memory that all work in; each further size takes as much as the others have.
    """
    others = sorted(num_bytes)[:-1]
    if not others:
        return num_more * max(num_bytes.values(), default=0)
    return -(-num_more * sum(num_bytes[size] for size in others) // len(others))
