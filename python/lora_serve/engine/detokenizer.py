"""Token ids to text while they come, in whole characters."""

from __future__ import annotations

from collections.abc import Sequence

from lora_serve.engine.tokenizer import Tokenizer

REPLACEMENT = "\ufffd"
"""What a decoder writes for bytes that are no complete character."""
NUM_CONTEXT_TOKENS = 5
"""Prompt tokens that are decoded in front of the first answer token: some decoders drop a leading space."""
MAX_CHARACTER_BYTES = 4
"""Of UTF-8."""
MAX_HELD_BACK_TOKENS = 8
"""A longer run of tokens without a whole character at its end has invalid bytes in it."""


class IncrementalDetokenizer:
    """Token ids to text while they come, in whole characters.

    The pieces, joined, equal the decoding of all tokens at once, less the bytes at the end that are no whole
    character.

    Parameters
    ----------
    tokenizer : Tokenizer
        Decodes.
    prompt_token_ids : sequence of int
        What the answer continues; only its last tokens are looked at.
    skip_special_tokens : bool
        Special tokens give no text.

    Notes
    -----
    A token costs two decodings of a few tokens, however long the answer is. The window
    `tokens[start:]` is decoded; `tokens[start:read]` is the context whose text was shown already::

        start         read              len(tokens)
          | context     | not shown yet   |

    Source: the prefix-offset method of Hugging Face's text-generation-inference; here runs of bytes that
    never become a character are given up after a bounded number of tokens.
    """

    def __init__(
        self, tokenizer: Tokenizer, prompt_token_ids: Sequence[int], *, skip_special_tokens: bool
    ) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._window: list[int] = []
        self._num_read = 0
        self._context_text = ""
        self._read_prompt(prompt_token_ids)

    def feed(self, token_id: int) -> str:
        """Take one token; give the text that is complete now, often empty."""
        self._window.append(token_id)
        new_text = self._unread_text(len(self._window))
        num_unread = len(self._window) - self._num_read
        if new_text and not new_text.endswith(REPLACEMENT):
            self._restart_window(self._window[self._num_read :], is_read=True)
            return new_text
        if num_unread <= MAX_HELD_BACK_TOKENS:
            return ""
        if not new_text:
            del self._window[self._num_read :]  # They are silent; the context stays for what comes.
            return ""
        return self._give_up_invalid_bytes(new_text)

    def flush(self) -> str:
        """Give the whole characters that are held back in front of bytes that will stay incomplete."""
        text = self._unread_text(len(self._window))
        self._restart_window([], is_read=True)
        return text.rstrip(REPLACEMENT)

    def _read_prompt(self, prompt_token_ids: Sequence[int]) -> None:
        """Begin with the prompt's last tokens, from a start to an end between whole characters.

        Half a character at the prompt's end stays unread: the answer shows it when it is whole. Tokens may
        end in half a character many times in a row, since a token can hold the end of one and half the next.
        """
        num_tokens = len(prompt_token_ids)
        for end in range(num_tokens, max(num_tokens - MAX_HELD_BACK_TOKENS, -1), -1):
            latest_start = max(end - NUM_CONTEXT_TOKENS, 0)
            for start in range(latest_start, max(latest_start - MAX_CHARACTER_BYTES, -1), -1):
                context_text = self._decode(prompt_token_ids[start:end])
                if REPLACEMENT not in context_text:
                    self._window = list(prompt_token_ids[start:])
                    self._num_read = end - start
                    whole_text = self._decode(self._window).rstrip(REPLACEMENT)
                    is_spoiled = REPLACEMENT in whole_text or not whole_text.startswith(context_text)
                    self._context_text = context_text if is_spoiled else whole_text
                    return

    def _unread_text(self, end: int) -> str:
        """Text that `window[num_read:end]` adds to the context."""
        text = self._decode(self._window[:end])
        if text.startswith(self._context_text):
            return text[len(self._context_text) :]
        # Some decoders spoil a whole run of bytes, read ones too, as long as its last character is not whole.
        return self._decode(self._window[self._num_read : end])

    def _give_up_invalid_bytes(self, new_text: str) -> str:
        # The last tokens may be the start of a good character: keep as many as can stand alone.
        for num_kept in range(MAX_CHARACTER_BYTES - 1, 0, -1):
            cut = len(self._window) - num_kept
            given_up = self._unread_text(cut)
            if given_up + self._decode(self._window[cut:]) == new_text:
                self._restart_window(self._window[cut:], is_read=False)
                return given_up
        self._restart_window([], is_read=True)
        return new_text

    def _restart_window(self, tokens: list[int], *, is_read: bool) -> None:
        self._window = tokens
        self._num_read = len(tokens) if is_read else 0
        self._context_text = self._decode(tokens) if is_read else ""

    def _decode(self, token_ids: Sequence[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=self._skip) if token_ids else ""
