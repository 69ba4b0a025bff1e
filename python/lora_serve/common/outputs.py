"""What a caller gets back: the text, tokens and log probabilities of one request."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

FinishReason = Literal["stop", "length", "abort"]
"""Why an output ended: a stop token or stop string, the token limit, or an abort."""


@dataclass(frozen=True)
class Logprob:
    """One token's log probability.

    Parameters
    ----------
    logprob : float
        Natural logarithm of the token's probability under the model's raw logits, in (-inf, 0].
    rank : int
        1 for the most probable token of the position.
    decoded_token : str or None
        The token's text; None where nobody has decoded it.
    """

    logprob: float
    rank: int
    decoded_token: str | None = None


@dataclass
class CompletionOutput:
    """One of the `n` answers to a prompt.

    Parameters
    ----------
    index : int
        In [0, n).
    text : str
        The answer's text (in a stream: what is new since the last output). Never ends in half a character.
    token_ids : list of int
        The tokens whose text may be shown, including the one that ended the answer.
    cumulative_logprob : float or None
        Sum of the tokens' log probabilities; None unless log probabilities were asked for.
    logprobs : list of dict from int to Logprob, or None
        One entry a token: the sampled token first, then the most probable ones.
    finish_reason : {'stop', 'length', 'abort'} or None
        None while the answer is not complete.
    stop_reason : int, str or None
        The stop token id or the stop string that ended the answer; None for the end-of-sequence token.
    """

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None

    @property
    def finished(self) -> bool:
        """True when nothing more will come."""
        return self.finish_reason is not None


@dataclass
class RequestOutput:
    """All answers to one prompt.

    Parameters
    ----------
    request_id : str
        The caller's id of the request.
    prompt : str or None
        The prompt's text; None when it came as token ids.
    prompt_token_ids : list of int
        The prompt as the model read it.
    prompt_logprobs : list of (dict from int to Logprob, or None), or None
        One entry a prompt token, None for the first; None unless asked for.
    outputs : list of CompletionOutput
        In a final result all `n`, by index; in a stream the ones that have something new.
    finished : bool
        True when every answer is complete.
    num_cached_tokens : int
        Prompt tokens that came from the prefix cache, on the device or the host (of the first answer, where
        n > 1).
    lora_name : str or None
        The adapter's name; None = the base model.
    adapter_id : int
        The adapter's generation; 0 = the base model.
    queue_s : float or None
        Seconds that the request waited in the engine for its first step (of the first answer); in a stream
        with the first output only.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    outputs: list[CompletionOutput] = field(default_factory=list)
    finished: bool = False
    num_cached_tokens: int = 0
    lora_name: str | None = None
    adapter_id: int = 0
    queue_s: float | None = None
