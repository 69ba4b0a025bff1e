"""Bodies of /v1/chat/completions."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Discriminator,
    Field,
    Tag,
    ValidationInfo,
    field_validator,
)
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
    PromptLogprobs,
    StopReasonField,
    Usage,
)
from lora_serve.server.protocol.known_fields import NoChatTemplate, NoMediaSettings
from lora_serve.server.protocol.tools import PastToolCall, Tool, ToolCall, ToolCallDelta, ToolChoice


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


def _refuse_function_role(value: object) -> object:
    if value == "function":
        raise PydanticCustomError(
            UNSUPPORTED_FIELD,
            "messages with role 'function' are not supported; send the result with role 'tool'",
        )
    return value


_OLD_CALLS = "function_call is OpenAI's old form; use tools, tool_choice and tool_calls instead"


class ChatMessage(RequestModel):
    """One message of the conversation.

    Parameters
    ----------
    role : {'system', 'developer', 'user', 'assistant', 'tool'}
        'developer' is OpenAI's newer word for 'system' and is given to the chat template as that.
    tool_calls : list of PastToolCall or None
        The assistant's calls, which the messages with role 'tool' answer.
    tool_call_id : str or None
        With role 'tool': the call that the message answers.
    content : str or list of TextPart
        The text; parts are joined by newlines. The assistant's may be left out beside tool calls.
    name : str or None
        Given to the chat template, which may use it.
    reasoning_content, reasoning : str or None
        The assistant's reasoning, under OpenAI-like servers' two names for it. Given to the template.
    """

    role: Annotated[
        Literal["system", "developer", "user", "assistant", "tool"], BeforeValidator(_refuse_function_role)
    ]
    tool_calls: Annotated[list[PastToolCall], Field(fail_fast=True)] | None = None
    tool_call_id: str | None = None
    content: Content | None = Field(None, validate_default=True)
    name: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    refusal: None = None
    annotations: Annotated[
        Any, AfterValidator(refuse_unless([], because="annotations are not supported; remove the field"))
    ] = None
    audio: Annotated[
        Any, AfterValidator(refuse_unless(because="audio is not supported; remove the field"))
    ] = None
    function_call: Annotated[Any, AfterValidator(refuse_unless(because=_OLD_CALLS))] = None

    @field_validator("content")
    @classmethod
    def _require_content(cls, value: Any, info: ValidationInfo) -> Any:
        if value is None and "role" in info.data and not info.data.get("tool_calls"):
            raise PydanticCustomError("missing", "missing")
        return value

    @field_validator("tool_calls", "tool_call_id", "reasoning_content", "reasoning")
    @classmethod
    def _require_role(cls, value: Any, info: ValidationInfo) -> Any:
        role = "tool" if info.field_name == "tool_call_id" else "assistant"
        if value and info.data.get("role", role) != role:
            raise PydanticCustomError(
                UNSUPPORTED_FIELD, "only messages with role '{role}' have it; remove it", {"role": role}
            )
        return value

    def to_template(self) -> dict[str, Any]:
        """Give the message in the form that chat templates take.

        Raises
        ------
        ValueError
            The arguments of a call are no JSON object.
        """
        content = self.content or ""
        text = content if isinstance(content, str) else "\n".join(part.text for part in content)
        message: dict[str, Any] = {
            "role": "system" if self.role == "developer" else self.role,
            "content": text,
        }
        if self.name is not None:
            message["name"] = self.name
        if self.tool_calls:
            message["tool_calls"] = [_to_template(call) for call in self.tool_calls]
        if self.tool_call_id is not None:
            message["tool_call_id"] = self.tool_call_id
        reasoning = self.reasoning_content or self.reasoning
        if reasoning:
            message["reasoning_content"] = reasoning
        return message


def _to_template(call: PastToolCall) -> dict[str, Any]:
    """Templates write the arguments themselves, so they take them as an object."""
    arguments = json.loads(call.function.arguments or "{}")
    if not isinstance(arguments, dict):
        raise ValueError("they are no JSON object")
    return {
        "id": call.id,
        "type": call.type,
        "function": {"name": call.function.name, "arguments": arguments},
    }


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
    continue_final_message : bool or None
        The answer continues the last message, which the template leaves open, without generation prompt.
    chat_template_kwargs : dict or None
        Variables for the chat template, such as {"enable_thinking": false}.
    tools : list of Tool or None
        Functions that the model may call.
    tool_choice : 'none', 'auto', 'required', NamedToolChoice or None
        Whether it calls some, or one of them; null = 'auto' with tools. 'none' leaves them out of the prompt.
    parallel_tool_calls : bool or None
        False: an answer has at most one call.
    include_reasoning : bool or None
        False: reasoning is left out of the answer.
    """

    messages: Annotated[list[ChatMessage], Field(min_length=1, fail_fast=True)]
    lora_path: str | None = None
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    tools: Annotated[list[Tool], Field(fail_fast=True)] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    include_reasoning: bool | None = None
    functions: Annotated[Any, AfterValidator(refuse_unless([], because=_OLD_CALLS))] = None
    function_call: Annotated[Any, AfterValidator(refuse_unless("none", "auto", because=_OLD_CALLS))] = None
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
    verbosity: Annotated[
        str | None, AfterValidator(refuse_unless("medium", because="say in the messages how long to answer"))
    ] = None
    add_special_tokens: Annotated[
        bool | None,
        AfterValidator(refuse_unless(False, because="the chat template writes its own; remove the field")),
    ] = None
    documents: Annotated[
        Any, AfterValidator(refuse_unless([], because="it is not supported; put documents into messages"))
    ] = None
    chat_template: NoChatTemplate = None
    media_io_kwargs: NoMediaSettings = None
    mm_processor_kwargs: NoMediaSettings = None
    return_prompt_text: Annotated[
        bool | None, AfterValidator(refuse_unless(False, because="use return_token_ids and /detokenize"))
    ] = None
    web_search_options: Annotated[
        Any, AfterValidator(refuse_unless(because="web search is not supported; remove the field"))
    ] = None

    @property
    def conversation(self) -> list[ChatMessage]:
        """The messages."""
        return self.messages


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
    content: str | None
    refusal: None
    reasoning_content: str | None = None
    tool_calls: list[ToolCall] | None = None


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
    prompt_logprobs: PromptLogprobs | None = None


class ChatDelta(ResponseModel):
    """What is new in a stream; the role comes once, in the first chunk of a choice."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCallDelta] | None = None


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
