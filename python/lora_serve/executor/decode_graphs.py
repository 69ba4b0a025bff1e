"""Decode steps as CUDA graphs: for each padded batch size, with and without adapters, each way to attend."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from lora_serve.executor.device_inputs import DeviceStep
from lora_serve.executor.graph_capture import CapturedGraph, capture_graph, capture_sizes
from lora_serve.layers.attention import DecodeGraphAttention

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
        self._attention = {size: make_attention(size) for size in reversed(sizes)}

        def capture(size: int, has_adapters: bool, pool: Any) -> list[CapturedGraph[Tensor]]:
            """One graph for each way to attend."""
            step = make_step(size, has_adapters)
            graphs = []
            for attention in self._attention[size]:
                attention.plan(step.attention)
                graphs.append(capture_graph(functools.partial(run_step, step, attention), pool))
            return graphs

        self._graphs, self.num_bytes = capture_sizes("decode", sizes, capture)

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
        graphs = self._graphs[num_rows, step.context.lora is not None]
        ways = zip(self._attention[num_rows], graphs, strict=True)
        attention, graph = next(way for way in ways if way[0].suits(step.attention))
        attention.plan(step.attention)
        graph.graph.replay()
        return graph.result
