"""Clients in a closed loop: each asks again as soon as it is answered."""

from __future__ import annotations

import math
import random
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from lora_serve.common.sampling_params import SamplingParams
from lora_serve.engine.engine_core import EngineCore
from lora_serve.engine.engine_process import STALLED_POLL_MS
from lora_serve.engine.messages import EngineOutput, EngineRequest

from .sizes import SoakSizes

_ABORT_SHARE = 0.08
_BASE_SHARE = 0.3
_FOLLOW_UP_SHARE = 0.4
_NUM_TEXTS = 200
_MAX_PROBLEMS = 20


@dataclass(eq=False)
class LiveRequest:
    """A request without its last output.

    Parameters
    ----------
    request
        As sent.
    content_digest
        Of the adapter that it was given; '' = the base model.
    abort_after
        Tokens after which it is aborted; None = never. 0 = in some later step, with or without a token.
    may_abort
        Its end may be an abort.
    """

    request: EngineRequest
    content_digest: str
    abort_after: int | None
    may_abort: bool = False
    answer: list[int] = field(default_factory=list)


class Clients:
    """Sends requests of every kind, takes the outputs, and notes what should not be.

    Parameters
    ----------
    core
        The engine.
    sizes
        How many and how long.
    names
        Gives the adapters that serve.
    on_answer
        Takes each request that has ended by itself.
    seed
        Of all choices.
    """

    def __init__(
        self,
        core: EngineCore,
        sizes: SoakSizes,
        *,
        names: Callable[[], list[str]],
        on_answer: Callable[[LiveRequest], None],
        seed: int,
    ) -> None:
        self._core, self._sizes = core, sizes
        self._names, self._on_answer = names, on_answer
        self._random = random.Random(seed)
        self._vocab_size = core.model_info.vocab_size
        self._next_id = 0
        self._live: dict[int, LiveRequest] = {}
        self._texts: deque[list[int]] = deque(maxlen=_NUM_TEXTS)
        self.counts = dict.fromkeys(
            ("answered", "aborted", "output tokens", "prompt tokens", "cached tokens"), 0
        )
        self.problems: list[str] = []

    @property
    def num_live(self) -> int:
        """Requests without their last output."""
        return len(self._live)

    def fill(self) -> None:
        """Send requests until every client waits for one."""
        while len(self._live) < self._sizes.num_clients:
            self._send(self._choose_prompt(), self._choose_name(), self._choose_params())

    def expect_aborts(self, name: str) -> None:
        """The requests of an adapter may end now."""
        for live in self._live.values():
            live.may_abort |= live.request.lora_name == name

    def step(self) -> None:
        """One step of the engine, and what follows from it."""
        outputs = self._core.step()
        for output in outputs:
            self._take(output)
        if not outputs and self._core.is_stalled:
            self._core.wait_for_news(STALLED_POLL_MS / 1e3)

    # --- Out ----------------------------------------------------------------------------------------------

    def _send(self, prompt: list[int], name: str | None, params: SamplingParams) -> None:
        request = EngineRequest(
            request_id=self._next_id, prompt_token_ids=prompt, sampling_params=params, lora_name=name
        )
        self._next_id += 1
        admission = self._core.add_request(request)
        abort_after = None
        if self._random.random() < _ABORT_SHARE:
            abort_after = self._random.randrange(params.max_tokens or 1)
        self._live[request.request_id] = LiveRequest(request, admission.content_digest, abort_after)
        self.counts["prompt tokens"] += len(prompt)

    def _choose_prompt(self) -> list[int]:
        """Something new, or a text that was there before and some tokens more, which may be cached."""
        sizes = self._sizes
        low, high = math.log(sizes.min_prompt_tokens), math.log(sizes.max_prompt_tokens)
        num_tokens = round(math.exp(self._random.uniform(low, high)))
        prompt: list[int] = []
        if self._texts and self._random.random() < _FOLLOW_UP_SHARE:
            prompt = self._random.choice(self._texts)[: sizes.max_prompt_tokens - sizes.min_prompt_tokens]
            num_tokens = min(sizes.max_prompt_tokens, len(prompt) + sizes.min_prompt_tokens)
        num_new = num_tokens - len(prompt)
        return prompt + [self._random.randrange(self._vocab_size) for _ in range(num_new)]

    def _choose_name(self) -> str | None:
        names = self._names()
        if not names or self._random.random() < _BASE_SHARE:
            return None
        weights = [1 / (index + 1) for index in range(len(names))]
        return self._random.choices(names, weights)[0]

    def _choose_params(self) -> SamplingParams:
        max_tokens = self._random.randint(1, self._sizes.max_output_tokens)
        kind = self._random.random()
        if kind < 0.7:
            return SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
        return SamplingParams(
            temperature=self._random.uniform(0.3, 1.3),
            top_p=self._random.choice((0.5, 0.9, 1.0)),
            top_k=self._random.choice((-1, 20)),
            seed=self._random.randrange(2**31) if self._random.random() < 0.5 else None,
            presence_penalty=0.5 if kind > 0.9 else 0.0,
            logprobs=2 if kind > 0.95 else None,
            max_tokens=max_tokens,
            ignore_eos=True,
        )

    # --- Back ---------------------------------------------------------------------------------------------

    def _take(self, output: EngineOutput) -> None:
        live = self._live.get(output.request_id)
        if live is None:
            self._note(f"request {output.request_id} has an output after its last one")
            return
        live.answer += output.new_token_ids
        self.counts["output tokens"] += len(output.new_token_ids)
        if output.error is not None:
            self._note(f"request {output.request_id}: {output.error.kind}: {output.error.message}")
        if output.finish_reason is not None:
            del self._live[output.request_id]
            self.counts["cached tokens"] += output.num_cached_tokens
            self._take_end(live, output)
        elif live.abort_after is not None and len(live.answer) >= live.abort_after and not live.may_abort:
            live.may_abort = True
            self._core.abort(output.request_id)

    def abort_some_waiting(self) -> None:
        """Abort requests that were meant to be aborted before their first token, sometimes."""
        for request_id, live in list(self._live.items()):
            if live.abort_after == 0 and not live.may_abort and self._random.random() < 0.02:
                live.may_abort = True
                self._core.abort(request_id)

    def _take_end(self, live: LiveRequest, output: EngineOutput) -> None:
        if output.finish_reason == "abort":
            self.counts["aborted"] += 1
            if not live.may_abort and output.error is None:
                self._note(f"request {output.request_id} was aborted, by nobody")
            return
        self.counts["answered"] += 1
        wanted = live.request.sampling_params.max_tokens
        if output.finish_reason != "length" or len(live.answer) != wanted:
            found = f"{len(live.answer)} tokens and ended by {output.finish_reason!r}"
            self._note(f"request {output.request_id} has {found}, but was to have {wanted}")
        self._texts.append(live.request.prompt_token_ids + live.answer)
        self._on_answer(live)

    def _note(self, problem: str) -> None:
        if len(self.problems) < _MAX_PROBLEMS:
            self.problems.append(f"{time.strftime('%H:%M:%S')} {problem}")
