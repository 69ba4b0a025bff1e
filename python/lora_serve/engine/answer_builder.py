"""Turns one answer's tokens into text, log probabilities and an end."""

from __future__ import annotations

from collections.abc import Sequence

from lora_serve.common.outputs import CompletionOutput, Logprob
from lora_serve.common.sampling_params import SamplingParams
from lora_serve.engine.detokenizer import IncrementalDetokenizer
from lora_serve.engine.messages import EngineOutput, PositionLogprobs
from lora_serve.engine.stop_strings import StopStringMatcher
from lora_serve.engine.tokenizer import Tokenizer


def decode_logprobs(position: PositionLogprobs, tokenizer: Tokenizer) -> dict[int, Logprob]:
    """Give one position's log probabilities by token id, the token that stands there first."""
    decoded: dict[int, Logprob] = {}
    for token_id, logprob, rank in zip(position.token_ids, position.logprobs, position.ranks, strict=True):
        if token_id not in decoded:
            decoded[token_id] = Logprob(logprob, rank, tokenizer.decode_token(token_id))
    return decoded


class AnswerBuilder:
    """Turns one answer's tokens into deltas of text, tokens and log probabilities.

    Token ids are given as they come; their text follows when it is complete and cannot be the start of a stop
    string. Tokens after the one that completes a stop string are never shown.

    Parameters
    ----------
    index : int
        Which of the `n` answers.
    tokenizer : Tokenizer
        Decodes.
    prompt_token_ids : sequence of int
        What the answer continues.
    params : SamplingParams
        Stop strings and what to show.
    """

    def __init__(
        self, index: int, tokenizer: Tokenizer, prompt_token_ids: Sequence[int], params: SamplingParams
    ) -> None:
        self.index = index
        self.is_finished = False
        self._tokenizer = tokenizer
        self._params = params
        self._detokenizer = IncrementalDetokenizer(
            tokenizer, prompt_token_ids, skip_special_tokens=params.skip_special_tokens
        )
        self._matcher = StopStringMatcher(
            params.stop_strings, include_stop_string=params.include_stop_str_in_output
        )
        self._num_tokens = 0
        self._cumulative_logprob = 0.0

    def add(self, output: EngineOutput) -> CompletionOutput:
        """Take what a step added; give what can be shown of it.

        Returns
        -------
        CompletionOutput
            A delta. Its `finish_reason` may be set before the engine's: then a stop string was found, and the
            engine must be told that the request has ended.
        """
        delta = CompletionOutput(index=self.index)
        if self._params.logprobs is not None:
            delta.logprobs = []
        for position, token_id in enumerate(output.new_token_ids):
            is_last = position == len(output.new_token_ids) - 1
            self._add_logprobs(delta, output, position)
            delta.token_ids.append(token_id)
            self._num_tokens += 1
            ends_here = is_last and output.finish_reason == "stop"
            if ends_here and not self._params.include_stop_str_in_output:
                continue  # The stop token's own text is not part of the answer.
            if self._add_text(delta, self._detokenizer.feed(token_id)):
                break
        if delta.finish_reason is None and output.finish_reason is not None:
            self._finish(delta, output)
        if self._params.logprobs is not None:
            delta.cumulative_logprob = self._cumulative_logprob
        self.is_finished = delta.finish_reason is not None
        return delta

    def _add_text(self, delta: CompletionOutput, text: str) -> bool:
        if self._num_tokens <= self._params.min_tokens:
            # Stop strings count only in what follows min_tokens; text held back so far is free of them.
            delta.text += text
            return False
        match = self._matcher.feed(text)
        delta.text += match.text
        if match.stop_string is not None:
            delta.finish_reason = "stop"
            delta.stop_reason = match.stop_string
        return match.stop_string is not None

    def _finish(self, delta: CompletionOutput, output: EngineOutput) -> None:
        if self._add_text(delta, self._detokenizer.flush()):
            return
        delta.text += self._matcher.flush()
        delta.finish_reason = output.finish_reason
        delta.stop_reason = output.stop_reason

    def _add_logprobs(self, delta: CompletionOutput, output: EngineOutput, position: int) -> None:
        if delta.logprobs is None or output.logprobs is None:
            return
        entry = output.logprobs[position]
        delta.logprobs.append(decode_logprobs(entry, self._tokenizer))
        self._cumulative_logprob += entry.logprobs[0]
