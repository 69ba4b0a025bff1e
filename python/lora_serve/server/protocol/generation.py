"""Fields and parts that completions and chat completions share."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Discriminator, Field, Tag

from lora_serve.server.protocol.base import WRONG_KIND, RequestModel, ResponseModel, refuse_unless
from lora_serve.server.protocol.known_fields import KnownFields
from lora_serve.server.protocol.structured import ResponseFormatField, StructuredOutputs


def _kind_of_stop(value: object) -> str | None:
    if isinstance(value, str):
        return "#string"
    return "#list" if isinstance(value, list) else None


Stop = Annotated[
    Annotated[str, Tag("#string")] | Annotated[list[str], Field(fail_fast=True), Tag("#list")],
    Discriminator(
        _kind_of_stop,
        custom_error_type=WRONG_KIND,
        custom_error_message="must be a string or a list of strings",
    ),
]
TokenIds = Annotated[list[int], Field(fail_fast=True)]


class StreamOptions(RequestModel):
    """What a stream tells besides the text.

    Parameters
    ----------
    include_usage : bool or None
        Send a last chunk without choices that has the usage of the whole request.
    continuous_usage_stats : bool or None
        With include_usage: every chunk has the usage so far.
    include_obfuscation : bool or None
        Padding against traffic analysis; only false is served.
    """

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: Annotated[
        bool | None,
        AfterValidator(refuse_unless(False, because="obfuscation is not supported; send false or nothing")),
    ] = None


class GenerationRequest(KnownFields):
    """What a completion and a chat completion have in common. A field that is null takes its default.

    The sampling fields have the names, meanings and limits of `SamplingParams`, which checks their values;
    `priority` and `queue_timeout` (seconds) those of `Queueing`. `request_id` is shown in the answer's id.
    Requests share cached prefixes with those of the same `cache_salt` only; null is a salt of its own.
    """

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    n: int | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    seed: int | None = None
    stop: Stop | None = None
    stop_token_ids: TokenIds | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    allowed_token_ids: TokenIds | None = None
    return_token_ids: bool | None = None
    prompt_logprobs: int | None = None
    request_id: str | None = None
    echo: bool | None = None

    response_format: ResponseFormatField | None = None
    structured_outputs: StructuredOutputs | None = None

    priority: int | None = None
    queue_timeout: float | None = None
    cache_salt: Annotated[str, Field(min_length=1, max_length=1024)] | None = None

    best_of: int | None = None


class PromptTokensDetails(ResponseModel):
    """Where the prompt's tokens came from."""

    cached_tokens: int


class Usage(ResponseModel):
    """Token counts of a request, over all its prompts and answers."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class PromptLogprob(ResponseModel):
    """A token of the prompt, or one of the most probable ones in its place, as vLLM writes it."""

    logprob: float
    rank: int
    decoded_token: str


PromptLogprobs = list[dict[int, PromptLogprob] | None]
"""One entry a token of the prompt, by token id: the token and the most probable ones; null for the first."""
FinishReasonField = Literal["stop", "length", "abort", "tool_calls"] | None
StopReasonField = int | str | None
