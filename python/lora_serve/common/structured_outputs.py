"""The form that an answer must have: JSON, a regular expression, a choice, a grammar."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec

from lora_serve.common.errors import InvalidArgumentError
from lora_serve.common.field_checks import check_bool, check_int, is_valid_unicode, refuse
from lora_serve.common.json_schema_check import MAX_EXPRESSION_CHARACTERS, check_json_schema

KINDS = ("json", "json_object", "regex", "choice", "grammar")
"""The forms that clients may ask for."""
_ALL_KINDS = (*KINDS, "structural_tag")
_TEXTS = ("regex", "grammar", "structural_tag")
MAX_FORM_CHARACTERS = 64 * 1024
"""Longest text of a schema, and most text of all choices; see also MAX_EXPRESSION_CHARACTERS."""


class GrammarSource(NamedTuple):
    """What a grammar is compiled from; equal sources give equal grammars.

    Parameters
    ----------
    kind : str
        One of KINDS, or 'structural_tag'.
    text : str
        The schema or the list of choices as JSON, the expression, or the grammar; empty for 'json_object'.
    any_whitespace : bool
        JSON may have line ends and indents.
    """

    kind: str
    text: str
    any_whitespace: bool = True


class ReasoningTokens(msgspec.Struct, frozen=True, kw_only=True):
    """Where the reasoning of an answer begins and ends; the form holds for what follows it.

    Parameters
    ----------
    start_token_id, end_token_id : int
        Tokens of their own, such as '<think>' and '</think>'.
    is_open : bool
        The prompt ends within the reasoning; False = the answer may begin with `start_token_id`.
    """

    start_token_id: int
    end_token_id: int
    is_open: bool = False


class GrammarForm(msgspec.Struct, frozen=True, array_like=True):
    """A form that was checked, as the engine takes it: cheap to read, however long its text is.

    Parameters
    ----------
    source : GrammarSource
        What its grammar is compiled from.
    reasoning : ReasoningTokens or None
        The answer may reason before it takes its form.
    """

    source: GrammarSource
    reasoning: ReasoningTokens | None = None


class StructuredOutputsParams(msgspec.Struct, frozen=True, kw_only=True):
    """The form of an answer. Names and meanings are vLLM's; exactly one of the first six is set.

    Parameters
    ----------
    json : dict or str or None
        A JSON schema. Objects have no properties besides those that it names, in its order.
    json_object : bool or None
        True = any JSON object.
    regex : str or None
        A regular expression that the whole answer matches.
    choice : sequence of str or None
        The answer is one of these strings.
    grammar : str or None
        A grammar in GBNF, whose first rule is 'root'.
    structural_tag : str or None
        A structural tag of xgrammar as JSON: an answer that is free but for what follows given words. Whether
        its schemas are kept to exactly is not checked.
    disable_any_whitespace : bool
        JSON is written in one line, with one space after colons and commas.
    reasoning : ReasoningTokens or None
        The answer may reason before it takes its form.

    Raises
    ------
    InvalidArgumentError
        None or several of them are set, one has a wrong type, or the schema has a keyword that would not be
        kept to. Whether the text can be compiled, the engine says.
    """

    json: dict[str, Any] | str | None = None
    json_object: bool | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    structural_tag: str | None = None
    disable_any_whitespace: bool = False
    reasoning: ReasoningTokens | None = None

    def __post_init__(self) -> None:
        given = [kind for kind in _ALL_KINDS if getattr(self, kind) is not None]
        if len(given) != 1:
            found = " and ".join(given) if given else "nothing"
            raise InvalidArgumentError(
                f"structured_outputs has {found} but must have exactly one of {', '.join(KINDS)}"
            )
        if self.json_object is not None and self.json_object is not True:
            refuse("structured_outputs.json_object", self.json_object, "true, or be left out")
        for kind in _TEXTS:
            text = getattr(self, kind)
            if text is not None and (not isinstance(text, str) or not text):
                refuse(f"structured_outputs.{kind}", text, "a non-empty string")
        if self.choice is not None:
            self._check_choice(self.choice)
        if self.json is not None:
            check_json_schema(_read_schema(self.json))
        check_bool("structured_outputs.disable_any_whitespace", self.disable_any_whitespace)
        if self.reasoning is not None:
            check_int("reasoning.start_token_id", self.reasoning.start_token_id, 0)
            check_int("reasoning.end_token_id", self.reasoning.end_token_id, 0)
        text = self.source.text
        is_expression = self.regex is not None or self.grammar is not None
        most = MAX_EXPRESSION_CHARACTERS if is_expression else MAX_FORM_CHARACTERS
        if len(text) > most:
            raise InvalidArgumentError(
                f"structured_outputs.{given[0]} has {len(text)} characters but may have at most {most}; "
                "shorten it"
            )
        if not is_valid_unicode(text) or "\0" in text:
            raise InvalidArgumentError(
                f"structured_outputs.{given[0]} has a NUL or half a surrogate pair, which is no character"
            )

    @property
    def source(self) -> GrammarSource:
        """What its grammar is compiled from."""
        any_whitespace = not self.disable_any_whitespace
        if self.json is not None:
            text = json.dumps(_read_schema(self.json), ensure_ascii=False)
            return GrammarSource("json", text, any_whitespace)
        if self.choice is not None:
            return GrammarSource("choice", json.dumps(self.choice, ensure_ascii=False))
        for kind in _TEXTS:
            if getattr(self, kind) is not None:
                return GrammarSource(kind, getattr(self, kind))
        return GrammarSource("json_object", "", any_whitespace)

    @property
    def form(self) -> GrammarForm:
        """The same for the engine."""
        return GrammarForm(self.source, self.reasoning)

    @staticmethod
    def _check_choice(choice: Sequence[str]) -> None:
        if not isinstance(choice, (list, tuple)) or not choice:
            refuse("structured_outputs.choice", choice, "a list of at least one string")
        if not all(isinstance(text, str) and text for text in choice):
            refuse("structured_outputs.choice", choice, "made of non-empty strings")


def _read_schema(schema: dict[str, Any] | str) -> Any:
    if not isinstance(schema, str):
        return schema
    try:
        return json.loads(schema)
    except (ValueError, RecursionError) as error:
        raise InvalidArgumentError(
            f"structured_outputs.json is not valid JSON: {error}; send a JSON schema"
        ) from None
