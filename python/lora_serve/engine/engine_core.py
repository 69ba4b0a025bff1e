"""The engine: requests and adapter operations in, scheduler steps through, tokens out."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

import msgspec

from lora_serve.common.config import EngineConfig
from lora_serve.common.errors import (
    InternalError,
    InvalidArgumentError,
    LoraServeError,
)
from lora_serve.engine.adapter_operations import AdapterOperations
from lora_serve.engine.admission import Admission, check_can_ever_fit
from lora_serve.engine.grammar_compiler import GrammarCompiler
from lora_serve.engine.isolation import group_of
from lora_serve.engine.kv_event_messages import NamedEvent
from lora_serve.engine.kv_event_publisher import KVEventPublisher
from lora_serve.engine.live_requests import LiveRequest, LiveRequests
from lora_serve.engine.loop_times import LoopTimes
from lora_serve.engine.messages import (
    AdmissionResult,
    EngineOutput,
    EngineRequest,
    LoadAdapterResult,
    ModelInfo,
    UnloadAdapterResult,
)
from lora_serve.engine.model_choice import choose_device, make_model_executor
from lora_serve.engine.scheduler_options import make_scheduler_options
from lora_serve.engine.snapshots import AdapterListing, make_stats
from lora_serve.engine.status import AdapterInfo, EngineStats
from lora_serve.engine.step_loop import StepLoop
from lora_serve.executor.executor import MAX_PLANS_IN_FLIGHT
from lora_serve.executor.uniform_stream import SeedStream
from lora_serve.lora.registry import AdapterRegistry
from lora_serve.scheduler import Scheduler

if TYPE_CHECKING:
    from lora_serve.executor.executor import Executor

logger = logging.getLogger(__name__)


def _monotonic_us() -> int:
    return time.monotonic_ns() // 1000


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
    clock_us : callable
        Gives microseconds, never going back: all that the scheduler knows of time.

    Raises
    ------
    InvalidArgumentError
        The configuration does not fit the model, or the model cannot be loaded.

    Attributes
    ----------
    config : EngineConfig
        As given, but with the chosen device where the model was loaded here.
    admission : Admission
        For a caller that holds requests before it adds them.
    on_retired : callable
        For a caller that keeps what is loaded: told the generation, on the thread that calls `step`, whenever
        a name that served is taken away without an unload, because its weights could not be brought back.
    """

    def __init__(
        self,
        config: EngineConfig,
        executor: Executor | None = None,
        *,
        on_read_done: Callable[[], None] | None = None,
        clock_us: Callable[[], int] = _monotonic_us,
    ) -> None:
        if executor is None:
            config = msgspec.structs.replace(config, device=choose_device(config.device))
            executor = make_model_executor(config)
        self.config = config
        self._clock_us = clock_us
        self._has_news = threading.Event()
        self._on_read_done = on_read_done or (lambda: None)
        self.on_retired: Callable[[int], None] = lambda _: None
        self._executor = executor
        self._executor.lora.set_wake(self._wake)
        self._scheduler = Scheduler(make_scheduler_options(config, self._executor))
        self._kv_events = self._start_kv_events()
        self._registry = AdapterRegistry()
        self._operations = AdapterOperations(
            self._scheduler,
            self._registry,
            self._executor.lora,
            abort_requests=self._abort_adapter_requests,
            on_read_done=self._wake,
            on_retired=self._tell_retired,
        )
        self._grammars = GrammarCompiler(
            config.model, self._executor.vocab_size, self._executor.eos_token_ids
        )
        self._requests = LiveRequests()
        self._outputs: list[EngineOutput] = []
        self._seeds = SeedStream(config.seed)
        self._failure: str | None = None
        self._loop = StepLoop(
            self._scheduler,
            self._executor,
            self._requests,
            self._operations,
            emit=self._emit,
            fail_request=self._fail_request,
            max_in_flight=MAX_PLANS_IN_FLIGHT if config.async_scheduling else 1,
        )
        self.admission = Admission(self._scheduler, self._registry, self._requests, self._loop.throughput)

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
    def is_stalled(self) -> bool:
        """True when the last step could do nothing: do not step again before a moment has passed."""
        return self._loop.is_stalled

    @property
    def now_us(self) -> int:
        """Time as the scheduler knows it."""
        return self._clock_us()

    @property
    def num_steps(self) -> int:
        """Plans made so far."""
        return self._loop.num_steps

    @property
    def loop_times(self) -> LoopTimes:
        """What recent steps took without the model."""
        return self._loop.times

    def wait_for_news(self, timeout_s: float) -> None:
        """Wait until a thread that reads adapters has something for `step`, or until the time is over.

        For a caller without other work. What has come since the last call is news.
        """
        self._has_news.wait(timeout_s)
        self._has_news.clear()

    def adapters(self) -> list[AdapterInfo]:
        """Every generation that exists, by adapter id: serving, being installed, or draining."""
        listing = self.list_adapters(num_at_once=len(self._registry.generations()))
        listing.go_on()
        return listing.infos

    def list_adapters(self, num_at_once: int) -> AdapterListing:
        """The same, so many at a time, for a caller that makes steps in between."""
        self._require_running()
        return AdapterListing(self._registry, self._scheduler.stats(), self._executor.lora, num_at_once)

    def stats(self) -> EngineStats:
        """Counts over all adapters and the base model."""
        self._require_running()
        return make_stats(
            self._scheduler.stats(), self._loop, self._executor.lora, self._kv_events, self.admission
        )

    # --- Requests -----------------------------------------------------------------------------------------

    def load_vocabulary(self) -> None:
        """Read the tokenizer that grammars are compiled for, before requests come that would wait for it.

        Where there is none, the log says so, and requests for an answer of a given form are refused.
        """
        try:
            self._grammars.load()
        except InvalidArgumentError as error:
            logger.warning("answers cannot be given a form: %s", error)

    def prepare_grammars(self, requests: Sequence[EngineRequest]) -> list[Future[Any]]:
        """Begin to compile the grammars of requests that are to be added.

        Returns
        -------
        list of Future
            Whoever waits for them before `add_requests`, which raises what has failed, does not keep the loop
            waiting; empty = nothing is to be compiled.
        """
        self._require_running()
        # Of those whose key has a group, it waits for its own slow forms; of others, the adapter's users do.
        owner = group_of(requests[0].isolation_domain) or requests[0].lora_name
        return self._grammars.prepare([request.form for request in requests], owner)

    def add_request(self, request: EngineRequest) -> AdmissionResult:
        """Accept one request; as `add_requests`."""
        return self.add_requests([request])

    def add_requests(
        self, requests: Sequence[EngineRequest], arrival_us: int | None = None
    ) -> AdmissionResult:
        """Accept requests that name the same adapter, all or none of them, under its newest generation.

        Parameters
        ----------
        requests : sequence of EngineRequest
            At least one; the `n` answers of a prompt.
        arrival_us : int or None
            When they came, where a caller has held them, for their turn and their time-out; None = now.

        Raises
        ------
        AdapterNotFoundError
            The name does not serve.
        InvalidArgumentError
            A field is wrong, a grammar cannot be compiled, or an id is in use.
        CapacityError
            A limit on what waits is reached: `retry_after_s` estimates when another try is worth it. Or
            these requests exceed one by themselves: then it is None.
        InternalError
            The engine has stopped.
        """
        self._require_running()
        names = {request.lora_name for request in requests}
        if len(names) != 1:
            raise InvalidArgumentError(f"requests added together name the adapters {names} but must name one")
        result = self.admission.resolve(requests[0].lora_name)
        adapter_id = result.adapter_id
        eos_token_ids, vocab_size = self._executor.eos_token_ids, self._executor.vocab_size
        live = [
            LiveRequest.create(
                request,
                adapter_id,
                eos_token_ids,
                vocab_size,
                self._grammars.matcher(request.form),
            )
            for request in requests
        ]
        check_can_ever_fit(self._scheduler.options, requests)
        if arrival_us is None:
            arrival_us = self._clock_us()
        self.admission.add_all(requests, adapter_id, arrival_us)
        for one in live:
            one.give_seed(self._seeds)
            one.arrival_us = arrival_us
            self._requests.add(one)
        if adapter_id != 0:
            self._executor.lora.touch(adapter_id)
        return result

    def abort(self, request_id: int) -> bool:
        """End a request, which gets a last output with finish_reason 'abort'; False when it is not live."""
        return self._end(request_id, error=None, tell=True)

    def finish_request(self, request_id: int) -> bool:
        """End a request that its reader has already ended, at a stop string: no output. False if not live."""
        return self._end(request_id, error=None, tell=False)

    # --- Adapters -----------------------------------------------------------------------------------------

    def load_adapter(
        self,
        name: str,
        path: str,
        *,
        load_inplace: bool = False,
        pinned: bool = False,
        weight: float = 1.0,
    ) -> Future[LoadAdapterResult]:
        """Begin to load an adapter; the future completes when it is ready to serve.

        It is ready when it is on the device, or, where there is no room for it beside the others, when it
        can be brought in as soon as requests want it. With the content that `name` serves already, only
        `pinned` and `weight` are taken over, either way.

        Parameters
        ----------
        name, path : str
            What to call it, and its PEFT directory.
        load_inplace : bool
            Replace what the name serves when its content differs: new requests get the new generation once
            it is ready, and the old one drains.
        pinned : bool
            Keep it on the device.
        weight : float
            Its share of the steps beside other adapters under the policy 'fair', in (0, 1000].

        Raises in the future
        --------------------
        InvalidArgumentError
            The name is no adapter name, the weight is out of range, or the files cannot be applied exactly or
            may not be read.
        AdapterConflictError
            The name serves other content and `load_inplace` is not set, or an unload cancelled the load.
        CapacityError
            It can never be on the device beside the pinned adapters, or pinned beside others that are open.
        InternalError
            The weights could not be brought to the device, or the engine has stopped.
        """
        if self._failure is not None:
            return self._make_failed()
        return self._operations.load(name, path, load_inplace=load_inplace, pinned=pinned, weight=weight)

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
        """Take up finished reads, make one plan, take the result of the oldest that runs, give what is new.

        Returns
        -------
        list of EngineOutput
            At most one output a request, plus those of aborts since the last step. Empty when there was
            nothing to do, and when a first plan was made and its result will come with a later step.

        Notes
        -----
        Never raises: see `failure`.
        """
        if self._failure is None:
            with self._stop_on_failure(), self._loop.times.step():
                self._operations.poll()
                self._loop.step(self._clock_us())
                if self._kv_events is not None:
                    self._publish_kv_events(self._kv_events)
        outputs, self._outputs = self._outputs, []
        return outputs

    def settle(self) -> None:
        """Take the results of the plans in flight without making another one; what is new waits for `step`.

        For a caller that pauses: afterwards nothing runs, and what has ended is accounted for.
        """
        while self._failure is None and self._loop.num_in_flight:
            with self._stop_on_failure():
                self._loop.take_oldest()
                if self._kv_events is not None:
                    self._publish_kv_events(self._kv_events)

    def close(self) -> None:
        """Stop, fail what is in flight, and free the executor. Closing twice changes nothing."""
        if self._failure is None:
            self._stop("it was closed")
        if self._kv_events is not None:
            self._kv_events.close()
        self._grammars.close()
        self._executor.close()

    @contextlib.contextmanager
    def _stop_on_failure(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            logger.exception("the engine stops: a step failed; plans: %s", self._loop.describe())
            self._stop(f"a step failed: {type(error).__name__}: {error}")

    def _start_kv_events(self) -> KVEventPublisher | None:
        config = self.config.kv_events_config
        if config is None or not config.is_on:
            return None
        publisher = KVEventPublisher(config, self.config.page_size)
        self._scheduler.set_events_enabled(True)
        return publisher

    def _publish_kv_events(self, publisher: KVEventPublisher) -> None:
        """Hand over what the step has changed in the cache; names are resolved now, while they are known."""
        events = []
        for event in self._scheduler.take_events():
            if event.is_private:
                continue  # A router would count the pages as everybody's.
            name = None
            if event.is_stored and event.adapter_id != 0:
                if event.adapter_id is None:
                    continue  # Of nobody that the registry knows: no router could send requests there.
                name = self._registry.get(event.adapter_id).name
            events.append(NamedEvent(event, name))
        if events:
            publisher.publish(events)

    def _wake(self) -> None:
        self._has_news.set()
        self._on_read_done()

    def _tell_retired(self, adapter_id: int) -> None:
        self.on_retired(adapter_id)

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

    def _fail_request(self, request_id: int, error: LoraServeError) -> None:
        self._end(request_id, error=error, tell=True)

    def _emit(self, output: EngineOutput) -> None:
        self._outputs.append(output)

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
