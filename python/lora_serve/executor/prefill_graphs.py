"""Short prefills as CUDA graphs: what lies between two attentions is one, for each padded number of tokens.

A step of some hundred tokens takes the device a few milliseconds, and the host three times as long to launch
its kernels one by one. Attention depends on the rows' lengths and is launched in each step as ever. Between
two attentions, shapes depend on the number of tokens alone::

    | embedding, layer 0 as far as its queries | attention | rest of layer 0, layer 1 as far ... | attention |
    |<--------------- graph 0 ---------------->|           |<------------ graph 1 ------------->|

What follows the last attention is not captured: it goes on with the tokens that are wanted alone.

Padded tokens belong to no row and no adapter, and are written nowhere; what is computed for them is not read.
"""

from __future__ import annotations

import functools
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lora_serve.executor.device_inputs import DeviceInputs, DeviceStep
from lora_serve.executor.graph_capture import CapturedGraph, capture_graph, capture_sizes
from lora_serve.layers.attention import KVLayer
from lora_serve.models.decoder import DecoderModel


@dataclass(frozen=True, eq=False)
class _Pieces:
    """The graphs of one size, and the residual stream [P, H] that they change."""

    graphs: list[torch.cuda.CUDAGraph]
    residual: Tensor


class PrefillGraphs:
    """Captured pieces of steps, found by padded number of tokens and by whether any token has an adapter.

    Parameters
    ----------
    sizes : sequence of int
        Padded numbers of tokens, ascending.
    model : DecoderModel
        The model.
    kv_layers : sequence of KVLayer
        The device's pages.
    inputs : DeviceInputs
        Where the inputs of steps are, and are padded to a size.

    Notes
    -----
    All graphs share one memory pool, and the memory of queries and of what attention gives.

    Attributes
    ----------
    num_bytes : dict from int to int
        By size, what the device's free memory has lost to its graphs.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        model: DecoderModel,
        kv_layers: Sequence[KVLayer],
        inputs: DeviceInputs,
    ) -> None:
        self._sizes, self._model, self._kv_layers, self._inputs = tuple(sizes), model, kv_layers, inputs
        config = model.config
        shape = (self._sizes[-1], config.num_heads, config.head_dim)
        self._query = torch.zeros(shape, dtype=config.dtype, device=model.device)
        self._attended = torch.zeros_like(self._query)
        self._pieces, self.num_bytes = capture_sizes("prefill", self._sizes, self._capture)

    def has(self, num_tokens: int) -> bool:
        """Whether a step of so many tokens can be run."""
        return num_tokens <= self._sizes[-1]

    def run(self, step: DeviceStep, attention_plan: Any) -> tuple[Tensor, Tensor]:
        """Run a step up to its last attention.

        Parameters
        ----------
        step
            Loaded, of T tokens, for which there is a size; no adapter of it has weights for the embedding.
        attention_plan
            Of its rows.

        Returns
        -------
        attended, residual : Tensor
            [T, heads * D] and [T, H], for `DecoderModel.finish`. Valid until the next step.
        """
        num_tokens = len(step.token_ids)
        size = self._sizes[bisect_left(self._sizes, num_tokens)]
        self._inputs.pad(step, size)
        pieces = self._pieces[size, step.context.lora is not None]
        query, attended = self._query[:num_tokens], self._attended[:num_tokens]
        for layer, (graph, kv_layer) in enumerate(zip(pieces.graphs, self._kv_layers, strict=True)):
            graph.replay()
            self._model.attend(layer, query, kv_layer, attention_plan, attended)
        return attended.flatten(1), pieces.residual[:num_tokens]

    def _capture(self, num_tokens: int, has_adapters: bool, pool: Any) -> _Pieces:
        step = self._inputs.prefill_step(num_tokens, has_adapters=has_adapters)
        first = capture_graph(functools.partial(self._run_first, step), pool)
        graphs: list[CapturedGraph[Any]] = [first]
        for layer in range(1, len(self._kv_layers)):
            run = functools.partial(self._run_next, layer, step, first.result)
            graphs.append(capture_graph(run, pool))
        return _Pieces([captured.graph for captured in graphs], first.result)

    def _run_first(self, step: DeviceStep) -> Tensor:
        residual, query = self._model.begin(step.token_ids, step.context, self._kv_layers[0])
        self._query[: len(query)].copy_(query)
        return residual

    def _run_next(self, layer: int, step: DeviceStep, residual: Tensor) -> None:
        attended = self._attended[: len(residual)].flatten(1)
        query = self._model.go_on(layer, attended, residual, step.context, self._kv_layers[layer])
        self._query[: len(query)].copy_(query)
