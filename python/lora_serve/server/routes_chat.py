"""/v1/chat/completions."""

from __future__ import annotations

from dataclasses import replace

import msgspec
from fastapi import APIRouter, Request
from fastapi.responses import Response

from lora_serve.common.errors import LoraServeError
from lora_serve.common.sampling_params import SamplingParams
from lora_serve.engine.engine_client import AsyncEngineClient
from lora_serve.server.adapter_selection import (
    adapter_not_found,
    may_autoload,
    model_not_found,
    select_adapters,
)
from lora_serve.server.answer_parts import AnswerParts
from lora_serve.server.chat_answer import ChatAnswer
from lora_serve.server.chat_plan import ChatPlan, ModelFormats, plan_chat
from lora_serve.server.chat_prompt import render_chat
from lora_serve.server.context import ServerContext, context_of
from lora_serve.server.disconnect import run_while_connected
from lora_serve.server.generation import PromptJob, submit_all
from lora_serve.server.openapi import EVENT_STREAM, body_schema
from lora_serve.server.parsing.choice import choose_tool_parser
from lora_serve.server.parsing.reasoning import (
    ReasoningSplitter,
    ReasoningStart,
    find_start,
    reasoning_tokens,
)
from lora_serve.server.protocol.chat import ChatCompletionRequest, ChatCompletionResponse
from lora_serve.server.request_body import read_body
from lora_serve.server.sampling import chat_sampling_params, check_num_answers, request_queueing
from lora_serve.server.streaming import answer_request

router = APIRouter()


@router.post(
    "/v1/chat/completions",
    openapi_extra=body_schema(ChatCompletionRequest),
    responses={200: {"model": ChatCompletionResponse, "content": EVENT_STREAM}},
)
async def create_chat_completion(request: Request) -> Response:
    """Give the next message of a conversation."""
    context = context_of(request)
    body = await read_body(request, ChatCompletionRequest, context.settings.max_body_bytes)
    plan = plan_chat(body, _formats_of(context))
    sampling_params = chat_sampling_params(body, plan.form)
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
    answer = await run_while_connected(request, _accept(context, body, plan, job))
    return await answer_request(request, answer, is_stream=bool(body.stream))


async def _accept(
    context: ServerContext, body: ChatCompletionRequest, plan: ChatPlan, job: PromptJob
) -> ChatAnswer:
    """Render the conversation, make it the job's prompt and hand it to the engine; give the answer then."""
    client, served_model_name = context.client, context.settings.served_model_name

    def not_found(lora_name: str) -> LoraServeError:
        if body.lora_path is not None:
            return adapter_not_found(lora_name)
        return model_not_found(body.model, served_model_name)

    prompt = await render_chat(context, body, plan.tools)
    start = None
    if context.settings.reasoning_parser is not None:
        start = find_start(prompt, client.tokenizer)
    job = replace(job, prompt=prompt, sampling_params=_after_reasoning(job.sampling_params, start, client))
    [stream] = await submit_all(context, [job], not_found)

    def make_parts() -> AnswerParts:
        splitter = None if start is None else ReasoningSplitter(start)
        tool_parser = None if plan.make_tool_parser is None else plan.make_tool_parser()
        return AnswerParts(splitter, tool_parser, plan.max_calls)

    is_all_content = start is None and plan.make_tool_parser is None
    return ChatAnswer(
        body, stream, client.tokenizer, served_model_name, None if is_all_content else make_parts
    )


def _formats_of(context: ServerContext) -> ModelFormats:
    template, settings = context.client.tokenizer.chat_template, context.settings
    return ModelFormats(
        make_tool_parser=choose_tool_parser(settings.tool_call_parser, template),
        chat_template=template,
    )


def _after_reasoning(
    params: SamplingParams, start: ReasoningStart | None, client: AsyncEngineClient
) -> SamplingParams:
    """Let the form of the answer begin where its reasoning ends."""
    form = params.structured_outputs
    if form is None or start is None:
        return params
    form = msgspec.structs.replace(form, reasoning=reasoning_tokens(start, client.tokenizer))
    return msgspec.structs.replace(params, structured_outputs=form)
