"""Which parser finds the tool calls of a model's answers."""

from __future__ import annotations

from collections.abc import Callable

from lora_serve.server.parsing.hermes import OPEN, HermesParser
from lora_serve.server.parsing.llama3_json import TAG, Llama3JsonParser
from lora_serve.server.parsing.parts import ToolParser

_PARSERS: dict[str, Callable[[], ToolParser]] = {
    "hermes": HermesParser,
    "llama3_json": Llama3JsonParser,
}
_AUTO = "auto"


def choose_tool_parser(option: str, chat_template: str) -> Callable[[], ToolParser] | None:
    """Give what makes the parser of an answer.

    Parameters
    ----------
    option : str
        A name of `settings.TOOL_PARSERS`.
    chat_template : str
        The model's, which shows calls in the form in which the model writes them; empty = there is none.

    Returns
    -------
    callable or None
        None = the template shows none of the known forms.
    """
    if option != _AUTO:
        return _PARSERS[option]
    if OPEN in chat_template:
        return HermesParser
    if TAG in chat_template or "ipython" in chat_template.lower():
        return Llama3JsonParser
    return None
