"""What the oracle writes into the states of its rows: tokens, and log probabilities of a certain model."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from lora_serve.executor.logprobs import TokenLogprobs
from lora_serve.executor.sampling_state import SamplingState

if TYPE_CHECKING:
    from lora_serve.scheduler import ExecutionPlan


def update_state(state: SamplingState, plan: ExecutionPlan, row: int, token_id: int) -> TokenLogprobs | None:
    """Append the row's token, if it has one, and fill the prompt log probabilities that the step computed.

    Returns
    -------
    TokenLogprobs or None
        The token's, where the request asked for them.
    """
    computed = int(plan.num_computed_tokens[row])
    end = computed + int(plan.num_scheduled_tokens[row])
    if state.prompt_logprobs is not None:
        for position in range(computed + 1, min(end + 1, state.num_prompt_tokens)):
            state.prompt_logprobs[position] = _certain(
                int(state.prompt_token_ids[position]), state.params.prompt_logprobs or 0
            )
    if token_id < 0:
        return None
    state.append_output(token_id, end)
    return None if state.params.logprobs is None else _certain(token_id, state.params.logprobs)


def _certain(token_id: int, num_top: int) -> TokenLogprobs:
    num_listed = min(num_top, 1)
    return TokenLogprobs(
        token_id=token_id,
        logprob=0.0,
        rank=1,
        top_token_ids=np.full(num_listed, token_id, dtype=np.int32),
        top_logprobs=np.zeros(num_listed, dtype=np.float32),
    )
