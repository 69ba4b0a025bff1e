"""The prompts of one HTTP request on their way through the engine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass

from lora_serve.common.errors import (
    AdapterNotFoundError,
    InvalidArgumentError,
    LoraServeError,
    QueueTimeoutError,
)
from lora_serve.common.outputs import RequestOutput
from lora_serve.common.queueing import DEFAULT_QUEUEING, Queueing
from lora_serve.common.sampling_params import SamplingParams
from lora_serve.engine.isolation import make_domain
from lora_serve.engine.request_stream import RequestStream
from lora_serve.server.caller_client import HIDDEN_GENERATION
from lora_serve.server.context import ServerContext
from lora_serve.server.disconnect import cancel_and_wait
from lora_serve.server.protocol.generation import PromptTokensDetails, Usage
from lora_serve.server.request_errors import RequestError

_CHECKED_BY_ENGINE = frozenset(
    {"max_tokens", "min_tokens", "stop_token_ids", "logit_bias", "allowed_token_ids", "structured_outputs"}
)


@dataclass(frozen=True)
class PromptJob:
    """One prompt, how it is sampled and the adapter that it runs under.

    Parameters
    ----------
    prompt : str or list of int
        Text or token ids.
    sampling_params : SamplingParams
        With `n` answers.
    lora_name : str or None
        The adapter; None = the base model.
    param : str
        The request's field that holds the prompt, for errors.
    text : str or None
        The text that token ids were made of, when there was one.
    queueing : Queueing
        Priority, and how long it may wait.
    cache_salt : str or None
        Cached prefixes are shared among requests of one salt only.
    autoload : bool
        The adapter's name may be a path that is loaded on first use.
    """

    prompt: str | list[int]
    sampling_params: SamplingParams
    lora_name: str | None
    param: str
    text: str | None = None
    queueing: Queueing = DEFAULT_QUEUEING
    cache_salt: str | None = None
    autoload: bool = False


async def submit_all(
    context: ServerContext,
    jobs: Sequence[PromptJob],
    not_found: Callable[[str], LoraServeError],
) -> list[RequestStream]:
    """Submit every prompt, or none: when one is refused, the others are aborted.

    Parameters
    ----------
    context : ServerContext
        The engine, as the caller may use it, and what loads the adapters of jobs that allow it.
    jobs : sequence of PromptJob
        In the order in which they are queued.
    not_found : callable
        Gives the error for an adapter that is not loaded.

    Returns
    -------
    list of RequestStream
        One a job, accepted by the engine. The caller closes them.

    Raises
    ------
    LoraServeError
        Why the first refused prompt was refused.
    """
    tasks = [asyncio.ensure_future(_submit(context, job, not_found)) for job in jobs]
    try:
        return await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(result, RequestStream):
                await result.aclose()
        raise


async def _submit(
    context: ServerContext, job: PromptJob, not_found: Callable[[str], LoraServeError]
) -> RequestStream:
    autoloader = context.autoloader
    if job.lora_name is None or autoloader is None or not job.autoload:
        return await _hand_over(context, job, not_found)
    with autoloader.using(job.lora_name):
        try:
            return await _hand_over(context, job, not_found)
        except AdapterNotFoundError as error:
            try:
                await asyncio.wait_for(autoloader.load(job.lora_name), job.queueing.timeout_s)
            except AdapterNotFoundError:
                raise error from None
            except asyncio.TimeoutError:
                raise QueueTimeoutError(
                    f"the request's queue_timeout of {job.queueing.timeout_s} s has passed while adapter "
                    f"{job.lora_name!r} is being loaded, which goes on; send it again",
                    retry_after_s=1,
                ) from None
            except InvalidArgumentError as refusal:
                param = getattr(error, "param", None)
                raise RequestError(str(refusal), param=param, code="invalid_adapter") from None
        return await _hand_over(context, job, not_found)


async def _hand_over(
    context: ServerContext, job: PromptJob, not_found: Callable[[str], LoraServeError]
) -> RequestStream:
    context.lifecycle.require_engine()
    try:
        return await context.client.submit(
            job.prompt,
            job.sampling_params,
            lora_name=job.lora_name,
            queueing=job.queueing,
            isolation_domain=make_domain(None, job.cache_salt),
        )
    except AdapterNotFoundError:
        context.lifecycle.require_engine()  # The prompt's tokenising may have lasted for the engine's end.
        if job.lora_name is None:
            raise
        raise not_found(job.lora_name) from None
    except RequestError:
        raise
    except InvalidArgumentError as error:
        raise name_field(str(error), job.param) from None


def name_field(message: str, prompt_param: str) -> RequestError:
    """Name the field in what the engine says of a request: its messages start with it, or with the prompt."""
    field = message.split(" ", 1)[0].split(".", 1)[0]
    code = "context_length_exceeded" if "max_model_len" in message else "invalid_value"
    return RequestError(message, param=field if field in _CHECKED_BY_ENGINE else prompt_param, code=code)


async def collect_all(streams: Sequence[RequestStream]) -> list[RequestOutput]:
    """Wait for every stream's end; when one fails, or the caller is cancelled, the others are aborted.

    Raises
    ------
    LoraServeError
        Why the first failed one failed.
    """
    tasks = [asyncio.ensure_future(stream.collect()) for stream in streams]
    try:
        return await asyncio.gather(*tasks)
    finally:
        await cancel_and_wait(*tasks)
        await close_all(streams)


async def close_all(streams: Sequence[RequestStream]) -> None:
    """Abort what still runs."""
    for stream in streams:
        await stream.aclose()


async def merge_streams(streams: Sequence[RequestStream]) -> AsyncIterator[tuple[int, RequestOutput]]:
    """Give the deltas of several streams as they come.

    Yields
    ------
    tuple of int and RequestOutput
        The stream's index, and its delta.

    Raises
    ------
    LoraServeError
        Why the first failed stream failed.
    """
    if len(streams) == 1:
        async for output in streams[0]:
            yield 0, output
        return
    arrived: asyncio.Queue[tuple[int, RequestOutput] | BaseException | None] = asyncio.Queue()

    async def forward(index: int, stream: RequestStream) -> None:
        try:
            async for output in stream:
                arrived.put_nowait((index, output))
            arrived.put_nowait(None)
        except Exception as error:
            arrived.put_nowait(error)

    tasks = [asyncio.ensure_future(forward(index, stream)) for index, stream in enumerate(streams)]
    try:
        num_open = len(tasks)
        while num_open:
            item = await arrived.get()
            if item is None:
                num_open -= 1
            elif isinstance(item, BaseException):
                raise item
            else:
                yield item
    finally:
        await cancel_and_wait(*tasks)


class UsageCounter:
    """Adds up the tokens of one HTTP request: a prompt counts once, however many answers it has.

    Parameters
    ----------
    streams : sequence of RequestStream
        The accepted prompts.
    """

    def __init__(self, streams: Sequence[RequestStream]) -> None:
        self._num_prompt_tokens = sum(len(stream.prompt_token_ids) for stream in streams)
        self._num_completion_tokens = 0
        self._num_cached_tokens = [0] * len(streams)

    def add(self, index: int, output: RequestOutput, *, counts_completion: bool = True) -> None:
        """Count an output of stream `index`."""
        self._num_cached_tokens[index] = max(self._num_cached_tokens[index], output.num_cached_tokens)
        if counts_completion:
            self._num_completion_tokens += sum(len(answer.token_ids) for answer in output.outputs)

    def usage(self) -> Usage:
        """Give the counts so far."""
        return Usage(
            prompt_tokens=self._num_prompt_tokens,
            completion_tokens=self._num_completion_tokens,
            total_tokens=self._num_prompt_tokens + self._num_completion_tokens,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=sum(self._num_cached_tokens)),
        )


def fingerprint(stream: RequestStream, served_model_name: str) -> str:
    """Name the generation that answers, such as 'sql-v2-g3-5f0c2a91'; the base model is generation 0.

    For a caller who may not see how many adapters others load, the number is left out.
    """
    if stream.lora_name is None:
        return f"{served_model_name}-g0"
    if stream.adapter_id == HIDDEN_GENERATION:
        return f"{stream.lora_name}-{stream.content_digest[:8]}"
    return f"{stream.lora_name}-g{stream.adapter_id}-{stream.content_digest[:8]}"


def joint_fingerprint(streams: Sequence[RequestStream], served_model_name: str) -> str:
    """Name every generation that takes part in an answer, in order of first use, joined by commas."""
    return ",".join(dict.fromkeys(fingerprint(stream, served_model_name) for stream in streams))
