"""/v1/completions."""

from __future__ import annotations

from dataclasses import replace

from fastapi import APIRouter, Request
from fastapi.responses import Response

from lora_serve.common.errors import InvalidArgumentError, LoraServeError
from lora_serve.common.sampling_params import SamplingParams
from lora_serve.server.adapter_selection import (
    adapter_not_found,
    may_autoload,
    model_not_found,
    select_adapters,
)
from lora_serve.server.completion_answer import AcceptedPrompt, CompletionAnswer
from lora_serve.server.context import ServerContext, context_of
from lora_serve.server.disconnect import run_while_connected
from lora_serve.server.generation import PromptJob, name_field, submit_all
from lora_serve.server.openapi import EVENT_STREAM, body_schema
from lora_serve.server.protocol.completion import CompletionRequest, CompletionResponse
from lora_serve.server.request_body import read_body
from lora_serve.server.request_errors import RequestError
from lora_serve.server.sampling import (
    check_num_answers,
    completion_sampling_params,
    request_queueing,
    with_default_max_tokens,
)
from lora_serve.server.settings import ServerSettings
from lora_serve.server.streaming import answer_request

router = APIRouter()


@router.post(
    "/v1/completions",
    openapi_extra=body_schema(CompletionRequest),
    responses={200: {"model": CompletionResponse, "content": EVENT_STREAM}},
)
async def create_completion(request: Request) -> Response:
    """Continue one or several prompts."""
    context = context_of(request)
    body = await read_body(request, CompletionRequest, context.settings.max_body_bytes)
    sampling_params = completion_sampling_params(body)
    jobs = _make_jobs(body, sampling_params, context.settings)
    answer = await run_while_connected(request, _accept(context, body, jobs))
    return await answer_request(request, answer, is_stream=bool(body.stream))


async def _accept(context: ServerContext, body: CompletionRequest, jobs: list[PromptJob]) -> CompletionAnswer:
    """Hand the prompts to the engine; give the answer once all of them are accepted."""
    client, served_model_name = context.client, context.settings.served_model_name

    def not_found(lora_name: str) -> LoraServeError:
        if body.lora_path is not None:
            return adapter_not_found(lora_name)
        return model_not_found(body.model, served_model_name)

    # Text is tokenised here where the server needs the tokens, else by the client.
    if body.add_special_tokens is False or body.max_tokens is None:
        jobs = [await _encode(context, body, job) for job in jobs]
    if body.max_tokens is None:
        jobs = [_with_default_max_tokens(context, job) for job in jobs]
    streams = await submit_all(context, jobs, not_found)
    prompts = []
    for job, stream in zip(jobs, streams, strict=True):
        text = job.prompt if isinstance(job.prompt, str) else job.text
        if body.echo and text is None:
            text = client.tokenizer.decode(stream.prompt_token_ids, skip_special_tokens=False)
        prompts.append(AcceptedPrompt(stream=stream, text=text or ""))
    return CompletionAnswer(body, prompts, client.tokenizer, served_model_name)


async def _encode(context: ServerContext, body: CompletionRequest, job: PromptJob) -> PromptJob:
    if not isinstance(job.prompt, str):
        return job
    try:
        token_ids = await context.client.encode(
            job.prompt, add_special_tokens=body.add_special_tokens is not False
        )
    except InvalidArgumentError as error:
        raise name_field(str(error), job.param) from None
    return replace(job, prompt=token_ids, text=job.prompt)


def _with_default_max_tokens(context: ServerContext, job: PromptJob) -> PromptJob:
    room = context.client.model_info.max_model_len - len(job.prompt)
    return replace(job, sampling_params=with_default_max_tokens(job.sampling_params, room))


def _make_jobs(
    body: CompletionRequest, sampling_params: SamplingParams, settings: ServerSettings
) -> list[PromptJob]:
    """Give each prompt its adapter.

    Raises
    ------
    RequestError
        There is no prompt, a prompt is empty, there are too many answers to give, the choice of adapters is
        contradictory, or a field that says how to wait is out of range.
    """
    prompts, is_batch = _split_prompts(body)
    check_num_answers(len(prompts), sampling_params.n, settings.max_answers_per_request)
    for index, prompt in enumerate(prompts):
        if not prompt:
            name = f"prompt {index}" if is_batch else "prompt"
            raise RequestError(
                f"{name} is empty but must have at least one token; send some text",
                param="prompt",
                code="empty_prompt",
            )
    lora_names = select_adapters(body.model, body.lora_path, len(prompts), settings.served_model_name)
    queueing = request_queueing(body)
    return [
        PromptJob(
            prompt=prompt,
            sampling_params=sampling_params,
            lora_name=lora_name,
            param="prompt",
            queueing=queueing,
            cache_salt=body.cache_salt,
            autoload=may_autoload(body.model, body.lora_path, settings.served_model_name),
        )
        for prompt, lora_name in zip(prompts, lora_names, strict=True)
    ]


def _split_prompts(body: CompletionRequest) -> tuple[list[str | list[int]], bool]:
    """Give the prompts one by one, and whether the request has a list of them."""
    if isinstance(body.prompt, str):
        return [body.prompt], False
    token_ids = [part for part in body.prompt if isinstance(part, int)]
    if token_ids:
        return [token_ids], False
    if not body.prompt:
        return [""], False
    return [part for part in body.prompt if not isinstance(part, int)], True
