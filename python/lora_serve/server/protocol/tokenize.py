"""Bodies of /tokenize and /detokenize."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from lora_serve.server.protocol.base import RequestModel, ResponseModel
from lora_serve.server.protocol.chat import ChatMessage
from lora_serve.server.protocol.generation import TokenIds
from lora_serve.server.protocol.known_fields import NoChatTemplate, NoMediaSettings
from lora_serve.server.protocol.tools import Tool


class TokenizeRequest(RequestModel):
    """Text or a conversation to be turned into tokens, as completions and chat completions do it.

    Parameters
    ----------
    model : str or None
        A name that serves; all share the base model's tokenizer.
    prompt : str or None
        Text; either this or `messages`.
    messages : list of ChatMessage or None
        A conversation.
    add_special_tokens : bool or None
        With prompt: add the tokenizer's special tokens; default true.
    add_generation_prompt, continue_final_message, chat_template_kwargs, tools
        With messages: as of a chat completion.
    return_token_strs : bool or None
        Give each token's text, too.
    chat_template, media_io_kwargs, mm_processor_kwargs : None
        vLLM's; only what asks for nothing.
    """

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1, fail_fast=True)] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: Annotated[list[Tool], Field(fail_fast=True)] | None = None
    return_token_strs: bool | None = None
    chat_template: NoChatTemplate = None
    media_io_kwargs: NoMediaSettings = None
    mm_processor_kwargs: NoMediaSettings = None

    @property
    def conversation(self) -> list[ChatMessage]:
        """The messages, where there are some."""
        return self.messages or []


class TokenizeResponse(ResponseModel):
    """The tokens."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class DetokenizeRequest(RequestModel):
    """Tokens to be turned into text.

    Parameters
    ----------
    model : str or None
        A name that serves.
    tokens : list of int
        In the model's vocabulary.
    """

    model: str | None = None
    tokens: TokenIds


class DetokenizeResponse(ResponseModel):
    """The text, special tokens included."""

    prompt: str
