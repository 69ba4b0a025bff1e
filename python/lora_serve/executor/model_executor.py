"""Runs plans with a real model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from lora_serve.common.config import EngineConfig
from lora_serve.common.errors import InternalError
from lora_serve.executor.executor import NO_PLAN, ExecutionResult
from lora_serve.executor.host_pages import HostPages
from lora_serve.executor.input_batch import build_input_batch
from lora_serve.executor.kv_tensors import (
    allocate_host_block,
    allocate_kv_layers,
    choose_max_model_len,
    choose_num_device_pages,
    choose_num_host_pages,
)
from lora_serve.executor.last_tokens import LastSampledTokens
from lora_serve.executor.logprobs import TokenLogprobs
from lora_serve.executor.page_table import PageTable
from lora_serve.executor.plan_worker import PlanWorker
from lora_serve.executor.prompt_logprobs import fill_prompt_logprobs
from lora_serve.executor.sampler import sample
from lora_serve.executor.sampling_state import SamplingState
from lora_serve.executor.transfers import PageTransfers, TransferReports
from lora_serve.kernels import LoRAMetadata, build_lora_metadata
from lora_serve.lora.manager import LoadReports, LoRAManager
from lora_serve.lora.sources import AdapterSources
from lora_serve.models.config import ModelConfig
from lora_serve.models.loader import load_model

if TYPE_CHECKING:
    from lora_serve.scheduler import ExecutionPlan

_GIB = 2**30


class ModelExecutor:
    """Implements `Executor` on one device: a thread of its own runs the plans, one after the other.

    Owns the model, the KV tensors of both tiers, the page table, the adapter memory and the last token of
    each row. Knows no request: rows are positions in the plan, adapters are slots. All of it is touched by
    the thread alone while a plan is on its way; `lora` says what of it the caller may use meanwhile.

    Parameters
    ----------
    config : EngineConfig
        The engine's.

    Raises
    ------
    InvalidArgumentError
        The model cannot be loaded, or it and `max_model_len` do not fit the memory for KV pages, or the
        machine does not give the host tier's memory.
    """

    def __init__(self, config: EngineConfig) -> None:
        self._model = load_model(
            config.model,
            dtype=config.dtype,
            device=config.device,
            load_format=config.load_format,
            attention_backend=config.attention_backend,
            seed=config.seed,
        )
        self._config = config
        self._device = torch.device(config.device)
        self.model_config: ModelConfig = self._model.config
        self._num_device_pages = choose_num_device_pages(config, self.model_config)
        self._num_host_pages = choose_num_host_pages(config, self.model_config)
        self._max_model_len = choose_max_model_len(config, self.model_config, self._num_device_pages)
        self.lora = LoRAManager(
            self._model.lora_targets(),
            self._model.fused_lora_targets(),
            self.model_config.dtype,
            self._device,
            config.max_lora_rank,
            memory_bytes=int(config.lora_memory_gb * _GIB),
            host_memory_bytes=int(config.lora_host_memory_gb * _GIB),
            sources=AdapterSources(
                allowed_roots=config.lora_allowed_roots,
                allow_hub=config.lora_allow_hub,
                resolvers=config.lora_resolvers,
            ),
        )
        self._kv_layers = allocate_kv_layers(
            self.model_config, self._num_device_pages, config.page_size, self._device
        )
        host_block = allocate_host_block(self.model_config, self._num_host_pages, config.page_size)
        self._transfers = PageTransfers(HostPages(host_block, self._kv_layers), self._num_device_pages)
        max_pages_per_row = -(-self._max_model_len // config.page_size)
        self._page_table = PageTable(config.max_num_seqs, max_pages_per_row, self._num_device_pages)
        self._last_tokens = LastSampledTokens(config.max_num_seqs)
        self._failed_slots: dict[int, int] = {}  # To the generation whose load has failed.
        self._worker = PlanWorker(self._run_plan)

    @property
    def num_device_pages(self) -> int:
        """KV pages."""
        return self._num_device_pages

    @property
    def num_host_pages(self) -> int:
        """KV pages of the host tier; 0 = there is none."""
        return self._num_host_pages

    @property
    def max_model_len(self) -> int:
        """Longest prompt plus answer in tokens."""
        return self._max_model_len

    @property
    def vocab_size(self) -> int:
        """Number of logits."""
        return self.model_config.vocab_size

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The model's end-of-sequence tokens."""
        return self.model_config.eos_token_ids

    def submit(self, plan: ExecutionPlan, states: Sequence[SamplingState]) -> None:
        """Begin a plan; see `Executor.submit`."""
        self._worker.submit(plan, states)

    def collect(self) -> ExecutionResult:
        """Wait for the oldest plan on its way; see `Executor.collect`."""
        return self._worker.collect()

    def report(self) -> ExecutionResult:
        """Give what has ended since the last result; see `Executor.report`."""
        is_idle = self._worker.num_in_flight == 0
        transfers = self._transfers.take_reports() if is_idle else TransferReports()
        loads = self.lora.take_loads({}) if is_idle else LoadReports()
        return ExecutionResult(
            NO_PLAN,
            np.empty(0, dtype=np.int32),
            [],
            loads.loaded,
            loads.failed,
            completed_transfer_ids=transfers.completed,
            failed_transfer_ids=transfers.failed,
        )

    def close(self) -> None:
        """End the threads and drop the KV tensors of both tiers; the model goes with the executor."""
        self._worker.close()
        self.lora.close()
        self._kv_layers = []
        self._transfers.close()

    # --- In the worker's thread ---------------------------------------------------------------------------

    def _run_plan(self, plan: ExecutionPlan, states: Sequence[SamplingState]) -> ExecutionResult:
        """Do what the plan says.

        Raises
        ------
        InternalError
            The plan contradicts an earlier one or its states.

        Notes
        -----
        Order: drained and evicted adapters are taken off the device, those that have arrived on the host
        brought there, copies between the tiers begun, page tables changed, then the forward pass.
        Logits are computed only for rows that sample and prompt tokens whose log probabilities are wanted.
        """
        num_rows = len(plan.request_ids)
        if len(states) != num_rows:
            raise InternalError(f"plan {plan.plan_id} has {num_rows} rows but came with {len(states)} states")
        for adapter_id in plan.drained_adapter_ids.tolist():
            self.lora.free(adapter_id)
        for adapter_id in plan.evicted_adapter_ids.tolist():
            if adapter_id not in self._failed_slots.values():  # Or the plan was made before that was known.
                self.lora.evict(adapter_id)
        loads = self._take_loads(plan)
        self._transfers.start(plan)
        self._page_table.apply_deltas(plan)
        token_ids = np.full(num_rows, -1, dtype=np.int32)
        logprobs: list[TokenLogprobs | None] = [None] * num_rows
        row_errors = self._run_rows(plan, states, token_ids, logprobs) if num_rows else {}
        transfers = self._transfers.take_reports()
        return ExecutionResult(
            plan.plan_id,
            token_ids,
            logprobs,
            loads.loaded,
            loads.failed,
            row_errors,
            completed_transfer_ids=transfers.completed,
            failed_transfer_ids=transfers.failed,
        )

    def _take_loads(self, plan: ExecutionPlan) -> LoadReports:
        """Begin the plan's loads, and end those of this and earlier plans that can end now.

        Rows of this plan and of the next may name the slot of one that has failed: they run without the
        adapter, and fail.
        """
        slot_of = dict(zip(plan.load_adapter_ids.tolist(), plan.load_adapter_slots.tolist(), strict=True))
        for slot in slot_of.values():
            self._failed_slots.pop(slot, None)
        loads = self.lora.take_loads(slot_of)
        for adapter_id in loads.failed:
            if adapter_id in slot_of:
                self._failed_slots[slot_of[adapter_id]] = adapter_id
        return loads

    def _run_rows(
        self,
        plan: ExecutionPlan,
        states: Sequence[SamplingState],
        token_ids: npt.NDArray[np.int32],
        logprobs: list[TokenLogprobs | None],
    ) -> dict[int, str]:
        """Run at least one row and fill in what it sampled; give the failed rows with their reasons."""
        batch = build_input_batch(
            plan,
            self._page_table,
            page_size=self._config.page_size,
            device=self._device,
        )
        without_input = self._last_tokens.fill(batch.token_ids, plan)
        hidden = self._model.forward(batch.token_ids, batch.context, self._kv_layers)
        row_errors = fill_prompt_logprobs(
            plan, states, hidden, batch.query_start_loc, self._model.compute_logits
        )
        row_errors.update(dict.fromkeys(without_input, "the step before gave no token to go on from"))
        for row, slot in enumerate(plan.adapter_slots.tolist() if self._failed_slots else ()):
            if slot in self._failed_slots:
                row_errors[row] = "its adapter could not be brought to the device"
        rows = [row for row in np.flatnonzero(plan.samples_token).tolist() if row not in row_errors]
        if rows:
            last_tokens = torch.from_numpy(batch.query_start_loc[1:][rows] - 1).to(self._device)
            logits = self._model.compute_logits(hidden[last_tokens], self._lora_of_rows(plan, rows))
            sampled = sample(logits, [states[row] for row in rows])
            row_errors.update({rows[i]: reason for i, reason in sampled.row_errors.items()})
            token_ids[rows] = sampled.token_ids
            for row, token_id, entry in zip(rows, sampled.token_ids.tolist(), sampled.logprobs, strict=True):
                if row not in row_errors:
                    position = int(plan.num_computed_tokens[row] + plan.num_scheduled_tokens[row])
                    states[row].append_output(token_id, position)
                    logprobs[row] = entry
        self._last_tokens.note(plan, token_ids)
        return row_errors

    def _lora_of_rows(self, plan: ExecutionPlan, rows: list[int]) -> LoRAMetadata | None:
        """Group the rows whose logits are computed by adapter slot; None = the plan has no adapter.

        Made on the host, where the plan's rows are known, and brought to the device in one copy.
        """
        if plan.num_adapters == 0:
            return None
        slots = torch.from_numpy(plan.adapter_slots[rows])
        return build_lora_metadata(slots, self._config.max_loras, device=self._device)
