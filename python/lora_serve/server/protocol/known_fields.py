"""Fields that other servers know: accepted as long as they change nothing, refused where they would."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator

from lora_serve.server.protocol.base import RequestModel, refuse_unless


def _only(*harmless: object, because: str) -> AfterValidator:
    return AfterValidator(refuse_unless(*harmless, because=because))


NoChatTemplate = Annotated[Any, _only(because="the model's own template is used; remove the field")]
"""A chat template that the request brings along: null."""
NoMediaSettings = Annotated[Any, _only({}, because="only text is read; remove the field")]
"""Settings of images and sounds: null or none."""


class KnownFields(RequestModel):
    """What completions and chat completions know of OpenAI's and vLLM's fields without serving it."""

    # Without effect: names and hints that no answer depends on.
    user: str | None = None
    metadata: dict[str, Any] | None = None
    safety_identifier: str | None = None
    session_id: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    truncation_side: Literal["left", "right"] | None = None
    return_mm_kwargs: bool | None = None

    # Accepted with the values that ask for nothing.
    service_tier: Annotated[
        str | None,
        _only("auto", "default", because="service tiers are not supported; send 'auto' or nothing"),
    ] = None
    store: Annotated[bool | None, _only(False, because="nothing is stored; send false or nothing")] = None
    use_beam_search: Annotated[
        bool | None, _only(False, because="beam search is not supported; ask for n answers instead")
    ] = None
    length_penalty: Annotated[
        float | None,
        _only(1.0, because="it belongs to beam search, which is not supported; remove the field"),
    ] = None
    watermarking: Annotated[
        bool | None, _only(False, because="answers are not watermarked; remove the field")
    ] = None
    spaces_between_special_tokens: Annotated[
        bool | None, _only(True, because="special tokens are written as they are; remove the field")
    ] = None
    truncate_prompt_tokens: Annotated[
        int | None, _only(because="prompts are not shortened; send one that fits")
    ] = None
    logprob_token_ids: Annotated[
        list[int] | None, _only(because="log probabilities are of the most probable tokens; remove the field")
    ] = None
    bad_words: Annotated[
        list[str] | None, _only([], because="it is not supported; use logit_bias for single tokens")
    ] = None
    return_tokens_as_token_ids: Annotated[
        bool | None, _only(False, because="it is not supported; use return_token_ids")
    ] = None
    return_token_offsets: Annotated[
        bool | None, _only(False, because="it is not supported; remove the field")
    ] = None
    routed_experts_prompt_start: Annotated[
        int | None, _only(0, because="routed experts are not given; remove the field")
    ] = None
    kv_transfer_params: Annotated[
        dict[str, Any] | None, _only({}, because="pages are not sent between servers; remove the field")
    ] = None
    ec_transfer_params: Annotated[
        dict[str, Any] | None, _only({}, because="encoders are not served; remove the field")
    ] = None
    vllm_xargs: Annotated[
        dict[str, Any] | None, _only({}, because="there are no extensions that take it; remove the field")
    ] = None
    repetition_detection: Annotated[
        Any, _only(because="repetitions do not end an answer; use the penalties, or remove the field")
    ] = None
    thinking_token_budget: Annotated[
        int | None, _only(-1, because="reasoning is limited by max_tokens only; remove the field")
    ] = None
    stream_interval: Annotated[
        int | None, _only(1, because="every token is streamed as it comes; send 1 or nothing")
    ] = None
