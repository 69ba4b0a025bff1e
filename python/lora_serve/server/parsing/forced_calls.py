"""Tool calls whose form is forced: by `tool_choice` 'required' or a function, or by strict functions."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from lora_serve.common.json_schema_check import check_json_schema
from lora_serve.server.parsing.hermes import CLOSE, OPEN, as_call
from lora_serve.server.parsing.parts import Call, MoreArguments, Part, content_of
from lora_serve.server.protocol.tools import FunctionDefinition

_NO_ARGUMENTS: dict[str, Any] = {"type": "object", "properties": {}}


def schema_of_arguments(function: FunctionDefinition) -> dict[str, Any]:
    """Give the schema that a call's arguments keep to."""
    return _NO_ARGUMENTS if function.parameters is None else function.parameters


def schema_of_calls(functions: Sequence[FunctionDefinition], *, is_parallel: bool) -> dict[str, Any]:
    """Give the schema of a list of at least one call, of exactly one unless `is_parallel`.

    Definitions that the functions' schemas refer to move to the root, where references look for them; each
    function's get names of their own.
    """
    definitions: dict[str, Any] = {}
    calls = []
    for index, function in enumerate(functions):
        arguments = _move_definitions(schema_of_arguments(function), f"tool{index}", definitions)
        calls.append(
            {
                "type": "object",
                "properties": {"name": {"const": function.name}, "parameters": arguments},
                "required": ["name", "parameters"],
            }
        )
    schema: dict[str, Any] = {"type": "array", "minItems": 1, "items": {"anyOf": calls}}
    if not is_parallel:
        schema["maxItems"] = 1
    if definitions:
        schema["$defs"] = definitions
    return schema


def tag_of_strict_calls(functions: Sequence[FunctionDefinition], *, is_parallel: bool) -> str:
    """Give a structural tag for answers that may call functions as Hermes and Qwen write it.

    Text is free; calls are of the given functions, with arguments by the schemas of the strict ones.

    Parameters
    ----------
    functions : sequence of FunctionDefinition
        At least one.
    is_parallel : bool
        False: the answer ends with its first call.

    Raises
    ------
    InvalidArgumentError
        A strict function's schema would not be kept to exactly.
    """
    tags = []
    for function in functions:
        schema: dict[str, Any] = {"type": "object"}
        if function.strict:
            schema = schema_of_arguments(function)
            check_json_schema(schema)
        name = json.dumps(function.name, ensure_ascii=False)
        tags.append(
            {
                "begin": f'{OPEN}\n{{"name": {name}, "arguments": ',
                "content": {"type": "json_schema", "json_schema": schema},
                "end": f"}}\n{CLOSE}",
            }
        )
    form = {
        "type": "triggered_tags",
        "triggers": [OPEN],
        "tags": tags,
        "at_least_one": False,
        "stop_after_first": not is_parallel,
    }
    return json.dumps({"type": "structural_tag", "format": form}, ensure_ascii=False)


def _move_definitions(schema: dict[str, Any], prefix: str, definitions: dict[str, Any]) -> dict[str, Any]:
    def rename(value: Any) -> Any:
        if isinstance(value, list):
            return [rename(part) for part in value]
        if not isinstance(value, dict):
            return value
        renamed = {key: rename(part) for key, part in value.items()}
        reference = value.get("$ref")
        if isinstance(reference, str):
            if reference == "#":
                renamed["$ref"] = f"#/$defs/{prefix}"
            for keyword in ("$defs", "definitions"):
                if reference.startswith(f"#/{keyword}/"):
                    renamed["$ref"] = f"#/$defs/{prefix}." + reference.removeprefix(f"#/{keyword}/")
        return renamed

    body = {key: rename(part) for key, part in schema.items() if key not in ("$defs", "definitions")}
    for keyword in ("$defs", "definitions"):
        moved = schema.get(keyword, {})
        if isinstance(moved, dict):
            definitions.update({f"{prefix}.{name}": rename(part) for name, part in moved.items()})
    if f'"#/$defs/{prefix}"' in json.dumps([body, definitions]):
        definitions[prefix] = body
    return body


class NamedCallParser:
    """Implements `ToolParser` for an answer that is nothing but one function's arguments.

    Parameters
    ----------
    name : str
        The function.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._has_begun = False

    def feed(self, text: str) -> list[Part]:
        """See `ToolParser.feed`."""
        if not text:
            return []
        if self._has_begun:
            return [MoreArguments(text)]
        self._has_begun = True
        return [Call(self._name, text)]

    def flush(self) -> list[Part]:
        """See `ToolParser.flush`."""
        return []


class CallListParser:
    """Implements `ToolParser` for an answer that is a list of calls, as `schema_of_calls` has it.

    Calls are given as each is complete. One that the token limit cuts off is content: half a call is none.
    """

    def __init__(self) -> None:
        self._text = ""
        self._decoder = json.JSONDecoder()

    def feed(self, text: str) -> list[Part]:
        """See `ToolParser.feed`."""
        self._text += text
        return self._take_calls() if "}" in text else []

    def flush(self) -> list[Part]:
        """See `ToolParser.flush`."""
        parts = self._take_calls()
        rest, self._text = self._text, ""
        return parts + content_of(rest if rest.strip("[], \t\r\n") else "")

    def _take_calls(self) -> list[Part]:
        parts: list[Part] = []
        while True:
            body = self._text.lstrip("[, \t\r\n")
            try:
                value, end = self._decoder.raw_decode(body)
            except (ValueError, RecursionError):
                return parts
            call = as_call(value, ("parameters",))
            if call is None:
                return parts
            parts.append(call)
            self._text = body[end:]
