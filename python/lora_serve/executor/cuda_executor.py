"""Runs plans on a CUDA device, one ahead of what is known of the one before.

Everything happens in the caller's thread. Nothing in `submit` waits for the device: inputs, forward pass,
sampling and the copy of tokens and log probabilities are put on the execution stream, behind the plan that
runs. What a row samples stays on the device as the input of its next step. Two things are worked out on the
host and wait: log probabilities of prompts, for their step; penalties, for the tokens of the plan before.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lora_serve.common.config import EngineConfig
from lora_serve.common.errors import InternalError
from lora_serve.executor.adapter_steps import AdapterSteps
from lora_serve.executor.decode_graphs import DecodeGraphs
from lora_serve.executor.device_inputs import DeviceInputs, DeviceStep
from lora_serve.executor.device_sampler import DeviceSampler, RowsToSample
from lora_serve.executor.executor import MAX_PLANS_IN_FLIGHT, ExecutionResult
from lora_serve.executor.executor_base import ExecutorBase, MemorySizes
from lora_serve.executor.pending_step import PendingStep, ResultBuffers
from lora_serve.executor.prefill_graphs import PrefillGraphs
from lora_serve.executor.prompt_logprobs import (
    awaits_prompt_logprobs,
    fill_prompt_logprobs,
    needs_few_outputs,
)
from lora_serve.executor.sampling_state import SamplingState
from lora_serve.executor.uploads import Uploads
from lora_serve.kernels import LoRAMetadata, build_lora_metadata
from lora_serve.kernels.greedy_sample import greedy_sample, set_last_tokens
from lora_serve.layers.attention import DecodeGraphAttention
from lora_serve.layers.step_context import StepOutputs
from lora_serve.scheduler import plan_layout

if TYPE_CHECKING:
    from lora_serve.executor.cuda_setup import CudaSetup
    from lora_serve.scheduler import ExecutionPlan


@dataclass(frozen=True, eq=False)
class _BestTokens:
    """What a forward pass gave: logits [N, V], the best token of each row or `FAILED`, and whose they are."""

    logits: Tensor
    tokens: Tensor
    page_table_rows: Tensor
    row_failed: Tensor


class CudaExecutor(ExecutorBase):
    """Implements `Executor` on one CUDA device.

    Owns what its setup has made, the page table and the last token of each row on the device, and the
    captured decode steps. Knows no request: rows are positions in the plan, adapters are slots. The execution
    stream is the one that is the device's current stream when the executor is made, whatever is current in
    the thread that calls it later. The thread is one.

    Penalties and grammars need what the host knows of a row's output so far: the plan's forward pass is
    submitted first, then the tokens of the plan before are waited for. So the device has work meanwhile.

    Parameters
    ----------
    config : EngineConfig
        The engine's.
    setup : CudaSetup
        The model and the memory, made from the same configuration; closed with the executor. Tests give it
        the CPU as its device, and run the kernels in Triton's interpreter.
    """

    def __init__(self, config: EngineConfig, setup: CudaSetup) -> None:
        sizes = MemorySizes(setup.num_device_pages, setup.num_host_pages, setup.max_model_len)
        super().__init__(setup.model.config, setup.lora, setup.transfers, sizes)
        is_cuda = setup.device.type == "cuda"
        self._stream = torch.cuda.current_stream(setup.device) if is_cuda else None
        self._config = config
        self._setup = setup
        self._model = setup.model
        self._adapters = AdapterSteps(setup.lora)
        self._kv_layers = setup.kv_layers
        self._inputs = DeviceInputs(
            max_num_seqs=config.max_num_seqs,
            max_num_tokens=config.max_num_batched_tokens,
            max_pages_per_row=-(-setup.max_model_len // config.page_size),
            max_loras=config.max_loras,
            page_size=config.page_size,
            needs_row_pages=self._model.attention_backend.name == "torch",
            num_buffers=MAX_PLANS_IN_FLIGHT,
            device=setup.device,
        )
        self._tokens = torch.zeros(config.max_num_seqs, dtype=torch.int32, device=setup.device)
        self._results = ResultBuffers(config.max_num_seqs, MAX_PLANS_IN_FLIGHT, setup.device)
        self._sampler = DeviceSampler(MAX_PLANS_IN_FLIGHT, setup.device)
        self._uploads = Uploads(MAX_PLANS_IN_FLIGHT, setup.device)
        # One for all steps: a step's logits are read by what follows on the stream, before the next step.
        self._base_logits = torch.empty(
            (config.max_num_seqs, self.vocab_size), dtype=self.model_config.dtype, device=setup.device
        )
        self._pending: deque[PendingStep] = deque()
        self._error: BaseException | None = None
        self._is_closed = False
        self.graphs: DecodeGraphs | None = None
        self.prefill_graphs: PrefillGraphs | None = None
        with self._on_stream(), torch.inference_mode():
            if setup.decode_graph_sizes:
                self.graphs = self._capture_graphs()
            if setup.prefill_graph_sizes:
                self.prefill_graphs = PrefillGraphs(
                    setup.prefill_graph_sizes, self._model, self._kv_layers, self._inputs
                )

    @property
    def padded_batch_sizes(self) -> tuple[int, ...]:
        """Sizes that plans of single tokens are padded to, because there are graphs of them."""
        return self._setup.decode_graph_sizes

    def submit(self, plan: ExecutionPlan, states: Sequence[SamplingState]) -> None:
        """Begin a plan; see `Executor.submit`."""
        if self._is_closed:
            raise InternalError(f"plan {plan.plan_id} was submitted to an executor that is closed")
        if len(self._pending) >= MAX_PLANS_IN_FLIGHT:
            raise InternalError(
                f"plan {plan.plan_id} was submitted while {len(self._pending)} plans are on their way; "
                "collect the oldest first"
            )
        pending = PendingStep(plan, states, logprobs=[None] * len(states))
        self._pending.append(pending)
        try:
            if self._error is not None:
                raise self._error
            with self._on_stream(), torch.inference_mode():
                self._begin(pending)
        except Exception as error:  # For `collect`, in its turn; no plan runs from here on.
            self._error = pending.error = error
        except BaseException as error:  # Ctrl-C: nobody knows how much has been submitted.
            interrupted = InternalError(f"plan {plan.plan_id} was interrupted: {error!r}")
            self._error = pending.error = interrupted
            raise

    def collect(self) -> ExecutionResult:
        """Wait for the oldest plan on its way; see `Executor.collect`."""
        if not self._pending:
            raise InternalError("a result was asked for while no plan is on its way")
        pending = self._pending[0]
        if pending.error is not None:
            raise pending.error
        with self._on_stream():
            token_ids = pending.finish()
            self._pending.popleft()
            transfers = self._transfers.take_reports()
        return ExecutionResult(
            pending.plan.plan_id,
            token_ids,
            pending.logprobs,
            pending.loads.loaded,
            pending.loads.failed,
            pending.row_errors,
            completed_transfer_ids=transfers.completed,
            failed_transfer_ids=transfers.failed,
        )

    def report(self) -> ExecutionResult:
        """Give the copies that have ended since the last result; see `Executor.report`."""
        with self._on_stream():
            return super().report()

    def close(self) -> None:
        """Wait for the device, drop plans that nobody has collected, free KV pages, adapters and graphs.

        Weights, inputs and logits go with the executor.
        """
        if self._is_closed:
            return
        self._is_closed = True
        self._pending.clear()
        try:
            if self._stream is not None:
                with self._on_stream():
                    torch.cuda.synchronize()
        finally:  # Also on a device that has failed.
            self.graphs = None
            self.prefill_graphs = None
            self._kv_layers = []
            self._setup.close()

    def _num_in_flight(self) -> int:
        return len(self._pending)

    def _on_stream(self) -> AbstractContextManager[object]:
        """Make the executor's device and stream the current ones."""
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    # --- One step -----------------------------------------------------------------------------------------

    def _begin(self, pending: PendingStep) -> None:
        """Put a plan on the execution stream.

        Notes
        -----
        Order: drained and evicted adapters are taken off the device, those that it loads brought there,
        copies between the tiers begun, page tables changed, then the forward pass.
        """
        plan, states = pending.plan, pending.states
        if len(states) != len(plan.request_ids):
            raise InternalError(
                f"plan {plan.plan_id} has {len(plan.request_ids)} rows but came with {len(states)} states"
            )
        pending.loads = self._adapters.begin(plan)
        self._transfers.start(plan)
        if not states:
            return
        pending.row_errors = self._adapters.row_errors(plan)
        adapts_more = self.lora.adapts_more_than_layers(plan.adapter_slots)
        step = self._inputs.load(plan, adapts_embedding=adapts_more)
        graphs = self.graphs
        # A chunk of a prompt may be a single token, too; only an eager step gives its log probability.
        may_replay = step.is_decode and not adapts_more and not any(map(awaits_prompt_logprobs, states))
        if may_replay and graphs is not None and graphs.has(len(step.row_failed)):
            self._run_graph(graphs, step, pending)
        else:
            self._run_in_pieces(step, pending)

    def _run_graph(self, graphs: DecodeGraphs, step: DeviceStep, pending: PendingStep) -> None:
        """Replay a decode step; it has chosen the best token of every row as well."""
        logits = graphs.replay(step)
        best = _BestTokens(logits, self._tokens[: len(logits)], step.page_table_rows, step.row_failed)
        self._sample(best, step.host_sampled_rows, step, pending)

    def _run_in_pieces(self, step: DeviceStep, pending: PendingStep) -> None:
        """Run a step whose attention depends on its lengths: what is between, from graphs where there are."""
        plan, states = pending.plan, pending.states
        outputs = self._outputs(step, pending)
        attention_plan = self._model.plan_attention(step.attention, self._kv_layers)
        context = replace(step.context, outputs=outputs)
        graphs = self.prefill_graphs
        if graphs is not None and graphs.has(len(step.token_ids)) and not context.adapts_embedding:
            attended, residual = graphs.run(step, attention_plan)
            hidden = self._model.finish(attended, residual, context)
        else:
            hidden = self._model.forward(step.token_ids, context, self._kv_layers, attention_plan)
        if outputs is None:
            starts = plan.query_start_loc.astype(np.int64)
            pending.row_errors.update(
                fill_prompt_logprobs(plan, states, hidden, starts, self._model.compute_logits)
            )
            hidden = hidden.index_select(0, step.sampled_tokens)
        num_sampled = len(step.host_sampled_rows)
        if num_sampled == 0:
            _, pending.event = self._results.fetch()
            return
        tokens, (page_table_rows, row_failed) = self._tokens[:num_sampled], self._sampled(step)
        logits = self._logits(hidden, step, plan, outputs)
        best = _BestTokens(logits, tokens, page_table_rows, row_failed)
        greedy_sample(best.logits, page_table_rows, row_failed, self._inputs.last_tokens, out=tokens)
        self._sample(best, np.arange(num_sampled), step, pending)

    def _outputs(self, step: DeviceStep, pending: PendingStep) -> StepOutputs | None:
        """The rows that sample, where the last layer should go on with them alone."""
        if not needs_few_outputs(pending.plan, pending.states):
            return None
        has_adapters = step.context.lora is not None and len(step.host_sampled_rows) > 0
        lora = self._lora_of_rows(pending.plan, step) if has_adapters else None
        return StepOutputs(step.sampled_tokens, lora)

    def _run_decode(self, step: DeviceStep, attention: Any) -> Tensor:
        """A decode step as graphs hold it: logits [P, V], and the best tokens in `_tokens`."""
        hidden = self._model.forward(step.token_ids, step.context, self._kv_layers, attention)
        num_rows = len(step.row_failed)
        logits = self._model.compute_base_logits(hidden, out=self._base_logits[:num_rows])
        tokens = self._tokens[:num_rows]
        greedy_sample(logits, step.page_table_rows, step.row_failed, self._inputs.last_tokens, out=tokens)
        return logits

    def _logits(
        self, hidden: Tensor, step: DeviceStep, plan: ExecutionPlan, outputs: StepOutputs | None
    ) -> Tensor:
        """Logits [N, V] of the rows that sample, whose hidden states are [N, H]."""
        if not step.context.adapts_embedding:
            return self._model.compute_base_logits(hidden, out=self._base_logits[: len(hidden)])
        lora = self._lora_of_rows(plan, step) if outputs is None else outputs.lora
        return self._model.compute_logits(hidden, lora)

    def _lora_of_rows(self, plan: ExecutionPlan, step: DeviceStep) -> LoRAMetadata:
        """Group the rows that sample by adapter slot on the host, where they are known; nothing waits."""
        slots = torch.from_numpy(plan.adapter_slots[step.host_sampled_rows])
        on_host = build_lora_metadata(slots, self._config.max_loras)
        tokens = [on_host.token_lora_mapping, on_host.token_indices_sorted_by_lora_ids]
        groups = [on_host.num_tokens_per_lora, on_host.lora_token_start_loc, on_host.active_lora_ids]
        mapping, order, sizes, starts, ids, tiles = self._uploads.upload(
            [array.view(-1).numpy() for array in (*tokens, *groups, on_host.lora_tiles)]
        )
        tiles = tiles.view(on_host.lora_tiles.shape)
        return LoRAMetadata(mapping, order, sizes, starts, ids, tiles, on_host.no_adapter)

    def _sampled(self, step: DeviceStep) -> tuple[Tensor, Tensor]:
        """Page-table row of each row that samples, and whether it has failed before: [N] int32 each."""
        rows = step.sampled_rows
        return step.page_table_rows.index_select(0, rows), step.row_failed.index_select(0, rows)

    def _sample(
        self, best: _BestTokens, places: npt.NDArray[np.int64], step: DeviceStep, pending: PendingStep
    ) -> None:
        """Turn best tokens into those that the rows' parameters ask for, and begin to copy them to the host.

        Parameters
        ----------
        best
            Of at least the rows that sample.
        places
            Where each row that samples stands there.

        Notes
        -----
        Waits for the steps before where a row has penalties or a grammar, for these need the tokens sampled
        so far.
        """
        pending.sampled_rows, pending.token_places = step.host_sampled_rows, places
        rows = step.host_sampled_rows.tolist()
        states = [pending.states[row] for row in rows]
        arrays = [best.tokens]
        if pending.row_errors or not all(state.is_plain_greedy for state in states):
            if any(state.needs_outputs for state in states):
                self._finish_earlier(pending)
            to_sample = RowsToSample(
                places=places.tolist(),
                states=states,
                num_outputs=pending.num_outputs[rows].tolist(),
                failed=[
                    int(place) for place, row in zip(places, rows, strict=True) if row in pending.row_errors
                ],
            )
            logprobs = self._sampler.sample(best.logits, to_sample, best.tokens)
            set_last_tokens(
                best.tokens, best.page_table_rows, best.row_failed, self._inputs.last_tokens, out=best.tokens
            )
            if logprobs is not None:
                pending.logprob_rows = [rows[i] for i in to_sample.with_logprobs()]
                arrays.append(logprobs)
        (pending.tokens, *entries), pending.event = self._results.fetch(*arrays)
        if entries:
            pending.logprob_entries = entries[0]

    def _finish_earlier(self, pending: PendingStep) -> None:
        for earlier in self._pending:
            if earlier is not pending:
                earlier.finish()

    def _capture_graphs(self) -> DecodeGraphs:
        model, inputs, setup = self._model, self._inputs, self._setup

        def make_step(num_rows: int, has_adapters: bool) -> DeviceStep:
            layout = plan_layout(self._config.max_loras, num_rows, num_rows)
            return inputs.decode_step(num_rows, layout, has_adapters=has_adapters)

        def make_attention(num_rows: int) -> Sequence[DecodeGraphAttention]:
            backend, kv_layer = model.attention_backend, self._kv_layers[0]
            return backend.make_decode_graph_states(
                num_rows, kv_layer, model.attention_specs, inputs.page_indices
            )

        return DecodeGraphs(setup.decode_graph_sizes, make_step, make_attention, self._run_decode)
