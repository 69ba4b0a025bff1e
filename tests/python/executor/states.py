"""Sampling states for tests."""

from __future__ import annotations

import numpy as np

from lora_serve.common.sampling_params import SamplingParams
from lora_serve.executor.sampling_state import SamplingState


def make_state(
    prompt: list[int] | None = None,
    output: list[int] | None = None,
    *,
    vocab_size: int = 32,
    eos: tuple[int, ...] = (),
    **params,
) -> SamplingState:
    """A state whose request has sampled `output` already; the seed is that of the parameters."""
    sampling_params = SamplingParams(max_tokens=None, **params)
    prompt_ids = np.array(prompt or [1], dtype=np.int32)
    state = SamplingState(sampling_params, prompt_ids, eos, vocab_size, sampling_params.seed)
    for token_id in output or []:
        state.append_output(token_id, len(prompt_ids) + len(state.output_token_ids))
    return state
