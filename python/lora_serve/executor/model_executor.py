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
from lora_serve.executor.logprobs import TokenLogprobs
from lora_serve.executor.page_table import PageTable
from lora_serve.executor.prompt_logprobs import fill_prompt_logprobs
from lora_serve.executor.sampler import Sampler
from lora_serve.executor.sampling_state import SamplingState
from lora_serve.executor.transfers import PageTransfers
from lora_serve.lora.manager import LoRAManager
from lora_serve.models.config import ModelConfig
from lora_serve.models.loader import load_model

if TYPE_CHECKING:
    from lora_serve.scheduler import ExecutionPlan


class ModelExecutor:
    """Implements `Executor` on one device, step after step without overlap.

    Owns the model, the KV tensors of both tiers, the page table, the adapter memory and the sampler. Knows no
    request: rows are positions in the plan, adapters are slots.

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
            self.model_config.dtype,
            self._device,
            config.max_lora_rank,
            config.lora_allowed_roots,
        )
        self._kv_layers = allocate_kv_layers(
            self.model_config, self._num_device_pages, config.page_size, self._device
        )
        host_block = allocate_host_block(self.model_config, self._num_host_pages, config.page_size)
        self._transfers = PageTransfers(HostPages(host_block, self._kv_layers), self._num_device_pages)
        max_pages_per_row = -(-self._max_model_len // config.page_size)
        self._page_table = PageTable(config.max_num_seqs, max_pages_per_row, self._num_device_pages)
        self._sampler = Sampler(config.seed)

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

    def execute(self, plan: ExecutionPlan, states: Sequence[SamplingState]) -> ExecutionResult:
        """Do what the plan says; see `Executor.execute`.

        Raises
        ------
        InternalError
            The plan contradicts an earlier one or its states.

        Notes
        -----
        Order: drained adapters are removed, loads installed, copies between the tiers begun, page tables
        changed, then the forward pass.
        Logits are computed only for rows that sample and prompt tokens whose log probabilities are wanted.
        """
        num_rows = len(plan.request_ids)
        if len(states) != num_rows:
            raise InternalError(f"plan {plan.plan_id} has {num_rows} rows but came with {len(states)} states")
        for adapter_id in plan.drained_adapter_ids.tolist():
            if adapter_id in self.lora:
                self.lora.remove(adapter_id)
        loaded, failed = self._install_loads(plan)
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
            loaded,
            failed,
            row_errors,
            completed_transfer_ids=transfers.completed,
            failed_transfer_ids=transfers.failed,
        )

    def report_copies(self) -> ExecutionResult:
        """Give the copies that have ended since the last result; see `Executor.report_copies`."""
        transfers = self._transfers.take_reports()
        return ExecutionResult(
            NO_PLAN,
            np.empty(0, dtype=np.int32),
            [],
            [],
            {},
            completed_transfer_ids=transfers.completed,
            failed_transfer_ids=transfers.failed,
        )

    def close(self) -> None:
        """Drop the KV tensors of both tiers; the model goes with the executor."""
        self._kv_layers = []
        self._transfers.close()

    def _install_loads(self, plan: ExecutionPlan) -> tuple[list[int], dict[int, str]]:
        """Install the plan's loads; one adapter's failure is its own, whatever its type."""
        loaded: list[int] = []
        failed: dict[int, str] = {}
        loads = zip(plan.load_adapter_ids.tolist(), plan.load_adapter_slots.tolist(), strict=True)
        for adapter_id, slot in loads:
            try:
                self.lora.install(adapter_id, slot)
            except Exception as error:  # out of memory included: the other requests go on
                failed[adapter_id] = f"{type(error).__name__}: {error}"
            else:
                loaded.append(adapter_id)
        return loaded, failed

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
            max_loras=self._config.max_loras,
            device=self._device,
        )
        hidden = self._model.forward(batch.token_ids, batch.context, self._kv_layers)
        row_errors = fill_prompt_logprobs(
            plan, states, hidden, batch.query_start_loc, self._model.compute_logits
        )
        rows = [row for row in np.flatnonzero(plan.samples_token).tolist() if row not in row_errors]
        if rows:
            last_tokens = torch.from_numpy(batch.query_start_loc[1:][rows] - 1).to(self._device)
            logits = self._model.compute_logits(hidden[last_tokens])
            sampled = self._sampler.sample(logits, [states[row] for row in rows])
            row_errors.update({rows[i]: reason for i, reason in sampled.row_errors.items()})
            token_ids[rows] = sampled.token_ids
            for row, token_id, entry in zip(rows, sampled.token_ids.tolist(), sampled.logprobs, strict=True):
                if row not in row_errors:
                    position = int(plan.num_computed_tokens[row] + plan.num_scheduled_tokens[row])
                    states[row].append_output(token_id, position)
                    logprobs[row] = entry
        return row_errors
