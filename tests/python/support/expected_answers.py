"""Compares what an engine of any kind has answered with transformers + peft on the same device."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from lora_serve.common.outputs import RequestOutput
from support.engine_kinds import EngineKind
from support.reference import Reference, RoundedAnswer, assert_parity, assert_rounding_parity


class ExpectedAnswers:
    """References of one model and its adapters, for one kind of engine.

    Parameters
    ----------
    model
        Directory.
    adapters
        Name to directory.
    engine
        Says where, and what weights are rounded to.
    """

    def __init__(self, model: str | Path, adapters: Mapping[str, Path], engine: EngineKind) -> None:
        self._engine = engine

        def references(**options: object) -> dict[str | None, Reference]:
            with warnings.catch_warnings():
                # peft warns of what merging tied modules would do; nothing is merged.
                warnings.filterwarnings("ignore", message=".*tie_word_embeddings.*")
                return {
                    name: Reference(
                        model,
                        adapters[name] if name else None,
                        device=engine.device,
                        weights=engine.dtype,
                        **options,
                    )
                    for name in (None, *adapters)
                }

        self._exact = references()
        self._rounded = self._exact if engine.is_exact else references(compute=engine.dtype)

    def check(self, outputs: Sequence[RequestOutput], names: Sequence[str | None]) -> None:
        """The greedy answers are the adapters'; exactly, or within the rounding of the engine's dtype."""
        answers = [self._answer(*pair) for pair in zip(outputs, names, strict=True)]
        self.check_answers(answers)

    def check_tokens(self, name: str | None, prompt: list[int], tokens: list[int]) -> None:
        """A greedy answer without log-probabilities is the adapter's."""
        subject = f"adapter {name or 'base'}"
        self.check_answers(
            [RoundedAnswer(self._exact[name], self._rounded[name], prompt, tokens, None, subject)]
        )

    def check_answers(self, answers: Sequence[RoundedAnswer]) -> None:
        """The same for answers that are put together already."""
        if not self._engine.is_exact:
            assert_rounding_parity(answers)
            return
        for one in answers:
            assert_parity(one.exact, one.prompt, one.tokens, one.logprobs, one.subject)

    def _answer(self, output: RequestOutput, name: str | None) -> RoundedAnswer:
        assert output.lora_name == name
        [completion] = output.outputs
        assert completion.finish_reason == "length"
        logprobs = None
        if completion.logprobs is not None:
            steps = zip(completion.token_ids, completion.logprobs, strict=True)
            logprobs = [step[token].logprob for token, step in steps]
        prompt, tokens = list(output.prompt_token_ids or []), list(completion.token_ids)
        subject = f"adapter {name or 'base'}, prompt {output.prompt!r}"
        return RoundedAnswer(self._exact[name], self._rounded[name], prompt, tokens, logprobs, subject)

    def logprobs(self, name: str | None, tokens: list[int]) -> np.ndarray:
        """[T, V] what the adapter's reference expects after each token."""
        return torch.log_softmax(self._exact[name].logits(tokens).double(), dim=-1).numpy()
