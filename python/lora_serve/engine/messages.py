"""What the engine takes and gives: values that may cross to another process."""

from __future__ import annotations

import msgspec

from lora_serve.common import errors
from lora_serve.common.outputs import FinishReason
from lora_serve.common.sampling_params import SamplingParams
from lora_serve.common.structured_outputs import GrammarForm


class WireError(msgspec.Struct, frozen=True):
    """An exception on its way to another process.

    Parameters
    ----------
    kind : str
        Name of a class of `lora_serve.common.errors`.
    message : str
        Its message.
    retry_after_s : int or None
        Of a CapacityError: seconds after which another try is worth it.
    """

    kind: str
    message: str
    retry_after_s: int | None = None

    @classmethod
    def from_exception(cls, error: BaseException) -> WireError:
        """Carry `error`; a class that users do not know becomes InternalError and is named in the message."""
        if isinstance(error, errors.LoraServeError):
            for known in type(error).__mro__:
                if known.__module__ == errors.__name__:
                    return cls(known.__name__, str(error), getattr(error, "retry_after_s", None))
        return cls(errors.InternalError.__name__, f"{type(error).__name__}: {error}")

    def to_exception(self) -> errors.LoraServeError:
        """Give the exception to raise."""
        known = getattr(errors, self.kind, errors.InternalError)
        error = known(self.message)
        if isinstance(error, errors.CapacityError):
            error.retry_after_s = self.retry_after_s
        assert isinstance(error, errors.LoraServeError)
        return error


class EngineRequest(msgspec.Struct, frozen=True, kw_only=True):
    """One answer to compute.

    Parameters
    ----------
    request_id : int
        Chosen by the engine's caller, never used before, at least 0.
    prompt_token_ids : list of int
        Checked: in the vocabulary, 1 to max_model_len - 1 tokens.
    sampling_params : SamplingParams
        With n = 1, `max_tokens` set to what the context holds, and `form` in place of `structured_outputs`.
    lora_name : str or None
        The adapter; None = the base model.
    priority : int
        Class of priority; lower goes first.
    queue_timeout_s : float or None
        Seconds, above 0: a request that has not begun to run by then fails with QueueTimeoutError. None = it
        waits as long as it must.
    form : GrammarForm or None
        That the answer must have.
    isolation_domain : bytes
        Prefixes are shared within one domain only, whatever the adapter; empty = the default domain.
    """

    request_id: int
    prompt_token_ids: list[int]
    sampling_params: SamplingParams
    lora_name: str | None = None
    priority: int = 0
    queue_timeout_s: float | None = None
    form: GrammarForm | None = None
    isolation_domain: bytes = b""


class PositionLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Log probabilities at one position.

    Parameters
    ----------
    token_ids : list of int
        The token that stands there first, then the most probable ones, best first; the first may occur again.
    logprobs : list of float
        Of these tokens.
    ranks : list of int
        Of these tokens, 1 = most probable.
    """

    token_ids: list[int]
    logprobs: list[float]
    ranks: list[int]


class EngineOutput(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What one step added to one request.

    Parameters
    ----------
    request_id : int
        The request.
    new_token_ids : list of int
        Tokens that this step sampled.
    logprobs : list of PositionLogprobs or None
        One entry a new token, when asked for.
    prompt_logprobs : list of (PositionLogprobs or None), or None
        One entry a prompt token (None for the first), when asked for; given once, with the first token.
    num_cached_tokens : int
        Prompt tokens that came from the prefix cache, of either tier, when the request was first admitted.
    queue_us : int or None
        Microseconds from the request's arrival to its first step; given once, with the first token.
    finish_reason : {'stop', 'length', 'abort'} or None
        None = more will come.
    stop_reason : int or None
        The stop token that ended the request; None for the model's end-of-sequence tokens.
    error : WireError or None
        The request failed; nothing more will come, and `finish_reason` is 'abort'.
    """

    request_id: int
    new_token_ids: list[int] = []
    logprobs: list[PositionLogprobs] | None = None
    prompt_logprobs: list[PositionLogprobs | None] | None = None
    num_cached_tokens: int = 0
    queue_us: int | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | None = None
    error: WireError | None = None


class ModelInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What a ready engine says about itself.

    Parameters
    ----------
    model : str
        As configured.
    max_model_len : int
        Longest prompt plus answer, in tokens.
    vocab_size : int
        Token ids are in [0, vocab_size).
    eos_token_ids : list of int
        The model's end-of-sequence tokens.
    page_size : int
        Tokens of a KV page.
    num_device_pages, num_host_pages : int
        KV pages of each tier; no host pages = no host tier.
    max_num_seqs : int
        Requests that may run at once.
    max_loras : int
        Distinct adapters in one step.
    """

    model: str
    max_model_len: int
    vocab_size: int
    eos_token_ids: list[int]
    page_size: int
    num_device_pages: int
    num_host_pages: int
    max_num_seqs: int
    max_loras: int


class AdmissionResult(msgspec.Struct, frozen=True, kw_only=True):
    """A request was accepted, under this generation.

    Parameters
    ----------
    adapter_id : int
        The generation that all its answers use; 0 = the base model.
    content_digest : str
        The generation's content digest in hex; empty for the base model.
    """

    adapter_id: int
    content_digest: str


class LoadAdapterResult(msgspec.Struct, frozen=True, kw_only=True):
    """An adapter is ready to serve.

    Parameters
    ----------
    name, adapter_id, content_digest
        The generation that the name now stands for.
    already_loaded : bool
        True when the same content was loaded before, so that nothing changed.
    """

    name: str
    adapter_id: int
    content_digest: str
    already_loaded: bool


class UnloadAdapterResult(msgspec.Struct, frozen=True, kw_only=True):
    """An adapter is gone: its pages and its memory are free.

    Parameters
    ----------
    name : str
        The name that was removed.
    adapter_ids : list of int
        The generations that were freed, in order; empty when only a pending load was cancelled.
    """

    name: str
    adapter_ids: list[int]
