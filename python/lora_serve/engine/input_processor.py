"""Tokenises prompts, checks a request against the model, splits it into one engine request an answer."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from lora_serve.common.errors import InvalidArgumentError
from lora_serve.common.field_checks import check_text
from lora_serve.common.queueing import DEFAULT_QUEUEING, Queueing
from lora_serve.common.sampling_params import SamplingParams
from lora_serve.engine.isolation import DEFAULT_DOMAIN
from lora_serve.engine.messages import EngineRequest, ModelInfo
from lora_serve.engine.tokenizer import Tokenizer

_MAX_COMPOSED = 4
"""NFC and NFKC delete nothing, and a character that they compose stands for at most 4 (Unicode, UAX 15)."""
_SHRINK_OF_NORMALIZER = {
    "NFC": _MAX_COMPOSED,
    "NFKC": _MAX_COMPOSED,
    "NFD": 1,
    "NFKD": 1,
    "Lowercase": 1,
    "Prepend": 1,
    "ByteLevel": 1,
}
_LOSSLESS_PRE_TOKENIZERS = frozenset(
    {"ByteLevel", "Metaspace", "Split", "Punctuation", "Digits", "UnicodeScripts"}
)


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


class PromptTokenizer(Tokenizer):
    """A tokenizer that refuses, before it begins, text that cannot fit into the model's context.

    Tokenising takes time that grows with the text, and others wait for it: text without any bound would hold
    them up for seconds, only to be refused for its length.

    Parameters
    ----------
    tokenizer : Tokenizer
        What is wrapped; the two share a backend, so they belong to one thread.
    max_model_len : int
        Tokens of a prompt and its answer, at most.
    """

    def __init__(self, tokenizer: Tokenizer, max_model_len: int) -> None:
        super().__init__(tokenizer.backend)
        self._max_model_len = max_model_len
        self._max_chars_per_token = max_chars_per_token(tokenizer)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Give the token ids of a prompt; `encode_chat` passes what it rendered through here.

        Raises
        ------
        InvalidArgumentError
            The text is longer than any prompt that fits, or has half a surrogate pair.
        """
        if self._max_chars_per_token is not None:
            limit = (self._max_model_len - 1) * self._max_chars_per_token
            if len(text) > limit:
                raise InvalidArgumentError(
                    f"the prompt has {len(text)} characters but max_model_len is {self._max_model_len}, at "
                    f"least one token of them for the answer, and a token stands for at most "
                    f"{self._max_chars_per_token} characters; shorten the prompt to at most {limit} "
                    "characters, and to fewer if its tokens are shorter"
                )
        return super().encode(text, add_special_tokens=add_special_tokens)


def max_chars_per_token(tokenizer: Tokenizer) -> int | None:
    """Give a number of characters that no token can exceed, whatever the text; None when there is none.

    Notes
    -----
    The longest entry of the vocabulary is such a number only if every character of the text ends up in some
    token that spells it. So this gives None for everything that can drop characters or let one token stand
    for a text of any length: normalisers that strip or delete, pre-tokenizers that remove, added tokens that
    take the spaces around them, unknown characters that are dropped or fused, models other than BPE.
    """
    backend = getattr(tokenizer.backend, "backend_tokenizer", None)
    if backend is None:  # Written in Python: nothing is known about what it does with a text.
        return None
    settings = msgspec.json.decode(backend.to_str())
    shrink = _max_shrink(settings["normalizer"])
    added = settings["added_tokens"]
    if (
        shrink is None
        or any(token["lstrip"] or token["rstrip"] for token in added)
        or not _keeps_every_character(settings["pre_tokenizer"])
        or not _spells_every_character(settings)
    ):
        return None
    longest = max(map(len, backend.get_vocab(with_added_tokens=True)), default=1)
    if backend.normalizer is not None:
        # An added token is found in normalised text, where it can be longer than as it was written.
        normalized = [backend.normalizer.normalize_str(token["content"]) for token in added]
        longest = max([longest, *map(len, normalized)])
    return longest * shrink


def _parts(component: Mapping[str, Any] | None, key: str) -> list[Mapping[str, Any]]:
    """Give a component of the tokenizer, or the ones of a sequence, nested ones included."""
    if component is None:
        return []
    if component["type"] != "Sequence":
        return [component]
    return [part for one in component[key] for part in _parts(one, key)]


def _max_shrink(normalizer: Mapping[str, Any] | None) -> int | None:
    """How many characters of text one character of normalised text can stand for; None = any number."""
    shrink = 1
    for part in _parts(normalizer, "normalizers"):
        if part["type"] == "Replace":
            pattern = part["pattern"].get("String")
            if not pattern or not part["content"]:
                return None
            shrink *= -(-len(pattern) // len(part["content"]))
        elif part["type"] in _SHRINK_OF_NORMALIZER:
            shrink *= _SHRINK_OF_NORMALIZER[part["type"]]
        else:
            return None
    return shrink


def _keeps_every_character(pre_tokenizer: Mapping[str, Any] | None) -> bool:
    return all(
        part["type"] in _LOSSLESS_PRE_TOKENIZERS and part.get("behavior") != "Removed"
        for part in _parts(pre_tokenizer, "pretokenizers")
    )


def _spells_every_character(settings: Mapping[str, Any]) -> bool:
    """True when the model gives an unknown character at least one token of its own."""
    model = settings["model"]
    if model["type"] != "BPE":
        return False
    parts = _parts(settings["normalizer"], "normalizers") + _parts(settings["pre_tokenizer"], "pretokenizers")
    if any(part["type"] == "ByteLevel" for part in parts) and byte_level_alphabet() <= set(model["vocab"]):
        return True
    if model["byte_fallback"] and all(f"<0x{byte:02X}>" in model["vocab"] for byte in range(256)):
        return True
    return model["unk_token"] in model["vocab"] and not model["fuse_unk"]


def byte_level_alphabet() -> set[str]:
    """Give the 256 characters that stand for bytes in a byte-level vocabulary."""
    from tokenizers.pre_tokenizers import ByteLevel

    return set(ByteLevel.alphabet())


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
        queueing: Queueing = DEFAULT_QUEUEING,
        isolation_domain: bytes = DEFAULT_DOMAIN,
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
            ("allowed_token_ids", params.allowed_token_ids or []),
        ):
            self._check_vocabulary(field, ids)
        if lora_name is not None:
            check_text("lora_name", lora_name)
        form, engine_params = None, params
        if params.structured_outputs is not None:
            form = params.structured_outputs.form
            engine_params = msgspec.structs.replace(params, structured_outputs=None)
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
                    sampling_params=engine_params.child(index),
                    lora_name=lora_name,
                    priority=queueing.priority,
                    queue_timeout_s=queueing.timeout_s,
                    form=form,
                    isolation_domain=isolation_domain,
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
