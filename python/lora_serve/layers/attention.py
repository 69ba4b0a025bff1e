"""Attention over paged KV: the interface that models call, and the backends by name."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from lora_serve.common.errors import InvalidArgumentError
from lora_serve.layers.step_context import AttentionMetadata


@dataclass(frozen=True, eq=False)
class KVLayer:
    """The KV pages of one layer.

    Parameters
    ----------
    k, v
        [P, G, kv_heads, D] of the model's dtype, contiguous: P pages of G tokens. May start uninitialised; a
        page may hold anything (NaN included) behind the tokens of the request that owns it.
    """

    k: Tensor
    v: Tensor

    @property
    def page_size(self) -> int:
        """G, the tokens of a page."""
        return self.k.shape[1]

    def write(self, key: Tensor, value: Tensor, slot_mapping: Tensor) -> None:
        """Store the keys and values of a step's tokens.

        Parameters
        ----------
        key, value
            [T, kv_heads, D] of the pages' dtype.
        slot_mapping
            [T] int64: flat positions in the pages, all different.
        """
        self.k.view(-1, *self.k.shape[2:]).index_copy_(0, slot_mapping, key)
        self.v.view(-1, *self.v.shape[2:]).index_copy_(0, slot_mapping, value)


@dataclass(frozen=True)
class AttentionSpec:
    """What is fixed about one layer's attention.

    Parameters
    ----------
    num_heads
        Query heads; a multiple of ``num_kv_heads``.
    num_kv_heads
        Key and value heads; query head h reads KV head ``h // (num_heads // num_kv_heads)``.
    head_dim
        D.
    scaling
        Factor on the products of queries and keys.
    sliding_window
        A token sees itself and at most ``sliding_window - 1`` tokens before it; None = all.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scaling: float
    sliding_window: int | None = None


class AttentionBackend(Protocol):
    """Causal attention of a mixed step (decodes and prefill chunks) over paged KV.

    What depends on the step alone is prepared once, in :meth:`plan`; :meth:`forward` runs for each layer.
    """

    name: str

    def plan(self, metadata: AttentionMetadata, kv_layer: KVLayer, specs: Collection[AttentionSpec]) -> Any:
        """Prepare a step; cost independent of the number of layers.

        Parameters
        ----------
        metadata
            Rows, lengths and pages of the step.
        kv_layer
            The pages of any layer; only their shape and dtype are looked at.
        specs
            Every distinct spec that :meth:`forward` will be called with.

        Returns
        -------
        Any
            To be handed to :meth:`forward` of the same backend within this step.
        """
        ...

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, kv_layer: KVLayer, spec: AttentionSpec, plan: Any
    ) -> Tensor:
        """Store the step's keys and values, then attend.

        Parameters
        ----------
        query
            [T, heads, D], position embedding applied.
        key, value
            [T, kv_heads, D], position embedding applied to the key.
        kv_layer
            The layer's pages; the tokens' places are written.
        spec
            The layer's shape and window.
        plan
            What :meth:`plan` gave for this step.

        Returns
        -------
        Tensor
            [T, heads, D] of the query's dtype.
        """
        ...


_BACKENDS: dict[str, Callable[[], AttentionBackend]] = {}


def register_attention_backend(name: str, factory: Callable[[], AttentionBackend]) -> None:
    """Make a backend known under a name.

    Parameters
    ----------
    name
        As in ``EngineConfig.attention_backend``.
    factory
        Makes a backend; called once for each model.

    Raises
    ------
    ValueError
        The name is taken.
    """
    if name in _BACKENDS:
        raise ValueError(f"attention backend {name!r} is registered already")
    _BACKENDS[name] = factory


def make_attention_backend(name: str) -> AttentionBackend:
    """Make the backend of a name.

    Raises
    ------
    InvalidArgumentError
        No backend has this name.
    """
    if name not in _BACKENDS:
        raise InvalidArgumentError(
            f"attention_backend is {name!r}, expected one of {', '.join(sorted(_BACKENDS))}"
        )
    return _BACKENDS[name]()
