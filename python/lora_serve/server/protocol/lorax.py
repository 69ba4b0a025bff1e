"""Bodies of LoRAX's /generate and /generate_stream, and of / as its client package calls it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from lora_serve.server.protocol.base import RequestModel, ResponseModel, refuse_unless

MAX_SEED = 2**63 - 1
Positive = Annotated[int, Field(gt=0)]


class LoraxParameters(RequestModel):
    """How to generate. A field that is null takes its default.

    Parameters
    ----------
    adapter_id : str or None
        The adapter's name; null, '' and '__base_model__' = the base model.
    adapter_source : str or None
        Where an adapter that is not loaded comes from: 'hub', 'local' or 's3'; null = as the id says.
    do_sample : bool or None
        Sample even where temperature, top_k and top_p do not ask for it.
    max_new_tokens : int or None
        Null = as many as the context holds.
    best_of : int or None
        Generate so many answers and give the one with the highest mean log probability first.
    truncate : int or None
        Keep only so many of the prompt's last tokens.
    return_full_text : bool or None
        Put the prompt in front of `generated_text`.
    details : bool or None
        Give the tokens too.
    decoder_input_details : bool or None
        Give the prompt's tokens too.
    return_k_alternatives : int or None
        With each token so many of the most probable ones.
    """

    adapter_id: str | None = None
    adapter_source: Annotated[
        Literal["hub", "local", "s3", "pbase"] | None,
        AfterValidator(
            refuse_unless("hub", "local", "s3", because="this source is not supported; remove the field")
        ),
    ] = None
    do_sample: bool | None = None
    max_new_tokens: Positive | None = None
    ignore_eos_token: bool | None = None
    temperature: Annotated[float, Field(ge=0)] | None = None
    top_k: Positive | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    seed: Annotated[int, Field(ge=0, le=MAX_SEED)] | None = None
    stop: Annotated[list[str], Field(fail_fast=True)] | None = None
    best_of: Positive | None = None
    truncate: Positive | None = None
    return_full_text: bool | None = None
    details: bool | None = None
    decoder_input_details: bool | None = None
    return_k_alternatives: Positive | None = None

    # Known, and refused where they would change the answer.
    merged_adapters: Annotated[
        Any,
        AfterValidator(refuse_unless(because="adapters are not merged; choose one with adapter_id")),
    ] = None
    api_token: Annotated[
        str | None,
        AfterValidator(
            refuse_unless(because="tokens of single requests are not used; set HF_TOKEN for the server")
        ),
    ] = None
    typical_p: Annotated[
        float | None,
        AfterValidator(refuse_unless(because="typical sampling is not supported; use top_p instead")),
    ] = None
    watermark: Annotated[
        bool | None, AfterValidator(refuse_unless(False, because="watermarks are not supported; send false"))
    ] = None
    apply_chat_template: Annotated[
        bool | None,
        AfterValidator(
            refuse_unless(False, because="inputs are taken as they are; use /v1/chat/completions instead")
        ),
    ] = None
    response_format: Annotated[
        Any,
        AfterValidator(
            refuse_unless(because="structured output is not supported here; use /v1/chat/completions")
        ),
    ] = None


class LoraxRequest(RequestModel):
    """A prompt, and how to continue it.

    Parameters
    ----------
    inputs : str
        The prompt, not empty.
    parameters : LoraxParameters or None
        Null = the defaults.
    stream : bool or None
        On /: give a stream. On /generate and /generate_stream only what they do anyway is accepted.
    """

    inputs: Annotated[str, Field(min_length=1)]
    parameters: LoraxParameters | None = None
    stream: bool | None = None


class LoraxInputToken(ResponseModel):
    """A token of the prompt; nothing precedes the first one, so it has no log probability."""

    id: int
    text: str
    logprob: float | None


class LoraxAlternative(ResponseModel):
    """A token that could have been sampled."""

    id: int
    text: str
    logprob: float


class LoraxToken(ResponseModel):
    """A generated token; `text` is what it adds to the answer, unless it is a special token."""

    id: int
    text: str
    logprob: float
    special: bool
    alternative_tokens: list[LoraxAlternative] | None = None
    skipped: Literal[False] = False


LoraxFinishReason = Literal["length", "eos_token", "stop_sequence"]


class LoraxSequence(ResponseModel):
    """One of the answers that `best_of` asks for, but not the best one."""

    generated_text: str
    finish_reason: LoraxFinishReason
    generated_tokens: int
    seed: int | None
    prefill: list[LoraxInputToken]
    tokens: list[LoraxToken]


class LoraxDetails(ResponseModel):
    """What is known of an answer besides its text; the seed is null for a greedy one."""

    finish_reason: LoraxFinishReason
    prompt_tokens: int
    generated_tokens: int
    skipped_tokens: Literal[0] = 0
    seed: int | None
    prefill: list[LoraxInputToken]
    tokens: list[LoraxToken]
    best_of_sequences: list[LoraxSequence] | None = None


class LoraxResponse(ResponseModel):
    """A whole answer."""

    generated_text: str
    details: LoraxDetails | None = None


class LoraxStreamDetails(ResponseModel):
    """What the last event of a stream tells."""

    finish_reason: LoraxFinishReason
    prompt_tokens: int
    generated_tokens: int
    seed: int | None


class LoraxStreamResponse(ResponseModel):
    """One event of a stream: a token, and with the last one the whole text."""

    token: LoraxToken
    generated_text: str | None
    details: LoraxStreamDetails | None


class LoraxError(ResponseModel):
    """Why there is no answer, or no more of it."""

    error: str
    error_type: Literal["validation", "overloaded", "adapter_not_found", "generation"]
