"""LoRAX's /generate and /generate_stream, and / as its client package calls it."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from dataclasses import replace
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from lora_serve.common.errors import InvalidArgumentError
from lora_serve.lora.sources import may_be_local
from lora_serve.server.adapter_selection import adapter_not_found, select_adapters
from lora_serve.server.context import ServerContext, context_of
from lora_serve.server.disconnect import run_while_connected
from lora_serve.server.error_shapes import lorax_error
from lora_serve.server.generation import PromptJob, name_field, submit_all
from lora_serve.server.lorax_answer import LoraxAnswer, LoraxJob
from lora_serve.server.lorax_sampling import lorax_sampling_params, rename_fields
from lora_serve.server.openapi import EVENT_STREAM, body_schema
from lora_serve.server.protocol.lorax import (
    LoraxError,
    LoraxParameters,
    LoraxRequest,
    LoraxResponse,
)
from lora_serve.server.request_body import read_body
from lora_serve.server.request_errors import ModelNotFoundError, RequestError
from lora_serve.server.sampling import check_num_answers
from lora_serve.server.settings import AutoloadSettings
from lora_serve.server.streaming import EventStreamResponse, translate_stream_error

router = APIRouter()

BASE_MODEL_ADAPTER_ID = "__base_model__"
"""LoRAX's `adapter_id` of the base model."""
_ERRORS: dict[int | str, dict[str, Any]] = {"4XX": {"model": LoraxError}, "5XX": {"model": LoraxError}}


@router.post(
    "/generate",
    openapi_extra=body_schema(LoraxRequest),
    responses={200: {"model": LoraxResponse}, **_ERRORS},
)
async def generate(request: Request) -> Response:
    """Continue a prompt, in LoRAX's form."""
    body = await _read(request)
    if body.stream:
        raise RequestError("stream is true, but /generate gives whole answers; use /generate_stream")
    answer = await _accept(request, body, is_stream=False)
    response = await run_while_connected(request, answer.whole())
    return Response(response.to_json(), media_type="application/json")


@router.post(
    "/generate_stream",
    openapi_extra=body_schema(LoraxRequest),
    response_class=Response,
    responses={200: {"content": EVENT_STREAM, "description": "One event a token"}, **_ERRORS},
)
async def generate_stream(request: Request) -> Response:
    """Continue a prompt token by token, in LoRAX's form."""
    body = await _read(request)
    if body.stream is False:
        raise RequestError("stream is false, but /generate_stream gives streams; use /generate")
    return await _stream(request, body)


@router.post(
    "/",
    openapi_extra=body_schema(LoraxRequest),
    responses={200: {"model": list[LoraxResponse], "content": EVENT_STREAM}, **_ERRORS},
)
async def generate_or_stream(request: Request) -> Response:
    """Do what /generate does, in a list of one, or with `stream` what /generate_stream does."""
    body = await _read(request)
    if body.stream:
        return await _stream(request, body)
    answer = await _accept(request, body, is_stream=False)
    response = await run_while_connected(request, answer.whole())
    return Response(f"[{response.to_json()}]", media_type="application/json")


async def _stream(request: Request, body: LoraxRequest) -> Response:
    answer = await _accept(request, body, is_stream=True)
    return EventStreamResponse(_as_events(answer, context_of(request)), answer.streams)


async def _read(request: Request) -> LoraxRequest:
    return await read_body(request, LoraxRequest, context_of(request).settings.max_body_bytes)


async def _accept(request: Request, body: LoraxRequest, *, is_stream: bool) -> LoraxAnswer:
    context = context_of(request)
    parameters = body.parameters or LoraxParameters()
    sampling_params = lorax_sampling_params(parameters, is_stream=is_stream)
    check_num_answers(1, sampling_params.n, context.settings.max_answers_per_request)
    lora_name = None if parameters.adapter_id in ("", BASE_MODEL_ADAPTER_ID) else parameters.adapter_id
    base = context.settings.served_model_name
    [lora_name] = select_adapters(base, lora_name, 1, base)
    job = PromptJob(
        prompt=body.inputs,
        sampling_params=sampling_params,
        lora_name=lora_name,
        param="inputs",
        autoload=_source_agrees(parameters, context.settings.autoload),
    )
    lorax_job = LoraxJob(body.inputs, parameters, sampling_params)
    return await run_while_connected(request, _submit(context, job, lorax_job))


def _source_agrees(parameters: LoraxParameters, autoload: AutoloadSettings | None) -> bool:
    """Tell whether the id may be loaded on first use: not where it means another source than the request."""
    adapter_id, source = parameters.adapter_id, parameters.adapter_source
    if adapter_id is None or autoload is None or source is None:
        return True
    if source == "s3":
        return adapter_id.startswith("s3://")
    return may_be_local(adapter_id, allow_hub=autoload.allow_hub) == (source == "local")


def _not_found(adapter_id: str) -> ModelNotFoundError:
    message = str(adapter_not_found(adapter_id)).replace("lora_path", "adapter_id", 1)
    return ModelNotFoundError(message, param="adapter_id")


async def _submit(context: ServerContext, job: PromptJob, lorax_job: LoraxJob) -> LoraxAnswer:
    client = context.client
    try:
        if lorax_job.parameters.truncate is not None:
            token_ids = await client.encode(lorax_job.inputs)
            job = replace(job, prompt=token_ids[-lorax_job.parameters.truncate :])
        [stream] = await submit_all(context, [job], _not_found)
    except InvalidArgumentError as error:
        raise name_field(rename_fields(str(error)), job.param) from None
    return LoraxAnswer(lorax_job, stream, client.tokenizer)


async def _as_events(answer: LoraxAnswer, context: ServerContext) -> AsyncGenerator[str, None]:
    """Give server-sent events, the last one with the whole text; an error becomes an event that ends them."""
    try:
        async for event in answer.events():
            yield f"data:{event.to_json()}\n\n"
    except Exception as error:
        _, body = lorax_error(*translate_stream_error(error, context))
        yield f"data:{json.dumps(body)}\n\n"
