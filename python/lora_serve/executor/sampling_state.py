"""What sampling remembers of one request between steps."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from lora_serve.common.errors import InternalError, InvalidArgumentError
from lora_serve.common.sampling_params import SamplingParams
from lora_serve.executor.logprobs import TokenLogprobs
from lora_serve.executor.token_restriction import AllowedTokens, TokenRestriction


class TokenCounts:
    """How often each distinct token of a request occurs in its output; prompt tokens count 0.

    Grows by one token in amortised O(1), and gives its contents as arrays without a copy, so that penalties
    cost in proportion to the distinct tokens of a request, not to its length or to the vocabulary.

    Parameters
    ----------
    prompt_token_ids : numpy.ndarray
        [P] int32.
    """

    def __init__(self, prompt_token_ids: npt.NDArray[np.int32]) -> None:
        distinct = np.unique(prompt_token_ids)
        self._index = {int(token_id): index for index, token_id in enumerate(distinct)}
        capacity = max(64, 2 * len(distinct))
        self._token_ids = np.zeros(capacity, dtype=np.int64)
        self._counts = np.zeros(capacity, dtype=np.float32)
        self._token_ids[: len(distinct)] = distinct

    @property
    def token_ids(self) -> npt.NDArray[np.int64]:
        """[U] int64, the distinct tokens of prompt and output; a view, valid until the next `add`."""
        return self._token_ids[: len(self._index)]

    @property
    def output_counts(self) -> npt.NDArray[np.float32]:
        """[U] float32, occurrences of each of `token_ids` in the output."""
        return self._counts[: len(self._index)]

    def add(self, token_id: int) -> None:
        """Count one output token."""
        index = self._index.setdefault(token_id, len(self._index))
        if index == len(self._token_ids):
            self._token_ids = np.concatenate([self._token_ids, np.zeros_like(self._token_ids)])
            self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
        self._token_ids[index] = token_id
        self._counts[index] += 1


class SamplingState:
    """One request's sampling parameters, its output so far and its log probabilities.

    Made by the engine when a request (one answer of `n`) arrives, handed to `Executor.submit` with every
    plan row of that request, and kept over preemptions. The executor alone appends to `output_token_ids`,
    in its own thread: it may be a token ahead of what the engine has been told.

    Parameters
    ----------
    params : SamplingParams
        Of one answer; its `n` and `seed` are not read.
    prompt_token_ids : numpy.ndarray
        [P] int32, at least one token.
    eos_token_ids : iterable of int
        The model's end-of-sequence tokens, banned until `min_tokens` (also under `ignore_eos`).
    vocab_size : int
        Number of logits.
    seed : int or None
        Seed of this answer; None only where nothing is drawn: greedy sampling.
    grammar : TokenRestriction or None
        Of this answer; the state gives it every token that is appended.

    Raises
    ------
    InvalidArgumentError
        `logit_bias` or `allowed_token_ids` names a token outside the vocabulary, or `min_tokens` forbids all
        that the latter allows.

    Attributes
    ----------
    needs_outputs : bool
        A token cannot be chosen before the host knows the one before: penalties, a grammar.
    output_token_ids : list of int
        Tokens sampled so far.
    prompt_logprobs : list of (TokenLogprobs or None), or None
        [P], filled while the prompt is computed, entry 0 always None; None when they were not asked for.
    """

    __slots__ = (
        "adjusts_every_step",
        "eos_token_ids",
        "is_plain_greedy",
        "needs_outputs",
        "output_token_ids",
        "params",
        "prompt_logprobs",
        "prompt_token_ids",
        "restriction",
        "seed",
        "stop_ids",
        "token_counts",
        "vocab_size",
    )

    def __init__(
        self,
        params: SamplingParams,
        prompt_token_ids: npt.NDArray[np.int32],
        eos_token_ids: Iterable[int],
        vocab_size: int,
        seed: int | None,
        grammar: TokenRestriction | None = None,
    ) -> None:
        self._check_vocabulary("logit_bias", params.logit_bias or {}, vocab_size)
        self.params = params
        self.prompt_token_ids = prompt_token_ids
        self.eos_token_ids = tuple(eos_token_ids)
        self.vocab_size = vocab_size
        self.seed = seed
        self.restriction = grammar
        if params.allowed_token_ids is not None:
            self._check_vocabulary("allowed_token_ids", params.allowed_token_ids, vocab_size)
            self.restriction = AllowedTokens(params.allowed_token_ids, vocab_size)
        self.output_token_ids: list[int] = []
        self.prompt_logprobs: list[TokenLogprobs | None] | None = None
        if params.prompt_logprobs is not None:
            self.prompt_logprobs = [None] * len(prompt_token_ids)

        has_penalties = (
            params.repetition_penalty != 1.0
            or params.frequency_penalty != 0.0
            or params.presence_penalty != 0.0
        )
        self.token_counts = TokenCounts(prompt_token_ids) if has_penalties else None
        is_following = self.restriction is not None and self.restriction.needs_outputs
        self.needs_outputs = has_penalties or is_following
        self.adjusts_every_step = has_penalties or bool(params.logit_bias) or self.restriction is not None
        stops = {*params.stop_token_ids, *self.eos_token_ids} if params.min_tokens > 0 else set()
        self.stop_ids = sorted(token_id for token_id in stops if 0 <= token_id < vocab_size)
        if self.stop_ids and params.allowed_token_ids and set(params.allowed_token_ids) <= set(self.stop_ids):
            raise InvalidArgumentError(
                "allowed_token_ids has only tokens that end the answer but min_tokens is "
                f"{params.min_tokens}; allow others, or leave min_tokens out"
            )
        self.is_plain_greedy = (
            params.is_greedy and params.logprobs is None and not self.adjusts_every_step and not self.stop_ids
        )

    @staticmethod
    def _check_vocabulary(field: str, token_ids: Iterable[int], vocab_size: int) -> None:
        for token_id in token_ids:
            if not 0 <= token_id < vocab_size:
                raise InvalidArgumentError(
                    f"{field} names token id {token_id} but the model's ids are in [0, {vocab_size}); "
                    "remove it"
                )

    @property
    def drawing_seed(self) -> int:
        """The seed of a request that draws.

        Raises
        ------
        InternalError
            It was made without one.
        """
        if self.seed is None:
            raise InternalError("a request without a seed draws a token; the engine gives each a seed")
        return self.seed

    @property
    def num_prompt_tokens(self) -> int:
        """Length of the prompt."""
        return len(self.prompt_token_ids)

    @property
    def bans_stop_tokens(self) -> bool:
        """True while fewer than `min_tokens` tokens were sampled and there is a stop token to ban."""
        return self.bans_stop_tokens_at(len(self.output_token_ids))

    @property
    def adjusts_logits(self) -> bool:
        """True when the next token is chosen from other logits than the model's."""
        return self.adjusts_logits_at(len(self.output_token_ids))

    def bans_stop_tokens_at(self, num_outputs: int) -> bool:
        """`bans_stop_tokens` once `num_outputs` tokens were sampled, of which the last may not be known."""
        return bool(self.stop_ids) and num_outputs < self.params.min_tokens

    def adjusts_logits_at(self, num_outputs: int) -> bool:
        """`adjusts_logits` once `num_outputs` tokens were sampled, of which the last may not be known."""
        return self.adjusts_every_step or self.bans_stop_tokens_at(num_outputs)

    def append_output(self, token_id: int, position: int) -> None:
        """Take the token that was sampled for `position` of the sequence (prompt and output).

        Raises
        ------
        InternalError
            Another position is next: a step was applied twice or left out.
        RestrictionError
            The token is taken, but the answer cannot go on: its grammar does not allow it.
        """
        expected = self.num_prompt_tokens + len(self.output_token_ids)
        if position != expected:
            raise InternalError(
                f"a token was sampled for position {position} but the request's next position is {expected}"
            )
        self.output_token_ids.append(token_id)
        if self.token_counts is not None:
            self.token_counts.add(token_id)
        if self.restriction is not None:
            self.restriction.accept(token_id)

    def missing_prompt_logprobs(self) -> list[int]:
        """Prompt positions from 1 on that still lack log probabilities; none when they were not asked for."""
        if self.prompt_logprobs is None:
            return []
        return [p for p, entry in enumerate(self.prompt_logprobs) if p > 0 and entry is None]
