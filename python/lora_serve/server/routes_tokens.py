"""/tokenize and /detokenize; /tokenizer_info, which is a router of its own because it is off by default."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from lora_serve.common.errors import InvalidArgumentError, LoraServeError
from lora_serve.server.adapter_selection import model_not_found, select_adapters
from lora_serve.server.chat_plan import check_takes_tools, tools_for_template
from lora_serve.server.chat_prompt import render_chat
from lora_serve.server.context import ServerContext, context_of
from lora_serve.server.disconnect import run_while_connected
from lora_serve.server.generation import name_field
from lora_serve.server.openapi import body_schema
from lora_serve.server.protocol.tokenize import (
    DetokenizeRequest,
    DetokenizeResponse,
    TokenizeRequest,
    TokenizeResponse,
)
from lora_serve.server.request_body import read_body
from lora_serve.server.request_errors import RequestError

router = APIRouter()
info_router = APIRouter()

_OF_MESSAGES = ("add_generation_prompt", "continue_final_message", "chat_template_kwargs", "tools")


@router.post(
    "/tokenize", openapi_extra=body_schema(TokenizeRequest), responses={200: {"model": TokenizeResponse}}
)
async def tokenize(request: Request) -> Response:
    """Give the tokens that a completion or a chat completion would have as its prompt."""
    context = context_of(request)
    body = await read_body(request, TokenizeRequest, context.settings.max_body_bytes)
    await _check_model(context, body.model)
    token_ids = await run_while_connected(request, _encode(context, body))
    tokenizer = context.client.tokenizer
    answer = TokenizeResponse(
        count=len(token_ids),
        max_model_len=context.client.model_info.max_model_len,
        tokens=token_ids,
        token_strs=[tokenizer.decode_token(i) for i in token_ids] if body.return_token_strs else None,
    )
    return Response(answer.to_json(), media_type="application/json")


async def _encode(context: ServerContext, body: TokenizeRequest) -> list[int]:
    if (body.prompt is None) == (body.messages is None):
        raise RequestError(
            "a request has either prompt or messages; send one of them", param="prompt", code="invalid_value"
        )
    if body.prompt is None:
        if body.add_special_tokens:
            raise RequestError(
                "add_special_tokens is for a prompt: the chat template writes its own; remove the field",
                param="add_special_tokens",
                code="unsupported_field",
            )
        tools = None
        if body.tools:
            check_takes_tools(context.client.tokenizer.chat_template)
            tools = tools_for_template([tool.function for tool in body.tools])
        return await render_chat(context, body, tools)
    for field in _OF_MESSAGES:
        if getattr(body, field) is not None:
            raise RequestError(
                f"{field} is for messages but the request has a prompt; remove the field",
                param=field,
                code="unsupported_field",
            )
    try:
        return await context.client.encode(
            body.prompt, add_special_tokens=body.add_special_tokens is not False
        )
    except InvalidArgumentError as error:
        raise name_field(str(error), "prompt") from None


@router.post(
    "/detokenize",
    openapi_extra=body_schema(DetokenizeRequest),
    responses={200: {"model": DetokenizeResponse}},
)
async def detokenize(request: Request) -> Response:
    """Give the text of tokens, special tokens included."""
    context = context_of(request)
    body = await read_body(request, DetokenizeRequest, context.settings.max_body_bytes)
    await _check_model(context, body.model)
    info = context.client.model_info
    if len(body.tokens) > info.max_model_len:
        raise RequestError(
            f"tokens has {len(body.tokens)} entries but max_model_len is {info.max_model_len}; send fewer",
            param="tokens",
            code="context_length_exceeded",
        )
    for token_id in body.tokens:
        if not 0 <= token_id < info.vocab_size:
            raise RequestError(
                f"tokens has the token id {token_id} but the model's ids are in [0, {info.vocab_size})",
                param="tokens",
                code="invalid_value",
            )
    text = context.client.tokenizer.decode(body.tokens, skip_special_tokens=False)
    return Response(DetokenizeResponse(prompt=text).to_json(), media_type="application/json")


@info_router.get("/tokenizer_info", responses={200: {"model": dict[str, Any]}})
async def tokenizer_info(request: Request) -> JSONResponse:
    """Give the settings of the base model's tokenizer, for clients that render or count tokens themselves.

    Every key may ask: all adapters share this tokenizer, and nothing here says which there are.
    """
    return JSONResponse(context_of(request).client.tokenizer.public_settings())


async def _check_model(context: ServerContext, model: str | None) -> None:
    """Require a name that serves; the tokenizer is the same for all."""
    served_model_name = context.settings.served_model_name
    if model is None:
        return
    [lora_name] = select_adapters(model, None, 1, served_model_name)
    if lora_name is None:
        return
    adapters = await context.client.list_lora_adapters()
    if not any(adapter.is_serving and adapter.name == lora_name for adapter in adapters):
        error: LoraServeError = model_not_found(model, served_model_name)
        raise error
