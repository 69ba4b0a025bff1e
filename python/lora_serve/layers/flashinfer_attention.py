"""Attention by FlashInfer's kernels: the backend of CUDA devices.

Eager steps get a plan of their own. Decode steps that are captured share two :class:`DecodeGraphState` for
each padded size, with and without splits of KV: their memory never moves, and each replay reads what the
newest :meth:`DecodeGraphState.plan` has brought there.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lora_serve.common.errors import InternalError
from lora_serve.layers.attention import AttentionSpec, KVLayer, register_attention_backend
from lora_serve.layers.flashinfer_attention_kernels import (
    KernelShape,
    PagedKernel,
    check_supported,
    import_flashinfer,
    load_kernels,
)
from lora_serve.layers.flashinfer_attention_plan import (
    HostRows,
    Launch,
    Piece,
    StepMemory,
    decode_pieces,
    flat_page_indices,
    mixed_pieces,
    unique_shapes,
)
from lora_serve.layers.flashinfer_attention_split import is_unsplit_faster
from lora_serve.layers.flashinfer_attention_staging import StagingRing
from lora_serve.layers.step_context import AttentionMetadata


@dataclass(frozen=True, eq=False)
class FlashInferPlan:
    """A planned step.

    Parameters
    ----------
    launches
        For each spec, what :meth:`FlashInferAttentionBackend.attend` launches, in order.
    page_indices
        int32 on the device: page ids, row after row.
    """

    launches: dict[AttentionSpec, list[Launch]]
    page_indices: Tensor


@dataclass(frozen=True, eq=False)
class _Kernels:
    """The kernels of one model on one device."""

    shapes: list[KernelShape]
    decode: list[PagedKernel]  # One for each shape.
    prefill: list[PagedKernel]  # One for each shape.
    num_multiprocessors: int


class DecodeGraphState:
    """The attention of captured decode steps of one padded size; stands for the plan while they are captured.

    Owns the device memory that the captured kernels read, apart from the page indices, which belong to the
    caller. The memory of partial results is shared with the states of other sizes: their steps follow each
    other on one stream.

    What a capture keeps is the number of programs and the places of the arrays. With splits, programs are
    padded to a number that depends on the rows alone, and each step's plan says what they work on. Without,
    there is a program for each row and KV head, and a step's plan is that of every other: it is made once.

    Parameters
    ----------
    pieces
        The launches.
    num_padded_rows
        Rows of each step.
    page_size
        Tokens of a page.
    memory
        Of these pieces and rows.
    ring
        Pinned memory for plans.
    specs
        Of the model.
    page_indices
        int32 on the device.
    num_multiprocessors
        Of the device.
    """

    def __init__(
        self,
        pieces: Sequence[Piece],
        num_padded_rows: int,
        page_size: int,
        memory: StepMemory,
        ring: StagingRing,
        specs: Collection[AttentionSpec],
        page_indices: Tensor,
        num_multiprocessors: int,
    ) -> None:
        self._is_split = pieces[0].size.is_split
        self._shapes = [piece.kernel.shape for piece in pieces]
        self._num_multiprocessors = num_multiprocessors
        self._num_rows = num_padded_rows
        self._page_size = page_size
        self._memory = memory
        self._ring = ring
        self._specs = specs
        self._captured: list[tuple[int, ...]] | None = None
        self._launches: dict[AttentionSpec, list[Launch]] = {}
        self.page_indices = page_indices

    @property
    def launches(self) -> dict[AttentionSpec, list[Launch]]:
        """For each spec, the launches that are captured."""
        if self._captured is None:
            raise InternalError("a decode graph's attention is captured before it is planned")
        return self._launches

    def suits(self, metadata: AttentionMetadata) -> bool:
        """Whether the step should run this way: with splits always, without where that is faster."""
        if self._is_split:
            return True
        seq_lens = np.asarray(metadata.host_seq_lens, dtype=np.int32)
        num_multiprocessors = self._num_multiprocessors
        return all(is_unsplit_faster(seq_lens, shape, num_multiprocessors) for shape in self._shapes)

    def plan(self, metadata: AttentionMetadata) -> None:
        """Bring the next step's plan to the device, before the capture and before each replay.

        Parameters
        ----------
        metadata
            A step of as many rows as were captured, one token each; only its lengths on the host are read.

        Raises
        ------
        InternalError
            The number of rows is another, or the plan would not fit what was captured.

        Notes
        -----
        Submits copies to the current stream, on which the graph is replayed as well; the replay before may
        still run. Does not wait for the device, unless more plans are outstanding than the ring has buffers.
        """
        rows = HostRows.of(metadata, self._page_size)
        if rows.num_rows != self._num_rows or rows.num_decodes != self._num_rows:
            raise InternalError(
                f"the decode graph has {self._num_rows} rows; the step has {rows.num_rows}, "
                f"{rows.num_decodes} of them decodes"
            )
        if self._captured is not None and not self._is_split:
            self._memory.submit_rows(rows, self._page_size, self._ring)
            return
        launches = self._memory.submit(rows, self._page_size, self._ring)
        places = [tuple(launch.plan_info) for launch in launches]
        if self._captured is None:
            self._captured = places
            self._launches = _launches_by_spec(launches, self._specs)
        elif places != self._captured:
            raise InternalError(f"attention plans {places}, but {self._captured} were captured")


class FlashInferAttentionBackend:
    """Causal attention by FlashInfer: fa2 for decode rows, fa3 on Hopper (else fa2) for prefill rows.

    Parameters
    ----------
    prefill_kernel
        "fa2" or "fa3" for prefill rows; None = the best that the device has.
    launches_early
        Kernels may be launched while the one before ends (programmatic dependent launch).
    ring
        Pinned memory for plans; None = made when it is first needed.

    Raises
    ------
    InvalidArgumentError
        FlashInfer cannot be imported.

    Notes
    -----
    All calls are on one thread and, with their kernels, on one stream.
    """

    name = "flashinfer"
    supports_graphs = True

    def __init__(
        self,
        prefill_kernel: str | None = None,
        *,
        launches_early: bool = False,
        ring: StagingRing | None = None,
    ) -> None:
        self._get_module = import_flashinfer()
        self._prefill_kernel = prefill_kernel
        self._launches_early = launches_early
        self._kernels: dict[tuple[frozenset[AttentionSpec], torch.dtype, torch.device], _Kernels] = {}
        self._ring = ring
        self._graph_float_workspace: Tensor | None = None

    def prepare(self, kv_layer: KVLayer, specs: Collection[AttentionSpec]) -> None:
        """Compile or load the kernels, which the first step would do otherwise.

        Raises
        ------
        InvalidArgumentError
            FlashInfer does not support the model or the device.
        """
        self._load(kv_layer, specs)

    def plan(
        self, metadata: AttentionMetadata, kv_layer: KVLayer, specs: Collection[AttentionSpec]
    ) -> FlashInferPlan:
        """Plan an eager step; see :class:`AttentionBackend`.

        Raises
        ------
        InvalidArgumentError
            FlashInfer does not support the model or the device.

        Notes
        -----
        Waits for nothing where `metadata.page_indices` is given.
        """
        kernels = self._load(kv_layer, specs)
        rows = HostRows.of(metadata, kv_layer.page_size)
        pieces = mixed_pieces(kernels.decode, kernels.prefill, rows)
        float_bytes = _float_bytes(pieces, kernels)
        float_workspace = torch.empty(float_bytes, dtype=torch.uint8, device=kv_layer.k.device)
        memory = StepMemory(pieces, rows.num_rows, float_workspace, kernels.num_multiprocessors)
        launches = memory.submit(rows, kv_layer.page_size, self._staging())
        page_indices = flat_page_indices(metadata, rows.page_indptr)
        return FlashInferPlan(_launches_by_spec(launches, specs), page_indices)

    def make_decode_graph_states(
        self,
        num_padded_rows: int,
        kv_layer: KVLayer,
        specs: Collection[AttentionSpec],
        page_indices: Tensor,
    ) -> list[DecodeGraphState]:
        """Make what the captured decode steps of one size share; see :class:`AttentionBackend`.

        Returns
        -------
        list of DecodeGraphState
            Without splits, which suits some steps of every size, and with splits.

        Notes
        -----
        Make the largest size first: the others then use its memory of partial results.
        """
        return [
            self.make_decode_graph_state(num_padded_rows, kv_layer, specs, page_indices, is_split=is_split)
            for is_split in (False, True)
        ]

    def make_decode_graph_state(
        self,
        num_padded_rows: int,
        kv_layer: KVLayer,
        specs: Collection[AttentionSpec],
        page_indices: Tensor,
        *,
        is_split: bool = True,
    ) -> DecodeGraphState:
        """Make one of :meth:`make_decode_graph_states`.

        Parameters
        ----------
        num_padded_rows
            Rows of each step, padded ones included.
        kv_layer, specs
            As for :meth:`plan`.
        page_indices
            int32 on the device, at a fixed place: each step's page ids row after row, when the step runs.
        is_split
            The KV of a row is split over programs.

        Returns
        -------
        DecodeGraphState
            To be planned before it is captured; the plan for :meth:`attend` then.
        """
        kernels = self._load(kv_layer, specs)
        pieces = decode_pieces(kernels.decode, num_padded_rows, is_fixed=True, is_split=is_split)
        float_workspace = self._shared_float_workspace(_float_bytes(pieces, kernels), kv_layer.k.device)
        memory = StepMemory(pieces, num_padded_rows, float_workspace, kernels.num_multiprocessors)
        return DecodeGraphState(
            pieces,
            num_padded_rows,
            kv_layer.page_size,
            memory,
            self._staging(),
            specs,
            page_indices,
            kernels.num_multiprocessors,
        )

    def attend(
        self,
        query: Tensor,
        kv_layer: KVLayer,
        spec: AttentionSpec,
        plan: FlashInferPlan | DecodeGraphState,
        out: Tensor | None = None,
    ) -> Tensor:
        """Attend over the pages; see :class:`AttentionBackend`."""
        output = torch.empty(query.shape, dtype=query.dtype, device=query.device) if out is None else out
        for launch in plan.launches[spec]:
            launch.run(
                query,
                kv_layer,
                output,
                plan.page_indices,
                spec.scaling,
                launches_early=self._launches_early,
            )
        return output

    def _staging(self) -> StagingRing:
        if self._ring is None:
            self._ring = StagingRing()
        return self._ring

    def _shared_float_workspace(self, num_bytes: int, device: torch.device) -> Tensor:
        shared = self._graph_float_workspace
        if shared is None or len(shared) < num_bytes or shared.device != device:
            shared = torch.empty(num_bytes, dtype=torch.uint8, device=device)
            # Graphs that were captured with the one before keep it alive.
            self._graph_float_workspace = shared
        return shared

    def _load(self, kv_layer: KVLayer, specs: Collection[AttentionSpec]) -> _Kernels:
        device = kv_layer.k.device
        key = (frozenset(specs), kv_layer.k.dtype, device)
        if key not in self._kernels:
            capability, num_multiprocessors = device_traits(device)
            check_supported(kv_layer, list(specs), capability)
            prefill = self._prefill_kernel or ("fa3" if capability[0] == 9 else "fa2")
            shapes = unique_shapes([KernelShape.of(spec) for spec in specs])
            wanted = [(name, shape) for name in dict.fromkeys(("fa2", prefill)) for shape in shapes]
            loaded = load_kernels(self._get_module, wanted, kv_layer.k.dtype)
            self._kernels[key] = _Kernels(
                shapes=shapes,
                decode=[loaded["fa2", shape] for shape in shapes],
                prefill=[loaded[prefill, shape] for shape in shapes],
                num_multiprocessors=num_multiprocessors,
            )
        return self._kernels[key]


def device_traits(device: torch.device) -> tuple[tuple[int, int], int]:
    """Compute capability and number of multiprocessors; (0, 0) and 0 where it is no CUDA device."""
    if device.type != "cuda":
        return (0, 0), 0
    properties = torch.cuda.get_device_properties(device)
    return (properties.major, properties.minor), properties.multi_processor_count


def _float_bytes(pieces: Sequence[Piece], kernels: _Kernels) -> int:
    return max(piece.float_bytes(kernels.num_multiprocessors) for piece in pieces)


def _launches_by_spec(
    launches: Sequence[Launch], specs: Collection[AttentionSpec]
) -> dict[AttentionSpec, list[Any]]:
    return {
        spec: [launch for launch in launches if launch.piece.kernel.shape == KernelShape.of(spec)]
        for spec in specs
    }


register_attention_backend(FlashInferAttentionBackend.name, FlashInferAttentionBackend)
