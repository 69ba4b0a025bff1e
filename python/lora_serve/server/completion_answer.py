"""The answer to /v1/completions, whole or in chunks."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

from lora_serve.common.outputs import CompletionOutput, Logprob, RequestOutput
from lora_serve.engine.request_stream import RequestStream
from lora_serve.engine.tokenizer import Tokenizer
from lora_serve.server.context import AnswerHeader
from lora_serve.server.generation import (
    UsageCounter,
    collect_all,
    fingerprint,
    joint_fingerprint,
    merge_streams,
)
from lora_serve.server.logprob_formats import LogprobFormatter, join_completion_logprobs
from lora_serve.server.protocol.completion import (
    CompletionChoice,
    CompletionRequest,
    CompletionResponse,
)
from lora_serve.server.protocol.generation import StreamOptions, Usage
from lora_serve.server.text_offsets import AnswerOffsets, prompt_offsets


@dataclass(frozen=True)
class AcceptedPrompt:
    """A prompt that the engine has accepted.

    Parameters
    ----------
    stream : RequestStream
        Its answers.
    text : str
        The prompt's text, for echo; empty without echo.
    """

    stream: RequestStream
    text: str


@dataclass
class _ChoiceState:
    """What a choice has shown so far."""

    has_started: bool = False
    offsets: AnswerOffsets | None = None


class _PromptState:
    """What is known of a prompt, and the outputs that wait for more."""

    def __init__(self, *, needs_logprobs: bool) -> None:
        self._needs_logprobs = needs_logprobs
        self._held_back: list[RequestOutput] = []
        self.logprobs: list[dict[int, Logprob] | None] | None = None
        self.offsets: list[int] | None = None
        self.choices: dict[int, _ChoiceState] = {}

    def take(self, output: RequestOutput) -> list[RequestOutput]:
        """Give the outputs that can be shown now.

        The prompt's log probabilities come with the first output of the first answer; another answer that is
        ahead of it waits, because it repeats the prompt too.
        """
        self._held_back.append(output)
        if output.prompt_logprobs is not None:
            self.logprobs = output.prompt_logprobs
        if self._needs_logprobs and self.logprobs is None and not output.finished:
            return []
        ready, self._held_back = self._held_back, []
        return ready


class CompletionAnswer:
    """Makes response bodies from the outputs of a completion's prompts.

    Choices are numbered prompt by prompt: answer j of prompt i is choice i * n + j.

    Parameters
    ----------
    request : CompletionRequest
        What was asked for.
    prompts : sequence of AcceptedPrompt
        In the order of the request.
    tokenizer : Tokenizer
        For the text of single tokens.
    served_model_name : str
        The base model's name, for fingerprints.
    """

    def __init__(
        self,
        request: CompletionRequest,
        prompts: Sequence[AcceptedPrompt],
        tokenizer: Tokenizer,
        served_model_name: str,
    ) -> None:
        self._request = request
        self._prompts = prompts
        self.streams = [prompt.stream for prompt in prompts]
        self._tokenizer = tokenizer
        self._served_model_name = served_model_name
        self._header = AnswerHeader.make("cmpl", request.model, request.request_id)
        self._formatter = LogprobFormatter(tokenizer, request.logprobs or 0)
        self._usage = UsageCounter(self.streams)
        # With max_tokens 0 the engine computes one token, which is not part of the answer.
        self._shows_completion = request.max_tokens != 0

    async def whole(self) -> CompletionResponse:
        """Wait for every answer and give them in one body."""
        choices = []
        for index, output in enumerate(await collect_all(self.streams)):
            choices += self._choices(index, output, self._new_state())
        names = joint_fingerprint(self.streams, self._served_model_name)
        return self._body(choices, names, self._usage.usage())

    async def chunks(self) -> AsyncIterator[CompletionResponse]:
        """Give the answers piece by piece, and the usage last when it was asked for."""
        options = self._request.stream_options or StreamOptions()
        states = [self._new_state() for _ in self.streams]
        async for index, arrived in merge_streams(self.streams):
            name = fingerprint(self.streams[index], self._served_model_name)
            for output in states[index].take(arrived):
                for choice in self._choices(index, output, states[index]):
                    if not _has_news(choice):
                        continue
                    chunk = self._body([choice], name)
                    if options.include_usage:
                        chunk.usage = self._usage.usage() if options.continuous_usage_stats else None
                    yield chunk
        if options.include_usage:
            names = joint_fingerprint(self.streams, self._served_model_name)
            yield self._body([], names, self._usage.usage())

    def _new_state(self) -> _PromptState:
        return _PromptState(needs_logprobs=bool(self._request.echo) and self._request.logprobs is not None)

    def _choices(self, index: int, output: RequestOutput, state: _PromptState) -> list[CompletionChoice]:
        """Make the choices of a prompt, or their next pieces."""
        if output.prompt_logprobs is not None:
            state.logprobs = output.prompt_logprobs
        self._usage.add(index, output, counts_completion=self._shows_completion)
        return [
            self._choice(index, answer, state, state.choices.setdefault(answer.index, _ChoiceState()))
            for answer in output.outputs
        ]

    def _choice(
        self, index: int, answer: CompletionOutput, prompt: _PromptState, state: _ChoiceState
    ) -> CompletionChoice:
        """Make a choice, or its next piece; the first piece carries what is asked for of the prompt."""
        if not self._shows_completion:
            answer = _without_completion(answer)
        is_first, state.has_started = not state.has_started, True
        has_echo = is_first and bool(self._request.echo)
        echo = self._prompts[index].text if has_echo else ""
        choice = CompletionChoice(
            index=index * (self._request.n or 1) + answer.index,
            text=echo + answer.text,
            logprobs=None,
            finish_reason=answer.finish_reason,
            stop_reason=answer.stop_reason,
        )
        if self._request.logprobs is not None:
            token_ids = self.streams[index].prompt_token_ids
            if state.offsets is None:
                state.offsets = AnswerOffsets(
                    self._tokenizer,
                    token_ids,
                    skip_special_tokens=self._request.skip_special_tokens is not False,
                    start=len(echo),
                )
            choice.logprobs = self._formatter.for_completion(
                answer.token_ids, answer.logprobs or [], state.offsets.take(answer.token_ids)
            )
            if has_echo and prompt.logprobs is not None:
                if prompt.offsets is None:
                    prompt.offsets = prompt_offsets(self._tokenizer, token_ids, echo)
                of_prompt = self._formatter.for_completion(token_ids, prompt.logprobs, prompt.offsets)
                choice.logprobs = join_completion_logprobs(of_prompt, choice.logprobs)
        if self._request.prompt_logprobs is not None:
            choice.prompt_logprobs = self._formatter.for_prompt(
                self.streams[index].prompt_token_ids, prompt.logprobs or [], self._request.prompt_logprobs
            )
        if self._request.return_token_ids:
            choice.token_ids = answer.token_ids
            if is_first:
                choice.prompt_token_ids = self.streams[index].prompt_token_ids
        return choice

    def _body(
        self, choices: list[CompletionChoice], system_fingerprint: str, usage: Usage | None = None
    ) -> CompletionResponse:
        body = CompletionResponse(
            id=self._header.answer_id,
            object="text_completion",
            created=self._header.created,
            model=self._header.model,
            system_fingerprint=system_fingerprint,
            choices=choices,
        )
        if usage is not None:
            body.usage = usage
        return body


def _has_news(choice: CompletionChoice) -> bool:
    """Tell whether a chunk is worth sending: part of a character is a token without text."""
    return bool(
        choice.text
        or choice.finish_reason
        or choice.token_ids
        or choice.prompt_token_ids
        or (choice.logprobs and choice.logprobs.tokens)
    )


def _without_completion(answer: CompletionOutput) -> CompletionOutput:
    """Leave out the token that was computed only because max_tokens 0 needs a step for the prompt."""
    ended = answer.finish_reason
    return CompletionOutput(index=answer.index, finish_reason="length" if ended == "stop" else ended)
