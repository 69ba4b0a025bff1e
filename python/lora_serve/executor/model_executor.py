"""Runs plans with a real model."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from lora_serve.common.config import EngineConfig
from lora_serve.common.errors import InternalError
from lora_serve.common.stage_log import log_stage
from lora_serve.executor.adapter_steps import AdapterSteps
from lora_serve.executor.executor import ExecutionResult
from lora_serve.executor.executor_base import ExecutorBase, MemorySizes
from lora_serve.executor.input_batch import build_input_batch
from lora_serve.executor.kv_tensors import (
    allocate_kv_pool,
    choose_max_model_len,
    choose_num_device_pages,
    choose_num_host_pages,
    kv_layers_of,
)
from lora_serve.executor.last_tokens import LastSampledTokens
from lora_serve.executor.logprobs import TokenLogprobs
from lora_serve.executor.model_setup import load_configured_model, make_adapter_memory
from lora_serve.executor.page_table import PageTable
from lora_serve.executor.plan_worker import PlanWorker
from lora_serve.executor.prompt_logprobs import fill_prompt_logprobs, needs_few_outputs
from lora_serve.executor.sampler import sample
from lora_serve.executor.sampling_state import SamplingState
from lora_serve.executor.token_restriction import RestrictionError
from lora_serve.executor.transfers import make_page_transfers
from lora_serve.kernels import LoRAMetadata, build_lora_metadata
from lora_serve.layers.step_context import StepOutputs

if TYPE_CHECKING:
    from lora_serve.scheduler import ExecutionPlan

logger = logging.getLogger(__name__)


class ModelExecutor(ExecutorBase):
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
        with log_stage(logger, "model"):
            self._model = load_configured_model(config)
        self._config = config
        self._device = torch.device(config.device)
        model_config = self._model.config
        num_device_pages = choose_num_device_pages(config, model_config)
        num_host_pages = choose_num_host_pages(config, model_config)
        max_model_len = choose_max_model_len(config, model_config, num_device_pages)
        with log_stage(logger, "adapter memory"):
            lora = make_adapter_memory(config, self._model)
        with log_stage(logger, "KV pages"):
            pool = allocate_kv_pool(model_config, num_device_pages, config.page_size, self._device)
            transfers = make_page_transfers(pool, num_host_pages)
        sizes = MemorySizes(num_device_pages, num_host_pages, max_model_len)
        super().__init__(model_config, lora, transfers, sizes)
        self._adapters = AdapterSteps(lora)
        self._kv_layers = kv_layers_of(pool)
        max_pages_per_row = -(-max_model_len // config.page_size)
        self._page_table = PageTable(config.max_num_seqs, max_pages_per_row, num_device_pages)
        self._last_tokens = LastSampledTokens(config.max_num_seqs)
        self._worker = PlanWorker(self._run_plan)

    @property
    def padded_batch_sizes(self) -> tuple[int, ...]:
        """None: plans are not padded."""
        return ()

    def submit(self, plan: ExecutionPlan, states: Sequence[SamplingState]) -> None:
        """Begin a plan; see `Executor.submit`."""
        self._worker.submit(plan, states)

    def collect(self) -> ExecutionResult:
        """Wait for the oldest plan on its way; see `Executor.collect`."""
        return self._worker.collect()

    def close(self) -> None:
        """End the threads and drop the KV tensors of both tiers; the model goes with the executor."""
        self._worker.close()
        self.lora.close()
        self._kv_layers = []
        self._transfers.close()

    def _num_in_flight(self) -> int:
        return self._worker.num_in_flight

    # --- In the worker's thread ---------------------------------------------------------------------------

    def _run_plan(self, plan: ExecutionPlan, states: Sequence[SamplingState]) -> ExecutionResult:
        """Do what the plan says.

        Raises
        ------
        InternalError
            The plan contradicts an earlier one or its states.

        Notes
        -----
        Order: drained and evicted adapters are taken off the device, those that it loads brought there,
        copies between the tiers begun, page tables changed, then the forward pass.
        Logits are computed only for rows that sample and prompt tokens whose log probabilities are wanted.
        """
        num_rows = len(plan.request_ids)
        if len(states) != num_rows:
            raise InternalError(f"plan {plan.plan_id} has {num_rows} rows but came with {len(states)} states")
        loads = self._adapters.begin(plan)
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

    def _run_rows(
        self,
        plan: ExecutionPlan,
        states: Sequence[SamplingState],
        token_ids: npt.NDArray[np.int32],
        logprobs: list[TokenLogprobs | None],
    ) -> dict[int, str]:
        """Run at least one row and fill in what it sampled; give the failed rows with their reasons."""
        adapts_more = self.lora.adapts_more_than_layers(plan.adapter_slots)
        batch = build_input_batch(
            plan,
            self._page_table,
            page_size=self._config.page_size,
            device=self._device,
            adapts_embedding=adapts_more,
        )
        without_input = self._last_tokens.fill(batch.token_ids, plan)
        sampled_rows = np.flatnonzero(plan.samples_token)
        outputs = None
        last_tokens = torch.from_numpy(batch.query_start_loc[1:][sampled_rows] - 1).to(self._device)
        if needs_few_outputs(plan, states):
            lora = self._lora_of_rows(plan, sampled_rows) if batch.context.lora is not None else None
            outputs = StepOutputs(last_tokens, lora)
        attention_plan = self._model.plan_attention(batch.attention, self._kv_layers)
        context = replace(batch.context, outputs=outputs)
        hidden = self._model.forward(batch.token_ids, context, self._kv_layers, attention_plan)
        row_errors = {}
        if outputs is None:
            row_errors = fill_prompt_logprobs(
                plan, states, hidden, batch.query_start_loc, self._model.compute_logits
            )
            hidden = hidden[last_tokens]
        row_errors.update(dict.fromkeys(without_input, "the step before gave no token to go on from"))
        row_errors.update(self._adapters.row_errors(plan))
        places = [place for place, row in enumerate(sampled_rows.tolist()) if row not in row_errors]
        rows = sampled_rows[places].tolist()
        if rows:
            lora = self._lora_of_rows(plan, sampled_rows[places]) if adapts_more else None
            logits = self._model.compute_logits(hidden[places], lora)
            sampled = sample(logits, [states[row] for row in rows])
            row_errors.update({rows[i]: reason for i, reason in sampled.row_errors.items()})
            token_ids[rows] = sampled.token_ids
            for row, token_id, entry in zip(rows, sampled.token_ids.tolist(), sampled.logprobs, strict=True):
                if row not in row_errors:
                    position = int(plan.num_computed_tokens[row] + plan.num_scheduled_tokens[row])
                    try:
                        states[row].append_output(token_id, position)
                        logprobs[row] = entry
                    except RestrictionError as error:
                        row_errors[row] = str(error)
                        token_ids[row] = -1
        self._last_tokens.note(plan, token_ids)
        return row_errors

    def _lora_of_rows(self, plan: ExecutionPlan, rows: npt.NDArray[np.int64]) -> LoRAMetadata:
        """Group rows by adapter slot.

        Made on the host, where the plan's rows are known, and brought to the device in one copy.
        """
        slots = torch.from_numpy(plan.adapter_slots[rows])
        return build_lora_metadata(slots, self._config.max_loras, device=self._device)
