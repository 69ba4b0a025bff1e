"""Tool calls as Hermes and Qwen write them: `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`."""

from __future__ import annotations

import json

from lora_serve.server.parsing.parts import Call, Part, content_of, num_held_back

OPEN, CLOSE = "<tool_call>", "</tool_call>"


class HermesParser:
    """Implements `ToolParser`. White space before and after calls is not content."""

    def __init__(self) -> None:
        self._text = ""
        self._is_in_call = False
        self._has_calls = False

    def feed(self, text: str) -> list[Part]:
        """See `ToolParser.feed`."""
        self._text += text
        parts: list[Part] = []
        while True:
            word = CLOSE if self._is_in_call else OPEN
            before, found, after = self._text.partition(word)
            if not found:
                break
            self._text = after
            if self._is_in_call:
                parts += self._close(before, CLOSE)
            else:
                parts += self._content(before.rstrip())
            self._is_in_call = not self._is_in_call
        if not self._is_in_call:
            # White space waits too: it is dropped when a call follows.
            keep = len(self._text) - num_held_back(self._text, OPEN)
            keep = len(self._text[:keep].rstrip())
            shown, self._text = self._text[:keep], self._text[keep:]
            parts += self._content(shown)
        return parts

    def flush(self) -> list[Part]:
        """See `ToolParser.flush`; a call that lacks only its closing word is one."""
        text, self._text = self._text, ""
        if self._is_in_call:
            return self._close(text, "")
        return self._content(text)

    def _content(self, text: str) -> list[Part]:
        return content_of(text.lstrip() if self._has_calls else text)

    def _close(self, text: str, closing: str) -> list[Part]:
        call = read_call(text, ("arguments", "parameters"))
        if call is None:
            return content_of(OPEN + text + closing)
        self._has_calls = True
        return [call]


def read_call(text: str, names_of_arguments: tuple[str, ...]) -> Call | None:
    """Read a call's JSON object; None where it is none.

    Parameters
    ----------
    text : str
        With white space around it or without.
    names_of_arguments : tuple of str
        Keys that the arguments may have.
    """
    try:
        return as_call(json.loads(text), names_of_arguments)
    except (ValueError, RecursionError):
        return None


def as_call(value: object, names_of_arguments: tuple[str, ...]) -> Call | None:
    """Give the call that a JSON value stands for; None where it is none."""
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return None
    arguments: object = next((value[name] for name in names_of_arguments if name in value), {})
    if isinstance(arguments, dict):
        arguments = json.dumps(arguments, ensure_ascii=False)
    return Call(value["name"], arguments) if isinstance(arguments, str) else None
