"""The answer to /v1/chat/completions, whole or in chunks."""

from __future__ import annotations

from collections.abc import AsyncIterator

from lora_serve.common.outputs import CompletionOutput
from lora_serve.engine.request_stream import RequestStream
from lora_serve.engine.tokenizer import Tokenizer
from lora_serve.server.context import AnswerHeader
from lora_serve.server.generation import UsageCounter, collect_all, fingerprint, merge_streams
from lora_serve.server.logprob_formats import LogprobFormatter
from lora_serve.server.protocol.chat import (
    AssistantMessage,
    ChatChoice,
    ChatChunkChoice,
    ChatCompletionChunk,
    ChatCompletionRequest,
    ChatCompletionResponse,
    ChatDelta,
    ChatLogprobs,
)
from lora_serve.server.protocol.generation import StreamOptions, Usage


class ChatAnswer:
    """Makes response bodies from the outputs of a conversation's stream.

    Parameters
    ----------
    request : ChatCompletionRequest
        What was asked for.
    stream : RequestStream
        The accepted prompt.
    tokenizer : Tokenizer
        For the text of single tokens.
    served_model_name : str
        The base model's name, for the fingerprint.
    """

    def __init__(
        self,
        request: ChatCompletionRequest,
        stream: RequestStream,
        tokenizer: Tokenizer,
        served_model_name: str,
    ) -> None:
        self._request = request
        self._stream = stream
        self.streams = [stream]
        self._header = AnswerHeader.make("chatcmpl", request.model)
        self._fingerprint = fingerprint(stream, served_model_name)
        self._formatter = LogprobFormatter(tokenizer, request.top_logprobs or 0)
        self._usage = UsageCounter([stream])

    async def whole(self) -> ChatCompletionResponse:
        """Wait for every answer and give them in one body."""
        [output] = await collect_all(self.streams)
        self._usage.add(0, output)
        body = ChatCompletionResponse(
            id=self._header.answer_id,
            object="chat.completion",
            created=self._header.created,
            model=self._header.model,
            system_fingerprint=self._fingerprint,
            choices=[self._choice(answer) for answer in output.outputs],
            usage=self._usage.usage(),
        )
        if self._request.return_token_ids:
            body.prompt_token_ids = self._stream.prompt_token_ids
        return body

    async def chunks(self) -> AsyncIterator[ChatCompletionChunk]:
        """Give each answer's role, then the answers piece by piece, and the usage when it was asked for."""
        options = self._request.stream_options or StreamOptions()
        for index in range(self._request.n or 1):
            delta = ChatDelta(role="assistant", content="")
            choice = ChatChunkChoice(index=index, delta=delta, logprobs=None, finish_reason=None)
            chunk = self._chunk([choice], options)
            if self._request.return_token_ids and index == 0:
                chunk.prompt_token_ids = self._stream.prompt_token_ids
            yield chunk
        async for _, output in merge_streams(self.streams):
            self._usage.add(0, output)
            for answer in output.outputs:
                choice = self._chunk_choice(answer)
                if _has_news(choice):
                    yield self._chunk([choice], options)
        if options.include_usage:
            chunk = self._chunk([], options)
            chunk.usage = self._usage.usage()
            yield chunk

    def _choice(self, answer: CompletionOutput) -> ChatChoice:
        choice = ChatChoice(
            index=answer.index,
            message=AssistantMessage(role="assistant", content=answer.text, refusal=None),
            logprobs=self._logprobs(answer),
            finish_reason=answer.finish_reason,
            stop_reason=answer.stop_reason,
        )
        if self._request.return_token_ids:
            choice.token_ids = answer.token_ids
        return choice

    def _chunk_choice(self, answer: CompletionOutput) -> ChatChunkChoice:
        choice = ChatChunkChoice(
            index=answer.index,
            delta=ChatDelta(content=answer.text) if answer.text else ChatDelta(),
            logprobs=self._logprobs(answer),
            finish_reason=answer.finish_reason,
            stop_reason=answer.stop_reason,
        )
        if self._request.return_token_ids:
            choice.token_ids = answer.token_ids
        return choice

    def _logprobs(self, answer: CompletionOutput) -> ChatLogprobs | None:
        if not self._request.logprobs:
            return None
        return self._formatter.for_chat(answer.token_ids, answer.logprobs or [])

    def _chunk(self, choices: list[ChatChunkChoice], options: StreamOptions) -> ChatCompletionChunk:
        chunk = ChatCompletionChunk(
            id=self._header.answer_id,
            object="chat.completion.chunk",
            created=self._header.created,
            model=self._header.model,
            system_fingerprint=self._fingerprint,
            choices=choices,
        )
        if options.include_usage:
            usage: Usage | None = self._usage.usage() if options.continuous_usage_stats else None
            chunk.usage = usage
        return chunk


def _has_news(choice: ChatChunkChoice) -> bool:
    """Tell whether a chunk is worth sending: part of a character is a token without text."""
    return bool(
        choice.delta.content
        or choice.finish_reason
        or choice.token_ids
        or (choice.logprobs and choice.logprobs.content)
    )
