"""Some of the greedy answers, and whether the model alone would have given them."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from lora_serve.common.sampling_params import SamplingParams
from lora_serve.engine.engine_core import EngineCore
from lora_serve.engine.messages import EngineOutput, EngineRequest, PositionLogprobs

from .clients import LiveRequest

_FIRST_ID = 2**40
MOST_GAP = {"float32": 2e-3, "other": 0.5}
"""How much less probable than the best token a greedy one may be, as the difference of log probabilities.

Sums of other batch shapes are rounded otherwise. A wrong token, adapter or KV page makes gaps of several
times the logits' standard deviation, which is 1 or more."""


@dataclass(frozen=True)
class CheckedAnswers:
    """What the check has found.

    Parameters
    ----------
    num_answers, num_adapters, num_tokens
        Answers, those of adapters among them, and their tokens.
    largest_gap, share_best
        Largest gap of all tokens, and the share of tokens without a gap.
    problems
        Answers that are wrong.
    """

    num_answers: int
    num_adapters: int
    num_tokens: int
    largest_gap: float
    share_best: float
    problems: list[str]


class AnswerSample:
    """Keeps as many greedy answers as wanted, each one with the same chance.

    Parameters
    ----------
    num_answers
        How many.
    seed
        Of the choice.
    """

    def __init__(self, num_answers: int, seed: int) -> None:
        self._num_answers = num_answers
        self._random = random.Random(seed)
        self._num_seen = 0
        self.kept: list[LiveRequest] = []

    def offer(self, live: LiveRequest) -> None:
        """Take an answer into account."""
        params = live.request.sampling_params
        if not params.is_greedy:
            return
        self._num_seen += 1
        if len(self.kept) < self._num_answers:
            self.kept.append(live)
        elif (place := self._random.randrange(self._num_seen)) < self._num_answers:
            self.kept[place] = live

    def check(self, core: EngineCore, path_of_digest: dict[str, str], dtype: str) -> CheckedAnswers:
        """Compute each prompt with its answer anew, in one go and without cached pages.

        Every token of the answer must be the most probable one there, or almost.

        Parameters
        ----------
        core
            The engine, idle and without adapters.
        path_of_digest
            Directories of adapters.
        dtype
            Of the model.

        Raises
        ------
        RuntimeError
            The engine has stopped, or an answer is of an adapter that has no directory.
        """
        unknown = {live.content_digest for live in self.kept} - {"", *path_of_digest}
        if unknown:
            raise RuntimeError(f"requests ran with content that nobody loaded: {sorted(unknown)}")
        names = {live.content_digest: f"check-{live.content_digest[:16]}" for live in self.kept}
        names[""] = ""
        loads = [core.load_adapter(name, path_of_digest[digest]) for digest, name in names.items() if digest]
        _step_until(core, lambda: all(load.done() for load in loads))
        for load in loads:
            load.result()
        outputs = _ask(core, [(live, names[live.content_digest] or None) for live in self.kept])
        unloads = [core.unload_adapter(name) for name in names.values() if name]
        _step_until(core, lambda: all(unload.done() for unload in unloads))
        most = MOST_GAP.get(dtype, MOST_GAP["other"])
        gaps: list[float] = []
        problems: list[str] = []
        for live, output in zip(self.kept, outputs, strict=True):
            found = _gaps_of(live, output)
            gaps += found
            if not found or max(found) > most:
                problems.append(
                    f"the answer to request {live.request.request_id} ({live.request.lora_name}) is not the "
                    f"model's: gap {max(found, default=0.0):.4f} at token "
                    f"{found.index(max(found)) if found else 0} of {len(live.answer)}, at most {most}"
                )
        return CheckedAnswers(
            num_answers=len(self.kept),
            num_adapters=sum(bool(live.content_digest) for live in self.kept),
            num_tokens=len(gaps),
            largest_gap=round(max(gaps, default=0.0), 5),
            share_best=round(sum(gap <= 0 for gap in gaps) / max(1, len(gaps)), 4),
            problems=problems,
        )


def _ask(core: EngineCore, wanted: list[tuple[LiveRequest, str | None]]) -> list[EngineOutput | None]:
    """The first output of each prompt with its answer, with the log probabilities of all tokens."""
    params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=1, ignore_eos=True)
    for index, (live, name) in enumerate(wanted):
        prompt = live.request.prompt_token_ids + live.answer
        core.add_request(
            EngineRequest(
                request_id=_FIRST_ID + index, prompt_token_ids=prompt, sampling_params=params, lora_name=name
            )
        )
    outputs: dict[int, EngineOutput] = {}

    def take(output: EngineOutput) -> None:
        outputs[output.request_id - _FIRST_ID] = output

    _step_until(core, lambda: len(outputs) == len(wanted), take)
    return [outputs.get(index) for index in range(len(wanted))]


def _gaps_of(live: LiveRequest, output: EngineOutput | None) -> list[float]:
    """For each token of the answer, how much less probable than the best one it is; empty = it failed."""
    if output is None or output.prompt_logprobs is None:
        return []
    entries = output.prompt_logprobs[len(live.request.prompt_token_ids) :]
    return [_gap(entry) for entry in entries if entry is not None]


def _gap(entry: PositionLogprobs) -> float:
    return max(entry.logprobs) - entry.logprobs[0]


def _step_until(
    core: EngineCore, is_over: Callable[[], bool], take: Callable[[EngineOutput], None] = lambda _: None
) -> None:
    while not is_over():
        outputs = core.step()
        for output in outputs:
            take(output)
        if core.failure is not None:
            raise RuntimeError(core.failure)
        if not outputs and core.is_stalled:
            core.wait_for_news(5e-3)
