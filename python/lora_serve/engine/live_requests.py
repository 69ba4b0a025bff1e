"""The requests that the engine core has accepted and not yet ended."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from lora_serve.common.errors import LoraServeError
from lora_serve.common.outputs import FinishReason
from lora_serve.engine.messages import EngineOutput, EngineRequest, PositionLogprobs, WireError
from lora_serve.executor.grammar_matcher import GrammarMatcher
from lora_serve.executor.logprobs import TokenLogprobs
from lora_serve.executor.sampling_state import SamplingState
from lora_serve.executor.uniform_stream import SeedStream


def _to_message(logprobs: TokenLogprobs) -> PositionLogprobs:
    top_ids = logprobs.top_token_ids.tolist()
    return PositionLogprobs(
        token_ids=[logprobs.token_id, *top_ids],
        logprobs=[float(logprobs.logprob), *logprobs.top_logprobs.tolist()],
        ranks=[logprobs.rank, *range(1, len(top_ids) + 1)],
    )


class LiveRequest:
    """One answer that is being computed: its sampling state, its generation, and when it ends.

    Parameters
    ----------
    request : EngineRequest
        Checked, with `max_tokens` set.
    adapter_id : int
        The generation that its name stood for when it was accepted; 0 = the base model.
    state : SamplingState
        What the executor samples with; it appends the tokens, which may be ahead of those taken here.

    Attributes
    ----------
    arrival_us : int
        When it was accepted, on the scheduler's clock.
    queue_us : int or None
        Microseconds that it waited for its first step; None while it waits.
    has_ended : bool
        True from the request's last output on, or from when its reader has ended it: what plans that were
        made before still compute for it is dropped.
    """

    def __init__(self, request: EngineRequest, adapter_id: int, state: SamplingState) -> None:
        self.request_id = request.request_id
        self.adapter_id = adapter_id
        self.queue_timeout_s = request.queue_timeout_s
        self.state = state
        self.arrival_us = 0
        self.queue_us: int | None = None
        self.has_ended = False
        self._params = request.sampling_params
        self._num_output_tokens = 0
        self._num_cached_tokens = 0
        self._max_computed_tokens = 0
        self._gave_prompt_logprobs = False

    @classmethod
    def create(
        cls,
        request: EngineRequest,
        adapter_id: int,
        eos_token_ids: tuple[int, ...],
        vocab_size: int,
        grammar: GrammarMatcher | None = None,
    ) -> LiveRequest:
        """Make the sampling state too; one that draws without a seed of its own gets it from `give_seed`.

        Raises
        ------
        InvalidArgumentError
            A parameter names a token outside the vocabulary.
        """
        state = SamplingState(
            request.sampling_params,
            np.asarray(request.prompt_token_ids, dtype=np.int32),
            eos_token_ids,
            vocab_size,
            request.sampling_params.seed,
            grammar,
        )
        return cls(request, adapter_id, state)

    def give_seed(self, seeds: SeedStream) -> None:
        """Give a request that draws a seed from the engine's stream, unless it brought one."""
        if self.state.seed is None and not self._params.is_greedy:
            self.state.seed = seeds.next_seed()

    def note_scheduled(
        self, num_cached_tokens: int, num_computed_tokens: int, num_scheduled_tokens: int
    ) -> int:
        """Note a step of this request.

        Parameters
        ----------
        num_cached_tokens : int
            Prompt tokens that came from the prefix cache, of either tier, at the first admission.
        num_computed_tokens, num_scheduled_tokens : int
            The step computes the tokens [num_computed_tokens, num_computed_tokens + num_scheduled_tokens).

        Returns
        -------
        int
            Those of them whose KV the request had before: it was preempted and did not recover them.
        """
        self._num_cached_tokens = num_cached_tokens
        end = num_computed_tokens + num_scheduled_tokens
        num_recomputed = max(0, min(end, self._max_computed_tokens) - num_computed_tokens)
        self._max_computed_tokens = max(self._max_computed_tokens, end)
        return num_recomputed

    def take_token(self, token_id: int, logprobs: TokenLogprobs | None) -> EngineOutput:
        """Give the output for the next token that the executor has appended to the state."""
        self._num_output_tokens += 1
        finish_reason, stop_reason = self._find_end(token_id)
        prompt_logprobs = None
        if self.state.prompt_logprobs is not None and not self._gave_prompt_logprobs:
            self._gave_prompt_logprobs = True
            prompt_logprobs = [
                None if entry is None else _to_message(entry) for entry in self.state.prompt_logprobs
            ]
        return EngineOutput(
            request_id=self.request_id,
            new_token_ids=[token_id],
            logprobs=None if logprobs is None else [_to_message(logprobs)],
            prompt_logprobs=prompt_logprobs,
            num_cached_tokens=self._num_cached_tokens,
            queue_us=self.queue_us if self._num_output_tokens == 1 else None,
            finish_reason=finish_reason,
            stop_reason=stop_reason,
        )

    def make_abort(self, error: LoraServeError | None = None) -> EngineOutput:
        """Give the last output of a request that ends without a token; with `error` it has failed."""
        return EngineOutput(
            request_id=self.request_id,
            num_cached_tokens=self._num_cached_tokens,
            finish_reason="abort",
            error=None if error is None else WireError.from_exception(error),
        )

    def _find_end(self, token_id: int) -> tuple[FinishReason | None, int | None]:
        params = self._params
        num_tokens = self._num_output_tokens
        if num_tokens > params.min_tokens:
            if not params.ignore_eos and token_id in self.state.eos_token_ids:
                return "stop", None
            if token_id in params.stop_token_ids:
                return "stop", token_id
        if num_tokens == params.max_tokens:
            return "length", None
        return None, None


class LiveRequests:
    """The live requests by id. Finding those of a generation costs O(live requests)."""

    def __init__(self) -> None:
        self._by_id: dict[int, LiveRequest] = {}

    def __len__(self) -> int:
        return len(self._by_id)

    def __contains__(self, request_id: int) -> bool:
        return request_id in self._by_id

    def __getitem__(self, request_id: int) -> LiveRequest:
        return self._by_id[request_id]

    def add(self, request: LiveRequest) -> None:
        """Take a request that the scheduler has accepted."""
        self._by_id[request.request_id] = request

    def pop(self, request_id: int) -> LiveRequest | None:
        """Forget a request, which has ended; None when it is not live."""
        live = self._by_id.pop(request_id, None)
        if live is not None:
            live.has_ended = True
        return live

    def find_by_adapter(self, adapter_ids: Iterable[int]) -> list[int]:
        """Ids of the requests that hold one of these generations, oldest first."""
        wanted = set(adapter_ids)
        return [request_id for request_id, live in self._by_id.items() if live.adapter_id in wanted]

    @property
    def ids(self) -> list[int]:
        """All ids, oldest first."""
        return list(self._by_id)
