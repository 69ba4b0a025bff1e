"""The answer to LoRAX's /generate and /generate_stream."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

from lora_serve.common.outputs import CompletionOutput, Logprob, RequestOutput
from lora_serve.common.sampling_params import SamplingParams
from lora_serve.engine.detokenizer import IncrementalDetokenizer
from lora_serve.engine.request_stream import RequestStream
from lora_serve.engine.tokenizer import Tokenizer
from lora_serve.server.generation import collect_all
from lora_serve.server.logprob_formats import finite_logprob
from lora_serve.server.protocol.lorax import (
    LoraxAlternative,
    LoraxDetails,
    LoraxFinishReason,
    LoraxInputToken,
    LoraxParameters,
    LoraxResponse,
    LoraxSequence,
    LoraxStreamDetails,
    LoraxStreamResponse,
    LoraxToken,
)
from lora_serve.server.request_errors import GenerationAbortedError


@dataclass(frozen=True)
class LoraxJob:
    """What an answer is made for.

    Parameters
    ----------
    inputs : str
        The prompt as it was sent.
    parameters : LoraxParameters
        As they were sent.
    sampling_params : SamplingParams
        What was made of them.
    """

    inputs: str
    parameters: LoraxParameters
    sampling_params: SamplingParams

    @property
    def prefix(self) -> str:
        """What stands in front of every generated text."""
        return self.inputs if self.parameters.return_full_text else ""

    def seed_of(self, index: int) -> int | None:
        """Give the seed of answer `index`; None for a greedy one."""
        return None if self.sampling_params.is_greedy else self.sampling_params.child(index).seed


class LoraxAnswer:
    """Makes response bodies from the outputs of a prompt's stream.

    Parameters
    ----------
    job : LoraxJob
        What was asked for.
    stream : RequestStream
        The accepted prompt.
    tokenizer : Tokenizer
        For the text of single tokens.
    """

    def __init__(self, job: LoraxJob, stream: RequestStream, tokenizer: Tokenizer) -> None:
        self._job = job
        self._stream = stream
        self._tokenizer = tokenizer
        self.streams = [stream]

    async def whole(self) -> LoraxResponse:
        """Wait for every answer and give the best one.

        Raises
        ------
        LoraServeError
            It failed, or was ended before it was complete.
        """
        [output] = await collect_all(self.streams)
        best, *others = sorted(output.outputs, key=_mean_logprob, reverse=True)
        response = LoraxResponse(generated_text=self._job.prefix + best.text)
        parameters = self._job.parameters
        if not (parameters.details or parameters.decoder_input_details):
            _finish_reason(best)
            return response
        response.details = LoraxDetails(
            finish_reason=_finish_reason(best),
            prompt_tokens=len(self._stream.prompt_token_ids),
            generated_tokens=len(best.token_ids),
            skipped_tokens=0,
            seed=self._job.seed_of(best.index),
            prefill=self._prefill(output),
            tokens=self._tokens(best),
        )
        if others:
            response.details.best_of_sequences = [self._sequence(answer, output) for answer in others]
        return response

    async def events(self) -> AsyncIterator[LoraxStreamResponse]:
        """Give the answer token by token; the last event has the whole text.

        Raises
        ------
        LoraServeError
            As of `whole`.
        """
        writer = self._writer()
        text = ""
        num_tokens = 0
        async for output in self._stream:
            for answer in output.outputs:
                text += answer.text
                tokens = writer.write(answer)
                num_tokens += len(tokens)
                for token in tokens[:-1]:
                    yield LoraxStreamResponse(token=token, generated_text=None, details=None)
                if answer.finish_reason is None:
                    for token in tokens[-1:]:
                        yield LoraxStreamResponse(token=token, generated_text=None, details=None)
                    continue
                finish_reason = _finish_reason(answer)
                yield LoraxStreamResponse(
                    token=tokens[-1],
                    generated_text=self._job.prefix + text,
                    details=self._stream_details(finish_reason, num_tokens),
                )

    def _stream_details(self, finish_reason: LoraxFinishReason, num_tokens: int) -> LoraxStreamDetails | None:
        if not self._job.parameters.details:
            return None
        return LoraxStreamDetails(
            finish_reason=finish_reason,
            prompt_tokens=len(self._stream.prompt_token_ids),
            generated_tokens=num_tokens,
            seed=self._job.seed_of(0),
        )

    def _sequence(self, answer: CompletionOutput, output: RequestOutput) -> LoraxSequence:
        return LoraxSequence(
            generated_text=self._job.prefix + answer.text,
            finish_reason=_finish_reason(answer),
            generated_tokens=len(answer.token_ids),
            seed=self._job.seed_of(answer.index),
            prefill=self._prefill(output),
            tokens=self._tokens(answer),
        )

    def _tokens(self, answer: CompletionOutput) -> list[LoraxToken]:
        return self._writer().write(answer)

    def _writer(self) -> _TokenWriter:
        num_alternatives = self._job.parameters.return_k_alternatives or 0
        return _TokenWriter(self._tokenizer, self._stream.prompt_token_ids, num_alternatives)

    def _prefill(self, output: RequestOutput) -> list[LoraxInputToken]:
        if output.prompt_logprobs is None:
            return []
        return [
            LoraxInputToken(
                id=token_id,
                text=self._tokenizer.decode_token(token_id),
                logprob=None if position is None else finite_logprob(position[token_id].logprob),
            )
            for token_id, position in zip(self._stream.prompt_token_ids, output.prompt_logprobs, strict=True)
        ]


class _TokenWriter:
    """Writes an answer's tokens, piece by piece; the texts of those that are not special make up its text."""

    def __init__(self, tokenizer: Tokenizer, prompt_token_ids: Sequence[int], num_alternatives: int) -> None:
        self._tokenizer = tokenizer
        self._num_alternatives = num_alternatives
        self._detokenizer = IncrementalDetokenizer(tokenizer, prompt_token_ids, skip_special_tokens=True)
        # Characters that tokens have been given beyond what the answer has shown.
        self._num_ahead = 0

    def write(self, answer: CompletionOutput) -> list[LoraxToken]:
        """Write the tokens of an answer, or of its next piece."""
        tokens = []
        for token_id, position in zip(answer.token_ids, answer.logprobs or [], strict=True):
            text = self._detokenizer.feed(token_id)
            self._num_ahead += len(text)
            is_special = token_id in self._tokenizer.special_token_ids
            token = LoraxToken(
                id=token_id,
                text=self._tokenizer.decode_token(token_id) if is_special else text,
                logprob=finite_logprob(position[token_id].logprob),
                special=is_special,
                skipped=False,
            )
            if self._num_alternatives:
                token.alternative_tokens = self._alternatives(position)
            tokens.append(token)
        self._num_ahead -= len(answer.text)
        if answer.finish_reason is not None:
            self._finish(tokens)
        return tokens

    def _finish(self, tokens: list[LoraxToken]) -> None:
        """Give the last token what is held back, and take away what follows a stop string in it."""
        if not tokens:
            return
        last = tokens[-1]
        rest = self._detokenizer.flush()
        if last.special:
            return
        last.text += rest
        num_surplus = self._num_ahead + len(rest)
        if num_surplus > 0:
            last.text = last.text[: max(len(last.text) - num_surplus, 0)]

    def _alternatives(self, position: dict[int, Logprob]) -> list[LoraxAlternative]:
        best = sorted(position, key=lambda token_id: (position[token_id].rank, token_id))
        return [
            LoraxAlternative(
                id=token_id,
                text=self._tokenizer.decode_token(token_id),
                logprob=finite_logprob(position[token_id].logprob),
            )
            for token_id in best[: self._num_alternatives]
        ]


def _mean_logprob(answer: CompletionOutput) -> float:
    if answer.cumulative_logprob is None or not answer.token_ids:
        return 0.0
    return answer.cumulative_logprob / len(answer.token_ids)


def _finish_reason(answer: CompletionOutput) -> LoraxFinishReason:
    """Say why an answer ended, in LoRAX's words.

    Raises
    ------
    GenerationAbortedError
        Somebody else ended it.
    """
    if answer.finish_reason == "length":
        return "length"
    if answer.finish_reason == "stop":
        return "stop_sequence" if isinstance(answer.stop_reason, str) else "eos_token"
    raise GenerationAbortedError
