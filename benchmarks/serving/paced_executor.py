"""An executor with real adapter memory whose steps only take time."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from lora_serve.executor.adapter_steps import AdapterSteps
from lora_serve.executor.executor import NO_PLAN, ExecutionResult
from lora_serve.executor.plan_worker import PlanWorker
from lora_serve.executor.sampling_state import SamplingState
from lora_serve.lora.manager import LoRAManager
from lora_serve.lora.sources import AdapterSources
from lora_serve.models.config import read_model_config
from lora_serve.models.decoder import DecoderModel

if TYPE_CHECKING:
    from lora_serve.scheduler import ExecutionPlan


class PacedExecutor:
    """Implements `Executor`: a step does what plans say of adapters, then sleeps, as if a device computed.

    It has adapter memory of a real model's shape, whose weights nobody needs. Every token is 1.

    Parameters
    ----------
    model_dir : Path
        Only its config.json is read.
    num_device_pages, max_model_len : int
        Reported to the engine.
    step_ms : float
        How long the device computes.
    calls_per_step : int
        Small calls of torch that `submit` makes in its caller's thread, as CUDA's launches its kernels. Each
        gives the interpreter lock away and takes it again.
    max_lora_rank, memory_bytes, host_memory_bytes : int
        Of the adapter memory, on the CPU.

    Attributes
    ----------
    late_ms : list of float
        How long after the end of a step its result was taken, where somebody waited for it.
    """

    vocab_size = 1000
    num_host_pages = 0
    eos_token_ids = ()
    padded_batch_sizes = ()

    def __init__(
        self,
        model_dir: Path,
        *,
        num_device_pages: int,
        max_model_len: int,
        step_ms: float,
        max_lora_rank: int,
        memory_bytes: int,
        host_memory_bytes: int,
        calls_per_step: int = 0,
    ) -> None:
        self.num_device_pages = num_device_pages
        self.max_model_len = max_model_len
        self.late_ms: list[float] = []
        model = DecoderModel(read_model_config(model_dir), device=torch.device("meta"))
        self.lora = LoRAManager(
            model.lora_targets(),
            model.fused_lora_targets(),
            torch.bfloat16,
            "cpu",
            max_lora_rank,
            memory_bytes=memory_bytes,
            host_memory_bytes=host_memory_bytes,
            sources=AdapterSources(),
        )
        self._step_s = step_ms / 1e3
        self._calls_per_step, self._changed_by_calls = calls_per_step, torch.zeros(4)
        self._ended_at = 0.0
        self._adapters = AdapterSteps(self.lora)
        self._worker = PlanWorker(self._run_plan)

    def submit(self, plan: ExecutionPlan, states: Sequence[SamplingState]) -> None:
        """Begin a plan; see `Executor.submit`."""
        for _ in range(self._calls_per_step):
            self._changed_by_calls.add_(1.0)
        self._worker.submit(plan, states)

    def collect(self) -> ExecutionResult:
        """Wait for the oldest plan on its way; see `Executor.collect`."""
        called_at = time.perf_counter()
        result = self._worker.collect()
        if self._ended_at > called_at:
            self.late_ms.append((time.perf_counter() - self._ended_at) * 1e3)
        return result

    def report(self) -> ExecutionResult:
        """Nothing: there are no copies between tiers; see `Executor.report`."""
        return ExecutionResult(NO_PLAN, np.empty(0, np.int32), [], [], {})

    def close(self) -> None:
        """End the threads."""
        self._worker.close()
        self.lora.close()

    def _run_plan(self, plan: ExecutionPlan, states: Sequence[SamplingState]) -> ExecutionResult:
        loads = self._adapters.begin(plan)
        token_ids = np.where(plan.samples_token, 1, -1).astype(np.int32)
        positions = (plan.num_computed_tokens + plan.num_scheduled_tokens).tolist()
        for row in np.flatnonzero(plan.samples_token).tolist():
            states[row].append_output(1, positions[row])
        time.sleep(self._step_s)
        result = ExecutionResult(plan.plan_id, token_ids, [None] * len(states), loads.loaded, loads.failed)
        self._ended_at = time.perf_counter()
        return result
