"""Turns the engine's outputs into request outputs, for every live request of a server or an LLM."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from lora_serve.common.errors import InternalError, LoraServeError
from lora_serve.common.outputs import RequestOutput
from lora_serve.engine.answer_builder import AnswerBuilder, decode_logprobs
from lora_serve.engine.input_processor import ProcessedRequest
from lora_serve.engine.messages import EngineOutput
from lora_serve.engine.tokenizer import Tokenizer


@dataclass
class ProcessedOutputs:
    """What became of a step's outputs.

    Parameters
    ----------
    deltas : list of RequestOutput
        What is new, at most one a request.
    failures : list of (str, LoraServeError)
        Requests that failed, by the caller's id; nothing more comes for them.
    engine_ids_to_finish : list of int
        Requests that the engine still runs and nobody waits for: a stop string was found, or another answer
        of the same request failed.
    """

    deltas: list[RequestOutput] = field(default_factory=list)
    failures: list[tuple[str, LoraServeError]] = field(default_factory=list)
    engine_ids_to_finish: list[int] = field(default_factory=list)


class _LiveRequest:
    """One request of the caller with its answers; `builders` loses each answer as it ends."""

    def __init__(self, request: ProcessedRequest, tokenizer: Tokenizer) -> None:
        self.request = request
        self.adapter_id = 0
        self.num_cached_tokens = 0
        self.builders = {
            engine_request.request_id: AnswerBuilder(
                index, tokenizer, request.prompt_token_ids, request.sampling_params
            )
            for index, engine_request in enumerate(request.engine_requests)
        }

    def make_delta(self) -> RequestOutput:
        return RequestOutput(
            request_id=self.request.request_id,
            prompt=self.request.prompt,
            prompt_token_ids=self.request.prompt_token_ids,
            lora_name=self.request.lora_name,
            adapter_id=self.adapter_id,
        )


class OutputProcessor:
    """Turns the engine's outputs into deltas of request outputs.

    Outputs for requests that it does not know (aborted, stopped or failed before) are dropped.

    Parameters
    ----------
    tokenizer : Tokenizer
        Decodes.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._requests: dict[str, _LiveRequest] = {}
        self._by_engine_id: dict[int, _LiveRequest] = {}

    @property
    def request_ids(self) -> list[str]:
        """Ids of the live requests, in the order in which they were added."""
        return list(self._requests)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._requests

    def add(self, request: ProcessedRequest) -> None:
        """Take a request, before it is handed to the engine; its `request_id` must not be live."""
        if request.request_id in self._requests:
            raise InternalError(f"request {request.request_id!r} is live and was added again")
        live = _LiveRequest(request, self._tokenizer)
        self._requests[request.request_id] = live
        self._by_engine_id.update(dict.fromkeys(request.engine_request_ids, live))

    def set_adapter_id(self, request_id: str, adapter_id: int) -> None:
        """Note the generation that the engine gave to a request; unknown ids change nothing."""
        if request_id in self._requests:
            self._requests[request_id].adapter_id = adapter_id

    def unfinished_engine_ids(self, request_id: str) -> list[int]:
        """Give the engine's ids of a request's answers that have not ended. Unknown ids: none."""
        live = self._requests.get(request_id)
        return [] if live is None else list(live.builders)

    def remove(self, request_id: str) -> list[int]:
        """Forget a request; give the engine's ids of its answers that have not ended. Unknown ids: none."""
        live = self._requests.pop(request_id, None)
        if live is None:
            return []
        unfinished = list(live.builders)
        for engine_id in unfinished:
            del self._by_engine_id[engine_id]
        live.builders.clear()
        return unfinished

    def process(self, outputs: Iterable[EngineOutput]) -> ProcessedOutputs:
        """Take a step's outputs."""
        processed = ProcessedOutputs()
        deltas: dict[str, RequestOutput] = {}
        for output in outputs:
            live = self._by_engine_id.get(output.request_id)
            if live is None:
                continue
            request_id = live.request.request_id
            if output.error is not None:
                deltas.pop(request_id, None)
                unfinished = self.remove(request_id)
                processed.engine_ids_to_finish += [i for i in unfinished if i != output.request_id]
                processed.failures.append((request_id, output.error.to_exception()))
                continue
            if request_id not in deltas:
                deltas[request_id] = live.make_delta()
            self._process_one(live, output, deltas[request_id], processed)
        processed.deltas = list(deltas.values())
        return processed

    def _process_one(
        self, live: _LiveRequest, output: EngineOutput, delta: RequestOutput, processed: ProcessedOutputs
    ) -> None:
        builder = live.builders[output.request_id]
        if builder.index == 0:
            live.num_cached_tokens = output.num_cached_tokens
        delta.num_cached_tokens = live.num_cached_tokens
        if output.queue_us is not None and builder.index == 0:
            delta.queue_s = output.queue_us / 1_000_000
        if output.prompt_logprobs is not None and builder.index == 0:
            delta.prompt_logprobs = [
                None if entry is None else decode_logprobs(entry, self._tokenizer)
                for entry in output.prompt_logprobs
            ]
        answer = builder.add(output)
        delta.outputs.append(answer)
        if not builder.is_finished:
            return
        if output.finish_reason is None:
            processed.engine_ids_to_finish.append(output.request_id)
        del live.builders[output.request_id]
        del self._by_engine_id[output.request_id]
        if not live.builders:
            del self._requests[live.request.request_id]
            delta.finished = True
