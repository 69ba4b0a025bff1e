"""Tool calls as Llama 3 writes them: an answer that is nothing but `{"name": ..., "parameters": {...}}`.

It may begin with `<|python_tag|>`, which is not shown where special tokens are left out; several calls follow
each other with a semicolon or white space between them.
"""

from __future__ import annotations

import json
from enum import Enum

from lora_serve.server.parsing.hermes import as_call
from lora_serve.server.parsing.parts import Part, content_of

TAG = "<|python_tag|>"
_BETWEEN = " \t\r\n;"
_ARGUMENTS = ("parameters", "arguments")


class _State(Enum):
    START = "start"
    CALLS = "calls"
    CONTENT = "content"


class Llama3JsonParser:
    """Implements `ToolParser`. Once something is no call, it and all that follows is content."""

    def __init__(self) -> None:
        self._text = ""
        self._prefix = ""  # What was taken off before the first call, to be given back if there is none.
        self._state = _State.START
        self._num_calls = 0
        self._decoder = json.JSONDecoder()

    def feed(self, text: str) -> list[Part]:
        """See `ToolParser.feed`."""
        if self._state is _State.CONTENT:
            return content_of(text)
        self._text += text
        if self._state is _State.START:
            self._state = self._find_start()
            if self._state is _State.CONTENT:
                return self._give_up()
        if self._state is _State.START or "}" not in text:
            return []
        return self._take_calls()

    def flush(self) -> list[Part]:
        """See `ToolParser.flush`."""
        parts = self._take_calls() if self._state is _State.CALLS else []
        if self._num_calls and not self._text.strip(_BETWEEN):
            self._text = ""
        return parts + self._give_up()

    def _find_start(self) -> _State:
        """Take off what stands before the first call; tell what the answer is, as far as it can be told."""
        stripped = self._text.lstrip()
        if TAG.startswith(stripped):  # Or empty.
            return _State.START
        body = stripped.removeprefix(TAG).lstrip()
        if not body:
            return _State.START
        if not body.startswith("{"):
            return _State.CONTENT
        self._prefix = self._text[: len(self._text) - len(body)]
        self._text = body
        return _State.CALLS

    def _take_calls(self) -> list[Part]:
        parts: list[Part] = []
        while body := self._text.lstrip(_BETWEEN):
            if not body.startswith("{"):
                self._state = _State.CONTENT
                return parts + self._give_up()
            try:
                value, end = self._decoder.raw_decode(body)
            except (ValueError, RecursionError):
                break  # Not complete, or no JSON; the end of the text will tell.
            call = as_call(value, _ARGUMENTS)
            if call is None:
                self._state = _State.CONTENT
                return parts + self._give_up()
            parts.append(call)
            self._num_calls += 1
            self._prefix = ""
            self._text = body[end:]
        return parts

    def _give_up(self) -> list[Part]:
        text, self._prefix, self._text = self._prefix + self._text, "", ""
        return content_of(text)
