"""Checks a request against the model and splits it into one engine request an answer."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from lora_serve.common.errors import InvalidArgumentError
from lora_serve.common.field_checks import check_text
from lora_serve.common.sampling_params import SamplingParams
from lora_serve.engine.messages import EngineRequest, ModelInfo


@dataclass(frozen=True)
class ProcessedRequest:
    """A request that the engine can take.

    Parameters
    ----------
    request_id : str
        The caller's id.
    prompt : str or None
        Text, when there is one.
    prompt_token_ids : list of int
        Checked.
    sampling_params : SamplingParams
        With `max_tokens` set.
    lora_name : str or None
        The adapter; None = the base model.
    engine_requests : list of EngineRequest
        One an answer, by index, with ids and seeds of their own.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    sampling_params: SamplingParams
    lora_name: str | None
    engine_requests: list[EngineRequest]

    @property
    def engine_request_ids(self) -> list[int]:
        """The engine's ids of the answers, by index."""
        return [request.request_id for request in self.engine_requests]


class InputProcessor:
    """Checks requests against one model, and numbers them.

    Parameters
    ----------
    info : ModelInfo
        Limits of the model.
    """

    def __init__(self, info: ModelInfo) -> None:
        self._info = info
        self._next_id = itertools.count()

    def process(
        self,
        request_id: str,
        prompt: str | None,
        prompt_token_ids: Sequence[int],
        sampling_params: SamplingParams,
        lora_name: str | None,
    ) -> ProcessedRequest:
        """Check one request.

        Raises
        ------
        InvalidArgumentError
            The prompt is empty, too long (with numbers) or has ids outside the vocabulary, prompt plus
            `max_tokens` do not fit, or a parameter names such ids.
        """
        token_ids = self._check_prompt(prompt_token_ids)
        params = self._resolve_lengths(sampling_params, len(token_ids))
        for field, ids in (
            ("stop_token_ids", params.stop_token_ids),
            ("logit_bias", list(params.logit_bias or {})),
        ):
            self._check_vocabulary(field, ids)
        if lora_name is not None:
            check_text("lora_name", lora_name)
        return ProcessedRequest(
            request_id=request_id,
            prompt=prompt,
            prompt_token_ids=token_ids,
            sampling_params=params,
            lora_name=lora_name,
            engine_requests=[
                EngineRequest(
                    request_id=next(self._next_id),
                    prompt_token_ids=token_ids,
                    sampling_params=params.child(index),
                    lora_name=lora_name,
                )
                for index in range(params.n)
            ],
        )

    def _check_prompt(self, prompt_token_ids: Sequence[int]) -> list[int]:
        limit = self._info.max_model_len
        if len(prompt_token_ids) == 0:
            raise InvalidArgumentError("the prompt is empty but must have at least one token; send some text")
        if len(prompt_token_ids) >= limit:
            raise InvalidArgumentError(
                f"the prompt has {len(prompt_token_ids)} tokens but max_model_len is {limit}, at least one "
                f"of them for the answer; shorten the prompt to {limit - 1} tokens"
            )
        for token_id in prompt_token_ids:
            if isinstance(token_id, bool) or not hasattr(token_id, "__index__"):
                raise InvalidArgumentError(f"the prompt has the token id {token_id!r} but ids are integers")
        token_ids = [int(token_id) for token_id in prompt_token_ids]
        self._check_vocabulary("the prompt", token_ids)
        return token_ids

    def _check_vocabulary(self, subject: str, token_ids: list[int]) -> None:
        if not token_ids:
            return
        for extreme in (min(token_ids), max(token_ids)):
            if not 0 <= extreme < self._info.vocab_size:
                raise InvalidArgumentError(
                    f"{subject} has the token id {extreme} but the model's ids are in "
                    f"[0, {self._info.vocab_size})"
                )

    def _resolve_lengths(self, params: SamplingParams, num_prompt_tokens: int) -> SamplingParams:
        limit = self._info.max_model_len
        room = limit - num_prompt_tokens
        if params.max_tokens is None:
            if params.min_tokens > room:
                raise InvalidArgumentError(
                    f"min_tokens is {params.min_tokens} but a prompt of {num_prompt_tokens} tokens leaves "
                    f"{room} of max_model_len {limit}; lower min_tokens or shorten the prompt"
                )
            return msgspec.structs.replace(params, max_tokens=room)
        if params.max_tokens > room:
            raise InvalidArgumentError(
                f"max_tokens is {params.max_tokens} but a prompt of {num_prompt_tokens} tokens leaves {room} "
                f"of max_model_len {limit}; set max_tokens to at most {room} or shorten the prompt"
            )
        return params
