"""/v1/chat/completions."""

from __future__ import annotations

from dataclasses import replace

from fastapi import APIRouter, Request
from fastapi.responses import Response

from lora_serve.common.errors import InvalidArgumentError, LoraServeError
from lora_serve.server.adapter_selection import (
    adapter_not_found,
    may_autoload,
    model_not_found,
    select_adapters,
)
from lora_serve.server.chat_answer import ChatAnswer
from lora_serve.server.context import ServerContext, context_of
from lora_serve.server.disconnect import run_while_connected
from lora_serve.server.generation import PromptJob, name_field, submit_all
from lora_serve.server.openapi import body_schema
from lora_serve.server.protocol.chat import ChatCompletionRequest, ChatCompletionResponse
from lora_serve.server.request_body import read_body
from lora_serve.server.request_errors import RequestError
from lora_serve.server.sampling import chat_sampling_params, check_num_answers, request_queueing
from lora_serve.server.streaming import answer_request

router = APIRouter()

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


@router.post(
    "/v1/chat/completions",
    openapi_extra=body_schema(ChatCompletionRequest),
    responses={200: {"model": ChatCompletionResponse}},
)
async def create_chat_completion(request: Request) -> Response:
    """Give the next message of a conversation."""
    context = context_of(request)
    body = await read_body(request, ChatCompletionRequest, context.settings.max_body_bytes)
    sampling_params = chat_sampling_params(body)
    check_num_answers(1, sampling_params.n, context.settings.max_answers_per_request)
    [lora_name] = select_adapters(body.model, body.lora_path, 1, context.settings.served_model_name)
    job = PromptJob(
        prompt=[],
        sampling_params=sampling_params,
        lora_name=lora_name,
        param="messages",
        queueing=request_queueing(body),
        cache_salt=body.cache_salt,
        autoload=may_autoload(body.model, body.lora_path, context.settings.served_model_name),
    )
    answer = await run_while_connected(request, _accept(context, body, job))
    return await answer_request(request, answer, is_stream=bool(body.stream))


async def _accept(context: ServerContext, body: ChatCompletionRequest, job: PromptJob) -> ChatAnswer:
    """Render the conversation, make it the job's prompt and hand it to the engine; give the answer then."""
    client, served_model_name = context.client, context.settings.served_model_name

    def not_found(lora_name: str) -> LoraServeError:
        if body.lora_path is not None:
            return adapter_not_found(lora_name)
        return model_not_found(body.model, served_model_name)

    job = replace(job, prompt=await _render(context, body))
    [stream] = await submit_all(client, [job], not_found, context.autoloader)
    return ChatAnswer(body, stream, client.tokenizer, served_model_name)


async def _render(context: ServerContext, body: ChatCompletionRequest) -> list[int]:
    template_kwargs = body.chat_template_kwargs or {}
    for name in template_kwargs:
        if name in _RESERVED_TEMPLATE_KWARGS:
            raise RequestError(
                f"chat_template_kwargs has {name!r}, which is not a variable of the chat template; remove it",
                param="chat_template_kwargs",
                code="invalid_value",
            )
    try:
        return await context.client.encode_chat(
            [message.to_template() for message in body.messages],
            add_generation_prompt=body.add_generation_prompt is not False,
            template_kwargs=template_kwargs,
        )
    except InvalidArgumentError as error:
        raise name_field(str(error), "messages") from None
