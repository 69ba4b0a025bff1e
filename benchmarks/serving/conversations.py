"""Conversations that come back to an engine, beside requests that decode, and what both have to wait."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import numpy as np

from lora_serve.cli.bench.bench_engine import BenchEngine
from lora_serve.common.sampling_params import SamplingParams
from lora_serve.engine.messages import EngineOutput, EngineRequest


@dataclass
class Conversation:
    """All that was said so far.

    Parameters
    ----------
    token_ids
        Prompts and answers of its turns.
    last_turn
        Number of its newest turn among those of all conversations.
    """

    token_ids: list[int] = field(default_factory=list)
    last_turn: int = -1


@dataclass(frozen=True)
class Turn:
    """What one turn had to wait for.

    Parameters
    ----------
    ttft_ms
        From its arrival to its first token.
    num_history_tokens, num_cached_tokens
        Tokens of the turns before, and those of them whose KV was found.
    """

    ttft_ms: float
    num_history_tokens: int
    num_cached_tokens: int

    @property
    def num_recomputed_tokens(self) -> int:
        return max(0, self.num_history_tokens - self.num_cached_tokens)


class Traffic:
    """Turns, one after the other, and requests that decode meanwhile, in one engine.

    Parameters
    ----------
    engine
        Without other requests.
    seed
        Of all tokens.
    """

    def __init__(self, engine: BenchEngine, seed: int) -> None:
        self._engine = engine
        self._vocab_size = engine.core.model_info.vocab_size
        self._random = np.random.default_rng(seed)
        self._next_id = 0
        self._decode_size = 0, 0
        self._last_token_at: dict[int, float] = {}  # Of requests that decode; 0 = they have no token.
        self.itl_ms: list[float] = []

    def take_turn(self, conversation: Conversation, num_new_tokens: int, num_output_tokens: int) -> Turn:
        """Ask one thing more and wait for the answer, which becomes a part of the conversation."""
        num_history_tokens = len(conversation.token_ids)
        conversation.token_ids += self._random.integers(0, self._vocab_size, num_new_tokens).tolist()
        arrived_at = time.perf_counter()
        request_id = self._send(conversation.token_ids, num_output_tokens)
        conversation.last_turn = request_id
        first_token_at, num_cached_tokens = 0.0, 0
        while True:
            for output in self.step():
                if output.request_id != request_id:
                    continue
                if output.new_token_ids and not first_token_at:
                    first_token_at = time.perf_counter()
                    num_cached_tokens = output.num_cached_tokens
                conversation.token_ids += output.new_token_ids
                if output.finish_reason is not None:
                    ttft_ms = (first_token_at - arrived_at) * 1e3
                    return Turn(ttft_ms, num_history_tokens, num_cached_tokens)

    def start_decodes(self, num_requests: int, num_prompt_tokens: int, num_output_tokens: int) -> None:
        """Begin requests that decode until `stop_decodes`, each followed by another one of its size.

        On return they have some tokens.
        """
        self._decode_size = num_prompt_tokens, num_output_tokens
        for _ in range(num_requests):
            self._start_decode()
        self.itl_ms = []
        while len(self.itl_ms) < 4 * num_requests:
            self.step()
        self.itl_ms = []

    def stop_decodes(self) -> list[float]:
        """End them; give the times between their tokens in ms."""
        for request_id in self._last_token_at:
            self._engine.core.abort(request_id)
        self._last_token_at = {}
        self.settle()
        times_ms, self.itl_ms = self.itl_ms, []
        return times_ms

    def step(self) -> list[EngineOutput]:
        """One step of the engine."""
        outputs = self._engine.step()
        now = time.perf_counter()
        for output in outputs:
            last_token_at = self._last_token_at.get(output.request_id)
            if last_token_at is None or not output.new_token_ids:
                continue
            if last_token_at:
                self.itl_ms.append((now - last_token_at) * 1e3)
            self._last_token_at[output.request_id] = now
            if output.finish_reason is not None:
                del self._last_token_at[output.request_id]
                self._start_decode()
        return outputs

    def settle(self) -> None:
        """Until nothing runs and every copy between the tiers is over."""
        while self._engine.core.has_work or self._engine.core.stats().num_transfers:
            self.step()
        self._engine.core.settle()

    def _start_decode(self) -> None:
        num_prompt_tokens, num_output_tokens = self._decode_size
        prompt = self._random.integers(0, self._vocab_size, num_prompt_tokens).tolist()
        self._last_token_at[self._send(prompt, num_output_tokens)] = 0.0

    def _send(self, prompt: list[int], num_output_tokens: int) -> int:
        request_id = self._next_id
        self._next_id += 1
        params = SamplingParams(temperature=0.0, max_tokens=num_output_tokens, ignore_eos=True)
        self._engine.core.add_request(
            EngineRequest(request_id=request_id, prompt_token_ids=list(prompt), sampling_params=params)
        )
        return request_id
