"""The engine: requests and adapter operations in, scheduler steps through, tokens out."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

import numpy as np

from lora_serve.common.config import EngineConfig
from lora_serve.common.errors import InternalError, InvalidArgumentError, LoraServeError
from lora_serve.engine.adapter_operations import AdapterOperations
from lora_serve.engine.live_requests import LiveRequest, LiveRequests
from lora_serve.engine.messages import (
    AdapterInfo,
    AdmissionResult,
    EngineOutput,
    EngineRequest,
    EngineStats,
    LoadAdapterResult,
    ModelInfo,
    UnloadAdapterResult,
)
from lora_serve.engine.snapshots import describe_plan, make_adapter_infos, make_stats
from lora_serve.lora.registry import AdapterRegistry
from lora_serve.scheduler import ExecutionEvent, NewRequest, Scheduler, SchedulerOptions

if TYPE_CHECKING:
    from lora_serve.executor.executor import ExecutionResult, Executor
    from lora_serve.lora.peft_adapter import HostAdapter
    from lora_serve.scheduler import ExecutionPlan

logger = logging.getLogger(__name__)


def _make_model_executor(config: EngineConfig) -> Executor:
    from lora_serve.executor.model_executor import ModelExecutor

    return ModelExecutor(config)


class EngineCore:
    """One engine: it owns the scheduler, the executor, the adapter names and the threads that read adapters.

    Single-threaded: one thread calls everything, and `step` moves everything on. Calls never wait: adapter
    operations give futures, which `step` (or the call itself) completes on the same thread. Only the reading
    of adapter files runs elsewhere, and the loop looks at nothing but finished reads.

    An exception in a step is a bug: the engine stops for good, every live request gets an output with the
    error, every pending operation fails, and `failure` says why. Errors of one request or one adapter (a row
    without finite logits, a load that fails) end only what they concern.

    Parameters
    ----------
    config : EngineConfig
        What to run.
    executor : Executor or None
        Runs the plans; None = the model of `config`, which is loaded now. Closed with the engine.
    on_read_done : callable or None
        Called from another thread when `step` has something to take up, to wake a loop that waits.

    Raises
    ------
    InvalidArgumentError
        The configuration does not fit the model, or the model cannot be loaded.

    Attributes
    ----------
    config : EngineConfig
        As given.
    num_steps : int
        Plans executed so far.
    """

    def __init__(
        self,
        config: EngineConfig,
        executor: Executor | None = None,
        *,
        on_read_done: Callable[[], None] | None = None,
    ) -> None:
        self.config = config
        self._executor = _make_model_executor(config) if executor is None else executor
        self._scheduler = Scheduler(
            SchedulerOptions(
                page_size=config.page_size,
                num_device_pages=self._executor.num_device_pages,
                max_num_seqs=config.max_num_seqs,
                max_num_batched_tokens=config.max_num_batched_tokens,
                max_model_len=self._executor.max_model_len,
                max_loras=config.max_loras,
                enable_prefix_caching=config.enable_prefix_caching,
                num_host_pages=self._executor.num_host_pages,
                write_policy=config.kv_write_policy,
            )
        )
        self._registry = AdapterRegistry()
        self._operations = AdapterOperations(
            self._scheduler,
            self._registry,
            self._executor.lora,
            abort_requests=self._abort_adapter_requests,
            on_read_done=on_read_done or (lambda: None),
        )
        self._requests = LiveRequests()
        self._outputs: list[EngineOutput] = []
        self.num_steps = 0
        self._num_recomputed_tokens = 0
        self._failure: str | None = None

    # --- State --------------------------------------------------------------------------------------------

    @property
    def model_info(self) -> ModelInfo:
        """The limits that requests are checked against."""
        return ModelInfo(
            model=self.config.model,
            max_model_len=self._executor.max_model_len,
            vocab_size=self._executor.vocab_size,
            eos_token_ids=list(self._executor.eos_token_ids),
            page_size=self.config.page_size,
            num_device_pages=self._executor.num_device_pages,
            num_host_pages=self._executor.num_host_pages,
            max_num_seqs=self.config.max_num_seqs,
            max_loras=self.config.max_loras,
        )

    @property
    def failure(self) -> str | None:
        """Why the engine has stopped; None while it runs."""
        return self._failure

    @property
    def has_work(self) -> bool:
        """True when `step` has something to do now; reads that still run are none of its work."""
        if self._outputs:
            return True
        return self._failure is None and (self._scheduler.has_work or self._operations.has_finished_reads)

    @property
    def pending_reads(self) -> list[Future[HostAdapter]]:
        """Adapter reads that `step` has not taken up, for a caller without other work to wait for."""
        return self._operations.pending_reads

    def adapters(self) -> list[AdapterInfo]:
        """Every generation that exists, by adapter id: serving, being installed, or draining."""
        self._require_running()
        return make_adapter_infos(self._registry, self._scheduler.stats(), self._executor.lora.snapshot())

    def stats(self) -> EngineStats:
        """Counts over all adapters and the base model."""
        self._require_running()
        return make_stats(self._scheduler.stats(), self.num_steps, self._num_recomputed_tokens)

    # --- Requests -----------------------------------------------------------------------------------------

    def add_request(self, request: EngineRequest) -> AdmissionResult:
        """Accept one request; as `add_requests`."""
        return self.add_requests([request])

    def add_requests(self, requests: Sequence[EngineRequest]) -> AdmissionResult:
        """Accept requests that name the same adapter, all or none of them, under its newest generation.

        Parameters
        ----------
        requests : sequence of EngineRequest
            At least one; the `n` answers of a prompt.

        Raises
        ------
        AdapterNotFoundError
            The name does not serve.
        InvalidArgumentError
            A field is wrong, or an id is in use.
        CapacityError
            A request can never fit.
        InternalError
            The engine has stopped.
        """
        self._require_running()
        names = {request.lora_name for request in requests}
        if len(names) != 1:
            raise InvalidArgumentError(f"requests added together name the adapters {names} but must name one")
        name = requests[0].lora_name
        generation = None if name is None else self._registry.resolve(name)
        adapter_id = 0 if generation is None else generation.adapter_id
        eos_token_ids, vocab_size = self._executor.eos_token_ids, self._executor.vocab_size
        live = [LiveRequest.create(request, adapter_id, eos_token_ids, vocab_size) for request in requests]
        added: list[int] = []
        try:
            for request in requests:
                self._scheduler.add_request(_to_new_request(request, adapter_id))
                added.append(request.request_id)
        except LoraServeError:
            for request_id in added:
                self._scheduler.abort(request_id)
            raise
        for one in live:
            self._requests.add(one)
        return AdmissionResult(
            adapter_id=adapter_id, content_digest="" if generation is None else generation.content_digest
        )

    def abort(self, request_id: int) -> bool:
        """End a request, which gets a last output with finish_reason 'abort'; False when it is not live."""
        return self._end(request_id, error=None, tell=True)

    def finish_request(self, request_id: int) -> bool:
        """End a request that its reader has already ended, at a stop string: no output. False if not live."""
        return self._end(request_id, error=None, tell=False)

    # --- Adapters -----------------------------------------------------------------------------------------

    def load_adapter(
        self, name: str, path: str, *, load_inplace: bool = False, pinned: bool = False
    ) -> Future[LoadAdapterResult]:
        """Begin to load an adapter; the future completes when it is ready to serve.

        With the content that `name` serves already, nothing changes. With other content, `load_inplace` is
        needed: new requests then get the new generation once it is on the device, and the old one drains.

        Raises in the future
        --------------------
        InvalidArgumentError
            The name is none, or the files cannot be applied exactly or may not be read.
        AdapterConflictError
            The name serves other content and `load_inplace` is not set, or an unload cancelled the load.
        InternalError
            The weights could not be brought to the device, or the engine has stopped.
        """
        if self._failure is not None:
            return self._make_failed()
        return self._operations.load(name, path, load_inplace=load_inplace, pinned=pinned)

    def unload_adapter(self, name: str, *, force: bool = False) -> Future[UnloadAdapterResult]:
        """Refuse newcomers now; the future completes when nothing of the adapter is left.

        Its requests run to their end, or are aborted with `force`. Loads of the name that are pending are
        cancelled.

        Raises in the future
        --------------------
        AdapterNotFoundError
            The name does not serve and no load of it is pending.
        InternalError
            The engine has stopped.
        """
        if self._failure is not None:
            return self._make_failed()
        return self._operations.unload(name, force=force)

    def serves(self, name: str, path: str) -> bool:
        """True when new requests for `name` get what was read from the directory `path`."""
        generation = self._registry.find(name)
        return generation is not None and generation.path == os.path.realpath(path)

    # --- The loop -----------------------------------------------------------------------------------------

    def step(self) -> list[EngineOutput]:
        """Take up finished reads, run one plan, and give what is new.

        Returns
        -------
        list of EngineOutput
            At most one output a request, plus those of aborts since the last step. Empty when there was
            nothing to do.

        Notes
        -----
        Never raises: see `failure`.
        """
        if self._failure is None:
            plan: ExecutionPlan | None = None
            try:
                self._operations.poll()
                plan = self._scheduler.next_plan(time.monotonic_ns() // 1000)
                if plan.is_empty:
                    self._take_copies()
                else:
                    self._run(plan)
            except Exception as error:
                logger.exception("the engine stops: a step failed; plan: %s", describe_plan(plan))
                self._stop(f"a step failed: {type(error).__name__}: {error}")
        outputs, self._outputs = self._outputs, []
        return outputs

    def close(self) -> None:
        """Stop, fail what is in flight, and free the executor. Closing twice changes nothing."""
        if self._failure is None:
            self._stop("it was closed")
        self._executor.close()

    # --- One plan -----------------------------------------------------------------------------------------

    def _run(self, plan: ExecutionPlan) -> None:
        rows = [self._requests[request_id] for request_id in plan.request_ids.tolist()]
        result = self._executor.execute(plan, [live.state for live in rows])
        self.num_steps += 1
        is_finished = self._take_rows(plan, result, rows)
        sampled_token_ids = result.sampled_token_ids.copy()
        for row in result.row_errors:  # Aborted by now; the scheduler wants a token and drops it.
            sampled_token_ids[row] = 0 if plan.samples_token[row] else -1
        self._scheduler.advance(
            ExecutionEvent(
                plan_id=plan.plan_id,
                sampled_token_ids=sampled_token_ids,
                is_finished=is_finished,
                loaded_adapter_ids=result.loaded_adapter_ids,
                failed_adapter_ids=list(result.failed_adapter_ids),
                completed_transfer_ids=result.completed_transfer_ids,
                failed_transfer_ids=list(result.failed_transfer_ids),
            )
        )
        self._operations.on_drained(plan.drained_adapter_ids.tolist())
        self._operations.on_loaded(result.loaded_adapter_ids)
        self._operations.on_failed(result.failed_adapter_ids)

    def _take_copies(self) -> None:
        """Report copies that have ended while there was no plan: everything may wait for them."""
        result = self._executor.report_copies()
        if result.completed_transfer_ids or result.failed_transfer_ids:
            self._scheduler.advance(
                ExecutionEvent(
                    plan_id=result.plan_id,
                    completed_transfer_ids=result.completed_transfer_ids,
                    failed_transfer_ids=list(result.failed_transfer_ids),
                )
            )

    def _take_rows(
        self, plan: ExecutionPlan, result: ExecutionResult, rows: list[LiveRequest]
    ) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
        """Turn sampled tokens into outputs, end what ends; [B] uint8, 1 = ended by a stop token."""
        is_finished = np.zeros(len(rows), dtype=np.uint8)
        samples = plan.samples_token.tolist()
        progress = zip(
            plan.num_cached_tokens.tolist(),
            plan.num_computed_tokens.tolist(),
            plan.num_scheduled_tokens.tolist(),
            strict=True,
        )
        for row, (live, counts) in enumerate(zip(rows, progress, strict=True)):
            self._num_recomputed_tokens += live.note_scheduled(*counts)
            if row in result.row_errors:
                error = InternalError(f"the request failed: {result.row_errors[row]}")
                self._end(live.request_id, error=error, tell=True)
            elif samples[row]:
                output = live.take_token(int(result.sampled_token_ids[row]), result.logprobs[row])
                self._outputs.append(output)
                if output.finish_reason is not None:
                    self._requests.pop(live.request_id)
                    is_finished[row] = output.finish_reason == "stop"
        return is_finished

    # --- Ends ---------------------------------------------------------------------------------------------

    def _end(self, request_id: int, *, error: LoraServeError | None, tell: bool) -> bool:
        live = self._requests.pop(request_id)
        if live is None:
            return False
        if self._failure is None:
            self._scheduler.abort(request_id)
        if tell:
            self._outputs.append(live.make_abort(error))
        return True

    def _abort_adapter_requests(self, adapter_ids: set[int], error: LoraServeError | None) -> None:
        for request_id in self._requests.find_by_adapter(adapter_ids):
            self._end(request_id, error=error, tell=True)

    def _require_running(self) -> None:
        if self._failure is not None:
            raise InternalError(self._failure)

    def _make_failed(self) -> Future[Any]:
        caller: Future[Any] = Future()
        caller.set_exception(InternalError(self._failure))
        return caller

    def _stop(self, reason: str) -> None:
        """Stop for good. The scheduler is not touched any more: it may be what is broken."""
        self._failure = f"the engine has stopped: {reason}; see its log, and start it again"
        error = InternalError(self._failure)
        for request_id in self._requests.ids:
            self._end(request_id, error=error, tell=True)
        self._operations.close(error)


def _to_new_request(request: EngineRequest, adapter_id: int) -> NewRequest:
    params = request.sampling_params
    if params.max_tokens is None:
        raise InvalidArgumentError(
            f"request {request.request_id} has no max_tokens but the engine needs it; use InputProcessor"
        )
    return NewRequest(
        request_id=request.request_id,
        adapter_id=adapter_id,
        prompt_token_ids=request.prompt_token_ids,
        max_tokens=params.max_tokens,
        reuse_prefix=params.prompt_logprobs is None,
    )
