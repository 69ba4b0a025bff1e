"""Decode steps as CUDA graphs: one for each padded batch size, with and without adapters."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from lora_serve.executor.device_inputs import DeviceStep
from lora_serve.layers.attention import DecodeGraphAttention

logger = logging.getLogger(__name__)

MakeStep = Callable[[int, bool], DeviceStep]
RunStep = Callable[[DeviceStep, Any], Tensor]


@dataclass(frozen=True, eq=False)
class _Graph:
    graph: torch.cuda.CUDAGraph
    logits: Tensor


class DecodeGraphs:
    """Captured decode steps, found by padded batch size and by whether any row has an adapter.

    A graph reads its inputs from the addresses that `make_step` gave and leaves its logits, and whatever
    `run_step` writes beside them, where the capture left them: the next replay overwrites both.

    Parameters
    ----------
    sizes : sequence of int
        Padded batch sizes, ascending.
    make_step : callable
        Gives the inputs of a decode step of a size, with or without adapters.
    make_attention : callable
        Gives what the attention of a size keeps over its steps.
    run_step : callable
        The step itself: inputs and attention to logits [P, V]. Nothing in it may wait for the device.

    Notes
    -----
    The steps with and without adapters of one size share the attention's memory, all of them one memory pool.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        make_step: MakeStep,
        make_attention: Callable[[int], DecodeGraphAttention],
        run_step: RunStep,
    ) -> None:
        self._graphs: dict[tuple[int, bool], _Graph] = {}
        self._attention = {size: make_attention(size) for size in reversed(sizes)}
        begin = time.perf_counter()
        pool = torch.cuda.graph_pool_handle()
        # The largest first: the smaller ones work in what it has taken. Each keeps logits of its own.
        kinds = [(size, has_adapters) for has_adapters in (False, True) for size in reversed(sizes)]
        for size, has_adapters in tqdm(kinds, desc="Capturing decode graphs", unit="graph"):
            step, attention = make_step(size, has_adapters), self._attention[size]
            attention.plan(step.attention)
            self._graphs[size, has_adapters] = _capture(functools.partial(run_step, step, attention), pool)
        logger.info("captured %d decode graphs in %.1f s", len(kinds), time.perf_counter() - begin)

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
            [P, V] logits of the model's dtype, valid until the next replay.
        """
        num_rows = len(step.page_table_rows)
        graph = self._graphs[num_rows, step.context.lora is not None]
        self._attention[num_rows].plan(step.attention)
        graph.graph.replay()
        return graph.logits


def _capture(run: Callable[[], Tensor], pool: Any) -> _Graph:
    run()  # Compiles kernels, and lets libraries set up what they do not set up while they are captured.
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        logits = run()
    return _Graph(graph, logits)
