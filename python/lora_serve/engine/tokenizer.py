"""The model's tokenizer: text to token ids and back, and its chat template."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from lora_serve.common.errors import InvalidArgumentError
from lora_serve.common.field_checks import is_valid_unicode

_OF_THIS_MACHINE = ("name_or_path", "is_local", "local_files_only")
"""Settings that say where the tokenizer was read from."""


class Tokenizer:
    """The model's tokenizer.

    Not thread-safe; `copy` gives one for another thread.

    Parameters
    ----------
    backend : transformers.PreTrainedTokenizerBase
        The tokenizer that is wrapped.

    Attributes
    ----------
    backend : transformers.PreTrainedTokenizerBase
        As given.
    """

    def __init__(self, backend: Any) -> None:
        self.backend = backend
        self._token_texts: dict[int, str] = {}

    @classmethod
    def from_pretrained(cls, model: str) -> Tokenizer:
        """Load the tokenizer of a Hugging Face directory or hub id.

        Raises
        ------
        InvalidArgumentError
            There is none, or transformers cannot read it.
        """
        from transformers import AutoTokenizer

        local_only = os.path.isdir(model)
        try:
            return cls(AutoTokenizer.from_pretrained(model, local_files_only=local_only))
        except Exception as error:
            raise InvalidArgumentError(
                f"the tokenizer of model {model!r} cannot be loaded ({type(error).__name__}: {error}); "
                "expected a Hugging Face directory or hub id with tokenizer.json"
            ) from error

    def copy(self) -> Tokenizer:
        """Give an independent tokenizer, for use in another thread."""
        return Tokenizer(copy.deepcopy(self.backend))

    @property
    def has_chat_template(self) -> bool:
        """True when the model's folder has a chat template."""
        return bool(self.backend.chat_template)

    @cached_property
    def special_token_ids(self) -> frozenset[int]:
        """Tokens that are no text, such as the end of the sequence."""
        return frozenset(self.backend.all_special_ids)

    @property
    def chat_template(self) -> str:
        """The chat template's source, of all templates where there are several; empty = there is none."""
        template = self.backend.chat_template
        if isinstance(template, dict):
            return "\n".join(template.values())
        return template or ""

    def public_settings(self) -> dict[str, Any]:
        """Give what a client needs to know to tokenise as this does: tokenizer_config.json, without paths.

        Returns
        -------
        dict
            JSON values. Special tokens are text or None; `chat_template` is there where the model has one.

        Notes
        -----
        Source: vLLM's /tokenizer_info. Here no name of a file or folder is left in, and `bos_token`,
        `eos_token`, `pad_token` and `unk_token` are always there.
        """
        settings = {
            name: _as_json(value)
            for name, value in self.backend.init_kwargs.items()
            if not name.endswith("_file") and name not in _OF_THIS_MACHINE
        }
        for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
            settings[name] = getattr(self.backend, name)
        if self.has_chat_template:
            settings["chat_template"] = self.backend.chat_template
        settings["tokenizer_class"] = type(self.backend).__name__
        return settings

    def token_id(self, text: str) -> int | None:
        """Give the token that stands for exactly this text in the vocabulary; None = there is none."""
        token_id = self.backend.convert_tokens_to_ids(text)
        if token_id is None or self.backend.convert_ids_to_tokens(token_id) != text:  # The unknown token's.
            return None
        return int(token_id)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Give the text's token ids.

        Raises
        ------
        InvalidArgumentError
            The text has half a surrogate pair, which is no character.
        """
        if not is_valid_unicode(text):
            raise InvalidArgumentError(
                "the text has half a surrogate pair, which is no character; send valid Unicode"
            )
        return [
            int(token_id) for token_id in self.backend.encode(text, add_special_tokens=add_special_tokens)
        ]

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Give the tokens' text exactly: no clean-up of spaces. Ids that the tokenizer lacks give no text."""
        text = self.backend.decode(
            list(token_ids), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
        )
        assert isinstance(text, str)
        return text

    def decode_token(self, token_id: int) -> str:
        """Give one token's own text, special tokens included; remembered per token."""
        text = self._token_texts.get(token_id)
        if text is None:
            text = self._token_texts[token_id] = self.decode([token_id], skip_special_tokens=False)
        return text

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Render the chat template and tokenise the result (the template writes its own special tokens).

        Parameters
        ----------
        messages : sequence of mappings
            `role` and `content` each, as the template expects them.
        add_generation_prompt : bool
            End with the start of the assistant's turn.
        template_kwargs : mapping or None
            Further variables of the template.

        Raises
        ------
        InvalidArgumentError
            There is no message or no chat template, or it refuses the messages.
        """
        if not self.has_chat_template:
            raise InvalidArgumentError(
                "the model's tokenizer has no chat template, so messages cannot be rendered; send a prompt "
                "to /v1/completions (LLM.generate) instead"
            )
        if not messages:
            raise InvalidArgumentError("messages is empty but must have at least one message")
        try:
            text = self.backend.apply_chat_template(
                [dict(message) for message in messages],
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                **dict(template_kwargs or {}),
            )
        except Exception as error:
            raise InvalidArgumentError(f"the chat template refuses the messages: {error}") from error
        return self.encode(text, add_special_tokens=False)


def _as_json(value: Any) -> Any:
    """Give a setting as JSON can hold it; tokens with options of their own are their text."""
    if hasattr(value, "content"):
        return value.content
    if isinstance(value, Mapping):
        return {str(key): _as_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [_as_json(item) for item in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)
