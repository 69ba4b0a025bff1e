"""From a request's fields to SamplingParams and Queueing."""

from __future__ import annotations

import re
from typing import Any

import msgspec

from lora_serve.common.errors import InvalidArgumentError
from lora_serve.common.queueing import Queueing
from lora_serve.common.sampling_params import SamplingParams
from lora_serve.common.structured_outputs import StructuredOutputsParams
from lora_serve.server.protocol.chat import ChatCompletionRequest
from lora_serve.server.protocol.completion import CompletionRequest
from lora_serve.server.protocol.generation import GenerationRequest
from lora_serve.server.request_errors import RequestError
from lora_serve.server.structured_form import form_of

_SAME_NAME = (
    "n",
    "max_tokens",
    "min_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "seed",
    "stop",
    "stop_token_ids",
    "include_stop_str_in_output",
    "ignore_eos",
    "skip_special_tokens",
    "prompt_logprobs",
    "allowed_token_ids",
)


DEFAULT_COMPLETION_TOKENS = 16
"""Most tokens of a completion without max_tokens; fewer where the context holds fewer."""


def check_num_answers(num_prompts: int, n: int, max_answers: int) -> None:
    """Refuse a request that asks for more answers than one request may.

    Parameters
    ----------
    num_prompts : int
        Prompts of the request.
    n : int
        Answers to each.
    max_answers : int
        The setting `max_answers_per_request`.

    Raises
    ------
    RequestError
        There are too many.
    """
    num_answers = num_prompts * n
    if num_answers <= max_answers:
        return
    if num_prompts == 1:
        found, remedy, param = f"n is {n}", "lower n", "n"
    else:
        found = f"prompt has {num_prompts} entries and n is {n}, which makes {num_answers} answers"
        remedy, param = "send fewer prompts at once or lower n", "prompt"
    raise RequestError(
        f"{found} but a request may ask for at most {max_answers}; {remedy}, or start the server with "
        f"--max-answers-per-request {num_answers}",
        param=param,
        code="too_many_answers",
    )


def completion_sampling_params(request: CompletionRequest) -> SamplingParams:
    """Give the sampling parameters of a completion; without max_tokens an answer has at most 16 tokens.

    That default is for prompts that leave so much room: see `with_default_max_tokens`.

    Raises
    ------
    RequestError
        A field's value is out of range, or contradicts another.
    """
    values = _shared_values(request)
    values.setdefault("max_tokens", DEFAULT_COMPLETION_TOKENS)
    if request.max_tokens == 0:
        _require_echo_for_no_tokens(request)
        values["max_tokens"] = 1  # one step is needed to compute the prompt; its token is not shown
    values["structured_outputs"] = form_of(request)
    if request.logprobs is not None:
        values["logprobs"] = request.logprobs
        if request.echo:
            values["prompt_logprobs"] = max(request.logprobs, request.prompt_logprobs or 0)
    return build_params(values, {})


def with_default_max_tokens(params: SamplingParams, room: int) -> SamplingParams:
    """Give the parameters of a completion without max_tokens for a prompt that leaves `room` tokens.

    Where the context holds fewer tokens than the default, it is the limit; the engine then knows that nobody
    asked for a number, and refuses only prompts that leave no room, or too little for min_tokens.
    """
    max_tokens = DEFAULT_COMPLETION_TOKENS if room > DEFAULT_COMPLETION_TOKENS else None
    return msgspec.structs.replace(params, max_tokens=max_tokens)


def chat_sampling_params(
    request: ChatCompletionRequest, form: StructuredOutputsParams | None = None
) -> SamplingParams:
    """Give the sampling parameters of a chat completion; without max_tokens the context is the limit.

    Parameters
    ----------
    request : ChatCompletionRequest
        The request.
    form : StructuredOutputsParams or None
        That its answer must have.

    Raises
    ------
    RequestError
        A field's value is out of range, or contradicts another.
    """
    if request.echo:
        raise RequestError(
            "echo: chat completions do not repeat the conversation; remove the field",
            param="echo",
            code="unsupported_field",
        )
    values = _shared_values(request)
    limits = {request.max_tokens, request.max_completion_tokens} - {None}
    if len(limits) > 1:
        raise RequestError(
            f"max_completion_tokens is {request.max_completion_tokens} but max_tokens is "
            f"{request.max_tokens}; send one of them",
            param="max_completion_tokens",
            code="invalid_value",
        )
    values["max_tokens"] = next(iter(limits), None)
    values["structured_outputs"] = form
    if request.top_logprobs is not None and not request.logprobs:
        raise RequestError(
            'top_logprobs needs logprobs; send "logprobs": true too',
            param="top_logprobs",
            code="invalid_value",
        )
    if request.logprobs:
        values["logprobs"] = request.top_logprobs or 0
    shown_names = {"logprobs": "top_logprobs"}
    if request.max_tokens is None:
        shown_names["max_tokens"] = "max_completion_tokens"
    return build_params(values, shown_names)


def request_queueing(request: GenerationRequest) -> Queueing:
    """Give how the request may wait.

    Raises
    ------
    RequestError
        `priority` or `queue_timeout` is out of range.
    """
    try:
        return Queueing(request.priority or 0, request.queue_timeout)
    except InvalidArgumentError as error:
        field = str(error).split(" ", 1)[0]
        raise RequestError(str(error), param=field, code="invalid_value") from None


def _shared_values(request: GenerationRequest) -> dict[str, Any]:
    values = {name: getattr(request, name) for name in _SAME_NAME}
    values = {name: value for name, value in values.items() if value is not None}
    if request.logit_bias is not None:
        values["logit_bias"] = {_token_id(key): bias for key, bias in request.logit_bias.items()}
    if request.best_of is not None and request.best_of != values.get("n", 1):
        raise RequestError(
            f"best_of is {request.best_of} but must equal n, which is {values.get('n', 1)}: choosing the "
            "best of several answers is not supported; remove best_of or ask for n answers",
            param="best_of",
            code="unsupported_field",
        )
    if request.prompt_logprobs is not None and request.stream:
        raise RequestError(
            'prompt_logprobs cannot be streamed; send "stream": false, or echo and logprobs instead',
            param="prompt_logprobs",
            code="unsupported_field",
        )
    if request.request_id is not None and not (
        request.request_id.isascii() and request.request_id.isprintable() and len(request.request_id) <= 256
    ):
        raise RequestError(
            "request_id must have at most 256 printable ASCII characters; shorten it or leave it out",
            param="request_id",
            code="invalid_value",
        )
    if request.stream_options is not None and not request.stream:
        raise RequestError(
            'stream_options is given but stream is not true; send "stream": true or remove it',
            param="stream_options",
            code="invalid_value",
        )
    return values


def _token_id(key: str) -> int:
    """Read a key of logit_bias: JSON has only strings there."""
    if not (key.isascii() and key.isdecimal() and len(key) <= 10):
        raise RequestError(
            f'logit_bias has the key {key[:20]!r} but its keys must be token ids, such as "15"',
            param="logit_bias",
            code="invalid_value",
        )
    return int(key)


def _require_echo_for_no_tokens(request: CompletionRequest) -> None:
    if not request.echo:
        raise RequestError(
            'max_tokens is 0 but must be at least 1; 0 is possible only together with "echo": true, which '
            "gives the prompt back",
            param="max_tokens",
            code="invalid_value",
        )
    if request.min_tokens:
        raise RequestError(
            f"min_tokens is {request.min_tokens} but must be at most max_tokens, which is 0",
            param="min_tokens",
            code="invalid_value",
        )


def build_params(values: dict[str, Any], shown_names: dict[str, str]) -> SamplingParams:
    """Construct the parameters, and name the request's field when they refuse a value.

    Parameters
    ----------
    values : dict from str to Any
        Fields of SamplingParams.
    shown_names : dict from str to str
        What the request calls fields that have another name there.

    Raises
    ------
    RequestError
        A value is out of range.
    """
    try:
        return SamplingParams(**values)
    except InvalidArgumentError as error:
        message = str(error)
        words = re.findall(r"[a-z_]+", message.split(" is ", 1)[0])
        field = next((word for word in words if word in SamplingParams.__struct_fields__), None)
        if field is not None and field in shown_names:
            message = message.replace(field, shown_names[field], 1)
            field = shown_names[field]
        raise RequestError(message, param=field, code="invalid_value") from None
