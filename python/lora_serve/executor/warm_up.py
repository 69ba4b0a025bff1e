"""A few requests through a new executor, so that the first real one finds every kernel compiled."""

from __future__ import annotations

import logging
import time
from collections import deque

import numpy as np

from lora_serve.common.config import EngineConfig
from lora_serve.common.sampling_params import SamplingParams
from lora_serve.executor.executor import MAX_PLANS_IN_FLIGHT, Executor
from lora_serve.executor.sampling_state import SamplingState
from lora_serve.scheduler import ExecutionEvent, ExecutionPlan, NewRequest, Scheduler, SchedulerOptions

logger = logging.getLogger(__name__)

_PROMPT_TOKENS = 4
_OUTPUT_TOKENS = 4
_PARAMS = (
    SamplingParams(temperature=0.0, ignore_eos=True),
    SamplingParams(temperature=1.0, top_p=0.9, top_k=40, min_p=0.01, ignore_eos=True),
    SamplingParams(temperature=1.0, top_p=0.9, top_k=40, presence_penalty=0.5, logprobs=1, ignore_eos=True),
)


def warm_up(executor: Executor, config: EngineConfig) -> None:
    """Run a greedy, a random and a penalised request of the base model, one after the other.

    Parameters
    ----------
    executor : Executor
        Nothing was submitted to it yet. Its page-table rows are used, and hold nothing that a later plan
        reads.
    config : EngineConfig
        The engine's.
    """
    begin = time.perf_counter()
    num_tokens = _PROMPT_TOKENS + _OUTPUT_TOKENS
    if num_tokens > executor.max_model_len or -(-num_tokens // config.page_size) > executor.num_device_pages:
        logger.info("no warm-up: a request of %d tokens does not fit", num_tokens)
        return
    scheduler = Scheduler(
        SchedulerOptions(
            page_size=config.page_size,
            num_device_pages=executor.num_device_pages,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            max_model_len=executor.max_model_len,
            max_loras=config.max_loras,
            enable_prefix_caching=False,
            padded_batch_sizes=list(executor.padded_batch_sizes),
        )
    )
    prompt = np.arange(_PROMPT_TOKENS, dtype=np.int32) % executor.vocab_size
    for request_id, params in enumerate(_PARAMS, start=1):  # Side by side they would share what is compiled.
        state = SamplingState(params, prompt, (), executor.vocab_size, seed=request_id)
        request = NewRequest(
            request_id=request_id, adapter_id=0, prompt_token_ids=prompt, max_tokens=_OUTPUT_TOKENS
        )
        scheduler.add_request(request)
        _run_to_the_end(executor, scheduler, state)
    logger.info("warm-up requests done in %.1f s", time.perf_counter() - begin)


def _run_to_the_end(executor: Executor, scheduler: Scheduler, state: SamplingState) -> None:
    in_flight: deque[ExecutionPlan] = deque()
    while True:
        plan = scheduler.next_plan(0)
        if not plan.is_empty:
            executor.submit(plan, [state] * len(plan.request_ids))
            in_flight.append(plan)
        if not in_flight:
            return
        if plan.is_empty or len(in_flight) == MAX_PLANS_IN_FLIGHT:
            _take_oldest(executor, scheduler, in_flight)


def _take_oldest(executor: Executor, scheduler: Scheduler, in_flight: deque[ExecutionPlan]) -> None:
    result, plan = executor.collect(), in_flight.popleft()
    # A row that fails here fails in earnest, too; the requests that come will say so.
    tokens = np.where(plan.samples_token.astype(bool), np.maximum(result.sampled_token_ids, 0), -1)
    scheduler.advance(
        ExecutionEvent(
            plan_id=plan.plan_id,
            sampled_token_ids=tokens.astype(np.int32),
            is_finished=np.zeros(len(tokens), dtype=np.uint8),
        )
    )
