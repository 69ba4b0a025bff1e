"""Bodies of /v1/completions."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Discriminator, Field, Tag

from lora_serve.server.protocol.base import WRONG_KIND, ResponseModel, refuse_unless
from lora_serve.server.protocol.generation import (
    FinishReasonField,
    GenerationRequest,
    PromptLogprobs,
    StopReasonField,
    TokenIds,
    Usage,
)


def _kind_of_prompt(value: object) -> str | None:
    if isinstance(value, str):
        return "#text"
    if not isinstance(value, list):
        return None
    first = value[0] if value else ""
    if isinstance(first, str):
        return "#texts"
    return "#token_lists" if isinstance(first, list) else "#tokens"


Prompt = Annotated[
    Annotated[str, Tag("#text")]
    | Annotated[list[str], Field(fail_fast=True), Tag("#texts")]
    | Annotated[list[int], Field(fail_fast=True), Tag("#tokens")]
    | Annotated[list[TokenIds], Field(fail_fast=True), Tag("#token_lists")],
    Discriminator(
        _kind_of_prompt,
        custom_error_type=WRONG_KIND,
        custom_error_message="must be a string, a list of strings, a list of token ids or a list of lists of "
        "token ids",
    ),
]


def _kind_of_lora_path(value: object) -> str | None:
    if isinstance(value, str):
        return "#name"
    return "#list" if isinstance(value, list) else None


LoRAPaths = Annotated[
    Annotated[str, Tag("#name")] | Annotated[list[str | None], Field(fail_fast=True), Tag("#list")],
    Discriminator(
        _kind_of_lora_path,
        custom_error_type=WRONG_KIND,
        custom_error_message="must be an adapter's name, or for batched prompts a list with a name or null "
        "for each prompt",
    ),
]


class CompletionRequest(GenerationRequest):
    """A request for continuations of one or several prompts.

    Parameters
    ----------
    prompt : str, list of str, list of int or list of list of int
        One prompt or several, as text or token ids; none may be empty.
    lora_path : str, list of (str or None), or None
        The adapter's name, or one a prompt; null = what `model` says.
    logprobs : int or None
        Log probabilities of the sampled token and so many of the most probable ones.
    add_special_tokens : bool or None
        Tokenise text prompts with the tokenizer's special tokens, such as a leading BOS; default true.
    """

    prompt: Prompt
    lora_path: LoRAPaths | None = None
    logprobs: int | None = None
    add_special_tokens: bool | None = None
    suffix: Annotated[
        str | None,
        AfterValidator(
            refuse_unless("", because="insertion before a suffix is not supported; remove the field")
        ),
    ] = None
    prompt_embeds: Annotated[
        Any, AfterValidator(refuse_unless(because="prompts are text or token ids; send prompt"))
    ] = None


class CompletionLogprobs(ResponseModel):
    """Log probabilities in the completions format: parallel lists, one entry a token."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(ResponseModel):
    """One answer, or in a stream its next piece."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReasonField
    stop_reason: StopReasonField
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None
    prompt_logprobs: PromptLogprobs | None = None


class CompletionResponse(ResponseModel):
    """The whole answer, or one chunk of a stream (same object name, as OpenAI has it)."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: Usage | None = None
