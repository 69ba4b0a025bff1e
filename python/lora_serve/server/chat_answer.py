"""The answer to /v1/chat/completions, whole or in chunks."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable

from lora_serve.common.outputs import CompletionOutput
from lora_serve.engine.request_stream import RequestStream
from lora_serve.engine.tokenizer import Tokenizer
from lora_serve.server.answer_parts import AnswerParts, whole_calls
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
from lora_serve.server.protocol.generation import FinishReasonField, StreamOptions, Usage


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
    make_parts : callable or None
        Makes what splits an answer into reasoning, content and calls; None = it is all content.
    """

    def __init__(
        self,
        request: ChatCompletionRequest,
        stream: RequestStream,
        tokenizer: Tokenizer,
        served_model_name: str,
        make_parts: Callable[[], AnswerParts] | None = None,
    ) -> None:
        self._request = request
        self._stream = stream
        self.streams = [stream]
        self._header = AnswerHeader.make("chatcmpl", request.model, request.request_id)
        self._fingerprint = fingerprint(stream, served_model_name)
        self._formatter = LogprobFormatter(tokenizer, request.top_logprobs or 0)
        self._usage = UsageCounter([stream])
        self._make_parts = make_parts
        self._parts: dict[int, AnswerParts] = {}

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
        if self._request.prompt_logprobs is not None:
            body.prompt_logprobs = self._formatter.for_prompt(
                self._stream.prompt_token_ids, output.prompt_logprobs or [], self._request.prompt_logprobs
            )
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
        message = AssistantMessage(role="assistant", content=answer.text, refusal=None)
        parts = self._parts_of(answer)
        if parts is not None:
            piece = parts.take(answer.text, is_last=True)
            message.content = piece.content or (None if piece.calls else "")
            if piece.calls:
                message.tool_calls = whole_calls(piece)
            if piece.reasoning and self._shows_reasoning:
                message.reasoning_content = piece.reasoning
        choice = ChatChoice(
            index=answer.index,
            message=message,
            logprobs=self._logprobs(answer),
            finish_reason=_finish_reason(answer, parts),
            stop_reason=answer.stop_reason,
        )
        if self._request.return_token_ids:
            choice.token_ids = answer.token_ids
        return choice

    def _chunk_choice(self, answer: CompletionOutput) -> ChatChunkChoice:
        delta, content = ChatDelta(), answer.text
        parts = self._parts_of(answer)
        if parts is not None:
            piece = parts.take(answer.text, is_last=answer.finished)
            content = piece.content
            if piece.calls:
                delta.tool_calls = piece.calls
            if piece.reasoning and self._shows_reasoning:
                delta.reasoning_content = piece.reasoning
        if content:
            delta.content = content
        choice = ChatChunkChoice(
            index=answer.index,
            delta=delta,
            logprobs=self._logprobs(answer),
            finish_reason=_finish_reason(answer, parts),
            stop_reason=answer.stop_reason,
        )
        if self._request.return_token_ids:
            choice.token_ids = answer.token_ids
        return choice

    @property
    def _shows_reasoning(self) -> bool:
        return self._request.include_reasoning is not False

    def _parts_of(self, answer: CompletionOutput) -> AnswerParts | None:
        if self._make_parts is None:
            return None
        if answer.index not in self._parts:
            self._parts[answer.index] = self._make_parts()
        return self._parts[answer.index]

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


def _finish_reason(answer: CompletionOutput, parts: AnswerParts | None) -> FinishReasonField:
    if answer.finish_reason == "stop" and parts is not None and parts.num_calls:
        return "tool_calls"
    return answer.finish_reason


def _has_news(choice: ChatChunkChoice) -> bool:
    """Tell whether a chunk is worth sending: part of a character is a token without text."""
    return bool(
        choice.delta.content
        or choice.delta.reasoning_content
        or choice.delta.tool_calls
        or choice.finish_reason
        or choice.token_ids
        or (choice.logprobs and choice.logprobs.content)
    )
