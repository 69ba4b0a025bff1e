"""A stand-in for the scheduler's plan, for tests of single parts of the executor."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np


@dataclass
class PlanStandIn:
    """Field names, shapes and dtypes as csrc/scheduler/execution_plan.h; rows and deltas come as lists."""

    plan_id: int = 1
    rows: list[dict] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    deltas: list[tuple[int, int, list[int]]] = field(default_factory=list)
    loads: list[tuple[int, int]] = field(default_factory=list)
    drained: list[int] = field(default_factory=list)
    # (id, kind, source pages, destination pages)
    transfers: list[tuple[int, int, list[int], list[int]]] = field(default_factory=list)

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
        self.transfer_ids = np.array([one[0] for one in self.transfers], dtype=np.int64)
        self.transfer_kinds = np.array([one[1] for one in self.transfers], dtype=np.int8)
        lengths = [len(one[2]) for one in self.transfers]
        self.transfer_offsets = np.array([0, *np.cumsum(lengths)], dtype=np.int32)
        pages = [[page for one in self.transfers for page in one[side]] for side in (2, 3)]
        self.transfer_source_pages, self.transfer_destination_pages = np.array(pages, dtype=np.int32)
        for name, value in vars(self).items():
            if isinstance(value, np.ndarray):
                value.flags.writeable = False
                setattr(self, name, value)

    @property
    def has_rows(self) -> bool:
        return bool(self.rows)

    @property
    def is_empty(self) -> bool:
        return not (self.rows or self.loads or self.drained or self.transfers)
