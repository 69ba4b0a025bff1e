"""Decode steps as CUDA graphs: for each padded batch size, with and without adapters, each way to attend."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from lora_serve.executor.device_inputs import DeviceStep
from lora_serve.executor.graph_capture import CapturedGraph, bytes_taken, capture_graph
from lora_serve.layers.attention import DecodeGraphAttention

logger = logging.getLogger(__name__)

MakeStep = Callable[[int, bool], DeviceStep]
RunStep = Callable[[DeviceStep, Any], Tensor]


class DecodeGraphs:
    """Captured decode steps, found by padded batch size, by whether any row has an adapter, and by lengths.

    A graph reads its inputs from the addresses that `make_step` gave and leaves its logits, and whatever
    `run_step` writes beside them, where the capture left them: the next step may overwrite both.

    Parameters
    ----------
    sizes : sequence of int
        Padded batch sizes, ascending.
    make_step : callable
        Gives the inputs of a decode step of a size, with or without adapters.
    make_attention : callable
        Gives what the attention of a size keeps over its steps, for each way to run them: a step is run by
        the first that suits it, and the last suits all.
    run_step : callable
        The step itself: inputs and attention to logits [P, V]. Nothing in it may wait for the device.

    Notes
    -----
    The steps with and without adapters of one size share the attention's memory, all of them one memory pool.

    Attributes
    ----------
    num_bytes : dict from int to int
        By padded batch size, what the device's free memory has lost to its graphs.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        make_step: MakeStep,
        make_attention: Callable[[int], Sequence[DecodeGraphAttention]],
        run_step: RunStep,
    ) -> None:
        self._graphs: dict[tuple[int, bool, int], CapturedGraph[Tensor]] = {}
        self.num_bytes = dict.fromkeys(sizes, 0)
        self._attention = {size: make_attention(size) for size in reversed(sizes)}
        begin = time.perf_counter()
        pool = torch.cuda.graph_pool_handle()
        # The largest first: the smaller ones work in what it has taken.
        kinds = [
            (size, has_adapters, way)
            for has_adapters in (False, True)
            for size in reversed(sizes)
            for way in range(len(self._attention[size]))
        ]
        for size, has_adapters, way in tqdm(kinds, desc="Capturing decode graphs", unit="graph"):
            step, attention = make_step(size, has_adapters), self._attention[size][way]
            attention.plan(step.attention)
            run = functools.partial(run_step, step, attention)
            free_bytes = torch.cuda.mem_get_info()[0]
            self._graphs[size, has_adapters, way] = capture_graph(run, pool)
            self.num_bytes[size] += bytes_taken(free_bytes)
        logger.info(
            "captured %d decode graphs in %.1f s, which take %.3f GiB",
            len(kinds),
            time.perf_counter() - begin,
            sum(self.num_bytes.values()) / 2**30,
        )

    def has(self, num_rows: int) -> bool:
        """Whether there are graphs of a padded batch size."""
        return num_rows in self._attention

    def replay(self, step: DeviceStep) -> Tensor:
        """Run a decode step that `DeviceInputs.load` has made the inputs of.

        Parameters
        ----------
        step
            Of a size that has graphs.

        Returns
        -------
        Tensor
            [P, V] logits of the model's dtype, valid until the next step.
        """
        num_rows = len(step.page_table_rows)
        ways = self._attention[num_rows]
        way = next(i for i, attention in enumerate(ways) if attention.suits(step.attention))
        graph = self._graphs[num_rows, step.context.lora is not None, way]
        ways[way].plan(step.attention)
        graph.graph.replay()
        return graph.result


def bytes_of_more_sizes(num_bytes: Mapping[int, int], num_more: int) -> int:
    """Foretell what graphs of further sizes take.

    Parameters
    ----------
    num_bytes
        `DecodeGraphs.num_bytes` of some sizes, the largest of all among them.
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
