"""Requests on their way into the scheduler: together or not at all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lora_serve.common.errors import CapacityError, InvalidArgumentError, QueueTimeoutError
from lora_serve.engine.live_requests import LiveRequests
from lora_serve.engine.messages import AdmissionResult, EngineRequest
from lora_serve.engine.throughput import Throughput
from lora_serve.lora.registry import AdapterRegistry
from lora_serve.scheduler import NewRequest, Scheduler, SchedulerOptions

if TYPE_CHECKING:
    from lora_serve.engine.waiting_for_grammars import HeldCounts


def check_can_ever_fit(options: SchedulerOptions, requests: Sequence[EngineRequest]) -> None:
    """Refuse requests that exceed a limit by themselves: no waiting would help them.

    Raises
    ------
    CapacityError
        Without a time after which to try again.
    """
    num_tokens = sum(len(request.prompt_token_ids) for request in requests)
    for limit, most, found, what in (
        ("max_queued_requests", options.max_queued_requests, len(requests), "requests"),
        ("max_queued_tokens", options.max_queued_tokens, num_tokens, "prompt tokens"),
        ("max_requests_per_adapter", options.max_requests_per_adapter, len(requests), "requests"),
    ):
        if 0 < most < found:
            raise CapacityError(
                f"the request's {len(requests)} answers queue {found} {what} at once but {limit} is {most}: "
                f"they can never be accepted; ask for less, or start with --{limit.replace('_', '-')} {found}"
            )


def make_queue_timeout(timeout_s: float | None, retry_after_s: int) -> QueueTimeoutError:
    """Give the error of a request that did not begin to run in time."""
    return QueueTimeoutError(
        f"the request did not begin to run within its queue_timeout of {timeout_s} seconds; send it again "
        "later, or allow it more",
        retry_after_s,
    )


class Admission:
    """Lets requests into the scheduler, or says why not, also beside those that a caller still holds.

    Parameters
    ----------
    scheduler, registry, requests
        What knows the limits and the queue, the names, and the live requests.
    throughput : Throughput
        For when another try is worth it.

    Attributes
    ----------
    num_refused : int
        Requests refused here for a limit, of which the scheduler has not heard.
    """

    def __init__(
        self, scheduler: Scheduler, registry: AdapterRegistry, requests: LiveRequests, throughput: Throughput
    ) -> None:
        self._scheduler = scheduler
        self._registry = registry
        self._requests = requests
        self._throughput = throughput
        self.num_refused = 0

    def resolve(self, lora_name: str | None) -> AdmissionResult:
        """Give what a request of this name would run under now.

        Raises
        ------
        AdapterNotFoundError
            The name does not serve.
        """
        if lora_name is None:
            return AdmissionResult(adapter_id=0, content_digest="")
        generation = self._registry.resolve(lora_name)
        return AdmissionResult(adapter_id=generation.adapter_id, content_digest=generation.content_digest)

    def add_all(self, requests: Sequence[EngineRequest], adapter_id: int, arrival_us: int) -> None:
        """Queue requests of one adapter generation, all or none of them.

        Raises
        ------
        InvalidArgumentError
            A field is wrong, or an id is in use.
        AdapterNotFoundError
            The generation takes no requests.
        CapacityError
            A limit on what waits is reached.
        """
        try:
            self._scheduler.add_requests(
                [_to_new_request(request, adapter_id, arrival_us) for request in requests]
            )
        except CapacityError as error:
            raise CapacityError(str(error), self._seconds_for_the_queue()) from None

    def check_room(self, requests: Sequence[EngineRequest], held: HeldCounts) -> None:
        """Refuse newcomers that exceed a limit together with those that are queued, and those held outside.

        Whoever is let in beside those that are held leaves them their room: the scheduler takes them later.

        Parameters
        ----------
        requests : sequence of EngineRequest
            Newcomers under one adapter, at least one.
        held : HeldCounts
            Of those that were accepted, and wait for their grammars.

        Raises
        ------
        AdapterNotFoundError
            The name does not serve.
        CapacityError
            As of `EngineCore.add_requests`.
        """
        options, counters = self._scheduler.options, self._scheduler.counters()
        check_can_ever_fit(options, requests)
        name = requests[0].lora_name
        num_live = len(self._requests.find_by_adapter([self.resolve(name).adapter_id]))
        num_live += len(requests) + held.num_requests_by_name[name]
        num_queued = counters.num_queued_requests + held.num_requests + len(requests)
        num_tokens = held.num_tokens + sum(len(request.prompt_token_ids) for request in requests)
        # One longer than the limit may still wait alone.
        most_tokens = options.max_queued_tokens if num_queued > 1 else 0
        num_queued_tokens = counters.num_queued_tokens + num_tokens
        of_whom = "the base model" if name is None else f"adapter {name!r}"
        of_adapter = f"live requests of {of_whom}"
        for limit, most, found, what in (
            ("max_queued_requests", options.max_queued_requests, num_queued, "queued requests"),
            ("max_queued_tokens", most_tokens, num_queued_tokens, "queued prompt tokens"),
            ("max_requests_per_adapter", options.max_requests_per_adapter, num_live, of_adapter),
        ):
            if 0 < most < found:
                self.num_refused += len(requests)
                raise CapacityError(
                    f"the request would make {found} {what}; {limit} is {most}; send it again later, or "
                    f"raise {limit}",
                    self._seconds_for_the_queue(),
                )

    def expire(self, request: EngineRequest) -> QueueTimeoutError:
        """Give the error of a request whose time was over while a caller held it."""
        return make_queue_timeout(request.queue_timeout_s, self._seconds_for_the_queue())

    def _seconds_for_the_queue(self) -> int:
        return self._throughput.seconds_for(self._scheduler.counters().num_queued_tokens)


def _to_new_request(request: EngineRequest, adapter_id: int, arrival_us: int) -> NewRequest:
    params = request.sampling_params
    if params.max_tokens is None:
        raise InvalidArgumentError(
            f"request {request.request_id} has no max_tokens but the engine needs it; use InputProcessor"
        )
    if params.structured_outputs is not None:
        raise InvalidArgumentError(
            f"request {request.request_id} has structured_outputs but the engine needs its form; use "
            "InputProcessor"
        )
    timeout_s = request.queue_timeout_s
    return NewRequest(
        request_id=request.request_id,
        adapter_id=adapter_id,
        prompt_token_ids=request.prompt_token_ids,
        max_tokens=params.max_tokens,
        reuse_prefix=params.prompt_logprobs is None,
        isolation_domain=request.isolation_domain,
        priority=request.priority,
        arrival_us=arrival_us,
        deadline_us=None if timeout_s is None else arrival_us + round(timeout_s * 1_000_000),
    )
