"""From the parameters of LoRAX's interface to SamplingParams."""

from __future__ import annotations

import secrets
from typing import Any

from lora_serve.common.sampling_params import SamplingParams
from lora_serve.server.protocol.lorax import MAX_SEED, LoraxParameters
from lora_serve.server.request_errors import RequestError
from lora_serve.server.sampling import build_params

# LoRAX's words for the fields of SamplingParams, in errors.
_SHOWN_NAMES = {
    "max_tokens": "max_new_tokens",
    "logprobs": "return_k_alternatives",
    "n": "best_of",
    "ignore_eos": "ignore_eos_token",
}
_SAME_NAME = ("repetition_penalty", "frequency_penalty", "presence_penalty")


def lorax_sampling_params(parameters: LoraxParameters, *, is_stream: bool) -> SamplingParams:
    """Give the sampling parameters of a request.

    Sampling that nobody has seeded gets a random seed, which the answer tells, as LoRAX's does. A stop string
    is part of the answer's text.

    Raises
    ------
    RequestError
        A field's value is out of range, or contradicts another.
    """
    is_sampled = _is_sampled(parameters)
    num_answers = parameters.best_of or 1
    _check_best_of(parameters, num_answers, is_sampled=is_sampled, is_stream=is_stream)
    values: dict[str, Any] = {name: getattr(parameters, name) for name in _SAME_NAME}
    values = {name: value for name, value in values.items() if value is not None}
    if is_sampled:
        values["temperature"] = 1.0 if parameters.temperature is None else parameters.temperature
        values["top_k"] = parameters.top_k or 0
        values["top_p"] = 1.0 if parameters.top_p is None else parameters.top_p
        values["seed"] = secrets.randbelow(MAX_SEED) if parameters.seed is None else parameters.seed
    else:
        values["temperature"] = 0.0
    needs_tokens = is_stream or parameters.details or parameters.decoder_input_details or num_answers > 1
    if needs_tokens:
        values["logprobs"] = parameters.return_k_alternatives or 0
    if parameters.decoder_input_details:
        values["prompt_logprobs"] = 0
    params = build_params(
        {
            **values,
            "n": num_answers,
            "max_tokens": parameters.max_new_tokens,
            "ignore_eos": bool(parameters.ignore_eos_token),
            "stop": parameters.stop or [],
            "include_stop_str_in_output": True,
        },
        _SHOWN_NAMES,
    )
    if parameters.return_k_alternatives and not needs_tokens:
        raise RequestError(
            'return_k_alternatives needs details; send "details": true too',
            param="return_k_alternatives",
            code="invalid_value",
        )
    return params


def rename_fields(message: str) -> str:
    """Say what the engine refuses in LoRAX's words."""
    return message.replace("max_tokens", _SHOWN_NAMES["max_tokens"])


def _is_sampled(parameters: LoraxParameters) -> bool:
    """Tell whether tokens are sampled: a temperature of 0 forbids it, one of 1 alone does not ask for it."""
    if parameters.temperature == 0:
        return False
    return bool(
        parameters.do_sample
        or parameters.temperature not in (None, 1.0)
        or parameters.top_k is not None
        or (parameters.top_p is not None and parameters.top_p < 1)
    )


def _check_best_of(
    parameters: LoraxParameters, num_answers: int, *, is_sampled: bool, is_stream: bool
) -> None:
    if num_answers > 1:
        if not is_sampled:
            _refuse_best_of("needs sampling; send do_sample, or leave best_of out")
        if parameters.seed is not None:
            _refuse_best_of("cannot have a seed; remove one of them")
        if is_stream:
            _refuse_best_of("is not possible in a stream; ask for the whole answer")
    if is_stream and parameters.decoder_input_details:
        raise RequestError(
            "decoder_input_details is true, but a stream does not tell the prompt's tokens; ask for the "
            "whole answer",
            param="decoder_input_details",
            code="invalid_value",
        )


def _refuse_best_of(text: str) -> None:
    raise RequestError(f"best_of above 1 {text}", param="best_of", code="invalid_value")
