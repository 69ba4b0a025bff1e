"""Joins a request's deltas to one output."""

from __future__ import annotations

from lora_serve.common.errors import InternalError
from lora_serve.common.outputs import CompletionOutput, RequestOutput


class OutputMerger:
    """Joins a request's deltas, in order, to one output with all answers by index."""

    def __init__(self) -> None:
        self._merged: RequestOutput | None = None
        self._answers: dict[int, CompletionOutput] = {}
        self._texts: dict[int, list[str]] = {}

    def add(self, delta: RequestOutput) -> None:
        """Take the next delta; it is not changed."""
        if self._merged is None:
            self._merged = RequestOutput(
                request_id=delta.request_id,
                prompt=delta.prompt,
                prompt_token_ids=delta.prompt_token_ids,
                lora_name=delta.lora_name,
            )
        self._merged.adapter_id = delta.adapter_id
        self._merged.num_cached_tokens = delta.num_cached_tokens
        self._merged.finished = delta.finished
        if delta.queue_s is not None:
            self._merged.queue_s = delta.queue_s
        if delta.prompt_logprobs is not None:
            self._merged.prompt_logprobs = delta.prompt_logprobs
        for part in delta.outputs:
            self._add_part(part)

    def result(self) -> RequestOutput:
        """Give everything that was added; call it once, at the end.

        Raises
        ------
        InternalError
            Nothing was added.
        """
        if self._merged is None:
            raise InternalError("a request ended without any output")
        for index, texts in self._texts.items():
            self._answers[index].text = "".join(texts)
        self._merged.outputs = [self._answers[index] for index in sorted(self._answers)]
        return self._merged

    def _add_part(self, part: CompletionOutput) -> None:
        answer = self._answers.setdefault(part.index, CompletionOutput(index=part.index))
        self._texts.setdefault(part.index, []).append(part.text)
        answer.token_ids += part.token_ids
        if part.logprobs is not None:
            if answer.logprobs is None:
                answer.logprobs = []
            answer.logprobs += part.logprobs
            answer.cumulative_logprob = part.cumulative_logprob
        answer.finish_reason = part.finish_reason
        answer.stop_reason = part.stop_reason
