"""Attention over paged KV: the interface that models call, and the backends by name."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
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
        [P, G, kv_heads, D] of the model's dtype: P pages of G tokens. A page is contiguous. Between a page
        and the next one there may be a gap, the same in both tensors, of whole tokens: in the executor's
        memory the pages of all layers with one id lie together. May start uninitialised; a page may hold
        anything (NaN included) behind the tokens of the request that owns it.

    Raises
    ------
    ValueError
        The tensors are not laid out so.
    """

    k: Tensor
    v: Tensor

    def __post_init__(self) -> None:
        page_stride, *strides = self.k.stride()
        token_stride = self.k.shape[2] * self.k.shape[3]
        if (
            self.v.shape != self.k.shape
            or self.v.stride() != self.k.stride()
            or strides != [token_stride, self.k.shape[3], 1]
            or page_stride % token_stride != 0
            or page_stride < token_stride * self.page_size
        ):
            raise ValueError(
                f"keys {tuple(self.k.shape)} with the strides {self.k.stride()} and values "
                f"{tuple(self.v.shape)} with {self.v.stride()}, expected [P, G, kv_heads, D] twice with "
                "contiguous pages, equally far apart by whole tokens"
            )

    @property
    def page_size(self) -> int:
        """G, the tokens of a page."""
        return self.k.shape[1]

    @cached_property
    def _gap(self) -> int:
        """Rows of :attr:`_rows` between the end of a page and the next one."""
        return self.k.stride(0) // self.k.stride(1) - self.page_size

    @cached_property
    def _rows(self) -> tuple[Tensor, Tensor]:
        """Keys and values as [P * (G + gap) - gap, kv_heads, D]: the tokens of the pages, and of the gaps."""
        num_pages, page_size, *token_shape = self.k.shape
        num_rows = num_pages * (page_size + self._gap) - self._gap
        keys, values = (
            pages.as_strided((num_rows, *token_shape), self.k.stride()[1:]) for pages in (self.k, self.v)
        )
        return keys, values

    def write(self, key: Tensor, value: Tensor, slot_mapping: Tensor) -> None:
        """Store the keys and values of a step's tokens.

        Parameters
        ----------
        key, value
            [T, kv_heads, D] of the pages' dtype, with any strides.
        slot_mapping
            [T] int64: flat positions in the pages (page id * G + offset), all different, at least 0.

        Notes
        -----
        In rows rather than by page and offset: for the few tokens of a decode step on the CPU, one index
        takes three quarters of the time of two.
        """
        rows = slot_mapping
        if self._gap > 0:
            rows = slot_mapping.add(slot_mapping.div(self.page_size, rounding_mode="floor"), alpha=self._gap)
        keys, values = self._rows
        keys.index_copy_(0, rows, key)
        values.index_copy_(0, rows, value)


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


class DecodeGraphAttention(Protocol):
    """What captured decode steps of one size keep: `attend` takes it as its plan."""

    def suits(self, metadata: AttentionMetadata) -> bool:
        """Whether a step, whose lengths on the host alone are read, should run this way."""
        ...

    def plan(self, metadata: AttentionMetadata) -> None:
        """Prepare the step that runs next, before it is captured and before every replay.

        The step before, of the same graph too, may still run.
        """
        ...


class AttentionBackend(Protocol):
    """Causal attention of a mixed step (decodes and prefill chunks) over paged KV.

    What depends on the step alone is prepared once, in :meth:`plan`; :meth:`attend` runs for each layer, when
    the step's keys and values have been stored (:func:`lora_serve.layers.ops.norm_rotary_store`).
    """

    name: str
    supports_graphs: bool

    def plan(self, metadata: AttentionMetadata, kv_layer: KVLayer, specs: Collection[AttentionSpec]) -> Any:
        """Prepare a step; cost independent of the number of layers.

        Parameters
        ----------
        metadata
            Rows, lengths and pages of the step.
        kv_layer
            The pages of any layer; only their shape and dtype are looked at.
        specs
            Every distinct spec that :meth:`attend` will be called with.

        Returns
        -------
        Any
            To be handed to :meth:`attend` of the same backend within this step.
        """
        ...

    def make_decode_graph_states(
        self,
        num_padded_rows: int,
        kv_layer: KVLayer,
        specs: Collection[AttentionSpec],
        page_indices: Tensor,
    ) -> Sequence[DecodeGraphAttention]:
        """Make what the captured decode steps of one size share, for each way to run them.

        Parameters
        ----------
        num_padded_rows
            Rows of each step, padded ones included: those have one token and one page.
        kv_layer, specs
            As for :meth:`plan`.
        page_indices
            int32 on the device, at a fixed place: each step's page ids row after row, when the step runs.

        Returns
        -------
        sequence of DecodeGraphAttention
            At least one. A step runs with the first that suits it; the last suits all. Each is captured.

        Raises
        ------
        NotImplementedError
            The backend does not support graphs.
        """
        ...

    def attend(
        self, query: Tensor, kv_layer: KVLayer, spec: AttentionSpec, plan: Any, out: Tensor | None = None
    ) -> Tensor:
        """Attend; the step's keys and values are in the pages already.

        Parameters
        ----------
        query
            [T, heads, D], position embedding applied; the last axis is contiguous, the others have any
            strides.
        kv_layer
            The layer's pages, with the step's own tokens; only read.
        spec
            The layer's shape and window.
        plan
            What :meth:`plan` gave for this step.
        out
            [T, heads, D] of the query's dtype, contiguous, to write to; None = newly allocated.

        Returns
        -------
        Tensor
            [T, heads, D] of the query's dtype, contiguous.
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
