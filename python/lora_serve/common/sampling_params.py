"""How the tokens of one request are chosen, and when it ends."""

from __future__ import annotations

from typing import Any

import msgspec

from lora_serve.common.field_checks import check_bool, check_float, check_int, is_valid_unicode, refuse
from lora_serve.common.structured_outputs import StructuredOutputsParams

MAX_N = 128
"""Answers that one request may ask for."""
MAX_LOGPROBS = 20
"""Most probable tokens that a request may ask for at a position."""
MIN_TEMPERATURE = 1e-5
"""Smallest temperature above 0: dividing by less overflows fp32."""
_MIN_INT64, _MAX_INT64 = -(2**63), 2**63 - 1
_MAX_INT32 = 2**31 - 1
MIN_REPETITION_PENALTY, MAX_REPETITION_PENALTY = 0.01, 100.0
"""Beyond these a logit times or divided by the penalty can leave the range of fp32."""


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """How the tokens of one request are chosen, and when it ends.

    Names and meanings are vLLM's. Immutable, and valid once constructed (decoding a message checks too).

    Parameters
    ----------
    n : int
        Answers to give, in [1, 128].
    max_tokens : int or None
        Most tokens of an answer, at least 1; None = as many as the model's context holds.
    min_tokens : int
        Stop tokens and the end-of-sequence token cannot be sampled before so many tokens, at least 0.
    temperature : float
        0 = greedy, else at least 1e-5.
    top_p : float
        In (0, 1]; 1 = off.
    top_k : int
        At least -1, at most 2**31 - 1; 0 and -1 = off.
    min_p : float
        Probability relative to the best token's below which tokens are dropped, in [0, 1]; 0 = off.
    repetition_penalty : float
        In [0.01, 100]; over the tokens of prompt and answer; 1 = off.
    presence_penalty, frequency_penalty : float
        In [-2, 2]; over the tokens of the answer; 0 = off.
    logit_bias : dict from int to float, or None
        Added to the logits of these tokens, each in [-100, 100].
    seed : int or None
        A signed 64-bit seed that makes the answer independent of the batch it runs in; None = the engine's.
    stop : str, list of str or None
        The answer ends before the first of these strings. Normalised to a list; read `stop_strings`.
    stop_token_ids : list of int
        Tokens that end the answer, besides the model's end-of-sequence tokens.
    include_stop_str_in_output : bool
        Keep the stop string in the text.
    ignore_eos : bool
        The model's end-of-sequence tokens do not end the answer.
    logprobs : int or None
        Log probabilities of the sampled token and so many of the most probable ones, in [0, 20].
    prompt_logprobs : int or None
        The same for every prompt token; such a request does not reuse a prefix.
    skip_special_tokens : bool
        Leave special tokens out of the text.
    allowed_token_ids : list of int or None
        The answer has no other tokens. Not together with structured_outputs.
    structured_outputs : StructuredOutputsParams or None
        The form that the answer must have. It ends when the form is complete, so neither min_tokens nor
        ignore_eos can be asked for with it.

    Raises
    ------
    InvalidArgumentError
        A field has a wrong type or value.
    """

    n: int = 1
    max_tokens: int | None = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] | None = None
    seed: int | None = None
    stop: list[str] | str | None = None
    stop_token_ids: list[int] = []
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True
    allowed_token_ids: list[int] | None = None
    structured_outputs: StructuredOutputsParams | None = None

    def __post_init__(self) -> None:
        self._normalise()
        self.validate()

    @property
    def is_greedy(self) -> bool:
        """True when the most probable token is always taken."""
        return self.temperature == 0

    @property
    def stop_strings(self) -> list[str]:
        """The stop strings as a list, empty when there are none."""
        assert isinstance(self.stop, list)  # by _normalise
        return self.stop

    def child(self, index: int) -> SamplingParams:
        """Parameters of answer `index` of `n`: the same with n = 1 and a seed of its own (seed + index)."""
        seed = self.seed
        if seed is not None:
            seed = (seed + index - _MIN_INT64) % 2**64 + _MIN_INT64
        return msgspec.structs.replace(self, n=1, seed=seed)

    def validate(self) -> None:
        """Check every field.

        Raises
        ------
        InvalidArgumentError
            Names the field, what was found and what was expected.
        """
        self._validate_lengths()
        self._validate_distribution()
        self._validate_stops()
        for field in ("include_stop_str_in_output", "ignore_eos", "skip_special_tokens"):
            check_bool(field, getattr(self, field))
        for field in ("logprobs", "prompt_logprobs"):
            if getattr(self, field) is not None:
                check_int(field, getattr(self, field), 0, MAX_LOGPROBS)
        self._validate_form()

    def _normalise(self) -> None:
        stop: Any = self.stop
        if stop is None:
            stop = []
        elif isinstance(stop, str):
            stop = [stop]
        elif isinstance(stop, (list, tuple)):
            stop = list(stop)
        msgspec.structs.force_setattr(self, "stop", stop)
        if isinstance(self.stop_token_ids, (list, tuple)):
            msgspec.structs.force_setattr(self, "stop_token_ids", list(self.stop_token_ids))

    def _validate_lengths(self) -> None:
        check_int("n", self.n, 1, MAX_N)
        if self.max_tokens is not None:
            check_int("max_tokens", self.max_tokens, 1, _MAX_INT32)
        check_int("min_tokens", self.min_tokens, 0, _MAX_INT32)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            refuse("min_tokens", self.min_tokens, f"at most max_tokens, which is {self.max_tokens}")

    def _validate_distribution(self) -> None:
        check_float("temperature", self.temperature, 0.0)
        if 0 < self.temperature < MIN_TEMPERATURE:
            refuse("temperature", self.temperature, f"0 (greedy) or at least {MIN_TEMPERATURE}")
        check_float("top_p", self.top_p, 0.0, 1.0, above_minimum=True)
        check_int("top_k", self.top_k, -1, _MAX_INT32)
        check_float("min_p", self.min_p, 0.0, 1.0)
        check_float(
            "repetition_penalty", self.repetition_penalty, MIN_REPETITION_PENALTY, MAX_REPETITION_PENALTY
        )
        check_float("presence_penalty", self.presence_penalty, -2.0, 2.0)
        check_float("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        if self.seed is not None:
            check_int("seed", self.seed, _MIN_INT64, _MAX_INT64)
        if self.logit_bias is None:
            return
        if not isinstance(self.logit_bias, dict):
            refuse("logit_bias", self.logit_bias, "a mapping from token ids to numbers")
        for token_id, bias in self.logit_bias.items():
            check_int("a token id of logit_bias", token_id, 0, _MAX_INT32)
            check_float(f"logit_bias[{token_id}]", bias, -100.0, 100.0)

    def _validate_form(self) -> None:
        if self.allowed_token_ids is not None:
            if not isinstance(self.allowed_token_ids, list) or not self.allowed_token_ids:
                refuse("allowed_token_ids", self.allowed_token_ids, "a list of at least one token id")
            for token_id in self.allowed_token_ids:
                check_int("a token id of allowed_token_ids", token_id, 0, _MAX_INT32)
            if self.structured_outputs is not None:
                refuse("allowed_token_ids", self.allowed_token_ids, "None with structured_outputs")
        if self.structured_outputs is None:
            return
        if not isinstance(self.structured_outputs, StructuredOutputsParams):
            refuse("structured_outputs", self.structured_outputs, "a StructuredOutputsParams")
        if self.min_tokens > 0:
            refuse("min_tokens", self.min_tokens, "0 with structured_outputs, whose form ends the answer")
        if self.ignore_eos:
            refuse("ignore_eos", self.ignore_eos, "False with structured_outputs, whose form ends the answer")

    def _validate_stops(self) -> None:
        if not isinstance(self.stop, list):
            refuse("stop", self.stop, "a string or a list of strings")
        for stop in self.stop:
            if not isinstance(stop, str) or not stop or not is_valid_unicode(stop):
                refuse("stop", self.stop, "made of non-empty strings of valid Unicode")
        if not isinstance(self.stop_token_ids, list):
            refuse("stop_token_ids", self.stop_token_ids, "a list of token ids")
        for token_id in self.stop_token_ids:
            check_int("a token id of stop_token_ids", token_id, 0, _MAX_INT32)
