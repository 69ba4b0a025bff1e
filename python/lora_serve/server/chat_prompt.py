"""From the messages of a request to the tokens that the model reads."""

from __future__ import annotations

from typing import Any, Protocol

from lora_serve.common.errors import InvalidArgumentError
from lora_serve.server.context import ServerContext
from lora_serve.server.generation import name_field
from lora_serve.server.protocol.chat import ChatMessage
from lora_serve.server.request_errors import RequestError

_RESERVED_TEMPLATE_KWARGS = frozenset(
    {
        "add_generation_prompt",
        "chat_template",
        "continue_final_message",
        "conversation",
        "documents",
        "max_length",
        "messages",
        "padding",
        "processor_kwargs",
        "return_assistant_tokens_mask",
        "return_dict",
        "return_tensors",
        "tokenize",
        "tokenizer_kwargs",
        "tools",
        "truncation",
    }
)
"""Parameters of the renderer itself, which are not variables of the template."""


class Conversation(Protocol):
    """A request with messages."""

    chat_template_kwargs: dict[str, Any] | None
    add_generation_prompt: bool | None
    continue_final_message: bool | None

    @property
    def conversation(self) -> list[ChatMessage]:
        """The messages, at least one."""
        ...


async def render_chat(
    context: ServerContext, body: Conversation, tools: list[dict[str, Any]] | None
) -> list[int]:
    """Render the model's chat template and tokenise it.

    Parameters
    ----------
    context : ServerContext
        The server's.
    body : Conversation
        The request.
    tools : list of dict, or None
        What the template shows to the model.

    Raises
    ------
    RequestError
        A field is wrong, or the template refuses the messages.
    """
    template_kwargs = dict(body.chat_template_kwargs or {})
    for name in template_kwargs:
        if name in _RESERVED_TEMPLATE_KWARGS:
            raise RequestError(
                f"chat_template_kwargs has {name!r}, which is not a variable of the chat template; remove it",
                param="chat_template_kwargs",
                code="invalid_value",
            )
    if tools is not None:
        template_kwargs["tools"] = tools
    if body.continue_final_message:
        if body.add_generation_prompt:
            raise RequestError(
                "continue_final_message and add_generation_prompt exclude each other; send one of them",
                param="continue_final_message",
                code="invalid_value",
            )
        template_kwargs["continue_final_message"] = True
    adds_prompt = body.add_generation_prompt is not False and not body.continue_final_message
    try:
        return await context.client.encode_chat(
            _messages_of(body), add_generation_prompt=adds_prompt, template_kwargs=template_kwargs
        )
    except InvalidArgumentError as error:
        if isinstance(error, RequestError):
            raise
        raise name_field(str(error), "messages") from None


def _messages_of(body: Conversation) -> list[dict[str, Any]]:
    messages = []
    for index, message in enumerate(body.conversation):
        try:
            messages.append(message.to_template())
        except ValueError as error:
            raise RequestError(
                f"messages.{index}.tool_calls: the arguments of a call must be a JSON object's text: {error}",
                param=f"messages.{index}.tool_calls",
                code="invalid_value",
            ) from None
    return messages
