"""Loads and unloads of adapters: their order, their life cycle, and what their callers are told."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lora_serve.common.errors import (
    AdapterConflictError,
    AdapterNotFoundError,
    CapacityError,
    InternalError,
    LoraServeError,
)
from lora_serve.common.field_checks import check_adapter_weight, check_text
from lora_serve.engine.adapter_log import AdapterLog
from lora_serve.engine.load_queues import LoadQueues, PendingLoad
from lora_serve.engine.messages import LoadAdapterResult, UnloadAdapterResult
from lora_serve.lora.adapter_reader import FolderChange
from lora_serve.lora.loader_threads import LoaderThreads
from lora_serve.lora.registry import AdapterContent, check_adapter_name

if TYPE_CHECKING:
    from lora_serve.executor.adapter_store import AdapterStore
    from lora_serve.lora.adapter_reader import HostAdapter
    from lora_serve.lora.registry import AdapterGeneration, AdapterRegistry
    from lora_serve.scheduler import ExecutionPlan, Scheduler

logger = logging.getLogger(__name__)

NUM_READERS = 2
"""Adapters read at once: one large adapter does not hold up all others, and disks gain little from more.

Those whose files do not come do not count; see `LoaderThreads`.
"""


@dataclass
class _Unload:
    """One unload that waits until these generations are drained."""

    name: str
    waits_for: set[int]
    adapter_ids: list[int]
    caller: Future[UnloadAdapterResult]


def _new_caller() -> Future[Any]:
    caller: Future[Any] = Future()
    caller.set_running_or_notify_cancel()  # A caller that has lost interest cannot cancel; results are kept.
    return caller


class AdapterOperations:
    """Loads and unloads of adapters, as state machines that the step loop moves on.

    A load goes: read by a thread; on the loop: compared with what the name serves, given a generation, opened
    in the scheduler; a plan brings it to the device; its name is published and its callers are answered. When
    the device has no room for it beside the others, its name is published at once: the scheduler brings it in
    when requests want it. From then on it decides alone who is on the device; what comes and goes is of no
    concern here, unless it fails.

    Order
    -----
    - Loads of one name are worked off one after the other. One that asks the same (path and flags) as the
      last one pending joins it if that one's read has not begun: every caller gets what the folder holds
      after the call. Loads of different names do not wait for each other.
    - An unload does not wait for the loads of its name: it cancels them (their callers get
      AdapterConflictError) and drains whatever the name had, also generations that were draining already.
    - A load that comes after an unload starts at once; the generation that drains does not hold it up.

    All methods run on the step loop's thread. Futures are completed on it, between steps.

    Parameters
    ----------
    scheduler, registry, store
        What a load or unload changes.
    abort_requests : callable
        Ends every live request of these generations, for a forced unload or, with the error, a failed load.
    on_read_done : callable
        Called from a reader thread when a read has ended, to wake a loop that waits.
    on_retired : callable
        Told the generation whenever a name that served is taken away without an unload.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        registry: AdapterRegistry,
        store: AdapterStore,
        *,
        abort_requests: Callable[[set[int], LoraServeError | None], None],
        on_read_done: Callable[[], None],
        on_retired: Callable[[int], None],
    ) -> None:
        self._scheduler = scheduler
        self._registry = registry
        self._store = store
        self._log = AdapterLog(registry)
        self._abort_requests = abort_requests
        self._on_read_done = on_read_done
        self._on_retired = on_retired
        self._readers = LoaderThreads(NUM_READERS, "lora-serve-reader")
        self._loads = LoadQueues()
        self._unloads: list[_Unload] = []

    @property
    def has_finished_reads(self) -> bool:
        """True when `poll` has something to do."""
        return any(load.read is not None and load.read.done() for load in self._loads.heads)

    # --- Calls --------------------------------------------------------------------------------------------

    def load(
        self, name: str, path: str, *, load_inplace: bool, pinned: bool, weight: float
    ) -> Future[LoadAdapterResult]:
        """Begin a load; see `EngineCore.load_adapter`, and the class for its order.

        All errors come through the future.
        """
        caller: Future[LoadAdapterResult] = _new_caller()
        try:
            check_text("lora_name", name)
            check_adapter_name(name)
            check_text("lora_path", path)
            check_adapter_weight(weight)
        except LoraServeError as error:
            caller.set_exception(error)
            return caller
        load = PendingLoad(name, path, load_inplace, pinned, weight, [caller])
        if self._loads.add(load):
            self._start_read(load)
        return caller

    def unload(self, name: str, *, force: bool) -> Future[UnloadAdapterResult]:
        """Retire a name now, and complete when nothing of its generations is left.

        As `EngineCore.unload_adapter`. All errors come through the future.
        """
        caller: Future[UnloadAdapterResult] = _new_caller()
        loads = self._loads.pop_all(name)
        if not loads and self._registry.find(name) is None:
            caller.set_exception(
                AdapterNotFoundError(f"adapter {name!r} is not loaded, so it cannot be unloaded")
            )
            return caller
        self._cancel(loads)
        if self._registry.find(name) is not None:
            self._log.retired(self._registry.retire(name), force=force)
        adapter_ids = [g.adapter_id for g in self._registry.generations() if g.name == name]
        for adapter_id in adapter_ids:
            self._scheduler.drain_adapter(adapter_id)
        self._unloads.append(_Unload(name, set(adapter_ids), adapter_ids, caller))
        if force:
            self._abort_requests(set(adapter_ids), None)
        self._complete_unloads()
        return caller

    # --- What the step loop reports -----------------------------------------------------------------------

    def poll(self) -> None:
        """Take up the reads that have ended, what has changed in host memory, and read ahead.

        Notes
        -----
        Once a step, before its plan: what is on the host now is there when the plan loads it.
        """
        news = self._store.poll(self._scheduler)
        self._log.evicted_from_host(news.evicted)
        for adapter_id in news.evicted:
            self._scheduler.set_adapter_staged(adapter_id, False)
        self._log.read_again(news.arrived)
        for adapter_id in news.arrived:
            self._scheduler.set_adapter_staged(adapter_id, True)
        if news.failed:
            self.before_failed(news.failed)
            self.on_failed(news.failed)
        for load in self._loads.heads:
            if load.read is not None and load.read.done():
                self._on_read(load)

    def before_plan(self, plan: ExecutionPlan) -> None:
        """A plan is about to be submitted: get ready what it loads."""
        self._log.taken_off(plan.evicted_adapter_ids.tolist())
        self._store.prepare_loads(plan.load_adapter_ids.tolist())

    def on_loaded(self, adapter_ids: Sequence[int]) -> None:
        """Loads of plans are on the device: publish the names of those that are new, and answer."""
        self._log.brought_in(adapter_ids)
        for adapter_id in adapter_ids:
            load = self._loads.find(adapter_id)
            # Brought in again for requests that waited; or cancelled by an unload, and draining.
            if load is not None and load.generation is not None:
                self._publish(load, load.generation)

    def before_failed(self, failures: dict[int, str]) -> None:
        """Loads of plans, or reads from disk, have failed: end their requests before the scheduler hears.

        Rows of the same plan may have used the adapter already; what they gave means nothing.
        """
        for adapter_id, reason in failures.items():
            generation = self._registry.get(adapter_id)
            error = self._failed_load_error(generation, reason)
            logger.error("%s", error)
            if self._registry.find(generation.name) is generation:
                self._registry.retire(generation.name)
                self._on_retired(adapter_id)
            self._abort_requests({adapter_id}, error)

    def on_failed(self, failures: dict[int, str]) -> None:
        """They have failed, and the scheduler knows: the generation goes, and its callers hear."""
        for adapter_id, reason in failures.items():
            self._scheduler.drain_adapter(adapter_id)
            load = self._loads.find(adapter_id)
            if load is not None:
                self._answer(load, self._failed_load_error(self._registry.get(adapter_id), reason))

    def _failed_load_error(self, generation: AdapterGeneration, reason: str) -> LoraServeError:
        message = f"adapter {generation.name!r} could not be brought to the device: {reason}"
        return AdapterConflictError(message) if isinstance(reason, FolderChange) else InternalError(message)

    def on_drained(self, adapter_ids: Sequence[int]) -> None:
        """The executor has taken these generations off the device, and the scheduler has forgotten them."""
        self._log.gone(adapter_ids)
        for adapter_id in adapter_ids:
            self._store.remove(adapter_id)
            self._registry.forget(adapter_id)
            for unload in self._unloads:
                unload.waits_for.discard(adapter_id)
        self._complete_unloads()

    def close(self, error: LoraServeError) -> None:
        """Fail every caller and end the reader threads (a read that runs is not waited for)."""
        loads, unloads = self._loads.clear(), self._unloads
        self._unloads = []
        self._readers.close()
        for load in loads:
            load.drop_read()
            load.answer(error)
        for unload in unloads:
            unload.caller.set_exception(error)

    # --- One load -----------------------------------------------------------------------------------------

    def _start_read(self, load: PendingLoad) -> None:
        is_cancelled = load.is_cancelled.is_set
        load.read = self._readers.submit(self._store.read, load.path, load.name, is_cancelled)
        load.read.add_done_callback(lambda _: self._on_read_done())

    def _on_read(self, load: PendingLoad) -> None:
        assert load.read is not None
        read, load.read = load.read, None
        try:
            with read.result() as adapter:
                result = self._compare_with_serving(load, adapter)
                if result is None:
                    self._open_generation(load, adapter)
        except CapacityError as error:
            self._answer(load, CapacityError(f"adapter {load.name!r} is refused: {error}"))
        except LoraServeError as error:
            self._answer(load, error)
        except Exception as error:
            logger.exception("reading adapter %r from %r failed", load.name, load.path)
            reason = f"{type(error).__name__}: {error}"
            self._answer(
                load,
                InternalError(f"adapter {load.name!r} could not be read from {load.path!r}: {reason}"),
            )
        else:
            if result is not None:
                self._answer(load, result)

    def _compare_with_serving(self, load: PendingLoad, adapter: HostAdapter) -> LoadAdapterResult | None:
        serving = self._registry.find(load.name)
        if serving is None:
            return None
        if serving.content_digest == adapter.content_digest:
            if serving.pinned != load.pinned:
                self._scheduler.set_adapter_pinned(serving.adapter_id, load.pinned)
            if serving.weight != load.weight:
                self._scheduler.set_adapter_weight(serving.adapter_id, load.weight)
            serving = self._registry.set_sharing(serving.adapter_id, pinned=load.pinned, weight=load.weight)
            return self._make_result(serving, already_loaded=True)
        if not load.load_inplace:
            raise AdapterConflictError(
                f"adapter {load.name!r} is loaded from {serving.path!r} with other content than "
                f"{load.path!r}; set load_inplace to replace it, or unload it first"
            )
        return None

    def _open_generation(self, load: PendingLoad, adapter: HostAdapter) -> None:
        content = AdapterContent(
            path=adapter.path,
            content_digest=adapter.content_digest,
            num_bytes=adapter.num_bytes,
            lora_rank=adapter.lora_rank,
        )
        generation = self._registry.new_generation(load.name, content, pinned=load.pinned, weight=load.weight)
        try:
            self._store.add(generation.adapter_id, adapter)
            try:
                is_loading = self._scheduler.open_adapter(
                    generation.adapter_id,
                    digest_seed=generation.digest_seed,
                    size_bytes=self._store.charged_bytes(adapter),
                    weight=generation.weight,
                    is_pinned=generation.pinned,
                    is_staged=self._store.is_on_host(generation.adapter_id),
                )
            except BaseException:
                self._store.remove(generation.adapter_id)
                raise
        except BaseException:
            self._registry.forget(generation.adapter_id)
            raise
        self._log.opened(generation, adapter)
        if is_loading:
            load.generation = generation
        else:
            self._publish(load, generation)

    def _publish(self, load: PendingLoad, generation: AdapterGeneration) -> None:
        """Let the name stand for the generation from now on, and answer the load."""
        old = self._registry.publish(generation)
        self._log.published(generation, old)
        if old is not None:
            self._scheduler.drain_adapter(old.adapter_id)
        self._answer(load, self._make_result(generation, already_loaded=False))

    def _make_result(self, generation: AdapterGeneration, *, already_loaded: bool) -> LoadAdapterResult:
        return LoadAdapterResult(
            name=generation.name,
            adapter_id=generation.adapter_id,
            content_digest=generation.content_digest,
            already_loaded=already_loaded,
        )

    def _answer(self, load: PendingLoad, outcome: LoadAdapterResult | LoraServeError) -> None:
        """End the first load of a name, and begin the next one."""
        next_load = self._loads.pop_head(load.name)
        if next_load is not None:
            self._start_read(next_load)
        load.answer(outcome)

    def _cancel(self, loads: list[PendingLoad]) -> None:
        for load in loads:
            load.drop_read()
            load.answer(
                AdapterConflictError(
                    f"the load of adapter {load.name!r} from {load.path!r} was cancelled by an unload of the "
                    "name; load it again if it is still wanted"
                )
            )

    def _complete_unloads(self) -> None:
        done = [unload for unload in self._unloads if not unload.waits_for]
        self._unloads = [unload for unload in self._unloads if unload.waits_for]
        for unload in done:
            unload.caller.set_result(UnloadAdapterResult(name=unload.name, adapter_ids=unload.adapter_ids))
