"""Requests on their way into the scheduler: together or not at all."""

from __future__ import annotations

from collections.abc import Sequence

from lora_serve.common.errors import CapacityError, InvalidArgumentError
from lora_serve.engine.messages import EngineRequest
from lora_serve.scheduler import NewRequest, Scheduler, SchedulerOptions


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


def add_all(
    scheduler: Scheduler, requests: Sequence[EngineRequest], adapter_id: int, arrival_us: int
) -> None:
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
    scheduler.add_requests([_to_new_request(request, adapter_id, arrival_us) for request in requests])


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
