"""Bodies of /v1/chat/completions."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Discriminator, Field, Tag
from pydantic_core import PydanticCustomError

from lora_serve.server.protocol.base import (
    UNSUPPORTED_FIELD,
    WRONG_KIND,
    RequestModel,
    ResponseModel,
    refuse_unless,
)
from lora_serve.server.protocol.generation import (
    FinishReasonField,
    GenerationRequest,
    StopReasonField,
    Usage,
)


class TextPart(RequestModel):
    """A piece of a message's content."""

    type: Literal["text"]
    text: str


def _refuse_other_parts(value: object) -> object:
    """Name the type of an unsupported part before its other fields are called unknown."""
    if isinstance(value, dict) and isinstance(value.get("type"), str) and value["type"] != "text":
        raise PydanticCustomError(
            UNSUPPORTED_FIELD,
            "parts of type '{type}' are not supported; send parts of type 'text'",
            {"type": value["type"]},
        )
    return value


def _kind_of_content(value: object) -> str | None:
    if isinstance(value, str):
        return "#string"
    return "#parts" if isinstance(value, list) else None


Content = Annotated[
    Annotated[str, Tag("#string")]
    | Annotated[
        list[Annotated[TextPart, BeforeValidator(_refuse_other_parts)]], Field(fail_fast=True), Tag("#parts")
    ],
    Discriminator(
        _kind_of_content,
        custom_error_type=WRONG_KIND,
        custom_error_message="must be a string or a list of parts of type 'text'",
    ),
]


def _refuse_tool_roles(value: object) -> object:
    if value in ("tool", "function"):
        raise PydanticCustomError(
            UNSUPPORTED_FIELD,
            "messages with role '{role}' are not supported yet; send the result as a message of the user",
            {"role": value},
        )
    return value


class ChatMessage(RequestModel):
    """One message of the conversation.

    Parameters
    ----------
    role : {'system', 'developer', 'user', 'assistant'}
        'developer' is OpenAI's newer word for 'system' and is given to the chat template as that.
    content : str or list of TextPart
        The text; parts are joined by newlines.
    name : str or None
        Given to the chat template, which may use it.
    """

    role: Annotated[Literal["system", "developer", "user", "assistant"], BeforeValidator(_refuse_tool_roles)]
    content: Content
    name: str | None = None
    refusal: None = None
    tool_calls: Annotated[
        Any, AfterValidator(refuse_unless([], because="tool calls are not supported yet; remove the field"))
    ] = None

    def to_template(self) -> dict[str, Any]:
        """Give the message in the form that chat templates take."""
        text = self.content if isinstance(self.content, str) else "\n".join(p.text for p in self.content)
        message: dict[str, Any] = {
            "role": "system" if self.role == "developer" else self.role,
            "content": text,
        }
        if self.name is not None:
            message["name"] = self.name
        return message


class ResponseFormat(RequestModel):
    """The shape of the answer; only plain text is served."""

    type: Annotated[
        str,
        AfterValidator(
            refuse_unless("text", because="structured output is not supported yet; send type 'text'")
        ),
    ]
    json_schema: Any = None


_TOOLS = "tool calls are not supported yet; remove the field"


class ChatCompletionRequest(GenerationRequest):
    """A request for the next message of a conversation.

    Parameters
    ----------
    messages : list of ChatMessage
        The conversation, at least one message.
    lora_path : str or None
        The adapter's name; null = what `model` says.
    max_completion_tokens : int or None
        OpenAI's newer name of `max_tokens`.
    logprobs : bool or None
        Give the log probabilities of the sampled tokens.
    top_logprobs : int or None
        With logprobs: also so many of the most probable tokens.
    add_generation_prompt : bool or None
        End the prompt with the template's opening of the assistant's message; default true.
    chat_template_kwargs : dict or None
        Variables for the chat template, such as {"enable_thinking": false}.
    """

    messages: Annotated[list[ChatMessage], Field(min_length=1, fail_fast=True)]
    lora_path: str | None = None
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    add_generation_prompt: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    response_format: ResponseFormat | None = None
    tools: Annotated[Any, AfterValidator(refuse_unless([], because=_TOOLS))] = None
    tool_choice: Annotated[Any, AfterValidator(refuse_unless("none", "auto", because=_TOOLS))] = None
    parallel_tool_calls: bool | None = None
    functions: Annotated[Any, AfterValidator(refuse_unless([], because=_TOOLS))] = None
    function_call: Annotated[Any, AfterValidator(refuse_unless("none", "auto", because=_TOOLS))] = None
    modalities: Annotated[
        list[str] | None,
        AfterValidator(refuse_unless(["text"], because="only text is generated; send ['text'] or nothing")),
    ] = None
    audio: Annotated[
        Any, AfterValidator(refuse_unless(because="audio is not supported; remove the field"))
    ] = None
    prediction: Annotated[
        Any, AfterValidator(refuse_unless(because="predicted outputs are not supported; remove the field"))
    ] = None
    reasoning_effort: Annotated[
        str | None,
        AfterValidator(
            refuse_unless(because="it has no defined meaning here; use chat_template_kwargs instead")
        ),
    ] = None
    web_search_options: Annotated[
        Any, AfterValidator(refuse_unless(because="web search is not supported; remove the field"))
    ] = None


class TopLogprob(ResponseModel):
    """A token with its log probability and its UTF-8 bytes."""

    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(TopLogprob):
    """A sampled token and the most probable ones of its position."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(ResponseModel):
    """Log probabilities in the chat format: one entry a token."""

    content: list[TokenLogprob]
    refusal: None


class AssistantMessage(ResponseModel):
    """The answer."""

    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(ResponseModel):
    """One of the n answers."""

    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReasonField
    stop_reason: StopReasonField
    token_ids: list[int] | None = None


class ChatCompletionResponse(ResponseModel):
    """All answers to a conversation."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_token_ids: list[int] | None = None


class ChatDelta(ResponseModel):
    """What is new in a stream; the role comes once, in the first chunk of a choice."""

    role: Literal["assistant"] | None = None
    content: str | None = None


class ChatChunkChoice(ResponseModel):
    """The next piece of one answer."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReasonField
    stop_reason: StopReasonField = None
    token_ids: list[int] | None = None


class ChatCompletionChunk(ResponseModel):
    """One chunk of a stream."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None
    prompt_token_ids: list[int] | None = None
