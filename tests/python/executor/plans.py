"""A stand-in for the scheduler's plan, for tests of single parts of the executor."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from lora_serve.kernels.lora_tiles import build_lora_tiles


@dataclass
class PlanStandIn:
    """Field names, shapes and dtypes as csrc/scheduler/execution_plan.h; rows and deltas come as lists.

    `block` and `layout` hold what input batches read from there, without padding and in an order of its own.
    """

    plan_id: int = 1
    rows: list[dict] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    deltas: list[tuple[int, int, list[int]]] = field(default_factory=list)
    loads: list[tuple[int, int]] = field(default_factory=list)
    drained: list[int] = field(default_factory=list)
    evicted: list[int] = field(default_factory=list)
    expired: list[int] = field(default_factory=list)
    # (id, kind, source pages, destination pages)
    transfers: list[tuple[int, int, list[int], list[int]]] = field(default_factory=list)
    max_loras: int = 3

    def __post_init__(self) -> None:
        def column(name: str, default: int = 0) -> np.ndarray:
            return np.array([row.get(name, default) for row in self.rows], dtype=np.int32)

        self.request_ids = column("request_id").astype(np.int64)
        self.page_table_rows = column("page_table_row")
        self.num_scheduled_tokens = column("num_scheduled_tokens", 1)
        self.num_computed_tokens = column("num_computed_tokens")
        self.num_cached_tokens = column("num_cached_tokens")
        self.adapter_slots = column("adapter_slot", -1)
        self.samples_token = column("samples_token", 1).astype(np.uint8)
        self.token_ids = np.array(self.tokens, dtype=np.int32)
        self.delta_rows = np.array([row for row, _, _ in self.deltas], dtype=np.int32)
        self.delta_starts = np.array([start for _, start, _ in self.deltas], dtype=np.int32)
        lengths = [len(pages) for _, _, pages in self.deltas]
        self.delta_offsets = np.array([0, *np.cumsum(lengths)], dtype=np.int32)
        self.delta_pages = np.array([page for _, _, pages in self.deltas for page in pages], dtype=np.int32)
        self.load_adapter_ids = np.array([adapter for adapter, _ in self.loads], dtype=np.int64)
        self.load_adapter_slots = np.array([slot for _, slot in self.loads], dtype=np.int32)
        self.drained_adapter_ids = np.array(self.drained, dtype=np.int64)
        self.evicted_adapter_ids = np.array(self.evicted, dtype=np.int64)
        self.expired_request_ids = np.array(self.expired, dtype=np.int64)
        self.transfer_ids = np.array([one[0] for one in self.transfers], dtype=np.int64)
        self.transfer_kinds = np.array([one[1] for one in self.transfers], dtype=np.int8)
        lengths = [len(one[2]) for one in self.transfers]
        self.transfer_offsets = np.array([0, *np.cumsum(lengths)], dtype=np.int32)
        pages = [[page for one in self.transfers for page in one[side]] for side in (2, 3)]
        self.transfer_source_pages, self.transfer_destination_pages = np.array(pages, dtype=np.int32)
        self.seq_lens = self.num_computed_tokens + self.num_scheduled_tokens
        self.query_start_loc = np.array([0, *np.cumsum(self.num_scheduled_tokens)], dtype=np.int32)
        self.num_padded_rows, self.num_padded_tokens = len(self.rows), len(self.tokens)
        self._group_tokens()
        self._lay_out_block()
        for value in vars(self).values():
            if isinstance(value, np.ndarray):
                value.flags.writeable = False

    def _group_tokens(self) -> None:
        mapping = np.repeat(self.adapter_slots, self.num_scheduled_tokens)
        slots, counts = np.unique(mapping, return_counts=True)
        self.token_lora_mapping = mapping
        self.token_indices_sorted_by_lora_ids = np.argsort(mapping, kind="stable").astype(np.int32)
        self.active_lora_ids = np.full(self.max_loras + 1, -1, dtype=np.int32)
        self.active_lora_ids[: len(slots)] = slots
        self.num_tokens_per_lora = np.zeros(self.max_loras + 1, dtype=np.int32)
        self.num_tokens_per_lora[: len(slots)] = counts
        self.lora_token_start_loc = np.array([0, *np.cumsum(self.num_tokens_per_lora)], dtype=np.int32)
        self.num_adapters = int((slots >= 0).sum())
        groups = torch.tensor(slots), torch.tensor(counts)
        tiles = build_lora_tiles(*groups, len(mapping), self.max_loras + 1)
        self.lora_tiles = tiles.flatten().numpy().copy()

    def _lay_out_block(self) -> None:
        arrays = {
            name: value for name, value in vars(self).items() if getattr(value, "dtype", None) == np.int32
        }
        ends = np.cumsum([len(array) for array in arrays.values()]).tolist()
        starts = [0, *ends[:-1]]
        self.layout = {
            name: slice(start, end, 1) for name, start, end in zip(arrays, starts, ends, strict=True)
        }
        self.block = np.concatenate(list(arrays.values()))

    @property
    def has_rows(self) -> bool:
        return bool(self.rows)

    @property
    def is_empty(self) -> bool:
        return not (self.rows or self.loads or self.drained or self.evicted or self.transfers)
